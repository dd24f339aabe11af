"""The clean pass and the removal passes over one batch."""

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
from captum_cw.capture.model import evaluation_mode
from captum_cw.capture.outputs import logits_of
from captum_cw.capture.text_layers import TextLayers
from captum_cw.metrics.quantities import Logits, Quantity, last_rows, mean_nll
from captum_cw.removal.changes import FixedChange, OnlineRemoval
from captum_cw.removal.clean_pass import CleanPass, mean_of_pairs
from captum_cw.removal.options import RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import PairScorer, RandomPairs, TokenMethod
from captum_cw.removal.virtual_tokens import behind, virtual_tokens

__all__ = [
    "Batch",
    "BatchRun",
    "ForeignMethod",
    "Method",
    "Part",
    "Plan",
]

Batch = Tensor | Mapping[str, Any]
#: The label of a token whose likelihood does not count, in PyTorch and transformers.
IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """What is removed from each batch, but for the rates.

    Args:
        model: The model.
        options: How pairs are scored, ranked and protected.
        mask_token_id, protected_ids: As for :class:`captum_cw.ComprehensivenessSufficiency`.
        quantity: What is compared.
    """

    model: nn.Module
    options: RemovalOptions
    mask_token_id: int | None
    protected_ids: Sequence[int]
    quantity: Quantity


@dataclass(frozen=True)
class Part:
    """A batch, and what its records say of its examples.

    That is the place of each among all, and a checksum of the batch that it was in, since the last
    bits of what is computed for it depend on that.
    """

    batch: Batch
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class ForeignMethod:
    """Scores of pairs that another model of the same shape gives, in a clean pass of its own."""

    model: nn.Module
    scorer: PairScorer

    def scores(
        self, inputs: Mapping[str, Any], told: Sequence[Tensor], text: TextLayers | None
    ) -> list[Tensor]:
        """For each layer ``(B, H, S)``; other arguments as for :meth:`CleanPass.run`."""
        forward = partial(run_on_copies, self.model, inputs)
        with evaluation_mode([self.model], self.model):
            options = RemovalOptions(protect_sinks=False)
            seen = CleanPass.run(self.model, forward, {"": self.scorer}, options, told, text)
        return seen.scores[""]


Method = PairScorer | TokenMethod | ForeignMethod


