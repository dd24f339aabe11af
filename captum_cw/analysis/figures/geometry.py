"""Figures of the analyses of contributions, the first token and head outputs, from their tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from matplotlib.ticker import MaxNLocator

from captum_cw.visualization._output import Picture, new_figure

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "plot_alignment",
    "plot_cone",
    "plot_correlations",
    "plot_dispersion",
    "plot_entropy",
    "plot_first_token_weight",
    "plot_interference",
    "plot_output_norms",
    "plot_regression",
    "plot_sink_scaling",
]


GROUPS = {"all": "all tokens", "first": "first token", "others": "all but the first"}
CONE: dict[str, Any] = {"facecolor": "0.92", "edgecolor": "0.5", "linestyle": "--"}
POINTS: dict[str, Any] = {"s": 5, "alpha": 0.5, "linewidths": 0}


def plot_regression(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot bars of R2 by product of factors, with a panel for each group of tokens."""
    groups = [group for group in GROUPS if group in set(table.group)]
    fig, axes = new_figure(1, len(groups), (3.2 * len(groups) + 1.4, 3.4), use_pyplot)
    for ax, group in zip(axes[0], groups, strict=True):
        rows = table[table.group == group]
        places, lowest = np.arange(len(rows)), min(0, float(rows.r2.min()))
        ax.barh(places, rows.r2, color="tab:blue")
        for place, value in zip(places, rows.r2, strict=True):
            end = max(value, 0) + 0.02 * (1 - lowest)
            ax.text(end, place, f"{value:.3f}", va="center", fontsize=8)
        ax.set_yticks(places, rows.components if group == groups[0] else [""] * len(rows))
        ax.invert_yaxis()
        if group == groups[0]:
            ax.set_ylabel("product of factors")
        ax.set_xlim(lowest, 1 + 0.25 * (1 - lowest))  # leaves room for the numbers
        ax.set(title=GROUPS[group], xlabel="$R^2$ of contribution")
    return fig, axes[0]


