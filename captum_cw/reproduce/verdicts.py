"""The rules that judge the papers' claims, by the results of the analyses.

Each rule takes results and returns a :class:`Judgement`. Rules on means over texts use 95%
bootstrap intervals; with too few texts, the verdict is "undecided".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.result import Side
from captum_cw.metrics.tasks import TaskResult

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    Array = npt.NDArray[Any]

__all__ = ["ATTENTION_BASED", "PRODUCTS", "Judgement", "Verdict", "above", "below", "interval"]

Verdict = Literal["holds", "does not hold", "undecided", "not run"]
#: An interval needs at least this many texts.
MIN_TEXTS = 5
RESAMPLES = 9999
#: A level of 5%, for a type of frame that is chosen from three.
FRAME_LEVEL = 0.05 / 3
ATTENTION_BASED = ("attention", "vw", "vwon")
PRODUCTS = (
    "attention",
    "relative norm",
    "cosine",
    "attention x relative norm",
    "attention x cosine",
    "relative norm x cosine",
)


class Judgement(NamedTuple):
    """A verdict, and the figures behind it."""

    verdict: Verdict
    figures: str


def _verdict(figures: str, holds: bool, opposite: bool | None = None) -> Judgement:
    """Return the verdict on a claim.

    Args:
        figures: The figures behind the verdict.
        holds: Whether the claim holds.
        opposite: Whether the opposite was found; by default, whenever the claim does not hold.
            If neither holds, the claim is undecided.
    """
    opposite = not holds if opposite is None else opposite
    return Judgement("holds" if holds else "does not hold" if opposite else "undecided", figures)


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Compute the 95% bootstrap interval of a mean; NaN for fewer than five values.

    Example:
        >>> interval([1.0] * 4)
        (nan, nan)
        >>> low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> 1 < low < 3 < high < 5
        True
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=float)
    if len(x) < MIN_TEXTS:
        return float("nan"), float("nan")
    if (x == x[0]).all():
        return float(x[0]), float(x[0])
    low, high = bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(low), float(high)


def above(values: Sequence[float] | Array, bound: float = 0.0, unit: str = "") -> Judgement:
    """Judge whether a mean over texts is above a bound, by its 95% interval."""
    low, high = interval(values)
    spread = f"{low:.3g} to {high:.3g}"
    if len(values) < MIN_TEXTS:
        spread = f"no interval for fewer than {MIN_TEXTS} texts"
    figures = f"mean {float(np.mean(values)):.3g}{unit} ({spread}), {len(values)} texts"
    return _verdict(figures, low > bound, high < bound)


def below(values: Sequence[float] | Array, bound: float = 0.0, unit: str = "") -> Judgement:
    """Judge whether a mean over texts is below a bound, by its 95% interval."""
    verdict, figures = above(values, bound, unit)
    turned: dict[Verdict, Verdict] = {"holds": "does not hold", "does not hold": "holds"}
    return Judgement(turned.get(verdict, verdict), figures)


def _by_text(table: pd.DataFrame, column: str, value: str) -> dict[Any, Array]:
    """Return the values of each kind of row, in the order of the texts."""
    return {
        kind: rows.sort_values("text")[value].to_numpy() for kind, rows in table.groupby(column)
    }


def _majority(figures: str, ahead: int, behind: int, total: int) -> Judgement:
    """Judge a method that is ahead in some comparisons and behind in others."""
    return _verdict(figures, ahead > total / 2 and not behind, behind > total / 2)


# ---------------------------------------------------------------------------------------------
# Removal


def better(
    result: FaithfulnessResult, a: str, others: Sequence[str], sides: Sequence[Side]
) -> Judgement:
    """Judge whether method ``a`` is better than the others, rate by rate."""
    if len(result.records) < MIN_TEXTS:
        return Judgement("undecided", f"fewer than {MIN_TEXTS} texts")
    ahead = behind = total = 0
    for other in others:
        for side in sides:
            winners = result.compare(a, other, side, statistic="nll").better
            ahead += winners.count(a)
            behind += winners.count(other)
            total += len(winners)
    figures = (
        f"ahead in {ahead}, behind in {behind} of {total} comparisons, {len(result.records)} texts"
    )
    return _majority(figures, ahead, behind, total)


def keeps_accuracy(result: TaskResult) -> Judgement:
    """Judge whether contributions keep the accuracy of tasks at higher rates than others."""
    ahead = behind = 0
    for task in result.tasks:
        own, *others = [
            result.largest_rate(task, name) or 0 for name in ("contribution", *ATTENTION_BASED)
        ]
        ahead += own > max(others)
        behind += own < max(others)
    n = len(result.tasks)
    return _majority(f"ahead in {ahead}, behind in {behind} of {n} tasks", ahead, behind, n)


def _loss_increase(result: FaithfulnessResult, method: str, side: Side) -> Array:
    """Return the increase of the language modelling loss, ``(texts, rates)``."""
    which = result.sides[side]
    changed = np.array([record["nll"][method][which] for record in result.records])
    clean = np.array([record["clean_nll"] for record in result.records])
    increase: Array = changed - clean[:, None]
    return increase


def narrower_gap(wide: FaithfulnessResult, narrow: FaithfulnessResult) -> Judgement:
    """Judge whether attention is less far behind contributions in the second result.

    The gap of a text is the difference of their loss, with the bottom removed, averaged over rates.
    """
    gaps = []
    for result in (wide, narrow):
        attention, contribution = (
            _loss_increase(result, name, "sufficiency").mean(1)
            for name in ("attention", "contribution")
        )
        gaps.append(attention - contribution)
    return above(gaps[0] - gaps[1], unit=" nats")


def collapses(kept: FaithfulnessResult, free: FaithfulnessResult) -> Judgement:
    """Judge whether removal by attention hurts more if sinks may be removed."""
    loss = [_loss_increase(x, "attention", "comprehensiveness")[:, 0] for x in (free, kept)]
    verdict, figures = above(loss[0] - loss[1], unit=" nats")
    return Judgement(verdict, f"{figures}, at {100 * kept.rates['top'][0]:g}%")


# ---------------------------------------------------------------------------------------------
# Contributions and the first token


def explains_more(
    group: str, winner: str, losers: Sequence[str] | None = None
) -> Callable[[Any], Judgement]:
    """Return a rule: a product of factors explains more than others in every held-out fold.

    Args:
        group: The group of tokens.
        winner: The product.
        losers: The products to compare with; by default, all others.
    """
    losers = [name for name in PRODUCTS if name != winner] if losers is None else list(losers)

    def judge(result: Any) -> Judgement:
        folds = result.tables["folds"]
        folds = folds[folds.group == group]
        folds = folds.pivot_table(index="fold", columns="components", values="r2")
        lead = folds[winner] - folds[losers].max(axis=1)
        table = result.to_dataframe()
        r2 = table[table.group == group].set_index("components").r2
        best = r2[losers].idxmax()
        figures = f"R2 {r2[winner]:.3f}, {best} {r2[best]:.3f}"
        return _verdict(figures, (lead > 0).all(), (lead < 0).all())

    return judge


def weakly_correlated(result: Any) -> Judgement:
    """Judge whether all pairs of factors are weakly correlated."""
    r = {name: x for name, x in result.numbers.items() if "," in name}
    largest = max(map(abs, r.values()))
    figures = ", ".join(f"{name}: {x:.3f}" for name, x in r.items())
    return _verdict(figures, largest < 0.3, largest >= 0.5)


def centred(result: Any) -> Judgement:
    """Judge whether the mean cosine is near zero."""
    mean = result.numbers["mean cosine"]
    return _verdict(f"mean {mean:.3f}", abs(mean) < 0.05)


def less_first_weight(result: Any, measure: str) -> Judgement:
    """Judge whether contributions give the first token less weight than a measure."""
    weights = _by_text(result.tables["texts"], "measure", "weight")
    return below(weights["contribution"] - weights[measure])


def concentrated(result: Any) -> Judgement:
    """Judge whether contributions have less entropy than attention, without the first token."""
    table = result.tables["texts"]
    entropy = _by_text(table[~table["first"].astype(bool)], "measure", "entropy")
    return below(entropy["contribution"] - entropy["attention"], unit=" nats")


def follows_cosine(result: Any) -> Judgement:
    """Judge whether contribution over attention correlates with the cosine."""
    r = result.numbers["r"]
    return _verdict(f"r = {r:.3f}", r > 0.9, r < 0.5)


def perplexity_rises(result: Any) -> Judgement:
    """Judge whether perplexity rises as the first token's value shrinks."""
    table = result.to_dataframe()
    wide = table.pivot_table(index="text", columns="factor", values="delta")
    judgement = above(wide[wide.columns.min()].to_numpy())
    if judgement.verdict == "holds" and not (np.diff(wide.mean().to_numpy()) < 0).all():
        return Judgement("undecided", f"{judgement.figures}, but not at every step")
    return judgement


