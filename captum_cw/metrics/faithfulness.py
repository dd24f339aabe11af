"""Comprehensiveness and sufficiency (arXiv 2606.07604, Eq. 16-17).

What a method ranks highest is removed (comprehensiveness: the model should suffer), or what it
ranks lowest (sufficiency: it should not). Scores rank pairs of head and token in each layer; for
methods that give one score a token, whole tokens are removed in all heads and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from captum_cw._utils.processes import Processes
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records, RecordsError
from captum_cw._version import __version__
from captum_cw.capture.model import (
    evaluation_mode,
    uncompiled,
    unwrapped,
)
from captum_cw.functional import check_choice
from captum_cw.metrics.batch import (
    Batch,
    BatchRun,
    ForeignMethod,
    Method,
    Part,
    Plan,
)
from captum_cw.metrics.identity import check_told, checksum, described, fingerprint
from captum_cw.metrics.quantities import QuantityName, quantity_of
from captum_cw.metrics.result import REMOVED, FaithfulnessResult, Side
from captum_cw.removal.changes import check_self_attention
from captum_cw.removal.options import RemovalKeywords, RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import TokenMethod, model_of, scorer_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

__all__ = ["ComprehensivenessSufficiency", "comprehensiveness", "sufficiency"]

T = TypeVar("T")

#: Removal from the top soon leaves no model; from the bottom it goes far.
DEFAULT_RATES: dict[Which, tuple[float, ...]] = {
    "top": (0.01, 0.02, 0.05, 0.1, 0.2),
    "bottom": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}


class ComprehensivenessSufficiency:
    """Which method finds the tokens that matter, measured by removing what it ranks.

    Args:
        model: The model.
        rates: The fractions to remove, ascending, in (0, 1]; one sequence for both sides, a
            mapping of ``"top"`` and ``"bottom"`` to one each, or None for 0.01 to 0.2 from the top
            and 0.1 to 0.9 from the bottom.
        quantity: ``"perplexity"`` and ``"nll"`` of the text; ``"log_prob"`` and ``"prob"`` of a
            target: the token after the text, or the class of a classifier; ``"kl"`` from the
            unchanged distribution; or a callable ``(logits, batch, clean_logits) -> (B,)``, better
            if lower unless it says ``higher_is_better``. Logits are ``(B, T, V)``, of a classifier
            ``(B, C)``. A classifier has no perplexity and no nll: they are refused.
        mask_token_id: Of a masked language model, such as BERT: the logits of each token are
            those at its place with this token there instead (pseudo-perplexity), so that a text
            takes as many passes as it has tokens. None for models that predict the next token and
            for classifiers; of a masked language model, ``"kl"`` and a callable then get the logits
            of the text as it is.
        protected_ids: Token ids that are never removed, and whose likelihood does not count where
            tokens are masked, such as those of class and separator tokens.
        options: How pairs are scored, ranked and protected, as
            :class:`~captum_cw.removal.options.RemovalOptions` says: ``reduction``, ``scoring``,
            ``ranking``, ``granularity``, ``rate_of``, ``protect_sinks``, ``sink_threshold``,
            ``sink_space`` and ``seed``. With ``granularity="token"`` use ``reduction="sum"``: the
            mean over queries ranks whole tokens badly, since it puts the last tokens, which few
            queries see, on top.

    Raises:
        TypeError, ValueError: If a choice is unknown, or the rates are no fractions in order.

    Example:
        >>> metric = ComprehensivenessSufficiency(model, rates=[0.5])
        >>> methods = {"contribution": ContributionWeights(model), "chance": "random"}
        >>> result = metric.evaluate(methods, input_ids)
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
            raise TypeError(f"model is of type {type(model).__name__}: give the model itself.")
        check_self_attention(self.model)
        self.rates = checked_rates(rates)
        self.options = RemovalOptions(**options)
        self.quantity = quantity
        self.mask_token_id = mask_token_id
        self.protected_ids = list(protected_ids)
        if mask_token_id is not None and quantity in ("log_prob", "prob"):
            raise ValueError(
                f"quantity={quantity!r} is of the token after the text, which a masked language "
                "model does not predict: use 'perplexity', 'nll', 'kl' or a callable."
            )
        self._quantity = quantity_of(quantity)

    def evaluate(
        self,
        methods: Mapping[str, object],
        inputs_or_dataloader: Batch | Iterable[Batch],
        *,
        target: int | Tensor | None = None,
        resume_from: str | Path | None = None,
        shard: bool = False,
        show_progress: bool = True,
    ) -> FaithfulnessResult:
        """Removes what each method ranks, at each rate, from each example.

        Args:
            methods: By a name of your choice: a measure, ``TokenScores`` around one (whose
                ``reduction`` and ``signed`` count; one of another model of the same shape scores
                in a clean pass of that model), the name of a measure or control,
                ``"random"``; ``TokenScores`` with ``layers="rollout"``, or
                ``ALTIWeights``, which score whole tokens in an unchanged pass; or a callable that
                takes a batch, or a tensor, that gives ``(B, T)`` scores, ranked as they are (take
                absolute values where signs should not count).
            inputs_or_dataloader: Token ids ``(B, T)``, a ``BatchEncoding`` or dict; or an
                iterable of these. Tokens whose ``labels`` are -100, such as those of a prompt, do
                not count in the likelihood, nor do those that tokens before them see, such as the
                tokens of an image in Gemma 3. Beside images, the layers count that read the text.
            target: For ``"log_prob"`` and ``"prob"``: the id of the token after the text, or of
                the class, one for all or ``(B,)``; None for what the unchanged model predicts.
            resume_from: A file that keeps every finished batch; an interrupted run of the same
                settings, data and model goes on from it, to the same numbers.
            shard: Under ``torchrun`` or ``accelerate launch``, shares the batches between the
                processes, each of which has a model of its own; all of them get the result.
            show_progress: Shows a bar once it has taken two seconds.

        Returns:
            Deltas by method, side, rate and example.

        Raises:
            TypeError, ValueError: If a method is none of these, its scores are of another shape or
                not finite, there are no data, all tokens are protected, or a text has less than
                two tokens.
            RecordsError: If ``resume_from`` is damaged, or of another run.

        Example:
            >>> metric = ComprehensivenessSufficiency(model, rates=[0.5])
            >>> methods = {"ours": ContributionWeights(model), "chance": "random"}
            >>> metric.evaluate(methods, input_ids).aopc().keys()
            dict_keys(['ours', 'chance'])
        """
        scorers = {name: self._scorer(method) for name, method in methods.items()}
        if not scorers:
            raise ValueError("There is no method to evaluate: methods is empty.")
        settings = self._settings(methods, target)
        batches, count = _batches(inputs_or_dataloader)
        passes = 1 + len(scorers) * sum(map(len, self.rates.values()))
        processes = Processes(several=shard)
        records: list[dict[str, Any]] = []
        with ExitStack() as stack:
            kept: Records | None = None
            if resume_from is not None and processes.is_main:
                # Reading all weights takes time, and only a file needs to know them again. They
                # say which model it is, wherever it lies.
                check_told({"quantity": settings["quantity"], **settings["methods"]})
                run = {name: x for name, x in settings.items() if name != "model"}
                run["weights"] = fingerprint(self.model)
                kept = stack.enter_context(Records(resume_from, run))
            known = processes.from_main(lambda: dict(kept or {}))
            total = None if count is None else count * passes
            show = show_progress and processes.is_main
            bar = stack.enter_context(progress_bar(total, "Faithfulness", show=show))

            def records_of(part: Part) -> list[dict[str, Any]]:
                done = _known(known, part)
                if done is None:
                    return self._evaluate(scorers, part, target, bar.update)
                bar.update(passes)
                return done

            fixed = isinstance(target, Tensor) or any(
                isinstance(method, Tensor) for method in methods.values()
            )
            for group in _groups(_parts(batches), processes.count):
                _check_group(group, processes)
                if fixed and (records or len(group) > 1):
                    raise ValueError(
                        "Scores or a target given as a tensor belong to one batch, but there are "
                        "several: give scores as a callable of the batch, and evaluate targets "
                        "batch by batch."
                    )
                # The last group may hold less than one part for each process.
                mine = group[processes.index : processes.index + 1]
                found = processes.gathered(partial(_each, records_of, mine))
                for done in chain.from_iterable(found):
                    if kept is not None:
                        kept.update({key: r for key, r in _keyed(done) if key not in kept})
                    records += done
                bar.update(passes * (len(group) - 1))  # those of the other processes
        return FaithfulnessResult(self.rates, {**settings, "processes": processes.count}, records)

    def _scorer(self, method: object) -> Method:
        scorer = scorer_of(method, self.options.reduction, self.options.seed)
        model = model_of(method)
        if isinstance(scorer, TokenMethod) or model is None or model is self.model:
            return scorer
        return ForeignMethod(model, scorer)

    def _plan(self) -> Plan:
        return Plan(
            self.model, self.options, self.mask_token_id, self.protected_ids, self._quantity
        )

    def _settings(self, methods: Mapping[str, object], target: object) -> dict[str, Any]:
        """What the numbers depend on, but the data and the model."""
        return {
            **asdict(self.options),
            "rates": {which: list(rates) for which, rates in self.rates.items()},
            "quantity": described(self.quantity, self.model),
            "higher_is_better": self._quantity.higher_is_better,
            "mask_token_id": self.mask_token_id,
            "protected_ids": self.protected_ids,
            "target": target.tolist() if isinstance(target, Tensor) else target,
            "methods": {
                str(name): described(method, self.model) for name, method in methods.items()
            },
            "model": getattr(getattr(self.model, "config", None), "name_or_path", None),
            "versions": {p: version(p) for p in ("torch", "transformers", "captum")}
            | {"captum_cw": __version__},
        }

    def _evaluate(
        self,
        methods: Mapping[str, Method],
        part: Part,
        target: int | Tensor | None,
        advance: Callable[[], object],
    ) -> list[dict[str, Any]]:
        """The records of one batch."""
        with torch.no_grad(), evaluation_mode([self.model], self.model), uncompiled():
            run = BatchRun(self._plan(), part, methods, target)
            advance()
            table: dict[str, dict[str, dict[str, list[Tensor]]]] = {
                what: {name: {which: [] for which in self.rates} for name in methods}
                for what in ("values", "nll")
            }
            for name in methods:
                for which, rates in self.rates.items():
                    for rate in rates:
                        with run.removal(name, rate, which).in_force():
                            logits = run.logits()
                        found = run.measured(logits)
                        table["values"][name][which].append(self._quantity(found).cpu())
                        if found.nll is not None:
                            table["nll"][name][which].append(found.nll.cpu())
                        advance()
            clean, nll = self._quantity(run.unchanged).tolist(), run.unchanged.nll
        known: list[dict[str, Any]] = [{} for _ in part.examples]
        if nll is None:
            del table["nll"]
        else:
            for of, x, count in zip(known, nll.tolist(), run.counts.tolist(), strict=True):
                of.update(clean_nll=x, count=count)
        return [
            {
                **example,
                "clean": clean[b],
                **known[b],
                **{
                    what: {
                        name: {which: [float(x[b]) for x in xs] for which, xs in sides.items()}
                        for name, sides in by_method.items()
                    }
                    for what, by_method in table.items()
                },
            }
            for b, example in enumerate(part.examples)
        ]


