"""The options of removal, typed and checked once for interventions, metrics and command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypedDict

import torch
from torch import Tensor

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
    "kept",
]

Scoring = Literal["online", "clean"]
Granularity = Literal["pair", "token"]
Factors = list[Tensor | None]
"""What the values of each layer are multiplied by: ``(B|1, H|1, S)``, None where left alone."""


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


@dataclass(frozen=True)
class RemovalOptions:
    """How pairs of head and token are scored, ranked and protected from removal.

    Args:
        reduction: The reduction of scores over queries: ``"mean"``, ``"sum"``, ``"max"`` or
            ``"rms"``.
        scoring: ``"online"`` scores each layer in the pass itself, after the changes of earlier
            layers; ``"clean"`` scores all layers in an unchanged pass before it.
        ranking: Pairs are ranked within a ``"layer"``, within each ``"head"``, or over all layers
            (``"global"``, which needs clean scoring).
        granularity: ``"pair"`` removes pairs of head and token; ``"token"`` removes whole tokens
            in all heads and layers.
        rate_of: A rate is a fraction of the ``"removable"`` pairs, or of ``"all"`` pairs, so that
            sinks use up a part of it.
        protect_sinks: Whether attention sinks are never removed.
        sink_threshold: The cosine with the first token from which a token is a sink.
        sink_space: The hidden states whose cosine is taken (see
            :func:`captum_cw.removal.sinks.find_sinks`).
        seed: The random seed of ``"random"``.

    Raises:
        ValueError: If a choice is unknown, or two choices do not go together.

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
                "ranking='global' ranks all layers at once, but scoring='online' knows one layer "
                "after the other: use scoring='clean'."
            )

    @property
    def scores_before(self) -> bool:
        """Whether scores are taken in an unchanged pass: whole tokens always are."""
        return self.scoring == "clean" or self.granularity == "token"

    @property
    def states(self) -> StateSpace | None:
        """The hidden states that must be observed to find sinks; None where none are protected."""
        return self.sink_space if self.protect_sinks else None

    def sinks(self, execution: Execution, layer: AttentionLayer) -> Tensor:
        """The protected sinks of a layer, ``(B, S)`` boolean."""
        if not self.protect_sinks:
            return torch.zeros_like(real_tokens(layer))
        return layer_sinks(execution, layer, self.sink_threshold)

    def factors(
        self,
        rate: float,
        which: Which,
        scores: Sequence[Tensor],
        real: Sequence[Tensor],
        sinks: Sequence[Tensor],
    ) -> Factors:
        """Ranks pairs and gives the factors that remove some.

        Args:
            rate: The fraction to remove.
            which: Whether those of highest score go (``"top"``), or of lowest (``"bottom"``).
            scores: For each layer ``(B, H|1, S)``.
            real: For each layer ``(B, S)``, False at padding.
            sinks: For each layer ``(B, S)``, True at tokens that stay.
        """
        removed = chosen_pairs(scores, real, sinks, rate, which, self.ranking, self.rate_of)
        return [kept(pairs) for pairs in removed]


def kept(removed: Tensor) -> Tensor | None:
    """Factors that remove values; None where none are removed."""
    return (~removed).float() if removed.any() else None


def check_rate(rate: object, which: object) -> None:
    """Raises a ValueError if ``rate`` is not a fraction, or ``which`` is unknown."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate!r}.")
    check_choice("which", which, Which)
