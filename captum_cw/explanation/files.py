"""Explanations on disk and in other libraries: safetensors, pandas, xarray.

A file holds tensors under names that say where they belong (``maps/0``, ``heads/3/keys``), and all
else as JSON in the one entry of its metadata: two would stand in an order that changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from captum_cw._utils.files import whole_file
from captum_cw.functional import check_choice
from captum_cw.text.templates import Message

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

    from captum_cw.explanation.explanation import Explanation, HeadMaps

__all__ = ["load", "save", "to_dataframe", "to_xarray"]

E = TypeVar("E")
VERSION = 1
ENTRY = "captum_cw"
KIND = "explanation"
#: What is neither a tensor nor holds any.
PLAIN = (
    "tokens", "queries", "predicted", "words", "text", "offsets", "messages", "settings",
    "query_words",
)  # fmt: skip
#: Of a layer's tensors, those that are kept for a query by rank.
RANKED = ("attention", "relative_norm", "cosine")


def save(path: str | Path, explanation: Explanation) -> None:
    """Writes one safetensors file; see :meth:`captum_cw.Explanation.save`."""
    tensors = {
        f"{kind}/{n}": x
        for kind in ("scores", "maps")
        for n, x in enumerate(getattr(explanation, kind).values())
    }
    for n, layer in enumerate(explanation.heads):
        tensors.update(
            {f"heads/{n}/{part}": x for part, x in vars(layer).items() if part != "name"}
        )
    if explanation.probability is not None:
        tensors["probability"] = explanation.probability
    content = {
        "kind": KIND,
        "version": VERSION,
        "scores": list(explanation.scores),
        "maps": list(explanation.maps),
        "heads": [layer.name for layer in explanation.heads],
        **{name: _listed(getattr(explanation, name)) for name in PLAIN},
    }
    try:
        metadata = {ENTRY: json.dumps(content)}
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"settings={explanation.settings!r} cannot be written as JSON ({error}): put numbers, "
            "texts, lists and dicts there."
        ) from error
    # Parts of one tensor are refused as they are.
    apart = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    with whole_file(path) as whole:
        save_file(apart, whole, metadata)


def _listed(x: Any) -> Any:
    if isinstance(x, Mapping):
        return dict(x)
    return x if x is None or isinstance(x, str) else list(x)


def load(path: str | Path, kind: Callable[..., E], layer: type[HeadMaps]) -> E:
    """Reads what :func:`save` wrote; see :meth:`captum_cw.Explanation.load`."""
    try:
        with safe_open(path, framework="pt") as file:
            content = _content(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}.") from error
    try:
        return _made(content, tensors, kind, layer)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it lacks {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _made(
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: Callable[..., E],
    layer: type[HeadMaps],
) -> E:
    plain = {name: content[name] for name in PLAIN}
    if plain["offsets"] is not None:
        plain["offsets"] = [tuple(span) for span in plain["offsets"]]
    if plain["messages"] is not None:
        plain["messages"] = [Message(*message) for message in plain["messages"]]
    parts = [part.name for part in fields(layer) if part.name != "name"]
    return kind(
        **plain,
        **{
            of: {name: tensors[f"{of}/{n}"] for n, name in enumerate(content[of])}
            for of in ("scores", "maps")
        },
        heads=[
            layer(name, *(tensors[f"heads/{n}/{part}"] for part in parts))
            for n, name in enumerate(content["heads"])
        ],
        probability=tensors.get("probability"),
    )


def _content(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((metadata or {})[ENTRY])
        found = content["kind"], content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no result of this package.") from error
    if found[0] != KIND:
        raise ValueError(f"{path} holds no explanation, but {found[0]!r}.")
    if found[1] != VERSION:
        raise ValueError(f"{path} has version {found[1]!r}; this release reads {VERSION}.")
    return content


def to_dataframe(explanation: Explanation, of: Literal["scores", "maps"]) -> DataFrame:
    """A table; see :meth:`captum_cw.Explanation.to_dataframe`."""
    check_choice("of", of, Literal["scores", "maps"])
    pandas = _imported("pandas")
    tokens = list(explanation.tokens)
    S = len(tokens)
    columns: dict[str, Any]
    if of == "scores":
        words = [None] * S if explanation.words is None else list(explanation.words)
        columns = {
            "place": range(S),
            "token": tokens,
            "word": pandas.array(words, dtype="Int64"),
        }
        methods = {name: _array(x) for name, x in explanation.scores.items()}
    else:
        queries = _queries(explanation)
        T = len(queries)
        columns = {
            "query": [i for i in range(T) for _ in range(S)],
            "query_token": [query for query in queries for _ in range(S)],
            "place": [*range(S)] * T,
            "token": tokens * T,
        }
        methods = {name: _array(x.flatten()) for name, x in explanation.maps.items()}
    if taken := columns.keys() & methods.keys():
        raise ValueError(f"A method has the name of the column {min(taken)!r}: give it another.")
    return pandas.DataFrame({**columns, **methods})


def to_xarray(explanation: Explanation) -> Dataset:
    """A data set; see :meth:`captum_cw.Explanation.to_xarray`."""
    xarray = _imported("xarray")
    queries = _queries(explanation)
    T, S = len(queries), len(explanation.tokens)
    methods = list(dict.fromkeys([*explanation.scores, *explanation.maps]))
    variables: dict[str, Any] = {
        "scores": (("measure", "key"), _stacked(explanation.scores, methods, (S,)))
    }
    coordinates: dict[str, Any] = {
        # Not "method", which for xarray is a way to look up.
        "measure": methods,
        "key": range(S),
        "token": ("key", list(explanation.tokens)),
        "query": range(T),
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
        maps = _stacked(explanation.maps, methods, (T, S))
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
    H = max(layer.keys.shape[0] for layer in heads)
    K = max(layer.keys.shape[2] for layer in heads)

    def filled(part: str, fill: float) -> Any:
        full = []
        for layer in heads:
            x = getattr(layer, part)
            ranks = (0, K - x.shape[2]) if x.dim() == 3 else ()
            full.append(torch.nn.functional.pad(x, (*ranks, 0, 0, 0, H - len(x)), value=fill))
        return _array(torch.stack(full))

    by_rank = ("layer", "head", "query", "rank")
    return {
        "head_key": (by_rank, filled("keys", -1)),
        **{part: (by_rank, filled(part, torch.nan)) for part in RANKED},
        "share": (by_rank[:3], filled("share", torch.nan)),
        "output_norm": (
            ("layer", "query"),
            _array(torch.stack([layer.output_norm for layer in heads])),
        ),
    }


def _stacked(tensors: Mapping[str, Tensor], methods: Sequence[str], shape: tuple[int, ...]) -> Any:
    missing = torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
    rows = [tensors.get(method, missing).cpu() for method in methods]
    return _array(torch.stack(rows) if rows else missing.expand(0, *shape))


def _array(x: Tensor) -> Any:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _queries(explanation: Explanation) -> list[str]:
    return list(explanation.tokens if explanation.queries is None else explanation.queries)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed for this, and missing: pip install captum-cw[interchange]."
        ) from error
