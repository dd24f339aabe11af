"""Callables that are replaced in place while someone needs it, and put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

__all__ = ["MethodOf", "Place", "wrapping"]


class Place(Protocol):
    """Where a callable is kept."""

    @property
    def key(self) -> tuple[int, str]:
        """What tells this place from all others."""

    def get(self) -> Callable[..., Any]:
        """What is there."""

    def put(self, wrapper: Callable[..., Any]) -> None:
        """Puts something else there."""

    def restore(self, original: Callable[..., Any]) -> None:
        """Puts back what was there."""


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
    """Keeps the callable at a place wrapped; the last user to leave, of any thread, puts it back.

    All users of a place share one wrapper, which asks its caller's context what to do.
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
    """A method of a module: of its class, or put on the module itself, as accelerate does.

    Args:
        module: The module.
        use: What it is wrapped for; each use has a wrapper of its own.
        name: The method.
    """

    module: nn.Module
    use: str
    name: str = "forward"

    @property
    def key(self) -> tuple[int, str]:
        """The module, and the use."""
        return id(self.module), self.use

    def get(self) -> Callable[..., Any]:
        """The method."""
        method: Callable[..., Any] = getattr(self.module, self.name)
        return method

    def put(self, wrapper: Callable[..., Any]) -> None:
        """Puts one on the module."""
        setattr(self.module, self.name, wrapper)

    def restore(self, original: Callable[..., Any]) -> None:
        """Takes it off."""
        delattr(self.module, self.name)
        if getattr(self.module, self.name) != original:
            setattr(self.module, self.name, original)
