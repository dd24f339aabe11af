"""The result of a command, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Args:
        document: The result for programs, which ``--json`` prints.
        show: A function that prints the result for people.
    """

    document: dict[str, Any]
    show: Callable[[], None]


def as_json(document: Mapping[str, Any]) -> str:
    """Return a document as one line of JSON. Numbers that are not finite become null.

    Example:
        >>> as_json({"scores": [0.5, float("nan")]})
        '{"scores": [0.5, null]}'
    """
    finite = json.loads(json.dumps(document), parse_constant=lambda constant: None)
    return json.dumps(finite)


def show_files(files: Iterable[object]) -> None:
    """List the saved files."""
    print("\nSaved:", *files, sep="\n  ")
