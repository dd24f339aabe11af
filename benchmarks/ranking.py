"""Measure which scores of pairs rank what a model can lose, and what it cannot.

    python benchmarks/ranking.py --model M --data gsm8k=FILE --data wikitext=FILE

The last documents of each set are cut to one length, so that intervals are over documents that
have nothing to do with each other. Each setting is an evaluation of its own, and a run that was
stopped resumes. The results are a page of all tables, and the tables and figures of the pages on
pairs and on tokens. With ``--finished`` the pages show what earlier runs have finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pages import (
    Intervals,
    add_documents,
    documents,
    dots,
    fill_page,
    is_whole,
    legend,
    loaded,
    made_by,
    mean_and_interval,
    parser_of,
    part_of,
    save_picture,
    sections_of,
    write_page,
)
from peers_of_removal import PEERS, KVzipPlus, register_peers

from captum_cw import (
    ContributionWeights,
    EffectContributions,
    InputContributions,
    TargetContributions,
    TokenScores,
    measures,
)
from captum_cw._utils.progress import progress_bar
from captum_cw.attr.effects import Form
from captum_cw.capture.target_run import Gradient, TargetRunner
from captum_cw.functional import Reduction, Space
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import REMOVED, Statistic, cells
from captum_cw.metrics.tables import MARKS, Cell, in_markdown, percent
from captum_cw.models.loading import origin
from captum_cw.removal.ranking import Which
from captum_cw.removal.target_scores import TextValue

RATES: dict[Which, Sequence[float]] = {"bottom": (0.5, 0.7, 0.9), "top": (0.05, 0.1, 0.3)}
PAPER = "contribution"

Make = Callable[[Any, Reduction], object]
"""Takes the model and the reduction over queries, and returns a method of the metric."""


def _named(name: str) -> Make:
    return lambda model, reduction: name  # the metric reduces it


def _of_space(space: Space) -> Make:
    return lambda model, reduction: TokenScores(ContributionWeights(model, space=space), reduction)


def _effect(form: Form, gradient: Gradient | None = None, weight: float = 0.5) -> Make:
    def make(model: Any, reduction: Reduction) -> TokenScores:
        method = EffectContributions(model, form=form, gradient=gradient, weight=weight)
        return TokenScores(method, reduction)

    return make


class GradientTimesValue(TargetContributions):
    """Contributions to a target by the model's own gradient."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.target_runner = TargetRunner(self.runner, "plain")


def _target(gradient: Gradient) -> Make:
    def make(model: Any, reduction: Reduction) -> TokenScores:
        if gradient == "plain":
            return TokenScores(GradientTimesValue(model), reduction)
        return TokenScores(TargetContributions(model, attention=gradient), reduction)

    return make


GRADIENTS: tuple[Gradient, ...] = ("frozen", "attnlrp", "plain")
FORMS: tuple[Form, ...] = ("joint", "effect", "sensitivity")

#: Scores that need one backward pass.
OF_TARGET: dict[str, Make] = {
    "joint": _effect("joint", weight=0.25),  # the default of the class
    "joint, 0.1": _effect("joint", weight=0.1),
    "joint, 0.75": _effect("joint", weight=0.75),
    **{f"{form}, {g}": _effect(form, g) for form in FORMS for g in GRADIENTS},
    **{f"target, {g}": _target(g) for g in GRADIENTS},
}

#: Those that are ahead somewhere.
LEADERS = ("joint", "joint, attnlrp", "effect, frozen", "sensitivity, plain")

#: Scores of layers' outputs.
OF_LAYERS: dict[str, Make] = {
    **{name: _named(name) for name in (PAPER, "vwon", "vw", "attention", "closeness", *PEERS)},
    "contribution, residual": _of_space("residual"),
    "KVzip+": lambda model, reduction: TokenScores(KVzipPlus(model), reduction),
    measures.RANDOM: _named(measures.RANDOM),
}

#: Scores that only whole tokens have.
OF_TOKENS: dict[str, Make] = {
    "input, frozen": lambda model, reduction: InputContributions(model),
    "input, attnlrp": lambda model, reduction: InputContributions(model, attention="attnlrp"),
}


