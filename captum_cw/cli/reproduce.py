"""``captum-cw reproduce``: every table and figure of the paper, in one report."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.console import console
from captum_cw.cli.output import load, predicted_by
from captum_cw.cli.problems import need
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
    """Runs the items of all studies, and writes the report."""
    plan = PLANS["quick" if options.quick else options.preset]
    plan = plan.resized(options.samples, options.length, options.documents)
    plan = replace(plan, skip=options.skip, seed=options.seed)
    paper = plan.name == "paper"
    models = options.model or (PAPER_MODELS if paper else ())
    data = options.data or (PAPER_DATA if paper else ())
    if not models or not data:
        options.parser.error("give --model and --data, or --preset paper, which brings its own")
    need("datasets", "jinja2", "pandas", "scipy", "sklearn", *["lm_eval"] * bool(options.tasks))
    # First, since that fails quickly.
    texts = {name: load_texts(name, samples=plan.needed) for name in data}

    def studies() -> Iterator[Study]:
        for name in models:
            model, tokenizer = load(options, name)
            if not model.can_generate():
                raise ValueError(
                    f"{name!r} is a {type(model).__name__}, which predicts {predicted_by(model)}: "
                    "give causal language models, whose perplexity the paper measures. For others, "
                    "captum-cw evaluate has other metrics."
                )
            asked = options.tasks or (PAPER_TASKS if paper else ())
            for of, several in texts.items():
                named = _called(name), _called(of)
                yield Study(model, tokenizer, several, *named, plan, asked, options.task_path)
                asked = ()  # they are the same beside other texts

    tell = partial(print, file=sys.stderr)
    found, files = reproduce(studies(), options.out, only=options.only, tell=tell)

    def show() -> None:
        for study in found:
            _show_claims(study)
        show_files(files)

    document = {
        "studies": [_document(study) for study in found],
        "files": [str(file) for file in files],
    }
    return Answer(document, show)


def _called(name: str) -> str:
    """A file or folder by its own name, since its place means nothing to a reader."""
    path = Path(name)
    return path.stem if path.exists() else name


def _document(study: StudyResults) -> dict[str, Any]:
    judged = [(claim, study.judgement(claim)) for claim in CLAIMS]
    return {
        "model": study.model,
        "data": study.data,
        "items": [
            {"name": done.item.name, "title": done.item.title, "refused": done.refused or None}
            for done in study.items
        ],
        "claims": [
            {"name": claim.name, "verdict": found.verdict, "figures": found.figures}
            for claim, found in judged
        ],
    }


def _show_claims(study: StudyResults) -> None:
    out = console()
    table = Table("claim", "verdict", "figures")
    for claim in CLAIMS:
        judgement = study.judgement(claim)
        if judgement.verdict != "not run":
            table.add_row(claim.name, judgement.verdict, judgement.figures)
    out.print(f"\n{study.model} on {study.data}")
    out.print(table)
