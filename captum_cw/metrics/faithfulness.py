"""Comprehensiveness and sufficiency (arXiv 2606.07604, Eq. 16-17).

Comprehensiveness removes what a method ranks highest: the model should get worse. Sufficiency
removes what it ranks lowest: the model should hardly change. Measures score pairs of head and
token in each layer. For a method with one score per token, whole tokens are removed in all heads
and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice, pairwise, product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_cw._utils.processes import Processes
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records, RecordsError
from captum_cw._utils.suggestions import kind
from captum_cw._utils.versions import versions
from captum_cw.capture.model import evaluation_mode, uncompiled, unwrapped
from captum_cw.functional import check_choice
from captum_cw.metrics.batch import Batch, BatchRun, ForeignMethod, Method, Part, Plan
from captum_cw.metrics.identity import check_identified, checksum, described, fingerprint
from captum_cw.metrics.quantities import QuantityName, quantity_of
from captum_cw.metrics.result import FaithfulnessResult
from captum_cw.removal.changes import check_self_attention
from captum_cw.removal.options import RemovalKeywords, options_from
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import TokenMethod, model_of, scorer_of
from captum_cw.removal.target_scores import TextValue, target_scorer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

__all__ = [
    "ComprehensivenessSufficiency",
    "checked_methods",
    "checked_rates",
    "comprehensiveness",
    "sufficiency",
]

#: What data may be, for error messages.
AS_DATA = "give token ids (B, T), a BatchEncoding or a dict of tensors, or an iterable of these"

#: A model soon breaks if the top is removed, and late if the bottom is removed.
DEFAULT_RATES: dict[Which, tuple[float, ...]] = {
    "top": (0.01, 0.02, 0.05, 0.1, 0.2),
    "bottom": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}


class ComprehensivenessSufficiency:
    """Measure which method finds the tokens that matter, by removing what it ranks.

    Args:
        model: the model.
        rates: the fractions to remove, ascending, in (0, 1]: one sequence for both sides, a
            mapping of ``"top"`` and ``"bottom"`` to one sequence each, or None for 0.01 to 0.2
            from the top and 0.1 to 0.9 from the bottom.
        quantity: ``"perplexity"`` or ``"nll"`` (nats) of the text; ``"log_prob"`` (nats) or
            ``"prob"`` of a target, which is the token after the text or the class of a classifier;
            ``"kl"`` (nats) from the unchanged distribution; or a callable
            ``(logits, batch, clean_logits) -> (B,)``, of which less is better unless it has an
            attribute ``higher_is_better``. Logits are ``(B, T, V)``, or ``(B, C)`` of a
            classifier. A classifier does not have a perplexity or nll.
        mask_token_id: the mask token of a masked language model such as BERT. Each token is then
            predicted at its own position, with the mask token in its place (pseudo-perplexity), so
            a text needs as many passes as it has tokens. Use None for models that predict the next
            token and for classifiers. With None, ``"kl"`` and a callable get the logits of the
            unmasked text from a masked language model.
        protected_ids: the ids of tokens that are never removed, such as class and separator
            tokens. If tokens are masked, the likelihood of these tokens does not count.
        options: how pairs are scored, ranked and protected, as for
            :class:`~captum_cw.removal.options.RemovalOptions`: ``reduction``, ``scoring``,
            ``ranking``, ``granularity``, ``rate_of``, ``protect_sinks``, ``sink_threshold``,
            ``sink_space`` and ``seed``. With ``granularity="token"`` use ``reduction="sum"``: the
            mean over queries ranks the last tokens on top, because few queries see them.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If a choice is unknown, or the rates are not ascending fractions.

    Example:
        >>> metric = ComprehensivenessSufficiency(model, rates=[0.5])
        >>> methods = {"contribution": ContributionWeights(model), "chance": "random"}
        >>> texts = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = metric.evaluate(methods, texts)
        >>> result.sufficiency["contribution"].shape, result.methods
        (torch.Size([1]), ['contribution', 'chance'])
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Sequence[float] | Mapping[Which, Sequence[float]] | None = None,
        *,
        quantity: QuantityName | Callable[..., Tensor] = "perplexity",
        mask_token_id: int | None = None,
        protected_ids: Sequence[int] = (),
        **options: Unpack[RemovalKeywords],
    ) -> None:
        self.model: nn.Module = unwrapped(model)
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        check_self_attention(self.model)
        self.rates, self.quantity = checked_rates(rates), quantity
        if mask_token_id is not None and quantity in ("log_prob", "prob"):
            raise ValueError(
                f"quantity={quantity!r} needs a prediction of the token after the text, which a "
                "masked language model does not make: use 'perplexity', 'nll', 'kl' or a callable."
            )
        chosen, protected = options_from(options), list(protected_ids)
        self._plan = Plan(self.model, chosen, mask_token_id, protected, quantity_of(quantity))

    def evaluate(
        self,
        methods: Mapping[str, object],
        inputs_or_dataloader: Batch | Iterable[Batch],
        *,
        target: int | Tensor | TextValue | None = None,
        resume_from: str | Path | None = None,
        shard: bool = False,
        show_progress: bool = True,
    ) -> FaithfulnessResult:
        """Remove what each method ranks highest or lowest, at each rate, from each example.

        Args:
            methods: by a name of your choice, one of these: a measure, or ``TokenScores`` around
                one, whose ``reduction`` and ``signed`` apply (a measure of another model of the
                same shape scores in a clean pass of that model); the name of a measure or control,
                or ``"random"``; ``ALTIWeights`` or ``TokenScores`` with ``layers="rollout"``,
                which score whole tokens in a clean pass; a callable of a batch that returns scores
                ``(B, T)``, or a tensor of such scores; a measure of a target or its name
                (``"joint"``, ``"effect"``, ``"sensitivity"``, ``"target"``, and ``"input"`` with
                ``granularity="token"``), whose sizes are summed over queries in an unchanged pass
                for all rates. Scores that you give are ranked as they are, so take absolute values
                if signs should not count.
            inputs_or_dataloader: token ids ``(B, T)``, a ``BatchEncoding`` or dict; or an iterable
                of these. Tokens whose ``labels`` are -100, such as those of a prompt, do not count
                in the likelihood, nor do tokens that an earlier token sees, such as the image
                tokens of Gemma 3. In a model of images and text, the layers that read the text
                count.
            target: for ``"log_prob"`` and ``"prob"``, the id of the token after the text or of
                the class: one for all examples, or ``(B,)``. None is the prediction of the
                unchanged model. For ``"perplexity"`` and ``"nll"``, what measures of a target
                explain: ``"logits"``, the sum of the logits of the text's own tokens;
                ``"expected_logits"``, that of the logits that the model expects; or
                ``"log_likelihood"``, the mean over the text's own tokens. None is the first for
                ``"joint"``, ``"effect"`` and ``"sensitivity"``, and the last for ``"target"`` and
                ``"input"``.
            resume_from: a file that keeps every finished batch. An interrupted run with the same
                settings, data and model resumes from it, and gives the same numbers.
            shard: whether the processes of ``torchrun`` or ``accelerate launch`` share the
                batches. Each process has a model of its own, and all of them get the result.
            show_progress: whether to show a progress bar after two seconds.

        Returns:
            The deltas by method, side, rate and example.

        Raises:
            TypeError: If a method or batch has an unknown type.
            ValueError: If a method is unknown, or its scores have the wrong shape or are not
                finite; if the data are empty, all tokens are protected, or a text has fewer than
                two tokens.
            RecordsError: If ``resume_from`` is damaged, or belongs to another run.

        Example:
            >>> metric = ComprehensivenessSufficiency(model, rates=[0.5])
            >>> methods = {"ours": ContributionWeights(model), "chance": "random"}
            >>> texts = tokenizer("The capital of France is Paris", return_tensors="pt")
            >>> metric.evaluate(methods, texts).aopc().keys()
            dict_keys(['ours', 'chance'])
        """
        self._check_target(target)
        methods = checked_methods(methods)
        scorers = {name: self._scorer(method) for name, method in methods.items()}
        settings = self._settings(methods, target)
        batches = _batches(inputs_or_dataloader)
        passes = 1 + len(scorers) * sum(map(len, self.rates.values()))
        processes = Processes(several=shard)
        one_batch = any(isinstance(x, Tensor) for x in (target, *methods.values()))
        records: list[dict[str, Any]] = []
        with ExitStack() as stack:
            kept: dict[str, Any] = {}
            if resume_from is not None and processes.is_main:
                check_identified({"quantity": settings["quantity"], **settings["methods"]})
                # The weights identify the model, wherever its files are.
                run = {name: x for name, x in settings.items() if name != "model"}
                run["weights"] = fingerprint(self.model)
                kept = stack.enter_context(Records(resume_from, run))
            known = processes.from_main(lambda: dict(kept))
            total = len(batches) * passes if isinstance(batches, Sized) else None
            show = show_progress and processes.is_main
            bar = stack.enter_context(progress_bar(total, "Faithfulness", show=show))

            def evaluate_own(group: Sequence[Part]) -> list[dict[str, Any]]:
                # The last group may have fewer batches than there are processes.
                for part in group[processes.index : processes.index + 1]:
                    finished = _finished(known, part)
                    if finished is None:
                        return self._evaluate(scorers, part, target, bar.update)
                    bar.update(passes)
                    return finished
                return []

            for group in _groups(_parts(batches), processes.count):
                _check_group(group, processes)
                if one_batch and (records or len(group) > 1):
                    raise ValueError(
                        "Scores or a target given as a tensor belong to one batch, but there are "
                        "several: give scores as a callable of the batch, and evaluate targets "
                        "batch by batch."
                    )
                for new in processes.gathered(partial(evaluate_own, group)):
                    by_key = {str(record["index"]): record for record in new}
                    kept.update({key: x for key, x in by_key.items() if key not in kept})
                    records += new
                bar.update(passes * (len(group) - 1))  # the batches of the other processes
        return FaithfulnessResult(self.rates, {**settings, "processes": processes.count}, records)

    def _scorer(self, method: object) -> Method:
        options = self._plan.options
        of_target = target_scorer(method, self.model, options.granularity)
        if of_target is not None:
            self._check_has_target(of_target.method.name)
            return of_target
        scorer = scorer_of(method, options.reduction, options.seed)
        model = model_of(method)
        if isinstance(scorer, TokenMethod) or model is None or model is self.model:
            return scorer
        return ForeignMethod(model, scorer)

    def _check_target(self, target: object) -> None:
        """Check that a target that is a name fits the quantity."""
        if isinstance(target, str):
            check_choice("target", target, TextValue)
            if not self._plan.quantity.of_text:
                raise ValueError(
                    f"target={target!r} is for 'perplexity' and 'nll', but quantity="
                    f"{self.quantity!r}: give a token or class, or None."
                )

    def _check_has_target(self, name: str) -> None:
        """Check that the quantity has a target for a measure of one."""
        plan = self._plan
        if not (plan.quantity.of_target or plan.quantity.of_text) or plan.mask_token_id is not None:
            raise ValueError(
                f"{name!r} needs a target, but quantity={self.quantity!r} has none here: use "
                "quantity='log_prob', or 'perplexity' of a model that predicts the next token."
            )

    def _settings(self, methods: Mapping[str, object], target: object) -> dict[str, Any]:
        """Return what the numbers depend on, except for the data."""
        return {
            **asdict(self._plan.options),
            "rates": {which: list(rates) for which, rates in self.rates.items()},
            "quantity": described(self.quantity, self.model),
            "higher_is_better": self._plan.quantity.higher_is_better,
            "mask_token_id": self._plan.mask_token_id,
            "protected_ids": self._plan.protected_ids,
            "target": target.tolist() if isinstance(target, Tensor) else target,
            "methods": {
                str(name): described(method, self.model) for name, method in methods.items()
            },
            "model": getattr(getattr(self.model, "config", None), "name_or_path", None),
            "versions": versions("captum"),
        }

    def _evaluate(
        self,
        methods: Mapping[str, Method],
        part: Part,
        target: int | Tensor | TextValue | None,
        advance: Callable[[], object],
    ) -> list[dict[str, Any]]:
        """Return the records of one batch."""
        compute = self._plan.quantity.compute
        removals = [(which, rate) for which, rates in self.rates.items() for rate in rates]

        def by_rate() -> dict[str, dict[str, list[float]]]:
            return {name: {which: [] for which in self.rates} for name in methods}

        with torch.no_grad(), evaluation_mode([self.model], self.model), uncompiled():
            run = BatchRun(self._plan, part, methods, target)
            advance()
            clean, nll = compute(run.unchanged).tolist(), run.unchanged.nll
            records: list[dict[str, Any]] = [
                {**example, "clean": clean[b], "values": by_rate()}
                for b, example in enumerate(part.examples)
            ]
            if nll is not None:
                rows = zip(records, nll.tolist(), run.counts.tolist(), strict=True)
                for record, x, count in rows:
                    record.update(clean_nll=x, count=count, nll=by_rate())
            for name, (which, rate) in product(methods, removals):
                with run.removal(name, rate, which).in_force():
                    logits = run.logits()
                changed = run.measured(logits)
                measured = {"values": compute(changed)}
                if changed.nll is not None:
                    measured["nll"] = changed.nll
                for what, values in measured.items():
                    for record, x in zip(records, values.tolist(), strict=True):
                        record[what][name][which].append(x)
                advance()
        return records


