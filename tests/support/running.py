"""Work in several threads or with little memory, and the environment of other processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from captum_cw.capture import recomputing
from support.paths import ROOT


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs ``work(0)``, ``work(1)``, ... at the same time; fails if one of them does."""
    wrong: list[str] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:  # a thread's errors would be lost
            wrong.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


@contextmanager
def short_of_memory() -> Iterator[None]:
    """Lets the blocks of a model run again in the backward pass; fails if none of them does."""
    again: list[object] = []
    checkpoint = recomputing.checkpoint

    def counted(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again.append(run)
        return checkpoint(run, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputing, "SHARE", 0.0)
        patch.setattr(recomputing, "checkpoint", counted)
        yield
    assert again, "no block ran again"


def process_environment(**settings: str) -> dict[str, str]:
    """Variables of a process that imports this repository's package, on one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
