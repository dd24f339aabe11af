"""Key-value caches, which are recognised by their type and not by the name of an argument.

Releases of transformers call the argument ``past_key_values``, ``cache_params`` or ``cache``, and
other models use other names. A cache is an object with the method ``get_seq_length``, or, in older
code, a tuple of the keys and values of each layer.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["find_cache", "is_cache", "own_copy", "tokens_in"]


def is_cache(x: object) -> bool:
    """Whether ``x`` is a key-value cache.

    Example:
        >>> from transformers import DynamicCache
        >>> is_cache(DynamicCache()), is_cache(torch.zeros(1, 5))
        (True, False)
    """
    if isinstance(x, (Tensor, nn.Module)):
        return False
    return callable(getattr(x, "get_seq_length", None)) or _is_tuple_of_layers(x)


def tokens_in(cache: object) -> int:
    """Return the number of tokens that a cache holds; 0 for None."""
    if cache is None:
        return 0
    if _is_tuple_of_layers(cache):
        return int(cache[0][0].shape[-2])  # type: ignore[index]  # a tuple of tuples
    return int(cache.get_seq_length())  # type: ignore[attr-defined]  # see is_cache


def find_cache(values: object) -> Any:
    """Return the first cache among arguments or results; None without a cache.

    Args:
        values: A mapping, a tuple, a list, or an object whose attributes are searched.
    """
    found: Iterable[object]
    if isinstance(values, Mapping):
        found = values.values()
    elif isinstance(values, (tuple, list)):
        found = values
    else:
        found = getattr(values, "__dict__", {}).values()
    return next((x for x in found if is_cache(x)), None)


def own_copy(x: Any) -> Any:
    """Copy an input of a model, with all its tensors, so that a model cannot change the original.

    :func:`copy.deepcopy` would refuse tensors that autograd has recorded.

    Example:
        >>> given = {"keys": torch.zeros(1)}
        >>> own_copy(given)["keys"].add_(1), given["keys"]
        (tensor([1.]), tensor([0.]))
    """
    return _copy(x, {})


def _copy(x: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    if id(x) in known:
        return known[id(x)][1]
    if isinstance(x, (nn.Module, torch.Stream)):  # they are not part of a cache's state
        return x
    if isinstance(x, Tensor):
        copied: Any = x.detach().clone()
    elif isinstance(x, types.MethodType):
        copied = types.MethodType(x.__func__, _copy(x.__self__, known))
    elif isinstance(x, tuple):
        parts = [_copy(y, known) for y in x]
        copied = type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    else:
        try:
            copied = copy.copy(x)
        except Exception:  # for example an open file, which cannot be copied
            copied = x
    known[id(x)] = x, copied  # the original is kept alive, so that its id stays unique
    if copied is x or isinstance(x, (Tensor, types.MethodType, tuple)):
        return copied
    if isinstance(x, (list, set, deque)):
        copied.clear()
        (copied.update if isinstance(x, set) else copied.extend)(_copy(y, known) for y in x)
    held = copied if isinstance(x, dict) else getattr(copied, "__dict__", {})
    for name, y in list(held.items()):
        held[name] = _copy(y, known)
    return copied


def _is_tuple_of_layers(x: object) -> bool:
    """Whether ``x`` is ``((key, value), ...)``, a pair ``(B, H, S, d_h)`` for each layer."""
    return (
        isinstance(x, (tuple, list))
        and len(x) > 0
        and all(isinstance(layer, (tuple, list)) and len(layer) >= 2 for layer in x)
        and all(isinstance(y, Tensor) and y.dim() == 4 for layer in x for y in layer[:2])
    )
