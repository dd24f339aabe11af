"""The output projection of an attention layer, found by the data.

``W_O`` is the weight of the linear product that reads the head outputs which the kernel returned,
whatever its name and wherever it stands (BERT keeps it beside the attention module). Where a model
multiplies the head outputs first, by a gate or by a norm, the product reads what comes of that:
head outputs are followed through the functions that PyTorch runs, and autograd tells the factors.

Functions are seen in this thread only: hooks on modules would be shared with whoever else runs
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import TINY, UnsupportedModelError
from captum_cw.capture.dispatch import Proceed, following
from captum_cw.capture.rounding import product_rounding, rounding

__all__ = [
    "HeadFlow",
    "LinearProduct",
    "fits",
    "functions",
    "in_place",
    "projection",
    "reads",
    "same_place",
]

#: How far a product with a quantised input may be from that of its weight.
ROUNDING = 0.03

#: What norms make of the size of their input: it is held fixed, which makes them linear.
SCALES = {"rsqrt", "sqrt"}


@dataclass(frozen=True)
class LinearProduct:
    """``result = input @ weight + bias``, as it ran.

    Args:
        input: ``(..., n)``.
        weight: ``(n, d)``; None where it cannot be read as numbers, as where it is quantised.
        bias: ``(d,)`` or None.
        result: ``(..., d)``.
        of: The same product of another input of that shape, or of another number of rows.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    result: Tensor
    of: Callable[[Tensor], Tensor]

    def read(self, tolerance: float = ROUNDING) -> LinearProduct | None:
        """The product with its weight, asked for row by row; None if it is not linear.

        Nor is it a projection where it only multiplies each feature.

        Args:
            tolerance: How far the result may be from that of the weight, relative to it.
        """
        n = self.input.shape[-1]
        rows = torch.eye(n, dtype=self.input.dtype, device=self.input.device)
        rows = rows[(None,) * (self.input.dim() - 2)]
        try:
            nothing = self.of(torch.zeros_like(rows[..., :1, :])).detach()
            weight = (self.of(rows).detach() - nothing).reshape(n, -1)
        except Exception:  # it may be made for no other number of rows
            return None
        if weight.shape == (n, n) and torch.equal(weight, weight.diag().diag()):
            return None
        dtype = torch.promote_types(self.result.dtype, torch.float32)
        bias = nothing.flatten()
        again = self.input.detach().to(dtype) @ weight.to(dtype) + bias.to(dtype)
        wrong = (again - self.result.detach().to(dtype)).norm(dim=-1)
        tolerance = max(tolerance, 8 * product_rounding(self.result))
        if (wrong > tolerance * again.norm(dim=-1) + TINY).any():
            return None
        return replace(self, weight=weight, bias=bias)


def fits(x: Tensor, head_output: Tensor) -> bool:
    """Whether a product's input is as large as the head outputs ``(B, T, H, d_h)``."""
    y = head_output
    if type(x) is not type(y):  # a shard of it, say
        return False
    return x.numel() == y.numel() and x.shape[-1] == y.shape[2] * y.shape[3]


def reads(x: Tensor, head_output: Tensor) -> bool:
    """Whether a product's input is the head outputs ``(B, T, H, d_h)``."""
    y = head_output
    if not fits(x, y) or x.dtype != y.dtype:
        return False
    x = x.reshape(y.shape)
    # In another order, such as tokens before examples, the same numbers may lie in the same place.
    return (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()) or torch.equal(x, y)


