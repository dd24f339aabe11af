"""The parts that scripts of results share: their options, their models, tables and pages."""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor

from captum_cw.data import load_texts, token_batches
from captum_cw.models.loading import DEMO_MODEL, load_demo_model, load_model
from captum_cw.visualization import save_figure

#: The folder of the pages.
OUT = Path(__file__).parent.parent / "docs" / "results"

#: The source that stands for the demo model.
DEMO = "demo"

#: The draws of a bootstrap interval.
RESAMPLES = 10_000


def mean_and_interval(values: Tensor) -> tuple[float, float, float]:
    """Return the mean of a row of numbers, and the bounds of its 95% bootstrap interval."""
    x = values.double()
    drawn = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    bounds = x[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = bounds.tolist()
    return float(x.mean()), low, high


Intervals = Mapping[str, tuple[float, float, float]]
"""Means with the bounds of their intervals, by score."""


def dots(
    panels: Mapping[str, Mapping[str, Intervals]],
    label: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw means and intervals, a row for each score that all have.

    Args:
        panels: By the title of a panel, and by what a colour stands for.
        label: What the numbers are.
        limits: The ends of the axis.
    """
    every = [of for colours in panels.values() for of in colours.values()]
    scores = [name for name in every[0] if all(name in of for of in every)]
    drawn = Figure(figsize=(9, 0.9 + 0.34 * len(scores)), layout="constrained")
    axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, colours) in zip(axes, panels.items(), strict=True):
        for n, (name, of) in enumerate(colours.items()):
            means, low, high = torch.tensor([of[score] for score in scores]).T
            rows = torch.arange(len(scores)) + 0.16 * (n - (len(colours) - 1) / 2)
            spread = torch.stack([means - low, high - means])
            axis.errorbar(means, rows, xerr=spread, fmt="o", ms=4, color=f"C{n}", label=name)
        axis.set(title=title, xlabel=label, xlim=limits)
        axis.set_yticks(range(len(scores)), scores)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def named(text: str) -> tuple[str, str]:
    """Return the name and the file of ``NAME=FILE``; a name alone stands for both."""
    name, _, data = text.partition("=")
    return name, data or name


def legend(reference: str, over: str) -> str:
    """Return what the marks of a table say, whose intervals are over texts or documents."""
    return (
        f"**Bold** cells are ahead of `{reference}` in the same column by a paired 95% interval "
        f"over {over}. A `-` marks a cell that is behind, and a `~` one whose interval holds zero."
    )


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
    model = "a hub id or a local folder; can be repeated; without it, the demo model"
    add("--model", action="append", metavar="M", help=f"{model}, as with '{DEMO}'")
    add("--data", type=named, action="append", required=True, help="NAME=FILE; can be repeated")
    add("--threads", type=int, default=2, help="number of threads of torch")
    add("--work", type=Path, default=Path(script), help="folder of unfinished runs")
    add("--out", type=Path, default=OUT, help="folder of the page")
    finished = "run nothing, and show what earlier runs have finished"
    add("--finished", action="store_true", help=finished)
    parser.set_defaults(commit=commit())
    return parser


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Add the options of documents that are cut to one length."""
    add = parser.add_argument
    add("--length", type=int, default=128, help="the largest number of tokens of a text")
    add("--samples", type=int, default=32, help="number of documents, the last of each set")
    add(
        "--batch-size",
        type=int,
        help="number of texts per pass; without it, 8, or 4 with more than 100,000 known tokens",
    )


def documents(file: str, tokenizer: Any, options: argparse.Namespace) -> list[Any]:
    """Return batches of the last documents of a set, or of the first with ``options.first``."""
    texts, count = load_texts(file), options.samples
    size = options.batch_size or (4 if len(tokenizer) > 100_000 else 8)
    return token_batches(
        texts[:count] if getattr(options, "first", False) else texts[-count:],
        tokenizer,
        max_length=options.length,
        batch_size=size,
    )


def loaded(source: str | None, threads: int) -> tuple[Any, Any, str]:
    """Return a model, its tokenizer and its name; without a source, the demo model."""
    torch.set_num_threads(threads)
    if source is None or source == DEMO:
        source, (model, tokenizer) = DEMO_MODEL, load_demo_model()
    else:
        model, tokenizer = load_model(source)
    model.requires_grad_(False)  # no gradient of a weight is needed
    return model, tokenizer, source.rstrip("/").rpartition("/")[2]


def made_by(script: str, argv: Sequence[str], commit: str, weights: Sequence[str]) -> str:
    """Return the sentence that says how a page was made.

    A run that was resumed has results of earlier commits too.
    """
    return (
        f"Results of `python benchmarks/{script}.py {shlex.join(without_folders(argv))}` at commit "
        f"{commit} on Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; weights: {', '.join(weights)}."
    )


def commit() -> str:
    """Return the short hash of the commit that runs, and whether files differ from it."""
    command = ["git", "-C", str(OUT), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    return "unknown"


def is_whole(records: Path, parts: int) -> bool:
    """Return whether there is a line for each part, after one that describes the run."""
    return records.exists() and records.read_text("utf-8").count("\n") == parts + 1


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure of a page, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def write_page(path: Path, parts: Sequence[str]) -> None:
    """Write a page of paragraphs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def sections_of(path: Path) -> dict[str, str]:
    """Return the sections of a page by their headings; what is above the first has none."""
    above, *found = path.read_text(encoding="utf-8").strip().split("\n## ")
    rest = (section.partition("\n\n") for section in found)
    return {"": above.strip(), **{heading: body.strip() for heading, _, body in rest}}


def part_of(path: Path, name: str) -> str:
    """Return the part of a page that :func:`fill_page` put there."""
    _, _, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    return rest.partition(f"<!-- end of {name} -->")[0].strip()


def fill_page(path: Path, title: str, parts: Mapping[str, str]) -> None:
    """Put parts between their marks in a page, and keep what is written around them.

    Args:
        path: The page. If there is none, it gets the parts alone.
        title: The title of a new page.
        parts: The parts by name.
    """
    marked = {name: (f"<!-- {name} -->", f"<!-- end of {name} -->") for name in parts}
    if not path.exists():
        write_page(path, [f"# {title}", *("\n\n".join(marks) for marks in marked.values())])
    page = path.read_text(encoding="utf-8")
    for name, (begin, end) in marked.items():
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{path} has no place for a part: add the lines {begin} and {end}.")
        page = f"{before}{begin}\n\n{parts[name]}\n\n{end}{after}"
    path.write_text(page, encoding="utf-8")
