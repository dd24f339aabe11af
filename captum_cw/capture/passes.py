"""Forward passes of a model, with something around each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from captum_cw.capture.wrapping import ForwardOf, wrapping

__all__ = ["Around", "around_passes"]

Forward = Callable[..., Any]
Told = Callable[[Any], None]
Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], AbstractContextManager[Told]]
"""Takes what runs a pass, and what it is about to be called with; is told of what came out."""

_around: ContextVar[tuple[tuple[nn.Module, Around], ...]] = ContextVar(
    "captum_cw_around", default=()
)


@contextmanager
def around_passes(model: nn.Module, around: Around) -> Iterator[None]:
    """Runs each forward pass that ``model`` makes in this context inside of ``around(...)``."""
    with wrapping(ForwardOf(model, "passes"), functools.partial(_Watched, model)):
        token = _around.set((*_around.get(), (model, around)))
        try:
            yield
        finally:
            _around.reset(token)


class _Watched:
    """A forward that runs inside of what is put around it in its caller's context."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        functools.update_wrapper(self, forward)
        self._model, self._forward = model, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arounds = [around for model, around in _around.get() if model is self._model]
        return self._within(arounds, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        # A copy of the model runs itself, as it is, not the model that it was copied from.
        return copy.deepcopy(self._forward, memo)

    def _within(self, arounds: Sequence[Around], *args: Any, **kwargs: Any) -> Any:
        if not arounds:
            return self._forward(*args, **kwargs)
        *outer, last = arounds
        # A pass that the last one makes of its own is a whole pass of those around it.
        inside = functools.partial(self._within, outer)
        with last(inside, args, kwargs) as told:
            output = inside(*args, **kwargs)
            told(output)
        return output
