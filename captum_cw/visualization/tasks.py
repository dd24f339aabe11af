"""Accuracy of tasks while tokens are removed (Fig. 4 of arXiv 2606.07604)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from captum_cw.visualization.curves import plot_curves

__all__ = ["plot_tasks"]


def plot_tasks(
    panels: Mapping[str, Mapping[str, Tensor]],
    rates: Sequence[float],
    baselines: Mapping[str, tuple[float, float]],
    *,
    ylabel: str = "accuracy",
    use_pyplot: bool = True,
) -> tuple[Figure, npt.NDArray[Any]]:
    """A panel for each task: a curve for each method, and what the unchanged model reaches.

    Args:
        panels: by title, by method ``(rates,)``.
        rates: the fractions removed.
        baselines: by title, the unchanged model's value and half the width of the interval that
            is shaded around it (NaN: none).
        ylabel: what the curves show.
        use_pyplot: make a pyplot figure, which notebooks show; False gives a bare one.

    Returns:
        The figure, and its axes, one a panel.

    Example::

        >>> import torch
        >>> fig, axes = plot_tasks(
        ...     {"task": {"a": torch.tensor([0.7, 0.5])}}, [0.3, 0.5], {"task": (0.72, 0.04)},
        ...     use_pyplot=False)
        >>> [line.get_label() for line in axes[0].lines]
        ['a', 'nothing removed']
    """
    by_title = dict.fromkeys(panels, rates)
    fig, axes = plot_curves(panels, by_title, ylabel=ylabel, log=False, use_pyplot=use_pyplot)
    for ax, title in zip(axes, panels, strict=True):
        value, half = baselines[title]
        ax.axhline(value, color="black", linestyle="--", linewidth=1, label="nothing removed")
        if half == half:  # not NaN
            ax.axhspan(value - half, value + half, color="black", alpha=0.1, linewidth=0)
    axes[0].legend()
    return fig, axes
