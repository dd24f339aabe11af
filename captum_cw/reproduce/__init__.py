"""Reproduce every table and figure of the paper, on models and texts of your choice, in one report.

Each item of each study (a model on a set of texts) is saved as soon as it is finished. A run that
was stopped, or even killed, resumes and gives the same numbers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from captum_cw._utils.files import whole_file
from captum_cw._utils.records import Records, RecordsError
from captum_cw.capture import UnsupportedModelError
from captum_cw.models.loading import origin
from captum_cw.reproduce.items import ITEMS, Item
from captum_cw.reproduce.report import Done, StudyResults, write_report
from captum_cw.reproduce.study import PAPER_DATA, PAPER_MODELS, PAPER_TASKS, PLANS, Plan, Study

__all__ = [
    "ITEMS",
    "PAPER_DATA",
    "PAPER_MODELS",
    "PAPER_TASKS",
    "PLANS",
    "Plan",
    "Study",
    "StudyResults",
    "reproduce",
    "run_study",
]

Tell = Callable[[str], None]


def reproduce(
    studies: Iterable[Study],
    out: Path,
    *,
    only: Sequence[str] | None = None,
    tell: Tell = print,
) -> tuple[list[StudyResults], list[Path]]:
    """Run all items of all studies, and write the report.

    Args:
        studies: Studies of models with texts. They run one by one, so an iterator need hold only
            one model at a time.
        out: The output folder. It is created if needed.
        only: The names of the items to run; None runs all.
        tell: A function that is called with each progress message.

    Returns:
        The results, and the files of the report.

    Raises:
        RecordsError: If the folder holds another run.
        ValueError: If an item is unknown, or there are no studies.

    Example:
        >>> from captum_cw.reproduce import reproduce
        >>> reproduce([], getfixture("tmp_path"), only=["T9"])
        Traceback (most recent call last):
        ...
        ValueError: only='T9' is unknown; known: F1, F2, ...
    """
    for name in only or ():
        if name not in ITEMS:
            raise ValueError(f"only={name!r} is unknown; known: {', '.join(ITEMS)}.")
    chosen = list(ITEMS.values()) if only is None else [ITEMS[name] for name in only]
    results = []
    for study in studies:
        results.append(run_study(study, out, chosen, tell=tell))
        del study  # its model goes before the next one is loaded
    if not results:
        raise ValueError("studies is empty: give at least one model with texts.")
    return results, write_report(out, results)


#: What keeps an item from being computed: the model, the texts, a library, or data that is missing.
REFUSALS = (
    *(UnsupportedModelError, ValueError, IndexError, ImportError),
    *(FileNotFoundError, ConnectionError),
)


def run_study(
    study: Study, out: Path, items: Sequence[Item], *, tell: Tell = print
) -> StudyResults:
    """Run items of a study in its own folder, and save each as JSON and its tables as CSV.

    An item that cannot be computed is kept with the reason, and tried again in the next run.
    """
    folder = out / folder_name(study.model_name, study.data_name)
    identity = study.identity()
    done = []
    with Records(folder / "items.records", identity) as records:
        for item in items:
            file = folder / f"{item.name}.json"
            record = None if item.resumes else records.get(item.name)
            if record is None:
                tell(f"{study.model_name} on {study.data_name}: {item.name}, {item.title}")
                record = _run_item(item, study, folder, file)
                if record["refused"]:  # it is tried again in the next run
                    tell(f"{item.name} is not computed: {record['refused']}")
                elif not item.resumes:
                    records.update({item.name: record})
            result = None if record["refused"] else item.load(file)
            done.append(Done(item, result, record["seconds"], record["refused"]))
    weights = ", ".join(filter(None, (origin(study.model), f"checksum {identity['weights']}")))
    return StudyResults(study.model_name, weights, study.data_name, study.plan, done)


def _run_item(item: Item, study: Study, folder: Path, file: Path) -> dict[str, Any]:
    """Run and save one item, and return its record."""
    start = time.perf_counter()
    try:
        result = item.run(study, folder)
    except RecordsError:
        raise
    except REFUSALS as error:
        return {"seconds": time.perf_counter() - start, "refused": str(error)}
    result.save(file)
    tables = getattr(result, "tables", None) or {"": result.to_dataframe()}
    for name, table in tables.items():
        with whole_file(folder / f"{'-'.join(filter(None, (item.name, name)))}.csv") as whole:
            table.to_csv(whole, index=False)
    return {"seconds": time.perf_counter() - start, "refused": ""}


def folder_name(model: str, data: str) -> str:
    """Return the folder name for a model and texts.

    Example:
        >>> folder_name("meta-llama/Llama-3.1-8B", "gsm8k")
        'Llama-3.1-8B-gsm8k'
    """
    return re.sub(r"[^\w.-]+", "_", f"{model.rpartition('/')[2]}-{data.rpartition('/')[2]}")
