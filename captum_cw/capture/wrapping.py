"""Callables that are replaced in place while someone needs it, and put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

__all__ = ["ForwardOf", "Place", "wrapping"]


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
class ForwardOf:
    """A module's forward: of its class, or put on the module itself, as accelerate does.

    Args:
        module: The module.
        use: What it is wrapped for; each use has a wrapper of its own.
    """

    module: nn.Module
    use: str

    @property
    def key(self) -> tuple[int, str]:
        """The module, and the use."""
        return id(self.module), self.use

    def get(self) -> Callable[..., Any]:
        """The forward."""
        forward: Callable[..., Any] = self.module.forward
        return forward

    def put(self, wrapper: Callable[..., Any]) -> None:
        """Puts one on the module."""
        self.module.forward = wrapper

    def restore(self, original: Callable[..., Any]) -> None:
        """Takes it off."""
        del self.module.forward
        if self.module.forward != original:
            self.module.forward = original
