"""The papers' claims, each with the rule by which it holds, does not hold, or is undecided.

The rules are stated before a run and are the same for every model. Where a claim speaks of a mean
over texts, it is judged by a 95% bootstrap interval over them; too few texts leave it open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.result import COMPARABLE, Side
from captum_cw.metrics.tasks import TaskResult

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CLAIMS", "Claim", "Judgement", "Verdict", "judge"]

Verdict = Literal["holds", "does not hold", "undecided", "not run"]
#: Fewer texts have no spread to speak of.
FEWEST = 5
RESAMPLES = 9999
#: A level of 5% for a type that is one of three.
SEVERAL_TYPES = 0.05 / 3
ATTENTION_BASED = ("attention", "vw", "vwon")


class Judgement(NamedTuple):
    """A verdict, and the figures that it rests on."""

    verdict: Verdict
    figures: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        name: A short one.
        statement: What is claimed, and where.
        rule: When it holds; it does not where the opposite is found, else it is undecided.
        needs: The items whose results it is judged by.
        decide: Judges it.
    """

    name: str
    statement: str
    rule: str
    needs: tuple[str, ...]
    decide: Callable[..., Judgement]


def judge(claim: Claim, results: Mapping[str, Any]) -> Judgement:
    """The verdict on a claim by the results of a study, by item."""
    missing = [name for name in claim.needs if name not in results]
    if missing:
        return Judgement("not run", f"without {', '.join(missing)}")
    return claim.decide(*(results[name] for name in claim.needs))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean; NaN of fewer than five values.

    Example:
        >>> interval([1.0] * 4)
        (nan, nan)
        >>> low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> 1 < low < 3 < high < 5
        True
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=float)
    if len(x) < FEWEST:
        return float("nan"), float("nan")
    if (x == x[0]).all():
        return float(x[0]), float(x[0])
    found = bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def above(values: Sequence[float], bound: float = 0.0, unit: str = "") -> Judgement:
    """Whether a mean over texts is above a bound."""
    low, high = interval(values)
    verdict: Verdict = "undecided"
    if low > bound:
        verdict = "holds"
    elif high < bound:
        verdict = "does not hold"
    mean = float(np.mean(values))
    known = f"{low:.3g} to {high:.3g}"
    if len(values) < FEWEST:
        known = f"no interval of fewer than {FEWEST}"
    return Judgement(verdict, f"mean {mean:.3g}{unit} ({known}), {len(values)} texts")


def below(values: Sequence[float], bound: float = 0.0, unit: str = "") -> Judgement:
    """Whether a mean over texts is below a bound."""
    verdict, figures = above(values, bound, unit)
    turned: dict[Verdict, Verdict] = {"holds": "does not hold", "does not hold": "holds"}
    return Judgement(turned.get(verdict, verdict), figures)


def _by_text(table: pd.DataFrame, column: str, value: str) -> dict[Any, np.ndarray[Any, Any]]:
    """The values of each kind of row, in the order of the texts."""
    return {
        kind: rows.sort_values("text")[value].to_numpy() for kind, rows in table.groupby(column)
    }


# ---------------------------------------------------------------------------------------------
# Removal


def _better(
    result: FaithfulnessResult, a: str, others: Sequence[str], sides: Sequence[Side]
) -> Judgement:
    """Whether ``a`` is better than others, rate by rate."""
    if len(result.records) < COMPARABLE:
        return Judgement("undecided", "one text: no interval")
    ahead = behind = cells = 0
    for other in others:
        for side in sides:
            winners = result.compare(a, other, side, statistic="nll").better
            ahead += winners.count(a)
            behind += winners.count(other)
            cells += len(winners)
    figures = (
        f"ahead in {ahead}, behind in {behind} of {cells} comparisons, {len(result.records)} texts"
    )
    if len(result.records) < FEWEST:
        return Judgement("undecided", figures)
    if ahead > cells / 2 and not behind:
        return Judgement("holds", figures)
    return Judgement("does not hold" if behind > cells / 2 else "undecided", figures)


_BETTER = (
    "by paired 95% intervals of the language modelling loss at each rate: ahead in more than half "
    "of the comparisons and behind in none; does not hold if behind in more than half"
)


