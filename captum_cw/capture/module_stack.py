"""Which modules of a model are running, and what they were given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Run", "entries", "running", "watching"]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a module.

    Args:
        module: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it was given, those in lists and the like left out."""
        for x in (*self.args, *self.kwargs.values()):
            if isinstance(x, Tensor):
                yield x

    def states(self) -> Tensor | None:
        """The hidden states ``(B, T, d)`` that it was given; None if there were none."""
        return next((x for x in self.tensors() if x.is_floating_point() and x.dim() == 3), None)


class _Stack(threading.local):
    # Its own in each thread: a context may be copied into several.
    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.modules = frozenset(modules)
        self.runs: list[Run] = []

    def __reduce__(self) -> tuple[type[_Stack], tuple[tuple[()]]]:
        # A copy of a model, and of the hooks on it, has nothing to do with this.
        return _Stack, ((),)

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # Hooks are shared with other threads, which may run one that has been registered but not
        # yet marked as one that takes keyword arguments.
        if _stack.get() is self:
            self.runs.append(Run(module, args, kwargs or {}))
            told = _entered.get()
            if told is not None:
                told(self.runs[-1])

    def leave(self, module: nn.Module, *_: Any) -> None:
        if _stack.get() is self and any(run.module is module for run in self.runs):
            while self.runs.pop().module is not module:
                pass


_stack: ContextVar[_Stack | None] = ContextVar("captum_cw_running", default=None)


_entered: ContextVar[Callable[[Run], None] | None] = ContextVar("captum_cw_entered", default=None)


@contextmanager
def entries(told: Callable[[Run], None]) -> Iterator[None]:
    """Tells ``told``, and nobody else, of each module that begins to run in this context."""
    token = _entered.set(told)
    try:
        yield
    finally:
        _entered.reset(token)


@contextmanager
def watching(modules: Collection[nn.Module]) -> Iterator[None]:
    """Keeps track of which of the modules are running in this context."""
    current = _stack.get()
    if current is not None and current.modules.issuperset(modules):
        yield
        return
    stack = _Stack(modules)
    with ExitStack() as hooks:
        for module in stack.modules:
            hooks.callback(module.register_forward_pre_hook(stack.enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(stack.leave, always_call=True).remove)
        token = _stack.set(stack)
        try:
            yield
        finally:
            _stack.reset(token)


def running() -> tuple[Run, ...]:
    """The modules that are running, the innermost last."""
    stack = _stack.get()
    return () if stack is None else tuple(stack.runs)
