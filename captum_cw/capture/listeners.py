"""Register who observes attention calls in a context, and who changes their values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from captum_cw.capture.attention_call import AttentionCall

__all__ = [
    "Listener",
    "ValueChange",
    "alter",
    "altered",
    "changing",
    "is_heard",
    "is_listening",
    "is_observed",
    "listening",
    "taken_over",
]

Listener = Callable[[AttentionCall], None]

ValueChange = Callable[[nn.Module, int, Tensor], Tensor | None]
"""Takes an attention module, ``H`` and its values ``(B, H_kv, S, d_h)``; gives the factors
``(B|1, H|1, S)`` that they are multiplied by, or None to leave them."""

_listener: ContextVar[Listener | None] = ContextVar("captum_cw_listener", default=None)
_changes: ContextVar[tuple[ValueChange, ...]] = ContextVar("captum_cw_changes", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells ``listener`` of attention calls in this context, and nobody else."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def changing(change: ValueChange) -> Iterator[None]:
    """Changes values in this context, on top of what else changes them."""
    token = _changes.set((*_changes.get(), change))
    try:
        yield
    finally:
        _changes.reset(token)


class _Altered(threading.local):
    times = 0


_altered = _Altered()


def altered() -> int:
    """How often this thread has given a model something else than it had computed."""
    return _altered.times


def alter(x: Tensor) -> Tensor:
    """``x``, which the model is given in place of what it had computed."""
    _altered.times += 1
    return x


@contextmanager
def taken_over() -> Iterator[tuple[Listener | None, tuple[ValueChange, ...]]]:
    """While whoever asks deals with an attention call, what is inside of it is none.

    A kernel may hand over to another one: that is still one attention call.
    """
    mine = _listener.get(), _changes.get()
    tokens = _listener.set(None), _changes.set(())
    try:
        yield mine
    finally:
        _listener.reset(tokens[0])
        _changes.reset(tokens[1])


def is_heard() -> bool:
    """Whether anyone wants to know of attention calls, or to change them."""
    return _listener.get() is not None or bool(_changes.get())


def is_observed() -> bool:
    """Whether anyone listens to attention calls that are made now, in this context."""
    return _listener.get() is not None


def is_listening(listener: Listener) -> bool:
    """Whether attention calls made now, in this context, are told to ``listener``."""
    return _listener.get() == listener
