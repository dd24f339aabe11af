"""Tables of learned positions: where they end, a text is too long for the model.

A table is known by what it is asked: consecutive rows, one a token. How many rows a configuration
promises does not count: RoBERTa's table begins at its third row, and rotary models have no table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.dispatch import Proceed, following

__all__ = ["check_positions", "longest_text", "too_long"]

#: The largest row at which tables begin: RoBERTa's and OPT's begin behind rows for padding.
OFFSET = 4


def check_positions(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises a ValueError where a model looks up positions beyond the end of their table.

    Args:
        func: What the model calls. Only an embedding, :func:`torch.gather` and an index look
            things up.
        args: The positional arguments.
        kwargs: The keyword arguments.
    """
    found = _lookup(func, args, kwargs)
    if found is None or int(found.rows.max()) < found.size:
        return
    run = found.run()
    if run is not None:
        first, length = run
        # A text that goes on, after a cache or by given positions, begins before its first row.
        offset = first if first <= OFFSET else 0
        raise ValueError(too_long(first + length - offset, found.size - offset))


def too_long(length: int, limit: int) -> str:
    """The message for a text that is longer than the table of positions."""
    return (
        f"The text has {length} tokens, but the model's table of positions ends after {limit}: cut "
        f"the text (truncation=True, max_length={limit}) or use a model with a longer context."
    )


def longest_text(run: Callable[[], Any]) -> int | None:
    """How many tokens fit the model's tables of positions, by a pass over a short text.

    Args:
        run: Runs the model on a text of a few tokens.

    Returns:
        The number; None where the model looks nothing up.
    """
    lookups = _Lookups()
    with following(lookups):
        run()
    return min(lookups.limits, default=None)


class _Lookups:
    """Notes for each table of positions how long a text may be."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        found = _lookup(func, args, kwargs)
        run = None if found is None else found.run()
        if found is not None and run is not None:
            self.limits.append(found.size - run[0])
        return proceed(func, args, kwargs)


@dataclass(frozen=True)
class _Lookup:
    """That a model looks up rows of a table.

    Args:
        rows: The rows, ``(B, T)`` or ``(T,)``.
        size: How many rows the table has.
        padding: The row of padding; None where the call does not name it.
    """

    rows: Tensor
    size: int
    padding: int | None

    def run(self) -> tuple[int, int] | None:
        """The first row and how many follow one another; None if they are not consecutive."""
        rows = self.rows
        row = rows if rows.dim() == 1 else rows[rows.amax(-1).argmax()]
        if self.padding is not None:
            row = row[row != self.padding]
        values, counts = torch.unique(row, return_counts=True)
        if len(counts) and counts[0] > 1:  # all padding has one position, before the first
            values = values[1:]
        length = len(values)
        if length < 2 or int(values[-1] - values[0]) + 1 != length:  # ids of a vocabulary
            return None
        return int(values[0]), length


def _lookup(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Lookup | None:
    padding = None
    if func is torch.nn.functional.embedding:
        rows, table = _named(args, kwargs, "input", "weight")
        dim, padding = 0, kwargs.get("padding_idx")
    elif func in (torch.gather, Tensor.gather):
        table, dim, rows = _named(args, kwargs, "input", "dim", "index")
    elif func is Tensor.__getitem__:
        table, rows = args
        dim = 0
    else:
        return None
    known = isinstance(rows, Tensor) and isinstance(table, Tensor)
    if not known or rows.is_meta or rows.is_floating_point() or not rows.numel():
        return None
    return _Lookup(rows[..., 0] if rows.dim() > 2 else rows, table.shape[dim], padding)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given.get(name) for name in names)
