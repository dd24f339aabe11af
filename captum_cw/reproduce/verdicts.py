"""Verdicts on the papers' claims, from the figures behind them.

Rules on means over texts use 95% bootstrap intervals; with too few texts, the verdict is
"undecided".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Verdict = Literal["holds", "does not hold", "undecided", "not run"]
#: An interval needs at least this many texts.
MIN_TEXTS = 5
RESAMPLES = 9999


class Judgement(NamedTuple):
    """A verdict, and the figures behind it."""

    verdict: Verdict
    figures: str


def judgement(figures: str, holds: bool, opposite: bool | None = None) -> Judgement:
    """Return the verdict on a claim.

    Args:
        figures: The figures behind the verdict.
        holds: Whether the claim holds.
        opposite: Whether the opposite was found; by default, whenever the claim does not hold.
            If neither holds, the claim is undecided.
    """
    opposite = not holds if opposite is None else opposite
    return Judgement("holds" if holds else "does not hold" if opposite else "undecided", figures)


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Compute the 95% bootstrap interval of a mean; NaN for fewer than five values.

    Example:
        >>> interval([1.0] * 4)
        (nan, nan)
        >>> low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> 1 < low < 3 < high < 5
        True
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=float)
    if len(x) < MIN_TEXTS:
        return float("nan"), float("nan")
    if (x == x[0]).all():
        return float(x[0]), float(x[0])
    low, high = bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(low), float(high)


def above(values: Sequence[float] | Array, bound: float = 0.0, unit: str = "") -> Judgement:
    """Judge whether a mean over texts is above a bound, by its 95% interval."""
    low, high = interval(values)
    spread = f"{low:.3g} to {high:.3g}"
    if len(values) < MIN_TEXTS:
        spread = f"no interval for fewer than {MIN_TEXTS} texts"
    figures = f"mean {float(np.mean(values)):.3g}{unit} ({spread}), {len(values)} texts"
    return judgement(figures, low > bound, high < bound)


def below(values: Sequence[float] | Array, bound: float = 0.0, unit: str = "") -> Judgement:
    """Judge whether a mean over texts is below a bound, by its 95% interval."""
    verdict, figures = above(values, bound, unit)
    turned: dict[Verdict, Verdict] = {"holds": "does not hold", "does not hold": "holds"}
    return Judgement(turned.get(verdict, verdict), figures)