def _kept(result: TaskResult) -> Judgement:
    ahead = behind = 0
    for task in result.tasks:
        own, *others = [
            result.largest_rate(task, name) or 0 for name in ("contribution", *ATTENTION_BASED)
        ]
        ahead += own > max(others)
        behind += own < max(others)
    n = len(result.tasks)
    figures = f"ahead in {ahead}, behind in {behind} of {n} tasks"
    if ahead > n / 2 and not behind:
        return Judgement("holds", figures)
    return Judgement("does not hold" if behind > n / 2 else "undecided", figures)


def _loss(result: FaithfulnessResult, method: str, side: Side) -> np.ndarray[Any, Any]:
    """Deltas of the language modelling loss, ``(texts, rates)``."""
    which = result.sides[side]
    changed = np.array([record["nll"][method][which] for record in result.records])
    clean = np.array([record["clean_nll"] for record in result.records])
    deltas: np.ndarray[Any, Any] = changed - clean[:, None]
    return deltas


def _gap(result: FaithfulnessResult) -> np.ndarray[Any, Any]:
    """By text: how far attention is behind contributions, bottom removed, mean over rates."""
    of = [_loss(result, name, "sufficiency").mean(1) for name in ("attention", "contribution")]
    gap: np.ndarray[Any, Any] = of[0] - of[1]
    return gap


def _collapse(kept: FaithfulnessResult, free: FaithfulnessResult) -> Judgement:
    of = [_loss(result, "attention", "comprehensiveness")[:, 0] for result in (free, kept)]
    rate = kept.rates["top"][0]
    found = above(of[0] - of[1], unit=" nats")
    return Judgement(found.verdict, f"{found.figures}, at {100 * rate:g}%")


# ---------------------------------------------------------------------------------------------
# Geometry


def _more(result: Any, group: str, winner: str, losers: Sequence[str]) -> Judgement:
    """Whether a product of factors explains more than others in every held-out fold."""
    folds = result.tables["folds"]
    folds = folds[folds.group == group].pivot_table(index="fold", columns="components", values="r2")
    rest = folds[list(losers)].max(axis=1)
    table = result.to_dataframe()
    r2 = table[table.group == group].set_index("components").r2
    best = r2[list(losers)].idxmax()
    figures = f"R2 {r2[winner]:.3f}, {best} {r2[best]:.3f}"
    if (folds[winner] > rest).all():
        return Judgement("holds", figures)
    return Judgement("does not hold" if (folds[winner] < rest).all() else "undecided", figures)


_FOLDS = "more held-out R2 in each of five folds; does not hold if less in each"
_SINGLE = ("attention", "relative norm", "cosine")
_PAIRS = ("attention x relative norm", "attention x cosine", "relative norm x cosine")


def _explains_best(winner: str, group: str) -> Callable[[Any], Judgement]:
    losers = [name for name in (*_SINGLE, *_PAIRS) if name != winner]
    return lambda result: _more(result, group, winner, losers)


def _orientation(group: str) -> Callable[[Any], Judgement]:
    return lambda result: _more(result, group, "attention x cosine", ["attention x relative norm"])


def _weakly(result: Any) -> Judgement:
    names = [name for name in result.numbers if "," in name]
    most = max(abs(result.numbers[name]) for name in names)
    figures = ", ".join(f"{name}: {result.numbers[name]:.3f}" for name in names)
    return Judgement(
        "holds" if most < 0.3 else "does not hold" if most >= 0.5 else "undecided", figures
    )


def _first_weight(measure: str) -> Callable[[Any], Judgement]:
    def decide(result: Any) -> Judgement:
        of = _by_text(result.tables["texts"], "measure", "weight")
        return below(of["contribution"] - of[measure])

    return decide


def _concentrated(result: Any) -> Judgement:
    table = result.tables["texts"]
    of = _by_text(table[~table["first"].astype(bool)], "measure", "entropy")
    return below(of["contribution"] - of["attention"], unit=" nats")


def _interference(result: Any) -> Judgement:
    r = result.numbers["r"]
    return Judgement(
        "holds" if r > 0.9 else "does not hold" if r < 0.5 else "undecided", f"r = {r:.3f}"
    )


def _opposed(result: Any) -> Judgement:
    return below(result.tables["texts"]["first"].to_numpy())


def _agree(result: Any) -> Judgement:
    return above(result.tables["texts"]["among"].to_numpy())


def _rises(result: Any) -> Judgement:
    table = result.to_dataframe()
    wide = table.pivot_table(index="text", columns="factor", values="delta")
    steps = -np.diff(wide.mean().to_numpy())  # from the largest loss down
    found = above(wide[wide.columns.min()].to_numpy())
    if found.verdict == "holds" and not (steps > 0).all():
        return Judgement("undecided", f"{found.figures}, but not at every step")
    return found


