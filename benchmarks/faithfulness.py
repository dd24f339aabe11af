"""Measure how faithful the measures are on a real model, in all settings.

    python benchmarks/faithfulness.py --data gsm8k=FILE --data wikitext=FILE

Each setting is a separate evaluation in its own folder, as with ``captum-cw evaluate``, so a run
that was stopped can be resumed. The result is a page of tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pages import loaded, made_by, parser_of, write_page

from captum_cw import measures
from captum_cw._utils.progress import progress_bar
from captum_cw.cli.run_folder import save_result
from captum_cw.data import load_texts, token_batches
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import COMPARABLE, REMOVED, Side
from captum_cw.metrics.tables import in_markdown, number
from captum_cw.models.loading import origin
from captum_cw.removal.ranking import Which

RATES: dict[Which, Sequence[float]] = {"top": (0.1, 0.3, 0.5), "bottom": (0.3, 0.5, 0.7, 0.9)}
MEASURES = (*measures.names(), measures.RANDOM)
CONTROLS = tuple(entry.name for entry in measures.entries(controls=True) if entry.control)


@dataclass(frozen=True)
class Setting:
    """One evaluation.

    Args:
        title: The title of its tables.
        options: Arguments of the metric.
        methods: The methods to compare.
    """

    title: str
    options: dict[str, Any]
    methods: Sequence[str] = MEASURES


SETTINGS = {
    "online-mean": Setting("Online scoring, mean", {}),
    "online-sum": Setting("Online scoring, sum", {"reduction": "sum"}),
    "clean-mean": Setting("Clean scoring, mean", {"scoring": "clean"}),
    "clean-sum": Setting("Clean scoring, sum", {"scoring": "clean", "reduction": "sum"}),
    "clean-max": Setting("Clean scoring, max", {"scoring": "clean", "reduction": "max"}),
    "clean-rms": Setting("Clean scoring, rms", {"scoring": "clean", "reduction": "rms"}),
    "global-mean": Setting("All layers ranked jointly", {"scoring": "clean", "ranking": "global"}),
    "head-mean": Setting("Each head ranked alone", {"scoring": "clean", "ranking": "head"}),
    "sinks-mean": Setting("Sinks may be removed", {"scoring": "clean", "protect_sinks": False}),
    "tokens-mean": Setting("Whole tokens, mean", {"scoring": "clean", "granularity": "token"}),
    "tokens-sum": Setting(
        "Whole tokens, sum", {"scoring": "clean", "granularity": "token", "reduction": "sum"}
    ),
    "controls-mean": Setting(
        "Controls, clean scoring, mean",
        {"scoring": "clean"},
        ("contribution", "vwon", *CONTROLS),
    ),
}


def tables(result: FaithfulnessResult) -> str:
    """Return tables of corpus perplexity, which a few texts do not dominate, with intervals."""
    parts = []
    sides: dict[Side, str] = {"sufficiency": "bottom", "comprehensiveness": "top"}
    corpus = result.corpus
    for side, name in sides.items():
        rates = result.rates[REMOVED[side]]
        heads = ["method", *(f"{name} {100 * rate:g}%" for rate in rates)]
        rows = [[method, *map(number, corpus[method][side].tolist())] for method in result.methods]
        parts.append(in_markdown(heads, rows))
    if len(result.records) < COMPARABLE:
        return "\n\n".join([*parts, "One text does not give an interval."])
    first = result.methods[0]
    rows = []
    for other in result.methods[1:]:
        compared = result.compare(first, other, statistic="corpus")
        cells = [
            f"{number(d)} ({number(low)} to {number(high)})"
            for d, low, high in zip(
                compared.difference.tolist(),
                compared.low.tolist(),
                compared.high.tolist(),
                strict=True,
            )
        ]
        rows.append([f"{first} - {other}", *cells])
    heads = ["paired 95% interval", *(f"bottom {100 * r:g}%" for r in result.rates["bottom"])]
    parts.append(in_markdown(heads, rows))
    return "\n\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    text = "Measure how faithful the measures are on a real model, in all settings."
    parser = parser_of("faithfulness", text)
    add = parser.add_argument
    add("--settings", default=",".join(SETTINGS), help="the settings to run")
    add("--length", type=int, default=128, help="number of tokens of each packed text")
    add("--samples", type=int, default=16, help="number of texts")
    add("--batch-size", type=int, default=8, help="number of texts per pass")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing evaluations, and write the page."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    if len(options.model or []) > 1:
        parser.error("a page is of one model: give --model once")
    model, tokenizer, name = loaded((options.model or [None])[0], options.threads)
    pages = []
    chosen = options.settings.split(",")
    with progress_bar(len(chosen) * len(options.data), "Settings", show=True) as bar:
        for data, source in options.data:
            batches = token_batches(
                load_texts(source),
                tokenizer,
                max_length=options.length,
                num_examples=options.samples,
                batch_size=options.batch_size,
                pack=True,
            )
            clean = ""
            for key in chosen:
                setting = SETTINGS[key]
                bar.set_postfix_str(f"{data}, {key}")
                metric = ComprehensivenessSufficiency(model, RATES, **setting.options)
                folder = options.work / name / data / key
                methods = {method: method for method in setting.methods}
                result = metric.evaluate(methods, batches, resume_from=folder / "run.records")
                save_result(result, folder)
                if not clean:
                    clean = f"Unchanged: corpus perplexity {result.clean_corpus:.2f}."
                    pages.append(f"## {data}\n\n{clean}")
                pages.append(f"### {data}: {setting.title}\n\n{tables(result)}")
                bar.update()
    head = (
        f"# Faithfulness: {name}\n\n"
        f"{made_by('faithfulness', argv, options.commit, [origin(model)])} "
        f"{options.samples} texts of {options.length} tokens, packed. The tables show the change "
        "of corpus perplexity. "
        "With the top removed, higher is better; with the bottom removed, lower is better. Unless "
        "a title says otherwise, sinks are protected and pairs are ranked within each layer. "
        "`contribution-residual` differs from "
        "`contribution` only in models with a norm between attention and the residual stream."
    )
    write_page(options.out / f"{name}.md", [head, *pages])
    return 0


if __name__ == "__main__":
    sys.exit(main())
