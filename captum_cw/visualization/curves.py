"""Curves of comprehensiveness and sufficiency (Fig. 3 of arXiv 2606.07604)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from captum_cw.visualization._output import new_figure

__all__ = ["plot_curves"]

# Markers, so that curves differ without colours too.
_MARKERS = "osD^vPX*<>"
_DECADES = 2


def plot_curves(
    panels: Mapping[str, Mapping[str, Tensor]],
    rates: Mapping[str, Sequence[float]],
    *,
    ylabel: str = "delta",
    log: bool | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, npt.NDArray[Any]]:
    """Plot curves over rates, with a panel for each title and a curve for each method.

    Args:
        panels: Values by title and method, ``(rates,)`` each.
        rates: The removed fractions, by title.
        ylabel: The label of the y axis.
        log: Use a logarithmic scale, which is linear from -1 to 1 if values are not all positive.
            By default, it is used if the values of a panel span two decades of it.
        styles: By method, keyword arguments of ``Axes.plot`` for its curve, such as ``label`` and
            ``color``. The default label is the name of the method.
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
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                **{"label": name, **(styles or {}).get(name, {})},
            )
        if log:
            ax.set_yscale("log") if positive else ax.set_yscale("symlog", linthresh=1)
        ax.set(title=title, xlabel="removed (%)", ylabel=ylabel)
        ax.grid(alpha=0.3)
    axes[0, 0].legend()
    return fig, axes[0]
