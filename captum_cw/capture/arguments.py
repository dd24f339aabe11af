"""The arguments of a call: read from Captum's inputs, and named as the model names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from captum_cw.capture.model import Parameters, parameters_of

__all__ = ["Arguments", "arguments_by_name", "read_arguments", "takes_mapping"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def read_arguments(
    model: nn.Module | None, forward: Callable[..., Any], inputs: object, additional: object
) -> Arguments:
    """Return the arguments that Captum's ``inputs`` and ``additional_forward_args`` stand for.

    Args:
        model: The model; None if only a callable is known.
        forward: The function that is called: the model's forward, or another one.
        inputs: A tensor, a tuple of tensors, or a mapping of keyword arguments. A mapping is one
            positional argument if ``forward`` takes it as a whole.
        additional: None, one more positional argument, or a tuple of them.

    Raises:
        TypeError: If ``inputs`` is of another type, or more arguments follow a mapping.
    """
    more = additional if isinstance(additional, tuple) else (additional,)
    more = () if additional is None else more
    if isinstance(inputs, Mapping):
        if _takes_whole(model, forward, inputs):
            # The model may expect this type of mapping, and may write into it.
            return (inputs if isinstance(inputs, MutableMapping) else dict(inputs), *more), {}
        if more:
            raise TypeError(
                "additional_forward_args cannot follow a mapping, which names its arguments: put "
                "them into the mapping."
            )
        return (), dict(inputs)
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(
            f"inputs is of type {type(inputs).__name__}: give token ids (B, T), embeddings "
            "(B, T, d), a tokenizer's BatchEncoding (return_tensors='pt'), a dict of keyword "
            "arguments or a tuple of tensors."
        )
    return tensors + more, {}


def takes_mapping(args: tuple[Any, ...]) -> bool:
    """Whether a call begins with a mapping."""
    return bool(args) and isinstance(args[0], Mapping)


def arguments_by_name(
    model: nn.Module, parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """Turn positional arguments into keyword arguments, if the model names all of them.

    Embeddings that are given as ``input_ids`` become ``inputs_embeds``.

    Raises:
        ValueError: If ``input_ids`` has a floating dtype and cannot be embeddings ``(B, T, d)``.
    """
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in parameters.items() if p.kind in by_position]
    if len(args) > len(names):
        return args, kwargs
    named = dict(zip(names, args, strict=False))
    main = getattr(model, "main_input_name", None)
    ids = named.get("input_ids") if main == "input_ids" else None
    if isinstance(ids, Tensor) and ids.is_floating_point():
        if ids.dim() not in (3, 4) or "inputs_embeds" not in parameters:
            raise ValueError(
                f"input_ids is a {ids.dtype} tensor of shape {tuple(ids.shape)}: token ids are "
                "integers. Noise and interpolation need embeddings: pass "
                "model.get_input_embeddings()(input_ids), of shape (B, T, d)."
            )
        named["inputs_embeds"] = named.pop("input_ids")
    return (), {**named, **kwargs}


def _takes_whole(
    model: nn.Module | None, forward: Callable[..., Any], given: Mapping[str, Any]
) -> bool:
    """Whether a function takes a mapping as one argument, and not its entries by name."""
    try:
        if model is None:
            signature = inspect.signature(forward)
        else:
            signature = inspect.Signature(list(parameters_of(model, forward).values()))
    except ValueError:  # a built-in function, or a wrapper's and its model's parameters together
        return False
    if signature.parameters.keys() & given.keys():
        return False
    return not _binds(signature, **given) and _binds(signature, given)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
