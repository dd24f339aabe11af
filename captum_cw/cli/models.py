"""``captum-cw models``: the tested model types, and the attention layers of a model."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Table

from captum_cw.cli.answer import Answer
from captum_cw.cli.console import console
from captum_cw.models.architectures import STATUSES, TITLES, ModelTypes

if TYPE_CHECKING:
    from captum_cw.models.inspection import LayerOverview

WAYS = {
    "registry": "the attention registry of transformers",
    "by itself": "torch.nn.functional.scaled_dot_product_attention, or a softmax and a product, "
    "in any PyTorch module",
    "adapter": "an adapter: the package has one for torch.nn.MultiheadAttention, and "
    "captum_cw.capture.register_adapter adds others",
}
UNLIMITED = 10_000
LEGEND = """\
heads: query heads, or query heads / key-value heads if there are fewer of these
sees: the mask, causal or all tokens, and the size of the sliding window if the module has one
W_O in: the module that contains the output projection
gate: a gate multiplies the head outputs before W_O
rows < 1: attention weights sum to less than one, for example because of learned sinks"""


def run(options: Namespace) -> Answer:
    """List the tested model types, or show the attention layers of a model."""
    return _model_types() if options.model is None else _layers(options)


def _model_types() -> Answer:
    tested = ModelTypes.load()
    groups = {
        group: {
            name: {"status": x.status, "way": x.way or None, "reason": x.reason or None}
            for name, x in types.items()
        }
        for group, types in tested.groups.items()
    }
    releases = {"transformers": tested.transformers, "torch": tested.torch}
    document = {**releases, "ways": WAYS, "groups": groups}
    return Answer(document, lambda: _show_model_types(tested))


def _show_model_types(tested: ModelTypes) -> None:
    out = console()
    out.print(
        f"The model types of transformers {tested.transformers}. Each was tested as a small model "
        "with random weights, against a slow reference implementation."
    )
    table = Table("", box=SIMPLE, padding=0)
    table.columns[0].no_wrap = True
    for heading in (*STATUSES, "total"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    refused = {}
    for group, types in tested.groups.items():
        counts = tested.counts(group)
        table.add_row(TITLES[group], *(str(counts[s] or "") for s in STATUSES), str(len(types)))
        refused[TITLES[group]] = [name for name, x in types.items() if x.status == "refused"]
    out.print(table)
    for title, names in refused.items():
        if names:
            out.print(f"{title}, refused: {', '.join(names)}")
    out.print("\nOther models work if their attention uses one of these:")
    for way in WAYS.values():
        out.print(f"- {way}")
    out.print("\ncaptum-cw models M shows the attention layers of a model, or why it is refused.")


def _layers(options: Namespace) -> Answer:
    from captum_cw.cli.output import load_any
    from captum_cw.models.inspection import attention_layers, maps_bytes

    model = load_any(options, options.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        layers = attention_layers(model)
    notes = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    size = maps_bytes(layers, options.length)
    document = {
        "model": options.model,
        "class": type(model).__name__,
        "layers": [vars(layer) for layer in layers],
        "length": options.length,
        "maps_bytes": size,
        "notes": notes,
    }

    def show() -> None:
        out = console()
        _print_whole(_table(layers))
        out.print(
            f"{type(model).__name__} has {len(layers)} attention layers. For a text of "
            f"{options.length} tokens, the float32 maps of all layers take {decimal(size)}. "
            "TokenScores does not hold maps."
        )
        out.print(LEGEND, style="dim")
        for note in notes:
            out.print(f"Note: {note}")

    return Answer(document, show)


def _print_whole(table: Table) -> None:
    """Print a table without cutting or wrapping names, also where the terminal is too narrow."""
    out = console()
    unlimited = out.options.update(max_width=UNLIMITED)
    out.width = max(out.width, Measurement.get(out, unlimited, table).maximum)
    out.print(table)


def _table(layers: Sequence[LayerOverview]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "module", "kind", "heads", "d_h", "sees", "W_O in", "has"):
        table.add_column(heading, no_wrap=True)
    for name, layer in _alike(layers):
        shared = f"/{layer.key_value_heads}" if layer.key_value_heads != layer.heads else ""
        window = "" if layer.window is None else f" {layer.window}"
        has = {"gate": layer.gate, "rows < 1": layer.rows_below_one}
        table.add_row(
            name,
            layer.module,
            layer.kind,
            f"{layer.heads}{shared}",
            str(layer.head_size),
            f"{'causal' if layer.causal else 'all'}{window}",
            (layer.projection or "").removeprefix(f"{layer.name}."),
            ", ".join(name for name, present in has.items() if present),
        )
    return table


def _alike(layers: Sequence[LayerOverview]) -> list[tuple[str, LayerOverview]]:
    """Return one layer for each run of layers that differ in their number alone, with its name.

    The name of a run has the first and the last number, such as ``model.layers.[0-29].self_attn``.
    """
    runs: list[list[LayerOverview]] = []
    for layer in layers:
        if runs and _numbered(runs[-1], layer) is not None:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [(_numbered(run[:-1], run[-1]) or run[0].name, run[0]) for run in runs]


def _numbered(run: Sequence[LayerOverview], layer: LayerOverview) -> str | None:
    """Return the name of a run with one more layer; None if the layer does not continue it."""
    if not run:
        return None
    first, last = run[0], run[-1]
    before, here = (re.split(r"(\d+)", x.name) for x in (last, layer))
    differing = [n for n, (x, y) in enumerate(zip(before, here, strict=False)) if x != y]
    if len(before) != len(here) or len(differing) != 1 or not here[differing[0]].isdigit():
        return None
    place = differing[0]
    start = re.split(r"(\d+)", first.name)
    others = [n for n, (x, y) in enumerate(zip(start, here, strict=True)) if x != y and n != place]
    ends = ("".join(parts[: place + 1]) for parts in (before, here))
    if others or _without(last, next(ends)) != _without(layer, next(ends)):
        return None
    return "".join([*here[:place], f"[{start[place]}-{here[place]}]", *here[place + 1 :]])


def _without(layer: LayerOverview, start: str) -> dict[str, object]:
    """Return what is known of a layer, without the start of names, which ends in its number."""
    return {
        name: x.removeprefix(start) if isinstance(x, str) else x for name, x in vars(layer).items()
    }
