"""Let several observers follow the torch functions that run in a thread, by one function mode.

An observer is called instead of the function. It runs the function by calling ``proceed``, which
passes it on to the observers that started earlier. Functions that an observer calls by itself are
not observed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Follower", "Proceed", "following"]

Proceed = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs a function with the given positional and keyword arguments."""


class Follower(Protocol):
    """Runs a function by ``proceed(func, args, kwargs)``, and returns the result for the caller."""

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Run ``func(*args, **kwargs)``."""


#: Functions that only read what is known of a tensor. They make up half of a model's calls, and no
#: observer needs them.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.untyped_storage),
    *(torch.is_tensor, torch.is_floating_point, torch.is_complex),
}


class _Dispatcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.followers: list[Follower] = []
        self.run: Proceed = _plain

    def arrange(self) -> None:
        """Let the last observer be called first, which passes functions on to those before it."""
        self.run = _plain
        for follower in self.followers:
            self.run = partial(follower, proceed=self.run)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            return func(*args, **(kwargs or {}))
        # The mode is off while a function is handled, so observers that start now need another.
        before, _local.dispatcher = _local.dispatcher, None
        try:
            return self.run(func, args, kwargs or {})
        finally:
            _local.dispatcher = before


class _Local(threading.local):
    dispatcher: _Dispatcher | None = None


_local = _Local()


def _plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Call ``follower`` for each torch function that runs in this thread and context."""
    outer = _local.dispatcher
    dispatcher = outer or _Dispatcher()
    with nullcontext() if outer else dispatcher:
        _local.dispatcher = dispatcher
        dispatcher.followers.append(follower)
        dispatcher.arrange()
        try:
            yield
        finally:
            dispatcher.followers.remove(follower)
            dispatcher.arrange()
            _local.dispatcher = outer
