"""Figures of reference frames: graphs and sinks by layer, and frames over checkpoints."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from captum_cw.analysis.frames import FROM_END, FramesOverCheckpoints, ReferenceFrames
from captum_cw.visualization._output import Picture, new_figure

_MARKERS = "osD^vPX*<>"

#: Attention below this is drawn as this.
_FAINTEST = 1e-3


def plot_reference_frames(result: ReferenceFrames, use_pyplot: bool) -> Picture:
    """Plot the Fiedler value, star-likeness, received attention and divergence of heads, by layer.

    Example::

        >>> from captum_cw.analysis.frames import reference_frames
        >>> fig, axes = plot_reference_frames(
        ...     reference_frames(model, input_ids, permutations=9), use_pyplot=False)
        >>> axes[0, 0].get_ylabel()
        'Fiedler value'
    """
    fig, axes = new_figure(2, 2, (12.0, 8.0), use_pyplot)
    (fiedler, star), (received, divergence) = axes
    graph = result.tables["graph"].groupby("threshold")
    _plot_by_layer(fiedler, graph, "fiedler", "viridis", "{:g}")
    fiedler.set(ylabel="Fiedler value", title="Second eigenvalue (1 for a star)")
    fiedler.axhline(1, color="black", linestyle="--", linewidth=1)
    largest = max(1.0, float(result.tables["graph"]["fiedler"].max()))
    if largest > 10:
        fiedler.set_yscale("symlog", linthresh=1)
    fiedler.set_ylim(-0.05, 1.3 * largest)
    _plot_by_layer(star, graph, "star_likeness", "viridis", "{:g}")
    star.set(ylabel="largest in-degree / (n - 1)", title="Star-likeness", ylim=(-0.03, 1.03))
    star.legend(title="threshold", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _plot_received(fig, received, result.tables["positions"])
    sinks = result.tables["sinks"].groupby("percentile")
    # The divergence with sinks hardly depends on the percentile.
    _, lowest = next(iter(sinks))
    divergence.plot(lowest["layer"], lowest["divergence"], "k-x", markersize=4, label="with sinks")
    _plot_by_layer(divergence, sinks, "divergence_without", "plasma", "without, percentile {:g}")
    divergence.set(ylabel="mean KL divergence (nats)", title="Divergence of heads from their mean")
    divergence.set_ylim(bottom=0)
    divergence.legend(title="sinks", loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.suptitle(_headline(result))
    return fig, axes


def _headline(result: ReferenceFrames) -> str:
    """Return the title: the type of the frame and its evidence."""
    evidence, frame = result.numbers, result.frame
    if frame == "none":
        return f"No reference frame: {evidence['with_anchor']:.0%} of the maps have an anchor"
    reason = {
        "centralised": "the top anchor is at {top_position:.0f} in {top_share:.0%} of the maps, "
        "and alone in {alone_share:.0%}",
        "distributed": "{anchors:.1f} anchors per map, of which {recurrence:.0%} recur in another "
        "layer",
        "bidirectional": "the first token is an anchor in {first_share:.0%} of the maps, the last "
        "in {last_share:.0%}",
    }[frame].format_map(evidence)
    return f"{frame.capitalize()} reference frame: {reason} (p = {result.p_value:.2g})"


def _plot_by_layer(ax: Axes, groups: Any, column: str, colours: str, label: str) -> None:
    """Plot a column by layer, with a curve for each group.

    Args:
        ax: The axes.
        groups: A table, grouped by one column.
        column: The column to plot.
        colours: The name of a colour map.
        label: The format of the label of a group.
    """
    shades = colormaps[colours](np.linspace(0.1, 0.85, len(groups)))
    for (key, rows), colour, marker in zip(groups, shades, cycle(_MARKERS), strict=False):
        style = {"color": colour, "marker": marker, "markersize": 4}
        ax.plot(rows["layer"], rows[column], label=label.format(key), **style)
    ax.set_xlabel("layer")
    ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.3)


def _plot_received(fig: Figure, ax: Axes, table: pd.DataFrame) -> None:
    """Plot the received attention by layer and position, as a map."""
    received = table.pivot(index="layer", columns="position", values="received")
    # Positions from the end are on the right, after a gap.
    received = received.reindex(columns=[*range(FROM_END + 1), *range(-FROM_END, 0)])
    received[FROM_END] = np.nan
    norm = LogNorm(_FAINTEST, 1)
    image = ax.imshow(received.clip(lower=_FAINTEST), "magma", norm, aspect="auto", origin="lower")
    shown = [*range(0, FROM_END, 4), *range(-1, -FROM_END, -4)]
    ax.set_xticks(received.columns.get_indexer(shown), shown)
    fig.colorbar(image, ax=ax, label="mean attention from other tokens")
    ax.set(
        xlabel="key position (negative: from the end)",
        ylabel="layer",
        title="Received attention at both ends",
    )
    ax.locator_params(axis="y", integer=True)


def plot_checkpoints(result: FramesOverCheckpoints, use_pyplot: bool) -> Picture:
    r"""Plot the anchors and the evidence for each type of frame over revisions.

    Example::

        >>> from captum_cw.analysis.frames import frames_over_checkpoints
        >>> result = frames_over_checkpoints(
        ...     lambda revision: model, ["step0", "step1000"], input_ids, permutations=9)
        >>> fig, axes = plot_checkpoints(result, use_pyplot=False)
        >>> axes[0].get_xticklabels()[0].get_text()
        'step0\nnone\np = 1'
    """
    table = result.to_dataframe()
    places = range(len(table))
    fig, axes = new_figure(1, 2, (max(14.0, 5 + 2.2 * len(table)), 4.6), use_pyplot)
    shares = {
        "with_anchor": "has an anchor (of all maps)",
        "alone_share": "has only one anchor",
        "first_share": "first token is an anchor",
        "last_share": "last token is an anchor",
    }
    statistics = {
        "top_share": "centralised: the top anchor is\nat its most common position",
        "recurrence": "distributed: an anchor\nrecurs in another layer",
        "rarer_share": "bidirectional: the rarer\nend is an anchor",
    }
    for ax, lines in zip(axes[0], (shares, statistics), strict=True):
        for (column, label), marker in zip(lines.items(), _MARKERS, strict=False):
            (line,) = ax.plot(places, table[column], marker=marker, markersize=5, label=label)
            if lines is statistics:
                ax.plot(places, table[f"chance_{column}"], color=line.get_color(), linestyle="--")
        ax.set_ylim(-0.03, 1.03)
        labels = [
            f"{row.revision}\n{row.frame}\np = {row.p_value:.2g}" for row in table.itertuples()
        ]
        ax.set_xticks(places, labels, fontsize="small")
        ax.set_xlabel("revision, frame and p-value")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[0, 0].set(ylabel="share of maps", title="Maps with anchors")
    axes[0, 1].set_ylabel("share of maps or anchors")
    axes[0, 1].set_title("Evidence for each type (dashed: permuted)")
    return fig, axes[0]
