"""New figures, saved figures, and the frame of HTML pages."""

from __future__ import annotations

import base64
import io
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Removes the metadata that would differ between two runs.
_METADATA: dict[str, dict[str, str | None]] = {"svg": {"Date": None}, "png": {"Software": None}}

Picture = tuple[Figure, npt.NDArray[Any]]
"""A figure and its array of axes."""

_STYLE = """\
body { font-family: sans-serif; margin: 2em; color: #222; background: #fff; }
h1 { font-size: 1.3em; }
img { max-width: 100%; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.3em 0.8em; border-top: 1px solid #ddd; }
th, td:not(:last-child) { white-space: nowrap; }
"""


def new_figure(
    rows: int, columns: int, size: tuple[float, float], use_pyplot: bool
) -> tuple[Figure, npt.NDArray[Any]]:
    """Make a figure of ``size`` inches, with a ``(rows, columns)`` array of axes.

    Compressed layout keeps square maps together and makes room for their labels. Notebooks and
    ``plt.show()`` show a pyplot figure, and it lives until it is closed. A plain figure is freed
    with its last reference. ``use_pyplot`` is Captum's name for this choice.
    """
    make = plt.figure if use_pyplot else Figure
    fig = make(figsize=size, layout=ConstrainedLayoutEngine(compress=True, w_pad=0.08))
    return fig, fig.subplots(rows, columns, squeeze=False)


def html_page(title: str, body: str) -> str:
    """Return a self-contained HTML page; ``body`` is HTML, ``title`` is plain text."""
    title = escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def save_figure(fig: Figure, path: str | PathLike[str]) -> None:
    """Save a figure, in the format of the file suffix.

    Files have no dates and no random ids, so the same calls give the same bytes. A figure that was
    drawn before, for example by a notebook, may differ by a fraction of a pixel.

    Args:
        fig: The figure.
        path: A file name that ends in ``.png``, ``.svg`` or ``.html``. The HTML page is
            self-contained and holds the figure as SVG.

    Raises:
        ValueError: For any other suffix.

    Example::

        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> path = Path(tempfile.mkdtemp()) / "empty.svg"
        >>> save_figure(Figure(), path)
        >>> "<svg" in path.read_text()
        True
    """
    path = Path(path)
    match path.suffix.lower():
        case ".png":
            content = _render(fig, "png")
        case ".svg":
            content = _render(fig, "svg")
        case ".html":
            data = base64.b64encode(_render(fig, "svg")).decode("ascii")
            title = escape(path.stem)
            image = f'<img alt="{title}" src="data:image/svg+xml;base64,{data}">'
            content = html_page(path.stem, image).encode("utf-8")
        case suffix:
            raise ValueError(
                f"cannot save {path.name!r}: its suffix is {suffix!r}, expected '.png', '.svg' "
                "or '.html'"
            )
    path.write_bytes(content)


def _render(fig: Figure, file_format: str) -> bytes:
    """Return the bytes of the figure in a file format."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "captum_cw"}):
        fig.savefig(buffer, format=file_format, dpi=150, metadata=_METADATA[file_format])
    return buffer.getvalue()
