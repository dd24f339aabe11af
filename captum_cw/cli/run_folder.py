"""An evaluation in a folder: it goes on where it stopped, and ends in a table and figures.

The folder holds ``run.records`` (every finished batch), and at the end ``result.json`` (read by
``FaithfulnessResult.load``), ``result.csv`` and the curves; of downstream tasks the same, as
``tasks.records``, ``tasks.json``, ``tasks.csv`` and ``tasks.png``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from captum_cw._utils.processes import Processes
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import Statistic
from captum_cw.metrics.tasks import TaskResult

__all__ = ["evaluate_into", "save_tasks"]


def evaluate_into(
    folder: Path,
    metric: ComprehensivenessSufficiency,
    methods: Mapping[str, object],
    batches: Iterable[Any],
    *,
    shard: bool = False,
    show_progress: bool = False,
) -> tuple[FaithfulnessResult, list[Path]]:
    """Evaluates ``methods`` and keeps everything in ``folder``.

    Args:
        folder: Made where there is none; an unfinished run of the same settings in it goes on.
        metric: The metric.
        methods: As for its ``evaluate``.
        batches: Likewise.
        shard: Likewise.
        show_progress: Likewise.

    Returns:
        The result, and the files that were written: none where another process writes them.

    Raises:
        RecordsError: If the folder holds another run; it is left as it is.
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
    """Writes the numbers and the figures of a result."""
    from captum_cw.visualization import save_figure

    files = [folder / "result.json", folder / "result.csv"]
    result.save(files[0])
    result.to_dataframe().to_csv(files[1], index=False)
    curves: dict[str, Statistic] = {"curves.png": "mean"}
    if result.settings["quantity"] == "perplexity":
        # The mean is ruled by the few texts that suffer most.
        curves |= {"curves_corpus.png": "corpus", "curves_nll.png": "nll"}
    for name, statistic in curves.items():
        figure, _ = result.plot(statistic=statistic, use_pyplot=False)
        save_figure(figure, folder / name)
        files.append(folder / name)
    return files


def save_tasks(result: TaskResult, folder: Path) -> list[Path]:
    """Writes the numbers and the figure of downstream tasks."""
    from captum_cw.visualization import save_figure

    files = [folder / f"tasks.{suffix}" for suffix in ("json", "csv", "png")]
    result.save(files[0])
    result.to_dataframe().to_csv(files[1], index=False)
    figure, _ = result.plot(use_pyplot=False)
    save_figure(figure, files[2])
    return files
