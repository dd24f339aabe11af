"""The inputs that a target is attributed to, among the arguments of a call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_cw.capture.caches import own_copy
from captum_cw.capture.forward_call import ForwardCall

__all__ = ["Arguments", "own_arguments"]

#: The arguments with token ids. The first positional argument of a callable may have another name.
IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class _Input:
    """One input that a target is attributed to.

    Args:
        tensor: The copy that the model is given.
        put: Puts another tensor in its place among the arguments.
        given: The tensor that the user gave.
    """

    tensor: Tensor
    put: Callable[[Tensor], None]
    given: Tensor


_Given = dict[str | int, _Input]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a pass, and the inputs among them by name or place.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        ids: The token ids.
        floating: The inputs of floating numbers.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    ids: _Given
    floating: _Given

    @property
    def inputs(self) -> _Given:
        """All inputs."""
        return {**self.ids, **self.floating}

    @property
    def first(self) -> Tensor:
        """The first input, token ids before others."""
        return next(iter(self.inputs.values())).tensor

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(self.first)


def own_arguments(call: ForwardCall, inputs: Any) -> Arguments:
    """Return copies of the arguments, and those among the inputs that a target is attributed to."""
    args, kwargs = own_copy((list(call.args), dict(call.kwargs)))
    found = Arguments(args, kwargs, {}, {})
    if isinstance(inputs, Mapping):
        main, given = None, list(inputs.values())
    else:
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        main = given[0]
    places: list[tuple[Any, Any]] = [(kwargs, call.kwargs), (args, dict(enumerate(call.args)))]
    places += [(args[n], x) for n, x in enumerate(call.args) if isinstance(x, Mapping)]
    for mine, theirs in places:
        for key, x in theirs.items():
            if "mask" in str(key) or key == "labels" or not any(x is y for y in given):
                continue
            if isinstance(x, Tensor) and (x.is_floating_point() or key in IDS or x is main):
                kind = found.floating if x.is_floating_point() else found.ids
                kind[key] = _Input(mine[key], functools.partial(operator.setitem, mine, key), x)
    return found