#: All scores.
SCORES = {**OF_LAYERS, **OF_TARGET, **OF_TOKENS}


@dataclass(frozen=True)
class Setting:
    """One way to rank, and the scores that are compared in it.

    Args:
        title: Its title.
        names: The scores besides :data:`PAPER`.
        reduction: The reduction over queries.
        target: What scores of a target explain.
        options: Other options of the metric.
    """

    title: str
    names: Sequence[str]
    reduction: Reduction = "sum"
    target: TextValue = "logits"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Make]:
        """The scores by name."""
        return {name: SCORES[name] for name in (PAPER, *self.names)}


#: Scores from elsewhere. Of the model's own gradient, target contributions are gradient x value.
OTHERS = ("target, plain", "vwon", "attention", "VATP", "CriticalKV", "OBCache", "CAOTE")
#: Scores that :data:`LEADERS` were chosen from.
FORMULAS = (
    *(name for name in OF_TARGET if name not in ("joint, 0.1", "joint, 0.75")),
    *("closeness", "marginal-30", "marginal-70", "contribution, residual"),
)

TOGETHER = {"ranking": "global"}
#: Settings whose results are reported, on the last documents of each set.
REPORTED = {
    "layer": Setting(
        "Pairs of each layer ranked together",
        (*LEADERS, "target, frozen", *OTHERS, measures.RANDOM),
    ),
    "token": Setting(
        "Whole tokens",
        (*LEADERS, "target, frozen", *OTHERS[:3], *OF_TOKENS, measures.RANDOM),
        options={"granularity": "token"},
    ),
    "global": Setting(
        "Pairs of all layers ranked together",
        (*LEADERS, *OTHERS, measures.RANDOM),
        options=TOGETHER,
    ),
    "head": Setting(
        "Pairs of each head ranked together",
        (*LEADERS, "vwon", measures.RANDOM),
        options={"ranking": "head"},
    ),
    "max": Setting(
        "Pairs of each layer ranked together, by the largest over queries",
        ("joint", "joint, attnlrp", "KVzip+", "attention"),
        "max",
    ),
}
#: Settings that scores were chosen by, on the first documents.
TRIED = {
    "formulas": Setting("All formulas and gradients", FORMULAS, options=TOGETHER),
    "weights": Setting(
        "Weights of the joint form",
        ("joint, 0.1", "joint", "joint, attnlrp", "joint, 0.75"),
        options=TOGETHER,
    ),
    "expected": Setting(
        "Expected logits as the target", LEADERS, target="expected_logits", options=TOGETHER
    ),
    "likelihood": Setting(
        "Log-likelihood as the target", LEADERS, target="log_likelihood", options=TOGETHER
    ),
    "mean": Setting("The mean over queries", LEADERS, "mean", options=TOGETHER),
    "max": Setting("The largest over queries", LEADERS, "max", options=TOGETHER),
    "rms": Setting("The root of the mean square over queries", LEADERS, "rms", options=TOGETHER),
}


Results = dict[tuple[str, str, str], FaithfulnessResult]
"""Results by the name of the model, the name of the texts, and the key of the setting."""

#: The pages of questions, with their settings, the setting of the first table, and its scores.
QUESTIONS: dict[str, tuple[Sequence[str], str, Sequence[str]]] = {
    "pairs": (("global", "layer", "head", "max"), "global", LEADERS),
    "tokens": (("token",), "token", (*LEADERS, "attention")),
}


def _is_of_texts(result: FaithfulnessResult) -> bool:
    return result.settings["quantity"] in ("perplexity", "nll")


