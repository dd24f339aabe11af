"""The terminal console."""

from __future__ import annotations

from rich.console import Console


class _Console(Console):
    """A console that raises an error if the reader is gone; ``main`` handles it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Return a console that prints text as it is, in tables and colours."""
    return _Console(highlight=False, markup=False)
