"""Activation modules of several functions, which count as one function.

The parts of an activation, such as a GELU written with a tanh, do not say what the whole does to
its input. So a module without submodules is taken as one function if each of its outputs depends on
its own input alone, and it is zero at zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture.linear_gradients import times_ratio
from captum_cw.capture.linear_rules import varies
from captum_cw.capture.patching import set_to, wrapped_method

__all__ = ["activations_as_one"]

_is_linearising: ContextVar[bool] = ContextVar("captum_cw_is_linearising", default=False)

#: Whether a module was found to be an activation.
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def activations_as_one(modules: Collection[nn.Module]) -> Iterator[None]:
    """Give activation modules the gradient of ``x * (f(x) / x)`` in this context."""
    with ExitStack() as stack, set_to(_is_linearising, True):
        for module in modules:
            if _may_be_activation(module):
                wrap = functools.partial(_Activation, module)
                stack.enter_context(wrapped_method(module, "forward", "activation", wrap))
        yield


def _may_be_activation(module: nn.Module) -> bool:
    """Whether a module has no submodules, and all of its parameters and buffers are scalars."""
    held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    few = all(x.numel() == 1 for x in held)
    return few and not module._modules and not isinstance(module, (nn.Identity, nn.Dropout))


class _Activation:
    """The ``forward`` of a module, which is one function while a pass is linearised."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if not _is_linearising.get() or len(given) != 1 or not varies(given[0]):
            return self._forward(*args, **kwargs)
        x = given[0]
        with torch._C.DisableTorchFunction():
            if self._module not in _tried:
                _tried[self._module] = self._is_elementwise(x.detach())
            if _tried[self._module]:
                return times_ratio(x, self._run)
        return self._forward(*args, **kwargs)

    def _run(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self._forward(x)
            # The module may compute in inference mode.
            return y.clone() if isinstance(y, Tensor) and y.is_inference() else y

    def _is_elementwise(self, x: Tensor) -> bool:
        """Whether the module works elementwise and maps zero to zero."""
        generator = torch.Generator(x.device).manual_seed(0)
        kept = torch.empty_like(x).uniform_(generator=generator) < 0.5
        other = torch.where(kept, x, x.flatten().flip(0).view_as(x) + 1)
        before = x.clone()
        with torch.no_grad():
            y = self._forward(before)
        if not isinstance(y, Tensor) or y.shape != x.shape or not torch.equal(before, x):
            return False  # a module that works in place also changes its input
        z, zero = self._run(other), self._run(torch.zeros_like(x))
        if zero.any():
            return False
        return torch.equal(y[kept], z[kept]) or torch.allclose(y[kept], z[kept], 1e-5, 1e-6)
