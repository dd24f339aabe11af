"""The output projection of an attention layer, found by following the head outputs.

``W_O`` is the weight of the linear product whose input is the head outputs that the kernel
returned. Its name and place do not matter (BERT keeps it outside of the attention module). Some
models first multiply the head outputs by a gate or a norm, and the product takes the result. So
this module follows the head outputs through the functions that PyTorch runs, and autograd computes
the factors.

Only functions in this thread are observed. Hooks on modules would also run in other threads that
use the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import TINY, UnsupportedModelError
from captum_cw.capture.dispatch import Proceed, following
from captum_cw.capture.function_call import (
    is_in_place,
    substitute,
    tensors_among,
    tensors_in,
)
from captum_cw.capture.rounding import product_rounding, rounding

__all__ = [
    "HeadFlow",
    "LinearProduct",
    "Reading",
    "is_plain_product",
    "is_unchanged",
    "products_observed",
    "projection",
    "reads",
    "same_place",
]

#: The relative error that a product with a quantised input may have.
ROUNDING = 0.03

#: The functions with which norms compute their scale. It is held fixed, which makes norms linear.
SCALES = {"rsqrt", "sqrt"}


@dataclass(frozen=True)
class LinearProduct:
    """One call of ``result = input @ weight + bias``.

    Args:
        input: ``(..., n)``.
        weight: ``(n, d)``; None if it cannot be read as numbers, for example if it is quantised.
        bias: ``(d,)`` or None.
        result: ``(..., d)``.
        of: Computes the product for another input, which may have another number of rows.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    result: Tensor
    of: Callable[[Tensor], Tensor]

    def read(self, tolerance: float = ROUNDING) -> LinearProduct | None:
        """Compute the weight from the product of unit vectors.

        Args:
            tolerance: The maximum relative error of the result of that weight.

        Returns:
            The product with its weight; None if the product is not linear, or only scales features.
        """
        n = self.input.shape[-1]
        rows = torch.eye(n, dtype=self.input.dtype, device=self.input.device)
        rows = rows[(None,) * (self.input.dim() - 2)]
        try:
            nothing = self.of(torch.zeros_like(rows[..., :1, :])).detach()
            weight = (self.of(rows).detach() - nothing).reshape(n, -1)
        except Exception:  # the product may not accept another number of rows
            return None
        if weight.shape == (n, n) and torch.equal(weight, weight.diag().diag()):
            return None
        dtype = torch.promote_types(self.result.dtype, torch.float32)
        bias = nothing.flatten()
        again = self.input.detach().to(dtype) @ weight.to(dtype) + bias.to(dtype)
        error = (again - self.result.detach().to(dtype)).norm(dim=-1)
        tolerance = max(tolerance, 8 * product_rounding(self.result))
        if (error > tolerance * again.norm(dim=-1) + TINY).any():
            return None
        return replace(self, weight=weight, bias=bias)


def _fits(x: Tensor, head_output: Tensor) -> bool:
    """Whether a product's input has the size of the head outputs ``(B, T, H, d_h)``."""
    y = head_output
    if type(x) is not type(y):  # for example a shard
        return False
    return x.numel() == y.numel() and x.shape[-1] == y.shape[2] * y.shape[3]


def reads(x: Tensor, head_output: Tensor) -> bool:
    """Whether a product's input equals the head outputs ``(B, T, H, d_h)``."""
    y = head_output
    if not _fits(x, y) or x.dtype != y.dtype:
        return False
    return _is_same(x, y) or torch.equal(x.reshape(y.shape), y)


def _is_same(x: Tensor, head_output: Tensor) -> bool:
    """Whether a product's input is the memory of the head outputs, in the same order."""
    y = head_output
    x = x.reshape(y.shape)
    # The strides show whether the same memory has another order, such as tokens before examples. A
    # dimension of size one has any stride.
    strides = zip(y.shape, x.stride(), y.stride(), strict=True)
    return x.data_ptr() == y.data_ptr() and all(a == b for n, a, b in strides if n > 1)


def is_unchanged(x: Tensor, head_output: Tensor, version: int) -> bool:
    """Whether a product's input is the memory of the head outputs, and was not written to.

    Args:
        x: The input.
        head_output: ``(B, T, H, d_h)``.
        version: The version of the head outputs when the kernel returned them.
    """
    y = head_output
    if not _fits(x, y) or x.dtype != y.dtype or x.is_inference():
        return False
    return _is_same(x, y) and x._version == version


