"""Temporary values of context variables, and temporary wrappers that all threads share."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

__all__ = ["set_to", "shared", "wrapped_method"]

T = TypeVar("T")

_lock = threading.Lock()
_users: Counter[Hashable] = Counter()
_active: dict[Hashable, ExitStack] = {}


@contextmanager
def set_to(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Set a context variable while this context is active."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def shared(key: Hashable, context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a context once for all users of a key.

    The first user enters its context, and the last user to leave, in any thread, exits it.
    """
    with _lock:
        if key not in _active:
            stack = ExitStack()
            stack.enter_context(context)
            _active[key] = stack
        _users[key] += 1
    try:
        yield
    finally:
        with _lock:
            _users[key] -= 1
            if not _users[key]:
                del _users[key]
                _active.pop(key).close()


def wrapped_method(
    module: nn.Module, name: str, use: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> AbstractContextManager[None]:
    """Wrap a method of a module.

    All users of one purpose share one wrapper. It decides by the context of its caller what to do.

    Args:
        module: The module.
        name: The name of the method.
        use: The purpose of the wrapper.
        wrap: Returns the wrapper of a method.
    """
    return shared((id(module), name, use), _wrapped(module, name, wrap))


@contextmanager
def _wrapped(
    module: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    method = getattr(module, name)
    setattr(module, name, wrap(method))
    yield
    delattr(module, name)
    if getattr(module, name) != method:  # it was set on the module itself, as accelerate does
        setattr(module, name, method)
