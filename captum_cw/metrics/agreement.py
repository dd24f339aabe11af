"""The agreement of two methods on the tokens of a text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_cw.functional import widest
from captum_cw.removal.ranking import quota

__all__ = ["Agreement", "agreement"]


class Agreement(NamedTuple):
    """How well two scores of the same tokens agree.

    Attributes:
        rank_correlation: ``(B,)``, Spearman's rank correlation in [-1, 1]; NaN if a method gives
            all tokens the same score.
        top_overlap: ``(B,)``, the fraction of the top tokens that the two methods share, in [0, 1].

    Example:
        >>> a = torch.tensor([[0.1, 0.2, 0.3]])
        >>> agreement(a, a).rank_correlation.tolist()
        [1.0]
    """

    rank_correlation: Tensor
    top_overlap: Tensor


def agreement(a: Tensor, b: Tensor, real: Tensor | None = None, *, top: float = 0.2) -> Agreement:
    """Compare the scores that two methods give to the same tokens (needs SciPy).

    Args:
        a: ``(B, T)``, the scores of a method.
        b: ``(B, T)``, the scores of another method.
        real: ``(B, T)`` boolean, False at tokens that do not count, such as padding and sinks;
            None if all tokens count.
        top: the fraction of tokens that are the top ones.

    Returns:
        The rank correlation and the overlap of the top tokens, for each example.

    Raises:
        ValueError: If the shapes differ, ``top`` is not in (0, 1], or an example has fewer than
            two tokens that count.

    Example:
        >>> capital = TokenScores(ContributionWeights(model))
        >>> attention = TokenScores(AttentionWeights(model))
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> found = agreement(capital.attribute(inputs), attention.attribute(inputs))
        >>> found.rank_correlation.shape, found.top_overlap.shape
        (torch.Size([1]), torch.Size([1]))
    """
    from scipy.stats import rankdata

    if a.dim() != 2 or a.shape != b.shape or (real is not None and real.shape != a.shape):
        raise ValueError(
            "a, b and real must have the same shape (B, T), got scores of shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not 0 < top <= 1:
        raise ValueError(f"top must lie in (0, 1], got {top!r}.")
    real = torch.ones_like(a, dtype=torch.bool) if real is None else real
    correlations, overlaps = [], []
    for example, (x, y, counted) in enumerate(zip(a, b, real, strict=True)):
        x, y = (scores[counted].detach().cpu() for scores in (x, y))
        if len(x) < 2:
            raise ValueError(f"Example {example} has fewer than two tokens that count.")
        ranked = [rankdata(scores.to(widest(a.device)).numpy()) for scores in (x, y)]
        with np.errstate(invalid="ignore"):  # equal scores have no correlation
            correlations.append(float(np.corrcoef(ranked)[0, 1]))
        k = max(1, quota(top, len(x)))
        first, second = (
            set(scores.sort(descending=True, stable=True)[1][:k].tolist()) for scores in (x, y)
        )
        overlaps.append(len(first & second) / k)
    return Agreement(
        torch.tensor(correlations, dtype=widest(a.device), device="cpu"),
        torch.tensor(overlaps, dtype=torch.float32, device="cpu"),
    )
