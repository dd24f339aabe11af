"""The report: a self-contained HTML file, and the verdicts as CSV."""

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

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from captum_cw._utils.files import whole_file
from captum_cw._version import __version__
from captum_cw.reproduce.claims import CLAIMS, Claim, judge
from captum_cw.reproduce.items import Item
from captum_cw.reproduce.printed import PAPER
from captum_cw.reproduce.study import Plan
from captum_cw.reproduce.verdicts import Judgement

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
        results = {done.item.name: done.result for done in self.items if done.result is not None}
        return judge(claim, results)


def write_report(folder: Path, studies: Sequence[StudyResults]) -> list[Path]:
    """Write ``report.html`` and ``claims.csv``.

    Returns:
        The files.
    """
    judged = [(claim, [study.judgement(claim) for study in studies]) for claim in CLAIMS]
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
    files = [folder / name for name in ("report.html", "claims.csv")]
    page = _template().render(paper=PAPER, versions=_versions(), studies=studies, claims=judged)
    with whole_file(files[0]) as whole:
        whole.write_text(page, encoding="utf-8")
    with whole_file(files[1]) as whole:
        pd.DataFrame(rows).to_csv(whole, index=False)
    return files


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("captum_cw.reproduce", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": _format_cell,
        "image": _encode_figure,
        "settings": _format_settings,
        "duration": _format_seconds,
    }
    return environment.get_template("report.html.jinja")


def _versions() -> str:
    """Return the versions of the libraries."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"captum_cw {__version__}, {libraries}, Python {platform.python_version()}"


def _format_settings(settings: Mapping[str, Any]) -> str:
    """Return the short settings of a result, in one line."""
    # The heading already names the model. Nested settings are in the saved files.
    short = {n: x for n, x in settings.items() if not isinstance(x, Mapping) and n != "model"}
    return "; ".join(
        f"{name} {x}" for name, x in short.items() if x not in (None, []) and len(str(x)) <= 120
    )


def _format_cell(x: Any) -> str:
    """Return the text of a table cell."""
    if not isinstance(x, float):
        return str(x)
    if math.isnan(x):
        return ""
    if x.is_integer() and abs(x) >= 10:
        return f"{x:,.0f}"
    return f"{x:.3f}" if 0.001 <= abs(x) < 1000 else f"{x:.3g}"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _encode_figure(figure: Any) -> str:
    """Encode a figure as lossless WebP, which is half as large as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=DPI, pil_kwargs={"lossless": True})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
