"""The papers' claims, each with the rule that judges it.

Each claim is a function of the results of a study. The first paragraph of its docstring says what
the paper claims, and where. The second is the rule: when the claim holds. It does not hold if the
opposite is found, and is undecided otherwise. The rules are ours. They are fixed before a run, and
are the same for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from captum_cw._utils.docstrings import paragraphs
from captum_cw.analysis.components import PRODUCTS
from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.result import Side
from captum_cw.metrics.tasks import TaskResult
from captum_cw.reproduce.verdicts import MIN_TEXTS, Array, Judgement, above, below, judgement

#: A level of 5%, for a type of frame that is chosen from three.
FRAME_LEVEL = 0.05 / 3
ATTENTION_BASED = ("attention", "vw", "vwon")

Rule = Callable[..., Judgement]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        name: A short name.
        statement: What the paper claims, and where.
        rule: When the claim holds, and when it does not.
        needs: The items whose results judge it.
        decide: A function that takes these results and judges the claim.
    """

    name: str
    statement: str
    rule: str
    needs: tuple[str, ...]
    decide: Rule


#: The claims, in the order of the report.
CLAIMS: list[Claim] = []


def claim(name: str, *needs: str) -> Callable[[Rule], Rule]:
    """Add the function that is decorated to the claims; it takes the results of these items."""

    def add(decide: Rule) -> Rule:
        statement, rule = paragraphs(decide)
        CLAIMS.append(Claim(name, statement, rule, needs, decide))
        return decide

    return add


def judge(claim: Claim, results: Mapping[str, Any]) -> Judgement:
    """Judge a claim by the results of a study, by item."""
    missing = [name for name in claim.needs if name not in results]
    if missing:
        return Judgement("not run", f"needs {', '.join(missing)}")
    return claim.decide(*(results[name] for name in claim.needs))


# ---------------------------------------------------------------------------------------------
# Removal


@claim("most faithful", "F3")
def most_faithful(result: FaithfulnessResult) -> Judgement:
    """Contributions outperform attention-based measures at every rate (section 5.3, Fig. 3).

    Paired 95% intervals of the language modelling loss, at each rate: ahead in more than half of
    the comparisons and never behind. It does not hold if behind in more than half.
    """
    return _better(result, "contribution", ATTENTION_BASED)


@claim("accuracy is kept", "F4")
def accuracy_is_kept(result: TaskResult) -> Judgement:
    """Contributions keep the accuracy of tasks at higher rates (section 5.3, Fig. 4).

    The largest rate that keeps accuracy within its interval for the unchanged model is above that
    of every other measure in more than half of the tasks, and never below. It does not hold if it
    is below that of another measure in more than half.
    """
    without = [task for task in result.tasks if not result.has_interval(task)]
    if without:
        return Judgement("undecided", f"no standard error of {', '.join(without)}")
    ahead = behind = 0
    for task in result.tasks:
        own, *others = [
            result.largest_rate(task, name) or 0 for name in ("contribution", *ATTENTION_BASED)
        ]
        ahead += own > max(others)
        behind += own < max(others)
    n = len(result.tasks)
    return _majority(f"ahead in {ahead}, behind in {behind} of {n} tasks", ahead, behind, n)


@claim("VW-ON over VW", "F3")
def vwon_over_vw(result: FaithfulnessResult) -> Judgement:
    """VW-ON improves on VW (section 5.3).

    Paired 95% intervals of the language modelling loss, at each rate: ahead in more than half of
    the comparisons and never behind. It does not hold if behind in more than half.
    """
    return _better(result, "vwon", ["vw"])


@claim("global narrows the gap", "F9a", "F9")
def global_narrows_the_gap(wide: FaithfulnessResult, narrow: FaithfulnessResult) -> Judgement:
    """With a ranking over all layers, contributions are ahead by less (Appendix C.2).

    The gap is how much more likelihood attention loses than contributions, with the bottom removed,
    averaged over rates. By layer, it is larger than over all layers, both scored in a clean pass,
    by its 95% interval over texts.
    """
    gaps = []
    for result in (wide, narrow):
        attention, contribution = (
            _loss_increase(result, name, "sufficiency").mean(1)
            for name in ("attention", "contribution")
        )
        gaps.append(attention - contribution)
    return above(gaps[0] - gaps[1], unit=" nats")


