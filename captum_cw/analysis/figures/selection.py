"""Figures of token selection: separation by size, regimes of heads, and assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from captum_cw.analysis.result import AnalysisResult
from captum_cw.visualization._output import Picture, new_figure

# Colours and markers, so that curves differ without colours too.
_MEASURES = {"precision": ("C0", "o"), "recall": ("C1", "s"), "f": ("C2", "D")}
_REGIMES = {"Retriever": ("C0", "o"), "Mixer": ("C1", "s"), "Reset": ("C3", "^")}
_BLANK = "0.85"


def plot_token_selection(result: AnalysisResult, use_pyplot: bool) -> Picture:
    """Plot separation by size, the excess, the best size, and sinks against recall."""
    fig, axes = new_figure(2, 2, (11.0, 8.0), use_pyplot)
    (by_size, excess), (best, sinks) = axes
    tables = result.tables
    _plot_separation(by_size, tables["sizes"])
    _plot_excess(excess, tables["contexts"], tables["best"])
    _plot_best_size(best, tables["best"], tables["contexts"])
    _plot_sinks_and_recall(fig, sinks, tables["heads"], result.numbers)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return fig, axes


def _plot_separation(ax: Axes, sizes: pd.DataFrame) -> None:
    """Plot precision, recall and F by size, of top and random sets."""
    means = sizes.pivot(index="size", columns="set", values=list(_MEASURES))
    for name, (colour, marker) in _MEASURES.items():
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
        label = "F" if name == "f" else name
        ax.plot(means[name]["top"], "-", label=f"{label}, most attention", **style)
        ax.plot(means[name]["random"], "--", label=f"{label}, random sets", **style)
    ax.legend(fontsize=8)
    _set_log_ticks(ax, "x", means.index)
    ax.set(
        title="Separation from the other keys", xlabel="size N (keys)", ylabel="mean over queries"
    )
    ax.set_ylim(-0.02, 1.02)


def _plot_excess(ax: Axes, contexts: pd.DataFrame, best: pd.DataFrame) -> None:
    """Plot the excess of F over random sets by size, with a curve for each context."""
    groups = contexts.groupby("above")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(groups)))
    for (above, rows), colour in zip(groups, colours, strict=True):
        label = f"{above + 1} to {2 * above}" if above > 1 else "2"
        ax.plot(rows["size"], rows["excess"], color=colour, marker="o", markersize=4, label=label)
    ax.plot(best["size"], best["excess"], "k*", markersize=10, zorder=3, label="best N")
    ax.axhline(0, color="0.5", linewidth=0.8)
    _set_log_ticks(ax, "x", contexts["size"])
    ax.set(title="Excess over random sets", xlabel="size N (keys)", ylabel="F - F of random sets")
    ax.legend(title="keys seen (T)", fontsize=8, title_fontsize=8)


def _plot_best_size(ax: Axes, best: pd.DataFrame, contexts: pd.DataFrame) -> None:
    """Plot the best size by context."""
    largest = contexts.groupby("above")["size"].max()[best["above"]]
    x = best["up_to"]
    ax.plot(x, best["size"], "k-*", markersize=10, label="largest F - F of random sets")
    ax.plot(x, best["largest_f_size"], "C2-D", markersize=5, label="largest F, N > 1")
    ax.plot(x, largest, ":", color="0.5", label="largest N measured")
    _set_log_ticks(ax, "x", x)
    _set_log_ticks(ax, "y", largest)
    ax.set(title="Best size by context", xlabel="keys seen, at most (T)", ylabel="size N (keys)")
    ax.legend(fontsize=8)


def _plot_sinks_and_recall(
    fig: Figure, ax: Axes, heads: pd.DataFrame, numbers: Mapping[str, float]
) -> None:
    """Plot the recall of each head against its sink similarity."""
    size = int(numbers["best_size"])
    rows = heads[(heads["set"] == "top") & (heads["size"] == size)]
    points = ax.scatter(
        rows["sink_similarity"], rows["recall"], c=rows["layer"], s=14, cmap="viridis"
    )
    fig.colorbar(points, ax=ax, label="layer", ticks=MaxNLocator(integer=True))
    over_heads, over_queries = numbers["sink_recall_r_heads"], numbers["sink_recall_r"]
    ax.set(
        title=f"Sinks and recall, N = {size}\n"
        f"r = {over_heads:.2f} over heads, {over_queries:.2f} over queries",
        xlabel="sink similarity cos(v_1, s_N), mean over queries",
        ylabel="recall, mean over queries",
    )


def _set_log_ticks(ax: Axes, axis: str, values: pd.Series | pd.Index) -> None:
    """Make an axis logarithmic, with ticks at these values only."""
    ticks = sorted(set(values))
    ax.set(**{f"{axis}scale": "log", f"{axis}ticks": ticks, f"{axis}ticklabels": ticks})
    ax.minorticks_off()


def plot_head_regimes(result: AnalysisResult, use_pyplot: bool) -> Picture:
    """Plot the regime of each head by layer, and the heads by first-token weight and F."""
    heads, regimes = result.tables["heads"], result.tables["regimes"].set_index("regime")
    codes = heads.assign(code=heads["regime"].map(list(_REGIMES).index))
    codes = codes.pivot(index="layer", columns="head", values="code")
    layers, most = codes.shape
    width = min(max(2.5 + 0.25 * most, 4.0), 12.0)
    height = min(max(1.5 + 0.2 * layers, 4.0), 12.0)
    fig, axes = new_figure(1, 2, (width + 5.0, height), use_pyplot)
    regime_map, plane = axes[0]
    for name, (colour, marker) in _REGIMES.items():
        rows = heads[heads["regime"] == name]
        label = f"{name} ({regimes.loc[name, 'heads']})"
        label += "" if regimes.loc[name, "has_signature"] else ", no signature"
        style = {"color": colour, "marker": marker, "label": label}
        plane.scatter(rows["first_weight"], rows["f"], s=18, alpha=0.8, linewidths=0, **style)
    plane.set(
        title=f"Heads, means over queries, N = {result.settings['size']}",
        xlabel="attention on the first token",
        ylabel="F of the keys with the most attention",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    plane.legend(fontsize=8)
    plane.grid(alpha=0.3)
    regime_map.set_facecolor(_BLANK)  # some layers may have fewer heads
    colours = ListedColormap([colour for colour, _ in _REGIMES.values()])
    regime_map.imshow(codes, colours, vmin=-0.5, vmax=2.5, aspect="auto", interpolation="nearest")
    regime_map.locator_params(integer=True)
    regime_map.set(title="Regime of each head", xlabel="head", ylabel="layer")
    return fig, axes[0]


def plot_selection_assumptions(result: AnalysisResult, use_pyplot: bool) -> Picture:
    """Plot value norms by layer, similarity by distance and attention by rank, with fits."""
    fig, axes = new_figure(1, 3, (15.0, 4.2), use_pyplot)
    _plot_value_norms(axes[0, 0], result.tables["value_norms"])
    _plot_similarity(axes[0, 1], result.tables["similarity"], result.numbers)
    _plot_profile(axes[0, 2], result.tables["profile"], result.numbers)
    for ax in axes[0]:
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return fig, axes[0]


def _plot_value_norms(ax: Axes, values: pd.DataFrame) -> None:
    """Plot the variation of value norms and the relative norm of the first value, by layer."""
    for name, label, colour, marker in (
        ("cv", "variation of ||v_j||, j > 1", "C0", "o"),
        ("first_over_mean", "||v_1|| / mean ||v_j||", "C3", "^"),
    ):
        style: dict[str, Any] = {"color": colour, "marker": marker}
        ax.scatter(values["layer"], values[name], s=12, alpha=0.5, linewidths=0, **style)
        ax.plot(values.groupby("layer")[name].median(), markersize=4, label=label, **style)
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.set_ylim(bottom=0)
    ax.locator_params(axis="x", integer=True)
    ax.set(title="Norms of values (line: median of heads)", xlabel="layer", ylabel="ratio")


def _plot_similarity(ax: Axes, rows: pd.DataFrame, numbers: Mapping[str, float]) -> None:
    """Plot the mean cosine of two values by distance, with its fits."""
    ax.plot(rows["distance"], rows["cosine"], ".", color="0.4", label="measured")
    for form, r2, style in (
        ("exponential", "similarity_r2", "--"),
        ("exponential + constant", "similarity_r2_constant", "-"),
    ):
        label = f"{form}, R2 = {numbers[r2]:.2f}"
        ax.plot(rows["distance"], rows[form], style, label=label)
    mean = np.average(rows["cosine"], weights=rows["pairs"])
    ax.axhline(mean, color="0.5", linestyle=":", label="constant, R2 = 0")
    ax.set(title="Similarity of values", xlabel="distance (tokens)", ylabel="mean cos(v_i, v_j)")


def _plot_profile(ax: Axes, rows: pd.DataFrame, numbers: Mapping[str, float]) -> None:
    """Plot the mean attention by rank, with its fits."""
    ax.loglog(rows["rank"], rows["weight"], ".", color="0.4", label="measured")
    for form, label, style in (("one_piece", "one line", "--"), ("two_piece", "two lines", "-")):
        label = f"{label}, R2 = {numbers[form + '_r2']:.4f}"
        ax.plot(rows["rank"], rows[form], style, label=label)
    rank = numbers["break_rank"]
    if np.isfinite(rank):
        ax.axvline(rank, color="0.5", linestyle=":", label=f"break at rank {rank:.0f}")
    ax.set(title="Attention by rank", xlabel="rank of the key", ylabel="mean attention weight")
