"""Token ids, followed to the tables that embed them.

A model may reshape, shift, pad or concatenate ids before it embeds them. This module applies the
same functions to the places of the ids, and so knows which row of an embedding belongs to which
token. Ids that a model changes, such as hashes, do not tell which row of a table is whose.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.attention_call import UnsupportedModelError
from captum_cw.capture.dispatch import Proceed
from captum_cw.capture.function_call import (
    SHAPED,
    creates,
    is_in_place,
    name_of,
    substitute,
    tensors_among,
    tensors_in,
)
from captum_cw.capture.linear_gradients import constant

__all__ = ["NOWHERE", "EmbeddedTokens", "Leaf"]

#: The place of an id that is not one of the given ids, such as the token that starts a decoder.
NOWHERE = -1

#: Elementwise functions that leave ids in their range as they are.
KEEPS = {"clamp", "clip", "clamp_min", "clamp_max", "remainder", "mod", "fmod", "abs"}

#: A number that is added to places, to see whether a function moves them.
FAR = 2**30

#: The functions that look rows up, with the places of the table and of the ids among arguments.
LOOKUPS = {"embedding": (1, 0), "getitem": (0, 1), "index_select": (0, 2)}


@dataclass(frozen=True)
class Leaf:
    """A tensor from which gradients are taken: an embedding, or an input of floating numbers.

    Args:
        name: The argument of the model that it belongs to.
        tensor: The leaf.
        places: Which of the flattened ids each row embeds, or -1; None for a floating input.
    """

    name: str | int
    tensor: Tensor
    places: Tensor | None = None


@dataclass(frozen=True)
class _Followed:
    """Integers that were computed from ids.

    Args:
        tensor: The integers.
        name: The argument of the model with the ids.
        places: Which of the flattened ids each integer is; None if the integers are not ids.
        version: The number of times that ``tensor`` was changed in place.
    """

    tensor: Tensor
    name: str | int
    places: Tensor | None
    version: int


class EmbeddedTokens:
    """Follows ids through a forward pass.

    Args:
        ids: The ids by the name of their argument.
        one: The scalar 1 whose gradient is the share of all constants.

    Attributes:
        leaves: The embeddings of the ids so far.
    """

    def __init__(self, ids: Mapping[str | int, Tensor], one: Tensor) -> None:
        self._one = one
        self.leaves: list[Leaf] = []
        self._ids = dict(ids)
        self._known: dict[int, _Followed] = {}
        for name, x in ids.items():
            places = torch.arange(x.numel(), dtype=torch.long, device=x.device).view_as(x)
            self._known[id(x)] = _Followed(x, name, places, x._version)

    def again(self) -> EmbeddedTokens:
        """Return the same for a part of the pass that runs once more."""
        again = copy.copy(self)
        again.leaves = []
        return again

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Run a function, and return an embedding of the ids as a leaf."""
        found = self._among(args, kwargs)
        name = name_of(func)
        only_shape = name in SHAPED and not (args and id(args[0]) in self._known)
        if not found or creates(name) or only_shape:
            return proceed(func, args, kwargs)
        followed = found[0]
        if name in LOOKUPS:
            at_table, at_ids = LOOKUPS[name]
            table, ids = (_argument(args, kwargs, place, name) for place in (at_table, at_ids))
            if isinstance(table, Tensor) and followed.tensor is ids:
                result = proceed(func, args, kwargs)
                floating = result.is_floating_point()
                return self._embedded(followed, result, name) if floating else result
        if name in ("one_hot", "embedding_bag"):
            raise _changed_ids(followed, name)
        if name == "getitem" and isinstance(args[1], tuple) and _is_lookup(args, followed.tensor):
            return self._embedded(followed, proceed(func, args, kwargs), name)
        before = None if not is_in_place(func) else args[0]
        result = proceed(func, args, kwargs)
        if any(x.is_floating_point() for x in tensors_in(result)):
            raise _changed_ids(followed, name)
        places = self._moved(func, name, args, kwargs, proceed)
        changed = result if before is None else before
        if isinstance(changed, Tensor) and _counts(changed):
            self._follow(changed, followed.name, places)
        elif name in ("eq", "ne") and result.numel() > followed.tensor.numel():
            # Compared with each id, as a one-hot vector is made.
            self._known[id(result)] = _Followed(result, followed.name, None, result._version)
        elif isinstance(changed, (list, tuple)):
            parts = places if isinstance(places, (list, tuple)) else [None] * len(changed)
            for x, part in zip(changed, parts, strict=True):
                if isinstance(x, Tensor) and _counts(x):
                    self._follow(x, followed.name, part)
        return result

    def _among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Followed]:
        """Return what is known of the ids among the arguments of a function."""
        return [self._known[id(x)] for x in tensors_among(args, kwargs) if id(x) in self._known]

    def _embedded(self, followed: _Followed, result: Tensor, name: str) -> Tensor:
        # Writing into a view changes ids too.
        if followed.places is None or followed.version != followed.tensor._version:
            raise _changed_ids(followed, name)
        leaf = result.detach().requires_grad_()
        self.leaves.append(Leaf(followed.name, leaf, followed.places))
        shape = *followed.places.shape, *[1] * (leaf.dim() - followed.places.dim())
        known = (followed.places != NOWHERE).view(shape)
        with torch.enable_grad():
            return leaf.clone() if known.all() else leaf.where(known, constant(result, self._one))

    def _moved(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Apply a function to places instead of ids; None if it does not take them."""
        followed = self._among(args, kwargs)
        if any(x.places is None for x in followed):
            return None
        if name in KEEPS:
            return followed[0].places
        if name in ("mul", "rmul", "multiply") and not kwargs and not is_in_place(func):
            func, args = _masked(args, followed[0].tensor)
        found = [self._of_places(func, name, args, kwargs, proceed, add=n) for n in (0, FAR)]
        pairs = zip(*map(tensors_in, found), strict=False)
        # A function that moves places moves all of them alike, whatever their numbers are.
        if not all(torch.equal(a + FAR * (a != NOWHERE), b) for a, b in pairs):
            return None
        return found[0]

    def _of_places(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        proceed: Proceed,
        add: int,
    ) -> Any:
        """Apply a function to places to which a number is added; None if it does not take them."""

        def places(x: Any) -> Any:
            known = self._known.get(id(x)) if isinstance(x, Tensor) else None
            if known is None or known.places is None:
                return x
            return known.places + add * (known.places != NOWHERE)

        def or_nowhere(x: Any) -> Any:
            if isinstance(x, Tensor) and id(x) not in self._known and _counts(x):
                return torch.full_like(x, NOWHERE)
            if isinstance(x, int) and not isinstance(x, bool):
                return NOWHERE
            return places(x)

        if name in ("cat", "concat", "concatenate", "stack"):
            args = (substitute(args[0], or_nowhere), *args[1:])
        elif name in ("where", "masked_fill", "setitem"):
            args = tuple(
                or_nowhere(x) if n == 2 or not n or name == "where" else x
                for n, x in enumerate(args)
            )
        elif name == "copy":
            args = tuple(or_nowhere(x) for x in args)
        elif name == "pad":
            args, kwargs = args[:3], {**kwargs, "value": NOWHERE}
        if is_in_place(func):
            first = places(args[0])
            args = (first.clone() if isinstance(first, Tensor) else first, *args[1:])
        try:
            moved = proceed(func, substitute(args, places), substitute(kwargs, places))
        except (RuntimeError, IndexError, TypeError, ValueError):  # places may be out of range
            return None
        return args[0] if is_in_place(func) else moved

    def _follow(self, x: Tensor, name: str | int, places: Any) -> None:
        """Remember integers that were computed from ids, and whether they are still ids."""
        ids = self._ids[name].flatten()
        if isinstance(places, Tensor) and places.shape == x.shape:
            in_range = (places >= NOWHERE) & (places < len(ids))
            at = places.clamp(0, len(ids) - 1)
            kept = in_range.all() and ((places == NOWHERE) | (ids[at] == x)).all()
            places = places if kept else None
        else:
            places = None
        # The tensor is kept, so that its id is not used again.
        self._known[id(x)] = _Followed(x, name, places, x._version)


def _is_lookup(args: tuple[Any, ...], ids: Tensor) -> bool:
    """Whether a table is indexed by ids, and then by everything."""
    table, index = args
    if not index or not isinstance(table, Tensor) or not table.is_floating_point():
        return False
    first, *rest = index
    whole = all(x is Ellipsis or (isinstance(x, slice) and x == slice(None)) for x in rest)
    return first is ids and whole


def _masked(args: tuple[Any, ...], ids: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Return a product of ids and a mask of zeros and ones as a choice between ids and nothing."""
    first, mask = args
    if mask is ids:
        first, mask = mask, first
    if not isinstance(mask, Tensor) or not ((mask == 0) | (mask == 1)).all():
        return torch.mul, args
    return torch.where, (mask.bool(), first, torch.full_like(first, NOWHERE))


def _counts(x: Tensor) -> bool:
    """Whether a tensor has an integer dtype, as ids do."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    names = {"embedding": ("input", "weight"), "index_select": ("input", "dim", "index")}
    if len(args) > place:
        return args[place]
    return kwargs.get(names.get(name, ("", "", ""))[place])


def _changed_ids(followed: _Followed, function: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model changes the ids {followed.name!r} before the function {function!r} embeds "
        "them, so it is unknown which embedding belongs to which token: give embeddings "
        "(inputs_embeds) instead of ids."
    )
