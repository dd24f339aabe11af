"""Figures of the analyses of contributions, the first token and head outputs."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Wedge

from captum_cw.analysis.figures.drawing import POINTS, ZERO, figure, plot_by
from captum_cw.analysis.result import AnalysisResult
from captum_cw.analysis.suppression import OutputNorms, predicted_norm
from captum_cw.visualization._output import signed_colours

GROUPS = {"all": "all tokens", "first": "first token", "others": "all but the first"}
CONE: dict[str, Any] = {"facecolor": "0.92", "edgecolor": "0.5", "linestyle": "--"}


@figure("ComponentRegression", (11.0, 3.4), columns=3)
def plot_regression(result: AnalysisResult, *axes: Axes) -> None:
    """Plot bars of R2 by product of factors, with a panel for each group of tokens."""
    groups = result.to_dataframe().groupby("group", sort=False)
    for ax, (group, rows) in zip(axes, groups, strict=True):
        bars = ax.barh(rows.components, rows.r2, color="tab:blue")
        ax.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
        ax.invert_yaxis()
        lowest = min(0, float(rows.r2.min()))
        ax.set_xlim(lowest - 0.25 * (lowest < 0), 1.25)  # leaves room for the numbers
        ax.set(title=GROUPS[group], xlabel="$R^2$ of contribution", ylabel="product of factors")
        ax.label_outer()


@figure("ComponentCorrelations", (5.6, 4.2))
def plot_correlations(result: AnalysisResult, ax: Axes) -> None:
    """Plot the matrix of correlations with its numbers."""
    matrix = result.to_dataframe().set_index("component")
    image = ax.imshow(matrix, cmap=signed_colours(), vmin=-1, vmax=1)
    for (i, j), r in np.ndenumerate(matrix):
        ax.text(j, i, f"{r:.3f}", ha="center", va="center", color="w" if abs(r) > 0.6 else "k")
    ax.set_xticks(range(len(matrix)), matrix.columns)
    ax.set_yticks(range(len(matrix)), matrix.index)
    ax.set(xlabel="factor", ylabel="factor", title="logarithms of magnitudes")
    ax.figure.colorbar(image, ax=ax, label="Pearson's r")


@figure("ComponentDispersion", (12, 3.6), columns=3)
def plot_dispersion(result: AnalysisResult, *axes: Axes) -> None:
    """Plot each pair of attention, value norm and cosine in a panel."""
    labels = {
        "attention": "attention weight",
        "value norm": "norm of the projected value",
        "cosine": "cosine with the output",
    }
    table = result.to_dataframe()
    for ax, (x, y) in zip(axes, combinations(labels, 2), strict=True):
        ax.scatter(table[x], table[y], **POINTS)
        ax.set(xlabel=labels[x], ylabel=labels[y])


@figure("Interference", (5, 3.8))
def plot_interference(result: AnalysisResult, ax: Axes) -> None:
    """Plot the intra-head ratio of contribution to attention against the cosine."""
    table, r = result.to_dataframe(), result.numbers["r"]
    ax.scatter(table.cosine, table.ratio, **POINTS)
    ax.axhline(0, **ZERO)
    outside = 0
    if len(table):
        # The ratios of a few outputs near zero are huge, and would flatten all others.
        limit = 1.3 * float(table.ratio.abs().quantile(0.99))
        ax.set_ylim(-limit, limit)
        outside = int((table.ratio.abs() > limit).sum())
    ax.set_title(f"r = {r:.3f}; {outside} of {len(table)} points are outside the axis", fontsize=10)
    ax.set(xlabel="cosine with the head's output", ylabel="contribution / attention")


@figure("FirstTokenWeight", (6, 3.6))
def plot_first_token_weight(result: AnalysisResult, ax: Axes) -> None:
    """Plot the weight on the first token by layer, for measures that are shares."""
    table = result.tables["layers"]
    plot_by(ax, table[table.measure != "vw"], "weight", "measure")
    ax.axhline(0, **ZERO)
    ax.set_ylabel("mean weight on the first token")
    ax.legend()


@figure("WeightEntropy", (10, 3.6), columns=2)
def plot_entropy(result: AnalysisResult, *axes: Axes) -> None:
    """Plot the entropy of rows by layer, with and without the first token."""
    table = result.tables["layers"]
    titles = {True: "all tokens", False: "without the first token"}
    for ax, (first, title) in zip(axes, titles.items(), strict=True):
        plot_by(ax, table[table["first"] == first], "entropy", "measure", legend=first)
        ax.set(title=title, ylabel="entropy of a row (nats)")
    axes[0].sharey(axes[1])


@figure("ValueAlignment", (6, 3.6))
def plot_alignment(result: AnalysisResult, ax: Axes) -> None:
    """Plot mean cosines of values by relative depth, with the middle half of the heads."""
    table = result.to_dataframe()
    for name, label in (("first", "first with the others"), ("among", "among the others")):
        (line,) = ax.plot(table.depth, table[name], marker="o", markersize=4, label=label)
        low, high = table[f"{name}_25"], table[f"{name}_75"]
        ax.fill_between(table.depth, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(0, **ZERO)
    ax.set_xlabel("relative depth (bands: middle half of the heads)")
    ax.set_ylabel("mean cosine of projected values")
    ax.legend()


@figure("SinkScaling", (5.4, 3.6))
def plot_sink_scaling(result: AnalysisResult, ax: Axes) -> None:
    """Plot the change of perplexity by the factor of the first token's value."""
    deltas = result.to_dataframe().groupby("factor").delta
    mean, low, high = deltas.mean(), deltas.quantile(0.25), deltas.quantile(0.75)
    ax.plot(mean, marker="o", markersize=4, label="mean over texts")
    ax.plot(deltas.median(), linestyle=":", color="tab:blue", label="median")
    ax.fill_between(mean.index, low, high, alpha=0.2, linewidth=0, label="middle half of the texts")
    ax.axhline(0, **ZERO)
    ax.set(xlabel="factor of the first token's value", ylabel="increase of perplexity")
    ax.legend()