class BatchRun:
    """The passes over one batch: the clean one, which is run at once, and the changed ones."""

    def __init__(
        self,
        plan: Plan,
        part: Part,
        methods: Mapping[str, Method],
        target: int | Tensor | None,
    ) -> None:
        self.plan, self.batch, self.target = plan, part.batch, target
        keys = [str(example["index"]) for example in part.examples]
        self.methods = {name: _seeded(method, keys) for name, method in methods.items()}
        call = forward_call(plan.model, plan.model.forward, part.batch, None)
        self.given = {name: x for name, x in call.kwargs.items() if name != "logits_to_keep"}
        # Its own loss is not needed, and labels would make the model compute one.
        self.inputs = {name: x for name, x in self.given.items() if name != "labels"}
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError(
                "The inputs have no input_ids: give a model whose forward takes input_ids by name."
            )
        self.ids = ids
        in_pass: dict[str, PairScorer] = {
            name: method
            for name, method in self.methods.items()
            if not isinstance(method, (TokenMethod, ForeignMethod)) and plan.options.scores_before
        }
        forward = partial(run_on_copies, plan.model, self.inputs)
        masks = call.token_masks
        self.clean = CleanPass.run(plan.model, forward, in_pass, plan.options, masks, call.text)
        if self.clean.vanishing:
            warnings.warn(
                f"{self.clean.vanishing} attention outputs of a batch vanish: their rows count as "
                "zeros in what is relative to the output.",
                stacklevel=4,
            )
        self.own = _own_tokens(plan.model, self.clean, ids)
        self.real = self.own[0][:, -ids.shape[1] :]
        protected = torch.isin(ids, ids.new_tensor(plan.protected_ids)).to(self.real.device)
        self.kept = [
            sinks | ~own | behind(protected, own.shape[1])
            for sinks, own in zip(self.clean.sinks, self.own, strict=True)
        ]
        whole = self._text_logits(self.clean.output)
        self.predicts = _predicts(plan.model, whole, ids)
        # ``(B, T)``, which tokens the tokens before them predict; None where none are predicted.
        self.following = self._following()
        self._check_quantity(whole)
        # ``(B, T)``, which tokens count in the likelihood; None where it is not known.
        self.counted = self._counted(protected)
        self.clean_logits = whole if plan.mask_token_id is None else self.logits()
        self.unchanged = self.measured(self.clean_logits)
        self.target = self.unchanged.target
        self.pairs = {
            name: [
                behind(x, self.own[0].shape[1])
                for x in method.scores(self.inputs, masks, call.text)
            ]
            for name, method in self.methods.items()
            if isinstance(method, ForeignMethod)
        } | self.clean.scores
        removable = [r & ~k for r, k in zip(self.own, self.kept, strict=True)]
        if not torch.stack(removable).any(0).any(-1).all():
            raise ValueError(
                "All tokens of an example are protected, so nothing can be removed: give longer "
                "texts, a higher sink_threshold, or protect_sinks=False."
            )
        self.tokens = {
            name: self._token_scores(name, method)
            for name, method in self.methods.items()
            if isinstance(method, TokenMethod) or plan.options.granularity == "token"
        }

    def _text_logits(self, output: Any) -> Tensor:
        """``(B, T, V)`` at the tokens of the text, or ``(B, C)``."""
        try:
            logits = logits_of(output)
        except TypeError:
            return logits_of(output, (2, 3))  # raises where there are none
        T, longest = self.ids.shape[1], self.own[0].shape[1]
        if logits.shape[1] not in (T, longest):
            raise ValueError(
                f"The model gives logits {tuple(logits.shape)} for {T} tokens: give a model with "
                "logits (B, T, V) of all tokens, or (B, C) of classes."
            )
        return logits[:, -T:]

    def _following(self) -> Tensor | None:
        """``(B, T)``: the tokens that no token before them sees, as those of an image may."""
        if self.clean.ahead is None:
            return self.real
        predicted = self.real & ~self.clean.ahead[:, -self.real.shape[1] :]
        pairs = self.real[:, 1:] & self.real[:, :-1]
        none = pairs.any(1) & ~(pairs & predicted[:, 1:]).any(1)
        return None if none.any() else predicted

    def _check_quantity(self, logits: Tensor) -> None:
        """Raises a ValueError where the model does not predict what the quantity is of."""
        plan, name = self.plan, type(self.plan.model).__name__
        masked, classes = plan.mask_token_id is not None, self.predicts == "classes"
        several = bool((self.real.sum(1) > 1).any())  # of single tokens masks tell nothing
        if masked and (classes or (self.following is not None and several)):
            predicted = "classes" if classes else "the next token"
            raise ValueError(
                f"mask_token_id={plan.mask_token_id} is of a masked language model, but {name} "
                f"predicts {predicted}: leave it out."
            )
        if plan.quantity.of_text and classes:
            raise ValueError(
                f"{name} predicts classes, not tokens (its logits are {tuple(logits.shape)}), so "
                "the text has no perplexity or likelihood: use quantity='log_prob' or 'prob' (of a "
                "class), 'kl', or a callable (logits, batch, clean_logits) -> (B,)."
            )
        if plan.quantity.of_text and not masked and self.following is None:
            raise ValueError(
                f"{name} sees later tokens, so it does not predict the next one: give "
                "mask_token_id (and protected_ids) of a masked language model, or another "
                "quantity: 'kl', or a callable (logits, batch, clean_logits) -> (B,)."
            )
        if plan.quantity.of_target and logits.dim() == 3 and (classes or self.following is None):
            raise ValueError(
                f"{name} predicts something at each token, but not the token after the text, of "
                "which 'log_prob' and 'prob' are: use 'kl', or a callable (logits, batch, "
                "clean_logits) -> (B,)."
            )

    def _counted(self, protected: Tensor) -> Tensor | None:
        """``(B, N)``: which predicted tokens count; None where the model predicts none of them."""
        if self.predicts == "classes":
            return None
        if self.plan.mask_token_id is not None:
            return self.real & ~protected & self._asked()
        if self.following is None:
            return None
        return (self.following & self._asked())[:, 1:] & self.real[:, :-1]

    def _asked(self) -> Tensor:
        """``(B, T)``: the tokens whose likelihood counts, by the labels if there are any."""
        labels = self.given.get("labels")
        if not isinstance(labels, Tensor):
            return torch.ones_like(self.real)
        if labels.shape != self.ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, input_ids {tuple(self.ids.shape)}: give "
                "one label a token, -100 where its likelihood does not count."
            )
        return (labels != IGNORED).to(self.real.device)

    def _token_scores(self, name: str, method: Method) -> Tensor:
        """``(B, T)``."""
        if not isinstance(method, TokenMethod):
            return mean_of_pairs(self.pairs[name])
        whole = self.own[0]
        try:
            scores = method.checked(self.batch, self.real.shape, whole.shape)
        except ValueError as error:
            raise ValueError(f"Method {name!r}: {error}") from error
        return behind(scores.to(whole.device), whole.shape[1])

    def removal(self, name: str, rate: float, which: Which) -> OnlineRemoval | FixedChange:
        """The passes without what a method ranks lowest or highest."""
        plan, method = self.plan, self.methods[name]
        model, options = plan.model, plan.options
        if name in self.tokens:
            scores = self.tokens[name]
            factors = self.clean.whole_tokens(rate, which, options, scores, self.kept)
            return FixedChange(model, factors)
        if name in self.pairs:
            factors = options.factors(rate, which, self.pairs[name], self.own, self.kept)
            return FixedChange(model, self.clean.of_keys(factors))
        assert not isinstance(method, (TokenMethod, ForeignMethod))  # those are scored by now
        return OnlineRemoval(model, method, rate, which, options, self.kept)

    def logits(self) -> Tensor:
        """``(B, T, V)`` of the next token, or of each masked token at its own place; ``(B, C)``."""
        model, mask = self.plan.model, self.plan.mask_token_id
        if mask is None:
            return self._text_logits(run_on_copies(model, self.inputs))
        rows = []
        for place in range(self.ids.shape[1]):
            masked = self.ids.clone()
            masked[:, place] = mask
            # A copy, since what was computed for the other places need not be kept.
            given = {**self.inputs, "input_ids": masked}
            logits = self._text_logits(run_on_copies(model, given))
            rows.append(logits[:, place].clone())
        return torch.stack(rows, 1)

    def measured(self, logits: Tensor) -> Logits:
        """What the quantities are computed from."""
        ids, masked, nll = self.ids, self.plan.mask_token_id is not None, None
        if self.counted is not None:
            found = (logits, ids) if masked else (logits[:, :-1], ids[:, 1:])
            nll, self.counts = mean_nll(*found, self.counted)
        if (logits if nll is None else nll).isnan().any():
            raise ValueError(
                "The logits are NaN, so nothing can be measured: check the inputs and weights; in "
                "float16, load the model in bfloat16 or float32."
            )
        target = self._target(logits)
        # Where tokens are masked, only those that are predicted count.
        real = self.counted if masked and self.counted is not None else self.real
        return Logits(logits, self.given, real, self.clean_logits, target, nll)

    def _target(self, logits: Tensor) -> Tensor:
        """``(B,)``: the token or class that is asked about, else the one that is predicted."""
        target, B, V = self.target, len(self.ids), logits.shape[-1]
        if target is None:
            return last_rows(logits, self.real).argmax(-1)
        if not isinstance(target, Tensor):
            target = self.ids.new_full((B,), index(target), dtype=torch.long)
        if target.shape != (B,):
            raise ValueError(f"target has shape {tuple(target.shape)}, not ({B},).")
        if not ((target >= 0) & (target < V)).all():
            wrong = int(target[(target < 0) | (target >= V)][0])
            what = "classes" if self.predicts == "classes" else "tokens"
            raise ValueError(f"target={wrong}, but the model has the {what} 0..{V - 1}.")
        return target


