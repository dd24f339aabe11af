"""The terminal console."""

from __future__ import annotations

from rich.console import Console


class _Console(Console):
    """A console that leaves a reader that has gone to the one place that deals with it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """A console that prints text as it is, in tables and colours."""
    return _Console(highlight=False, markup=False)
