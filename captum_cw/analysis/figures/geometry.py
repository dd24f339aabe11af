"""Pictures of what value geometry does: one for each analysis, from its tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
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
POINTS = {"s": 5, "alpha": 0.5, "linewidths": 0}


def plot_regression(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Bars of R2 by product of factors, a panel for each group of tokens."""
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
        ax.set_xlim(lowest, 1 + 0.25 * (1 - lowest))  # with room for the numbers
        ax.set_title(GROUPS[group])
        ax.set_xlabel("$R^2$ of contribution")
    return fig, axes[0]


def plot_correlations(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """The matrix of correlations, with its numbers."""
    fig, axes = new_figure(1, 1, (5.6, 4.2), use_pyplot)
    ax, names = axes[0, 0], list(table.component)
    matrix = table[names].to_numpy()
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for (i, j), r in np.ndenumerate(matrix):
        ax.text(j, i, f"{r:.3f}", ha="center", va="center", color="w" if abs(r) > 0.6 else "k")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("factor")
    ax.set_ylabel("factor")
    ax.set_title("logarithms of magnitudes")
    fig.colorbar(image, ax=ax, label="Pearson's r")
    return fig, axes[0]


def plot_dispersion(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """A panel for each pair of attention, value norm and cosine."""
    labels = {
        "attention": "attention weight",
        "value norm": "norm of the projected value",
        "cosine": "cosine with the output",
    }
    pairs = [("attention", "value norm"), ("attention", "cosine"), ("value norm", "cosine")]
    fig, axes = new_figure(1, 3, (12, 3.6), use_pyplot)
    for ax, (x, y) in zip(axes[0], pairs, strict=True):
        ax.scatter(table[x], table[y], **POINTS)
        ax.set_xlabel(labels[x])
        ax.set_ylabel(labels[y])
    return fig, axes[0]


def plot_interference(table: pd.DataFrame, r: float, *, use_pyplot: bool = True) -> Picture:
    """The ratio of contribution to attention against the cosine, within heads."""
    fig, axes = new_figure(1, 1, (5, 3.8), use_pyplot)
    ax = axes[0, 0]
    ax.scatter(table.cosine, table.ratio, **POINTS)
    ax.axhline(0, color="0.6", linewidth=0.8)
    beyond = 0
    if len(table):
        # A few outputs that nearly vanish would press all others flat.
        limit = 1.3 * float(np.quantile(np.abs(table.ratio), 0.99))
        ax.set_ylim(-limit, limit)
        beyond = int((table.ratio.abs() > limit).sum())
    ax.set_title(f"r = {r:.3f}; {beyond} of {len(table)} points lie beyond the axis", fontsize=10)
    ax.set_xlabel("cosine with the head's output")
    ax.set_ylabel("contribution / attention")
    return fig, axes[0]


def plot_first_token_weight(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """The weight on the first token by layer, for measures that are shares."""
    fig, axes = new_figure(1, 1, (6, 3.6), use_pyplot)
    ax = axes[0, 0]
    for measure, marker in zip(
        ("attention", "vw, rows normalised", "contribution"), "osD", strict=True
    ):
        rows = table[table.measure == measure]
        ax.plot(rows["layer"], rows.weight, marker=marker, markersize=4, label=measure)
    ax.axhline(0, color="0.6", linewidth=0.8)
    _layers(ax)
    ax.set_ylabel("mean weight on the first token")
    ax.legend()
    return fig, axes[0]


def plot_entropy(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """The entropy of rows by layer, with the first token and without it."""
    fig, axes = new_figure(1, 2, (10, 3.6), use_pyplot)
    titles = {True: "all tokens", False: "without the first token"}
    for ax, (first, title) in zip(axes[0], titles.items(), strict=True):
        for marker, (measure, rows) in zip(
            "osD^v", table[table["first"] == first].groupby("measure", sort=False), strict=False
        ):
            ax.plot(rows["layer"], rows.entropy, marker=marker, markersize=4, label=measure)
        ax.set_title(title)
        _layers(ax)
        ax.set_ylabel("entropy of a row (nats)")
    axes[0, 0].sharey(axes[0, 1])
    axes[0, 0].legend()
    return fig, axes[0]


def plot_alignment(table: pd.DataFrame, *, use_pyplot: bool = True) -> Picture:
    """Mean cosines of values against relative depth, with the middle half of the heads."""
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
    """The change of perplexity against the factor of the first token's value."""
    fig, axes = new_figure(1, 1, (5.4, 3.6), use_pyplot)
    ax = axes[0, 0]
    of = table.groupby("factor").delta
    mean = of.mean()
    ax.plot(mean.index, mean, marker="o", markersize=4, label="mean over texts")
    ax.plot(mean.index, of.median(), linestyle=":", color="tab:blue", label="median")
    ax.fill_between(
        mean.index, of.quantile(0.25), of.quantile(0.75), alpha=0.2, linewidth=0,
        label="25th to 75th percentile",
    )  # fmt: skip
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xlabel("factor of the first token's value")
    ax.set_ylabel("delta of perplexity")
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
    """One head's norms with their model, how well it fits by layer, and that head's two fits."""
    of = heads[(heads["layer"] == place[0]) & (heads["head"] == place[1])].iloc[0]
    name = f"layer {place[0]}, head {place[1]}"
    fig, axes = new_figure(2, 2, (11, 7.4), use_pyplot)

    ax = axes[0, 0]
    dots = ax.scatter(points.sink_rate, points.norm, c=points.position, cmap="viridis", **POINTS)
    fig.colorbar(dots, ax=ax, label="position in the text (0 to 1)")
    for (label, curve), style in zip(curves.items(), ("r-", "k:", "m--"), strict=True):
        ax.plot(rates, curve, style, label=label)
    ax.axvline(of.least, color="r", linewidth=0.8)
    ax.axhline(of.mean_norm, color="tab:orange", linewidth=0.8, label="mean norm of other values")
    ax.set_title(f"{name}: least at {of.least:.2f}")
    ax.set_xlabel("attention on the first token, $a$")
    ax.set_ylabel("norm of the head's output")
    ax.legend(fontsize=8)

    ax = axes[0, 1]
    numbers = sorted(heads["layer"].unique())
    for shift, column, colour, label in (
        (-0.2, "r2_k", "tab:blue", r"$\Vert w\Vert$ on $k(1-a)$"),
        (0.2, "r2_g", "tab:orange", r"$\langle v_1, w\rangle$ on $g(1-a)$"),
    ):
        several = [heads[heads["layer"] == n][column].dropna() for n in numbers]
        boxes = ax.boxplot(
            several, positions=[n + shift for n in numbers], widths=0.35, manage_ticks=False,
            patch_artist=True, showfliers=False, medianprops={"color": "k"},
        )  # fmt: skip
        for box in boxes["boxes"]:
            box.set_facecolor(colour)
        boxes["boxes"][0].set_label(label)
    ax.set_ylim(max(-1.0, ax.get_ylim()[0]), 1.05)
    ax.set_title("fits of all heads (below -1 and outliers not shown)")
    _layers(ax)
    ax.set_ylabel("centred $R^2$")
    ax.legend(fontsize=8)

    for ax, column, slope, label in (
        (axes[1, 0], "rest", of.k, r"$\Vert w\Vert$"),
        (axes[1, 1], "along", of.g, r"$\langle v_1, w\rangle$"),
    ):
        x = 1 - points.sink_rate
        dots = ax.scatter(x, points[column], c=points.position, cmap="viridis", **POINTS)
        fig.colorbar(dots, ax=ax, label="position in the text (0 to 1)")
        ax.plot([0, 1], [0, slope], "r-", label=f"slope {slope:.3g}")
        ax.set_title(f"{name}: $R^2$ = {of['r2_k' if column == 'rest' else 'r2_g']:.2f}")
        ax.set_xlabel("$1 - a$")
        ax.set_ylabel(label)
        ax.legend(fontsize=8)
    return fig, axes


def plot_cone(
    points: pd.DataFrame,
    sink: pd.DataFrame,
    place: tuple[int, int],
    *,
    use_pyplot: bool = True,
) -> Picture:
    """Head outputs in the plane of the mean value and the sink, with the sink and without."""
    fig, axes = new_figure(1, 2, (11, 4.6), use_pyplot)
    titles = {"with": "as it is", "without": "first value set to zero"}
    arrow = sink.iloc[0]
    angle = arrow.angle
    x = [*points.along, arrow.along, 0.0]
    y = [*points.across, arrow.across, 0.0]
    margin = 0.08 * (max(max(x) - min(x), max(y) - min(y)) or 1.0)
    reach = 2 * float(np.hypot(x, y).max())
    for ax, (outputs, title) in zip(axes[0], titles.items(), strict=True):
        of = points[points.outputs == outputs]
        cone = Wedge(
            (0, 0), reach, -angle, angle, facecolor="0.92", edgecolor="0.5", linestyle="--"
        )
        ax.add_patch(cone)
        dots = ax.scatter(
            of.along, of.across, c=of.norm, cmap="viridis", s=12, linewidths=0, zorder=2
        )
        if outputs == "with":
            ax.annotate(
                "", (arrow.along, arrow.across), (0, 0), zorder=3,
                arrowprops={"arrowstyle": "-|>", "color": "tab:orange", "linewidth": 2},
            )  # fmt: skip
            ax.plot([], [], color="tab:orange", linewidth=2, label="value of the first token")
        ax.fill([], [], facecolor="0.92", edgecolor="0.5", linestyle="--",
                label=f"cone of 90% of the others ({angle:.0f}°)")  # fmt: skip
        ax.set_xlim(min(x) - margin, max(x) + margin)
        ax.set_ylim(min(y) - margin, max(y) + margin)
        ax.set_aspect("equal")
        ax.set_title(f"layer {place[0]}, head {place[1]}: {title}")
        ax.set_xlabel("along the mean of the other values")
        ax.set_ylabel("across, towards the first value")
        ax.legend(fontsize=8, loc="best")
    fig.colorbar(dots, ax=list(axes[0]), label="norm of the output as it is")
    return fig, axes[0]


def _layers(ax: Axes) -> None:
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
