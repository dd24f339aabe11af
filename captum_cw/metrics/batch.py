"""The clean pass over one batch, and the passes with removal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.forward_call import forward_call, run_on_copies
from captum_cw.capture.model import LOGITS, evaluation_mode, vocabulary_size
from captum_cw.capture.outputs import predictions_of
from captum_cw.capture.text_layers import TextLayers
from captum_cw.metrics.quantities import Logits, Quantity, last_rows, mean_nll
from captum_cw.removal.changes import FixedChange, RankedRemoval
from captum_cw.removal.clean_pass import CleanPass
from captum_cw.removal.options import RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import PairScorer, RandomPairs, TokenMethod
from captum_cw.removal.target_scores import OwnText, TargetScorer, TextValue
from captum_cw.removal.virtual_tokens import behind, virtual_tokens

__all__ = ["Batch", "BatchRun", "ForeignMethod", "Method", "Part", "Plan"]

Batch = Tensor | Mapping[str, Any]
#: The label of a token whose likelihood does not count, in PyTorch and transformers.
IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """The settings that all batches share.

    Args:
        model: the model.
        options: how pairs are scored, ranked and protected.
        mask_token_id: as for :class:`captum_cw.ComprehensivenessSufficiency`.
        protected_ids: as for :class:`captum_cw.ComprehensivenessSufficiency`.
        quantity: the quantity that is compared.
    """

    model: nn.Module
    options: RemovalOptions
    mask_token_id: int | None
    protected_ids: Sequence[int]
    quantity: Quantity


@dataclass(frozen=True)
class Part:
    """A batch, and the start of the record of each of its examples.

    Args:
        batch: the batch.
        examples: for each example its ``index`` among all examples, and a checksum of its
            ``batch``, which the last bits of its numbers depend on.
    """

    batch: Batch
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class ForeignMethod:
    """Scores of pairs by another model of the same shape, in a clean pass of its own.

    Args:
        model: the other model.
        scorer: scores the pairs of one layer.
    """

    model: nn.Module
    scorer: PairScorer


Method = PairScorer | TokenMethod | TargetScorer | ForeignMethod


class BatchRun:
    """The passes over one batch. The clean pass runs at once.

    Args:
        plan: the settings.
        part: the batch.
        methods: the scorers by name.
        target: the token or class for ``"log_prob"`` and ``"prob"``; None for the model's own
            prediction. For quantities of the text, what measures of a target explain.

    Attributes:
        clean: the clean pass.
        token_mask: ``(B, T)``, False at padding.
        predicted: ``(B, T)``, True at tokens that the tokens before them predict; None if the
            model does not predict the next token.
        counted: ``(B, T - 1)``, True at predicted tokens whose likelihood counts, or ``(B, T)`` if
            tokens are masked; None if the model does not predict tokens.
        unchanged: the logits of the clean pass.
    """

    def __init__(
        self,
        plan: Plan,
        part: Part,
        methods: Mapping[str, Method],
        target: int | Tensor | TextValue | None,
    ) -> None:
        self.plan, self.batch = plan, part.batch
        self.text_value = target if isinstance(target, str) else None
        self.target = None if isinstance(target, str) else target
        keys = tuple(str(example["index"]) for example in part.examples)
        self.methods = {
            name: replace(method, examples=keys) if isinstance(method, RandomPairs) else method
            for name, method in methods.items()
        }
        call = forward_call(plan.model, plan.model.forward, part.batch, None)
        self.given = {name: x for name, x in call.kwargs.items() if name != LOGITS}
        # With labels, the model would compute a loss that is not needed.
        self.inputs = {name: x for name, x in self.given.items() if name != "labels"}
        self.ids = _token_ids(self.inputs)
        self._text = call.text
        self.clean = self._clean_pass(call.token_masks, call.text)
        _check_tokens(plan.model, self.clean, self.ids)
        self.token_mask = self.clean.real[0][:, -self.ids.shape[1] :]
        self._protected = torch.isin(self.ids, self.ids.new_tensor(plan.protected_ids))
        self._protected = self._protected.to(self.token_mask.device)
        self._kept = [x | behind(self._protected, x.shape[1]) for x in self.clean.kept]
        logits = self._text_logits(self.clean.output)
        self.predicts = _predicts(plan.model, logits, self.ids)
        self.predicted = self._predicted()
        self._check_quantity(logits)
        self.counted = self._counted()
        self.clean_logits = logits if plan.mask_token_id is None else self.logits()
        self.unchanged = self.measured(self.clean_logits)
        self.target = self.unchanged.target
        self._check_removable()
        self._scores = self._scores_before(call.token_masks, call.text)
        self.clean.shares = None  # they are large

    def removal(self, name: str, rate: float, which: Which) -> FixedChange | RankedRemoval:
        """Return the change of a pass that removes what a method ranks at the top or bottom."""
        model, options, method = self.plan.model, self.plan.options, self.methods[name]
        if name in self._scores:
            scores = self._scores[name]
            factors = self.clean.factors(rate, which, options, scores, self._kept)
            registered = self.clean.all_registered and self._text is None
            return FixedChange(model, factors, registered_only=registered)
        assert isinstance(method, PairScorer)  # other methods have scores by now
        return RankedRemoval(model, method, rate, which, options, self._kept)

    def logits(self) -> Tensor:
        """Run a pass and return its logits.

        Returns:
            The logits ``(B, T, V)`` of the next token at each token, or ``(B, C)`` of classes. With
            a mask token, the logits of each token at its own position, with this token masked.
        """
        model, mask = self.plan.model, self.plan.mask_token_id
        if mask is None:
            return self._text_logits(run_on_copies(model, self.inputs))
        rows = []
        for position in range(self.ids.shape[1]):
            masked = self.ids.clone()
            masked[:, position] = mask
            logits = self._text_logits(run_on_copies(model, {**self.inputs, "input_ids": masked}))
            rows.append(logits[:, position].clone())  # a view would keep the logits of all tokens
        return torch.stack(rows, 1)

    def measured(self, logits: Tensor) -> Logits:
        """Return the logits with all that quantities are computed from."""
        masked, nll = self.plan.mask_token_id is not None, None
        if self.counted is not None:
            shifted = (logits, self.ids) if masked else (logits[:, :-1], self.ids[:, 1:])
            nll, self.counts = mean_nll(*shifted, self.counted)
        if (logits if nll is None else nll).isnan().any():
            raise ValueError(
                "The logits are NaN: check the inputs and weights. If the model is in float16, "
                "load it in bfloat16 or float32."
            )
        # If tokens are masked, only the predicted ones count.
        mask = self.counted if masked and self.counted is not None else self.token_mask
        return Logits(logits, self.given, mask, self.clean_logits, self._target(logits), nll)

    def _clean_pass(self, masks: Sequence[Tensor], text: TextLayers | None) -> CleanPass:
        model, options = self.plan.model, self.plan.options
        scorers: dict[str, PairScorer] = {
            name: method
            for name, method in self.methods.items()
            if isinstance(method, PairScorer) and options.scores_before
        }
        forward = partial(run_on_copies, model, self.inputs)
        of_target = (x for x in self.methods.values() if isinstance(x, TargetScorer))
        shares = any(method.needs_shares for method in of_target)
        clean = CleanPass.run(model, forward, scorers, options, masks, text, shares)
        if clean.vanishing:
            warnings.warn(
                f"{clean.vanishing} attention outputs of a batch vanish. Measures that are "
                "relative to the output count their rows as zeros.",
                stacklevel=5,
            )
        return clean

    def _text_logits(self, output: Any) -> Tensor:
        """Return the logits ``(B, T, V)`` at the tokens of the text, or ``(B, C)``."""
        logits = predictions_of(output)
        if logits.dim() == 2:
            return logits
        T, longest = self.ids.shape[1], self.clean.real[0].shape[1]
        if logits.shape[1] not in (T, longest):
            raise ValueError(
                f"The model returned logits {tuple(logits.shape)} for {T} tokens: use a model with "
                "logits (B, T, V) of all tokens, or (B, C) of classes."
            )
        return logits[:, -T:]

    def _predicted(self) -> Tensor | None:
        """Return ``(B, T)``, False at tokens that an earlier token sees, as those of an image."""
        if self.clean.ahead is None:
            return self.token_mask
        predicted = self.token_mask & ~self.clean.ahead[:, -self.token_mask.shape[1] :]
        pairs = self.token_mask[:, 1:] & self.token_mask[:, :-1]
        predicts_none = pairs.any(1) & ~(pairs & predicted[:, 1:]).any(1)
        return None if predicts_none.any() else predicted

    def _check_quantity(self, logits: Tensor) -> None:
        """Raise a ValueError if the model does not predict what the quantity needs."""
        plan, name = self.plan, type(self.plan.model).__name__
        masked, classes = plan.mask_token_id is not None, self.predicts == "classes"
        causal = self.predicted is not None
        # Texts of one token do not show whether a model is causal.
        if masked and (classes or (causal and bool((self.token_mask.sum(1) > 1).any()))):
            raise ValueError(
                f"mask_token_id={plan.mask_token_id} is for masked language models, but {name} "
                f"predicts {'classes' if classes else 'the next token'}: leave it out."
            )
        if plan.quantity.of_text and classes:
            raise ValueError(
                f"{name} predicts classes, not tokens (its logits are {tuple(logits.shape)}), so "
                "the text has no perplexity or likelihood: use quantity='log_prob' or 'prob' (of a "
                "class), 'kl', or a callable (logits, batch, clean_logits) -> (B,)."
            )
        if plan.quantity.of_text and not masked and not causal:
            raise ValueError(
                f"{name} sees later tokens, so it does not predict the next one: give "
                "mask_token_id (and protected_ids) of a masked language model, or another "
                "quantity: 'kl', or a callable (logits, batch, clean_logits) -> (B,)."
            )
        if plan.quantity.of_target and logits.dim() == 3 and (classes or not causal):
            raise ValueError(
                f"{name} makes a prediction for each token, but 'log_prob' and 'prob' need one for "
                "the token after the text: use 'kl', or a callable (logits, batch, clean_logits) "
                "-> (B,)."
            )

    def _counted(self) -> Tensor | None:
        if self.predicts == "classes":
            return None
        labelled = self._labelled()
        if self.plan.mask_token_id is not None:
            return self.token_mask & ~self._protected & labelled
        if self.predicted is None:
            return None
        return (self.predicted & labelled)[:, 1:] & self.token_mask[:, :-1]

    def _labelled(self) -> Tensor:
        """Return ``(B, T)``, False at tokens that the labels ignore."""
        labels = self.given.get("labels")
        if not isinstance(labels, Tensor):
            return torch.ones_like(self.token_mask)
        if labels.shape != self.ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, {tuple(self.ids.shape)}, got "
                f"{tuple(labels.shape)}: use -100 for tokens whose likelihood does not count."
            )
        return (labels != IGNORED).to(self.token_mask.device)

    def _check_removable(self) -> None:
        if torch.stack(self._kept).all(0).all(-1).any():
            raise ValueError(
                "All tokens of an example are protected, so none can be removed: use longer texts, "
                "a higher sink_threshold, or protect_sinks=False."
            )

    def _scores_before(
        self, masks: Sequence[Tensor], text: TextLayers | None
    ) -> dict[str, Tensor | list[Tensor]]:
        """Return the scores that are known before the removal, for :meth:`CleanPass.factors`."""
        scores: dict[str, Tensor | list[Tensor]] = {**self.clean.scores}
        real, options = self.clean.real[0], RemovalOptions(protect_sinks=False)
        for name, method in self.methods.items():
            if isinstance(method, ForeignMethod):
                forward = partial(run_on_copies, method.model, self.inputs)
                scorers = {name: method.scorer}
                with evaluation_mode([method.model], method.model):
                    clean = CleanPass.run(method.model, forward, scorers, options, masks, text)
                scores[name] = [behind(x, real.shape[1]) for x in clean.scores[name]]
            elif isinstance(method, TargetScorer):
                scores[name] = self._target_scores(method)
            elif isinstance(method, TokenMethod):
                try:
                    scores[name] = method.checked(self.batch, self.ids.shape[1], real)
                except ValueError as error:
                    raise ValueError(f"Method {name!r}: {error}") from error
        return scores

    def _target_scores(self, method: TargetScorer) -> Tensor | list[Tensor]:
        """Return scores for the target of the quantity, or for the tokens of the text."""
        target: Tensor | OwnText = self.unchanged.target
        if self.plan.quantity.of_text:
            assert self.counted is not None  # otherwise the quantity is refused
            target = OwnText(self.ids, self.counted, self.text_value or method.value)
        return method.of(self.inputs, target, self.clean)

    def _target(self, logits: Tensor) -> Tensor:
        """Return the target of each example, ``(B,)``; without one, the model's prediction."""
        target, B, V = self.target, len(self.ids), logits.shape[-1]
        if target is None:
            return last_rows(logits, self.token_mask).argmax(-1)
        if not isinstance(target, Tensor):
            target = self.ids.new_full((B,), index(target), dtype=torch.long)
        if target.shape != (B,):
            raise ValueError(f"target has shape {tuple(target.shape)}, not ({B},).")
        wrong = target[(target < 0) | (target >= V)]
        if len(wrong):
            raise ValueError(
                f"target={int(wrong[0])}, but the model has the {self.predicts} 0..{V - 1}."
            )
        return target


