"""The processes of one run under ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """All processes of a run, from the view of one process.

    Args:
        several: Whether to look for other processes. They communicate through accelerate.

    Attributes:
        count: The number of processes.
        index: The index of this process. Process 0 writes files.
        device: The device for the model of this process.
    """

    def __init__(self, several: bool = True) -> None:
        self.count, self.index = 1, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            self.count, self.index = state.num_processes, state.process_index
            self.device = state.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` in each process, and return the results of all, in the order of processes.

        Raises:
            RuntimeError: If ``work`` fails in another process, so that no process waits forever.
        """
        if self.count == 1:
            return [work()]
        from accelerate.utils import gather_object

        try:
            mine = work()
        except Exception as error:
            gather_object([(None, f"{type(error).__name__}: {error}")])
            raise
        found: list[tuple[T, str | None]] = gather_object([(mine, None)])
        for index, (_, message) in enumerate(found):
            if message is not None:
                raise RuntimeError(f"Process {index} failed: {message}")
        return [result for result, _ in found]

    def from_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the main process only, and return its result in all processes."""
        first: T | None = self.gathered(lambda: work() if self.is_main else None)[0]
        return first  # type: ignore[return-value]  # the main process has run it