@claim("sinks unprotected", "F3", "F10")
def sinks_unprotected(kept: FaithfulnessResult, free: FaithfulnessResult) -> Judgement:
    """If sinks may be removed, attention removes them, and the model collapses (Appendix C.3).

    At the lowest rate from the top, attention loses more likelihood with unprotected sinks than
    with protected sinks, by its 95% interval.
    """
    loss = [_loss_increase(x, "attention", "comprehensiveness")[:, 0] for x in (free, kept)]
    verdict, figures = above(loss[0] - loss[1], unit=" nats")
    return Judgement(verdict, f"{figures}, at {100 * kept.rates['top'][0]:g}%")


def _better(result: FaithfulnessResult, a: str, others: Sequence[str]) -> Judgement:
    """Judge whether method ``a`` is better than the others, rate by rate."""
    if len(result.records) < MIN_TEXTS:
        return Judgement("undecided", f"fewer than {MIN_TEXTS} texts")
    ahead = behind = total = 0
    for other in others:
        for side in result.sides:
            winners = result.compare(a, other, side, statistic="nll").better
            ahead += winners.count(a)
            behind += winners.count(other)
            total += len(winners)
    figures = (
        f"ahead in {ahead}, behind in {behind} of {total} comparisons, {len(result.records)} texts"
    )
    return _majority(figures, ahead, behind, total)


def _majority(figures: str, ahead: int, behind: int, total: int) -> Judgement:
    """Judge a method that is ahead in some comparisons and behind in others."""
    return judgement(figures, ahead > total / 2 and not behind, behind > total / 2)


def _loss_increase(result: FaithfulnessResult, method: str, side: Side) -> Array:
    """Return the increase of the language modelling loss, ``(texts, rates)``."""
    which = result.sides[side]
    changed = np.array([record["nll"][method][which] for record in result.records])
    clean = np.array([record["clean_nll"] for record in result.records])
    increase: Array = changed - clean[:, None]
    return increase


# ---------------------------------------------------------------------------------------------
# The factors of contributions


@claim("orientation over magnitude, all tokens", "T1")
def orientation_over_magnitude(result: Any) -> Judgement:
    """Geometric orientation matters more than magnitude, across all positions (section 1; Table 1
    itself says otherwise: 0.305 against 0.489).

    attention x cosine, compared with attention x relative norm, has a higher R2 in each of five
    held-out folds. It does not hold if lower in each.
    """  # noqa: D205
    return _explains_more(result, "all", "attention x cosine", ["attention x relative norm"])


@claim("orientation over magnitude, all but the first", "T1")
def orientation_over_magnitude_later(result: Any) -> Judgement:
    """Geometric orientation matters more than magnitude for all tokens but the first (section 6.1).

    attention x cosine, compared with attention x relative norm, has a higher R2 in each of five
    held-out folds. It does not hold if lower in each.
    """
    return _explains_more(result, "others", "attention x cosine", ["attention x relative norm"])


@claim("attention and cosine for the tail", "T1")
def attention_and_cosine_for_the_tail(result: Any) -> Judgement:
    """Attention and alignment together explain the other tokens best (section 6.1).

    attention x cosine, compared with all five others, has a higher R2 in each of five held-out
    folds. It does not hold if lower in each.
    """
    return _explains_more(result, "others", "attention x cosine")


@claim("geometry for the first token", "T1")
def geometry_for_the_first_token(result: Any) -> Judgement:
    """Relative norm and cosine explain the first token best (section 6.1).

    relative norm x cosine, compared with all five others, has a higher R2 in each of five held-out
    folds. It does not hold if lower in each.
    """
    return _explains_more(result, "first", "relative norm x cosine")