def _token_ids(inputs: Mapping[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(
            "The arguments of the model do not include input_ids, so the tokens of the text are "
            "not known: use a model whose forward takes input_ids by name."
        )
    return ids


def _check_tokens(model: nn.Module, clean: CleanPass, ids: Tensor) -> None:
    """Raise an UnsupportedModelError if a layer has tokens neither of the text nor virtual."""
    T, virtual = ids.shape[1], virtual_tokens(model)
    for tokens in clean.real:
        if tokens.shape[1] - T not in (0, virtual):
            raise UnsupportedModelError(
                f"An attention layer runs {tokens.shape[1]} tokens, but the text has {T} ids, so "
                "the positions of its tokens are not known: use a model whose layers run the text "
                "itself, or PEFT's prompt tuning."
            )


def _predicts(model: nn.Module, logits: Tensor, ids: Tensor) -> Literal["tokens", "classes"]:
    """Return what the logits belong to. Logits of classes can come for each token, too."""
    size, V = vocabulary_size(model), logits.shape[-1]
    if logits.dim() == 2 or int(ids.max()) >= V:
        return "classes"
    if size is None or size == V:
        return "tokens"
    # Some language models predict more tokens, or fewer, than they read.
    written = getattr(model, "get_output_embeddings", lambda: None)()
    return "classes" if written is None else "tokens"