def places(result: FaithfulnessResult) -> dict[Which, Intervals]:
    """Return where each score stands between the worst and the best order of each text.

    At each rate, 1 is the best of all scores for that text, and 0 the worst. For each end and
    score there is the mean over rates and texts, with its 95% bootstrap interval over texts. The
    order is that of the text's likelihood, or of the quantity if one prediction is measured.
    """
    key = "nll" if _is_of_texts(result) else "values"
    falls = key == "values" and result.settings["higher_is_better"]
    found = {}
    for which in result.rates:
        of_texts = torch.tensor(
            [[of[which] for of in record[key].values()] for record in result.records],
            dtype=torch.float64,
        )  # (texts, scores, rates)
        if falls == (which == "top"):
            of_texts = -of_texts
        low, high = of_texts.amin(1, keepdim=True), of_texts.amax(1, keepdim=True)
        of_scores = ((of_texts - low) / (high - low).clamp(min=1e-12)).mean(-1).T
        found[which] = dict(zip(result.methods, map(mean_and_interval, of_scores), strict=True))
    return found


def rows_of(result: FaithfulnessResult) -> dict[str, list[Cell]]:
    """Return the changes by score, compared with contributions.

    They are of corpus perplexity, or of the mean over texts if one prediction is measured.
    """
    sides = {which: side for side, which in REMOVED.items()}
    statistic: Statistic = "corpus" if _is_of_texts(result) else "mean"
    found = [cells(result, sides[which], PAPER, statistic) for which in result.rates]
    return {name: [cell for side in found for cell in side[name]] for name in result.methods}


def of_setting(result: FaithfulnessResult) -> str:
    """Return the tables of one evaluation."""
    found = places(result)
    rows = []
    for name in result.methods:
        spreads = (of[name] for of in found.values())
        rows.append([name, *(f"{mean:.2f} ({a:.2f} to {b:.2f})" for mean, a, b in spreads)])
    return (
        f"{result.to_markdown(PAPER)}\n\nUnchanged corpus perplexity {result.clean_corpus:.2f}, "
        f"{len(result.records)} documents.\n\nBetween the worst order of each text (0) and the "
        f"best (1):\n\n{in_markdown(['score', *found], rows)}"
    )


def first_table(results: Results, key: str, scores: Sequence[str]) -> str:
    """Return the changes by some scores in one setting, for all models and texts."""
    rows, columns = [], []
    for (model, data, setting), result in results.items():
        if setting == key:
            columns = _columns(result)
            found = rows_of(result)
            rows += [
                [f"{model}, {data}", name, *(cell.in_markdown for cell in found[name])]
                for name in (PAPER, *scores)
                if name in found
            ]
    return in_markdown(["model and texts", "score", *columns], rows, texts=2)


def _columns(result: FaithfulnessResult) -> list[str]:
    return [f"{which} {percent(x)}" for which, rates in result.rates.items() for x in rates]


Marks = dict[tuple[str, str], dict[str, str]]
"""The marks of all columns as one string, by setting and score, then by model and texts."""


def standings(results: Results, keys: Sequence[str], kind: str = "ranking", known: str = "") -> str:
    """Return a table with a mark for each model and set of texts in each cell.

    Args:
        results: The results, all of the same rates.
        keys: The settings to show.
        kind: What a setting is, which is the heading of its column.
        known: An earlier table, whose marks stay where the results have none.
    """
    columns = _columns(next(iter(results.values()))) if results else []
    names, found = _marks_in(known) if known else ([], {})
    for (model, data, key), result in results.items():
        name = f"{model}, {data}"
        names += [name] * (name not in names)
        for score, row in rows_of(result).items():
            if score != PAPER:
                found.setdefault((key, score), {})[name] = "".join(map(_mark, row))
    nothing = "." * len(columns)
    rows = []
    for key, score in ((key, score) for key in keys for of, score in found if of == key):
        marks = [found[key, score].get(name, nothing) for name in names]
        rows.append([key, score, *(f"`{''.join(x)}`" for x in zip(*marks, strict=True))])
    table = in_markdown([kind, "score", *columns], rows, texts=2)
    return (
        f"Each cell has a mark for {'; '.join(names)}, in this order. `+` is ahead of `{PAPER}`, "
        f"`-` behind, `~` undecided, and `.` was not run.\n\n{table}"
    )


def _mark(cell: Cell) -> str:
    return "." if cell.verdict is None else MARKS[cell.verdict]


