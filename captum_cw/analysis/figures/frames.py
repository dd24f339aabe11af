"""Figures of reference frames: graphs and sinks by layer, and frames over checkpoints."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from captum_cw.analysis.figures.drawing import BESIDE, figure, plot_by
from captum_cw.analysis.frames import FROM_END, FramesOverCheckpoints, ReferenceFrames
from captum_cw.visualization._output import MARKERS

#: Attention below this is drawn as this.
_FAINTEST = 1e-3
_SHARES = {
    "with_anchor": "has an anchor (of all maps)",
    "alone_share": "has only one anchor",
    "first_share": "first token is an anchor",
    "last_share": "last token is an anchor",
}
_STATISTICS = {
    "top_share": "centralised: the top anchor is\nat its most common position",
    "recurrence": "distributed: an anchor\nrecurs in another layer",
    "rarer_share": "bidirectional: the rarer\nend is an anchor",
}


@figure("ReferenceFrames", (12.0, 8.0), rows=2, columns=2)
def plot_reference_frames(
    result: ReferenceFrames, fiedler: Axes, star: Axes, received: Axes, divergence: Axes
) -> None:
    """Plot the Fiedler value, star-likeness, received attention and divergence of heads, by layer.

    Example::

        >>> from captum_cw.analysis.frames import reference_frames
        >>> fig, axes = reference_frames(model, input_ids, permutations=9).plot(use_pyplot=False)
        >>> axes[0, 0].get_ylabel()
        'Fiedler value'
    """
    graph, sinks = result.tables["graph"], result.tables["sinks"]
    plot_by(fiedler, graph, "fiedler", "threshold", colours="viridis", legend=False)
    fiedler.set(ylabel="Fiedler value", title="Second eigenvalue (1 for a star)")
    fiedler.axhline(1, color="black", linestyle="--", linewidth=1)
    fiedler.set_yscale("symlog", linthresh=1)
    fiedler.set_ylim(bottom=-0.05)
    plot_by(star, graph, "star_likeness", "threshold", colours="viridis")
    star.set(ylabel="largest in-degree / (n - 1)", title="Star-likeness", ylim=(-0.03, 1.03))
    star.legend(title="threshold", **BESIDE)
    _plot_received(received, result.tables["positions"])
    # The divergence with sinks hardly depends on the percentile.
    with_sinks = sinks.groupby("layer")["divergence"].first()
    divergence.plot(with_sinks, "k-x", markersize=4, label="with sinks")
    name = "without, percentile {:g}".format
    plot_by(divergence, sinks, "divergence_without", "percentile", colours="plasma", label=name)
    divergence.set(ylabel="mean KL divergence (nats)", title="Divergence of heads from their mean")
    divergence.set_ylim(bottom=0)
    divergence.legend(title="sinks", **BESIDE)
    fiedler.figure.suptitle(_headline(result))


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


def _plot_received(ax: Axes, table: pd.DataFrame) -> None:
    """Plot the received attention by layer and position, as a map."""
    received = table.pivot(index="layer", columns="position", values="received")
    # Positions from the end are on the right, after a gap.
    received = received.reindex(columns=[*range(FROM_END + 1), *range(-FROM_END, 0)])
    received[FROM_END] = np.nan
    norm = LogNorm(_FAINTEST, 1)
    image = ax.imshow(received.clip(lower=_FAINTEST), "magma", norm, aspect="auto", origin="lower")
    shown = [*range(0, FROM_END, 4), *range(-1, -FROM_END, -4)]
    ax.set_xticks(received.columns.get_indexer(shown), shown)
    ax.figure.colorbar(image, ax=ax, label="mean attention from other tokens")
    ax.set(
        xlabel="key position (negative: from the end)",
        ylabel="layer",
        title="Received attention at both ends",
    )
    ax.locator_params(axis="y", integer=True)


@figure("FramesOverCheckpoints", (14.0, 4.6), columns=2)
def plot_checkpoints(result: FramesOverCheckpoints, anchors: Axes, evidence: Axes) -> None:
    r"""Plot the anchors and the evidence for each type of frame over revisions.

    Example::

        >>> from captum_cw.analysis.frames import frames_over_checkpoints
        >>> result = frames_over_checkpoints(
        ...     lambda revision: model, ["step0", "step1000"], input_ids, permutations=9)
        >>> fig, axes = result.plot(use_pyplot=False)
        >>> axes[0].get_xticklabels()[0].get_text()
        'step0\nnone\np = 1'
    """
    table = result.to_dataframe()
    labels = [f"{row.revision}\n{row.frame}\np = {row.p_value:.2g}" for row in table.itertuples()]
    for ax, names in ((anchors, _SHARES), (evidence, _STATISTICS)):
        for (column, label), marker in zip(names.items(), MARKERS, strict=False):
            (line,) = ax.plot(table[column], marker=marker, markersize=5, label=label)
            if ax is evidence:
                ax.plot(table[f"chance_{column}"], color=line.get_color(), linestyle="--")
        ax.set_xticks(table.index, labels, fontsize="small")
        ax.set(xlabel="revision, frame and p-value", ylim=(-0.03, 1.03))
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", **BESIDE)
    anchors.set(ylabel="share of maps", title="Maps with anchors")
    evidence.set(ylabel="share of maps or anchors")
    evidence.set_title("Evidence for each type (dashed: permuted)")
    fig = anchors.figure
    assert isinstance(fig, Figure)
    fig.set_size_inches(max(14.0, 5 + 2.2 * len(table)), 4.6)
