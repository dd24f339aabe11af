"""Accuracy of tasks while tokens are removed (Fig. 4 of arXiv 2606.07604)."""

from __future__ import annotations

import math
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
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, npt.NDArray[Any]]:
    """Plot the accuracy of each task, with a curve for each method and the unchanged model.

    Args:
        panels: Values by title and method, ``(rates,)`` each.
        rates: The removed fractions.
        baselines: The value of the unchanged model and half the width of its interval, by title.
            The interval is shaded; NaN means that there is none.
        ylabel: The label of the y axis.
        styles: By method, keyword arguments of ``Axes.plot`` for its curve.
        use_pyplot: Make a pyplot figure, which notebooks show. False makes a plain figure.

    Returns:
        The figure, and its array of axes, one per panel.

    Example::

        >>> import torch
        >>> fig, axes = plot_tasks(
        ...     {"task": {"a": torch.tensor([0.7, 0.5])}}, [0.3, 0.5], {"task": (0.72, 0.04)},
        ...     use_pyplot=False)
        >>> [line.get_label() for line in axes[0].lines]
        ['a', 'nothing removed']
    """
    by_title = dict.fromkeys(panels, rates)
    fig, axes = plot_curves(
        panels, by_title, ylabel=ylabel, log=False, styles=styles, use_pyplot=use_pyplot
    )
    for ax, title in zip(axes, panels, strict=True):
        value, half = baselines[title]
        ax.axhline(value, color="black", linestyle="--", linewidth=1, label="nothing removed")
        if not math.isnan(half):
            ax.axhspan(value - half, value + half, color="black", alpha=0.1, linewidth=0)
    axes[0].legend()
    return fig, axes
