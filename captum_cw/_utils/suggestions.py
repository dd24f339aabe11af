"""Names like one that is not known, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

__all__ = ["suggestion", "suggestion_of_path"]


def suggestion(name: str, known: Iterable[str]) -> str:
    """A question that ends a message: which known name is meant; empty if none is like it.

    Example:
        >>> suggestion("atention", ["contribution", "attention"]), suggestion("xyz", ["vw"])
        (" Did you mean 'attention'?", '')
    """
    by_lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def suggestion_of_path(path: Path, others: Iterable[str] = ()) -> str:
    """The same for a file or folder that is not there, among what lies where it should.

    Args:
        path: What is not there.
        others: Names that may be meant as well.
    """
    try:
        beside = [str(path.parent / other.name) for other in path.parent.iterdir()]
    except OSError:
        beside = []
    return suggestion(str(path), [*beside, *others])
