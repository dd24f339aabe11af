"""The parts that scripts of results share: their options, their models, tables and pages."""

from __future__ import annotations

import argparse
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from captum_cw.models.loading import DEMO_MODEL, load_demo_model, load_model, origin

#: The folder of the pages.
OUT = Path(__file__).parent.parent / "docs" / "results"

#: The draws of a bootstrap interval.
RESAMPLES = 10_000


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, whose first column is text, and the others numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float) -> str:
    """Return a number with three digits, and a large one as a whole number."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def mean_and_interval(values: Tensor) -> tuple[float, float, float]:
    """Return the mean of a row of numbers, and the bounds of its 95% bootstrap interval."""
    x = values.double()
    drawn = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    bounds = x[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = bounds.tolist()
    return float(x.mean()), low, high


def named(text: str) -> tuple[str, str]:
    """Return the name and the file of ``NAME=FILE``; a name alone stands for both."""
    name, _, data = text.partition("=")
    return name, data or name


def without_folders(words: Sequence[str]) -> list[str]:
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


def parser_of(script: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all scripts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a hub id or a local folder; without it, the demo model")
    add("--data", type=named, action="append", required=True, help="NAME=FILE; can be repeated")
    add("--threads", type=int, default=2, help="number of threads of torch")
    add("--work", type=Path, default=Path(script), help="folder of unfinished runs")
    add("--out", type=Path, default=OUT, help="folder of the page")
    return parser


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Add the options of documents that are cut to one length."""
    add = parser.add_argument
    add("--length", type=int, default=128, help="the largest number of tokens of a text")
    add("--samples", type=int, default=32, help="number of documents, the last of each set")
    add("--batch-size", type=int, default=8, help="number of texts per pass")


def loaded(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """Return the model, its tokenizer and its name."""
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model) if options.model else load_demo_model()
    return model, tokenizer, (options.model or DEMO_MODEL).rstrip("/").rpartition("/")[2]


def made_by(script: str, argv: Sequence[str], model: Any) -> str:
    """Return the sentence that says how a page was made."""
    return (
        f"Results of `python benchmarks/{script}.py {shlex.join(without_folders(argv))}` on Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; weights: {origin(model)}."
    )


def write_page(path: Path, parts: Sequence[str]) -> None:
    """Write a page of paragraphs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