def smallest_below_one(result: Any) -> Judgement:
    """Judge whether the norms of all heads are smallest below a sink rate of 1."""
    n, heads = int(result.numbers["least below 1"]), int(result.numbers["heads"])
    without = int(result.numbers["least below 1 without g"])
    return _verdict(f"{n} of {heads} heads ({without} with g = 0)", n == heads)


def linear(result: Any) -> Judgement:
    """Judge whether both fits of Appendix E are good in most layers."""
    medians = result.tables["heads"].groupby("layer")[["r2_k", "r2_g"]].median()
    shares = (medians.r2_k > 0.8).mean(), (medians.r2_g > 0.7).mean()
    figures = (
        f"above 0.8 in {100 * shares[0]:.0f}%, above 0.7 in {100 * shares[1]:.0f}% of the layers; "
        f"medians over all heads {result.numbers['median r2 of k']:.2f} and "
        f"{result.numbers['median r2 of g']:.2f}"
    )
    return _verdict(figures, min(shares) > 0.5)


# ---------------------------------------------------------------------------------------------
# Token selection and reference frames


def separates(result: Any) -> Judgement:
    """Judge whether F exceeds that of random sets at every size."""
    heads = result.tables["heads"]
    heads = heads[heads["size"] > 1]
    wide = heads.pivot_table(index=["layer", "head"], columns=["size", "set"], values="f")
    verdicts, figures = [], []
    for size in sorted(set(heads["size"])):
        judgement = above((wide[size]["top"] - wide[size]["random"]).dropna().to_numpy())
        verdicts.append(judgement.verdict)
        figures.append(f"N = {size}: {judgement.figures.partition(' (')[0]}")
    verdict = verdicts[0] if len(set(verdicts)) == 1 else "undecided"
    return Judgement(verdict, ", ".join(figures))


