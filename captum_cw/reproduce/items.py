"""The items of the report: how each table and figure is computed, shown and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from captum_cw import analysis, measures
from captum_cw._utils.docstrings import paragraphs
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
    from matplotlib.figure import Figure

Result = Any
Run = Callable[[Study, Path], Result]
Pictures = dict[str, "Figure"]


def _number_table(item: str, result: Result) -> pd.DataFrame:
    """Return the headline numbers, next to those that the paper prints."""
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
        resumes: Whether ``run`` has records of its own, and checks that they are of this run.
    """

    name: str
    title: str
    reading: str
    run: Run
    table: Callable[[str, Result], pd.DataFrame] = _number_table
    pictures: Callable[[Result], Pictures] = _plot
    load: Callable[[Path], Result] = AnalysisResult.load
    resumes: bool = False


#: The items by name, in the order of the report.
ITEMS: dict[str, Item] = {}


def item(name: str, **options: Any) -> Callable[[Run], Run]:
    """Add the function that is decorated to the items.

    The first line of its docstring is the title, and the rest is the reading.

    Args:
        name: The name of the item.
        options: What of the item is not the default.
    """

    def add(run: Run) -> Run:
        title, reading = paragraphs(run)
        ITEMS[name] = Item(name, title.removesuffix("."), reading, run, **options)
        return run

    return add


def _analyse(function: Callable[..., Result], study: Study, **options: Any) -> Result:
    """Run an analysis of the main texts of a study."""
    return function(study.model, study.analysed, show_progress=True, **options)


# ---------------------------------------------------------------------------------------------
# Maps


def _plot_maps(result: Result) -> Pictures:
    """Plot the maps, with their own scales and with those of the paper."""
    own = result.plot(use_pyplot=False)[0]
    paper = result.plot(paper_scale=True, use_pyplot=False)[0]
    return {"own scales": own, "scales of the paper": paper}


@item("F1", pictures=_plot_maps)
def maps(study: Study, folder: Path) -> Result:
    """Attention and contribution of random heads (Figs. 1, 12-14).

    Attention concentrates on the first token; contributions do not.
    """
    ids = study.analysed[0]["input_ids"]
    tokens = readable_tokens(study.tokenizer, ids[0])
    return analysis.weight_maps(study.model, ids, tokens=tokens, seed=study.plan.seed)


@item("F2", pictures=lambda result: {"": result.plot_factors(use_pyplot=False)[0]})
def factors(study: Study, folder: Path) -> Result:
    """The factors of one head's contributions (Fig. 2).

    Attention, relative norm, cosine and their product, for the first head of F1.
    """
    return maps(study, folder)


# ---------------------------------------------------------------------------------------------
# Removal


def _removal_table(item: str, result: Result) -> pd.DataFrame:
    """Return the increase of the mean negative log-likelihood, with a row for each method.

    Likelihood does not explode as perplexity does. With at least two texts, further rows show the
    difference between the first method and each other one, with paired 95% intervals.
    """
    table = result.to_dataframe()
    wide: pd.DataFrame = table.pivot_table(
        index="method", columns=["side", "rate"], values="delta_nll", sort=False
    )
    first, *others = result.methods
    differences: dict[str, dict[tuple[str, float], str]] = {}
    for other in others if len(result.records) >= COMPARABLE else ():
        row = differences[f"{first} - {other} (95%)"] = {}
        for side in result.sides:
            found = result.compare(first, other, side, statistic="nll")
            numbers = (x.tolist() for x in (found.difference, found.low, found.high))
            for rate, *difference in zip(found.rates, *numbers, strict=True):
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


removal_item = partial(
    item, table=_removal_table, pictures=_plot_removal, load=FaithfulnessResult.load
)


def _remove(
    study: Study, records: Path, methods: dict[str, Any] | None = None, **choices: Any
) -> Result:
    """Measure comprehensiveness and sufficiency; by default, of all measures and at random."""
    plan = study.plan
    metric = ComprehensivenessSufficiency(
        study.model, {"top": plan.top, "bottom": plan.bottom}, seed=plan.seed, **choices
    )
    if methods is None:
        methods = {method: method for method in (*measures.names(), measures.RANDOM)}
    batches = study.batches(*plan.removal, plan.batch_size)
    return metric.evaluate(methods, batches, resume_from=records)


@removal_item("F3")
def removal(study: Study, folder: Path) -> Result:
    """Removal by layer, sinks protected, scored online (Figs. 3, 8).

    With the top removed, higher is better; with the bottom removed, lower is better. In the paper,
    contributions are always ahead. The random baseline is ours. Rows with (95%) are differences
    with paired bootstrap intervals over texts.
    """
    return _remove(study, folder / "F3.records")


