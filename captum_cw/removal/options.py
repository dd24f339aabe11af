"""The options of removal: how pairs of head and token are scored, ranked and protected.

:func:`~captum_cw.remove_tokens`, the metric and the command line have the same options.
:class:`RemovalOptions` describes and checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from captum_cw._utils.suggestions import suggestion
from captum_cw.capture import Execution, StateSpace
from captum_cw.functional import AttentionLayer, Reduction, check_choice
from captum_cw.removal.ranking import RankingScope, RateOf, Which, chosen_pairs
from captum_cw.removal.sinks import THRESHOLD, layer_sinks, real_tokens

__all__ = [
    "Factors",
    "Granularity",
    "RemovalKeywords",
    "RemovalOptions",
    "Scoring",
    "check_rate",
    "options_from",
    "removal_factors",
]

Scoring = Literal["online", "clean"]
Granularity = Literal["pair", "token"]
Factors = list[Tensor | None]
"""For each layer, the factors ``(B|1, H|1, S)`` of its values; None if they do not change."""


class RemovalKeywords(TypedDict, total=False):
    """The options as keyword arguments; see :class:`RemovalOptions`."""

    reduction: Reduction
    scoring: Scoring
    ranking: RankingScope
    granularity: Granularity
    rate_of: RateOf
    protect_sinks: bool
    sink_threshold: float
    sink_space: StateSpace
    seed: int


def options_from(given: Mapping[str, Any]) -> RemovalOptions:
    """Return options that are given as keyword arguments.

    Raises:
        TypeError: If one is unknown.
        ValueError: As for :class:`RemovalOptions`.

    Example:
        >>> options_from({"scoring": "clean"}).scoring
        'clean'
    """
    known = RemovalKeywords.__annotations__
    for name in given.keys() - known.keys():
        raise TypeError(
            f"{name!r} is not an option of removal.{suggestion(name, known)} Known: "
            f"{', '.join(known)}."
        )
    return RemovalOptions(**given)


@dataclass(frozen=True)
class RemovalOptions:
    """How pairs of head and token are scored, ranked and protected.

    A pair ``(h, j)`` is the value of token ``j`` in head ``h`` of one layer.

    Args:
        reduction: The reduction of a measure over the queries that see a token: ``"mean"``
            (Eq. 15), ``"sum"``, ``"max"`` or ``"rms"``. A ``TokenScores`` brings its own.
        scoring: When layers are scored. ``"online"`` scores each layer in the changed pass itself,
            so the scores depend on what earlier layers have lost. ``"clean"`` scores all layers in
            an unchanged pass that runs first. Whole tokens are always scored in an unchanged pass.
        ranking: Which pairs of an example are ranked together: those of a ``"layer"``, those of
            each ``"head"``, or those of all layers (``"global"``, which needs clean scoring).
        granularity: What is removed. ``"pair"`` removes the value of a token in one head of one
            layer; ``"token"`` removes a token in all heads and layers.
        rate_of: What a rate is a fraction of. ``"removable"`` counts the pairs that may be removed;
            ``"all"`` counts and ranks those of sinks too, so fewer pairs are removed. Padding never
            counts.
        protect_sinks: Whether attention sinks are kept. A token is a sink of a layer if its hidden
            state is nearly collinear with that of the first token.
        sink_threshold: The cosine of the two hidden states above which a token is a sink.
        sink_space: The hidden states that are compared: ``"normed"``, ``"residual"``, ``"key"`` or
            ``"value"`` (see :func:`captum_cw.removal.sinks.find_sinks`).
        seed: The random seed of the method ``"random"``.

    Raises:
        ValueError: If a choice is unknown, or two choices exclude each other.

    Example:
        >>> RemovalOptions(scoring="clean", ranking="global").sink_space
        'normed'
    """

    reduction: Reduction = "mean"
    scoring: Scoring = "online"
    ranking: RankingScope = "layer"
    granularity: Granularity = "pair"
    rate_of: RateOf = "removable"
    protect_sinks: bool = True
    sink_threshold: float = THRESHOLD
    sink_space: StateSpace = "normed"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, Reduction)
        check_choice("scoring", self.scoring, Scoring)
        check_choice("ranking", self.ranking, RankingScope)
        check_choice("granularity", self.granularity, Granularity)
        check_choice("rate_of", self.rate_of, RateOf)
        check_choice("sink_space", self.sink_space, StateSpace)
        if not isinstance(self.sink_threshold, Real) or not -1 <= float(self.sink_threshold) <= 1:
            raise ValueError(
                f"sink_threshold is a cosine and must lie in [-1, 1], got {self.sink_threshold!r}."
            )
        if self.ranking == "global" and not self.scores_before:
            raise ValueError(
                "ranking='global' ranks all layers together, but scoring='online' scores one layer "
                "after another: use scoring='clean'."
            )

    @property
    def scores_before(self) -> bool:
        """Whether the scores come from an unchanged pass that runs before the removal."""
        return self.scoring == "clean" or self.granularity == "token"

    @property
    def states(self) -> StateSpace | None:
        """The hidden states that identify sinks; None if sinks are not protected."""
        return self.sink_space if self.protect_sinks else None

    def sinks(self, execution: Execution, layer: AttentionLayer) -> Tensor:
        """Return the protected sinks of a layer, ``(B, S)`` boolean."""
        if not self.protect_sinks:
            return torch.zeros_like(real_tokens(layer))
        return layer_sinks(execution, layer, self.sink_threshold)

    def factors(
        self,
        rate: float,
        which: Which,
        scores: Sequence[Tensor],
        token_masks: Sequence[Tensor],
        protected: Sequence[Tensor],
    ) -> Factors:
        """Rank pairs, and return the factors that remove a fraction of them.

        Args:
            rate: The fraction to remove, in [0, 1].
            which: ``"top"`` removes the pairs of highest score, ``"bottom"`` those of lowest.
            scores: For each layer ``(B, H|1, S)``.
            token_masks: For each layer ``(B, S)`` boolean, False at padding.
            protected: For each layer ``(B, S)`` boolean, True at tokens that must stay.
        """
        removed = chosen_pairs(
            scores, token_masks, protected, rate, which, self.ranking, self.rate_of
        )
        return [removal_factors(pairs) for pairs in removed]


def removal_factors(removed: Tensor) -> Tensor | None:
    """Return factors that are zero at removed values; None if no value is removed."""
    return (~removed).float() if removed.any() else None


def check_rate(rate: object, which: object) -> None:
    """Raise a ValueError if ``rate`` is not a fraction, or ``which`` is unknown."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate!r}.")
    check_choice("which", which, Which)
