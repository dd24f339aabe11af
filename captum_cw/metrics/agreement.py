"""How far two methods agree on the tokens of a text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_cw.functional import widest
from captum_cw.removal.ranking import quota

__all__ = ["Agreement", "agreement"]


class Agreement(NamedTuple):
    """How far two scores agree, each ``(B,)``.

    Attributes:
        rank_correlation: Spearman's, in [-1, 1]; NaN where a method scores all tokens alike.
        top_overlap: The share of the top tokens that both have there, in [0, 1].

    Example:
        >>> a = torch.tensor([[0.1, 0.2, 0.3]])
        >>> agreement(a, a).rank_correlation.tolist()
        [1.0]
    """

    rank_correlation: Tensor
    top_overlap: Tensor


def agreement(a: Tensor, b: Tensor, real: Tensor | None = None, *, top: float = 0.2) -> Agreement:
    """Compares the scores that two methods give to the same tokens.

    Args:
        a: ``(B, T)``.
        b: ``(B, T)``.
        real: ``(B, T)`` boolean, False at tokens that do not count, such as padding and sinks;
            None where all do.
        top: The fraction of tokens that are the top ones.

    Returns:
        The rank correlation and the overlap of the top tokens, for each example.

    Raises:
        ValueError: If the shapes differ, ``top`` is no fraction, or an example has less than two
            tokens that count.

    Example:
        >>> a = torch.tensor([[1.0, 2, 3, 4]])
        >>> agreement(a, a.square()).rank_correlation.tolist()
        [1.0]
        >>> agreement(a, -a, top=0.5).top_overlap.tolist()
        [0.0]
    """
    if a.dim() != 2 or a.shape != b.shape or (real is not None and real.shape != a.shape):
        raise ValueError(
            f"Scores of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: give "
            "(B, T) twice, and real of the same shape."
        )
    if not 0 < top <= 1:
        raise ValueError(f"top={top!r} is no fraction: give a number in (0, 1].")
    real = torch.ones_like(a, dtype=torch.bool) if real is None else real
    if (real.sum(1) < 2).any():
        few = int((real.sum(1) < 2).nonzero()[0])
        raise ValueError(f"Example {few} has less than two tokens that count: nothing is ranked.")
    correlations, overlaps = [], []
    for x, y, r in zip(a, b, real, strict=True):
        x, y = (z[r].to(widest(z.device)) for z in (x, y))
        correlations.append(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])
        k = max(1, quota(top, len(x)))
        first, second = (set(z.sort(descending=True, stable=True)[1][:k].tolist()) for z in (x, y))
        overlaps.append(len(first & second) / k)
    return Agreement(
        torch.stack(correlations), torch.tensor(overlaps, dtype=torch.float32, device="cpu")
    )


def _ranks(x: Tensor) -> Tensor:
    """Ranks from the lowest; equal scores share their mean rank."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    counts = counts.to(x.dtype)
    last = counts.cumsum(0)
    ranks: Tensor = (last - (counts - 1) / 2)[group]
    return ranks
