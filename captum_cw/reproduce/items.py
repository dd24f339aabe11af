"""The items of the report: how each table and figure is computed, shown and read."""

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


def _number_table(item: str, result: Result) -> pd.DataFrame:
    """Return the headline numbers, next to those that the paper prints."""
    import pandas as pd

    columns = {"here": result.numbers, **PRINTED.get(item, {})}
    return pd.DataFrame(columns).reindex(list(result.numbers))


def _plot(result: Result) -> Pictures:
    """Plot the result."""
    return {"": result.plot(use_pyplot=False)[0]}


@dataclass(frozen=True)
class Item:
    """A table or figure of the report.

    Args:
        name: Its name in the paper, such as ``"T1"``.
        title: What it shows.
        reading: What readers should look for, and its source.
        run: A function that computes the result.
        table: A function that returns the main figures, next to those that the paper prints.
        pictures: A function that plots the result, and returns the figures by caption.
        load: A function that reads a saved result.
    """

    name: str
    title: str
    reading: str
    run: Callable[[Study, Path], Result]
    table: Callable[[str, Result], pd.DataFrame] = _number_table
    pictures: Callable[[Result], Pictures] = _plot
    load: Callable[[Path], Result] = field(default=AnalysisResult.load)


# ---------------------------------------------------------------------------------------------
# Analyses


def _run_maps(study: Study, folder: Path) -> Result:
    """Compute the maps of random heads over the first text."""
    ids = study.analysed[0]["input_ids"]
    tokens = readable_tokens(study.tokenizer, ids[0])
    return analysis.weight_maps(study.model, ids, tokens=tokens, seed=study.plan.seed)


def _plot_maps(result: Result) -> Pictures:
    """Plot the maps, with their own scales and with those of the paper."""
    own = result.plot(use_pyplot=False)[0]
    paper = result.plot(paper_scale=True, use_pyplot=False)[0]
    return {"own scales": own, "scales of the paper": paper}


def _regression_table(item: str, result: Result) -> pd.DataFrame:
    """Return R2 by product and group, next to the printed values."""
    names = {"r2": "here", "r2_held_out": "held out", "r2_uncentred": "uncentred"}
    wide: pd.DataFrame = result.to_dataframe().pivot_table(
        index="components", columns="group", values=list(names), sort=False
    )[list(names)]
    wide.columns = [f"{group}, {names[value]}" for value, group in wide.columns]
    for name, column in PRINTED[item].items():
        wide[name] = wide.index.map(column)
    return wide


def _run_analysis(
    function: Callable[..., Result], *planned: str, sample: str = "", **options: Any
) -> Callable[[Study, Path], Result]:
    """Return a function that runs an analysis.

    Args:
        function: The analysis.
        planned: The names of the options that the plan has.
        sample: The name of the plan's texts and tokens; by default, the main texts.
        options: Other options.
    """

    def run(study: Study, folder: Path) -> Result:
        plan = study.plan
        batches = study.batches(*getattr(plan, sample)) if sample else study.analysed
        given = {name: getattr(plan, name) for name in planned}
        return function(study.model, batches, show_progress=True, **given, **options)

    return run


def _selection_table(item: str, result: Result) -> pd.DataFrame:
    """Return precision, recall and F by size."""
    table = result.to_dataframe()
    wide: pd.DataFrame = table.pivot_table(
        index="size", columns="set", values=["precision", "recall", "f"], sort=False
    )
    wide.columns = [f"{what}, {of}" for what, of in wide.columns]
    wide.index = [f"N = {size}" for size in wide.index]
    return wide


def _frame_table(item: str, result: Result) -> pd.DataFrame:
    """Return the evidence for the frame, with a column for each percentile."""
    return result.tables["frames"].set_index("percentile").rename("percentile {:g}".format).T


# ---------------------------------------------------------------------------------------------
# Removal


def _methods_by_name(study: Study) -> dict[str, Any]:
    """Return the methods of removal, by name."""
    return {method: method for method in (*measures.names(), measures.RANDOM)}


def _methods_across_layers(study: Study) -> dict[str, Any]:
    """Return aggregators over layers that all sum over queries."""
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


def _run_removal(
    name: str, methods: Callable[[Study], dict[str, Any]] = _methods_by_name, **choices: Any
) -> Callable[[Study, Path], Result]:
    """Return a function that measures comprehensiveness and sufficiency."""

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


