"""Functions with a backward pass of their own, which count as one function if they are elementwise.

No rule can see into an ``autograd.Function``: its backward pass is that of the function itself, not
of a linear one. If each number that it returns depends on one number alone, no rule is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from captum_cw.capture.function_call import tensors_in, varies
from captum_cw.capture.linear_gradients import times_ratio
from captum_cw.capture.patching import set_to, shared

__all__ = ["own_functions_as_one"]

#: The number of random choices of numbers that are changed, to see whether the others notice.
MASKS = 2

_is_linearising: ContextVar[bool] = ContextVar("captum_cw_is_linearising", default=False)


@contextmanager
def own_functions_as_one() -> Iterator[None]:
    """Give elementwise functions of a model's own the gradient of ``x * (f(x) / x)``."""
    with set_to(_is_linearising, True), shared("Function.apply", _wrapped()):
        yield


@contextmanager
def _wrapped() -> Iterator[None]:
    original = vars(Function)["apply"]

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        run = original.__get__(None, kind)
        if kind.__module__.partition(".")[0] in ("torch", "captum_cw") or not _is_linearising.get():
            return run(*args, **kwargs)
        varying = [x for x in tensors_in((args, kwargs)) if varies(x)]
        if len(varying) != 1 or not any(varying[0] is x for x in args):
            return run(*args, **kwargs)
        (x,) = varying

        def of(y: Tensor) -> Any:
            with torch.no_grad():
                return run(*(y if z is x else z for z in args), **kwargs)

        with torch._C.DisableTorchFunction():
            if _is_elementwise(of, x.detach()):
                return times_ratio(x, of)
        return run(*args, **kwargs)

    setattr(Function, "apply", classmethod(apply))  # noqa: B010 (mypy knows no other way)
    yield
    setattr(Function, "apply", original)  # noqa: B010


def _is_elementwise(run: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether a function works elementwise on this tensor, and maps zero to zero."""
    before = x.clone()
    try:
        y, zero = run(before), run(torch.zeros_like(x))
        if not isinstance(y, Tensor) or y.shape != x.shape or not torch.equal(before, x):
            return False  # a function that works in place also changes its input
        changed = x.flatten().flip(0).view_as(x) + 1
        generator = torch.Generator(x.device).manual_seed(0)
        for _ in range(MASKS):
            mask = torch.empty_like(x).uniform_(generator=generator) < 0.5
            for kept in (mask, ~mask):
                z = run(torch.where(kept, x, changed))
                if not torch.allclose(y[kept], z[kept], 1e-5, 1e-6):
                    return False
    except Exception:  # the function refuses numbers that the model does not give it
        return False
    return not zero.any()