def comprehensiveness(
    forward_func: nn.Module,
    inputs: Batch,
    attributions: object,
    rates: Sequence[float] = DEFAULT_RATES["top"],
    *,
    target: int | Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return how much the model loses without what ``attributions`` rank highest (Eq. 16).

    Args:
        forward_func: the model.
        inputs: token ids ``(B, T)``, a ``BatchEncoding`` or dict.
        attributions: scores ``(B, T)``, a measure or a name, as for
            :meth:`ComprehensivenessSufficiency.evaluate`.
        rates: the fractions to remove.
        target: the target of the quantities ``"log_prob"`` and ``"prob"``.
        settings: as for :class:`ComprehensivenessSufficiency`.

    Returns:
        The deltas ``(B, rates)``, in the unit of the quantity. Higher is better.

    Raises:
        TypeError, ValueError: As :class:`ComprehensivenessSufficiency`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> comprehensiveness(model, inputs, ContributionWeights(model), [0.25, 0.5]).shape
        torch.Size([1, 2])
    """
    metric = ComprehensivenessSufficiency(forward_func, {"top": rates}, **settings)
    return _deltas(metric, inputs, attributions, target)


def sufficiency(
    forward_func: nn.Module,
    inputs: Batch,
    attributions: object,
    rates: Sequence[float] = DEFAULT_RATES["bottom"],
    *,
    target: int | Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return how much the model loses without what ``attributions`` rank lowest (Eq. 17).

    The arguments and errors are those of :func:`comprehensiveness`.

    Returns:
        The deltas ``(B, rates)``, in the unit of the quantity. Lower is better.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> scores = torch.tensor([[0.1, 0.2, 0.1, 0.3, 0.1, 0.2]])
        >>> sufficiency(model, inputs, scores, [0.5]).shape
        torch.Size([1, 1])
    """
    metric = ComprehensivenessSufficiency(forward_func, {"bottom": rates}, **settings)
    return _deltas(metric, inputs, attributions, target)


def _deltas(
    metric: ComprehensivenessSufficiency, inputs: Batch, method: object, target: int | Tensor | None
) -> Tensor:
    """Return the deltas ``(B, rates)`` of a metric with one side."""
    result = metric.evaluate({"": method}, inputs, target=target, show_progress=False)
    (side,) = result.sides
    return result.deltas("", side)


# ---------------------------------------------------------------------------------------------
# Batches


def _batches(given: Batch | Iterable[Batch]) -> Iterable[Batch]:
    if isinstance(given, tuple):
        raise TypeError(
            f"The inputs are a tuple of {len(given)}: give a dict with names, such as input_ids "
            "and attention_mask, or a list of batches."
        )
    if isinstance(given, (Tensor, Mapping)):
        return [given]
    try:
        iter(given)  # also of a data set that has only __getitem__
    except TypeError:
        raise TypeError(f"The data are {kind(given)}: {AS_DATA}.") from None
    return given


def _parts(batches: Iterable[Batch]) -> Iterator[Part]:
    first = 0
    for batch in batches:
        if isinstance(batch, (list, tuple)) and all(isinstance(x, Tensor) for x in batch):
            if len(batch) > 1:
                raise TypeError(
                    f"A batch has {len(batch)} tensors without names: give a dict with names, such "
                    "as input_ids and attention_mask."
                )
            (batch,) = batch[:1]  # as a TensorDataset returns it
        if not isinstance(batch, (Tensor, Mapping)):
            raise TypeError(f"A batch is {kind(batch)}: {AS_DATA}.")
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        ids = inputs.get("input_ids")
        B = len(ids) if isinstance(ids, Tensor) and ids.dim() else 0
        if not B:
            raise ValueError(
                "A batch is empty, or has no tensor input_ids: give at least one example (for "
                "texts, tokenize with return_tensors='pt')."
            )
        content = checksum(*(x for x in inputs.values() if isinstance(x, Tensor)))
        yield Part(batch, [{"index": first + b, "batch": content} for b in range(B)])
        first += B


def _groups(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    parts = iter(parts)
    while group := list(islice(parts, size)):
        yield group


def _check_group(group: Sequence[Part], processes: Processes) -> None:
    """Check that all processes see the same batches in the same order."""
    here = [part.examples[0]["batch"] for part in group]
    if processes.count > 1 and any(there != here for there in processes.gathered(lambda: here)):
        raise ValueError(
            "The processes see different batches, or a different order: if you shuffle, use the "
            "same seed in all processes."
        )


def _finished(known: Mapping[str, Any], part: Part) -> list[dict[str, Any]] | None:
    """Return the kept records of a batch; None if not all of them were kept.

    Raises:
        RecordsError: If they belong to other data.
    """
    keys = [str(example["index"]) for example in part.examples]
    records = [known[key] for key in keys if key in known]
    for record in records:
        if record["batch"] != part.examples[0]["batch"]:
            raise RecordsError(
                f"Example {record['index']} was kept from another batch: use the same data and "
                "batch size, or choose another file."
            )
    return records if len(records) == len(keys) else None


def checked_rates(
    rates: Sequence[float] | Mapping[Which, Sequence[float]] | None,
) -> dict[Which, tuple[float, ...]]:
    """Return the rates of both sides, or the default rates for None.

    Raises:
        ValueError: If a side is unknown, or its rates are not ascending fractions.

    Example:
        >>> checked_rates({"top": [0.1, 0.2]})
        {'top': (0.1, 0.2)}
    """
    if rates is None:
        return dict(DEFAULT_RATES)
    if not isinstance(rates, Mapping):
        return checked_rates({"top": rates, "bottom": rates})
    checked: dict[Which, tuple[float, ...]] = {}
    for which, given in rates.items():
        check_choice("which", which, Which)
        several = isinstance(given, Iterable) and not isinstance(given, str)
        fractions = list(given) if several else []
        if not fractions or not all(map(_is_fraction, fractions)):
            raise ValueError(
                f"rates must be fractions in (0, 1], such as [0.1, 0.5], got {given!r}."
            )
        if any(a >= b for a, b in pairwise(fractions)):
            raise ValueError(f"rates must be in ascending order, each once, got {given}.")
        checked[which] = tuple(map(float, fractions))
    return checked


def _is_fraction(rate: object) -> bool:
    return isinstance(rate, (Real, Tensor)) and bool(0 < rate <= 1)  # type: ignore[operator]


def checked_methods(methods: Mapping[str, object]) -> Mapping[str, object]:
    """Return methods, of which there is at least one.

    Raises:
        TypeError: If they do not have names.
        ValueError: If there are none.

    Example:
        >>> checked_methods({"chance": "random"})
        {'chance': 'random'}
    """
    if not isinstance(methods, Mapping):
        raise TypeError(
            f"methods is {kind(methods)}: give each method a name of your choice, such as "
            "{'ours': ContributionWeights(model), 'chance': 'random'}."
        )
    if not methods:
        raise ValueError("methods is empty: give at least one method.")
    return methods
