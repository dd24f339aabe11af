"""Figures of token selection: separation by size, regimes of heads, and assumptions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from captum_cw.analysis.assumptions import FORMS
from captum_cw.analysis.figures.drawing import ZERO, figure, plot_by
from captum_cw.analysis.result import AnalysisResult

# Colours and markers, so that curves differ without colours too.
_REGIMES = {"Retriever": ("C0", "o"), "Mixer": ("C1", "s"), "Reset": ("C3", "^")}
_BLANK = "0.85"


@figure("TokenSelection", (11.0, 8.0), rows=2, columns=2)
def plot_token_selection(
    result: AnalysisResult, by_size: Axes, excess: Axes, best_size: Axes, recall: Axes
) -> None:
    """Plot separation by size, the excess, the best size, and sinks against recall."""
    sizes, contexts, best = (result.tables[name] for name in ("sizes", "contexts", "best"))
    for kind, sets, line in (("top", "most attention", "-"), ("random", "random sets", "--")):
        means = sizes[sizes["set"] == kind].set_index("size")[["precision", "recall", "f"]]
        style = [f"C0o{line}", f"C1s{line}", f"C2D{line}"]
        means.add_suffix(f", {sets}").plot(ax=by_size, style=style, markersize=5)
    _set_log_ticks(by_size, "x", sizes["size"])
    by_size.set(title="Separation from the other keys", ylim=(-0.02, 1.02))
    by_size.set(xlabel="size N (keys)", ylabel="mean over queries")

    plot_by(excess, contexts, "excess", "up_to", x="size", colours="viridis", label=_keys_seen)
    excess.plot(best["size"], best["excess"], "k*", markersize=10, zorder=3, label="best N")
    excess.axhline(0, **ZERO)
    _set_log_ticks(excess, "x", contexts["size"])
    excess.set(title="Excess over random sets", ylabel="F - F of random sets")
    excess.set_xlabel("size N (keys)")

    best = best.set_index("up_to")
    lines = best[["size", "largest_f_size"]].assign(most=contexts.groupby("up_to")["size"].max())
    lines.columns = ["largest F - F of random sets", "largest F, N > 1", "largest N measured"]
    lines.plot(ax=best_size, style=["k-*", "C2-D", ":"], markersize=5)
    _set_log_ticks(best_size, "x", lines.index)
    _set_log_ticks(best_size, "y", lines["largest N measured"])
    best_size.set(title="Best size by context", ylabel="size N (keys)")
    best_size.set_xlabel("keys seen, at most (T)")

    _plot_sinks_and_recall(recall, result.tables["heads"], result.numbers)
    for ax in (by_size, excess, best_size, recall):
        ax.grid(alpha=0.3)
    for ax, title in ((by_size, None), (excess, "keys seen (T)"), (best_size, None)):
        ax.legend(title=title, fontsize=8, title_fontsize=8)


def _keys_seen(most: int) -> str:
    """Name a context."""
    return f"{most // 2 + 1} to {most}"


def _plot_sinks_and_recall(ax: Axes, heads: pd.DataFrame, numbers: Mapping[str, float]) -> None:
    """Plot the recall of each head against its sink similarity."""
    size = int(numbers["best_size"])
    rows = heads[(heads["set"] == "top") & (heads["size"] == size)]
    points = ax.scatter(rows["sink_similarity"], rows["recall"], c=rows["layer"], s=14)
    ax.figure.colorbar(points, ax=ax, label="layer")
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


@figure("HeadRegimes", (10.0, 5.0), columns=2)
def plot_head_regimes(result: AnalysisResult, regime_map: Axes, plane: Axes) -> None:
    """Plot the regime of each head by layer, and the heads by first-token weight and F."""
    heads, regimes = result.tables["heads"], result.tables["regimes"].set_index("regime")
    codes = heads.assign(code=heads["regime"].map(list(_REGIMES).index))
    codes = codes.pivot(index="layer", columns="head", values="code")
    for name, (colour, marker) in _REGIMES.items():
        rows = heads[heads["regime"] == name]
        label = f"{name} ({regimes.loc[name, 'heads']})"
        label += "" if regimes.loc[name, "has_signature"] else ", no signature"
        plane.plot(rows["first_weight"], rows["f"], marker, color=colour, alpha=0.8, label=label)
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


@figure("SelectionAssumptions", (15.0, 4.2), columns=3)
def plot_selection_assumptions(
    result: AnalysisResult, norms: Axes, similarity: Axes, profile: Axes
) -> None:
    """Plot value norms by layer, similarity by distance and attention by rank, with fits."""
    numbers = result.numbers
    labels = {"cv": "variation of ||v_j||, j > 1", "first_over_mean": "||v_1|| / mean ||v_j||"}
    values = result.tables["value_norms"].set_index("layer")[list(labels)]
    norms.plot(values["cv"], "C0o", values["first_over_mean"], "C3^", markersize=3, alpha=0.5)
    medians = values.groupby("layer").median().rename(columns=labels)
    medians.plot(ax=norms, style=["C0o-", "C3^-"], markersize=4)
    norms.axhline(1, **ZERO)
    norms.set_ylim(bottom=0)
    norms.locator_params(axis="x", integer=True)
    norms.set(title="Norms of values (line: median of heads)", ylabel="ratio")

    rows = result.tables["similarity"]
    similarity.plot(rows["distance"], rows["cosine"], ".", color="0.4", label="measured")
    r2s = numbers["similarity_r2"], numbers["similarity_r2_constant"]
    for form, style, r2 in zip(FORMS, ("--", "-"), r2s, strict=True):
        similarity.plot(rows["distance"], rows[form], style, label=f"{form}, R2 = {r2:.2f}")
    mean = np.average(rows["cosine"], weights=rows["pairs"])
    similarity.axhline(mean, color="0.5", linestyle=":", label="constant, R2 = 0")
    similarity.set(title="Similarity of values", xlabel="distance (tokens)")
    similarity.set_ylabel("mean cos(v_i, v_j)")

    rows = result.tables["profile"]
    profile.loglog(rows["rank"], rows["weight"], ".", color="0.4", label="measured")
    for form, label, style in (("one_piece", "one line", "--"), ("two_piece", "two lines", "-")):
        label = f"{label}, R2 = {numbers[form + '_r2']:.4f}"
        profile.plot(rows["rank"], rows[form], style, label=label)
    rank = numbers["break_rank"]
    if np.isfinite(rank):
        profile.axvline(rank, color="0.5", linestyle=":", label=f"break at rank {rank:.0f}")
    profile.set(title="Attention by rank", xlabel="rank of the key", ylabel="mean attention weight")
    for ax in (norms, similarity, profile):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