def comprehensiveness(
    forward_func: nn.Module,
    inputs: Batch,
    attributions: object,
    rates: Sequence[float] = DEFAULT_RATES["top"],
    *,
    target: int | Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """How much the metric loses as what ``attributions`` rank highest is removed (Eq. 16).

    Args:
        forward_func: The model.
        inputs: Token ids ``(B, T)``, a ``BatchEncoding`` or dict.
        attributions: Scores ``(B, T)``, a measure, or a name, as for
            :meth:`ComprehensivenessSufficiency.evaluate`.
        rates: The fractions to remove.
        target: For the quantities ``"log_prob"`` and ``"prob"``.
        settings: As for :class:`ComprehensivenessSufficiency`.

    Returns:
        ``(B, rates)``; higher is better.

    Example:
        >>> comprehensiveness(model, input_ids, ContributionWeights(model), [0.25, 0.5]).shape
        torch.Size([1, 2])
    """
    return _one_side(
        "comprehensiveness", forward_func, inputs, attributions, rates, target, settings
    )


def sufficiency(
    forward_func: nn.Module,
    inputs: Batch,
    attributions: object,
    rates: Sequence[float] = DEFAULT_RATES["bottom"],
    *,
    target: int | Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """How much the metric loses as what ``attributions`` rank lowest is removed (Eq. 17).

    Args and example as :func:`comprehensiveness`.

    Returns:
        ``(B, rates)``; lower is better.

    Example:
        >>> sufficiency(model, input_ids, torch.tensor([[5.0, 4, 3, 2, 1]]), [0.5]).shape
        torch.Size([1, 1])
    """
    return _one_side("sufficiency", forward_func, inputs, attributions, rates, target, settings)


def _one_side(
    side: Side,
    model: nn.Module,
    inputs: Batch,
    method: object,
    rates: Sequence[float],
    target: int | Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    metric = ComprehensivenessSufficiency(model, {REMOVED[side]: rates}, **settings)
    result = metric.evaluate({"": method}, inputs, target=target, show_progress=False)
    return result.deltas("", side)


# ---------------------------------------------------------------------------------------------
# Parts


def _parts(batches: Iterable[Batch]) -> Iterator[Part]:
    first = 0
    for batch in batches:
        if isinstance(batch, (list, tuple)) and all(isinstance(x, Tensor) for x in batch):
            (batch,) = batch[:1]  # as a TensorDataset gives it
        if not isinstance(batch, (Tensor, Mapping)):
            raise TypeError(
                f"A batch is of type {type(batch).__name__}: give token ids (B, T), a "
                "BatchEncoding or a dict of tensors, or an iterable of these."
            )
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        ids = given.get("input_ids")
        B = len(ids) if isinstance(ids, Tensor) and ids.dim() else 0
        if not B:
            raise ValueError(
                "A batch is empty, or has no tensor input_ids: give at least one example (for "
                "texts, tokenize with return_tensors='pt')."
            )
        whole = checksum(*(x for x in given.values() if isinstance(x, Tensor)))
        yield Part(batch, [{"index": first + b, "batch": whole} for b in range(B)])
        first += B


def _check_group(group: Sequence[Part], processes: Processes) -> None:
    """All processes must see the same batches in the same order."""
    here = [part.examples[0]["batch"] for part in group]
    if processes.count > 1 and any(there != here for there in processes.gathered(lambda: here)):
        raise ValueError(
            "The processes see other batches, or another order: shuffle with the same seed, or not."
        )


def _groups(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    parts = iter(parts)
    while group := list(islice(parts, size)):
        yield group


def _each(work: Callable[[Part], T], parts: Iterable[Part]) -> list[T]:
    return [work(part) for part in parts]


def _keyed(records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((str(record["index"]), record) for record in records)


def _known(known: Mapping[str, Any], part: Part) -> list[dict[str, Any]] | None:
    """The records of a batch, if all of them were kept.

    Raises:
        RecordsError: If what was kept is of other data.
    """
    keys = [key for key, _ in _keyed(part.examples)]
    found = [known[key] for key in keys if key in known]
    for record in found:
        if record["batch"] != part.examples[0]["batch"]:
            raise RecordsError(
                f"Example {record['index']} was kept from another batch: go on with the same data "
                "and batch size, or choose another file."
            )
    return found if len(found) == len(keys) else None


def _batches(data: Batch | Iterable[Batch]) -> tuple[Iterable[Batch], int | None]:
    """Batches, and how many there are where that is known."""
    if isinstance(data, (Tensor, Mapping)):
        return [data], 1
    return data, len(data) if isinstance(data, Sized) else None


def checked_rates(
    rates: Sequence[float] | Mapping[Which, Sequence[float]] | None,
) -> dict[Which, tuple[float, ...]]:
    if rates is None:
        return dict(DEFAULT_RATES)
    if not isinstance(rates, Mapping):
        return checked_rates({"top": rates, "bottom": rates})
    for which, several in rates.items():
        check_choice("which", which, Which)
        if not several or not all(0 < rate <= 1 for rate in several):
            raise ValueError(f"rates={several}: give fractions in (0, 1].")
        if any(a >= b for a, b in pairwise(several)):
            raise ValueError(f"rates={several}: give them in ascending order, each once.")
    return {which: tuple(map(float, several)) for which, several in rates.items()}
