"""Curves over removal rates (Figs. 3 and 4 of arXiv 2606.07604)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_cw.visualization._output import MARKERS, Picture, new_figure

__all__ = ["plot_curves"]

_DECADES = 2


def plot_curves(
    panels: Mapping[str, Mapping[str, Tensor]],
    rates: Mapping[str, Sequence[float]],
    *,
    ylabel: str = "delta",
    log: bool | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    baselines: Mapping[str, tuple[float, float]] | None = None,
    use_pyplot: bool = True,
) -> Picture:
    """Plot curves over rates, with a panel per title and a curve per method (Figs. 3 and 4).

    Args:
        panels: Values by title and method, ``(rates,)`` each.
        rates: The removed fractions, by title.
        ylabel: The label of the y axis.
        log: Use a logarithmic scale, which is linear from -1 to 1 if values are not all positive.
            By default, it is used if the values of a panel span two decades of it.
        styles: By method, keyword arguments of ``Axes.plot`` for its curve, such as ``label`` and
            ``color``. The default label is the name of the method.
        baselines: The value of the unchanged model and half the width of its interval, by title.
            The interval is shaded; NaN means that there is none.
        use_pyplot: Make a pyplot figure, which notebooks show. False makes a plain figure.

    Returns:
        The figure, and its array of axes, one per panel.

    Example::

        >>> import torch
        >>> fig, axes = plot_curves(
        ...     {"bottom": {"a": torch.tensor([1.0, 2.0])}}, {"bottom": [0.1, 0.2]},
        ...     use_pyplot=False)
        >>> axes[0].get_yscale()
        'linear'
        >>> fig, axes = plot_curves(
        ...     {"task": {"a": torch.tensor([0.7, 0.5])}}, {"task": [0.3, 0.5]},
        ...     baselines={"task": (0.72, 0.04)}, use_pyplot=False)
        >>> [line.get_label() for line in axes[0].lines]
        ['a', 'nothing removed']
    """
    ends = [
        (min(float(x.min()) for x in curves.values()), max(float(x.max()) for x in curves.values()))
        for curves in panels.values()
    ]
    positive = all(lowest > 0 for lowest, _ in ends)
    if log is None:  # the same scale in all panels makes them comparable
        log = any(highest > (lowest if positive else 1) * 10**_DECADES for lowest, highest in ends)
    fig, axes = new_figure(1, len(panels), (5.0 * len(panels), 3.8), use_pyplot)
    for ax, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for number, (name, values) in enumerate(curves.items()):
            ax.plot(
                [100 * rate for rate in rates[title]],
                values.tolist(),
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                **{"label": name, **(styles or {}).get(name, {})},
            )
        if log:
            ax.set_yscale("log") if positive else ax.set_yscale("symlog", linthresh=1)
        if baselines is not None:
            value, half = baselines[title]
            ax.axhline(value, color="black", linestyle="--", linewidth=1, label="nothing removed")
            if not math.isnan(half):
                ax.axhspan(value - half, value + half, color="black", alpha=0.1, linewidth=0)
        ax.set(title=title, xlabel="removed (%)", ylabel=ylabel)
        ax.grid(alpha=0.3)
    axes[0, 0].legend()
    return fig, axes[0]
