"""An explanation as one interactive HTML page, which needs no server, no network and no other file.

Numbers travel as small integers, zlib-compressed in base64, and are unpacked in the browser when
they are first looked at. A map of all heads has 16 bits a number: each is off by at most 1/65534
of its row's largest. Single heads have 8, so that a page of 512 tokens and 270 heads stays below
25 MB: ``x = m (n / N)^3``, where ``m`` is the largest of the row. The cube leaves room for small
numbers beside a sink's large one. With ``N = 255``, for attention and relative norms, ``x`` is off
by at most 0.6% of ``m``, and where it is a hundredth of ``m`` by 2.7% of itself; with ``N = 127``,
where there are signs, by 1.2% and 5.5%. Contributions are kept, not made from their factors, whose
errors would multiply. VW and VW-ON are made so (on SmolLM2 and 512 tokens, up to 1.8% of the row's
largest), and the cosine is what the two factors leave of a contribution: off by up to 0.07, in 99
of 100 cases by 0.04, for keys with more than a hundredth of the row's largest attention.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cw import measures
from captum_cw.explanation.heads import OF_HEADS

if TYPE_CHECKING:
    from captum_cw.explanation.explanation import Explanation
    from captum_cw.explanation.heads import HeadMaps

__all__ = ["explanation_page", "framed"]

OWN_UNIT = "Numbers as this method gave them, in its own unit."
LEVELS, SIGNED_LEVELS, MAP_LEVELS = 255, 127, 32767
POWER = 3
#: Tokens whose places two bytes tell apart.
LONGEST = 2**16


def explanation_page(explanation: Explanation, *, sinks: Collection[int] | None = None) -> str:
    """One HTML page that shows an explanation, for reading with mouse, finger or keyboard.

    Args:
        explanation: Scores, maps and heads, or only some of them.
        sinks: Places of tokens that the page can leave out of its colours, such as those that
            :func:`captum_cw.removal.sinks.find_sinks` finds; None for those of the explanation.

    Returns:
        The page; the same for the same explanation.

    Raises:
        ValueError: If a number is not finite, there is nothing to show, or a sink lies outside the
            text.

    Example:
        >>> page = explanation_page(explain(model, tokenizer, "a b c"))
        >>> page.startswith("<!DOCTYPE html>")
        True
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    sinks = explanation.sinks if sinks is None else sinks
    _check(explanation, sinks)
    layers = [layer for layer in explanation.heads if layer.keys.numel()]
    blobs = [_map(x) for x in explanation.maps.values()] + [_heads(layer) for layer in layers]
    environment = Environment(
        loader=PackageLoader("captum_cw.explanation", "."), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    here = files("captum_cw.explanation")
    return environment.get_template("page.html.jinja").render(
        title=_title(explanation),
        style=here.joinpath("page.css").read_text("utf-8"),
        script=here.joinpath("page.js").read_text("utf-8"),
        data=_json(_description(explanation, layers, sinks)),
        blobs=blobs,
    )


def framed(page: str, instead: str) -> str:
    """A page inside another, as tall as a notebook shows at once, that cannot touch its host.

    It is told the theme of its host. Where a notebook is not trusted, frames are taken out, and
    the text ``instead`` of it remains.
    """
    return (
        f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" title="Explanation" '
        "onload=\"this.contentWindow.postMessage(getComputedStyle(this).colorScheme, '*')\" "
        f'style="width: 100%; height: 800px; border: 0">{escape(instead)}</iframe>'
    )


def _check(explanation: Explanation, sinks: Collection[int]) -> None:
    S = len(explanation.tokens)
    layers = [layer for layer in explanation.heads if layer.keys.numel()]
    if not explanation.tokens:
        raise ValueError("The explanation has no tokens: there is nothing to show.")
    if not (explanation.scores or explanation.maps or layers):
        raise ValueError("The explanation has no scores, maps or heads: there is nothing to show.")
    for place in sinks:
        if not 0 <= place < S:
            raise ValueError(f"sinks holds {place}, outside the {S} tokens: give 0 to {S - 1}.")
    if layers and S > LONGEST:
        raise ValueError(
            f"{S} tokens: a page shows heads of up to {LONGEST}. Take dataclasses.replace("
            "explanation, heads=())."
        )
    numbers = {f"scores[{name!r}]": x for name, x in explanation.scores.items()}
    numbers |= {f"maps[{name!r}]": x for name, x in explanation.maps.items()}
    if explanation.probability is not None:
        numbers["probability"] = explanation.probability
    for layer in layers:  # whose output_norm may be NaN
        for part in ("attention", "relative_norm", "cosine", "share"):
            numbers[f"{part} of layer {layer.name!r}"] = getattr(layer, part)
    for name, x in numbers.items():
        if not x.isfinite().all():
            value = x[~x.isfinite()][0].item()
            raise ValueError(f"{name} holds {value}: replace it, for instance by nan_to_num().")


def _title(explanation: Explanation) -> str:
    text = "".join(explanation.tokens).strip()
    title = text if len(text) <= 60 else f"{text[:59]}…"
    return title.encode("utf-8", "replace").decode()  # halves of surrogate pairs cannot be written


def _description(
    explanation: Explanation, layers: list[HeadMaps], sinks: Collection[int]
) -> dict[str, Any]:
    """What the page knows before it unpacks a number."""
    # Of dense maps alone the norm of the output is not known, nor so VW.
    unknown = {"vw"} if all(bool(x.output_norm.isnan().all()) for x in layers) else set()
    of_heads = [name for name in OF_HEADS if name not in unknown] if layers else []
    names = [*explanation.maps, *explanation.scores, *of_heads]
    known = explanation.probability
    return {
        "tokens": list(explanation.tokens),
        "queries": None if explanation.queries is None else list(explanation.queries),
        "predicted": None if explanation.predicted is None else list(explanation.predicted),
        "probability": None if known is None else _rounded(known),
        "methods": [
            {**_about(name, explanation), "ofHeads": name in of_heads}
            for name in dict.fromkeys(names)
        ],
        "scores": {name: _rounded(x) for name, x in explanation.scores.items()},
        "maps": list(explanation.maps),
        "layers": [
            {
                "name": layer.name,
                "heads": layer.keys.shape[0],
                "kept": layer.keys.shape[2],
                "negative": bool((layer.attention < 0).any()),
            }
            for layer in layers
        ],
        "sinks": sorted(set(sinks)),
        "settings": {name: str(value) for name, value in explanation.settings.items()},
    }


def _about(name: str, explanation: Explanation) -> dict[str, str]:
    """What the page says of a measure."""
    entry = measures.find(name)
    if entry is None:
        return {"name": name, "label": name, "about": OWN_UNIT, "together": ""}
    together = ""
    if set(OF_HEADS) <= explanation.maps.keys():  # so explain() has made them
        summed = "Summed over heads, mean over layers."
        together = summed if entry.signed else "Mean over all layers and heads."
    return {"name": name, "label": entry.label, "about": entry.about, "together": together}


def _rounded(x: Tensor) -> list[float]:
    """Six digits, as float32 has them."""
    return [float(f"{value:.6g}") for value in x.tolist()]


def _json(description: dict[str, Any]) -> str:
    """ASCII without a ``<``, so that no token can end the element that holds it."""
    return json.dumps(description, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _map(x: Tensor) -> str:
    """A map ``(T, S)``: the largest of each row, then the numbers' low and high bytes."""
    x = x.detach().cpu()  # not every device has float64
    largest = x.abs().amax(-1, keepdim=True)
    numbers = (x.double() / largest.double()).nan_to_num(0) * MAP_LEVELS
    return _packed(_float32(largest), *_low_and_high(numbers.round().long()))


def _heads(layer: HeadMaps) -> str:
    """One layer: its ``(T,)`` norms, ``(H, T)`` shares and attention, and the keys that are kept.

    Keys stand in the order of the text, each as its distance from the one before, which compresses
    well.
    """
    order = layer.keys.argsort(dim=-1, stable=True)
    keys = layer.keys.long().gather(-1, order)
    attention, relative_norm, contribution = (
        x.gather(-1, order)
        for x in (layer.attention, layer.relative_norm, layer.measure(measures.SIGNED))
    )
    relative_norm = torch.where(attention != 0, relative_norm, 0)  # others would set the scale
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
    """The largest of each row and the cube roots of numbers relative to it, one byte each."""
    x = x.detach().cpu()
    largest = x.abs().amax(-1, keepdim=True)
    roots = (x.double().abs() / largest.double()).nan_to_num(0) ** (1 / POWER)
    # What is not zero is not shown as if it were: zero attention is that of a key that is not seen.
    numbers = (roots * levels).round().clamp(min=1).long() * x.sign().long()
    return _float32(largest), _low_and_high(numbers)[0]


def _float32(x: Tensor) -> npt.NDArray[Any]:
    return x.detach().cpu().float().numpy().astype("<f4")


def _low_and_high(x: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Two bytes of each number, apart, since they compress better so."""
    x = x.cpu()
    return (x & 255).numpy().astype(np.uint8), (x >> 8 & 255).numpy().astype(np.uint8)


def _packed(*arrays: npt.NDArray[Any]) -> str:
    content = zlib.compress(b"".join(x.tobytes() for x in arrays))
    return base64.b64encode(content).decode("ascii")
