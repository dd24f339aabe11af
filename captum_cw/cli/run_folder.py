"""An evaluation in a folder, which can be resumed.

The folder contains ``run.records`` (every finished batch) and, at the end, ``result.json`` (read by
``FaithfulnessResult.load``), ``result.csv`` and figures of the curves. An evaluation on downstream
tasks writes ``tasks.records``, ``tasks.json``, ``tasks.csv`` and ``tasks.png``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from captum_cw._utils.processes import Processes
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.tasks import TaskResult
from captum_cw.visualization import save_figure


def evaluate_into(
    folder: Path,
    metric: ComprehensivenessSufficiency,
    methods: Mapping[str, object],
    batches: Iterable[Any],
    *,
    shard: bool = False,
    show_progress: bool = False,
) -> tuple[FaithfulnessResult, list[Path]]:
    """Evaluate methods, and save records, numbers and figures in a folder.

    Args:
        folder: The folder. It is created if needed; an unfinished run in it is resumed.
        metric: The metric.
        methods: The methods by name, as for ``metric.evaluate``.
        batches: The batches, as for ``metric.evaluate``.
        shard: Whether the processes of a distributed run share the batches.
        show_progress: Whether to show a progress bar.

    Returns:
        The result and the saved files. Only the main process saves files; in the others the list is
        empty.

    Raises:
        RecordsError: If the folder contains a run with other settings, which is not changed.
    """
    result = metric.evaluate(
        methods,
        batches,
        resume_from=folder / "run.records",
        shard=shard,
        show_progress=show_progress,
    )
    return result, save_result(result, folder) if Processes(several=shard).is_main else []


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
