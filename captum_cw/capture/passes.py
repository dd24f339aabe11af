"""Forward passes of a model, with something around each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from torch import nn

from captum_cw.capture.patching import MethodOf, wrapping

__all__ = ["Around", "around_passes"]

Forward = Callable[..., Any]
Told = Callable[[Any], None]
Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], AbstractContextManager[Told]]
"""Takes what runs a call, and the arguments of the call; is told of what came out."""

Method = Literal["forward", "generate"]

_around: ContextVar[tuple[tuple[nn.Module, Method, Around], ...]] = ContextVar(
    "captum_cw_around", default=()
)


@contextmanager
def around_passes(model: nn.Module, around: Around, method: Method = "forward") -> Iterator[None]:
    """Runs each call of ``model``'s method in this context inside of ``around(...)``.

    Args:
        model: The model.
        around: What each call runs inside of.
        method: ``"forward"``: each forward pass; ``"generate"``: each generation of a text, which
            is many passes. A model without that method is left alone.
    """
    if not callable(getattr(model, method, None)):
        yield
        return
    place = MethodOf(model, f"around {method}", method)
    with wrapping(place, functools.partial(_Watched, model, method)):
        token = _around.set((*_around.get(), (model, method, around)))
        try:
            yield
        finally:
            _around.reset(token)


class _Watched:
    """A method that runs inside of what is put around it in its caller's context."""

    def __init__(self, model: nn.Module, method: Method, own: Forward) -> None:
        functools.update_wrapper(self, own)
        self._model, self._method, self._own = model, method, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self._model, self._method
        arounds = [around for *place, around in _around.get() if tuple(place) == mine]
        return self._within(arounds, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        # A copy of the model runs itself, as it is, not the model that it was copied from.
        return copy.deepcopy(self._own, memo)

    def _within(self, arounds: Sequence[Around], *args: Any, **kwargs: Any) -> Any:
        if not arounds:
            return self._own(*args, **kwargs)
        *outer, last = arounds
        # A pass that the last one makes of its own is a whole pass of those around it.
        inside = functools.partial(self._within, outer)
        with last(inside, args, kwargs) as told:
            output = inside(*args, **kwargs)
            told(output)
        return output
