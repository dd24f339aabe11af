"""Measure which scores of pairs rank what a model can lose, and what it cannot.

    python benchmarks/ranking.py --model M --data gsm8k=FILE --data wikitext=FILE

The last documents of each set are cut to one length, so that intervals are over documents that
have nothing to do with each other. Each setting is an evaluation in a folder of its own, and a run
that was stopped resumes. The result is a page of tables with paired intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pages import (
    add_documents,
    loaded,
    made_by,
    mean_and_interval,
    number,
    parser_of,
    table,
    write_page,
)
from peers_of_removal import PEERS, register_peers

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
from captum_cw.data import load_texts, token_batches
from captum_cw.functional import Reduction, Space
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import REMOVED, Side, Statistic
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


def _effect(form: Form, gradient: Gradient) -> Make:
    def make(model: Any, reduction: Reduction) -> TokenScores:
        return TokenScores(EffectContributions(model, form=form, gradient=gradient), reduction)

    return make


def _target(gradient: Gradient) -> Make:
    """Contributions to the target; of the model's own gradient they are gradient x value."""

    def make(model: Any, reduction: Reduction) -> TokenScores:
        method = TargetContributions(model)
        method.target_runner = TargetRunner(method.runner, gradient)
        return TokenScores(method, reduction)

    return make


GRADIENTS: tuple[Gradient, ...] = ("frozen", "attnlrp", "plain")
FORMS: tuple[Form, ...] = ("joint", "effect", "sensitivity")

#: Scores that need one backward pass.
OF_TARGET: dict[str, Make] = {
    **{f"{form}, {g}": _effect(form, g) for form in FORMS for g in GRADIENTS},
    **{f"target, {g}": _target(g) for g in GRADIENTS},
}

#: Those that are ahead somewhere, so that they are tried in every other setting.
LEADERS = ("joint, frozen", "joint, attnlrp", "effect, frozen", "sensitivity, plain")

#: Scores of layers' outputs.
OF_LAYERS: dict[str, Make] = {
    **{name: _named(name) for name in (PAPER, "vwon", "vw", "attention", "closeness", *PEERS)},
    "contribution, residual": _of_space("residual"),
    measures.RANDOM: _named(measures.RANDOM),
}

#: Scores that only whole tokens have.
OF_TOKENS: dict[str, Make] = {
    "input, frozen": lambda model, reduction: InputContributions(model),
    "input, attnlrp": lambda model, reduction: InputContributions(model, attention="attnlrp"),
}


@dataclass(frozen=True)
class Setting:
    """One way to rank, and the scores that are compared in it.

    Args:
        title: Its title.
        names: The scores besides :data:`PAPER`; without any, all.
        reduction: The reduction over queries.
        target: What scores of a target explain.
        options: Other options of the metric.
    """

    title: str
    names: Sequence[str] = ()
    reduction: Reduction = "sum"
    target: TextValue = "logits"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Make]:
        """The scores by name."""
        known = {**OF_LAYERS, **OF_TARGET}
        if self.options.get("granularity") == "token":
            known |= OF_TOKENS
        return {name: x for name, x in known.items() if name in (PAPER, *(self.names or known))}