def _explains_more(
    result: Any, group: str, winner: str, losers: Sequence[str] | None = None
) -> Judgement:
    """Judge whether a product of factors explains more than others in every held-out fold.

    Args:
        result: The result of the regression.
        group: The group of tokens.
        winner: The product.
        losers: The products to compare with; by default, all others.
    """
    losers = [name for name in PRODUCTS if name != winner] if losers is None else list(losers)
    folds = result.tables["folds"]
    folds = folds[folds.group == group]
    folds = folds.pivot_table(index="fold", columns="components", values="r2")
    lead = folds[winner] - folds[losers].max(axis=1)
    table = result.to_dataframe()
    r2 = table[table.group == group].set_index("components").r2
    best = r2[losers].idxmax()
    figures = f"R2 {r2[winner]:.3f}, {best} {r2[best]:.3f}"
    return judgement(figures, (lead > 0).all(), (lead < 0).all())


@claim("components weakly correlated", "T2")
def components_weakly_correlated(result: Any) -> Judgement:
    """The logarithms of the factors are weakly correlated (Appendix D.1).

    All three |r| are below 0.3. It does not hold if one is 0.5 or more.
    """
    r = {name: x for name, x in result.numbers.items() if "," in name}
    largest = float(np.abs([*r.values()]).max())  # NaN if one is NaN
    figures = ", ".join(f"{name}: {x:.3f}" for name, x in r.items())
    return judgement(figures, largest < 0.3, largest >= 0.5)


@claim("cosines centred", "F7")
def cosines_centred(result: Any) -> Judgement:
    """Cosines of values with the output are centred near zero (Appendix B).

    The magnitude of the mean is below 0.05.
    """
    mean = result.numbers["mean cosine"]
    return judgement(f"mean {mean:.3f}", abs(mean) < 0.05)


# ---------------------------------------------------------------------------------------------
# The first token


@claim("first token below VW, as printed", "T4")
def first_token_below_vw(result: Any) -> Judgement:
    """Contributions give the first token less weight than VW (D.4; in print not for 1B).

    The difference of contribution and VW as printed, in the unit of the hidden states, has a 95%
    interval below zero.
    """
    return _less_first_weight(result, "vw")


@claim("first token below VW, rows normalised", "T4")
def first_token_below_normalised_vw(result: Any) -> Judgement:
    """Contributions give the first token less weight than VW, both as shares.

    The difference of contribution and VW with its rows normalised has a 95% interval below zero.
    """
    return _less_first_weight(result, "vw, rows normalised")


def _less_first_weight(result: Any, measure: str) -> Judgement:
    """Judge whether contributions give the first token less weight than a measure."""
    weights = _by_measure(result.tables["texts"], "weight")
    return below(weights["contribution"] - weights[measure])


def _by_measure(table: pd.DataFrame, value: str) -> dict[Any, Array]:
    """Return the values of each measure, in the order of the texts."""
    groups = table.sort_values("text").groupby("measure")
    return {measure: rows[value].to_numpy() for measure, rows in groups}


@claim("tail more concentrated", "T5")
def tail_more_concentrated(result: Any) -> Judgement:
    """Without the first token, contributions are more concentrated than attention (D.5).

    The difference of entropies has a 95% interval below zero.
    """
    table = result.tables["texts"]
    entropy = _by_measure(table[~table["first"].astype(bool)], "entropy")
    return below(entropy["contribution"] - entropy["attention"], unit=" nats")


@claim("alignment refines", "D.6")
def alignment_refines(result: Any) -> Judgement:
    """Contribution over attention follows the cosine (Appendix D.6: r = 0.949).

    r is above 0.9. It does not hold if r is below 0.5.
    """
    r = result.numbers["r"]
    return judgement(f"r = {r:.3f}", r > 0.9, r < 0.5)


@claim("first value opposes", "F5a")
def first_value_opposes(result: Any) -> Judgement:
    """The first token's value opposes the others (section 6.2).

    The mean cosine has a 95% interval below zero.
    """
    return below(result.tables["texts"]["first"].to_numpy())


@claim("others agree", "F5a")
def others_agree(result: Any) -> Judgement:
    """The other values agree with each other (section 6.2).

    The mean cosine has a 95% interval above zero.
    """
    return above(result.tables["texts"]["among"].to_numpy())