def _least(result: Any) -> Judgement:
    n, of = int(result.numbers["least below 1"]), int(result.numbers["heads"])
    without = int(result.numbers["least below 1 without g"])
    figures = f"{n} of {of} heads ({without} with g = 0)"
    return Judgement("holds" if n == of else "does not hold", figures)


def _fits(result: Any) -> Judgement:
    medians = result.tables["heads"].groupby("layer")[["r2_k", "r2_g"]].median()
    shares = (medians.r2_k > 0.8).mean(), (medians.r2_g > 0.7).mean()
    figures = (
        f"above 0.8 in {100 * shares[0]:.0f}%, above 0.7 in {100 * shares[1]:.0f}% of the layers; "
        f"medians over all heads {result.numbers['median r2 of k']:.2f} and "
        f"{result.numbers['median r2 of g']:.2f}"
    )
    return Judgement("holds" if min(shares) > 0.5 else "does not hold", figures)


def _outside(result: Any) -> Judgement:
    return below(result.tables["texts"].with_sink.to_numpy(), 0.5)


def _inside(result: Any) -> Judgement:
    return above(result.tables["texts"].without.to_numpy(), 0.9)


def _selected(result: Any) -> Judgement:
    heads = result.tables["heads"]
    heads = heads[heads["size"] > 1]
    wide = heads.pivot_table(index=["layer", "head"], columns=["size", "set"], values="f")
    verdicts, figures = [], []
    for size in sorted(set(heads["size"])):
        found = above((wide[size]["top"] - wide[size]["random"]).dropna().to_numpy())
        verdicts.append(found.verdict)
        figures.append(f"N = {size}: {found.figures.partition(' (')[0]}")
    verdict = verdicts[0] if len(set(verdicts)) == 1 else "undecided"
    return Judgement(verdict, ", ".join(figures))


def _small(result: Any) -> Judgement:
    best = result.tables["best"].iloc[-1]
    sizes = result.tables["contexts"]
    largest = sizes[sizes.above == best.above]["size"].max()
    figures = (
        f"best N = {best['size']:.0f} in contexts of {best.above:.0f} to {best.up_to:.0f} keys"
    )
    if best["size"] <= 8 and best["size"] < largest:
        return Judgement("holds", figures)
    return Judgement("does not hold" if best["size"] == largest else "undecided", figures)


def _recalled(result: Any) -> Judgement:
    table = result.to_dataframe()
    r = table[(table["set"] == "top") & (table["size"] > 1)].set_index("size").sink_recall_r_heads
    figures = ", ".join(f"N = {size}: r = {x:.2f}" for size, x in r.items())
    if (r > 0).all():
        return Judgement("holds", figures)
    return Judgement("does not hold" if (r < 0).all() else "undecided", figures)


def _regimes(result: Any) -> Judgement:
    clusters = result.tables["clusters"].set_index("k").silhouette
    signatures = int(result.numbers["signatures"])
    figures = f"{signatures} of 3 signatures; silhouette {clusters[3]:.2f}, best at k = "
    figures += f"{clusters.idxmax()} ({clusters.max():.2f})"
    if signatures < 3:
        return Judgement("does not hold", figures)
    return Judgement("holds" if clusters.idxmax() == 3 else "undecided", figures)


def _stable_norms(result: Any) -> Judgement:
    cv, first = result.numbers["value_norm_cv"], result.numbers["first_over_mean"]
    holds = cv < 0.3 and first < 0.5
    figures = f"coefficient of variation {cv:.2f}, first over mean {first:.2f} (medians over heads)"
    return Judgement("holds" if holds else "does not hold", figures)


def _decays(result: Any) -> Judgement:
    r2 = result.numbers["similarity_r2"]
    constant = result.numbers["similarity_r2_constant"]
    figures = f"R2 {r2:.2f}, with a constant {constant:.2f}"
    return Judgement("holds" if r2 > 0.9 else "does not hold" if r2 < 0.5 else "undecided", figures)


def _in_pieces(result: Any) -> Judgement:
    two, gain = result.numbers["two_piece_r2"], result.numbers["two_piece_gain"]
    figures = f"R2 {two:.4f} in two pieces, {result.numbers['one_piece_r2']:.4f} in one; median "
    figures += f"gain by head {gain:.3f}"
    if two <= 0.95:
        return Judgement("does not hold", figures)
    return Judgement("holds" if gain >= 0.01 else "undecided", figures)


