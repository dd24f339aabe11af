"""``captum-cw reproduce``: the paper's tables and figures in one report."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from captum_cw._utils.extras import imported
from captum_cw.cli import choices
from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.console import console
from captum_cw.cli.output import check_generates_text, load
from captum_cw.data import load_texts
from captum_cw.reproduce import (
    PAPER_DATA,
    PAPER_MODELS,
    PAPER_TASKS,
    PLANS,
    Study,
    StudyResults,
    reproduce,
)
from captum_cw.reproduce.claims import CLAIMS


def run(options: Namespace) -> Answer:
    """Run the items of all studies, and write the report."""
    plan = PLANS["quick" if options.quick else options.preset]
    plan = plan.resized(options.samples, options.length, options.documents)
    plan = replace(plan, skip=options.skip, seed=options.seed)
    paper = plan.name == "paper"
    models = options.model or (PAPER_MODELS if paper else ())
    data = options.data or (PAPER_DATA if paper else ())
    tasks = options.tasks or (PAPER_TASKS if paper else ())
    if not models or not data:
        options.parser.error("give --model and --data, or --preset paper, which chooses both")
    for library in ("datasets", "pandas", "scipy", "sklearn"):
        imported(library, "analysis")
    if tasks and "F4" in (options.only or choices.ITEMS):
        imported("lm_eval", "tasks")
    _check_names("--model", models)
    _check_names("--data", data)
    # Texts are loaded before models, because a failure is then quick.
    texts = {name: load_texts(name, samples=plan.needed, lines=options.lines) for name in data}

    def studies() -> Iterator[Study]:
        for name in models:
            model, tokenizer = load(options, name)
            advice = "the paper measures perplexity, so give causal language models"
            check_generates_text(model, advice)
            for number, of in enumerate(texts):
                # Tasks do not depend on the texts, so they run once for each model.
                once = () if number else tasks
                names = _short_name(name), _short_name(of)
                yield Study(model, tokenizer, texts[of], *names, plan, once, options.task_path)
            del model, tokenizer  # before the next ones are loaded

    tell = partial(print, file=sys.stderr)
    results, files = reproduce(studies(), options.out, only=options.only, tell=tell)

    def show() -> None:
        for study in results:
            _show_claims(study)
        show_files(files)

    document = {
        "studies": [_document(study) for study in results],
        "files": [str(file) for file in files],
    }
    return Answer(document, show)


def _short_name(name: str) -> str:
    """Return the name of a file or folder without its path, and the whole name on the hub."""
    path = Path(name)
    return name if not path.exists() else path.name if path.is_dir() else path.stem


def _check_names(option: str, names: Sequence[str]) -> None:
    """Raise a ValueError if two models, or two sets of texts, would have one folder."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(_short_name(name), name)
        if other != name:
            raise ValueError(
                f"{option} {other} and {name} have the same name in the report: rename one of them."
            )


def _document(study: StudyResults) -> dict[str, Any]:
    return {
        "model": study.model,
        "data": study.data,
        "items": [
            {"name": done.item.name, "title": done.item.title, "refused": done.refused or None}
            for done in study.items
        ],
        "claims": [{"name": claim.name, **study.judgement(claim)._asdict()} for claim in CLAIMS],
    }


def _show_claims(study: StudyResults) -> None:
    out = console()
    table = Table("claim", "verdict", "figures")
    for claim in CLAIMS:
        judgement = study.judgement(claim)
        if judgement.verdict != "not run":
            table.add_row(claim.name, *judgement)
    out.print(f"\n{study.model} on {study.data}")
    out.print(table)
