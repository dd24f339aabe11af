"""The passes over one batch: a clean one, and those without what a method ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_cw.attr.inputs import forward_call
from captum_cw.attr.layer import evaluation_mode
from captum_cw.attr.outputs import logits_of
from captum_cw.interventions import (
    CleanPass,
    FixedChange,
    OnlineRemoval,
    Ranking,
    Scoring,
    SinkRule,
)
from captum_cw.metrics.quantities import Logits, last_token, mean_nll
from captum_cw.ranking import RateOf, Scope, Which
from captum_cw.scoring import PairScorer, RandomPairs

__all__ = [
    "Batch",
    "BatchRun",
    "ForeignMethod",
    "Granularity",
    "Method",
    "Part",
    "Plan",
    "TokenMethod",
]

Batch = Tensor | Mapping[str, Any]
#: The label of a token whose likelihood does not count, in PyTorch and transformers.
IGNORED = -100
Granularity = Literal["pair", "token"]


@dataclass(frozen=True)
class Plan:
    """What is removed from each batch, but for the rates.

    Args:
        model: The model.
        scoring, scope, rate_of, sink_rule, granularity, mask_token_id, protected_ids: As for
            :class:`captum_cw.ComprehensivenessSufficiency`.
    """

    model: nn.Module
    scoring: Scoring
    scope: Scope
    rate_of: RateOf
    sink_rule: SinkRule
    granularity: Granularity
    mask_token_id: int | None
    protected_ids: Sequence[int]


@dataclass(frozen=True)
class Part:
    """A batch, and what its records say of its examples.

    That is the place of each among all, and a checksum of the batch that it was in, since the last
    bits of what is computed for it depend on that.
    """

    batch: Batch
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class TokenMethod:
    """Scores of whole tokens: ``(B, T)`` from a callable, or given."""

    scores: Callable[[Batch], Any]


@dataclass(frozen=True)
class ForeignMethod:
    """Scores of pairs that another model of the same shape gives, in a clean pass of its own."""

    model: nn.Module
    scorer: PairScorer

    def scores(self, inputs: Mapping[str, Any], told: Sequence[Tensor]) -> list[Tensor]:
        """For each layer ``(B, H, S)``."""
        forward = partial(self.model, **inputs)
        with evaluation_mode([self.model], self.model):
            seen = CleanPass.run(
                self.model, forward, {"": self.scorer}, SinkRule(threshold=None), told
            )
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
            raise ValueError("There are no input_ids, so the likelihood of the text is not known.")
        self.ids = ids
        in_pass: dict[str, PairScorer] = {
            name: method
            for name, method in self.methods.items()
            if not isinstance(method, (TokenMethod, ForeignMethod))
            and (plan.scoring == "clean" or plan.granularity == "token")
        }
        forward = partial(plan.model, **self.inputs)
        self.clean = CleanPass.run(plan.model, forward, in_pass, plan.sink_rule, call.real)
        if self.clean.vanishing:
            warnings.warn(
                f"{self.clean.vanishing} attention outputs of a batch vanish: their rows count as "
                "zeros in what is relative to the output.",
                stacklevel=4,
            )
        self.real = self.clean.real[0]
        protected = torch.isin(ids, ids.new_tensor(plan.protected_ids)).to(self.real.device)
        self.kept = [sinks | protected for sinks in self.clean.sinks]
        if plan.mask_token_id is None and not self.clean.causal:
            raise ValueError(
                "The model sees later tokens, so it does not predict the next one: give "
                "mask_token_id (and protected_ids) of a masked language model."
            )
        if plan.mask_token_id is None:
            self.counted = (self.real & self._asked())[:, 1:] & self.real[:, :-1]
            self.clean_logits = logits_of(self.clean.output)
        else:
            self.counted = self.real & ~protected & self._asked()
            self.clean_logits = self.logits()
        self.unchanged = self.measured(self.clean_logits)
        self.target = self.unchanged.target
        self.pairs = {
            name: method.scores(self.inputs, call.real)
            for name, method in self.methods.items()
            if isinstance(method, ForeignMethod)
        } | self.clean.scores
        removable = [r & ~k for r, k in zip(self.clean.real, self.kept, strict=True)]
        if not torch.stack(removable).any(0).any(-1).all():
            raise ValueError(
                "All tokens of an example are protected, so nothing can be removed: give longer "
                "texts, a higher sink_threshold, or protect_sinks=False."
            )
        self.tokens = {
            name: self._token_scores(name, method)
            for name, method in self.methods.items()
            if isinstance(method, TokenMethod) or plan.granularity == "token"
        }

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
            return torch.stack([layer.mean(1) for layer in self.pairs[name]]).mean(0)
        with torch.enable_grad():  # gradients are how other methods score
            scores = method.scores(self.batch)
        if isinstance(scores, tuple) and len(scores) == 1:
            (scores,) = scores
        return _checked(name, scores, self.real.shape).to(self.real.device)

    def removal(self, name: str, rate: float, which: Which) -> OnlineRemoval | FixedChange:
        """The passes without what a method ranks lowest or highest."""
        plan, method = self.plan, self.methods[name]
        ranking = Ranking(rate, which, plan.scope, plan.rate_of)
        if name in self.tokens:
            # A token that is a sink anywhere stays everywhere.
            kept = torch.stack(self.kept).any(0)
            factors = ranking.factors([self.tokens[name][:, None]], [self.real], [kept])
            return FixedChange(plan.model, factors * len(self.kept))
        if name in self.pairs:
            factors = ranking.factors(self.pairs[name], self.clean.real, self.kept)
            return FixedChange(plan.model, factors)
        assert not isinstance(method, (TokenMethod, ForeignMethod))  # those are scored by now
        return OnlineRemoval(plan.model, method, ranking, plan.sink_rule, self.kept)

    def logits(self) -> Tensor:
        """``(B, T, V)``: of the next token, or of each masked token at its own place."""
        model, mask = self.plan.model, self.plan.mask_token_id
        if mask is None:
            return logits_of(model(**self.inputs))
        rows = []
        for place in range(self.ids.shape[1]):
            masked = self.ids.clone()
            masked[:, place] = mask
            # A copy, since what was computed for the other places need not be kept.
            rows.append(logits_of(model(**{**self.inputs, "input_ids": masked}))[:, place].clone())
        return torch.stack(rows, 1)

    def measured(self, logits: Tensor) -> Logits:
        """What the quantities are computed from."""
        ids, target = self.ids, self.target
        if self.plan.mask_token_id is None:
            nll, self.counts = mean_nll(logits[:, :-1], ids[:, 1:], self.counted)
        else:
            nll, self.counts = mean_nll(logits, ids, self.counted)
        if target is None:
            last = last_token(self.real).to(logits.device)
            target = logits[torch.arange(len(last), device=last.device), last].argmax(-1)
        elif isinstance(target, int):
            target = ids.new_full((len(ids),), target, dtype=torch.long)
        if target.shape != (len(ids),):
            raise ValueError(f"target has shape {tuple(target.shape)}, not ({len(ids)},).")
        if nll.isnan().any():
            raise ValueError(
                "The logits are NaN, so nothing can be measured: check the inputs and weights; in "
                "float16, load the model in bfloat16 or float32."
            )
        # Where tokens are masked, only those that are predicted count.
        real = self.real if self.plan.mask_token_id is None else self.counted
        return Logits(logits, self.given, real, self.clean_logits, target, nll)


def _seeded(method: Method, keys: Sequence[str]) -> Method:
    return replace(method, examples=tuple(keys)) if isinstance(method, RandomPairs) else method


def _checked(name: str, scores: object, shape: Sequence[int]) -> Tensor:
    if not isinstance(scores, Tensor) or tuple(scores.shape) != tuple(shape):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"Method {name!r} gives scores {found}: one a token is needed, {tuple(shape)}."
        )
    if not scores.isfinite().all():
        raise ValueError(f"Method {name!r} gives scores that are NaN or infinite.")
    return scores.detach()
