"""The files of a finished evaluation, in the folder that has the records of the run.

They are ``result.json`` (read by ``FaithfulnessResult.load``), ``result.csv``, the table
``result.md`` and figures of the curves; for downstream tasks ``tasks.json``, ``tasks.csv`` and
``tasks.png``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.tasks import TaskResult
from captum_cw.visualization import save_figure


def save_result(result: FaithfulnessResult | TaskResult, folder: Path) -> list[Path]:
    """Save the numbers and the figures of a result, and return the files."""
    name = "result"
    figures: dict[str, dict[str, Any]] = {"curves.png": {"statistic": "mean"}}
    if isinstance(result, TaskResult):
        name, figures = "tasks", {"tasks.png": {}}
    elif result.settings["quantity"] == "perplexity":
        # A few texts can dominate the mean perplexity.
        figures["curves_corpus.png"] = {"statistic": "corpus"}
        figures["curves_nll.png"] = {"statistic": "nll"}
    files = [folder / f"{name}.json", folder / f"{name}.csv", *(folder / file for file in figures)]
    result.save(files[0])
    result.to_dataframe().to_csv(files[1], index=False)
    if isinstance(result, FaithfulnessResult):
        files.append(folder / "result.md")
        files[-1].write_text(f"{result.to_markdown()}\n", encoding="utf-8")
    for file, options in figures.items():
        save_figure(result.plot(use_pyplot=False, **options)[0], folder / file)
    return files
