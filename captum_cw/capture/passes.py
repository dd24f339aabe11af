"""Context managers that run around each forward pass of a model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from torch import nn

from captum_cw.capture.patching import set_to, wrapped_method

__all__ = ["Around", "around_passes"]

Forward = Callable[..., Any]
OnOutput = Callable[[Any], None]
Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], AbstractContextManager[OnOutput]]
"""Takes the function that runs a call, and the call's arguments. Its context manager yields a
function that receives the call's output."""

Method = Literal["forward", "generate"]

_around: ContextVar[tuple[tuple[nn.Module, Method, Around], ...]] = ContextVar(
    "captum_cw_around", default=()
)


@contextmanager
def around_passes(model: nn.Module, around: Around, method: Method = "forward") -> Iterator[None]:
    """Run each call of a model's method inside ``around(...)``, while this context is active.

    Args:
        model: The model.
        around: Returns the context manager for one call.
        method: ``"forward"`` for each forward pass, or ``"generate"`` for each generated text
            (many passes). Nothing happens if the model does not have the method.
    """
    if not callable(getattr(model, method, None)):
        yield
        return
    wrap = functools.partial(_WrappedMethod, model, method)
    arounds = *_around.get(), (model, method, around)
    with wrapped_method(model, method, "passes", wrap), set_to(_around, arounds):
        yield


class _WrappedMethod:
    """A method that runs inside the context managers of its caller's context."""

    def __init__(self, model: nn.Module, method: Method, own: Forward) -> None:
        functools.update_wrapper(self, own)
        self._model, self._method, self._own = model, method, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self._model, self._method
        arounds = [around for *place, around in _around.get() if tuple(place) == mine]
        return self._within(arounds, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        # The copy of a model must call its own method, not that of the original model.
        return copy.deepcopy(self._own, memo)

    def _within(self, arounds: Sequence[Around], *args: Any, **kwargs: Any) -> Any:
        if not arounds:
            return self._own(*args, **kwargs)
        *outer, last = arounds
        # If the last one runs a pass itself, the outer ones treat it as a pass of the model.
        inside = functools.partial(self._within, outer)
        with last(inside, args, kwargs) as on_output:
            output = inside(*args, **kwargs)
            on_output(output)
        return output
