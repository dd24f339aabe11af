"""Suggestions of similar names, for error messages about unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["suggestion"]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the most similar known name; "" if none is similar.

    Example:
        >>> suggestion("atention", ["contribution", "attention"]), suggestion("xyz", ["vw"])
        (" Did you mean 'attention'?", '')
    """
    by_lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""
