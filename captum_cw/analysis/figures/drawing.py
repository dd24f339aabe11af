"""The registry of figures, and what figures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from captum_cw import measures
from captum_cw.visualization._output import MARKERS, Picture, new_figure

#: The function that plots each kind of result. It takes the result and ``use_pyplot``.
FIGURES: dict[str, Callable[[Any, bool], Picture]] = {}

POINTS: dict[str, Any] = {"s": 5, "alpha": 0.5, "linewidths": 0}
#: A line along which a quantity is zero, or has another value to compare with.
ZERO: dict[str, Any] = {"color": "0.6", "linewidth": 0.8}
#: A legend beside the axes.
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}

Draw = Callable[..., None]


def figure(
    kind: str, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> Callable[[Draw], Draw]:
    """Make the function that is decorated the figure of a kind of result.

    Args:
        kind: The name of the result's class.
        size: Width and height in inches.
        rows: The number of rows of axes.
        columns: The number of columns of axes.
    """

    def add(draw: Draw) -> Draw:
        def plot(result: Any, use_pyplot: bool) -> Picture:
            fig, axes = new_figure(rows, columns, size, use_pyplot)
            draw(result, *axes.flat)
            return fig, axes if rows > 1 else axes[0]

        FIGURES[kind] = plot
        return draw

    return add


def plot_by(
    ax: Axes,
    table: pd.DataFrame,
    column: str,
    by: str,
    *,
    x: str = "layer",
    label: Callable[[Any], str] = str,
    colours: str | None = None,
    **options: Any,
) -> None:
    """Plot a column over another, with a curve for each value of a third.

    Measures have the colours of the registry.

    Args:
        ax: The axes.
        table: A row for each point.
        column: The column to plot.
        by: The column that tells the curves apart.
        x: The column of the x axis.
        label: A function that names a curve by its value of ``by``.
        colours: The name of a colour map for the curves.
        options: Options of ``DataFrame.plot``.
    """
    curves = table.pivot(index=x, columns=by, values=column)[table[by].unique()]
    if by == "measure":  # such as "vw, rows normalised"
        options["color"] = measures.colours(str(name).partition(",")[0] for name in curves)
    if colours is not None:
        options["color"] = list(colormaps[colours](np.linspace(0.1, 0.85, curves.shape[1])))
    style = [f"{marker}-" for marker in MARKERS]
    curves.rename(columns=label).plot(ax=ax, style=style, markersize=4, **options)
    ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.3)