def _run_tasks(study: Study, folder: Path) -> Result:
    """Evaluate downstream tasks."""
    if not study.tasks:
        raise ValueError("no tasks were given; --tasks runs them next to the first texts.")
    plan = study.plan
    return evaluate_tasks(
        study.model,
        study.tokenizer,
        study.tasks,
        {method: method for method in measures.names()},
        plan.bottom,
        task_path=study.task_path,
        limit=plan.documents,
        seed=plan.seed,
        resume_from=folder / "F4.records",
        show_progress=True,
    )


def _task_table(item: str, result: Result) -> pd.DataFrame:
    """Return accuracy by rate, with a row for each task and method."""
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
    """Return the increase of the mean negative log-likelihood, with a row for each method.

    Likelihood does not explode as perplexity does. With at least two texts, further rows show the
    difference between the first method and each other one, with paired 95% intervals.
    """
    import pandas as pd

    table = result.to_dataframe()
    wide: pd.DataFrame = table.pivot_table(
        index="method", columns=["side", "rate"], values="delta_nll", sort=False
    )
    first, *others = result.methods
    differences: dict[str, dict[tuple[str, float], str]] = {}
    for other in others if len(result.records) >= COMPARABLE else ():
        row = differences[f"{first} - {other} (95%)"] = {}
        for side in result.sides:
            rates, *numbers, _ = result.compare(first, other, side, statistic="nll")
            for rate, *difference in zip(rates, *(x.tolist() for x in numbers), strict=True):
                row[side, rate] = "{:.3f} ({:.3f} to {:.3f})".format(*difference)
    wide = pd.concat([wide.astype(object), pd.DataFrame(differences).T])
    wide.columns = [f"{result.sides[side]} {100 * rate:g}% (nats)" for side, rate in wide.columns]
    return wide


def _plot_removal(result: Result) -> Pictures:
    """Plot the increase of perplexity and of the loss."""
    loss, _ = result.plot(statistic="nll", use_pyplot=False)
    return {
        "increase of perplexity, mean over texts": result.plot(use_pyplot=False)[0],
        "increase of the language modelling loss": loss,
    }


def _removal_item(name: str, title: str, reading: str, **choices: Any) -> Item:
    """Return an item that measures removal."""
    reading += " Rows with (95%) are differences with paired bootstrap intervals over texts."
    run, load = _run_removal(name, **choices), FaithfulnessResult.load
    return Item(name, title, reading, run, _removal_table, _plot_removal, load)