def _task_table(item: str, result: Result) -> pd.DataFrame:
    """Return accuracy by rate, with a row for each task and method."""
    rows = {}
    for task in result.tasks:
        known = result.has_interval(task)
        for method in result.methods:
            scores = dict(zip(result.rates, result.scores[task][method].tolist(), strict=True))
            rows[f"{task}, {method}"] = {
                "unchanged": result.baseline[task].value,
                **{f"{100 * rate:g}%": score for rate, score in scores.items()},
                "largest rate": result.largest_rate(task, method) if known else None,
            }
    return pd.DataFrame(rows).T


@item("F4", table=_task_table, load=TaskResult.load, resumes=True)
def tasks(study: Study, folder: Path) -> Result:
    """Accuracy of downstream tasks, bottom removed (Fig. 4).

    Contributions keep the accuracy of the unchanged model at higher rates. The largest rate is the
    last one that keeps accuracy within its 95% interval.
    """
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


@removal_item("F9a")
def clean_removal(study: Study, folder: Path) -> Result:
    """Removal by layer, scored in an unchanged pass.

    The comparison for Fig. 9: a global ranking needs scores from an unchanged pass. Rows with (95%)
    are differences with paired bootstrap intervals over texts.
    """
    return _remove(study, folder / "F9a.records", scoring="clean")


@removal_item("F9")
def global_removal(study: Study, folder: Path) -> Result:
    """Removal by a ranking over all layers (Fig. 9).

    Contributions are still ahead, but by less. Rows with (95%) are differences with paired
    bootstrap intervals over texts.
    """
    return _remove(study, folder / "F9.records", scoring="clean", ranking="global")


@removal_item("F10")
def removal_of_sinks(study: Study, folder: Path) -> Result:
    """Removal with sinks unprotected (Fig. 10).

    From the top, attention removes the sinks first, and the model collapses. Rows with (95%) are
    differences with paired bootstrap intervals over texts.
    """
    return _remove(study, folder / "F10.records", protect_sinks=False)


@removal_item("across")
def removal_across_layers(study: Study, folder: Path) -> Result:
    """Whole tokens removed, by scores across layers.

    Not in the paper: rollout of attention (Abnar & Zuidema 2020), of contributions through the
    residual stream, and ALTI (Ferrando et al. 2022), compared with means over layers. Scores are
    sums over queries, because means rank whole tokens badly. Rows with (95%) are differences with
    paired bootstrap intervals over texts.
    """
    attention, contribution = AttentionWeights(study.model), ContributionWeights(study.model)

    def through(method: AttentionAttribution) -> TokenScores:
        return TokenScores(method, reduction="sum", layers="rollout")

    methods = {
        "attention, mean": attention,
        "contribution, mean": contribution,
        "attention, rollout": through(attention),
        "contribution, rollout": through(contribution),
        "ALTI, rollout": through(ALTIWeights(study.model)),
        "random": "random",
    }
    records = folder / "across.records"
    return _remove(study, records, methods, granularity="token", reduction="sum")


# ---------------------------------------------------------------------------------------------
# The role of value geometry


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


def _regress(study: Study, *, log: bool) -> Result:
    """Regress contributions on products of their factors."""
    plan = study.plan
    function = analysis.component_regression
    return _analyse(function, study, points=plan.points, seed=plan.seed, log=log)


@item("T1", table=_regression_table)
def regression(study: Study, folder: Path) -> Result:
    """How well products of the factors predict contributions (Table 1).

    Centred R2 of a line through the origin. Geometry explains the first token; attention and cosine
    together explain the others.
    """
    return _regress(study, log=False)


@item("T3", table=_regression_table)
def log_regression(study: Study, folder: Path) -> Result:
    """The same prediction in logarithms, as the caption of Table 3 says.

    The columns printed in Table 3 equal those of Table 1 for FineWeb-Edu, so they are not in
    logarithms. The printed columns for GSM8K are shown here.
    """
    return _regress(study, log=True)


@item("T2")
def correlations(study: Study, folder: Path) -> Result:
    """Correlation of the factors' logarithms (Table 2).

    The factors are weakly correlated.
    """
    batches = study.batches(*study.plan.correlations)
    return analysis.component_correlations(study.model, batches, show_progress=True)