def _marks_in(table: str) -> tuple[list[str], Marks]:
    """Read a table of :func:`standings`: the names of models with texts, and the marks."""
    first, *lines = table.splitlines()
    names = first.removeprefix("Each cell has a mark for ").partition(", in this order")[0]
    rows = [[x.strip(" `") for x in line.strip("|").split("|")] for line in lines if line]
    marks = {
        (key, score): dict(zip(names.split("; "), map("".join, zip(*of, strict=True)), strict=True))
        for key, score, *of in rows[2:]
    }
    return names.split("; "), marks


def figure(results: Mapping[str, FaithfulnessResult]) -> Figure:
    """Draw where each score stands between the worst order and the best, by model and texts."""
    found = {label: places(result) for label, result in results.items()}
    titles: dict[Which, str] = {"bottom": "What can go", "top": "What must stay"}
    panels = {title: {x: of[which] for x, of in found.items()} for which, title in titles.items()}
    return dots(panels, "worst order of a text (0) to best (1)", (-0.03, 1.03))


def _part(options: argparse.Namespace) -> str:
    return "first" if options.first else "last"


def evaluated(
    model: Any,
    tokenizer: Any,
    source: str,
    setting: Setting,
    options: argparse.Namespace,
    folder: Path,
) -> FaithfulnessResult | None:
    """Run the missing part of one evaluation, and return its result.

    Each score has its own records, so that one can be added later. With ``options.finished``,
    only scores whose records are whole are in the result. It is None without contributions, or
    with nothing beside them.
    """
    batches = documents(source, tokenizer, options)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    chosen = {"scoring": "clean", "reduction": setting.reduction, **setting.options}
    metric = ComprehensivenessSufficiency(model, RATES, **chosen)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, make in setting.methods.items():
        method, records = make(model, setting.reduction), folder / f"{name}.records"
        if not options.finished or is_whole(records, texts):
            found.append(
                metric.evaluate({name: method}, batches, target=setting.target, resume_from=records)
            )
        elif name == PAPER:
            return None
    return joined(found) if len(found) > 1 else None


def joined(results: Sequence[FaithfulnessResult]) -> FaithfulnessResult:
    """Return one result of evaluations of the same texts by different scores."""
    records = []
    for of_text in zip(*(result.records for result in results), strict=True):
        clean = [record["clean_nll"] for record in of_text]
        if max(clean) - min(clean) > 1e-4:
            raise ValueError(f"The results are of different texts: their NLL is {clean}.")
        both = {
            key: {name: x for record in of_text for name, x in record[key].items()}
            for key in ("values", "nll")
        }
        records.append({**of_text[0], **both})
    return FaithfulnessResult(results[0].rates, results[0].settings, records)


def _parser() -> argparse.ArgumentParser:
    text = "Measure which scores rank what a model can lose, and what it cannot."
    parser = parser_of("ranking", text)
    add_documents(parser)
    add = parser.add_argument
    add("--settings", help="the ways to rank, divided by commas; without it, all")
    add("--first", action="store_true", help="the first documents instead, to choose scores on")
    add("--add", action="store_true", help="keep what the pages have of other settings and models")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing evaluations, and write the pages."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    register_peers()
    known = TRIED if options.first else REPORTED
    chosen = {key: known[key] for key in (options.settings or ",".join(known)).split(",")}
    results: Results = {}
    sources, weights = options.model or [None], []
    with progress_bar(len(sources) * len(chosen) * len(options.data), "Settings", show=True) as bar:
        for source in sources:
            model, tokenizer, name = loaded(source, options.threads)
            weights.append(origin(model))
            for data, texts in options.data:
                for key, setting in chosen.items():
                    bar.set_postfix_str(f"{name}, {data}, {key}")
                    folder = options.work / name / f"{data}, {_part(options)}" / key
                    result = evaluated(model, tokenizer, texts, setting, options, folder)
                    if result is not None:
                        results[name, data, key] = result
                    bar.update()
    made = made_by("ranking", argv, options.commit, weights)
    head = f"{made} {_about(options)}"
    sections = {
        f"{model}, {data}: {chosen[key].title.lower()}": of_setting(result)
        for (model, data, key), result in results.items()
    }
    if options.first:
        write_tables(options.out / "rankings-tried.md", "Rankings that were tried", head, sections)
        return 0
    if options.add:
        add_to_pages(options.out, made, sections, results)
        return 0
    write_tables(options.out / "rankings.md", "All rankings", head, sections)
    for question, (keys, key, scores) in QUESTIONS.items():
        if key in chosen:
            of_key = {f"{m}, {data}": x for (m, data, k), x in results.items() if k == key}
            save_picture(figure(of_key), options.out / f"{question}.png")
            first = first_table(results, key, scores)
            picture = f"![Where each score stands.]({question}.png)"
            marks = standings(results, [k for k in keys if k in chosen])
            shown = {"first": f"{first}\n\n{picture}", "all": marks, "command": head}
            fill_page(options.out / f"{question}.md", f"What ranks {question}?", shown)
    return 0


