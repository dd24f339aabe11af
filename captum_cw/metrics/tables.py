"""Tables of figures whose cells say where a method is ahead of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

__all__ = ["MARKS", "Cell", "Verdict", "in_markdown", "in_text", "number", "percent"]

Verdict = Literal["better", "worse", "undecided"]
MARKS: dict[Verdict, str] = {"better": "+", "worse": "-", "undecided": "~"}
#: The width of a terminal.
WIDTH = 80


class Cell(NamedTuple):
    """A figure of a method.

    Attributes:
        value: the figure.
        verdict: how it compares with that of the reference; None if it is not compared.

    Example:
        >>> Cell(0.5, "better").in_text
        '0.5 +'
    """

    value: float
    verdict: Verdict | None

    @property
    def in_text(self) -> str:
        """The figure and a mark."""
        return f"{number(self.value)} {' ' if self.verdict is None else MARKS[self.verdict]}"

    @property
    def in_markdown(self) -> str:
        """The figure, bold if it is better, or else with a mark."""
        text = number(self.value)
        return f"**{text}**" if self.verdict == "better" else self.in_text.rstrip()


def number(x: float) -> str:
    """Return a number with three digits, and a large one as a whole number.

    Example:
        >>> number(0.12345), number(12345.6)
        ('0.123', '12,346')
    """
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def percent(rate: float) -> str:
    """Return a fraction in percent.

    Example:
        >>> percent(0.05)
        '5%'
    """
    return f"{100 * rate:g}%"


def in_markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table in Markdown.

    Args:
        heads: The headings.
        rows: The cells of each row.
        texts: The number of columns of text, which come first. The others are numbers.
    """
    written = [[cell.replace("|", r"\|") for cell in row] for row in (heads, *rows)]
    written.insert(1, ["---"] * texts + ["---:"] * (len(heads) - texts))
    return "\n".join(f"| {' | '.join(row)} |" for row in written)


def in_text(rows: Sequence[str], columns: Mapping[str, Sequence[Cell]]) -> str:
    """Return a table for a terminal, in as many parts as its width needs.

    A column that is wider than the terminal is not broken.

    Args:
        rows: the names of the rows.
        columns: the cells of each column, by its name.
    """
    names = max(map(len, rows))
    texts = [[name, *(cell.in_text for cell in column)] for name, column in columns.items()]
    parts: list[list[Sequence[str]]] = []
    room = 0
    for column in texts:
        width = 2 + max(map(len, column))
        if width > room:
            parts.append([])
            room = WIDTH - names
        parts[-1].append([text.rjust(width) for text in column])
        room -= width
    tables = [
        "\n".join(
            "".join([name.rjust(names), *cells]).rstrip()
            for name, *cells in zip(["", *rows], *part, strict=True)
        )
        for part in parts
    ]
    return "\n\n".join(tables)
