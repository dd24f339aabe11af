"""The report: one HTML file that needs no other, and the verdicts as JSON and CSV."""

from __future__ import annotations

import base64
import io
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from captum_cw._utils.files import write_json
from captum_cw._version import __version__
from captum_cw.reproduce.claims import CLAIMS, Claim, Judgement, judge
from captum_cw.reproduce.items import Item
from captum_cw.reproduce.printed import PAPER
from captum_cw.reproduce.study import Plan

__all__ = ["Done", "StudyResults", "write_report"]

VERSION = 1
LIBRARIES = ("torch", "transformers", "captum", "scikit-learn", "scipy")
#: Dots per inch of a picture in the page.
DPI = 90


@dataclass(frozen=True)
class Done:
    """An item that was run.

    Args:
        item: The item.
        result: What it found; None where it was refused.
        seconds: How long that took.
        refused: Why there is no result.
    """

    item: Item
    result: Any
    seconds: float
    refused: str = ""


@dataclass(frozen=True)
class StudyResults:
    """What was found of one model, and of which weights, on one set of texts."""

    model: str
    weights: str
    data: str
    plan: Plan
    items: Sequence[Done]

    def judgement(self, claim: Claim) -> Judgement:
        """The verdict on a claim."""
        found = {done.item.name: done.result for done in self.items if done.result is not None}
        return judge(claim, found)


def write_report(
    folder: Path, studies: Sequence[StudyResults], claims: Sequence[Claim] = CLAIMS
) -> list[Path]:
    """Writes ``report.html``, ``claims.json`` and ``claims.csv``.

    Returns:
        The files.
    """
    import pandas as pd
    from jinja2 import Environment, PackageLoader, StrictUndefined

    judged = [(claim, [study.judgement(claim) for study in studies]) for claim in claims]
    rows = [
        {"claim": claim.name, "model": study.model, "weights": study.weights, "data": study.data,
         "verdict": judgement.verdict, "figures": judgement.figures,
         "statement": claim.statement, "rule": claim.rule}
        for claim, judgements in judged
        for study, judgement in zip(studies, judgements, strict=True)
    ]  # fmt: skip
    files = [folder / name for name in ("report.html", "claims.json", "claims.csv")]
    environment = Environment(
        loader=PackageLoader("captum_cw.reproduce", "."), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        title="Contribution Weights, reproduced",
        paper=PAPER,
        stand_ins=_stand_ins(studies),
        versions=_versions(),
        seed=studies[0].plan.seed,
        studies=[_study(number, study) for number, study in enumerate(studies)],
        claims=[
            {"statement": claim.statement, "rule": claim.rule, "judgements": judgements}
            for claim, judgements in judged
        ],
    )
    files[0].write_text(page, encoding="utf-8")
    write_json(files[1], {"version": VERSION, "versions": _versions(), "claims": rows})
    pd.DataFrame(rows).to_csv(files[2], index=False)
    return files


def _stand_ins(studies: Sequence[StudyResults]) -> str:
    data = {study.data for study in studies}
    if any("fineweb" in name for name in data) or not any("wikitext" in name for name in data):
        return ""
    return "WikiText stands in for FineWeb-Edu, the paper's set of web texts."


def _versions() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"captum_cw {__version__}, {libraries}, Python {platform.python_version()}"


def _study(number: int, study: StudyResults) -> dict[str, Any]:
    plan = study.plan
    return {
        "anchor": f"study-{number}",
        "model": study.model,
        "weights": study.weights,
        "data": study.data,
        "plan": f"{plan.name}: {plan.texts} texts of up to {plan.length} tokens"
        f"{f', after the first {plan.skip}' if plan.skip else ''}; correlations "
        f"{_pair(plan.correlations)}, scaling {_pair(plan.scaling)}, removal {_pair(plan.removal)}",
        "time": _time(sum(done.seconds for done in study.items)),
        "contents": [_item(done) for done in study.items],
    }


def _pair(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def _item(done: Done) -> dict[str, Any]:
    item = done.item
    head = {
        "name": item.name,
        "title": item.title,
        "reading": item.reading,
        "refused": done.refused,
    }
    if done.result is None:
        return head
    table = item.table(item.name, done.result)
    return {
        **head,
        "columns": list(table.columns),
        "rows": [
            {"name": name, "cells": [_readable(x) for x in row]}
            for name, row in zip(table.index, table.to_numpy(), strict=True)
        ],
        "pictures": [
            {"caption": caption, "data": _picture(figure)}
            for caption, figure in item.pictures(done.result).items()
        ],
        "settings": _settings(done.result.settings),
        "time": f"It took {_time(done.seconds)}.",
    }


def _settings(settings: Mapping[str, Any]) -> str:
    """In a line; what takes a table of its own stays in the files."""
    # The model stands in the heading, by a name that means something elsewhere too.
    short = {n: x for n, x in settings.items() if not isinstance(x, Mapping) and n != "model"}
    return "; ".join(
        f"{name} {x}" for name, x in short.items() if x not in (None, []) and len(str(x)) <= 120
    )


def _readable(x: Any) -> str:
    if not isinstance(x, (int, float)):
        return str(x)
    if math.isnan(x):
        return ""
    if isinstance(x, float) and x.is_integer() and abs(x) >= 10:
        return f"{x:,.0f}"
    return f"{x:.3f}" if isinstance(x, float) and 0.001 <= abs(x) < 1000 else f"{x:.3g}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _picture(figure: Any) -> str:
    """As WebP without loss, which is half as large as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=DPI, pil_kwargs={"lossless": True})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
