"""New figures, and saved figures."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from captum_cw._utils.colours import AGAINST, TOWARDS

# Markers, so that curves differ without colours too.
MARKERS = "osD^vPX*<>"
# Removes the metadata that would differ between two runs.
_METADATA: dict[str, dict[str, str | None]] = {"svg": {"Date": None}, "png": {"Software": None}}

Picture = tuple[Figure, npt.NDArray[Any]]
"""A figure and its array of axes."""


def new_figure(rows: int, columns: int, size: tuple[float, float], use_pyplot: bool) -> Picture:
    """Make a figure of ``size`` inches, with a ``(rows, columns)`` array of axes.

    Compressed layout keeps square maps together and makes room for their labels. Notebooks and
    ``plt.show()`` show a pyplot figure, and it lives until it is closed. A plain figure is freed
    with its last reference. ``use_pyplot`` is Captum's name for this choice.
    """
    make = plt.figure if use_pyplot else Figure
    fig = make(figsize=size, layout=ConstrainedLayoutEngine(compress=True, w_pad=0.08))
    return fig, fig.subplots(rows, columns, squeeze=False)


def signed_colours() -> Colormap:
    """Return the colours of numbers with signs: orange below zero, white at zero, blue above."""
    ends = [tuple(part / 255 for part in colour) for colour in (AGAINST, (255, 255, 255), TOWARDS)]
    return LinearSegmentedColormap.from_list("signed", ends)


def save_figure(fig: Figure, path: str | PathLike[str]) -> None:
    """Save a figure, in the format of the file suffix.

    Files have no dates and no random ids, so the same calls give the same bytes. A figure that was
    drawn before, for example by a notebook, may differ by a fraction of a pixel.

    Args:
        fig: The figure.
        path: A file name that ends in ``.png`` or ``.svg``.

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
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ValueError(
            f"cannot save {path.name!r}: its suffix is {suffix!r}, expected '.png' or '.svg'"
        )
    file_format = suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "captum_cw"}):
        fig.savefig(path, format=file_format, dpi=150, metadata=_METADATA[file_format])
