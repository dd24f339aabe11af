"""Work in several threads, and the environment of processes that run the package."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

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


def process_environment(**settings: str) -> dict[str, str]:
    """Variables of a process that imports this repository's package, on one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
