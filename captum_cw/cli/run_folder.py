"""The files of a finished evaluation, in the folder that has the records of the run.

They are ``result.json`` (read by ``FaithfulnessResult.load``), ``result.csv`` and figures of the
curves; for downstream tasks ``tasks.json``, ``tasks.csv`` and ``tasks.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.tasks import TaskResult
from captum_cw.visualization import save_figure


def save_result(result: FaithfulnessResult, folder: Path) -> list[Path]:
    """Save the numbers and the curves of a result, and return the files."""
    curves = {"curves.png": {"statistic": "mean"}}
    if result.settings["quantity"] == "perplexity":
        # A few texts can dominate the mean perplexity.
        curves["curves_corpus.png"] = {"statistic": "corpus"}
        curves["curves_nll.png"] = {"statistic": "nll"}
    return _save(result, folder, "result", curves)


def save_tasks(result: TaskResult, folder: Path) -> list[Path]:
    """Save the numbers and the figure of downstream tasks, and return the files."""
    return _save(result, folder, "tasks", {"tasks.png": {}})


def _save(
    result: FaithfulnessResult | TaskResult,
    folder: Path,
    name: str,
    figures: Mapping[str, Mapping[str, Any]],
) -> list[Path]:
    """Save ``name.json``, ``name.csv``, and the figures by file, each with its plot options."""
    files = [folder / f"{name}.json", folder / f"{name}.csv", *(folder / file for file in figures)]
    result.save(files[0])
    result.to_dataframe().to_csv(files[1], index=False)
    for file, options in figures.items():
        save_figure(result.plot(use_pyplot=False, **options)[0], folder / file)
    return files
