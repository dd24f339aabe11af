"""Explanations in files and in other libraries: safetensors, pandas and xarray.

A file holds each tensor under the name of its place (``maps/0``, ``heads/3/keys``), and everything
else as JSON in a single entry of the metadata. The order of several entries would not be fixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from captum_cw._utils.extras import imported
from captum_cw._utils.files import whole_file
from captum_cw.explanation.grouping import spans_of_words
from captum_cw.explanation.heads import FACTORS, HeadMaps
from captum_cw.functional import check_choice
from captum_cw.text.templates import Message
from captum_cw.text.tokens import joined

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

    from captum_cw.explanation.explanation import Explanation

__all__ = ["load", "save", "to_dataframe", "to_dict", "to_json", "to_xarray"]

VERSION = 1
ENTRY = "captum_cw"
KIND = "explanation"
#: The fields of an explanation that hold tensors. The others are saved as JSON.
TENSORS = {"scores", "maps", "heads", "probability"}
#: The tensors of a layer.
OF_LAYER = [part.name for part in fields(HeadMaps) if part.name != "name"]


def save(path: str | Path, explanation: Explanation) -> None:
    """Save one safetensors file; see :meth:`captum_cw.Explanation.save`."""
    tensors = {
        f"{kind}/{n}": x
        for kind, group in (("scores", explanation.scores), ("maps", explanation.maps))
        for n, x in enumerate(group.values())
    }
    for n, layer in enumerate(explanation.heads):
        parts = {part: getattr(layer, part) for part in OF_LAYER}
        tensors |= {f"heads/{n}/{part}": x for part, x in parts.items() if x is not None}
    if explanation.probability is not None:
        tensors["probability"] = explanation.probability
    content = {
        "kind": KIND,
        "version": VERSION,
        "scores": list(explanation.scores),
        "maps": list(explanation.maps),
        "heads": [layer.name for layer in explanation.heads],
        **{name: x for name, x in vars(explanation).items() if name not in TENSORS},
    }
    metadata = {ENTRY: _json(explanation, content)}
    # safetensors refuses tensors that share memory.
    copies = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    with whole_file(path) as whole:
        save_file(copies, whole, metadata)


def load(path: str | Path, kind: type[Explanation]) -> Explanation:
    """Load a file of :func:`save`; see :meth:`captum_cw.Explanation.load`."""
    try:
        with safe_open(path, framework="pt") as file:
            content = _read_content(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or is not a safetensors file: {error}.") from error
    try:
        values = {f.name: content[f.name] for f in fields(kind) if f.name not in TENSORS}
        if values["offsets"] is not None:
            values["offsets"] = [tuple(span) for span in values["offsets"]]
        if values["messages"] is not None:
            values["messages"] = [Message(*message) for message in values["messages"]]
        for group in ("scores", "maps"):
            names = enumerate(content[group])
            values[group] = {name: tensors[f"{group}/{n}"] for n, name in names}
        values["heads"] = [
            HeadMaps(
                name,
                **{part: tensors[f"heads/{n}/{part}"] for part in OF_LAYER if part != "effect"},
                effect=tensors.get(f"heads/{n}/effect"),
            )
            for n, name in enumerate(content["heads"])
        ]
        return kind(**values, probability=tensors.get("probability"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it lacks {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_content(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((metadata or {})[ENTRY])
        kind, version = content["kind"], content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold a result of this package.") from error
    if kind != KIND:
        raise ValueError(f"{path} does not hold an explanation, but {kind!r}.")
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}; this release reads {VERSION}.")
    return content


def to_dict(explanation: Explanation, *, maps: bool) -> dict[str, Any]:
    """Return lists, numbers and strings; see :meth:`captum_cw.Explanation.to_dict`."""
    known: dict[str, Any] = {"tokens": list(explanation.tokens)}
    for kind in ("scores", "maps") if maps else ("scores",):
        group = getattr(explanation, kind)
        known[kind] = {name: _array(x).tolist() for name, x in group.items()}
    known["shares"] = {
        name: [share.to_dict() for share in explanation.shares(name)] for name in explanation.scores
    }
    for name in ("queries", "predicted", "words", "text"):
        value = getattr(explanation, name)
        if value is not None:
            known[name] = value if isinstance(value, str) else list(value)
    if explanation.probability is not None:
        known["probability"] = _array(explanation.probability).tolist()
    return {**known, "settings": dict(explanation.settings)}


def to_json(explanation: Explanation, *, maps: bool) -> str:
    """Return JSON; see :meth:`captum_cw.Explanation.to_json`."""
    return _json(explanation, to_dict(explanation, maps=maps))


def _json(explanation: Explanation, content: dict[str, Any]) -> str:
    try:
        return json.dumps(content)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"settings={explanation.settings!r} cannot be written as JSON ({error}): use numbers, "
            "strings, lists and dicts."
        ) from error


def to_dataframe(explanation: Explanation, of: Literal["scores", "maps"]) -> DataFrame:
    """Return a pandas table; see :meth:`captum_cw.Explanation.to_dataframe`."""
    check_choice("of", of, Literal["scores", "maps"])
    pandas = imported("pandas", "interchange")
    tokens, queries = list(explanation.tokens), _queries(explanation)
    S, T = len(tokens), len(queries)
    unit = explanation.settings.get("by", "token")
    columns: dict[str, Any]
    if of == "scores":
        columns = {"place": range(S), unit: tokens}
        if explanation.words is not None:
            spans = spans_of_words(explanation.words)
            texts = [
                None if explanation.words[start] is None else joined(tokens[start:stop])
                for start, stop in spans
                for _ in range(start, stop)
            ]
            numbers = pandas.array(list(explanation.words), dtype="Int64")
            columns |= {"word": texts, "word_number": numbers}
        methods = explanation.scores
    else:
        columns = {
            "query": [i for i in range(T) for _ in range(S)],
            f"query_{unit}": [query for query in queries for _ in range(S)],
            "place": [*range(S)] * T,
            unit: tokens * T,
        }
        methods = explanation.maps
    if taken := columns.keys() & methods.keys():
        raise ValueError(f"A method has the name of the column {min(taken)!r}: rename the method.")
    return pandas.DataFrame({**columns, **{name: _array(x).ravel() for name, x in methods.items()}})


def to_xarray(explanation: Explanation) -> Dataset:
    """Return an xarray data set; see :meth:`captum_cw.Explanation.to_xarray`."""
    xarray = imported("xarray", "interchange")
    tokens, queries = list(explanation.tokens), _queries(explanation)
    methods = list(dict.fromkeys([*explanation.scores, *explanation.maps]))
    variables: dict[str, Any] = {
        "scores": (("measure", "key"), _stack(explanation.scores, methods, len(tokens)))
    }
    coordinates: dict[str, Any] = {
        "measure": methods,  # "method" is an argument of xarray's own look-ups
        "key": range(len(tokens)),
        "token": ("key", tokens),
        "query": range(len(queries)),
        "query_token": ("query", queries),
    }
    if explanation.words is not None:
        words = [np.nan if word is None else word for word in explanation.words]
        coordinates["word"] = ("key", words)
    if explanation.predicted is not None:
        coordinates["predicted"] = ("query", list(explanation.predicted))
    if explanation.probability is not None:
        coordinates["probability"] = ("query", _array(explanation.probability))
    if explanation.maps:
        maps = _stack(explanation.maps, methods, len(queries), len(tokens))
        variables["maps"] = (("measure", "query", "key"), maps)
    if explanation.heads:
        coordinates["layer_name"] = ("layer", [layer.name for layer in explanation.heads])
        variables.update(_head_variables(explanation.heads))
    attributes = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in explanation.settings.items()
    }
    dataset: Dataset = xarray.Dataset(variables, coordinates, attributes)
    return dataset


def _head_variables(heads: Sequence[HeadMaps]) -> dict[str, Any]:
    """Stack the tensors of all layers, filled up to the largest ``H`` and ``K``."""
    H = max(layer.keys.shape[0] for layer in heads)
    K = max(layer.keys.shape[2] for layer in heads)

    def filled(part: str, fill: float) -> Any:
        full = []
        for layer in heads:
            x = getattr(layer, part)
            ranks = (0, K - x.shape[2]) if x.dim() == 3 else ()
            full.append(torch.nn.functional.pad(x, (*ranks, 0, 0, 0, H - len(x)), value=fill))
        return _array(torch.stack(full))

    def effect(layer: HeadMaps) -> Tensor:
        full = torch.full((H,), torch.nan, dtype=torch.float32, device="cpu")
        if layer.effect is not None:
            full[: len(layer.effect)] = layer.effect
        return full

    by_rank = ("layer", "head", "query", "rank")
    output_norm = torch.stack([layer.output_norm for layer in heads])
    return {
        "head_key": (by_rank, filled("keys", -1)),
        **{part: (by_rank, filled(part, torch.nan)) for part in FACTORS},
        "share": (by_rank[:3], filled("share", torch.nan)),
        "effect": (by_rank[:2], _array(torch.stack([effect(layer) for layer in heads]))),
        "output_norm": (("layer", "query"), _array(output_norm)),
    }


def _stack(tensors: Mapping[str, Tensor], methods: Sequence[str], *shape: int) -> Any:
    """Stack the tensors of all methods, with NaN for methods without one."""
    missing = torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
    rows = [tensors.get(method, missing).cpu() for method in methods]
    return _array(torch.stack(rows) if rows else missing.expand(0, *shape))


def _array(x: Tensor) -> Any:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _queries(explanation: Explanation) -> list[str]:
    return list(explanation.tokens if explanation.queries is None else explanation.queries)