def write_tables(path: Path, title: str, head: str, sections: Mapping[str, str]) -> None:
    """Write the page of all tables."""
    tables = [f"## {heading}\n\n{table}" for heading, table in sections.items()]
    write_page(path, [f"# {title}", head, *tables])


def add_to_pages(out: Path, made: str, sections: Mapping[str, str], results: Results) -> None:
    """Add tables, rows and marks to pages that are there, and say how they were made.

    The figures of the pages stay as they are.
    """
    every = sections_of(out / "rankings.md")
    title, _, head = every.pop("").partition("\n\n")
    of_texts = list(dict.fromkeys(x.partition(": ")[0] for x in (*every, *sections)))
    titles = [REPORTED[key].title.lower() for keys, *_ in QUESTIONS.values() for key in keys]

    def place(heading: str) -> tuple[int, int]:
        texts, _, setting = heading.partition(": ")
        return of_texts.index(texts), titles.index(setting)

    every.update(sections)
    in_order = {heading: every[heading] for heading in sorted(every, key=place)}
    write_tables(out / "rankings.md", title.removeprefix("# "), f"{head}\n\n{made}", in_order)
    for question, (keys, key, scores) in QUESTIONS.items():
        path = out / f"{question}.md"
        added = {of: result for of, result in results.items() if of[-1] in keys}
        if added:
            first = with_rows(part_of(path, "first"), first_table(added, key, scores))
            marks = standings(added, keys, known=part_of(path, "all"))
            made_so_far = f"{part_of(path, 'command')}\n\n{made}"
            shown = {"first": first, "all": marks, "command": made_so_far}
            fill_page(path, f"What ranks {question}?", shown)


def with_rows(part: str, table: str) -> str:
    """Put the rows of a table into that of a part of a page.

    They replace the rows of the same model, texts and score, or follow the others.
    """

    def key(line: str) -> tuple[str, ...]:
        return tuple(line.split(" | ")[:2])

    new = {key(line): line for line in table.splitlines()[2:]}
    lines = [new.pop(key(line), line) for line in part.splitlines()]
    end = max(n for n, line in enumerate(lines) if line.startswith("|")) + 1
    return "\n".join((*lines[:end], *new.values(), *lines[end:]))


def _about(options: argparse.Namespace) -> str:
    return (
        f"The {_part(options)} {options.samples} documents of each set, cut to {options.length} "
        "tokens. Cells are changes of corpus perplexity: with the bottom removed, lower is better; "
        f"with the top removed, higher is better. {legend(PAPER, 'documents')} Sinks stay. Unless "
        "a title says otherwise, scores are taken in an unchanged pass, "
        "are summed over queries, and explain the sum of the logits of the text's own tokens. "
        "`joint` is the default of `EffectContributions`. Other scores of a target have the name "
        "of the form and of the gradient, and in their joint forms both sides weigh the same, "
        "unless the name has a weight. `target, plain` is gradient x value. VATP, CriticalKV, "
        "OBCache, CAOTE and KVzip+ are the formulas of caches, over the whole text "
        "(`benchmarks/peers_of_removal.py` has them)."
    )


if __name__ == "__main__":
    sys.exit(main())
