"""What the pages of results share: tables, numbers, and the command that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

#: The draws of a bootstrap interval.
RESAMPLES = 10_000


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, whose first column is text, and the others numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float) -> str:
    """Return a number with three digits, and a large one as a whole number."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def mean_and_interval(values: Tensor) -> tuple[float, float, float]:
    """Return the mean of a row of numbers, and the bounds of its 95% bootstrap interval."""
    x = values.double()
    drawn = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    bounds = x[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = bounds.tolist()
    return float(x.mean()), low, high


def named(text: str) -> tuple[str, str]:
    """Return the name and the file of ``NAME=FILE``; a name alone stands for both."""
    name, _, data = text.partition("=")
    return name, data or name


def without_folders(words: Sequence[str]) -> list[str]:
    """Return the words of a command without the folders of this machine."""
    kept, skips = [], False
    for word in words:
        if skips or word in ("--work", "--out"):
            skips = not skips
            continue
        name, equals, file = word.partition("=")
        last = Path(file if equals else name).name
        kept.append(f"{name}={last}" if equals else (last if word.startswith("/") else word))
    return kept