def plot_correlations(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot the matrix of correlations with its numbers."""
    fig, axes = new_figure(1, 1, (5.6, 4.2), use_pyplot)
    ax, names = axes[0, 0], list(table.component)
    matrix = table[names].to_numpy()
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for (i, j), r in np.ndenumerate(matrix):
        ax.text(j, i, f"{r:.3f}", ha="center", va="center", color="w" if abs(r) > 0.6 else "k")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="factor", ylabel="factor", title="logarithms of magnitudes")
    fig.colorbar(image, ax=ax, label="Pearson's r")
    return fig, axes[0]


def plot_dispersion(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot each pair of attention, value norm and cosine in a panel."""
    labels = {
        "attention": "attention weight",
        "value norm": "norm of the projected value",
        "cosine": "cosine with the output",
    }
    pairs = [("attention", "value norm"), ("attention", "cosine"), ("value norm", "cosine")]
    fig, axes = new_figure(1, 3, (12, 3.6), use_pyplot)
    for ax, (x, y) in zip(axes[0], pairs, strict=True):
        ax.scatter(table[x], table[y], **POINTS)
        ax.set(xlabel=labels[x], ylabel=labels[y])
    return fig, axes[0]


def plot_interference(table: pd.DataFrame, r: float, *, use_pyplot: bool = True) -> Picture:
    """Plot the intra-head ratio of contribution to attention against the cosine."""
    fig, axes = new_figure(1, 1, (5, 3.8), use_pyplot)
    ax = axes[0, 0]
    ax.scatter(table.cosine, table.ratio, **POINTS)
    ax.axhline(0, color="0.6", linewidth=0.8)
    beyond = 0
    if len(table):
        # The ratios of a few outputs near zero are huge, and would flatten all others.
        limit = 1.3 * float(np.quantile(np.abs(table.ratio), 0.99))
        ax.set_ylim(-limit, limit)
        beyond = int((table.ratio.abs() > limit).sum())
    ax.set_title(f"r = {r:.3f}; {beyond} of {len(table)} points are outside the axis", fontsize=10)
    ax.set(xlabel="cosine with the head's output", ylabel="contribution / attention")
    return fig, axes[0]


def plot_first_token_weight(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot the weight on the first token by layer, for measures that are shares."""
    fig, axes = new_figure(1, 1, (6, 3.6), use_pyplot)
    ax = axes[0, 0]
    for measure, marker in zip(
        ("attention", "vw, rows normalised", "contribution"), "osD", strict=True
    ):
        rows = table[table.measure == measure]
        ax.plot(rows["layer"], rows.weight, marker=marker, markersize=4, label=measure)
    ax.axhline(0, color="0.6", linewidth=0.8)
    _label_layers(ax)
    ax.set_ylabel("mean weight on the first token")
    ax.legend()
    return fig, axes[0]


def plot_entropy(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot the entropy of rows by layer, with and without the first token."""
    fig, axes = new_figure(1, 2, (10, 3.6), use_pyplot)
    titles = {True: "all tokens", False: "without the first token"}
    for ax, (first, title) in zip(axes[0], titles.items(), strict=True):
        for marker, (measure, rows) in zip(
            "osD^v", table[table["first"] == first].groupby("measure", sort=False), strict=False
        ):
            ax.plot(rows["layer"], rows.entropy, marker=marker, markersize=4, label=measure)
        ax.set_title(title)
        _label_layers(ax)
        ax.set_ylabel("entropy of a row (nats)")
    axes[0, 0].sharey(axes[0, 1])
    axes[0, 0].legend()
    return fig, axes[0]


def plot_alignment(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot mean cosines of values by relative depth, with the middle half of the heads."""
    fig, axes = new_figure(1, 1, (6, 3.6), use_pyplot)
    ax = axes[0, 0]
    for name, label in (("first", "first with the others"), ("among", "among the others")):
        (line,) = ax.plot(table.depth, table[name], marker="o", markersize=4, label=label)
        low, high = table[f"{name}_25"], table[f"{name}_75"]
        ax.fill_between(table.depth, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xlabel("relative depth (bands: middle half of the heads)")
    ax.set_ylabel("mean cosine of projected values")
    ax.legend()
    return fig, axes[0]


def plot_sink_scaling(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Plot the change of perplexity by the factor of the first token's value."""
    fig, axes = new_figure(1, 1, (5.4, 3.6), use_pyplot)
    ax = axes[0, 0]
    of = table.groupby("factor").delta
    mean = of.mean()
    ax.plot(mean.index, mean, marker="o", markersize=4, label="mean over texts")
    ax.plot(mean.index, of.median(), linestyle=":", color="tab:blue", label="median")
    low, high = of.quantile(0.25), of.quantile(0.75)
    ax.fill_between(mean.index, low, high, alpha=0.2, linewidth=0, label="middle half of the texts")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(xlabel="factor of the first token's value", ylabel="increase of perplexity")
    ax.legend()
    return fig, axes[0]


def plot_output_norms(
    heads: pd.DataFrame,
    points: pd.DataFrame,
    place: tuple[int, int],
    rates: npt.NDArray[Any],
    curves: Mapping[str, npt.NDArray[Any]],
    *,
    use_pyplot: bool = True,
) -> Picture:
    """Plot the norms of one head with their model and fits, and the R2 of all heads."""
    of = heads[(heads["layer"] == place[0]) & (heads["head"] == place[1])].iloc[0]
    name = f"layer {place[0]}, head {place[1]}"
    fig, axes = new_figure(2, 2, (11, 7.4), use_pyplot)
    ax = axes[0, 0]
    _scatter_by_position(fig, ax, points.sink_rate, points.norm, points.position)
    for (label, curve), style in zip(curves.items(), ("r-", "k:", "m--"), strict=True):
        ax.plot(rates, curve, style, label=label)
    ax.axvline(of.least, color="r", linewidth=0.8)
    ax.axhline(of.mean_norm, color="tab:orange", linewidth=0.8, label="mean norm of other values")
    ax.set_title(f"{name}: smallest norm at {of.least:.2f}")
    ax.set(xlabel="attention on the first token, $a$", ylabel="norm of the head's output")
    ax.legend(fontsize=8)
    _plot_fits_by_layer(axes[0, 1], heads)
    for ax, column, slope, fit, label in (
        (axes[1, 0], "rest", of.k, of.r2_k, r"$\Vert w\Vert$"),
        (axes[1, 1], "along", of.g, of.r2_g, r"$\langle v_1, w\rangle$"),
    ):
        _scatter_by_position(fig, ax, 1 - points.sink_rate, points[column], points.position)
        ax.plot([0, 1], [0, slope], "r-", label=f"slope {slope:.3g}")
        ax.set(title=f"{name}: $R^2$ = {fit:.2f}", xlabel="$1 - a$", ylabel=label)
        ax.legend(fontsize=8)
    return fig, axes


def _scatter_by_position(
    fig: Figure, ax: Axes, x: pd.Series, y: pd.Series, position: pd.Series
) -> None:
    """Plot points, coloured by their position in the text."""
    dots = ax.scatter(x, y, c=position, cmap="viridis", **POINTS)
    fig.colorbar(dots, ax=ax, label="position in the text (0 to 1)")


def _plot_fits_by_layer(ax: Axes, heads: pd.DataFrame) -> None:
    """Plot the R2 of the two linear fits of all heads, as boxes by layer."""
    layers = sorted(heads["layer"].unique())
    for shift, column, colour, label in (
        (-0.2, "r2_k", "tab:blue", r"$\Vert w\Vert$ on $k(1-a)$"),
        (0.2, "r2_g", "tab:orange", r"$\langle v_1, w\rangle$ on $g(1-a)$"),
    ):
        boxes = ax.boxplot(
            [heads[heads["layer"] == n][column].dropna() for n in layers],
            positions=[n + shift for n in layers],
            widths=0.35,
            manage_ticks=False,
            patch_artist=True,
            showfliers=False,
            boxprops={"facecolor": colour},
            medianprops={"color": "k"},
        )
        boxes["boxes"][0].set_label(label)
    ax.set_ylim(max(-1.0, ax.get_ylim()[0]), 1.05)
    ax.set_title("fits of all heads (without outliers and below -1)")
    _label_layers(ax)
    ax.set_ylabel("centred $R^2$")
    ax.legend(fontsize=8)


def plot_cone(
    points: pd.DataFrame,
    sink: pd.DataFrame,
    place: tuple[int, int],
    *,
    use_pyplot: bool = True,
) -> Picture:
    """Plot head outputs in the plane of the mean value and the sink, with and without the sink."""
    fig, axes = new_figure(1, 2, (11, 4.6), use_pyplot)
    titles = {"with": "unchanged", "without": "first value set to zero"}
    arrow = sink.iloc[0]
    angle = arrow.angle
    x = [*points.along, arrow.along, 0.0]
    y = [*points.across, arrow.across, 0.0]
    margin = 0.08 * (max(max(x) - min(x), max(y) - min(y)) or 1.0)
    reach = 2 * float(np.hypot(x, y).max())
    for ax, (outputs, title) in zip(axes[0], titles.items(), strict=True):
        of = points[points.outputs == outputs]
        label = f"cone of 90% of the other values ({angle:.0f}°)"
        ax.add_patch(Wedge((0, 0), reach, -angle, angle, label=label, **CONE))
        dots = ax.scatter(
            of.along, of.across, c=of.norm, cmap="viridis", s=12, linewidths=0, zorder=2
        )
        if outputs == "with":
            style = {"arrowstyle": "-|>", "color": "tab:orange", "linewidth": 2}
            ax.annotate("", (arrow.along, arrow.across), (0, 0), zorder=3, arrowprops=style)
            ax.plot([], [], color="tab:orange", linewidth=2, label="value of the first token")
        ax.set_xlim(min(x) - margin, max(x) + margin)
        ax.set_ylim(min(y) - margin, max(y) + margin)
        ax.set_aspect("equal")
        ax.set_title(f"layer {place[0]}, head {place[1]}: {title}")
        ax.set_xlabel("along the mean of the other values")
        ax.set_ylabel("across, towards the first value")
        ax.legend(fontsize=8, loc="best")
    fig.colorbar(dots, ax=list(axes[0]), label="norm of the unchanged output")
    return fig, axes[0]


def _label_layers(ax: Axes) -> None:
    """Label the x axis with layers."""
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
