"""The processes that share a run, under ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """All processes of a run, seen from one of them.

    Args:
        several: Whether to look for others; they talk through accelerate.

    Attributes:
        count: How many there are.
        index: Which of them this is; 0 is the one that writes files.
        device: Where a model of this process goes.
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
        """What ``work`` gives in each process, in their order, known to all of them.

        Raises:
            RuntimeError: If it fails in another process: no process waits for one that is gone.
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
        """What ``work`` gives in the main process, known to all; the others do not run it."""
        first: T | None = self.gathered(lambda: work() if self.is_main else None)[0]
        return first  # type: ignore[return-value]  # the main process has run it
