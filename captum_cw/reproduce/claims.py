"""The papers' claims, each with the rule that judges it.

The rules are ours. They are fixed before a run, and are the same for every model.
:mod:`captum_cw.reproduce.verdicts` implements them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from captum_cw.reproduce import verdicts
from captum_cw.reproduce.verdicts import ATTENTION_BASED, Judgement, above, below

__all__ = ["CLAIMS", "Claim", "judge"]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        name: A short name.
        statement: What the paper claims, and where.
        rule: When the claim holds. It does not hold if the opposite is found, and is undecided
            otherwise.
        needs: The items whose results judge it.
        decide: A function that takes these results and judges the claim.
    """

    name: str
    statement: str
    rule: str
    needs: tuple[str, ...]
    decide: Callable[..., Judgement]


def judge(claim: Claim, results: Mapping[str, Any]) -> Judgement:
    """Judge a claim by the results of a study, by item."""
    missing = [name for name in claim.needs if name not in results]
    if missing:
        return Judgement("not run", f"needs {', '.join(missing)}")
    return claim.decide(*(results[name] for name in claim.needs))


_BETTER = (
    "Paired 95% intervals of the language modelling loss, at each rate: ahead in more than half of "
    "the comparisons and never behind. It does not hold if behind in more than half."
)
_FOLDS = "has a higher R2 in each of five held-out folds. It does not hold if lower in each."

