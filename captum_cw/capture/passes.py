"""Forward passes of a model, with something around each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_cw.capture.wrapping import wrapping

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
    with wrapping(_Forward(model), functools.partial(_watched, model)):
        token = _around.set((*_around.get(), (model, around)))
        try:
            yield
        finally:
            _around.reset(token)


def _watched(model: nn.Module, forward: Forward) -> Forward:
    def within(arounds: Sequence[Around], *args: Any, **kwargs: Any) -> Any:
        if not arounds:
            return forward(*args, **kwargs)
        *outer, last = arounds
        # A pass that the last one makes of its own is a whole pass of those around it.
        inside = functools.partial(within, outer)
        with last(inside, args, kwargs) as told:
            output = inside(*args, **kwargs)
            told(output)
        return output

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return within([a for watched, a in _around.get() if watched is model], *args, **kwargs)

    return run


@dataclass(frozen=True)
class _Forward:
    """A model's forward: of its class, or put on the model itself, as accelerate does."""

    model: nn.Module

    @property
    def key(self) -> tuple[int, str]:
        return id(self.model), "forward"

    def get(self) -> Forward:
        forward: Forward = self.model.forward
        return forward

    def put(self, wrapper: Forward) -> None:
        self.model.forward = wrapper

    def restore(self, original: Forward) -> None:
        del self.model.forward
        if self.model.forward != original:
            self.model.forward = original
