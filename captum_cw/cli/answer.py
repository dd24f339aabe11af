"""What a command has found, for people and for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

__all__ = ["Answer", "numbers", "show_files"]


@dataclass(frozen=True)
class Answer:
    """What a command has found.

    Args:
        document: For machines, as JSON has it.
        show: Prints it for people.
    """

    document: dict[str, Any]
    show: Callable[[], None]


def numbers(values: Iterable[float]) -> list[float | None]:
    """Numbers as JSON has them, None for those that it has not.

    Example:
        >>> numbers(torch.tensor([0.5, torch.nan]))
        [0.5, None]
    """
    return [x if isfinite(x) else None for x in map(float, values)]


def show_files(files: Iterable[object]) -> None:
    """Lists what was saved."""
    print("\nSaved:", *files, sep="\n  ")
