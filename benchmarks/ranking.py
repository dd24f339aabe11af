"""Measure which scores of pairs rank what a model can lose, and what it cannot.

    python benchmarks/ranking.py --model M --data gsm8k=FILE --data wikitext=FILE

The last documents of each set are cut to one length, so that intervals are over documents that
have nothing to do with each other. Each setting is an evaluation in a folder of its own, and a run
that was stopped resumes. The result is a page of tables with paired intervals.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peers_of_removal import PEERS, register_peers

from captum_cw import EffectContributions, TargetContributions, measures
from captum_cw._utils.progress import progress_bar
from captum_cw.data import load_texts, token_batches
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import REMOVED, Side
from captum_cw.models.loading import DEMO_MODEL, load_demo_model, load_model, origin
from captum_cw.removal.ranking import Which

OUT = Path(__file__).parent.parent / "docs" / "results"
RATES: dict[Which, Sequence[float]] = {"bottom": (0.5, 0.7, 0.9), "top": (0.05, 0.1, 0.3)}
PAPER = "contribution"

Make = Callable[[Any], object]


def _by_name(name: str) -> Make:
    return lambda model: name


def _effect(**options: Any) -> Make:
    return lambda model: EffectContributions(model, **options)


#: Scores that need one backward pass.
OF_TARGET: dict[str, Make] = {
    "joint, frozen": _effect(form="joint", gradient="frozen"),
    "joint, attnlrp": _effect(form="joint", gradient="attnlrp"),
    "effect, frozen": _effect(form="effect", gradient="frozen"),
    "effect, attnlrp": _effect(form="effect", gradient="attnlrp"),
    "sensitivity, plain": _effect(form="sensitivity", gradient="plain"),
    "target, attnlrp": lambda model: TargetContributions(model, attention="attnlrp"),
}

#: Scores of layers' outputs.
OF_LAYERS: dict[str, Make] = {
    name: _by_name(name)
    for name in (PAPER, "vwon", "vw", "attention", "closeness", *PEERS, measures.RANDOM)
}


@dataclass(frozen=True)
class Setting:
    """One way to rank, and the scores that are compared in it."""

    title: str
    options: Mapping[str, Any]
    methods: Mapping[str, Make]


SETTINGS = {
    "layer": Setting("Pairs of each layer ranked together", {}, {**OF_LAYERS, **OF_TARGET}),
    "global": Setting(
        "Pairs of all layers ranked together",
        {"ranking": "global"},
        {name: OF_LAYERS[name] for name in (PAPER, "vwon", "closeness", measures.RANDOM)}
        | OF_TARGET,
    ),
}


def table(result: FaithfulnessResult, shown: Sequence[str]) -> str:
    """Return the change of corpus perplexity, marked where it is ahead of contributions or behind.

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
            deltas = result.corpus[method][side].tolist()
            better: Sequence[str | None] = [None] * len(deltas)
            if method != PAPER:
                better = result.compare(PAPER, method, side, statistic="corpus").better
            for delta, ahead in zip(deltas, better, strict=True):
                mark = {method: f"**{_number(delta)}**", PAPER: f"{_number(delta)} -"}
                tie = _number(delta) if method == PAPER else f"{_number(delta)} ~"
                cells.append(tie if ahead is None else mark[ahead])
        rows.append([method, *cells])
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def normalised(result: FaithfulnessResult, shown: Sequence[str]) -> str:
    """Return where each score stands between the worst and the best order of each text.

    At each rate, 1 is the best of all scores for that text, and 0 the worst. Cells are means over
    rates and texts, with a 95% bootstrap interval over texts.
    """
    columns = {}
    generator = torch.Generator().manual_seed(0)
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
        of_texts = ((of_texts - low) / (high - low)).mean(-1)
        drawn = torch.randint(len(of_texts), (10_000, len(of_texts)), generator=generator)
        means = of_texts[drawn].mean(1)
        bounds = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
        columns[which] = [
            f"{mean:.2f} ({a:.2f} to {b:.2f})"
            for mean, a, b in zip(of_texts.mean(0).tolist(), *bounds.tolist(), strict=True)
        ]
    lines = ["| score | bottom | top |", "|---|---:|---:|"]
    rows = zip(shown, *columns.values(), strict=True)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _named(text: str) -> tuple[str, str]:
    name, _, data = text.partition("=")
    return name, data or name


