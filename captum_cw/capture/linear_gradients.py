"""Tensors with the values of a model's functions and the gradients of linear ones.

Each function here leaves the numbers of a forward pass as they are, and decides only what
:mod:`torch.autograd` passes back through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["constant", "scale_gradient", "scaled_gradient", "times_ratio", "with_gradient_of"]

#: Where the limit of a ratio at zero is read.
NEAR_ZERO = 1e-4


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``, whose gradient is multiplied by ``factor``.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> scaled_gradient(x, 0.5).backward()
        >>> x.grad
        tensor([0.5000])
    """
    result: Tensor = _Scaled.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


def scale_gradient(result: Tensor, factor: float) -> None:
    """Multiply the gradient at a new tensor by ``factor``, also where the model writes into it.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = 3 * x
        >>> scale_gradient(y, 0.5)
        >>> y.backward()
        >>> x.grad
        tensor([1.5000])
    """
    # A view would lose the hook where the model writes into it.
    whole = result if result._base is None else result._base
    whole.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]


def with_gradient_of(linear: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return the result of ``run``, with the gradient of ``linear``.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = with_gradient_of(3 * x, lambda: torch.tensor([2.0]))
        >>> y.backward()
        >>> y.detach(), x.grad
        (tensor([2.]), tensor([3.]))
    """
    result: Tensor = _Replaced.apply(linear, run)  # type: ignore[no-untyped-call]
    return result


def times_ratio(x: Tensor, run: Callable[[Tensor], Tensor], *, is_rounded: bool = False) -> Tensor:
    """Return ``run(x)`` as the product of ``x`` and the ratio ``run(x) / x``, which is held fixed.

    Where ``x`` is zero, the ratio is its limit.

    Args:
        x: The input.
        run: An elementwise function that is zero at zero.
        is_rounded: Whether ``run`` may round numbers that are larger than its result, as
            ``exp(x) - 1`` does. Then the ratio is computed in single precision at least, and is its
            limit also where ``x`` is nearly zero.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> times_ratio(x, torch.square).backward()
        >>> x.grad
        tensor([2.])
    """
    result: Tensor = _TimesRatio.apply(x, run, is_rounded)  # type: ignore[no-untyped-call]
    return result


def constant(value: Tensor, one: Tensor) -> Tensor:
    """Return ``value`` as ``value * one``, so that the gradient of ``one`` is the constant's share.

    Args:
        value: A bias, a learned position, or another tensor that does not depend on the inputs.
        one: The scalar 1.

    Example:
        >>> one = torch.ones((), requires_grad=True)
        >>> constant(torch.tensor([2.0, float("-inf")]), one)[0].backward()
        >>> one.grad
        tensor(2.)
    """
    result: Tensor = _Constant.apply(value, one)  # type: ignore[no-untyped-call]
    return result


class _Scaled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


class _Replaced(Function):
    @staticmethod
    def forward(ctx: Any, linear: Tensor, run: Callable[[], Tensor]) -> Tensor:
        ctx.dtype = linear.dtype
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None


class _TimesRatio(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], is_rounded: bool) -> Tensor:
        value = run(x)
        ctx.dtype = x.dtype
        ctx.save_for_backward(_ratio(x, value, run, is_rounded))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (ratio,) = ctx.saved_tensors
        return (grads[0] * ratio).to(ctx.dtype), None, None


def _ratio(x: Tensor, value: Tensor, run: Callable[[Tensor], Tensor], is_rounded: bool) -> Tensor:
    """Return ``run(x) / x``, or its limit at zero, where ``value`` is ``run(x)``."""
    if not is_rounded:
        ratio = value / x
        is_known = ratio.sum(dtype=torch.float32).isfinite()  # 0 / 0 is NaN
        return ratio if is_known else _with_limits(x, value, run, 0.0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    near = torch.finfo(wide.dtype).eps ** 0.5
    return _with_limits(wide, value if wide is x else run(wide), run, near)


def _with_limits(x: Tensor, value: Tensor, run: Callable[[Tensor], Tensor], near: float) -> Tensor:
    """Return ``value / x``, or its limit where ``x`` is at most ``near`` from zero."""
    limit = torch.full_like(x, max(near, NEAR_ZERO)).copysign(x)
    return torch.where(x.abs() <= near, run(limit) / limit, value / x)


class _Constant(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, one: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        ctx.like = one.dtype, one.device
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (value,) = ctx.saved_tensors
        dtype, device = ctx.like
        gradient = grads[0].to(dtype)
        # A mask of minus infinity has no effect where the gradient is zero.
        share = (gradient * value).masked_fill(gradient == 0, 0)
        return None, share.sum().to(device)