_ITEMS = (
    Item(
        "F1",
        "Attention and contribution of random heads (Figs. 1, 12-14)",
        "Attention concentrates on the first token; contributions do not.",
        _run_maps,
        pictures=_plot_maps,
    ),
    Item(
        "F2",
        "The factors of one head's contributions (Fig. 2)",
        "Attention, relative norm, cosine and their product, for the first head of F1.",
        _run_maps,
        pictures=lambda result: {"": result.plot_factors(use_pyplot=False)[0]},
    ),
    _removal_item(
        "F3",
        "Removal by layer, sinks protected, scored online (Figs. 3, 8)",
        "With the top removed, higher is better; with the bottom removed, lower is better. In the "
        "paper, contributions are always ahead. The random baseline is ours.",
    ),
    Item(
        "F4",
        "Accuracy of downstream tasks, bottom removed (Fig. 4)",
        "Contributions keep the accuracy of the unchanged model at higher rates. The largest rate "
        "is the last one that keeps accuracy within its 95% interval.",
        _run_tasks,
        _task_table,
        load=TaskResult.load,
    ),
    _removal_item(
        "F9a",
        "Removal by layer, scored in an unchanged pass",
        "The comparison for Fig. 9: a global ranking needs scores from an unchanged pass.",
        scoring="clean",
    ),
    _removal_item(
        "F9",
        "Removal by a ranking over all layers (Fig. 9)",
        "Contributions are still ahead, but by less.",
        scoring="clean",
        ranking="global",
    ),
    _removal_item(
        "F10",
        "Removal with sinks unprotected (Fig. 10)",
        "From the top, attention removes the sinks first, and the model collapses.",
        protect_sinks=False,
    ),
    _removal_item(
        "across",
        "Whole tokens removed, by scores across layers",
        "Not in the paper: rollout of attention (Abnar & Zuidema 2020), of contributions through "
        "the residual stream, and ALTI (Ferrando et al. 2022), compared with means over layers. "
        "Scores are sums over queries, because means rank whole tokens badly.",
        methods=_methods_across_layers,
        granularity="token",
        reduction="sum",
    ),
    Item(
        "T1",
        "What the factors explain of contributions (Table 1)",
        "Centred R2 of a line through the origin. Geometry explains the first token; attention and "
        "cosine together explain the others.",
        _run_analysis(analysis.component_regression, "points", "seed", log=False),
        _regression_table,
    ),
    Item(
        "T3",
        "What the factors explain in logarithms, as the caption of Table 3 says",
        "The columns printed in Table 3 equal those of Table 1 for FineWeb-Edu, so they are not in "
        "logarithms. The printed columns for GSM8K are shown here.",
        _run_analysis(analysis.component_regression, "points", "seed", log=True),
        _regression_table,
    ),
    Item(
        "T2",
        "Correlation of the factors' logarithms (Table 2)",
        "The factors are weakly correlated.",
        _run_analysis(analysis.component_correlations, sample="correlations"),
    ),
    Item(
        "F7",
        "Distribution of the factors (Fig. 7)",
        "All pairs have a large dispersion; cosines are centred near zero.",
        _run_analysis(analysis.component_dispersion, "seed"),
    ),
    Item(
        "T4",
        "Mean weight on the first token (Table 4)",
        "Attention overstates this weight. Contributions lower it below value-weighted attention "
        "(in print, not for 1B). The printed 3B row repeats the 8B row, so it is left out. VW as "
        "printed is in the unit of the hidden states.",
        _run_analysis(analysis.first_token_weight),
    ),
    Item(
        "T5",
        "Entropy of weights (Table 5)",
        "In nats. Without the first token, contributions are the most concentrated.",
        _run_analysis(analysis.weight_entropy),
    ),
    Item(
        "D.6",
        "Contribution over attention against cosine (section D.6)",
        "Within heads, the two are strongly correlated.",
        _run_analysis(analysis.interference, "seed"),
    ),
    Item(
        "F5a",
        "Alignment of the first token's value (Fig. 5a)",
        "The first value opposes the others, which agree with each other.",
        _run_analysis(analysis.value_alignment),
    ),
    Item(
        "F5b",
        "Norm of head outputs against the sink rate (Figs. 5b, 11; Appendix E)",
        "The norm is smallest below a sink rate of 1. Convexity is automatic, and with g = 0 the "
        "minimum is also below 1, so it does not need the opposition of the sink.",
        _run_analysis(analysis.output_norms, "seed"),
    ),
    Item(
        "F5c",
        "Perplexity as the first token's value is scaled (Fig. 5c)",
        "Perplexity rises as the value shrinks.",
        _run_analysis(analysis.sink_scaling, sample="scaling"),
    ),
    Item(
        "F6",
        "Head outputs and the cone of values (Fig. 6)",
        "The fraction inside the cone, of the quarter of outputs with the lowest norm, with and "
        "without the sink's value. Without it, nearly all are inside almost by construction.",
        _run_analysis(analysis.semantic_cone),
    ),
    Item(
        "selection",
        "Separation of the tokens that attention selects (arXiv 2602.01893)",
        "Precision, recall and F of the N keys with the most attention, and of random sets of the "
        "same size. F at N = 1 is one by definition.",
        _run_analysis(analysis.token_selection, "seed"),
        _selection_table,
    ),
    Item(
        "regimes",
        "Retrievers, mixers and resets (arXiv 2602.01893)",
        "Heads in three clusters, by their separation and the attention on the sink. The rule that "
        "names the clusters is ours. The silhouette shows whether three is a good number.",
        _run_analysis(analysis.head_regimes, "seed"),
    ),
    Item(
        "assumptions",
        "Assumptions of the theory of token selection (arXiv 2602.01893)",
        "Value norms are stable except for a compressed sink, similarity decays with distance, and "
        "attention by rank is piecewise.",
        _run_analysis(analysis.selection_assumptions, "seed"),
    ),
    Item(
        "frames",
        "The frame of reference (arXiv 2508.02546)",
        "Attention as a graph, and the positions of its sinks: one position (centralised), several "
        "or varying positions (distributed), or both ends (bidirectional). The rule is ours.",
        _run_analysis(analysis.reference_frames, "seed"),
        _frame_table,
    ),
)

#: The items by name, in the order of the report.
ITEMS: Mapping[str, Item] = {item.name: item for item in _ITEMS}
