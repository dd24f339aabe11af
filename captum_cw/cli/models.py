"""``captum-cw models``: what is supported, and what the layers of a model look like."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from captum_cw.cli.answer import Answer
from captum_cw.cli.console import console
from captum_cw.models.architectures import STATUSES, TITLES, ModelTypes

if TYPE_CHECKING:
    from captum_cw.models.inspection import LayerOverview

WAYS = {
    "registry": "the attention registry of transformers",
    "by itself": "torch.nn.functional.scaled_dot_product_attention, or a softmax and a product, "
    "in any module of PyTorch",
    "adapter": "torch.nn.MultiheadAttention and what is made of it; "
    "captum_cw.capture.register_adapter for kernels of your own",
}
#: Of the table of layers.
LEGEND = (
    "Heads: of queries, and of keys and values where these are fewer. Sees: causal, or all tokens, "
    "and the window that the module names. W_O in: where the output projection was found. Gate: "
    "head outputs are multiplied before it. Rows < 1: attention sums to less than one, as where "
    "learned sinks take the rest."
)


def run(options: Namespace) -> Answer:
    """Tells what is supported, or what the layers of a model look like."""
    return _supported() if options.model is None else _layers(options)


def _supported() -> Answer:
    tested = ModelTypes.load()
    document = {
        "transformers": tested.transformers,
        "torch": tested.torch,
        "ways": WAYS,
        "groups": {
            group: {name: {"status": x.status, "way": x.way or None, "reason": x.reason or None}
                    for name, x in types.items()}
            for group, types in tested.groups.items()
        },
    }  # fmt: skip
    return Answer(document, lambda: _show_supported(tested))


def _show_supported(tested: ModelTypes) -> None:
    out = console()
    out.print(
        f"Model types of transformers {tested.transformers}, tested small and with random weights "
        "against a slow reference:"
    )
    table = Table("", box=SIMPLE, padding=0)
    table.columns[0].no_wrap = True
    for heading in (*STATUSES, "in all"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for group, types in tested.groups.items():
        counts = tested.counts(group)
        table.add_row(TITLES[group], *(str(counts[s] or "") for s in STATUSES), str(len(types)))
    out.print(table)
    for group, types in tested.groups.items():
        refused = [name for name, x in types.items() if x.status == "refused"]
        if refused:
            out.print(f"{TITLES[group]} that are refused: {', '.join(refused)}")
    out.print("\nNo model is known by its name. Attention is seen through")
    for way in WAYS.values():
        out.print(f"- {way}")
    out.print("\ncaptum-cw models M shows the layers of a model, or why it is refused.")


def _layers(options: Namespace) -> Answer:
    from captum_cw.cli.output import load_any
    from captum_cw.models.inspection import attention_layers, maps_bytes

    model = load_any(options, options.model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        layers = attention_layers(model)
    notes = list(dict.fromkeys(str(w.message) for w in told if w.category is UserWarning))
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
        out.print(_table(layers))
        out.print(
            f"{type(model).__name__}: {len(layers)} attention layers. Maps of all of them, of a "
            f"text of {options.length} tokens, take {_readable(size)} in float32; TokenScores "
            "holds none."
        )
        out.print(LEGEND, style="dim")
        for note in notes:
            out.print(f"Note: {note}")

    return Answer(document, show)


def _table(layers: Sequence[LayerOverview]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "module", "kind", "heads", "d_h", "sees", "W_O in", "has"):
        table.add_column(heading, overflow="fold")
    for layer in layers:
        shared = f"/{layer.key_value_heads}" if layer.key_value_heads != layer.heads else ""
        window = "" if layer.window is None else f" {layer.window}"
        has = {"gate": layer.gate, "rows < 1": layer.rows_below_one}
        table.add_row(
            layer.name,
            layer.module,
            layer.kind,
            f"{layer.heads}{shared}",
            str(layer.head_size),
            f"{'causal' if layer.causal else 'all'}{window}",
            (layer.projection or "").removeprefix(f"{layer.name}."),
            ", ".join(word for word, true in has.items() if true),
        )
    return table


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