@item("F7")
def dispersion(study: Study, folder: Path) -> Result:
    """Distribution of the factors (Fig. 7).

    All pairs have a large dispersion; cosines are centred near zero.
    """
    return _analyse(analysis.component_dispersion, study, seed=study.plan.seed)


@item("T4")
def first_token_weight(study: Study, folder: Path) -> Result:
    """Mean weight on the first token (Table 4).

    Attention overstates this weight. Contributions lower it below value-weighted attention (in
    print, not for 1B). The printed 3B row repeats the 8B row, so it is left out. VW as printed is
    in the unit of the hidden states.
    """
    return _analyse(analysis.first_token_weight, study)


@item("T5")
def entropy(study: Study, folder: Path) -> Result:
    """Entropy of weights (Table 5).

    In nats. Without the first token, contributions are the most concentrated.
    """
    return _analyse(analysis.weight_entropy, study)


@item("D.6")
def interference(study: Study, folder: Path) -> Result:
    """Contribution over attention against cosine (section D.6).

    Within heads, the two are strongly correlated.
    """
    return _analyse(analysis.interference, study, seed=study.plan.seed)


@item("F5a")
def alignment(study: Study, folder: Path) -> Result:
    """Alignment of the first token's value (Fig. 5a).

    The first value opposes the others, which agree with each other.
    """
    return _analyse(analysis.value_alignment, study)


@item("F5b")
def output_norms(study: Study, folder: Path) -> Result:
    """Norm of head outputs against the sink rate (Figs. 5b, 11; Appendix E).

    The norm is smallest below a sink rate of 1. Convexity is automatic, and with g = 0 the minimum
    is also below 1, so it does not need the opposition of the sink.
    """
    return _analyse(analysis.output_norms, study, seed=study.plan.seed)


@item("F5c")
def sink_scaling(study: Study, folder: Path) -> Result:
    """Perplexity as the first token's value is scaled (Fig. 5c).

    Perplexity rises as the value shrinks.
    """
    batches = study.batches(*study.plan.scaling)
    return analysis.sink_scaling(study.model, batches, show_progress=True)


@item("F6")
def cone(study: Study, folder: Path) -> Result:
    """Head outputs and the cone of values (Fig. 6).

    The fraction inside the cone, of the quarter of outputs with the lowest norm, with and without
    the sink's value. Without it, nearly all are inside almost by construction.
    """
    return _analyse(analysis.semantic_cone, study)


# ---------------------------------------------------------------------------------------------
# Token selection and reference frames


def _selection_table(item: str, result: Result) -> pd.DataFrame:
    """Return precision, recall and F by size."""
    table = result.to_dataframe()
    wide: pd.DataFrame = table.pivot_table(
        index="size", columns="set", values=["precision", "recall", "f"], sort=False
    )
    wide.columns = [f"{what}, {of}" for what, of in wide.columns]
    wide.index = [f"N = {size}" for size in wide.index]
    return wide


@item("selection", table=_selection_table)
def selection(study: Study, folder: Path) -> Result:
    """Separation of the tokens that attention selects (arXiv 2602.01893).

    Precision, recall and F of the N keys with the most attention, and of random sets of the same
    size. F at N = 1 is one by definition.
    """
    return _analyse(analysis.token_selection, study, seed=study.plan.seed)


@item("regimes")
def regimes(study: Study, folder: Path) -> Result:
    """Retrievers, mixers and resets (arXiv 2602.01893).

    Heads in three clusters, by their separation and the attention on the sink. The rule that names
    the clusters is ours. The silhouette shows whether three is a good number.
    """
    return _analyse(analysis.head_regimes, study, seed=study.plan.seed)


@item("assumptions")
def assumptions(study: Study, folder: Path) -> Result:
    """Assumptions of the theory of token selection (arXiv 2602.01893).

    Value norms are stable except for a compressed sink, similarity decays with distance, and
    attention by rank is piecewise.
    """
    return _analyse(analysis.selection_assumptions, study, seed=study.plan.seed)


def _frame_table(item: str, result: Result) -> pd.DataFrame:
    """Return the evidence for the frame, with a column for each percentile."""
    return result.tables["frames"].set_index("percentile").rename("percentile {:g}".format).T


@item("frames", table=_frame_table)
def frames(study: Study, folder: Path) -> Result:
    """The frame of reference (arXiv 2508.02546).

    Attention as a graph, and the positions of its sinks: one position (centralised), several or
    varying positions (distributed), or both ends (bidirectional). The rule is ours.
    """
    return _analyse(analysis.reference_frames, study, seed=study.plan.seed)