def best_size_is_small(result: Any) -> Judgement:
    """Judge whether the best size in the longest contexts is small."""
    best = result.tables["best"].iloc[-1]
    sizes = result.tables["contexts"]
    largest = sizes[sizes.above == best.above]["size"].max()
    figures = (
        f"best N = {best['size']:.0f} in contexts of {best.above:.0f} to {best.up_to:.0f} keys"
    )
    return _verdict(figures, best["size"] <= 8 and best["size"] < largest, best["size"] == largest)


def sinks_predict_recall(result: Any) -> Judgement:
    """Judge whether sink similarity correlates with recall over heads, at every size."""
    table = result.to_dataframe()
    r = table[(table["set"] == "top") & (table["size"] > 1)].set_index("size").sink_recall_r_heads
    figures = ", ".join(f"N = {size}: r = {x:.2f}" for size, x in r.items())
    return _verdict(figures, (r > 0).all(), (r < 0).all())


def has_regimes(result: Any) -> Judgement:
    """Judge whether the heads form the three regimes."""
    clusters = result.tables["clusters"].set_index("k").silhouette
    signatures = int(result.numbers["signatures"])
    best = clusters.idxmax()
    figures = (
        f"{signatures} of 3 signatures; silhouette {clusters[3]:.2f}, best at k = {best} "
        f"({clusters.max():.2f})"
    )
    return _verdict(figures, signatures == 3 and best == 3, signatures < 3)


def stable_norms(result: Any) -> Judgement:
    """Judge whether value norms are stable, with a smaller first value."""
    cv, first = result.numbers["value_norm_cv"], result.numbers["first_over_mean"]
    figures = f"coefficient of variation {cv:.2f}, first over mean {first:.2f} (medians over heads)"
    return _verdict(figures, cv < 0.3 and first < 0.5)


def decays(result: Any) -> Judgement:
    """Judge whether the similarity of values decays exponentially."""
    r2 = result.numbers["similarity_r2"]
    figures = f"R2 {r2:.2f}, with a constant {result.numbers['similarity_r2_constant']:.2f}"
    return _verdict(figures, r2 > 0.9, r2 < 0.5)


def piecewise(result: Any) -> Judgement:
    """Judge whether two lines fit attention by rank well, and better than one line."""
    two, gain = result.numbers["two_piece_r2"], result.numbers["two_piece_gain"]
    figures = (
        f"R2 {two:.4f} in two pieces, {result.numbers['one_piece_r2']:.4f} in one; median gain by "
        f"head {gain:.3f}"
    )
    bad = two <= 0.95
    return _verdict(figures, gain >= 0.01 and not bad, bad)


def has_frame(result: Any) -> Judgement:
    """Judge whether the model has a reference frame."""
    figures = f"{result.frame}, p = {result.p_value:.3f}"
    absent = result.frame == "none"
    return _verdict(figures, result.p_value < FRAME_LEVEL and not absent, absent)


def has_centralised_frame(result: Any) -> Judgement:
    """Judge whether the model has a centralised reference frame."""
    verdict, figures = has_frame(result)
    if verdict == "holds" and result.frame != "centralised":
        verdict = "does not hold"
    return Judgement(verdict, figures)
