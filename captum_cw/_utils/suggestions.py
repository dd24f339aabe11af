"""Words of error messages: similar names, and what was given instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["kind", "suggestion"]


def kind(given: object) -> str:
    """Return what a value is, for "...", which is of another type or is a class.

    Example:
        >>> kind(1), kind(int)
        ('of type int', 'the class int, and not an instance of it')
    """
    if isinstance(given, type):
        return f"the class {given.__name__}, and not an instance of it"
    return f"of type {type(given).__name__}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the most similar known name; "" if none is similar.

    Example:
        >>> suggestion("atention", ["contribution", "attention"]), suggestion("xyz", ["vw"])
        (" Did you mean 'attention'?", '')
    """
    by_lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""
