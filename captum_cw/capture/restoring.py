"""Restoring the state of modules after forward passes.

A forward pass may change its model. Qwen2-VL stores the positions of its last text, dynamic rotary
embeddings change their buffers, older code keeps its keys and values in a tensor of the module, and
models of transformers install hooks when hidden states are first requested. The user's
next call must not depend on the passes of this package.
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["evaluating"]

#: The attributes that torch keeps in every module, such as parameters, submodules and hooks.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

#: Larger tensors, such as quantised weights, are not copied, since models hardly ever overwrite
#: them. If one is overwritten, a warning says so.
_COPIED_BYTES = 2**20

_MISSING = object()
_MUTABLE = (Tensor, list, dict, set, deque)
#: Types of most attributes. Whether an object is a tensor takes longer to find out.
_PLAIN = frozenset({bool, int, float, str, type(None)})


class _Snapshot:
    """A snapshot of a tensor, list, set or dict: the object, and a copy of its content."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.version: int | None = None
        self.content: Any = None
        self.has_gradient = isinstance(x, Tensor) and x.grad_fn is not None
        if is_lazy(x):  # the size of this buffer is known after the first pass
            return
        if isinstance(x, Tensor):
            self.version = _version(x)
            if not x.is_meta and x.numel() * x.element_size() <= _COPIED_BYTES:
                self.content = x.detach().clone()
        elif isinstance(x, (list, dict, set, deque)):
            self.content = x.copy()

    def restore(self, name: str) -> None:
        """Restore the content if it has changed."""
        x, content = self.x, self.content
        if is_lazy(x):
            return
        if isinstance(x, Tensor):
            if self.version is not None and _version(x) == self.version:
                return
            if x.grad_fn is not None and not self.has_gradient and not x._is_view():
                x.detach_()  # a pass with gradients wrote into it
            if content is not None:
                with torch.inference_mode(x.is_inference()):
                    x.detach().copy_(content)
            elif self.version is not None:
                warnings.warn(
                    f"The model overwrites its tensor {name!r} of shape {tuple(x.shape)} in a "
                    "forward pass. It is too large to be copied, so it keeps the new content.",
                    stacklevel=6,
                )
        elif not _is_unchanged(x, content):
            x.clear()
            (x.update if isinstance(x, (dict, set)) else x.extend)(content)


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was overwritten; None if torch does not count it."""
    return None if x.is_inference() else x._version


def _same(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _is_unchanged(x: Any, before: Any) -> bool:
    """Whether a list, set or dict still holds what it held before."""
    if isinstance(x, set):
        return x == before  # type: ignore[no-any-return]
    return _same(x, before) and (not isinstance(x, dict) or _same(x.values(), before.values()))


class _ModuleState:
    """A snapshot of the plain attributes and buffers of a module.

    A pass over a short text takes some 50 ms, and a model has hundreds of modules. So a module that
    has neither hooks nor buffers costs little more than a copy of its attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.users = 0  # the number of threads
        self.kind = type(module)
        held = vars(module)
        self.attributes = held.copy()
        self.hooks = [tuple(held[name]) for name in _HOOKS]
        self.buffers = module._buffers.copy() if module._buffers else {}
        own = [(name, held[name]) for name in held.keys() - _OF_TORCH]
        self.kept = [
            (name, _Snapshot(x))
            for name, x in (*own, *self.buffers.items())
            if type(x) not in _PLAIN and isinstance(x, _MUTABLE)
        ]

    def restore(self, module: nn.Module) -> None:
        """Restore the module."""
        if type(module) is not self.kind:  # a lazy module changes its class after the first pass
            module.training = self.attributes["training"]
            return
        held = vars(module)
        for name, known in zip(_HOOKS, self.hooks, strict=True):
            if tuple(held[name]) != known:
                _remove_hooks(module, name, known)
        for name, kept in self.kept:
            kept.restore(name)
        if not _is_unchanged(module._buffers, self.buffers):
            _restore_entries(module._buffers, self.buffers, {})
        if not _is_unchanged(held, self.attributes):
            own = {"forward": MethodType(type(module).forward, module)}
            _restore_entries(held, self.attributes, own)


def _remove_hooks(module: nn.Module, name: str, known: tuple[int, ...]) -> None:
    """Remove the hooks that the model itself installed on a module during a pass."""
    hooks, own = vars(module)[name], ("transformers", type(module).__module__.partition(".")[0])
    for key in [key for key in hooks if key not in known]:
        # Other hooks may belong to another thread: to an observation, or to the user's code.
        if str(getattr(hooks[key], "__module__", "")).partition(".")[0] in own:
            for held in (hooks, vars(module)[f"{name}_with_kwargs"]):
                held.pop(key, None)


def _restore_entries(held: dict[str, Any], before: dict[str, Any], own: dict[str, Any]) -> None:
    """Undo the changes of a pass in a module's attributes or buffers."""
    changed = [n for n, x in held.items() if before.get(n, _MISSING) is not x]
    for name in (*changed, *(before.keys() - held.keys())):
        old, new = before.get(name, _MISSING), held.get(name, _MISSING)
        # A callable is a method that other code has replaced and must restore itself. The exception
        # is the class's own forward, which transformers 4 leaves on modules that it has wrapped.
        if name in _OF_TORCH or callable(old) or (callable(new) and new != own.get(name)):
            continue
        if old is _MISSING:
            del held[name]
        else:
            held[name] = old


#: The states of the modules that passes are running.
_states: dict[nn.Module, _ModuleState] = {}
_lock = threading.Lock()


@contextmanager
def evaluating(roots: Collection[nn.Module]) -> Iterator[None]:
    """Run modules in evaluation mode, and restore them afterwards.

    The modes, buffers and plain attributes of the modules are restored. If several threads use a
    module, the last one to leave restores the state that the first one found.

    Args:
        roots: The modules, including all their submodules.
    """
    modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
    with _lock:
        # All states are read before the first change, in case reading one raises an error.
        new = {module: _ModuleState(module) for module in modules if module not in _states}
        _states.update(new)
        for module in modules:
            _states[module].users += 1
            if module.training:
                module.training = False
    try:
        yield
    finally:
        with _lock, torch.no_grad():
            _leave(modules)


def _leave(modules: list[nn.Module]) -> None:
    """Restore the modules that no other thread uses, even if one of them raises an error."""
    errors: list[BaseException] = []
    for module in modules:
        state = _states[module]
        state.users -= 1
        if state.users:
            continue
        del _states[module]
        try:
            state.restore(module)
        except BaseException as error:  # also an interruption by the user
            errors.append(error)
    if errors:
        raise errors[0]
