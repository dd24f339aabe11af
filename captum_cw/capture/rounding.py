"""Rounding errors: how far numbers may differ that would be equal without rounding."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from captum_cw.functional import widest

__all__ = ["are_near", "in_widest", "product_rounding", "rounding"]

#: The precision of float32 operands in matrix products, by the names of PyTorch's settings: TF32
#: keeps ten bits of the mantissa, and bfloat16 keeps seven.
KEPT = {"high": 2**-10, "tf32": 2**-10, "medium": 2**-7, "bf16": 2**-7}


def rounding(*tensors: Tensor) -> float:
    """Return the relative rounding error of the coarsest dtype among floating tensors.

    Example:
        >>> rounding(torch.ones(2)), rounding(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
        (1.1920928955078125e-07, 0.0078125)
    """
    return max(torch.finfo(x.dtype).eps for x in tensors)


def product_rounding(*tensors: Tensor) -> float:
    """Return the relative rounding error of the operands of the products that gave ``tensors``.

    PyTorch can be set to round float32 operands, for the whole process, by
    ``torch.set_float32_matmul_precision("high")`` or ``"medium"``,
    ``torch.backends.cuda.matmul.allow_tf32``, or ``fp32_precision`` of a backend.

    Example:
        >>> product_rounding(torch.ones(2)) < 1e-6
        True
    """
    if all(torch.finfo(x.dtype).bits == 64 for x in tensors):
        return rounding(*tensors)
    return max(rounding(*tensors), *(KEPT.get(setting, 0.0) for setting in _settings()))


def are_near(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same products are equal up to rounding; NaN equals NaN.

    Example:
        >>> are_near(torch.ones(2), torch.ones(2) + 1e-6), are_near(torch.ones(2), torch.ones(3))
        (True, False)
    """
    tolerance = max(1e-4, 8 * product_rounding(a)) * float(a.detach().nan_to_num().abs().max())
    return a.shape == b.shape and torch.allclose(a, b, 0, tolerance, equal_nan=True)


def _settings() -> list[str]:
    """Return PyTorch's settings for float32 products, without those that cannot be read.

    Since PyTorch 2.9, the old getter raises an error if the settings of backends differ.
    """
    backends = torch.backends
    found = []
    with suppress(RuntimeError):
        found.append(torch.get_float32_matmul_precision())
    for backend in (backends.cuda, backends.mkldnn):
        with suppress(RuntimeError, AttributeError):  # new in PyTorch 2.9
            found.append(backend.matmul.fp32_precision)
    return found or ["highest"]


def in_widest(x: Tensor) -> Tensor:
    """Return ``x`` without a gradient in float64, or in float32 on a device without float64.

    Example:
        >>> in_widest(torch.ones(1)).dtype
        torch.float64
    """
    return x.detach().to(widest(x.device))