def _framed(result: Any) -> Judgement:
    figures = f"{result.frame}, p = {result.p_value:.3f}"
    if result.frame == "none":
        return Judgement("does not hold", figures)
    return Judgement("holds" if result.p_value < SEVERAL_TYPES else "undecided", figures)


def _centralised(result: Any) -> Judgement:
    verdict, figures = _framed(result)
    if verdict == "holds" and result.frame != "centralised":
        verdict = "does not hold"
    return Judgement(verdict, figures)


def _centred(result: Any) -> Judgement:
    mean = result.numbers["mean cosine"]
    verdict: Verdict = "holds" if abs(mean) < 0.05 else "does not hold"
    return Judgement(verdict, f"mean {mean:.3f}")


CLAIMS = (
    Claim(
        "most faithful",
        "Contributions outperform attention-based measures at every rate (section 5.3, Fig. 3).",
        _BETTER,
        ("F3",),
        lambda r: _better(r, "contribution", ATTENTION_BASED, list(r.sides)),
    ),
    Claim(
        "accuracy is kept",
        "Contributions keep the accuracy of tasks at higher rates (section 5.3, Fig. 4).",
        "in more than half of the tasks, the largest rate within the unchanged accuracy's interval "
        "is above that of every other measure, and below in none; does not hold if below that of "
        "another in more than half",
        ("F4",),
        _kept,
    ),
    Claim(
        "VW-ON over VW",
        "VW-ON improves on VW (section 5.3).",
        _BETTER,
        ("F3",),
        lambda r: _better(r, "vwon", ["vw"], list(r.sides)),
    ),
    Claim(
        "global narrows the gap",
        "With a ranking over all layers contributions stay ahead by less (Appendix C.2).",
        "by text, how much more likelihood attention loses than contributions, bottom removed, "
        "mean over rates: more by layer than over all layers, both scored in a clean pass, by its "
        "95% interval",
        ("F9a", "F9"),
        lambda layer, every: above(_gap(layer) - _gap(every), unit=" nats"),
    ),
    Claim(
        "sinks unprotected",
        "Where sinks may be removed, attention does so, and the model collapses (Appendix C.3).",
        "attention loses more likelihood at the lowest rate from the top with sinks unprotected "
        "than with sinks kept, by its 95% interval",
        ("F3", "F10"),
        _collapse,
    ),
    Claim(
        "orientation over magnitude, all tokens",
        "Geometric orientation matters more than magnitude, across all positions (section 1; "
        "Table 1 itself says otherwise: 0.305 against 0.489).",
        f"attention x cosine explains more than attention x relative norm: {_FOLDS}",
        ("T1",),
        _orientation("all"),
    ),
    Claim(
        "orientation over magnitude, all but the first",
        "The same of the other tokens (section 6.1).",
        f"attention x cosine explains more than attention x relative norm: {_FOLDS}",
        ("T1",),
        _orientation("others"),
    ),
    Claim(
        "attention and cosine for the tail",
        "Attention and alignment together explain the other tokens best (section 6.1).",
        f"attention x cosine explains more than all five others: {_FOLDS}",
        ("T1",),
        _explains_best("attention x cosine", "others"),
    ),
    Claim(
        "geometry for the first token",
        "Relative norm and cosine explain the first token best (section 6.1).",
        f"relative norm x cosine explains more than all five others: {_FOLDS}",
        ("T1",),
        _explains_best("relative norm x cosine", "first"),
    ),
    Claim(
        "components weakly correlated",
        "The factors' logarithms are weakly correlated (Appendix D.1).",
        "all three |r| below 0.3; does not hold if one is 0.5 or more",
        ("T2",),
        _weakly,
    ),
    Claim(
        "cosines centred",
        "Cosines of values with the output are centred near zero (Appendix B).",
        "the mean's magnitude is below 0.05",
        ("F7",),
        _centred,
    ),
    Claim(
        "first token below VW, as printed",
        "Contributions lower the first token's weight below VW (D.4; in print not for 1B).",
        "the difference of contribution and VW as printed, in the unit of the hidden states, has a "
        "95% interval below zero",
        ("T4",),
        _first_weight("vw"),
    ),
    Claim(
        "first token below VW, rows normalised",
        "The same, both as shares.",
        "the difference of contribution and VW with its rows normalised has a 95% interval below "
        "zero",
        ("T4",),
        _first_weight("vw, rows normalised"),
    ),
    Claim(
        "tail more concentrated",
        "Without the first token, contributions are more concentrated than attention (D.5).",
        "the difference of entropies has a 95% interval below zero",
        ("T5",),
        _concentrated,
    ),
    Claim(
        "alignment refines",
        "Contribution over attention follows the cosine (Appendix D.6: r = 0.949).",
        "r above 0.9; does not hold below 0.5",
        ("D.6",),
        _interference,
    ),
    Claim(
        "first value opposes",
        "The first token's value opposes the others (section 6.2).",
        "the mean cosine has a 95% interval below zero",
        ("F5a",),
        _opposed,
    ),
    Claim(
        "others agree",
        "The other values agree with each other (section 6.2).",
        "the mean cosine has a 95% interval above zero",
        ("F5a",),
        _agree,
    ),
    Claim(
        "least below 1",
        "The norm of every head's output is least below a sink rate of 1 (Appendix E: never at 1).",
        "in all heads",
        ("F5b",),
        _least,
    ),
    Claim(
        "linear in the sink rate",
        "Both fits have medians above 0.8 and 0.7 in most layers (Appendix E).",
        "in more than half of the layers, centred R2",
        ("F5b",),
        _fits,
    ),
    Claim(
        "perplexity rises",
        "Perplexity rises as the first token's value shrinks (section 6.2, Fig. 5c).",
        "the delta with nothing left has a 95% interval above zero, and the mean rises each step",
        ("F5c",),
        _rises,
    ),
    Claim(
        "low norms outside the cone",
        "With the sink, outputs of low norm lie outside the cone of values (section 6.2, Fig. 6).",
        "the share of the lowest quarter inside, mean over heads, has a 95% interval below a half",
        ("F6",),
        _outside,
    ),
    Claim(
        "low norms inside without the sink",
        "Without the sink's value they lie inside (section 6.2, Fig. 6; nearly by construction).",
        "that share has a 95% interval above 0.9",
        ("F6",),
        _inside,
    ),
    Claim(
        "selection separates",
        "The N keys with the most attention stand apart in value space (2602.01893).",
        "at every N above 1, F exceeds that of random sets: the difference, by head, has a 95% "
        "interval above zero",
        ("selection",),
        _selected,
    ),
    Claim(
        "small N",
        "Separation is strongest at a small N (2602.01893).",
        "the best N in the longest contexts, by the excess of F over random sets, is 2 to 8; does "
        "not hold if it is the largest that was measured there",
        ("selection",),
        _small,
    ),
    Claim(
        "sink similarity and recall",
        "Similarity to the sink correlates with recall (2602.01893).",
        "over heads, r above zero at every N above 1; does not hold if below zero at every one",
        ("selection",),
        _recalled,
    ),
    Claim(
        "three regimes",
        "Heads specialise into retrievers, mixers and resets (2602.01893, of LLaMA-2-7B).",
        "all three clusters have their signature, and three has the best silhouette of 2 to 6; "
        "does not hold without the signatures",
        ("regimes",),
        _regimes,
    ),
    Claim(
        "stable value norms",
        "Value norms are stable, with a compressed sink (2602.01893).",
        "medians over heads: a coefficient of variation below 0.3, and a first value of less than "
        "half the mean norm",
        ("assumptions",),
        _stable_norms,
    ),
    Claim(
        "similarity decays",
        "The similarity of values decays exponentially with distance (2602.01893).",
        "an exponential without a constant has R2 above 0.9; does not hold below 0.5",
        ("assumptions",),
        _decays,
    ),
    Claim(
        "profile in pieces",
        "The profile of attention is piecewise (2602.01893).",
        "by rank, in logarithms: two lines have R2 above 0.95 (else it does not hold), and more by "
        "0.01 than one line in the median head",
        ("assumptions",),
        _in_pieces,
    ),
    Claim(
        "a frame of reference",
        "Sinks anchor a frame of reference (2508.02546).",
        "there is a frame, and the permutation test of its type has p below a third of 0.05",
        ("frames",),
        _framed,
    ),
    Claim(
        "centralised",
        "The frame is centralised (2508.02546, of Llama models; Qwen's are distributed).",
        "the same, and the type is centralised; does not hold of another type",
        ("frames",),
        _centralised,
    ),
)
