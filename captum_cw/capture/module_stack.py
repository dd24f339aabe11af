"""The modules of a model that are running, and their inputs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_cw._utils.memory import collection_paused
from captum_cw.capture.patching import set_to

__all__ = ["Run", "innermost", "notifying", "running", "tracking"]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a module.

    Args:
        module: The module.
        args: The positional arguments of its ``forward``.
        kwargs: The keyword arguments of its ``forward``.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over the arguments that are tensors, without those inside of lists or dicts."""
        for x in (*self.args, *self.kwargs.values()):
            if isinstance(x, Tensor):
                yield x

    def states(self) -> Tensor | None:
        """Return the hidden states ``(B, T, d)`` among the arguments; None without any."""
        return next((x for x in self.tensors() if x.is_floating_point() and x.dim() == 3), None)


class _Stack(threading.local):
    # Each thread has its own content, since a context may be copied into several threads.
    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.modules: frozenset[nn.Module] = frozenset(modules)
        self.runs: list[Run] = []

    def __reduce__(self) -> tuple[type[_Stack], tuple[tuple[()]]]:
        # If a model is copied together with its hooks, the copy must not use this stack.
        return _Stack, ((),)

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # Another thread may call this hook without kwargs, just before torch marks it as a hook
        # that takes them.
        if _stack.get() is self:
            self.runs.append(Run(module, args, kwargs or {}))
            on_enter = _on_enter.get()
            if on_enter is not None:
                on_enter(self.runs[-1])

    def leave(self, module: nn.Module, *_: Any) -> None:
        if _stack.get() is self and any(run.module is module for run in self.runs):
            while self.runs.pop().module is not module:
                pass


_stack: ContextVar[_Stack | None] = ContextVar("captum_cw_running", default=None)
_on_enter: ContextVar[Callable[[Run], None] | None] = ContextVar("captum_cw_on_enter", default=None)


def notifying(on_enter: Callable[[Run], None]) -> AbstractContextManager[None]:
    """Call ``on_enter``, and no outer one, for each module that starts to run in this context."""
    return set_to(_on_enter, on_enter)


@contextmanager
def tracking(modules: Collection[nn.Module], *, layers: bool = True) -> Iterator[None]:
    """Track which of the modules are running in this context.

    Args:
        modules: The modules.
        layers: Whether layers of PyTorch without submodules are tracked too, such as linear ones.
            They are half of a model, and none of them computes attention.
    """
    tracked = set(modules if layers else itertools.filterfalse(_is_single_layer, modules))
    current = _stack.get()
    if current is not None and current.modules.issuperset(tracked):
        yield
        return
    stack = _Stack(tracked)
    hooks: list[RemovableHandle] = []
    try:
        with collection_paused():
            for module in stack.modules:
                hooks.append(module.register_forward_pre_hook(stack.enter, with_kwargs=True))
                hooks.append(module.register_forward_hook(stack.leave, always_call=True))
        with set_to(_stack, stack):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_single_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own without submodules."""
    is_of_torch = type(module).__module__.startswith("torch.nn.modules")
    return is_of_torch and next(module.children(), None) is None


def running() -> tuple[Run, ...]:
    """Return the runs of the modules that are running, innermost last."""
    stack = _stack.get()
    return () if stack is None else tuple(stack.runs)


def innermost() -> nn.Module | None:
    """Return the innermost module that is running; None if no module is."""
    runs = running()
    return runs[-1].module if runs else None