def is_plain_product(module: nn.Module | None, product: LinearProduct, head_output: Tensor) -> bool:
    """Whether a module is an ``nn.Linear`` that multiplies the head outputs by its own weight."""
    x, y, weight = product.input, head_output, product.weight
    if type(module) is not nn.Linear or type(weight) is not Tensor or x.is_inference():
        return False
    return weight.data_ptr() == module.weight.data_ptr() and _is_same(x, y)


@dataclass(frozen=True)
class Reading:
    """A tensor that is made of the head outputs alone, and is read by a product or module.

    Args:
        input: The tensor.
        factors: The factors of the head outputs in it, ``(B, T, H, d_h)``; None if they are one.
    """

    input: Tensor
    factors: Tensor | None


class HeadFlow:
    """The path of the head outputs to the projection, with the functions applied to them.

    Args:
        head_output: The tensor that the kernel returned to the model.
        by_token: Arranges a tensor of that shape as ``(B, T, H, d_h)``.
    """

    def __init__(self, head_output: Tensor, by_token: Callable[[Tensor], Tensor]) -> None:
        self.start, self.by_token = head_output, by_token
        # If the caller records gradients, they must be those of the unchanged model.
        self.recorded = head_output.requires_grad and torch.is_grad_enabled()
        self.source = head_output
        if not self.recorded:
            self.source = head_output.detach().requires_grad_()
        self._overwritten = False
        self._known: dict[int, Tensor] = {id(head_output): head_output}
        # The functions that ran, with their arguments and results.
        self._steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def touched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument of a function was computed from the head outputs."""
        return any(id(x) in self._known for x in tensors_among(args, kwargs))

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Run a function on arguments that were computed from the head outputs."""
        if self.recorded or is_in_place(func):
            self._overwritten |= is_in_place(func)
            result = proceed(func, args, kwargs)
        else:
            args_, kwargs_ = _replaced((args, kwargs), {id(self.start): self.source})
            with torch.enable_grad():
                result = _run_with_fixed_scale(func, args_, kwargs_, proceed)
        for x in tensors_in(result):
            self._known[id(x)] = x
        self._steps.append((func, args, kwargs, result))
        return result

    def plain(self, given: Any) -> Any:
        """Return the arguments of a function without the graph that was recorded here."""
        if self.recorded:
            return given
        return _replaced(given, {key: x.detach() for key, x in self._known.items()})

    def reading(self, x: Tensor) -> Reading | None:
        """Return how ``x`` is made of the head outputs; None if it is not."""
        if self._overwritten:  # the head outputs no longer exist to be compared
            return None
        y = self.by_token(self.start)
        if reads(x, y):
            return Reading(x, None)
        factors = self._factors(x) if _fits(x, y) and id(x) in self._known else None
        return None if factors is None else Reading(x, factors)

    def again(self, head_output: Tensor, reading: Reading) -> Tensor:
        """Recompute the input of a reading from other head outputs."""
        if reading.factors is None:
            return self.by_token(head_output).reshape(reading.input.shape)
        now: dict[int, Tensor] = {id(self.start): head_output}
        for func, args, kwargs, before in self._steps:
            args, kwargs = _replaced((args, kwargs), now)
            result = func(*args, **kwargs)
            for old, new in zip(tensors_in(before), tensors_in(result), strict=True):
                now[id(old)] = new
        return now[id(reading.input)]

    def _factors(self, x: Tensor) -> Tensor | None:
        """Return the factors of the head outputs in ``x``; None if it is not their product."""
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
        error = (by * y - x.detach().to(dtype).reshape(y.shape)).abs()
        eps = max(1e-5, 4 * rounding(x, self.start))
        size = (by * y).abs()
        size = size + 1e-3 * size.amax(-1, keepdim=True) + torch.finfo(size.dtype).tiny
        # NaN is not an error here, since padded queries may have it.
        return None if (error > eps * size).any() else by


def _replaced(x: Any, by: dict[int, Tensor]) -> Any:
    return substitute(x, lambda y: by.get(id(y), y))


def same_place(a: object, b: Tensor) -> bool:
    """Whether ``a`` shares the memory of ``b``, possibly in another shape."""
    return (
        isinstance(a, Tensor)
        and a.numel() == b.numel()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.data_ptr() == b.data_ptr()
    )