@dataclass(frozen=True)
class _Step:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class HeadFlow:
    """Head outputs on their way to the projection, and what is done to them.

    Args:
        head_output: The tensor that the kernel gave to the model.
        by_token: Puts something of its shape into ``(B, T, H, d_h)``.
    """

    def __init__(self, head_output: Tensor, by_token: Callable[[Tensor], Tensor]) -> None:
        self.start, self.by_token = head_output, by_token
        # Whoever asks for gradients gets those of the model as it is.
        self.recorded = head_output.requires_grad and torch.is_grad_enabled()
        self.source = head_output
        if not self.recorded:
            self.source = head_output.detach().requires_grad_()
        self.overwritten = False
        self._known: dict[int, Tensor] = {id(head_output): head_output}
        self._steps: list[_Step] = []

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor comes from the head outputs."""
        return id(x) in self._known

    def touched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function is given something that comes from the head outputs."""
        return any(id(x) in self._known for x in _flat((*args, *kwargs.values())))

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Runs a function on something that comes from the head outputs."""
        if self.recorded or in_place(func):
            self.overwritten |= in_place(func)
            result = proceed(func, args, kwargs)
        else:
            given = _replaced((args, kwargs), {id(self.start): self.source})
            with torch.enable_grad():
                result = _with_fixed_scale(func, *given, proceed)
        for x in _flat((result,)):
            self._known[id(x)] = x
        self._steps.append(_Step(func, args, kwargs, result))
        return result

    def plain(self, given: Any) -> Any:
        """Arguments as the model would have them if it were not followed."""
        if self.recorded:
            return given
        return _replaced(given, {key: x.detach() for key, x in self._known.items()})

    def again(self, head_output: Tensor, x: Tensor) -> Tensor:
        """What ``x`` would be for other head outputs."""
        now: dict[int, Tensor] = {id(self.start): head_output}
        for step in self._steps:
            args, kwargs = _replaced((step.args, step.kwargs), now)
            result = step.func(*args, **kwargs)
            for old, new in zip(_flat((step.result,)), _flat((result,)), strict=True):
                now[id(old)] = new
        return now[id(x)]

    def factors(self, x: Tensor) -> Tensor | None:
        """What head outputs were multiplied by to give ``x``; None if that is not all.

        Returns:
            ``(B, T, H, d_h)``.
        """
        if not x.requires_grad:
            return None
        with torch.enable_grad():
            (by,) = torch.autograd.grad(
                x, self.source, torch.ones_like(x), retain_graph=True, allow_unused=True
            )
        if by is None:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        by, y = (self.by_token(z).detach().to(dtype) for z in (by, self.start))
        wrong = (by * y - x.detach().to(dtype).reshape(y.shape)).abs()
        eps = max(1e-5, 4 * rounding(x, self.start))
        size = (by * y).abs()
        size = size + 1e-3 * size.amax(-1, keepdim=True) + torch.finfo(size.dtype).tiny
        # NaN is not wrong: padded queries may have it.
        return None if (wrong > eps * size).any() else by


def _flat(items: Any) -> Iterator[Tensor]:
    for x in items:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _flat(x)


def _replaced(x: Any, by: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return by.get(id(x), x)
    if isinstance(x, (list, tuple)) and type(x) in (list, tuple):
        return type(x)(_replaced(y, by) for y in x)
    if isinstance(x, dict):
        return {name: _replaced(y, by) for name, y in x.items()}
    return x


def same_place(a: object, b: Tensor) -> bool:
    """Whether ``a`` is the numbers of ``b`` in the same place, whatever its shape."""
    return (
        isinstance(a, Tensor)
        and a.numel() == b.numel()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.data_ptr() == b.data_ptr()
    )


def in_place(func: Any) -> bool:
    """Whether a function changes its first argument, by PyTorch's naming."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _with_fixed_scale(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
) -> Any:
    """Runs a function; the scale of a norm counts as a constant, as ALTI has it."""
    result = proceed(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if name in SCALES or (name in ("pow", "__pow__") and _exponent(args, kwargs) < 1):
        return result.detach()
    if name == "rms_norm":
        x, weight = args[0].detach(), _argument(args, kwargs, 2, "weight")
        gain = torch.ones_like(x) if weight is None else weight.detach().expand_as(x)
        size = (x * gain).square().sum(-1, keepdim=True)
        scale = (result.detach() * x * gain).sum(-1, keepdim=True) / size.clamp(min=TINY)
        times: Callable[..., Tensor] = _Times.apply  # some releases of torch have no types for it
        return times(args[0], result.detach(), scale * gain)
    return result


class _Times(torch.autograd.Function):
    """What came of an input, as that input times constant factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factors,) = ctx.saved_tensors
        return grads[0] * factors, None, None


def _exponent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    exponent = _argument(args, kwargs, 1, "exponent")
    return float(exponent) if isinstance(exponent, (int, float)) else 1.0


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


@contextmanager
def functions(
    flow: Callable[[], HeadFlow | None], listener: Callable[[LinearProduct], Tensor | None]
) -> Iterator[None]:
    """Follows head outputs through the functions that run in this thread.

    Args:
        flow: Says which ones are on their way.
        listener: Is told of every linear product, right after it has run; where it returns a
            tensor, the model goes on with that in place of the result.
    """
    with following(_Functions(flow, listener)):
        yield


class _Functions:
    def __init__(
        self,
        flow: Callable[[], HeadFlow | None],
        listener: Callable[[LinearProduct], Tensor | None],
    ) -> None:
        self.flow, self.listener = flow, listener

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        flow = self.flow()
        linear = _is_linear(func, args, kwargs)
        touched = flow is not None and flow.touched(args, kwargs)
        if flow is not None and touched and not linear:
            return flow.run(func, args, kwargs, proceed)
        # What autograd was asked for ends here.
        given = flow.plain((args, kwargs)) if flow is not None and touched else (args, kwargs)
        result = proceed(func, *given)
        if not linear:
            return result
        if func is torch.addmm:
            bias, x, weight = args
            product = LinearProduct(x, weight, bias, result, lambda x: func(bias, x, weight))
        elif func is torch.nn.functional.linear:
            product = _linear(result, *args, **kwargs)
        else:
            x, weight = args
            product = LinearProduct(x, weight, None, result, lambda x: func(x, weight))
        changed = self.listener(product)
        return result if changed is None else changed


def _is_linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function is the product of states and a weight."""
    if func is torch.nn.functional.linear:
        return True
    if kwargs:
        return False
    if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
        return len(args) == 2 and all(isinstance(x, Tensor) for x in args) and args[1].dim() == 2
    return func is torch.addmm


def _linear(
    result: Tensor,
    input: Tensor,  # noqa: A002  the name that torch gives it
    weight: Tensor,
    bias: Tensor | None = None,
) -> LinearProduct:
    def again(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    plain = isinstance(weight, nn.Parameter) or type(weight) is Tensor
    plain = plain and type(weight.detach()) is Tensor
    return LinearProduct(input, weight.detach().T if plain else None, bias, result, again)


def projection(
    product: LinearProduct | None,
    head_output: Tensor,
    factors: Tensor | None,
    dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor]:
    """``o`` without the bias, and ``W_O`` by heads.

    Args:
        product: What read the head outputs, with its weight; None if it could not be read.
        head_output: ``(B, T, H, d_h)``.
        factors: Likewise: what they were multiplied by before; None if by nothing.
        dtype: What to compute in.
        name: The attention layer, for messages.

    Returns:
        ``(B, T, d)`` and ``(H, d_h, d)``.

    Raises:
        UnsupportedModelError: If there is no weight.
    """
    B, T, H, d_h = head_output.shape
    if product is None or product.weight is None or product.weight.is_meta:
        raise UnsupportedModelError(
            f"The weight of the output projection of layer {name!r} cannot be read, nor asked for: "
            "load the model in floating point."
        )
    w = product.weight.detach().to(dtype)
    if factors is None and product.bias is None and product.result.dtype == dtype:
        o = product.result.view(B, T, -1)
    else:
        # In half precision the result is rounded, and a bias is no part of the sum.
        y = head_output.to(dtype) if factors is None else head_output.to(dtype) * factors
        o = y.reshape(B, T, H * d_h) @ w
    return o, w.view(H, d_h, -1)