def _without_folders(words: Sequence[str]) -> list[str]:
    """Return the words of a command without the folders of this machine."""
    kept, skips = [], False
    for word in words:
        if skips or word in ("--work", "--out"):
            skips = not skips
            continue
        name, equals, file = word.partition("=")
        last = Path(file if equals else name).name
        kept.append(f"{name}={last}" if equals else (last if word.startswith("/") else word))
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure which scores rank what a model can lose, and what it cannot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="a hub id or a local folder; without it, the demo model")
    add("--data", type=_named, action="append", required=True, help="NAME=FILE; can be repeated")
    add("--settings", default=",".join(SETTINGS), help="the ways to rank")
    add("--scores", help="only these scores, divided by semicolons")
    add("--length", type=int, default=128, help="the largest number of tokens of a text")
    add("--samples", type=int, default=32, help="number of documents, the last of each set")
    add("--batch-size", type=int, default=8, help="number of texts per pass")
    add("--threads", type=int, default=2, help="number of threads of torch")
    add("--work", type=Path, default=Path("ranking"), help="folder of unfinished runs")
    add("--out", type=Path, default=OUT, help="folder of the page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing evaluations, and write the page of one model."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    register_peers()
    model, tokenizer = load_model(options.model) if options.model else load_demo_model()
    name = (options.model or DEMO_MODEL).rstrip("/").rpartition("/")[2]
    chosen = {key: SETTINGS[key] for key in options.settings.split(",")}
    asked = None if options.scores is None else options.scores.split(";")
    pages = []
    with progress_bar(len(chosen) * len(options.data), "Settings", show=True) as bar:
        for data, source in options.data:
            batches = token_batches(
                load_texts(source)[-options.samples :],
                tokenizer,
                max_length=options.length,
                batch_size=options.batch_size,
            )
            for key, setting in chosen.items():
                bar.set_postfix_str(f"{data}, {key}")
                methods = {
                    label: make(model)
                    for label, make in setting.methods.items()
                    if asked is None or label in (PAPER, *asked)
                }
                metric = ComprehensivenessSufficiency(
                    model, RATES, scoring="clean", reduction="sum", **setting.options
                )
                folder = options.work / name / data
                folder.mkdir(parents=True, exist_ok=True)
                result = metric.evaluate(
                    methods, batches, target="logits", resume_from=folder / f"{key}.records"
                )
                pages.append(
                    f"## {data}: {setting.title.lower()}\n\n{table(result, list(methods))}\n\n"
                    f"Unchanged corpus perplexity {result.clean_corpus:.2f}, "
                    f"{len(result.records)} documents.\n\nBetween the worst order of each text (0) "
                    f"and the best (1):\n\n{normalised(result, list(methods))}"
                )
                bar.update()
    head = (
        f"# Which pairs can go: {name}\n\nResults of `python benchmarks/ranking.py "
        f"{shlex.join(_without_folders(argv))}` on Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; weights: {origin(model)}. "
        f"The last {options.samples} documents of each set, cut to {options.length} tokens. Cells "
        "are changes of corpus perplexity: with the bottom removed, lower is better; with the top "
        f"removed, higher is better. **Bold** cells are ahead of `{PAPER}` in the same column by a "
        "paired 95% interval over documents; `-` marks a cell that is behind, `~` a tie. All "
        "scores are summed over queries and taken in an unchanged pass, and sinks stay. Scores "
        "that need a target explain the sum of the logits of the text's own tokens."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    page = "\n\n".join([head, *pages]) + "\n"
    (options.out / f"ranking-{name}.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