def _run_with_fixed_scale(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
) -> Any:
    """Run a function, and detach the scale of a norm, so that it is constant as in ALTI."""
    result = proceed(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if name in SCALES:
        return result.detach()
    if name in ("pow", "__pow__"):
        exponent = _argument(args, kwargs, 1, "exponent")
        return result.detach() if isinstance(exponent, (int, float)) and exponent < 1 else result
    if name == "rms_norm":
        x, weight = args[0].detach(), _argument(args, kwargs, 2, "weight")
        gain = torch.ones_like(x) if weight is None else weight.detach().expand_as(x)
        size = (x * gain).square().sum(-1, keepdim=True)
        scale = (result.detach() * x * gain).sum(-1, keepdim=True) / size.clamp(min=TINY)
        product = torch.empty_like(result).copy_(args[0] * (scale * gain))
        product.data.copy_(result.detach())  # bit for bit the result, but linear for autograd
        return product
    return result


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


@contextmanager
def products_observed(
    flow: Callable[[], HeadFlow | None], listener: Callable[[LinearProduct], Tensor | None]
) -> Iterator[None]:
    """Follow head outputs through the functions that run in this thread.

    Args:
        flow: Returns the current path of head outputs, or None.
        listener: Receives every linear product right after it has run. If it returns a tensor, the
            model continues with that tensor instead of the result.
    """

    def follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed) -> Any:
        path = flow()
        if path is not None and not path.touched(args, kwargs):
            path = None
        operands = _operands(func, args, kwargs)
        if operands is None:
            if path is None:
                return proceed(func, args, kwargs)
            return path.run(func, args, kwargs, proceed)
        # A linear product is the end of the path, so it runs without the recorded graph.
        given = (args, kwargs) if path is None else path.plain((args, kwargs))
        result = proceed(func, *given)
        x, weight, bias, of = operands
        changed = listener(LinearProduct(x, weight, bias, result, of))
        return result if changed is None else changed

    with following(follow):
        yield


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None, Callable[[Tensor], Tensor]] | None:
    """Return the input, weight, bias and ``of`` of a linear product; None for other functions."""
    if func is torch.nn.functional.linear:
        x, weight, bias = (
            _argument(args, kwargs, place, name)
            for place, name in enumerate(("input", "weight", "bias"))
        )
        plain = isinstance(weight, nn.Parameter) or type(weight) is Tensor
        plain = plain and type(weight.detach()) is Tensor
        again = partial(func, weight=weight, bias=bias)
        return x, weight.detach().T if plain else None, bias, again
    if kwargs:
        return None
    if func is torch.addmm:
        bias, x, weight = args
        return x, weight, bias, lambda x: func(bias, x, weight)
    is_product = getattr(func, "__name__", "") in ("matmul", "__matmul__") and len(args) == 2
    if is_product and all(isinstance(x, Tensor) for x in args) and args[1].dim() == 2:
        x, weight = args
        return x, weight, None, lambda x: func(x, weight)
    return None


def projection(
    product: LinearProduct | None,
    head_output: Tensor,
    factors: Tensor | None,
    dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Return ``o`` without the bias, and ``W_O`` by heads.

    Args:
        product: The product of the head outputs, with its weight; None if it could not be read.
        head_output: ``(B, T, H, d_h)``.
        factors: The factors of the head outputs before the product, ``(B, T, H, d_h)``, or None.
        dtype: The dtype of the results.
        name: The name of the attention layer, for error messages.

    Returns:
        ``(B, T, d)`` and ``(H, d_h, d)``.

    Raises:
        UnsupportedModelError: If the weight could not be read.
    """
    B, T, H, d_h = head_output.shape
    if product is None or product.weight is None or product.weight.is_meta:
        raise UnsupportedModelError(
            f"The weight of the output projection of layer {name!r} could not be read or computed: "
            "load the model in floating point."
        )
    w = product.weight.detach().to(dtype)
    if factors is None and product.bias is None and product.result.dtype == dtype:
        o = product.result.view(B, T, -1)
    else:
        # The result is rounded in half precision, and includes the bias, which is not in the sum.
        y = head_output.to(dtype) if factors is None else head_output.to(dtype) * factors
        o = y.reshape(B, T, H * d_h) @ w
    return o, w.view(H, d_h, -1)
