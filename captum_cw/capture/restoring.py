"""Modules that are as they were after their forward passes.

A forward pass may leave things behind in its model: Qwen2-VL notes the positions of its last text,
dynamic rotary embeddings change their buffers, older code keeps its keys and values in a tensor of
the module, and models of transformers install hooks the first time that somebody asks for hidden
states. What the caller does next with the model must not depend on our passes.
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["evaluating"]

#: What torch keeps in every module, such as parameters, submodules and hooks.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

#: Larger tensors, such as quantised weights, are not copied for what never happens; if one of them
#: is overwritten all the same, a warning says so.
_COPIED_BYTES = 2**20

_MISSING = object()
_MUTABLE = (Tensor, list, dict, set, deque)


class _Kept:
    """A tensor, list, set or dict as it was: the same object, and what was in it."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.version: int | None = None
        self.content: Any = None
        if is_lazy(x):  # a buffer whose size the first pass will tell
            return
        if isinstance(x, Tensor):
            self.version = _version(x)
            if not x.is_meta and x.numel() * x.element_size() <= _COPIED_BYTES:
                self.content = x.detach().clone()
        elif isinstance(x, (list, dict, set, deque)):
            self.content = x.copy()

    def restore(self, name: str) -> None:
        """Puts the content back where it has changed."""
        x, content = self.x, self.content
        if is_lazy(x):
            return
        if isinstance(x, Tensor):
            if self.version is not None and _version(x) == self.version:
                return
            if content is not None:
                x.detach().copy_(content)
            elif self.version is not None:
                warnings.warn(
                    f"The model overwrites its tensor {name!r} of shape {tuple(x.shape)} in a "
                    "forward pass: it is left as it was after the pass, not before it.",
                    stacklevel=6,
                )
        elif isinstance(x, dict):
            if not _same([*x, *x.values()], [*content, *content.values()]):
                x.clear()
                x.update(content)
        elif isinstance(x, set):
            if x != content:
                x.clear()
                x.update(content)
        elif not _same(x, content):
            x.clear()
            x.extend(content)


def _version(x: Tensor) -> int | None:
    """How often a tensor was overwritten; None where torch does not count."""
    return None if x.is_inference() else x._version


def _same(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


class _State:
    """The plain attributes and buffers of a module as they were."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module)
        self.hooks = [frozenset(vars(module)[name]) for name in _HOOKS]
        self.attributes = vars(module).copy()
        self.buffers = module._buffers.copy()
        self.kept = [
            (name, _Kept(x))
            for name, x in (*self.attributes.items(), *self.buffers.items())
            if name not in _OF_TORCH and isinstance(x, _MUTABLE)
        ]

    def restore(self, module: nn.Module) -> None:
        """Puts them back."""
        if type(module) is not self.kind:  # a lazy module, which has found its sizes
            module.training = self.attributes["training"]
            return
        _take_off(module, self.hooks)
        for name, kept in self.kept:
            kept.restore(name)
        _put_back(module._buffers, self.buffers, {})
        own = {"forward": MethodType(type(module).forward, module)}
        _put_back(vars(module), self.attributes, own)


def _take_off(module: nn.Module, before: list[frozenset[int]]) -> None:
    """Removes the hooks that the model itself has put on a module in a pass."""
    for name, known in zip(_HOOKS, before, strict=True):
        hooks = vars(module)[name]
        if len(hooks) == len(known) and known.issuperset(hooks):
            continue
        own = "transformers", type(module).__module__.partition(".")[0]
        for key in [key for key in hooks if key not in known]:
            # Others may belong to another thread: to its observation, or to a probe of the user's.
            if str(getattr(hooks[key], "__module__", "")).partition(".")[0] in own:
                for held in (hooks, vars(module)[f"{name}_with_kwargs"]):
                    held.pop(key, None)


def _put_back(held: dict[str, Any], before: dict[str, Any], own: dict[str, Any]) -> None:
    if _same(held, before) and _same(held.values(), before.values()):
        return
    changed = [n for n, x in held.items() if before.get(n, _MISSING) is not x]
    for name in (*changed, *(before.keys() - held.keys())):
        old, new = before.get(name, _MISSING), held.get(name, _MISSING)
        # A callable is a method that somebody has put there: it is theirs to take away, unless it
        # is the class's own, which transformers 4 leaves on modules that it had wrapped.
        if name in _OF_TORCH or callable(old) or (callable(new) and new != own.get(name)):
            continue
        if old is _MISSING:
            del held[name]
        else:
            held[name] = old


_states: dict[nn.Module, _State] = {}
_users: Counter[nn.Module] = Counter()
_lock = threading.Lock()


@contextmanager
def evaluating(roots: Collection[nn.Module]) -> Iterator[None]:
    """Runs modules in evaluation mode, and leaves them as they were.

    The last of several threads to leave puts back what the first has found: the modes, buffers and
    plain attributes of the modules.

    Args:
        roots: The modules; what is in them counts too.
    """
    modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
    with _lock:
        # All are read before any is changed, so that nothing stays behind where one cannot be read.
        new = {module: _State(module) for module in modules if not _users[module]}
        _states.update(new)
        _users.update(modules)
        for module in modules:
            if module.training:
                module.training = False
    try:
        yield
    finally:
        with _lock, torch.no_grad():
            _users.subtract(modules)
            for module in modules:
                if not _users[module]:
                    del _users[module]
                    _states.pop(module).restore(module)
