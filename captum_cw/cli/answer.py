"""The result of a command, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

__all__ = ["Answer", "as_json", "show_files"]


@dataclass(frozen=True)
class Answer:
    """What a command has found.

    Args:
        document: For machines, as JSON has it.
        show: Prints it for people.
    """

    document: dict[str, Any]
    show: Callable[[], None]


def as_json(document: Mapping[str, Any]) -> str:
    """A document in one line; numbers that JSON has not are null.

    Example:
        >>> as_json({"scores": [0.5, float("nan")]})
        '{"scores": [0.5, null]}'
    """
    return json.dumps(_finite(document), allow_nan=False)


def _finite(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _finite(y) for name, y in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(y) for y in x]
    return None if isinstance(x, float) and not isfinite(x) else x


def show_files(files: Iterable[object]) -> None:
    """Lists what was saved."""
    print("\nSaved:", *files, sep="\n  ")
