"""Figures of reference frames: graphs and sinks by layer, and frames over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from captum_cw.visualization._output import new_figure

if TYPE_CHECKING:
    from captum_cw.analysis.frames import FramesOverCheckpoints, ReferenceFrames

__all__ = ["plot_checkpoints", "plot_reference_frames"]

_MARKERS = "osD^vPX*<>"

#: Attention below this is drawn as this.
_FAINTEST = 1e-3

#: The number of positions drawn at each end.
_ENDS = 16


def plot_reference_frames(
    result: ReferenceFrames, *, use_pyplot: bool = True
) -> tuple[Figure, npt.NDArray[Any]]:
    """Plot the Fiedler value, star-likeness, received attention and divergence of heads, by layer.

    Example::

        >>> from captum_cw.analysis.frames import reference_frames
        >>> fig, axes = plot_reference_frames(
        ...     reference_frames(model, input_ids, permutations=9), use_pyplot=False)
        >>> axes[0, 0].get_ylabel()
        'Fiedler value'
    """
    fig, axes = new_figure(2, 2, (12.0, 8.0), use_pyplot)
    _plot_graph(axes[0, 0], result, "fiedler", "Fiedler value", "Second eigenvalue (1 for a star)")
    axes[0, 0].axhline(1, color="black", linestyle="--", linewidth=1)
    largest = max(1.0, float(result.tables["graph"]["fiedler"].max()))
    if largest > 10:
        axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set_ylim(-0.05, 1.3 * largest)
    _plot_graph(axes[0, 1], result, "star_likeness", "largest in-degree / (n - 1)", "Star-likeness")
    axes[0, 1].set_ylim(-0.03, 1.03)
    axes[0, 1].legend(title="threshold", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _plot_received(fig, axes[1, 0], result)
    _plot_divergence(axes[1, 1], result)
    for ax in axes.flat:
        ax.set_xlabel("layer")
    axes[1, 0].set_xlabel("key position (negative: from the end)")
    fig.suptitle(_headline(result))
    return fig, axes


def _headline(result: ReferenceFrames) -> str:
    """Return the title: the type of the frame and its evidence."""
    found, frame = result.numbers, result.frame
    if frame == "none":
        return f"No reference frame: {found['with_anchor']:.0%} of the maps have an anchor"
    evidence = {
        "centralised": f"the top anchor is at {found['top_position']:.0f} in "
        f"{found['top_share']:.0%} of the maps, and alone in {found['alone_share']:.0%}",
        "distributed": f"{found['anchors']:.1f} anchors per map, of which "
        f"{found['recurrence']:.0%} recur in another layer",
        "bidirectional": f"the first token is an anchor in {found['first_share']:.0%} of the maps, "
        f"the last in {found['last_share']:.0%}",
    }[frame]
    return f"{frame.capitalize()} reference frame: {evidence} (p = {result.p_value:.2g})"


def _plot_graph(ax: Any, result: ReferenceFrames, column: str, label: str, title: str) -> None:
    """Plot a graph measure by layer, with a curve for each threshold."""
    by_threshold = result.tables["graph"].groupby("threshold")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(by_threshold)))
    for number, (threshold, rows) in enumerate(by_threshold):
        style = {"color": colours[number], "marker": _MARKERS[number % len(_MARKERS)]}
        ax.plot(rows["layer"], rows[column], label=f"{threshold:g}", markersize=4, **style)
    ax.set(ylabel=label, title=title)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def _plot_received(fig: Figure, ax: Any, result: ReferenceFrames) -> None:
    """Plot the received attention by layer and position, as a map."""
    table = result.tables["positions"]
    table = table[(table["position"] < _ENDS) & (table["position"] >= -_ENDS)]
    received = table.pivot(index="layer", columns="position", values="received")
    positions = np.array(received.columns)
    # Positions from the end are on the right, after a gap.
    places = np.where(positions < 0, 2 * _ENDS + 1 + positions, positions)
    for side in (positions >= 0, positions < 0):
        image = ax.pcolormesh(
            places[side],
            received.index,
            received.loc[:, side].clip(lower=_FAINTEST),
            norm=LogNorm(_FAINTEST, 1),
            cmap="magma",
            rasterized=True,
        )
    shown = positions % 4 == np.where(positions < 0, 3, 0)
    ax.set_xticks(places[shown], positions[shown])
    fig.colorbar(image, ax=ax, label="mean attention from other tokens")
    ax.set(ylabel="layer", title="Received attention at both ends")
    ax.yaxis.get_major_locator().set_params(integer=True)


def _plot_divergence(ax: Any, result: ReferenceFrames) -> None:
    """Plot the divergence of heads by layer, with and without sinks."""
    sinks = result.tables["sinks"]
    by_percentile = sinks.groupby("percentile")
    # The divergence with sinks hardly depends on the percentile.
    _, lowest = next(iter(by_percentile))
    style = {"color": "black", "marker": "o", "markersize": 4}
    ax.plot(lowest["layer"], lowest["divergence"], label="with sinks", **style)
    colours = colormaps["plasma"](np.linspace(0.2, 0.8, len(by_percentile)))
    for number, (percentile, rows) in enumerate(by_percentile):
        marker = _MARKERS[1 + number % (len(_MARKERS) - 1)]
        style = {"color": colours[number], "marker": marker, "markersize": 4}
        label = f"without, percentile {percentile:g}"
        ax.plot(rows["layer"], rows["divergence_without"], label=label, **style)
    ax.set(ylabel="mean KL divergence (nats)", title="Divergence of heads from their mean")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(title="sinks", loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_checkpoints(
    result: FramesOverCheckpoints, *, use_pyplot: bool = True
) -> tuple[Figure, npt.NDArray[Any]]:
    r"""Plot the anchors and the evidence for each type of frame over revisions.

    Example::

        >>> from captum_cw.analysis.frames import frames_over_checkpoints
        >>> found = frames_over_checkpoints(
        ...     lambda revision: model, ["a", "b"], input_ids, permutations=9)
        >>> fig, axes = plot_checkpoints(found, use_pyplot=False)
        >>> axes[0].get_xticklabels()[0].get_text()
        'a\nnone\np = 1'
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
        for number, (column, label) in enumerate(lines.items()):
            (line,) = ax.plot(
                places, table[column], marker=_MARKERS[number], markersize=5, label=label
            )
            if lines is statistics:
                ax.plot(places, table[f"chance_{column}"], color=line.get_color(), linestyle="--")
        ax.set_ylim(-0.03, 1.03)
        ax.set_xticks(
            places, list(map(_revision_label, table.to_dict("records"))), fontsize="small"
        )
        ax.set_xlabel("revision, frame and p-value")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[0, 0].set(ylabel="share of maps", title="Maps with anchors")
    axes[0, 1].set_ylabel("share of maps or anchors")
    axes[0, 1].set_title("Evidence for each type (dashed: permuted)")
    return fig, axes[0]


def _revision_label(row: Mapping[str, Any]) -> str:
    """Return the label of a revision: its name, frame and p-value."""
    return f"{row['revision']}\n{row['frame']}\np = {row['p_value']:.2g}"
