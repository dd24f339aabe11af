"""The report: a self-contained HTML file, and the verdicts as JSON and CSV."""

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
from captum_cw.reproduce.claims import CLAIMS, Claim, judge
from captum_cw.reproduce.items import Item
from captum_cw.reproduce.printed import PAPER
from captum_cw.reproduce.study import Plan
from captum_cw.reproduce.verdicts import Judgement

__all__ = ["Done", "StudyResults", "write_report"]

VERSION = 1
LIBRARIES = ("torch", "transformers", "captum", "scikit-learn", "scipy")
#: Dots per inch of the figures.
DPI = 90


@dataclass(frozen=True)
class Done:
    """The outcome of an item.

    Args:
        item: The item.
        result: Its result; None if it could not be computed.
        seconds: The run time.
        refused: Why there is no result.
    """

    item: Item
    result: Any
    seconds: float
    refused: str = ""


@dataclass(frozen=True)
class StudyResults:
    """The results of one model on one set of texts. ``weights`` identifies the weights."""

    model: str
    weights: str
    data: str
    plan: Plan
    items: Sequence[Done]

    def judgement(self, claim: Claim) -> Judgement:
        """Judge a claim by these results."""
        found = {done.item.name: done.result for done in self.items if done.result is not None}
        return judge(claim, found)


def write_report(
    folder: Path, studies: Sequence[StudyResults], claims: Sequence[Claim] = CLAIMS
) -> list[Path]:
    """Write ``report.html``, ``claims.json`` and ``claims.csv``.

    Returns:
        The files.
    """
    import pandas as pd
    from jinja2 import Environment, PackageLoader, StrictUndefined

    judged = [(claim, [study.judgement(claim) for study in studies]) for claim in claims]
    rows = [
        {
            "claim": claim.name,
            "model": study.model,
            "weights": study.weights,
            "data": study.data,
            **judgement._asdict(),
            "statement": claim.statement,
            "rule": claim.rule,
        }
        for claim, judgements in judged
        for study, judgement in zip(studies, judgements, strict=True)
    ]
    files = [folder / name for name in ("report.html", "claims.json", "claims.csv")]
    environment = Environment(
        loader=PackageLoader("captum_cw.reproduce", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title="Contribution Weights, reproduced",
        paper=PAPER,
        substitution=_substitution_note(studies),
        versions=_versions(),
        seed=studies[0].plan.seed,
        studies=[_study_context(number, study) for number, study in enumerate(studies)],
        claims=judged,
    )
    files[0].write_text(page, encoding="utf-8")
    write_json(files[1], {"version": VERSION, "versions": _versions(), "claims": rows})
    pd.DataFrame(rows).to_csv(files[2], index=False)
    return files


def _substitution_note(studies: Sequence[StudyResults]) -> str:
    """Return a note if the texts are a substitute for those of the paper."""
    data = {study.data for study in studies}
    if any("fineweb" in name for name in data) or not any("wikitext" in name for name in data):
        return ""
    return "WikiText replaces FineWeb-Edu, the web texts of the paper."


def _versions() -> str:
    """Return the versions of the libraries."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"captum_cw {__version__}, {libraries}, Python {platform.python_version()}"


def _study_context(number: int, study: StudyResults) -> dict[str, Any]:
    """Return the template variables of a study."""
    plan = study.plan
    return {
        "anchor": f"study-{number}",
        "model": study.model,
        "weights": study.weights,
        "data": study.data,
        "plan": f"{plan.name}: {plan.texts} texts of up to {plan.length} tokens"
        f"{f', after the first {plan.skip}' if plan.skip else ''}; correlations "
        f"{_format_size(plan.correlations)}, scaling {_format_size(plan.scaling)}, removal "
        f"{_format_size(plan.removal)}",
        "time": _format_time(sum(done.seconds for done in study.items)),
        "contents": [_item_context(done) for done in study.items],
    }


def _format_size(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def _item_context(done: Done) -> dict[str, Any]:
    """Return the template variables of an item."""
    item = done.item
    head = {name: getattr(item, name) for name in ("name", "title", "reading")}
    head["refused"] = done.refused
    if done.result is None:
        return head
    table = item.table(item.name, done.result)
    return {
        **head,
        "columns": list(table.columns),
        "rows": [
            {"name": name, "cells": [_format_cell(x) for x in row]}
            for name, row in zip(table.index, table.to_numpy(), strict=True)
        ],
        "pictures": [
            {"caption": caption, "data": _encode_figure(figure)}
            for caption, figure in item.pictures(done.result).items()
        ],
        "settings": _format_settings(done.result.settings),
        "time": f"Run time: {_format_time(done.seconds)}.",
    }


def _format_settings(settings: Mapping[str, Any]) -> str:
    """Return the short settings of a result, in one line."""
    # The heading already names the model. Nested settings are in the saved files.
    short = {n: x for n, x in settings.items() if not isinstance(x, Mapping) and n != "model"}
    return "; ".join(
        f"{name} {x}" for name, x in short.items() if x not in (None, []) and len(str(x)) <= 120
    )


def _format_cell(x: Any) -> str:
    """Format a table cell."""
    if not isinstance(x, (int, float)):
        return str(x)
    if math.isnan(x):
        return ""
    if isinstance(x, float) and x.is_integer() and abs(x) >= 10:
        return f"{x:,.0f}"
    return f"{x:.3f}" if isinstance(x, float) and 0.001 <= abs(x) < 1000 else f"{x:.3g}"


def _format_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _encode_figure(figure: Any) -> str:
    """Encode a figure as lossless WebP, which is half as large as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=DPI, pil_kwargs={"lossless": True})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
