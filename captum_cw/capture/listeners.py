"""Who observes the attention calls of the current context, and who changes their values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from captum_cw.capture.attention_call import AttentionCall
from captum_cw.capture.patching import set_to

__all__ = [
    "Listener",
    "ValueChange",
    "changing",
    "count_replacements",
    "is_active",
    "is_listening",
    "is_observed",
    "listening",
    "replaced",
    "suspended",
]

Listener = Callable[[AttentionCall], None]

ValueChange = Callable[[nn.Module, int, Tensor], Tensor | None]
"""Takes an attention module, its number of query heads ``H``, and its values ``(B, H_kv, S, d_h)``.
Returns the factors ``(B|1, H|1, S)`` of the values, or None to leave them unchanged."""

_listener: ContextVar[Listener | None] = ContextVar("captum_cw_listener", default=None)
_changes: ContextVar[tuple[ValueChange, ...]] = ContextVar("captum_cw_changes", default=())


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Report the attention calls of this context to ``listener`` only."""
    return set_to(_listener, listener)


def changing(change: ValueChange) -> AbstractContextManager[None]:
    """Change values in this context, after the changes of outer contexts."""
    return set_to(_changes, (*_changes.get(), change))


@contextmanager
def suspended() -> Iterator[tuple[Listener | None, tuple[ValueChange, ...]]]:
    """Suspend the listener and the changes of this context, and yield them.

    So kernels that are called inside are not reported as separate attention calls.
    """
    listener, changes = _listener.get(), _changes.get()
    with set_to(_listener, None), set_to(_changes, ()):
        yield listener, changes


def is_active() -> bool:
    """Whether attention calls in this context are observed or changed."""
    return is_observed() or bool(_changes.get())


def is_observed() -> bool:
    """Whether attention calls in this context are observed."""
    return _listener.get() is not None


def is_listening(listener: Listener) -> bool:
    """Whether attention calls in this context are reported to ``listener``."""
    return _listener.get() == listener


class _Replacements(threading.local):
    count = 0


_replacements = _Replacements()


def replaced(x: Tensor) -> Tensor:
    """Return ``x``, and count that the model in this thread gets it instead of its own tensor."""
    _replacements.count += 1
    return x


def count_replacements() -> int:
    """Return how many tensors of models were replaced in this thread."""
    return _replacements.count
