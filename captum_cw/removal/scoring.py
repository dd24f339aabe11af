"""Score pairs of head and token, or whole tokens: by a measure, a control or at random."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_cw import measures
from captum_cw._utils.suggestions import kind
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
from captum_cw.removal.virtual_tokens import behind

__all__ = [
    "PairScorer",
    "RandomPairs",
    "TokenMethod",
    "model_of",
    "pair_scorer",
    "scorer_of",
]


@dataclass(frozen=True)
class MeasuredPairs:
    """Scores by a measure, reduced over the queries that see a token (Eq. 15).

    Args:
        measure: The measure.
        reduction: The reduction over queries.
        signed: Whether signs are kept.
        space: The space in which the measure is taken.
        needs_stream: Whether the measure reads the residual stream.
    """

    measure: Measure
    reduction: Reduction
    signed: bool
    space: Space
    needs_stream: bool = False

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        layer = layer.seen_in(self.space)
        return token_scores(layer, self.measure, self.reduction, signed=self.signed)


@dataclass(frozen=True)
class RandomPairs:
    """Random scores. An example has the same scores in every batch.

    Args:
        seed: The random seed.
        examples: A key for each example of a batch; by default its index.

    Example:
        >>> RandomPairs(seed=1) == pair_scorer("random", seed=1)
        True
    """

    seed: int = 0
    examples: tuple[str, ...] | None = None
    space: ClassVar[Space] = "attention"
    needs_stream: ClassVar[bool] = False

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        """Return uniform random scores, ``(B, H, S)``."""
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


PairScorer = MeasuredPairs | RandomPairs
"""Takes a layer and its number in a pass, and returns scores of its pairs, ``(B, H, S)``."""


@dataclass(frozen=True)
class TokenMethod:
    """Scores of whole tokens.

    Args:
        scores: Takes a batch and returns scores ``(B, T)``.
    """

    scores: Callable[[Any], Any]

    def checked(self, batch: object, T: int, real: Tensor) -> Tensor:
        """Return the scores of a batch, on the device of ``real``.

        Args:
            batch: The argument of the callable.
            T: The number of tokens of the text.
            real: ``(B, S)``, a token mask of a layer, whose first tokens may be virtual.

        Returns:
            ``(B, S)``.

        Raises:
            ValueError: If the scores have another shape, or are not finite.
        """
        with torch.enable_grad():  # other methods may need gradients
            scores = self.scores(batch)
        if isinstance(scores, tuple) and len(scores) == 1:
            (scores,) = scores
        B, S = real.shape
        is_tensor = isinstance(scores, Tensor)
        if not is_tensor or tuple(scores.shape) not in ((B, T), (B, S)):
            found = tuple(scores.shape) if is_tensor else type(scores).__name__
            raise ValueError(
                f"The method returned scores {found}, expected one score per token, {(B, T)}."
            )
        if not scores.isfinite().all():
            raise ValueError("The method returned scores that are NaN or infinite.")
        return behind(scores.detach().to(real.device), S)


def scorer_of(
    method: object, reduction: Reduction = "mean", seed: int = 0
) -> PairScorer | TokenMethod:
    """Return the scorer of a method, for pairs or for whole tokens.

    Args:
        method: A method of :func:`pair_scorer`; a measure of whole tokens; or scores ``(B, T)``, as
            a tensor or as a callable of a batch.
        reduction: The reduction over queries, unless ``method`` brings its own.
        seed: The random seed of ``"random"``.

    Example:
        >>> scorer_of(lambda batch: batch["input_ids"].float()).scores({"input_ids": input_ids})
        tensor([[1., 2., 3., 4., 5.]])
    """
    if isinstance(method, Tensor):
        return TokenMethod(lambda batch: method)
    if callable(method) and not isinstance(method, (Attribution, type)):
        return TokenMethod(method)
    scores = _token_scores(method, reduction)
    if scores is not None and scores.ranks_whole_tokens:
        return TokenMethod(scores.attribute)
    return pair_scorer(method, reduction, seed)


def pair_scorer(method: object, reduction: Reduction = "mean", seed: int = 0) -> PairScorer:
    """Return the scorer of pairs that a method names.

    Args:
        method: A measure; a ``TokenScores`` around one, whose ``reduction`` and ``signed`` count;
            or a name of :mod:`captum_cw.measures` or ``"random"``.
        reduction: The reduction over queries, unless ``method`` brings its own.
        seed: The random seed of ``"random"``.

    Raises:
        TypeError: If ``method`` is of another type.
        ValueError: If a name is unknown, or ``method`` does not score the pairs of all layers.

    Example:
        >>> pair_scorer("vwon") == pair_scorer(VWONAttention(model))
        True
    """
    check_choice("reduction", reduction, Reduction)
    scores = _token_scores(method, reduction)
    if scores is not None:
        return _measured_pairs(scores)
    if not isinstance(method, str):
        raise TypeError(
            f"method is {kind(method)}: give a measure such as "
            "ContributionWeights(model), TokenScores around one, or a name: "
            f"{measures.known_names()}."
        )
    if method == measures.RANDOM:
        return RandomPairs(seed)
    entry = measures.find(method)
    if entry is None:
        raise ValueError(f"method={method!r} is unknown; known: {measures.known_names()}.")
    if not entry.scores_pairs:
        raise ValueError(
            f"{method!r} scores whole tokens, and needs the model for it: give the measure itself, "
            "made with the model, and granularity='token'."
        )
    return MeasuredPairs(entry.function(), reduction, entry.signed, entry.seen_in())


def _token_scores(method: object, reduction: Reduction) -> TokenScores | None:
    """Return ``method`` if it is a ``TokenScores``, one around a measure, else None."""
    if isinstance(method, AttentionAttribution):
        method = TokenScores(method, reduction)
    return method if isinstance(method, TokenScores) else None


def _measured_pairs(scores: TokenScores) -> MeasuredPairs:
    method = scores.method
    if scores.ranks_whole_tokens:
        what = "layers='rollout'" if scores.layers == "rollout" else method.get_name()
        raise ValueError(
            f"{what} scores whole tokens, not pairs of head and token: use granularity='token', in "
            "remove_tokens or ComprehensivenessSufficiency."
        )
    if scores.queries != "all":
        raise ValueError(
            f"queries={scores.queries!r}, but pairs are ranked by all queries that see them: leave "
            "queries='all'."
        )
    if method.layer is not None:
        raise ValueError(
            f"{method.get_name()} is of some layers, but pairs are ranked and removed in all "
            "layers: make it without layer=."
        )
    choices = (scores.reduction, scores.signed, method.space, method.needs_stream)
    return MeasuredPairs(method.measure, *choices)


def model_of(method: object) -> nn.Module | None:
    """Return the model of a measure, or of ``TokenScores`` around one; None for other methods."""
    if isinstance(method, TokenScores):
        method = method.method
    return method.model if isinstance(method, AttentionAttribution) else None
