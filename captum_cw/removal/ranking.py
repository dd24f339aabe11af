"""Rank pairs of head and token, and choose an exact count of them, always the same ones.

Section 4 of the method's evaluation (arXiv 2606.07604, Eq. 16-17) removes a fraction of the pairs
``(h, j)`` of a layer, those of the highest scores (comprehensiveness) or of the lowest
(sufficiency). Torch alone.
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
    """``rate * count``, half rounded up, of the decimal that ``rate`` is written as.

    Example:
        >>> quota(0.5, 5), quota(0.145, 100)
        (3, 15)
    """
    return int((Decimal(repr(float(rate))) * count).to_integral_value(ROUND_HALF_UP))


def chosen_pairs(
    scores: Sequence[Tensor],
    real: Sequence[Tensor],
    kept: Sequence[Tensor],
    rate: float,
    which: Which = "bottom",
    ranking: RankingScope = "layer",
    rate_of: RateOf = "removable",
) -> list[Tensor]:
    """The pairs of highest or lowest score.

    Args:
        scores: For each layer ``(B, H, S)``, finite. Where ``H`` is 1, whole tokens are ranked.
        real: For each layer ``(B, S)`` boolean, False at padding.
        kept: For each layer ``(B, S)`` boolean, True at tokens that are never chosen (sinks).
        rate: The fraction to choose, in [0, 1].
        which: ``"top"`` or ``"bottom"``.
        ranking: Pairs are ranked jointly over a ``"layer"``, over all layers (``"global"``), or
            within each ``"head"``; always within one example.
        rate_of: What ``rate`` is a fraction of: the pairs that may be chosen, or all real ones,
            of which those of kept tokens then use up a part of the quota.

    Returns:
        For each layer ``(B, H, S)`` boolean. In each ranking exactly ``quota(rate, pairs)`` are
        chosen; of equal scores the one of the lower layer, head and token.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]]])
        >>> real = torch.ones(1, 3, dtype=torch.bool)
        >>> sinks = torch.tensor([[True, False, False]])
        >>> (pairs,) = chosen_pairs([scores], [real], [sinks], 0.5, "top")
        >>> pairs.nonzero().tolist()
        [[0, 0, 2], [0, 1, 1]]
    """
    ranked = [
        (r if rate_of == "all" else r & ~k)[:, None].expand_as(s)
        for s, r, k in zip(scores, real, kept, strict=True)
    ]
    if ranking == "global":
        flat = _choose(_flat(scores), _flat(ranked), rate, which)
        parts = list(torch.split(flat, [s[0].numel() for s in scores], dim=1))
    elif ranking == "layer":
        parts = [
            _choose(s.flatten(1), r.flatten(1), rate, which)
            for s, r in zip(scores, ranked, strict=True)
        ]
    else:
        parts = [_choose(s, r, rate, which) for s, r in zip(scores, ranked, strict=True)]
    return [
        part.view(s.shape) & ~k[:, None] for part, s, k in zip(parts, scores, kept, strict=True)
    ]


def _flat(layers: Sequence[Tensor]) -> Tensor:
    """One row an example: ``(B, L * H * S)``, in the order of layers, heads and tokens."""
    return torch.cat([x.flatten(1) for x in layers], dim=1)


def _choose(scores: Tensor, ranked: Tensor, rate: float, which: Which) -> Tensor:
    """Chooses among the ``ranked`` entries of each row (the last dimension)."""
    top = which == "top"
    # What is not ranked comes last: behind any finite score, whichever way they are sorted.
    ordered = scores.masked_fill(~ranked, -math.inf if top else math.inf)
    order = ordered.sort(dim=-1, descending=top, stable=True).indices
    counts = ranked.sum(-1)
    quotas = {n: quota(rate, n) for n in set(counts.flatten().tolist())}
    k = counts.new_tensor([quotas[n] for n in counts.flatten().tolist()]).view_as(counts)
    first = torch.arange(scores.shape[-1], device=scores.device) < k[..., None]
    return torch.zeros_like(ranked).scatter_(-1, order, first)