@figure("OutputNorms", (11, 7.4), rows=2, columns=2)
def plot_output_norms(
    result: OutputNorms, norms: Axes, fits: Axes, rest: Axes, along: Axes
) -> None:
    """Plot the norms of one head with their model and fits, and the R2 of all heads."""
    heads, points = result.tables["heads"], result.tables["points"]
    layer, head = result.settings["layer"], result.settings["head"]
    name = f"layer {layer}, head {head}"
    of = heads.set_index(["layer", "head"]).loc[(layer, head)]
    rates = np.linspace(0, 1, 201)
    for label, style, g in (
        ("model (Eq. 20)", "r-", of.g),
        ("model with g = 0", "k:", 0.0),
        ("sign as printed in Eq. 28", "m--", -of.g),
    ):
        norms.plot(rates, predicted_norm(rates, of.v1, g, of.k), style, label=label)
    norms.axvline(of.least, color="r", linewidth=0.8)
    norms.axhline(of.mean_norm, color="C1", linewidth=0.8, label="mean norm of other values")
    rest.plot([0, 1], [0, of.k], "r-", label=f"slope {of.k:.3g}")
    along.plot([0, 1], [0, of.g], "r-", label=f"slope {of.g:.3g}")
    x, others = "attention on the first token, $a$", "$1 - a$"
    for ax, column, x_label, y_label, title in (
        (norms, "norm", x, "norm of the head's output", f"smallest norm at {of.least:.2f}"),
        (rest, "rest", others, r"$\Vert w\Vert$", f"$R^2$ = {of.r2_k:.2f}"),
        (along, "along", others, r"$\langle v_1, w\rangle$", f"$R^2$ = {of.r2_g:.2f}"),
    ):
        rate = points.sink_rate if ax is norms else 1 - points.sink_rate
        dots = ax.scatter(rate, points[column], c=points.position, cmap="viridis", **POINTS)
        ax.figure.colorbar(dots, ax=ax, label="position in the text (0 to 1)")
        ax.set(title=f"{name}: {title}", xlabel=x_label, ylabel=y_label)
        ax.legend(fontsize=8)
    _plot_fits_by_layer(fits, heads)


def _plot_fits_by_layer(ax: Axes, heads: pd.DataFrame) -> None:
    """Plot the R2 of the two linear fits of all heads, as boxes by layer."""
    for shift, column, colour, label in (
        (-0.2, "r2_k", "tab:blue", r"$\Vert w\Vert$ on $k(1-a)$"),
        (0.2, "r2_g", "tab:orange", r"$\langle v_1, w\rangle$ on $g(1-a)$"),
    ):
        by_layer = {n + shift: r2.dropna() for n, r2 in heads.groupby("layer")[column]}
        boxes = ax.boxplot(
            list(by_layer.values()),
            positions=list(by_layer),
            widths=0.35,
            manage_ticks=False,
            patch_artist=True,
            showfliers=False,
            boxprops={"facecolor": colour},
            medianprops={"color": "k"},
        )
        boxes["boxes"][0].set_label(label)
    ax.set_ylim(max(-1.0, ax.get_ylim()[0]), 1.05)
    ax.locator_params(axis="x", integer=True)
    title = "fits of all heads (without outliers and below -1)"
    ax.set(title=title, xlabel="layer", ylabel="centred $R^2$")
    ax.legend(fontsize=8)


@figure("SemanticCone", (11, 4.6), columns=2)
def plot_cone(result: AnalysisResult, *axes: Axes) -> None:
    """Plot head outputs in the plane of the mean value and the sink, with and without the sink."""
    points, arrow = result.tables["points"], result.tables["sink"].iloc[0]
    place = f"layer {result.settings['layer']}, head {result.settings['head']}"
    titles = {"with": "unchanged", "without": "first value set to zero"}
    x, y = [*points.along, arrow.along, 0.0], [*points.across, arrow.across, 0.0]
    margin = 0.08 * (max(np.ptp(x), np.ptp(y)) or 1.0)
    reach = 2 * float(np.hypot(x, y).max())
    for ax, (outputs, title) in zip(axes, titles.items(), strict=True):
        of = points[points.outputs == outputs]
        label = f"cone of 90% of the other values ({arrow.angle:.0f}°)"
        ax.add_patch(Wedge((0, 0), reach, -arrow.angle, arrow.angle, label=label, **CONE))
        style = {"c": of.norm, "cmap": "viridis", "s": 12, "linewidths": 0}
        dots = ax.scatter(of.along, of.across, zorder=2, **style)
        ax.set(
            title=f"{place}: {title}",
            xlabel="along the mean of the other values",
            ylabel="across, towards the first value",
            xlim=(min(x) - margin, max(x) + margin),
            ylim=(min(y) - margin, max(y) + margin),
            aspect="equal",
        )
    sink = {"arrowstyle": "-|>", "color": "tab:orange", "linewidth": 2}
    axes[0].annotate("", (arrow.along, arrow.across), (0, 0), zorder=3, arrowprops=sink)
    axes[0].plot([], [], color="tab:orange", linewidth=2, label="value of the first token")
    for ax in axes:
        ax.legend(fontsize=8, loc="best")
    axes[0].figure.colorbar(dots, ax=axes, label="norm of the unchanged output")
