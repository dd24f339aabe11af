"""Every table and figure that is reproduced: how it is computed, shown, and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_cw import analysis, measures
from captum_cw.analysis import AnalysisResult
from captum_cw.attr import ALTIWeights, AttentionWeights, ContributionWeights, TokenScores
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import COMPARABLE
from captum_cw.metrics.tasks import TaskResult, evaluate_tasks
from captum_cw.reproduce.printed import PRINTED
from captum_cw.reproduce.study import Study
from captum_cw.visualization import readable_tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ITEMS", "Item"]

Result = Any
Pictures = dict[str, "Figure"]


def _numbers(item: str, result: Result) -> pd.DataFrame:
    """The headline figures, beside those that are printed."""
    import pandas as pd

    columns = {"here": result.numbers, **PRINTED.get(item, {})}
    return pd.DataFrame(columns).reindex(list(result.numbers))


def _picture(result: Result) -> Pictures:
    return {"": result.plot(use_pyplot=False)[0]}


@dataclass(frozen=True)
class Item:
    """A table or figure.

    Args:
        name: As in the paper, such as ``"T1"``.
        title: What it is.
        reading: What a reader should see, and from where it comes.
        run: Computes it.
        table: Its main figures, those that are printed beside them.
        pictures: By caption.
        load: Reads what ``save`` of the result wrote.
    """

    name: str
    title: str
    reading: str
    run: Callable[[Study, Path], Result]
    table: Callable[[str, Result], pd.DataFrame] = _numbers
    pictures: Callable[[Result], Pictures] = _picture
    load: Callable[[Path], Result] = field(default=AnalysisResult.load)


# ---------------------------------------------------------------------------------------------
# Analyses


def _maps(study: Study, folder: Path) -> Result:
    ids = study.analysed[0]["input_ids"]
    tokens = readable_tokens(study.tokenizer, ids[0])
    return analysis.weight_maps(study.model, ids, tokens=tokens, seed=study.plan.seed)


def _map_pictures(result: Result) -> Pictures:
    own = result.plot(use_pyplot=False)[0]
    paper = result.plot(paper_scale=True, use_pyplot=False)[0]
    return {"scales of its own": own, "scales of the paper": paper}


def _regression(log: bool) -> Callable[[Study, Path], Result]:
    def run(study: Study, folder: Path) -> Result:
        return analysis.component_regression(
            study.model, study.analysed, points=study.plan.points, log=log, seed=study.plan.seed,
            show_progress=True,
        )  # fmt: skip

    return run


def _regression_table(item: str, result: Result) -> pd.DataFrame:
    names = {"r2": "here", "r2_held_out": "held out", "r2_uncentred": "uncentred"}
    wide: pd.DataFrame = result.to_dataframe().pivot_table(
        index="components", columns="group", values=list(names), sort=False
    )[list(names)]
    wide.columns = [f"{group}, {names[value]}" for value, group in wide.columns]
    for name, column in PRINTED[item].items():
        wide[name] = wide.index.map(column)
    return wide


def _simple(function: Callable[..., Result], **options: Any) -> Callable[[Study, Path], Result]:
    """An analysis of the texts that most take; those with a ``seed`` get that of the plan."""

    def run(study: Study, folder: Path) -> Result:
        given = {name: study.plan.seed if name == "seed" else x for name, x in options.items()}
        return function(study.model, study.analysed, show_progress=True, **given)

    return run


def _correlations(study: Study, folder: Path) -> Result:
    batches = study.batches(*study.plan.correlations)
    return analysis.component_correlations(study.model, batches, show_progress=True)


def _scaling(study: Study, folder: Path) -> Result:
    batches = study.batches(*study.plan.scaling)
    return analysis.sink_scaling(study.model, batches, show_progress=True)


def _selection_table(item: str, result: Result) -> pd.DataFrame:
    table = result.to_dataframe()
    wide: pd.DataFrame = table.pivot_table(
        index="size", columns="set", values=["precision", "recall", "f"], sort=False
    )
    wide.columns = [f"{what}, {of}" for what, of in wide.columns]
    wide.index = [f"N = {size}" for size in wide.index]
    return wide


def _frame_table(item: str, result: Result) -> pd.DataFrame:
    return result.tables["frames"].set_index("percentile").rename("percentile {:g}".format).T


# ---------------------------------------------------------------------------------------------
# Removal


def _by_name(study: Study) -> dict[str, Any]:
    return {method: method for method in (*measures.names(), measures.RANDOM)}


def _across(study: Study) -> dict[str, Any]:
    """Aggregators of the same reduction over queries."""
    attention, contribution = AttentionWeights(study.model), ContributionWeights(study.model)

    def through(method: AttentionAttribution) -> TokenScores:
        return TokenScores(method, reduction="sum", layers="rollout")

    return {
        "attention, mean": attention,
        "contribution, mean": contribution,
        "attention, rollout": through(attention),
        "contribution, rollout": through(contribution),
        "ALTI, rollout": through(ALTIWeights(study.model)),
        "random": "random",
    }


def _removal(
    name: str, methods: Callable[[Study], dict[str, Any]] = _by_name, **choices: Any
) -> Callable[[Study, Path], Result]:
    def run(study: Study, folder: Path) -> Result:
        plan = study.plan
        metric = ComprehensivenessSufficiency(
            study.model, {"top": plan.top, "bottom": plan.bottom}, seed=plan.seed, **choices
        )
        return metric.evaluate(
            methods(study),
            study.batches(*plan.removal, plan.batch_size),
            resume_from=folder / f"{name}.records",
        )

    return run


def _tasks(study: Study, folder: Path) -> Result:
    if not study.tasks:
        raise ValueError("no tasks were asked for; --tasks runs them beside the first texts.")
    plan = study.plan
    return evaluate_tasks(
        study.model, study.tokenizer, study.tasks, {method: method for method in measures.names()},
        plan.bottom, task_path=study.task_path, limit=plan.documents, batch_size=plan.batch_size,
        seed=plan.seed, resume_from=folder / "F4.records", show_progress=True,
    )  # fmt: skip


def _task_table(item: str, result: Result) -> pd.DataFrame:
    import pandas as pd

    rows = {}
    for task in result.tasks:
        for method in result.methods:
            scores = dict(zip(result.rates, result.scores[task][method].tolist(), strict=True))
            rows[f"{task}, {method}"] = {
                "unchanged": result.baseline[task].value,
                **{f"{100 * rate:g}%": score for rate, score in scores.items()},
                "largest rate": result.largest_rate(task, method),
            }
    return pd.DataFrame(rows).T


def _removal_table(item: str, result: Result) -> pd.DataFrame:
    """Delta of the mean negative log-likelihood: it does not explode as perplexity does.

    Below the methods, the first one's difference to each other, with its paired 95% interval.
    """
    import pandas as pd

    table = result.to_dataframe()
    wide: pd.DataFrame = table.pivot_table(
        index="method", columns=["side", "rate"], values="delta_nll", sort=False
    )
    first, *others = result.methods
    differences: dict[str, dict[tuple[str, float], str]] = {}
    for other in others:
        row = differences[f"{first} - {other} (95%)"] = {}
        if len(result.records) < COMPARABLE:
            for place, difference in (wide.loc[first] - wide.loc[other]).items():
                row[place] = f"{difference:.3f} (one text: no interval)"
            continue
        for side in result.sides:
            found = result.compare(first, other, side, statistic="nll")
            numbers = (x.tolist() for x in (found.difference, found.low, found.high))
            for rate, of in zip(found.rates, zip(*numbers, strict=True), strict=True):
                row[side, rate] = "{:.3f} ({:.3f} to {:.3f})".format(*of)
    wide = pd.concat([wide.astype(object), pd.DataFrame(differences).T])
    wide.columns = [f"{result.sides[side]} {100 * rate:g}% (nats)" for side, rate in wide.columns]
    return wide


def _removal_pictures(result: Result) -> Pictures:
    return {
        "delta of perplexity, mean over texts": result.plot(use_pyplot=False)[0],
        "delta of language modelling loss": result.plot(statistic="nll", use_pyplot=False)[0],
    }


def _removal_item(name: str, title: str, reading: str, **choices: Any) -> Item:
    reading += " Rows with (95%) are differences with paired bootstrap intervals over texts."
    return Item(
        name, title, reading, _removal(name, **choices), _removal_table, _removal_pictures,
        FaithfulnessResult.load,
    )  # fmt: skip


_ITEMS = (
    Item(
        "F1",
        "Attention and contribution of random heads (Figs. 1, 12-14)",
        "Attention piles up on the first token, contributions do not.",
        _maps,
        pictures=_map_pictures,
    ),
    Item(
        "F2",
        "The factors of one head's contributions (Fig. 2)",
        "Attention, relative norm, cosine and their product, of the first head of F1.",
        _maps,
        pictures=lambda result: {"": result.plot_factors(use_pyplot=False)[0]},
    ),
    _removal_item(
        "F3",
        "Removal by layer, sinks kept, scored online (Figs. 3, 8)",
        "Top removed: higher is better; bottom removed: lower is better. The paper finds "
        "contributions ahead throughout, chance is ours.",
    ),
    Item(
        "F4",
        "Accuracy of downstream tasks, bottom removed (Fig. 4)",
        "Contributions keep the accuracy of the unchanged model at higher rates. The largest rate "
        "is the last that leaves it within its 95% interval.",
        _tasks,
        _task_table,
        load=TaskResult.load,
    ),
    _removal_item(
        "F9a",
        "Removal by layer, scored in an unchanged pass",
        "What Fig. 9 is to be compared with: a global ranking needs clean scores.",
        scoring="clean",
    ),
    _removal_item(
        "F9",
        "Removal by a ranking over all layers (Fig. 9)",
        "Contributions stay ahead, by less.",
        scoring="clean",
        ranking="global",
    ),
    _removal_item(
        "F10",
        "Removal with sinks unprotected (Fig. 10)",
        "From the top, attention removes the sinks at once, and the model collapses.",
        protect_sinks=False,
    ),
    _removal_item(
        "across",
        "Whole tokens removed, by scores across layers",
        "Ours: rollout of attention (Abnar & Zuidema 2020), of contributions through the residual "
        "stream, and ALTI (Ferrando et al. 2022), beside means over layers. Sums over queries, "
        "since the mean ranks whole tokens badly.",
        methods=_across,
        granularity="token",
        reduction="sum",
    ),
    Item(
        "T1",
        "What the factors explain of contributions (Table 1)",
        "Centred R2 of a line through the origin. For the first token geometry decides, for the "
        "others attention and cosine together.",
        _regression(log=False),
        _regression_table,
    ),
    Item(
        "T3",
        "The same in logarithms, as the caption of Table 3 says",
        "The columns printed in Table 3 equal those of Table 1 for FineWeb-Edu, so they are not in "
        "logarithms; those for GSM8K are set beside.",
        _regression(log=True),
        _regression_table,
    ),
    Item(
        "T2",
        "Correlation of the factors' logarithms (Table 2)",
        "Weakly correlated.",
        _correlations,
    ),
    Item(
        "F7",
        "How the factors are spread (Fig. 7)",
        "Large dispersion in all pairs; cosines centred near zero.",
        _simple(analysis.component_dispersion, seed=True),
    ),
    Item(
        "T4",
        "Mean weight on the first token (Table 4)",
        "Attention overstates it; contributions lower it below value-weighted attention (in print "
        "not so for 1B). The 3B row repeats the 8B row, so it is left out. VW as printed is in the "
        "unit of the hidden states.",
        _simple(analysis.first_token_weight),
    ),
    Item(
        "T5",
        "Entropy of weights (Table 5)",
        "In nats. Without the first token contributions are the most concentrated.",
        _simple(analysis.weight_entropy),
    ),
    Item(
        "D.6",
        "Contribution over attention against cosine (section D.6)",
        "Within heads; a strong correlation.",
        _simple(analysis.interference, seed=True),
    ),
    Item(
        "F5a",
        "Alignment of the first token's value (Fig. 5a)",
        "The first value opposes the others, which agree with each other.",
        _simple(analysis.value_alignment),
    ),
    Item(
        "F5b",
        "Norm of head outputs against the sink rate (Figs. 5b, 11; Appendix E)",
        "The norm is least below a sink rate of 1. Convexity is automatic, and with g = 0 the "
        "least lies below 1 too: the opposition of the sink is not needed for it.",
        _simple(analysis.output_norms, seed=True),
    ),
    Item(
        "F5c",
        "Perplexity as the first token's value is scaled (Fig. 5c)",
        "Perplexity rises as the value shrinks.",
        _scaling,
    ),
    Item(
        "F6",
        "Head outputs and the cone of values (Fig. 6)",
        "Of the quarter of outputs with the lowest norm, the share inside the cone, with the "
        "sink's value and without; that nearly all are inside without it follows nearly by "
        "construction.",
        _simple(analysis.semantic_cone),
    ),
    Item(
        "selection",
        "Do the tokens that attention selects stand apart? (arXiv 2602.01893)",
        "Precision, recall and F of the N keys with the most attention, beside random sets of the "
        "same size. F at N = 1 is one by definition.",
        _simple(analysis.token_selection, seed=True),
        _selection_table,
    ),
    Item(
        "regimes",
        "Retrievers, mixers and resets (arXiv 2602.01893)",
        "Heads in three clusters, by their separation and what the sink takes; where each begins "
        "is our choice. The silhouette says whether three is a good number.",
        _simple(analysis.head_regimes, seed=True),
    ),
    Item(
        "assumptions",
        "What the theory of token selection assumes (arXiv 2602.01893)",
        "Value norms that are stable but for a compressed sink, similarity that decays with "
        "distance, and a profile of attention in pieces.",
        _simple(analysis.selection_assumptions, seed=True),
    ),
    Item(
        "frames",
        "The frame of reference (arXiv 2508.02546)",
        "Attention as a graph, and where its sinks stand: at one place (centralised), at several "
        "or varying ones (distributed), or at both ends (bidirectional). The rule is ours.",
        _simple(analysis.reference_frames, seed=True),
        _frame_table,
    ),
)  # fmt: skip

#: By name, in the order of the report.
ITEMS: Mapping[str, Item] = {item.name: item for item in _ITEMS}