@claim("least below 1", "F5b")
def least_below_one(result: Any) -> Judgement:
    """The norm of every head's output is smallest below a sink rate of 1 (Appendix E).

    It is in all heads.
    """
    n, heads = int(result.numbers["least below 1"]), int(result.numbers["heads"])
    without = int(result.numbers["least below 1 without g"])
    return judgement(f"{n} of {heads} heads ({without} with g = 0)", n == heads)


@claim("linear in the sink rate", "F5b")
def linear_in_the_sink_rate(result: Any) -> Judgement:
    """Both fits have medians above 0.8 and 0.7 in most layers (Appendix E).

    The centred R2 is that high in more than half of the layers.
    """
    medians = result.tables["heads"].groupby("layer")[["r2_k", "r2_g"]].median()
    shares = (medians.r2_k > 0.8).mean(), (medians.r2_g > 0.7).mean()
    figures = (
        f"above 0.8 in {100 * shares[0]:.0f}%, above 0.7 in {100 * shares[1]:.0f}% of the layers; "
        f"medians over all heads {result.numbers['median r2 of k']:.2f} and "
        f"{result.numbers['median r2 of g']:.2f}"
    )
    return judgement(figures, min(shares) > 0.5)


@claim("perplexity rises", "F5c")
def perplexity_rises(result: Any) -> Judgement:
    """Perplexity rises as the first token's value shrinks (section 6.2, Fig. 5c).

    The increase at the smallest factor has a 95% interval above zero, and the mean rises at each
    step.
    """
    table = result.to_dataframe()
    wide = table.pivot_table(index="text", columns="factor", values="delta")
    verdict, figures = above(wide[wide.columns.min()].to_numpy())
    if verdict == "holds" and not (np.diff(wide.mean().to_numpy()) < 0).all():
        return Judgement("undecided", f"{figures}, but not at every step")
    return Judgement(verdict, figures)


@claim("low norms outside the cone", "F6")
def low_norms_outside_the_cone(result: Any) -> Judgement:
    """With the sink, outputs of low norm lie outside the cone of values (section 6.2, Fig. 6).

    The fraction of the lowest quarter inside, averaged over heads, has a 95% interval below a half.
    """
    return below(result.tables["texts"].with_sink.to_numpy(), 0.5)


@claim("low norms inside without the sink", "F6")
def low_norms_inside_without_the_sink(result: Any) -> Judgement:
    """Without the sink's value, outputs of low norm lie inside the cone (section 6.2, Fig. 6;
    almost by construction).

    The fraction of the lowest quarter inside, averaged over heads, has a 95% interval above 0.9.
    """  # noqa: D205
    return above(result.tables["texts"].without.to_numpy(), 0.9)


# ---------------------------------------------------------------------------------------------
# Token selection and reference frames


@claim("selection separates", "selection")
def selection_separates(result: Any) -> Judgement:
    """The N keys with the most attention are separated in value space (2602.01893).

    F exceeds that of random sets at every N above 1: the difference by head has a 95% interval
    above zero.
    """
    heads = result.tables["heads"]
    heads = heads[heads["size"] > 1]
    wide = heads.pivot_table(index=["layer", "head"], columns=["size", "set"], values="f")
    verdicts, figures = [], []
    for size in sorted(set(heads["size"])):
        of_size = above((wide[size]["top"] - wide[size]["random"]).dropna().to_numpy())
        verdicts.append(of_size.verdict)
        figures.append(f"N = {size}: {of_size.figures.partition(' (')[0]}")
    verdict = verdicts[0] if len(set(verdicts)) == 1 else "undecided"
    return Judgement(verdict, ", ".join(figures))


@claim("small N", "selection")
def small_n(result: Any) -> Judgement:
    """Separation is strongest at a small N (2602.01893).

    The best N in the longest contexts, by the excess of F over random sets, is 2 to 8. It does not
    hold if it is the largest N measured there.
    """
    best = result.tables["best"].iloc[-1]
    sizes = result.tables["contexts"]
    largest = sizes[sizes.above == best.above]["size"].max()
    figures = (
        f"best N = {best['size']:.0f} in contexts of {best.above:.0f} to {best.up_to:.0f} keys"
    )
    small = best["size"] <= 8 and best["size"] < largest
    return judgement(figures, small, best["size"] == largest)


