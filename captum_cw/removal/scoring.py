"""Score pairs of head and token, or whole tokens: by a measure, a control or chance."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from captum_cw import measures
from captum_cw.attr import TokenScores
from captum_cw.attr._captum import Attribution
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.functional import (
    AttentionLayer,
    Measure,
    Reduction,
    Space,
    check_choice,
    token_scores,
)
from captum_cw.removal.sinks import real_tokens

__all__ = [
    "PairScorer",
    "RandomPairs",
    "TokenMethod",
    "model_of",
    "pair_scorer",
    "scorer_of",
    "space_of",
    "whole_token_scorer",
]


class PairScorer(Protocol):
    """Scores the pairs of a layer."""

    @property
    def space(self) -> Space:
        """Where it must be possible to see the layer."""

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        """``(B, H, S)`` for the layer that runs as the ``number``-th of a pass."""
        ...  # pragma: no cover


@dataclass(frozen=True)
class MeasuredPairs:
    """Eq. 15: a measure reduced over the queries that see a token.

    Args:
        measure: The measure.
        reduction: Over queries.
        signed: Whether signs are kept.
        space: Where it is measured.
    """

    measure: Measure
    reduction: Reduction
    signed: bool
    space: Space

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        seen = layer.seen_in(self.space)
        return token_scores(seen, self.measure, self.reduction, signed=self.signed)


@dataclass(frozen=True)
class RandomPairs:
    """Chance, seeded: the same for an example whatever batch it is in.

    Args:
        seed: Of all.
        examples: What tells the examples of a batch apart; by default their places in it.

    Example:
        >>> RandomPairs(seed=1) == pair_scorer("random", seed=1)
        True
    """

    seed: int = 0
    examples: tuple[str, ...] | None = None
    space: ClassVar[Space] = "attention"

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        """Uniform numbers ``(B, H, S)``."""
        real = real_tokens(layer).cpu()
        examples = self.examples or tuple(map(str, range(len(real))))
        scores = torch.zeros(len(real), layer.H, layer.S, dtype=torch.float32, device="cpu")
        for b, example in enumerate(examples):
            seed = zlib.crc32(f"{self.seed}/{example}/{number}".encode())
            generator = torch.Generator().manual_seed(seed)
            # Token by token, so that padding changes nothing.
            drawn = scores.new_empty(int(real[b].sum()), layer.H).uniform_(generator=generator)
            scores[b, :, real[b]] = drawn.T
        return scores.to(layer.value.device)


@dataclass(frozen=True)
class TokenMethod:
    """Scores of whole tokens: a callable gives ``(B, T)`` for a batch."""

    scores: Callable[[Any], Any]

    def checked(self, batch: object, shape: Sequence[int], whole: Sequence[int]) -> Tensor:
        """The scores of a batch.

        Args:
            batch: What the callable is given.
            shape: ``(B, T)`` of the text.
            whole: ``(B, S)`` of the layers, with virtual tokens before those of the text.

        Returns:
            ``(B, T)`` or ``(B, S)``.

        Raises:
            ValueError: If the scores have another shape, or are not finite.
        """
        with torch.enable_grad():  # gradients are how other methods score
            scores = self.scores(batch)
        if isinstance(scores, tuple) and len(scores) == 1:
            (scores,) = scores
        fits = isinstance(scores, Tensor) and tuple(scores.shape) in (tuple(shape), tuple(whole))
        if not isinstance(scores, Tensor) or not fits:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"The method gives scores {found}, but one score a token is needed, {tuple(shape)}."
            )
        if not scores.isfinite().all():
            raise ValueError("The method gives scores that are NaN or infinite.")
        return scores.detach()


def scorer_of(
    method: object, reduction: Reduction = "mean", seed: int = 0
) -> PairScorer | TokenMethod:
    """What scores pairs, or whole tokens, as ``method`` says.

    Args:
        method: As for :func:`pair_scorer`; a measure that scores whole tokens; or a callable of a
            batch, or a tensor, that gives ``(B, T)`` scores.
        reduction: Over queries, where ``method`` does not bring its own.
        seed: Of ``"random"``.

    Example:
        >>> scorer_of(lambda batch: batch["input_ids"].float()).scores({"input_ids": input_ids})
        tensor([[1., 2., 3., 4., 5.]])
    """
    if isinstance(method, Tensor):
        return TokenMethod(lambda batch: method)
    if callable(method) and not isinstance(method, Attribution):
        return TokenMethod(method)
    whole = whole_token_scorer(method, reduction)
    return pair_scorer(method, reduction, seed) if whole is None else TokenMethod(whole.attribute)


def pair_scorer(method: object, reduction: Reduction = "mean", seed: int = 0) -> PairScorer:
    """What scores pairs as ``method`` says.

    Args:
        method: A measure, a ``TokenScores`` around one (whose ``reduction`` and ``signed``
            count), or a name of :mod:`captum_cw.measures` or ``"random"``.
        reduction: Over queries, where ``method`` does not bring its own.
        seed: Of ``"random"``.

    Raises:
        TypeError, ValueError: If ``method`` is none of these.

    Example:
        >>> pair_scorer("vwon") == pair_scorer(VWONAttention(model))
        True
    """
    check_choice("reduction", reduction, Reduction)
    whole = whole_token_scorer(method, reduction)
    if whole is not None:
        what = f"layers={whole.layers!r}" if whole is method else type(method).__name__
        raise ValueError(
            f"{what} gives scores of whole tokens, not of pairs of head and token: use "
            "remove_tokens with granularity='token', or ComprehensivenessSufficiency."
        )
    if isinstance(method, TokenScores):
        if method.queries != "all":
            raise ValueError(
                f"queries={method.queries!r}: pairs are ranked by all queries that see them; "
                "leave queries='all'."
            )
        _check_all_layers(method.method)
        inner = method.method
        return MeasuredPairs(inner.measure, method.reduction, method.signed, inner.space)
    if isinstance(method, AttentionAttribution):
        _check_all_layers(method)
        return MeasuredPairs(method.measure, reduction, False, method.space)
    if not isinstance(method, str):
        raise TypeError(
            f"method is of type {type(method).__name__}: give a measure such as "
            "ContributionWeights(model), TokenScores around one, or a name: "
            f"{measures.known_names()}."
        )
    if method == measures.RANDOM:
        return RandomPairs(seed)
    entry = measures.find(method)
    if entry is not None and not entry.scores_pairs:
        raise ValueError(
            f"{method!r} scores whole tokens, which its name cannot ask for: give the measure "
            "itself, made with the model, and granularity='token'."
        )
    if entry is not None:
        return MeasuredPairs(entry.function(), reduction, entry.signed, entry.seen_in())
    raise ValueError(f"method={method!r} is unknown; known: {measures.known_names()}.")


def whole_token_scorer(method: object, reduction: Reduction = "mean") -> TokenScores | None:
    """What scores whole tokens as ``method`` says; None if it scores pairs, or is no measure.

    Args:
        method: A measure, or a ``TokenScores`` around one.
        reduction: Over queries, where ``method`` does not bring its own.

    Example:
        >>> whole_token_scorer(ALTIWeights(model)).layers, whole_token_scorer("alti")
        ('mean', None)
    """
    if isinstance(method, AttentionAttribution):
        method = TokenScores(method, reduction)
    return method if isinstance(method, TokenScores) and method.ranks_whole_tokens else None


def _check_all_layers(method: AttentionAttribution) -> None:
    if method.layer is not None:
        raise ValueError(
            f"{method.get_name()} is of some layers, but pairs are ranked and removed in all: make "
            "it without layer=."
        )


def space_of(scorers: Iterable[PairScorer]) -> Space:
    """Where layers must be seen so that all of these can score them."""
    return "residual" if any(scorer.space == "residual" for scorer in scorers) else "attention"


def model_of(method: object) -> nn.Module | None:
    """The model that a measure, or ``TokenScores`` around one, belongs to; None for others."""
    if isinstance(method, TokenScores):
        method = method.method
    return method.model if isinstance(method, AttentionAttribution) else None
