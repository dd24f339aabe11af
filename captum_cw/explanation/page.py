"""The interactive HTML page of an explanation, which needs no server, network or other file.

Numbers are stored as small integers, compressed with zlib and encoded in base64. The browser
unpacks them when they are first shown. Maps of all heads together have 16 bits per number, with an
error of at most 1/65534 of the largest value in the row. Single heads have 8 bits, so that a page
of 512 tokens and 270 heads stays below 25 MB: ``x = m (n / N)^3``, where ``m`` is the largest value
in the row. The cube leaves room for small values beside the large one of a sink.

For attention and relative norms, ``N = 255``. Their error is at most 0.6% of ``m``; a value of
``m / 100`` has a relative error of 2.7%. With signs, ``N = 127``, and the errors are 1.2% and 5.5%.
Contributions are stored as well, because the errors of their factors would multiply. VW and VW-ON
are computed from their factors (on SmolLM2 and 512 tokens, with an error of up to 1.8% of the
largest value in the row). The cosine is computed from a contribution and its other two factors. Its
error is up to 0.07, and in 99 of 100 cases 0.04, for keys with more than a hundredth of the largest
attention in the row.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cw import measures
from captum_cw.explanation.answer import BARS, question, sentence, verdict
from captum_cw.explanation.grouping import spans_of_words
from captum_cw.explanation.heads import FACTORS, OF_HEADS
from captum_cw.explanation.shares import first_method
from captum_cw.measures import TARGET
from captum_cw.text.tokens import joined

if TYPE_CHECKING:
    from captum_cw.explanation.explanation import Explanation
    from captum_cw.explanation.heads import HeadMaps

__all__ = ["explanation_page", "framed"]

OWN_UNIT = "The numbers of this method, in its own unit."
SUMMED = (
    "Sum over queries, heads and layers. What passes through several layers counts in each, so the "
    "scores do not sum to the target."
)
#: The registered names of the factors of a contribution, and of their product.
PRODUCT = ("attention", "relative-norm", "cosine", measures.SIGNED)
#: The height of a frame in pixels until its page says how high it is, and the largest.
HEIGHT, HIGHEST = 800, 1600
#: What a notebook runs when a frame has loaded. Where the notebook has no colour scheme, light text
#: means a dark theme. Themes change by attributes, and by style sheets that arrive a little later.
FRAME = f"""\
const theme = () => {{
  const {{ color, colorScheme }} = getComputedStyle(this);
  const rgb = color.match(/^rgba?\\((\\d+), (\\d+), (\\d+)/);
  if (!rgb || ['light', 'dark'].includes(colorScheme)) return colorScheme;
  return +rgb[1] + +rgb[2] + +rgb[3] > 382 ? 'dark' : 'light';
}};
const send = () => this.contentWindow?.postMessage(theme(), '*');
const seen = new MutationObserver(() => {{
  if (!this.isConnected) return seen.disconnect();
  send();
  setTimeout(send, 500);
}});
for (const x of [document.documentElement, document.body]) seen.observe(x, {{ attributes: true }});
window.addEventListener('message', ({{ source, data }}) => {{
  if (source !== this.contentWindow || !(data?.height > 0)) return;
  this.style.height = Math.min(Math.ceil(data.height), {HIGHEST}) + 'px';
}});
send();"""
#: The parts of the script, in the order in which they run.
SCRIPTS = (
    *("state", "numbers", "colours", "words", "answer", "map", "text", "heads", "details"),
    *("controls", "export", "start"),
)
LEVELS, SIGNED_LEVELS, MAP_LEVELS = 255, 127, 32767
POWER = 3
#: The largest number of tokens of a page with maps. Maps grow with its square.
MAPPED = 1024


def explanation_page(explanation: Explanation, *, sinks: Collection[int] | None = None) -> str:
    """Return a self-contained HTML page that shows an explanation, for mouse, touch and keyboard.

    Args:
        explanation: The explanation: scores, maps and heads, or only some of these.
        sinks: Positions that the page's colour scale can ignore, such as those of
            :func:`captum_cw.removal.sinks.find_sinks`; None for the sinks of the explanation.

    Returns:
        The page. The same explanation gives the same page.

    Raises:
        ValueError: If a number is not finite, there is nothing to show, or a sink is not a position
            in the text.

    Example:
        >>> page = explanation_page(explain(model, tokenizer, "The capital of France is"))
        >>> page.startswith("<!DOCTYPE html>")
        True
    """
    from jinja2 import Template

    sinks = explanation.sinks if sinks is None else sinks
    note = None
    if len(explanation.tokens) > MAPPED:
        note = (
            f"The text has {len(explanation.tokens):,} tokens, so the page shows scores alone. For "
            "the maps of a part of the text, explain that part by itself, or save the page of "
            "explanation.part(start, stop)."
        )
        explanation = replace(explanation, maps={}, heads=())
    layers = [layer for layer in explanation.heads if layer.keys.numel()]
    _check(explanation, layers, sinks)
    blobs = [_map(x) for x in explanation.maps.values()] + [_heads(layer) for layer in layers]
    template = Template(_source("page.html.jinja"), autoescape=True, trim_blocks=True)
    page: str = template.render(
        title=_title(explanation),
        style=_source("page.css"),
        script=_script(),
        data=_json({**_description(explanation, layers, sinks), "note": note}),
        blobs=blobs,
    )
    return page


def _source(name: str) -> str:
    return files("captum_cw.explanation").joinpath("web", name).read_text("utf-8")


def _script() -> str:
    """Return all scripts as one, whose names are its own."""
    parts = "\n".join(_source(f"{part}.js") for part in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def framed(page: str, alternative: str) -> str:
    """Return a page in a frame that cannot access the page around it, for notebooks.

    The frame receives the theme of the notebook, also when it changes, and has the height of its
    page. A notebook that is not trusted removes the frame and shows the text ``alternative``.
    """
    return (
        f'<iframe srcdoc="{escape(page)}" title="Explanation" '
        f'sandbox="allow-scripts allow-downloads" onload="{escape(FRAME)}" '
        f'style="width: 100%; height: {HEIGHT}px; border: 0">{escape(alternative)}</iframe>'
    )


def _check(explanation: Explanation, layers: Sequence[HeadMaps], sinks: Collection[int]) -> None:
    S = len(explanation.tokens)
    if not S or not (explanation.scores or explanation.maps or layers):
        raise ValueError(
            "The explanation has no tokens, or no scores, maps and heads: there is nothing to show."
        )
    for place in sinks:
        if not 0 <= place < S:
            raise ValueError(f"sinks holds {place}, outside the {S} tokens: give 0 to {S - 1}.")
    numbers = {f"scores[{name!r}]": x for name, x in explanation.scores.items()}
    numbers |= {f"maps[{name!r}]": x for name, x in explanation.maps.items()}
    if explanation.probability is not None:
        numbers["probability"] = explanation.probability
    for layer in layers:  # an unknown output_norm is NaN
        for part in (*FACTORS, "share"):
            numbers[f"{part} of layer {layer.name!r}"] = getattr(layer, part)
    for name, x in numbers.items():
        if not x.isfinite().all():
            value = x[~x.isfinite()][0].item()
            raise ValueError(f"{name} holds {value}: replace it, for example by nan_to_num().")


def _title(explanation: Explanation) -> str:
    text = question(explanation) or "".join(explanation.tokens).strip()
    title = text if len(text) <= 60 else f"{text[:59]}…"
    return title.encode("utf-8", "replace").decode()  # single surrogates cannot be encoded


def _description(
    explanation: Explanation, layers: Sequence[HeadMaps], sinks: Collection[int]
) -> dict[str, Any]:
    """Return everything that the page reads before it unpacks the numbers."""
    # Dense maps alone do not tell the norm of the output, which VW needs.
    unknown = {"vw"} if all(bool(x.output_norm.isnan().all()) for x in layers) else set()
    of_heads = [name for name in OF_HEADS if name not in unknown] if layers else []
    names = list(dict.fromkeys([*explanation.scores, *explanation.maps, *of_heads]))
    of_all = explanation.scores or explanation.maps
    explained = set(OF_HEADS) <= explanation.maps.keys()  # by explain()
    probability = explanation.probability
    return {
        "tokens": explanation.tokens,
        "queries": explanation.queries,
        "predicted": explanation.predicted,
        "probability": None if probability is None else _rounded(probability),
        "methods": [{**_method(name, explained), "ofHeads": name in of_heads} for name in names],
        "initial": first_method(explanation) if of_all else names[0],
        "verdict": verdict(explanation),
        "sentence": sentence(explanation, sinks=sinks) if explanation.scores else None,
        "words": _words(explanation.tokens, explanation.words),
        "queryWords": _words(explanation.queries or (), explanation.query_words),
        "asked": _asked(explanation),
        "long": len(explanation.tokens) > MAPPED,
        "bars": BARS,
        "factors": [_method(name, explained) for name in PRODUCT],
        "scores": {name: _rounded(x) for name, x in explanation.scores.items()},
        "maps": list(explanation.maps),
        "layers": [
            {
                "name": layer.name,
                "heads": layer.keys.shape[0],
                "kept": layer.keys.shape[2],
                "negative": bool((layer.attention < 0).any()),
                "effects": None if layer.effect is None else _rounded(layer.effect),
            }
            for layer in layers
        ],
        "sinks": sorted(set(sinks)),
        "settings": {name: str(value) for name, value in explanation.settings.items()},
    }


def _words(
    tokens: Sequence[str], words: Sequence[int | None] | None
) -> dict[str, list[Any]] | None:
    """Return the words of a text and the tokens of each; None if they are unknown."""
    if words is None:
        return None
    spans = spans_of_words(words)
    return {"texts": [joined(tokens[slice(*span)]) for span in spans], "groups": spans}


def _asked(explanation: Explanation) -> int | None:
    """Return the query whose prediction is the target; None if there is none."""
    position = explanation.settings.get("target position")
    return position if isinstance(position, int) and explanation.queries is None else None


def _method(name: str, explained: bool) -> dict[str, Any]:
    """Return what the registry says of a method, and how :func:`captum_cw.explain` combines it."""
    entry = measures.find(name)
    if entry is None:
        unknown = {"name": name, "label": name, "about": OWN_UNIT, "unit": "", "aggregation": ""}
        return {**unknown, "ofTarget": False, "signed": False}
    aggregation = "Mean over layers and heads."
    if entry.signed:
        aggregation = "Sum over heads, mean over layers."
    if entry.explains_target:
        aggregation = SUMMED if name == TARGET else ""
    return {
        "name": name,
        "label": entry.label,
        "about": entry.about,
        "unit": entry.unit,
        "aggregation": aggregation if explained else "",
        "ofTarget": entry.explains_target,
        "signed": entry.signed,
    }


def _rounded(x: Tensor) -> list[float]:
    """Round to six digits, which is about the precision of float32."""
    return [float(f"{value:.6g}") for value in x.tolist()]


def _json(description: dict[str, Any]) -> str:
    """Return ASCII without "<", so that a token cannot end the element that holds the JSON."""
    return json.dumps(description, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _map(x: Tensor) -> str:
    """Pack a map ``(T, S)``: the largest value of each row, then low and high bytes."""
    x = x.detach().cpu()  # some devices have no float64
    largest = x.abs().amax(-1, keepdim=True)
    numbers = (x.double() / largest.double()).nan_to_num(0) * MAP_LEVELS
    return _packed(_float32(largest), *_low_and_high(numbers.round().long()))


def _heads(layer: HeadMaps) -> str:
    """Pack one layer: norms ``(T,)``, shares and sums ``(H, T)``, and the keys that are kept.

    Keys are in the order of the text, and each is stored as its distance from the one before, which
    compresses well.
    """
    order = layer.keys.argsort(dim=-1, stable=True)
    keys = layer.keys.long().gather(-1, order)
    attention, relative_norm, contribution = (
        x.gather(-1, order)
        for x in (layer.attention, layer.relative_norm, layer.measure(measures.SIGNED))
    )
    # Keys that a query does not see must not set the scale.
    relative_norm = torch.where(attention != 0, relative_norm, 0)
    steps = keys.diff(dim=-1, prepend=torch.zeros_like(keys[..., :1]))
    negative = bool((attention < 0).any())
    coded = [
        _coded(attention, SIGNED_LEVELS if negative else LEVELS),
        _coded(relative_norm, LEVELS),
        _coded(contribution, SIGNED_LEVELS),
    ]
    return _packed(
        _float32(layer.output_norm),
        _float32(layer.share),
        _float32(layer.attention.sum(-1)),
        _float32(contribution.sum(-1)),
        *(largest for largest, _ in coded),
        *_low_and_high(steps),
        *(numbers for _, numbers in coded),
    )


def _coded(x: Tensor, levels: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the largest value of each row, and the cube roots relative to it as bytes."""
    x = x.detach().cpu()
    largest = x.abs().amax(-1, keepdim=True)
    roots = (x.double().abs() / largest.double()).nan_to_num(0) ** (1 / POWER)
    # Small values must not become zero, because zero attention marks a key that is not seen.
    numbers = (roots * levels).round().clamp(min=1).long() * x.sign().long()
    return _float32(largest), _low_and_high(numbers)[0]


def _float32(x: Tensor) -> npt.NDArray[Any]:
    return x.detach().cpu().float().numpy().astype("<f4")


def _low_and_high(x: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Split numbers into low and high bytes, which compress better apart."""
    x = x.cpu()
    return (x & 255).numpy().astype(np.uint8), (x >> 8 & 255).numpy().astype(np.uint8)


def _packed(*arrays: npt.NDArray[Any]) -> str:
    content = zlib.compress(b"".join(x.tobytes() for x in arrays))
    return base64.b64encode(content).decode("ascii")