@claim("sink similarity and recall", "selection")
def sink_similarity_and_recall(result: Any) -> Judgement:
    """Similarity to the sink correlates with recall (2602.01893).

    r over heads is above zero at every N above 1. It does not hold if r is below zero at every N.
    """
    table = result.to_dataframe()
    r = table[(table["set"] == "top") & (table["size"] > 1)].set_index("size").sink_recall_r_heads
    figures = ", ".join(f"N = {size}: r = {x:.2f}" for size, x in r.items())
    return judgement(figures, (r > 0).all(), (r < 0).all())


@claim("three regimes", "regimes")
def three_regimes(result: Any) -> Judgement:
    """Heads specialise into retrievers, mixers and resets (2602.01893, for LLaMA-2-7B).

    All three clusters have their signature, and three clusters have the best silhouette of 2 to 6.
    It does not hold without the signatures.
    """
    clusters = result.tables["clusters"].set_index("k").silhouette
    signatures = int(result.numbers["signatures"])
    best = clusters.idxmax()
    of_three = clusters.get(3, float("nan"))  # a model may have fewer heads
    figures = (
        f"{signatures} of 3 signatures; silhouette {of_three:.2f}, best at k = {best} "
        f"({clusters.max():.2f})"
    )
    return judgement(figures, signatures == 3 and best == 3, signatures < 3)


@claim("stable value norms", "assumptions")
def stable_value_norms(result: Any) -> Judgement:
    """Value norms are stable, with a compressed sink (2602.01893).

    The medians over heads are below 0.3 for the coefficient of variation, and below a half for the
    norm of the first value over the mean norm.
    """
    cv, first = result.numbers["value_norm_cv"], result.numbers["first_over_mean"]
    figures = f"coefficient of variation {cv:.2f}, first over mean {first:.2f} (medians over heads)"
    return judgement(figures, cv < 0.3 and first < 0.5)


@claim("similarity decays", "assumptions")
def similarity_decays(result: Any) -> Judgement:
    """The similarity of values decays exponentially with distance (2602.01893).

    An exponential without a constant has an R2 above 0.9. It does not hold if R2 is below 0.5.
    """
    r2 = result.numbers["similarity_r2"]
    figures = f"R2 {r2:.2f}, with a constant {result.numbers['similarity_r2_constant']:.2f}"
    return judgement(figures, r2 > 0.9, r2 < 0.5)


@claim("profile in pieces", "assumptions")
def profile_in_pieces(result: Any) -> Judgement:
    """The profile of attention is piecewise (2602.01893).

    Two lines, in logarithms by rank, have an R2 above 0.95, and 0.01 more than one line in the
    median head. It does not hold if R2 is 0.95 or less.
    """
    two, gain = result.numbers["two_piece_r2"], result.numbers["two_piece_gain"]
    figures = (
        f"R2 {two:.4f} in two pieces, {result.numbers['one_piece_r2']:.4f} in one; median gain by "
        f"head {gain:.3f}"
    )
    bad = two <= 0.95
    return judgement(figures, gain >= 0.01 and not bad, bad)


@claim("a frame of reference", "frames")
def a_frame_of_reference(result: Any) -> Judgement:
    """Sinks anchor a frame of reference (2508.02546).

    There is a frame, and the permutation test of its type has p below 0.05 / 3.
    """
    figures = f"{result.frame}, p = {result.p_value:.3f}"
    absent = result.frame == "none"
    return judgement(figures, result.p_value < FRAME_LEVEL and not absent, absent)


@claim("centralised", "frames")
def centralised(result: Any) -> Judgement:
    """The frame is centralised (2508.02546, for Llama models; Qwen's are distributed).

    There is a frame as above, and it is centralised. It does not hold for another type.
    """
    verdict, figures = a_frame_of_reference(result)
    if verdict == "holds" and result.frame != "centralised":
        verdict = "does not hold"
    return Judgement(verdict, figures)
