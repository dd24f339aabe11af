"""Temporary wrappers around callables, such as the methods of a module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

__all__ = ["MethodOf", "Place", "wrapping"]


class Place(Protocol):
    """A place that holds a callable."""

    @property
    def key(self) -> tuple[int, str]:
        """The unique key of this place."""

    def get(self) -> Callable[..., Any]:
        """Return the callable."""

    def put(self, wrapper: Callable[..., Any]) -> None:
        """Replace the callable by a wrapper."""

    def restore(self, original: Callable[..., Any]) -> None:
        """Restore the original callable."""


@dataclass
class _Wrapping:
    original: Callable[..., Any]
    users: int = 0


_lock = threading.Lock()
_wrapped: dict[tuple[int, str], _Wrapping] = {}


@contextmanager
def wrapping(
    place: Place, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Wrap the callable at a place; the last user to leave, in any thread, restores it.

    All users of a place share one wrapper. The wrapper decides by its caller's context what to do.
    """
    with _lock:
        if place.key not in _wrapped:
            _wrapped[place.key] = _Wrapping(place.get())
            place.put(wrap(_wrapped[place.key].original))
        _wrapped[place.key].users += 1
    try:
        yield
    finally:
        with _lock:
            _wrapped[place.key].users -= 1
            if not _wrapped[place.key].users:
                place.restore(_wrapped.pop(place.key).original)


@dataclass(frozen=True)
class MethodOf:
    """A method of a module, defined by its class or set on the module itself, as accelerate does.

    Args:
        module: The module.
        use: The purpose of the wrapper. Each purpose has its own wrapper.
        name: The name of the method.
    """

    module: nn.Module
    use: str
    name: str = "forward"

    @property
    def key(self) -> tuple[int, str]:
        """The module and the purpose."""
        return id(self.module), self.use

    def get(self) -> Callable[..., Any]:
        """Return the method."""
        method: Callable[..., Any] = getattr(self.module, self.name)
        return method

    def put(self, wrapper: Callable[..., Any]) -> None:
        """Set a wrapper on the module."""
        setattr(self.module, self.name, wrapper)

    def restore(self, original: Callable[..., Any]) -> None:
        """Remove the wrapper."""
        delattr(self.module, self.name)
        if getattr(self.module, self.name) != original:
            setattr(self.module, self.name, original)
