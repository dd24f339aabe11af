"""The accuracy of tasks by method and rate: numbers, table, plot and file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_cw._utils.files import read_json, write_json
from captum_cw.metrics.result import curve_styles
from captum_cw.metrics.tables import Cell, in_text, number, percent

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Score", "TaskResult"]

VERSION = 1

#: Half the width of a 95 % interval, in standard errors of a normal distribution.
INTERVAL = 1.96


class Score(NamedTuple):
    """A metric of a task and its standard error; NaN if the harness computes none.

    Example:
        >>> Score(0.75, 0.05).value
        0.75
    """

    value: float
    stderr: float


@dataclass(frozen=True)
class TaskResult:
    """The accuracy of tasks: of the unchanged model, and by method and rate of removal.

    The accuracy of a task is the first of its metrics that is better if higher, with the first of
    its filters. The other metrics are in ``records`` and :meth:`to_dataframe`.

    Attributes:
        rates: the removed fractions.
        settings: the settings, models and versions that the numbers depend on.
        records: by task, a mapping with the name of its ``metric``, the number of its
            ``documents``, the metrics of the unchanged model (``baseline``), and by method the
            metrics at each rate (``removed``). Each metric is a pair of its value and its standard
            error, which is None if the harness computes none.

    Example:
        >>> removed = {"contribution": [{"acc,none": [0.7, 0.1]}, {"acc,none": [0.4, 0.1]}]}
        >>> baseline = {"acc,none": [0.75, 0.1]}
        >>> quiz = {"metric": "acc,none", "documents": 20, "baseline": baseline, "removed": removed}
        >>> result = TaskResult((0.3, 0.5), {}, {"quiz": quiz})
        >>> result.largest_rate("quiz", "contribution")
        0.3
        >>> print(str(result).partition("+ above")[0].rstrip())
        quiz: acc,none, bottom removed (documents: 20)
        0.75 with nothing removed, standard error 0.1
             contribution
        30%         0.7 ~
        50%         0.4 -
        largest rate: contribution 30%
    """

    rates: tuple[float, ...]
    settings: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self.records)

    @property
    def methods(self) -> list[str]:
        """The names of the methods."""
        return list(next(iter(self.records.values()))["removed"])

    @property
    def metric(self) -> dict[str, str]:
        """By task, the metric that counts as accuracy, with the harness's name of its filter."""
        return {task: record["metric"] for task, record in self.records.items()}

    @property
    def documents(self) -> dict[str, int]:
        """By task, the number of documents."""
        return {task: record["documents"] for task, record in self.records.items()}

    @property
    def baseline(self) -> dict[str, Score]:
        """By task, the accuracy of the unchanged model."""
        return {
            task: _score(record["baseline"], record["metric"])
            for task, record in self.records.items()
        }

    @property
    def scores(self) -> dict[str, dict[str, Tensor]]:
        """By task and method, the accuracy ``(rates,)``."""
        return {
            task: {
                method: torch.tensor(
                    [_score(metrics, record["metric"]).value for metrics in by_rate],
                    dtype=torch.float64,
                    device="cpu",
                )
                for method, by_rate in record["removed"].items()
            }
            for task, record in self.records.items()
        }

    def has_interval(self, task: str) -> bool:
        """Return whether the accuracy of the unchanged model has a standard error."""
        return not isnan(self.baseline[task].stderr)

    def largest_rate(self, task: str, method: str) -> float | None:
        """Return the largest rate whose accuracy is not below the baseline's 95 % interval.

        The interval ends 1.96 standard errors below the baseline. Accuracies go up and down by
        chance, so the accuracy at a smaller rate can be below the interval.

        Args:
            task: the name of a task.
            method: the name of a method.

        Returns:
            The rate; None if the accuracy is below the interval at every rate.

        Raises:
            KeyError: If the task or method was not evaluated.
            ValueError: If the baseline has no standard error.
        """
        if task not in self.records or method not in self.methods:
            raise KeyError(
                f"{task!r} with {method!r} was not evaluated; there are tasks "
                f"{', '.join(self.tasks)} and methods {', '.join(self.methods)}."
            )
        value, stderr = self.baseline[task]
        if not self.has_interval(task):
            raise ValueError(
                f"Task {task!r} has no standard error of {self.metric[task]!r} for "
                f"{self.documents[task]} documents: use more documents, or another task."
            )
        scores = zip(self.rates, self.scores[task][method].tolist(), strict=True)
        lowest = value - INTERVAL * stderr
        return max((rate for rate, score in scores if score >= lowest), default=None)

    def __str__(self) -> str:
        """A table for each task, with a row for each rate, and a mark at each cell."""
        legend = (
            "+ above, - below, ~ within the 95% interval of the unchanged model.\n"
            "The largest rate is the last one that is not below it."
        )
        known = any(map(self.has_interval, self.tasks))
        return "\n\n".join([*map(self._as_text, self.tasks), *([legend] if known else [])])

    def _as_text(self, task: str) -> str:
        value, stderr = self.baseline[task]
        known = self.has_interval(task)

        def cell(x: float) -> Cell:
            if not known or isnan(x):
                return Cell(x, None)
            near = abs(x - value) <= INTERVAL * stderr
            return Cell(x, "undecided" if near else "better" if x > value else "worse")

        columns = {name: [cell(x) for x in of.tolist()] for name, of in self.scores[task].items()}
        error = f", standard error {number(stderr)}" if known else ""
        parts = [
            f"{task}: {self.metric[task]}, bottom removed (documents: {self.documents[task]})",
            f"{number(value)} with nothing removed{error}",
            in_text([percent(rate) for rate in self.rates], columns),
        ]
        if known:
            largest = {name: self.largest_rate(task, name) for name in self.methods}
            named = (f"{m} {'none' if x is None else percent(x)}" for m, x in largest.items())
            parts.append(f"largest rate: {', '.join(named)}")
        return "\n".join(parts)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row for each task, metric, method and rate (needs pandas)."""
        import pandas as pd

        rows = []
        for task, record in self.records.items():
            for metric, method in product(record["baseline"], self.methods):
                baseline = _score(record["baseline"], metric)
                for rate, metrics in zip(self.rates, record["removed"][method], strict=True):
                    row = {
                        "task": task,
                        "metric": metric,
                        "is_accuracy": metric == record["metric"],
                    }
                    row |= {"method": method, "rate": rate, **_score(metrics, metric)._asdict()}
                    row |= {"baseline": baseline.value, "baseline_stderr": baseline.stderr}
                    rows.append({**row, "documents": record["documents"]})
        return pd.DataFrame(rows)

    def plot(self, *, use_pyplot: bool = True) -> tuple[Figure, npt.NDArray[Any]]:
        """Plot the accuracy of each task against the removed fraction (Fig. 4).

        Args:
            use_pyplot: whether to make a pyplot figure, which notebooks show.

        Returns:
            The figure and its axes, one per task. The baseline's 95 % interval is shaded.
        """
        from captum_cw.visualization.curves import plot_curves

        titles = {task: f"{task} ({name.partition(',')[0]})" for task, name in self.metric.items()}
        baselines = {task: (x.value, INTERVAL * x.stderr) for task, x in self.baseline.items()}
        return plot_curves(
            {titles[task]: curves for task, curves in self.scores.items()},
            dict.fromkeys(titles.values(), self.rates),
            ylabel="accuracy",
            log=False,
            styles=curve_styles(self.methods, self.settings),
            baselines={titles[task]: baseline for task, baseline in baselines.items()},
            use_pyplot=use_pyplot,
        )

    def save(self, path: str | Path) -> None:
        """Write the result as JSON. Floats are exact."""
        content = {"task_rates": self.rates, "settings": self.settings, "records": self.records}
        write_json(path, {"version": VERSION, **content})

    @classmethod
    def load(cls, path: str | Path) -> TaskResult:
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: If the file is not such a result, or has an unknown version.
        """
        content = read_json(path, VERSION, "task_rates")
        return cls(tuple(content["task_rates"]), content["settings"], content["records"])


def _score(metrics: Mapping[str, Sequence[Any]], name: str) -> Score:
    value, stderr = metrics[name]
    return Score(value, nan if stderr is None else stderr)
