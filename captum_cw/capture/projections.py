"""The output projection of an attention layer, found by the data.

``W_O`` is the weight of the linear product that reads the head outputs which the kernel returned,
whatever its name and wherever it stands (BERT keeps it beside the attention module). Products are
seen as the functions that PyTorch runs, in this thread only: hooks on modules would be shared with
whoever else runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_cw.capture.calls import UnsupportedModelError

__all__ = ["LinearProduct", "linear_products", "output_and_weight"]


@dataclass(frozen=True)
class LinearProduct:
    """``result = input @ weight + bias``, as it ran.

    Args:
        input: ``(..., n)``.
        weight: ``(n, d)``.
        bias: ``(d,)`` or None.
        result: ``(..., d)``.
        of: The same product of another input of that shape.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    result: Tensor
    of: Callable[[Tensor], Tensor]

    def reads(self, head_output: Tensor) -> bool:
        """Whether the input is the head outputs ``(B, T, H, d_h)``."""
        x, y = self.input, head_output
        if x.numel() != y.numel() or x.dtype != y.dtype or x.shape[-1] != y.shape[2] * y.shape[3]:
            return False
        return x.data_ptr() == y.data_ptr() or torch.equal(x.reshape(y.shape), y)


@contextmanager
def linear_products(listener: Callable[[LinearProduct], Tensor | None]) -> Iterator[None]:
    """Tells ``listener`` of every linear product in this thread, right after it has run.

    Where it returns a tensor, the model goes on with that in place of the result.
    """
    with _Products(listener):
        yield


class _Products(TorchFunctionMode):
    """What ``nn.Linear`` and transformers' ``Conv1D`` run."""

    def __init__(self, listener: Callable[[LinearProduct], Tensor | None]) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            product = _linear(result, *args, **(kwargs or {}))
        elif func is torch.addmm and not kwargs:
            bias, x, weight = args
            product = LinearProduct(x, weight, bias, result, lambda x: func(bias, x, weight))
        else:
            return result
        changed = self.listener(product)
        return result if changed is None else changed


def _linear(
    result: Tensor,
    input: Tensor,  # noqa: A002  the name that torch gives it
    weight: Tensor,
    bias: Tensor | None = None,
) -> LinearProduct:
    def again(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    return LinearProduct(input, weight.T, bias, result, again)


def output_and_weight(
    product: LinearProduct, head_output: Tensor, dtype: torch.dtype, name: str
) -> tuple[Tensor, Tensor]:
    """``o`` without the bias, and ``W_O`` by heads.

    Args:
        product: What read the head outputs.
        head_output: ``(B, T, H, d_h)``.
        dtype: What to compute in.
        name: The attention layer, for messages.

    Returns:
        ``(B, T, d)`` and ``(H, d_h, d)``.

    Raises:
        UnsupportedModelError: If the weight cannot be read as numbers, as where it is quantised.
    """
    B, T, H, d_h = head_output.shape
    weight = product.weight.detach()
    if type(weight) is not Tensor or not weight.is_floating_point() or weight.is_meta:
        raise UnsupportedModelError(
            f"The output projection of layer {name!r} has weights of type "
            f"{type(weight).__name__} ({weight.dtype}): load the model in floating point."
        )
    w = weight.to(dtype)
    if product.bias is None and product.result.dtype == dtype:
        o = product.result.view(B, T, -1)
    else:
        # In half precision the result is rounded, and a bias is no part of the sum.
        o = head_output.reshape(B, T, H * d_h).to(dtype) @ w
    return o, w.view(H, d_h, -1)
