"""The graphs and sinks of a model by layer, and its frame over checkpoints (arXiv 2508.02546)."""

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

#: Attention below it is drawn as if it were that.
_FAINTEST = 1e-3

#: How many positions at either end are drawn.
_ENDS = 16


def plot_reference_frames(
    result: ReferenceFrames, *, use_pyplot: bool = True
) -> tuple[Figure, npt.NDArray[Any]]:
    """Fiedler value, star-likeness, received attention and divergence of heads, by layer.

    Args:
        result: what was found.
        use_pyplot: make a pyplot figure, which notebooks show; False gives a bare one.

    Returns:
        The figure, and its axes ``(2, 2)``.

    Example::

        >>> from captum_cw.analysis.frames import reference_frames
        >>> fig, axes = plot_reference_frames(
        ...     reference_frames(model, input_ids, permutations=9), use_pyplot=False)
        >>> axes[0, 0].get_ylabel()
        'Fiedler value'
    """
    fig, axes = new_figure(2, 2, (12.0, 8.0), use_pyplot)
    _plot_graph(axes[0, 0], result, "fiedler", "Fiedler value", "Second eigenvalue (a star has 1)")
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
    axes[1, 0].set_xlabel("position of the key; from the end if negative")
    fig.suptitle(_headline(result))
    return fig, axes


def _headline(result: ReferenceFrames) -> str:
    found, frame = result.numbers, result.frame
    if frame == "none":
        return f"No reference frame: {found['with_anchor']:.0%} of the maps have an anchor"
    evidence = {
        "centralised": f"the top stands at {found['top_position']:.0f} in "
        f"{found['top_share']:.0%} of the maps, alone in {found['alone_share']:.0%}",
        "distributed": f"{found['anchors']:.1f} anchors a map, of which "
        f"{found['recurrence']:.0%} recur in another layer",
        "bidirectional": f"the first is an anchor in {found['first_share']:.0%} of the maps, "
        f"the last in {found['last_share']:.0%}",
    }[frame]
    return f"{frame.capitalize()} reference frame: {evidence} (p = {result.p_value:.2g})"


def _plot_graph(ax: Any, result: ReferenceFrames, column: str, label: str, title: str) -> None:
    by_threshold = result.tables["graph"].groupby("threshold")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(by_threshold)))
    for number, (threshold, rows) in enumerate(by_threshold):
        ax.plot(
            rows["layer"],
            rows[column],
            label=f"{threshold:g}",
            color=colours[number],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
        )
    ax.set_ylabel(label)
    ax.set_title(title)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def _plot_received(fig: Figure, ax: Any, result: ReferenceFrames) -> None:
    table = result.tables["positions"]
    table = table[(table["position"] < _ENDS) & (table["position"] >= -_ENDS)]
    received = table.pivot(index="layer", columns="position", values="received")
    positions = np.array(received.columns)
    # What counts from the end stands on the right, behind a gap.
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
    fig.colorbar(image, ax=ax, label="mean weight, from others")
    ax.set_ylabel("layer")
    ax.set_title("Received attention, at the start and at the end")
    ax.yaxis.get_major_locator().set_params(integer=True)


def _plot_divergence(ax: Any, result: ReferenceFrames) -> None:
    sinks = result.tables["sinks"]
    by_percentile = sinks.groupby("percentile")
    # The rows of heads over which it is taken hardly differ between percentiles.
    _, lowest = next(iter(by_percentile))
    ax.plot(
        lowest["layer"], lowest["divergence"], color="black", marker="o", ms=4, label="with sinks"
    )
    colours = colormaps["plasma"](np.linspace(0.2, 0.8, len(by_percentile)))
    for number, (percentile, rows) in enumerate(by_percentile):
        ax.plot(
            rows["layer"],
            rows["divergence_without"],
            color=colours[number],
            marker=_MARKERS[1 + number % (len(_MARKERS) - 1)],
            markersize=4,
            label=f"without, from {percentile:g}%",
        )
    ax.set_ylabel("mean KL divergence (nats)")
    ax.set_title("Heads from their average")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(title="sinks, by percentile", loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_checkpoints(
    result: FramesOverCheckpoints, *, use_pyplot: bool = True
) -> tuple[Figure, npt.NDArray[Any]]:
    r"""Where anchors stand, and what speaks for each type of frame, over revisions.

    Args:
        result: what was found.
        use_pyplot: make a pyplot figure, which notebooks show; False gives a bare one.

    Returns:
        The figure, and its two axes.

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
        "with_anchor": "have an anchor (of all)",
        "alone_share": "have only one",
        "first_share": "have one at the first",
        "last_share": "have one at the last",
    }
    statistics = {
        "top_share": "centralised: the top is\nat the commonest position",
        "recurrence": "distributed: an anchor\nrecurs in another layer",
        "rarer_share": "bidirectional: the rarer\nend has an anchor",
    }
    for ax, lines in zip(axes[0], (shares, statistics), strict=True):
        for number, (column, label) in enumerate(lines.items()):
            (line,) = ax.plot(
                places, table[column], marker=_MARKERS[number], markersize=5, label=label
            )
            if lines is statistics:
                ax.plot(places, table[f"chance_{column}"], color=line.get_color(), linestyle="--")
        ax.set_ylim(-0.03, 1.03)
        ax.set_xticks(places, list(map(_moment, table.to_dict("records"))), fontsize="small")
        ax.set_xlabel("revision, its frame, and the test of that")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[0, 0].set_ylabel("share of maps")
    axes[0, 0].set_title("Which maps have anchors")
    axes[0, 1].set_ylabel("share of maps, or of anchors")
    axes[0, 1].set_title("What speaks for each type (dashed: places exchanged)")
    return fig, axes[0]


def _moment(row: Mapping[str, Any]) -> str:
    return f"{row['revision']}\n{row['frame']}\np = {row['p_value']:.2g}"
