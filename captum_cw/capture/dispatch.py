"""Let several followers watch each torch function that runs in a thread, by one function mode.

A follower is called in place of the function, and runs it by ``proceed``, which hands it on to the
followers that began earlier. What a follower computes by itself is not handed to anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch.overrides import TorchFunctionMode

__all__ = ["Follower", "Proceed", "following"]

Proceed = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs a function, given its arguments."""


class Follower(Protocol):
    """Takes a function of torch that was called, and gives what the caller gets."""

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Runs the function by ``proceed(func, args, kwargs)``."""
        ...  # pragma: no cover


class _Dispatcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.followers: list[Follower] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # The mode is off while a function is handled: what a follower starts then gets another.
        before, _local.dispatcher = _local.dispatcher, None
        try:
            return _handed(self.followers, len(self.followers), func, args, kwargs or {})
        finally:
            _local.dispatcher = before


class _Local(threading.local):
    dispatcher: _Dispatcher | None = None


_local = _Local()


def _handed(
    followers: list[Follower], n: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Hands a function to the first ``n`` followers, the last one first."""
    if not n:
        return func(*args, **kwargs)

    def proceed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _handed(followers, n - 1, func, args, kwargs)

    return followers[n - 1](func, args, kwargs, proceed)


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Hands the functions that run in this thread and context to ``follower``."""
    dispatcher = _local.dispatcher
    if dispatcher is not None:
        dispatcher.followers.append(follower)
        try:
            yield
        finally:
            dispatcher.followers.remove(follower)
        return
    dispatcher = _Dispatcher()
    dispatcher.followers.append(follower)
    with dispatcher:
        _local.dispatcher = dispatcher
        try:
            yield
        finally:
            _local.dispatcher = None