TOGETHER = {"ranking": "global"}
SETTINGS = {
    "layer": Setting("Pairs of each layer ranked together"),
    "global": Setting("Pairs of all layers ranked together", options=TOGETHER),
    "head": Setting(
        "Pairs of each head ranked together",
        (*LEADERS, "vwon", measures.RANDOM),
        options={"ranking": "head"},
    ),
    "token": Setting("Whole tokens", options={"granularity": "token"}),
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


def changes(
    result: FaithfulnessResult, shown: Sequence[str], statistic: Statistic = "corpus"
) -> str:
    """Return the changes of a statistic, marked where a score is ahead of contributions or behind.

    A cell is bold if the paired 95% interval of its difference to contributions says that it is
    ahead, has a ``-`` if it is behind, and a ``~`` if the interval holds zero.
    """
    sides: dict[Side, str] = {"sufficiency": "bottom", "comprehensiveness": "top"}
    heads = [
        "score",
        *(f"{name} {100 * r:g}%" for s, name in sides.items() for r in result.rates[REMOVED[s]]),
    ]
    rows = []
    for method in shown:
        cells = []
        for side in sides:
            if statistic == "corpus":
                deltas = result.corpus[method][side].tolist()
            else:
                deltas = result.deltas(method, side).mean(0).tolist()
            better: Sequence[str | None] = [None] * len(deltas)
            if method != PAPER:
                better = result.compare(PAPER, method, side, statistic=statistic).better
            for delta, ahead in zip(deltas, better, strict=True):
                mark = {method: f"**{number(delta)}**", PAPER: f"{number(delta)} -"}
                tie = number(delta) if method == PAPER else f"{number(delta)} ~"
                cells.append(tie if ahead is None else mark[ahead])
        rows.append([method, *cells])
    return table(heads, rows)


def normalised(result: FaithfulnessResult, shown: Sequence[str]) -> str:
    """Return where each score stands between the worst and the best order of each text.

    At each rate, 1 is the best of all scores for that text, and 0 the worst. Cells are means over
    rates and texts, with a 95% bootstrap interval over texts.
    """
    columns = []
    for which in RATES:
        of_texts = torch.tensor(
            [
                [[x - record["clean_nll"] for x in record["nll"][m][which]] for m in shown]
                for record in result.records
            ],
            dtype=torch.float64,
        )  # (texts, scores, rates)
        if which == "bottom":
            of_texts = -of_texts
        low, high = of_texts.amin(1, keepdim=True), of_texts.amax(1, keepdim=True)
        of_scores = ((of_texts - low) / (high - low)).mean(-1).T
        found = map(mean_and_interval, of_scores)
        columns.append([f"{mean:.2f} ({a:.2f} to {b:.2f})" for mean, a, b in found])
    return table(["score", *RATES], [list(row) for row in zip(shown, *columns, strict=True)])


def _part(options: argparse.Namespace) -> str:
    return "first" if options.first else "last"


def chosen_texts(texts: Sequence[str], options: argparse.Namespace) -> Sequence[str]:
    """Return the first documents of a set, or the last."""
    return texts[: options.samples] if options.first else texts[-options.samples :]


def _parser() -> argparse.ArgumentParser:
    text = "Measure which scores rank what a model can lose, and what it cannot."
    parser = parser_of("ranking", text)
    add_documents(parser)
    add = parser.add_argument
    add("--settings", default=",".join(SETTINGS), help="the ways to rank")
    add("--scores", help="only these scores, divided by semicolons")
    add("--first", action="store_true", help="the first documents instead, to choose scores on")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing evaluations, and write the page of one model."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    register_peers()
    model, tokenizer, name = loaded(options)
    chosen = {key: SETTINGS[key] for key in options.settings.split(",")}
    asked = None if options.scores is None else options.scores.split(";")
    pages = []
    with progress_bar(len(chosen) * len(options.data), "Settings", show=True) as bar:
        for data, source in options.data:
            batches = token_batches(
                chosen_texts(load_texts(source), options),
                tokenizer,
                max_length=options.length,
                batch_size=options.batch_size,
            )
            for key, setting in chosen.items():
                bar.set_postfix_str(f"{data}, {key}")
                methods = {
                    label: make(model, setting.reduction)
                    for label, make in setting.methods.items()
                    if asked is None or label in (PAPER, *asked)
                }
                metric = ComprehensivenessSufficiency(
                    model, RATES, scoring="clean", reduction=setting.reduction, **setting.options
                )
                folder = options.work / name / f"{data}, {_part(options)}"
                folder.mkdir(parents=True, exist_ok=True)
                result = metric.evaluate(
                    methods, batches, target=setting.target, resume_from=folder / f"{key}.records"
                )
                pages.append(
                    f"## {data}: {setting.title.lower()}\n\n{changes(result, list(methods))}\n\n"
                    f"Unchanged corpus perplexity {result.clean_corpus:.2f}, "
                    f"{len(result.records)} documents.\n\nBetween the worst order of each text (0) "
                    f"and the best (1):\n\n{normalised(result, list(methods))}"
                )
                bar.update()
    head = (
        f"# Which pairs can go: {name}\n\n{made_by('ranking', argv, model)} The {_part(options)} "
        f"{options.samples} documents of each set, cut to {options.length} "
        "tokens. Cells are changes of corpus perplexity: with the bottom removed, lower is better; "
        f"with the top removed, higher is better. **Bold** cells are ahead of `{PAPER}` in the "
        "same column by a paired 95% interval over documents; `-` marks a cell that is behind, `~` "
        "a tie. Scores are taken in an unchanged pass, and sinks stay. Unless a title says "
        "otherwise, they are summed over queries, and explain the sum of the logits of the text's "
        "own tokens."
    )
    kind = "ranking-tried" if options.first else "ranking"
    write_page(options.out / f"{kind}-{name}.md", [head, *pages])
    return 0


if __name__ == "__main__":
    sys.exit(main())