CLAIMS = (
    Claim(
        "most faithful",
        "Contributions outperform attention-based measures at every rate (section 5.3, Fig. 3).",
        _BETTER,
        ("F3",),
        lambda r: verdicts.better(r, "contribution", ATTENTION_BASED, list(r.sides)),
    ),
    Claim(
        "accuracy is kept",
        "Contributions keep the accuracy of tasks at higher rates (section 5.3, Fig. 4).",
        "The largest rate that keeps accuracy within its interval for the unchanged model is above "
        "that of every other measure in more than half of the tasks, and never below. It does not "
        "hold if it is below that of another measure in more than half.",
        ("F4",),
        verdicts.keeps_accuracy,
    ),
    Claim(
        "VW-ON over VW",
        "VW-ON improves on VW (section 5.3).",
        _BETTER,
        ("F3",),
        lambda r: verdicts.better(r, "vwon", ["vw"], list(r.sides)),
    ),
    Claim(
        "global narrows the gap",
        "With a ranking over all layers, contributions are ahead by less (Appendix C.2).",
        "The gap is how much more likelihood attention loses than contributions, with the bottom "
        "removed, averaged over rates. By layer, it is larger than over all layers, both scored in "
        "a clean pass, by its 95% interval over texts.",
        ("F9a", "F9"),
        verdicts.narrower_gap,
    ),
    Claim(
        "sinks unprotected",
        "If sinks may be removed, attention removes them, and the model collapses (Appendix C.3).",
        "At the lowest rate from the top, attention loses more likelihood with unprotected sinks "
        "than with protected sinks, by its 95% interval.",
        ("F3", "F10"),
        verdicts.collapses,
    ),
    Claim(
        "orientation over magnitude, all tokens",
        "Geometric orientation matters more than magnitude, across all positions (section 1; "
        "Table 1 itself says otherwise: 0.305 against 0.489).",
        f"attention x cosine, compared with attention x relative norm, {_FOLDS}",
        ("T1",),
        verdicts.explains_more("all", "attention x cosine", ["attention x relative norm"]),
    ),
    Claim(
        "orientation over magnitude, all but the first",
        "Geometric orientation matters more than magnitude for all tokens but the first (section "
        "6.1).",
        f"attention x cosine, compared with attention x relative norm, {_FOLDS}",
        ("T1",),
        verdicts.explains_more("others", "attention x cosine", ["attention x relative norm"]),
    ),
    Claim(
        "attention and cosine for the tail",
        "Attention and alignment together explain the other tokens best (section 6.1).",
        f"attention x cosine, compared with all five others, {_FOLDS}",
        ("T1",),
        verdicts.explains_more("others", "attention x cosine"),
    ),
    Claim(
        "geometry for the first token",
        "Relative norm and cosine explain the first token best (section 6.1).",
        f"relative norm x cosine, compared with all five others, {_FOLDS}",
        ("T1",),
        verdicts.explains_more("first", "relative norm x cosine"),
    ),
    Claim(
        "components weakly correlated",
        "The logarithms of the factors are weakly correlated (Appendix D.1).",
        "All three |r| are below 0.3. It does not hold if one is 0.5 or more.",
        ("T2",),
        verdicts.weakly_correlated,
    ),
    Claim(
        "cosines centred",
        "Cosines of values with the output are centred near zero (Appendix B).",
        "The magnitude of the mean is below 0.05.",
        ("F7",),
        verdicts.centred,
    ),
    Claim(
        "first token below VW, as printed",
        "Contributions give the first token less weight than VW (D.4; in print not for 1B).",
        "The difference of contribution and VW as printed, in the unit of the hidden states, has a "
        "95% interval below zero.",
        ("T4",),
        lambda r: verdicts.less_first_weight(r, "vw"),
    ),
    Claim(
        "first token below VW, rows normalised",
        "Contributions give the first token less weight than VW, both as shares.",
        "The difference of contribution and VW with its rows normalised has a 95% interval below "
        "zero.",
        ("T4",),
        lambda r: verdicts.less_first_weight(r, "vw, rows normalised"),
    ),
    Claim(
        "tail more concentrated",
        "Without the first token, contributions are more concentrated than attention (D.5).",
        "The difference of entropies has a 95% interval below zero.",
        ("T5",),
        verdicts.concentrated,
    ),
    Claim(
        "alignment refines",
        "Contribution over attention follows the cosine (Appendix D.6: r = 0.949).",
        "r is above 0.9. It does not hold if r is below 0.5.",
        ("D.6",),
        verdicts.follows_cosine,
    ),
    Claim(
        "first value opposes",
        "The first token's value opposes the others (section 6.2).",
        "The mean cosine has a 95% interval below zero.",
        ("F5a",),
        lambda r: below(r.tables["texts"]["first"].to_numpy()),
    ),
    Claim(
        "others agree",
        "The other values agree with each other (section 6.2).",
        "The mean cosine has a 95% interval above zero.",
        ("F5a",),
        lambda r: above(r.tables["texts"]["among"].to_numpy()),
    ),
    Claim(
        "least below 1",
        "The norm of every head's output is smallest below a sink rate of 1 (Appendix E).",
        "It is in all heads.",
        ("F5b",),
        verdicts.smallest_below_one,
    ),
    Claim(
        "linear in the sink rate",
        "Both fits have medians above 0.8 and 0.7 in most layers (Appendix E).",
        "The centred R2 is that high in more than half of the layers.",
        ("F5b",),
        verdicts.linear,
    ),
    Claim(
        "perplexity rises",
        "Perplexity rises as the first token's value shrinks (section 6.2, Fig. 5c).",
        "The increase at the smallest factor has a 95% interval above zero, and the mean rises at "
        "each step.",
        ("F5c",),
        verdicts.perplexity_rises,
    ),
    Claim(
        "low norms outside the cone",
        "With the sink, outputs of low norm lie outside the cone of values (section 6.2, Fig. 6).",
        "The fraction of the lowest quarter inside, averaged over heads, has a 95% interval below "
        "a half.",
        ("F6",),
        lambda r: below(r.tables["texts"].with_sink.to_numpy(), 0.5),
    ),
    Claim(
        "low norms inside without the sink",
        "Without the sink's value, outputs of low norm lie inside the cone (section 6.2, Fig. 6; "
        "almost by construction).",
        "The fraction of the lowest quarter inside, averaged over heads, has a 95% interval above "
        "0.9.",
        ("F6",),
        lambda r: above(r.tables["texts"].without.to_numpy(), 0.9),
    ),
    Claim(
        "selection separates",
        "The N keys with the most attention are separated in value space (2602.01893).",
        "F exceeds that of random sets at every N above 1: the difference by head has a 95% "
        "interval above zero.",
        ("selection",),
        verdicts.separates,
    ),
    Claim(
        "small N",
        "Separation is strongest at a small N (2602.01893).",
        "The best N in the longest contexts, by the excess of F over random sets, is 2 to 8. It "
        "does not hold if it is the largest N measured there.",
        ("selection",),
        verdicts.best_size_is_small,
    ),
    Claim(
        "sink similarity and recall",
        "Similarity to the sink correlates with recall (2602.01893).",
        "r over heads is above zero at every N above 1. It does not hold if r is below zero at "
        "every N.",
        ("selection",),
        verdicts.sinks_predict_recall,
    ),
    Claim(
        "three regimes",
        "Heads specialise into retrievers, mixers and resets (2602.01893, for LLaMA-2-7B).",
        "All three clusters have their signature, and three clusters have the best silhouette of 2 "
        "to 6. It does not hold without the signatures.",
        ("regimes",),
        verdicts.has_regimes,
    ),
    Claim(
        "stable value norms",
        "Value norms are stable, with a compressed sink (2602.01893).",
        "The medians over heads are below 0.3 for the coefficient of variation, and below a half "
        "for the norm of the first value over the mean norm.",
        ("assumptions",),
        verdicts.stable_norms,
    ),
    Claim(
        "similarity decays",
        "The similarity of values decays exponentially with distance (2602.01893).",
        "An exponential without a constant has an R2 above 0.9. It does not hold if R2 is below "
        "0.5.",
        ("assumptions",),
        verdicts.decays,
    ),
    Claim(
        "profile in pieces",
        "The profile of attention is piecewise (2602.01893).",
        "Two lines, in logarithms by rank, have an R2 above 0.95, and 0.01 more than one line in "
        "the median head. It does not hold if R2 is 0.95 or less.",
        ("assumptions",),
        verdicts.piecewise,
    ),
    Claim(
        "a frame of reference",
        "Sinks anchor a frame of reference (2508.02546).",
        "There is a frame, and the permutation test of its type has p below 0.05 / 3.",
        ("frames",),
        verdicts.has_frame,
    ),
    Claim(
        "centralised",
        "The frame is centralised (2508.02546, for Llama models; Qwen's are distributed).",
        "There is a frame as above, and it is centralised. It does not hold for another type.",
        ("frames",),
        verdicts.has_centralised_frame,
    ),
)
