"""What commands have in common: models that are loaded, and tokens with their scores."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from captum_cw._utils.processes import Processes
from captum_cw.models.loading import DEMO_MODEL, load_as_saved, load_demo_model, load_model

__all__ = [
    "SINK_NOTE",
    "announce",
    "coloured_text",
    "load",
    "load_any",
    "predicted_by",
    "token_table",
]

# Red and green as in Captum's pages, as the far ends of white.
NEGATIVE, POSITIVE = (229, 77, 77), (32, 223, 32)
SINK_NOTE = (
    "Colours are on each method's own scale, which the first token, often an attention sink, does "
    "not set: it would pale all others."
)


def load(options: Namespace, name: str, processes: Processes | None = None) -> tuple[Any, Any]:
    """The model, on the device of its process where there are several, and its tokenizer."""
    several = processes is not None and processes.count > 1
    if processes is None or processes.is_main:
        announce(name)
    place = _place(options)
    if several and processes:
        place["device"] = processes.device
    if name == DEMO_MODEL:  # has another source than the hub
        return load_demo_model(**place)
    return load_model(name, **place)


def load_any(options: Namespace, name: str) -> Any:
    """A model of any kind, without a tokenizer."""
    announce(name)
    if name == DEMO_MODEL:
        return load_demo_model(**_place(options))[0]
    return load_as_saved(name, **_place(options))


def predicted_by(model: Any) -> str:
    """What a model predicts that does not write text, in words."""
    name = type(model).__name__
    if "Classification" in name:
        return "classes, not tokens"
    return "tokens at masked places, not the next one" if "MaskedLM" in name else "no next token"


def _place(options: Namespace) -> dict[str, Any]:
    return {"dtype": getattr(torch, options.dtype), "device": options.device}


def announce(model: str) -> None:
    """Says what takes long before it does; the libraries that load show bars of their own."""
    print(f"Loading {model} ...", file=sys.stderr, flush=True)


def coloured_text(console: Console, tokens: Sequence[str], normalized: Tensor) -> None:
    """Prints a text whose tokens have the colours of their scores, where colours are shown."""
    if console.color_system is None or console.no_color:
        return
    parts = zip(tokens, normalized.tolist(), strict=True)
    console.print(Text.assemble(*((token, _style(score)) for token, score in parts)), end="\n\n")


def token_table(
    tokens: Sequence[str],
    scores: Mapping[str, Tensor],
    normalized: Mapping[str, Tensor],
    places: Iterable[int],
) -> Table:
    """Scores of the tokens at some places, a column a method, coloured as normalised."""
    table = Table("place", "token")
    for name in scores:
        table.add_column(name, justify="right")
    for place in places:
        cells = (
            Text(f"{scores[name][place]:#.3g}", _style(float(normalized[name][place])))
            for name in scores
        )
        table.add_row(str(place), Text(tokens[place]), *cells)
    return table


def _style(score: float) -> Style:
    """The background for a score in [-1, 1]: white at zero."""
    end = POSITIVE if score > 0 else NEGATIVE
    red, green, blue = (round(255 + (colour - 255) * abs(score)) for colour in end)
    return Style(color="#000000", bgcolor=f"#{red:02x}{green:02x}{blue:02x}")
