"""Rank pairs of head and token, and choose an exact number of them.

Comprehensiveness removes the pairs ``(h, j)`` of highest score, sufficiency those of lowest
(arXiv 2606.07604, Eq. 16 and 17). Ties are broken by position, so the choice is always the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RankingScope", "RateOf", "Which", "chosen_pairs", "quota"]

Which = Literal["top", "bottom"]
RankingScope = Literal["layer", "global", "head"]
RateOf = Literal["removable", "all"]


def quota(rate: float, count: int) -> int:
    """Return ``rate * count``, rounded half up.

    The rate counts as the decimal number that it is written as.

    Example:
        >>> quota(0.5, 5), quota(0.145, 100)
        (3, 15)
    """
    return int((Decimal(repr(float(rate))) * count).to_integral_value(ROUND_HALF_UP))


def chosen_pairs(
    scores: Sequence[Tensor],
    token_masks: Sequence[Tensor],
    protected: Sequence[Tensor],
    rate: float,
    which: Which = "bottom",
    ranking: RankingScope = "layer",
    rate_of: RateOf = "removable",
) -> list[Tensor]:
    """Choose the pairs of highest or lowest score.

    Args:
        scores: For each layer ``(B, H, S)``, finite. Whole tokens have ``H = 1``.
        token_masks: For each layer ``(B, S)`` boolean, False at padding.
        protected: For each layer ``(B, S)`` boolean, True at tokens that are never chosen (sinks).
        rate: The fraction to choose, in [0, 1].
        which: ``"top"`` or ``"bottom"``.
        ranking: Which pairs of an example are ranked together: those of a ``"layer"``, of all
            layers (``"global"``), or of each ``"head"``.
        rate_of: What ``rate`` is a fraction of. ``"removable"`` counts the pairs that may be
            chosen. ``"all"`` counts those of protected tokens too; they are ranked, and use up a
            part of the quota.

    Returns:
        For each layer ``(B, H, S)`` boolean. Each ranking chooses ``quota(rate, pairs)`` pairs; of
        equal scores it takes those of lower layer, head and token first.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]]])  # of "Ice is cold"
        >>> tokens = torch.ones(1, 3, dtype=torch.bool)
        >>> sinks = torch.tensor([[True, False, False]])
        >>> (pairs,) = chosen_pairs([scores], [tokens], [sinks], 0.5, "top")
        >>> pairs.nonzero().tolist()
        [[0, 0, 2], [0, 1, 1]]
    """
    ranked = [
        (tokens if rate_of == "all" else tokens & ~stay)[:, None].expand_as(x)
        for x, tokens, stay in zip(scores, token_masks, protected, strict=True)
    ]
    if ranking == "global":
        flat = _choose(_joined(scores), _joined(ranked), rate, which)
        chosen = list(torch.split(flat, [x[0].numel() for x in scores], dim=1))
    else:
        start = 1 if ranking == "layer" else 2  # of the dimensions that are ranked together
        pairs = zip(scores, ranked, strict=True)
        chosen = [_choose(x.flatten(start), r.flatten(start), rate, which) for x, r in pairs]
    return [
        part.view(x.shape) & ~stay[:, None]
        for part, x, stay in zip(chosen, scores, protected, strict=True)
    ]


def _joined(layers: Sequence[Tensor]) -> Tensor:
    """Join all pairs of each example, ``(B, L * H * S)``, by layer, head and token."""
    return torch.cat([x.flatten(1) for x in layers], dim=1)


def _choose(scores: Tensor, ranked: Tensor, rate: float, which: Which) -> Tensor:
    """Choose among the ``ranked`` entries of each row (the last dimension)."""
    top = which == "top"
    # Entries that are not ranked come last, after every finite score.
    ordered = scores.masked_fill(~ranked, -math.inf if top else math.inf)
    order = ordered.sort(dim=-1, descending=top, stable=True).indices
    counts = ranked.sum(-1)
    quotas = {n: quota(rate, n) for n in set(counts.flatten().tolist())}
    k = counts.new_tensor([quotas[n] for n in counts.flatten().tolist()]).view_as(counts)
    first = torch.arange(scores.shape[-1], device=scores.device) < k[..., None]
    return torch.zeros_like(ranked).scatter_(-1, order, first)