def _own_tokens(model: nn.Module, clean: CleanPass, ids: Tensor) -> list[Tensor]:
    """For each layer ``(B, S)``: which of its tokens are tokens of the text, and not padding.

    Raises:
        UnsupportedModelError: If layers have other tokens than those of the text and virtual ones.
    """
    T, virtual = ids.shape[1], virtual_tokens(model)
    for real in clean.real:
        if real.shape[1] - T not in (0, virtual):
            raise UnsupportedModelError(
                f"An attention layer runs {real.shape[1]} tokens, but the text has {T} ids, and it "
                "is not known where the others stand: give a model whose layers run the text "
                "itself, or PEFT's prompt tuning."
            )
    return clean.real


def _predicts(model: nn.Module, logits: Tensor, ids: Tensor) -> Literal["tokens", "classes"]:
    """Whether logits are of tokens; those of classes may come for each token, too."""
    if logits.dim() == 2 or int(ids.max()) >= logits.shape[-1]:
        return "classes"
    try:
        read, written = (
            getattr(model, f"get_{side}_embeddings", _nothing)() for side in ("input", "output")
        )
    except NotImplementedError:  # of a model that has several
        return "tokens"
    size = getattr(read, "num_embeddings", None)
    # Some language models predict more tokens, or fewer, than they read.
    of_tokens = size is None or written is not None or logits.shape[-1] == size
    return "tokens" if of_tokens else "classes"


def _nothing() -> None:
    return None


def _seeded(method: Method, keys: Sequence[str]) -> Method:
    return replace(method, examples=tuple(keys)) if isinstance(method, RandomPairs) else method
