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
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    given = {id(x) for x in ((values,) if isinstance(values, Tensor) else values)}
    ids: _Given = {}
    floating: _Given = {}
    for mine, theirs in ((args, call.args), (kwargs, call.kwargs)):
        _find_inputs(mine, theirs, given, ids, floating)
    return Arguments(args, kwargs, ids, floating)


def _find_inputs(mine: Any, theirs: Any, given: set[int], ids: _Given, floating: _Given) -> None:
    for key, x in theirs.items() if isinstance(theirs, Mapping) else enumerate(theirs):
        if isinstance(x, Mapping) and id(x) not in given:
            _find_inputs(mine[key], x, {id(y) for y in x.values()}, ids, floating)
        if not isinstance(x, Tensor) or id(x) not in given or "mask" in str(key) or key == "labels":
            continue
        found = _Input(mine[key], functools.partial(operator.setitem, mine, key), x)
        if x.is_floating_point():
            floating[key] = found
        elif key in IDS or key == 0:
            ids[key] = found
