"""How far numbers may lie apart that would be equal if nothing were rounded."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["product_rounding", "rounding"]

#: What products keep of float32 operands, by the names of PyTorch's settings: TF32 has ten bits
#: behind the point, and bfloat16 has seven.
KEPT = {"high": 2**-10, "tf32": 2**-10, "medium": 2**-7, "bf16": 2**-7}


def rounding(*tensors: Tensor) -> float:
    """The rounding of the coarsest dtype among floating tensors, relative to a number.

    Example:
        >>> rounding(torch.ones(2)), rounding(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
        (1.1920928955078125e-07, 0.0078125)
    """
    return max(torch.finfo(x.dtype).eps for x in tensors)


def product_rounding(*tensors: Tensor) -> float:
    """The rounding of the operands of matrix products that gave ``tensors``.

    PyTorch may be set to round float32 operands, in the whole process:
    ``torch.set_float32_matmul_precision("high")`` or ``"medium"``,
    ``torch.backends.cuda.matmul.allow_tf32``, or ``fp32_precision`` of a backend.

    Example:
        >>> product_rounding(torch.ones(2)) < 1e-6
        True
    """
    if all(torch.finfo(x.dtype).bits == 64 for x in tensors):
        return rounding(*tensors)
    return max(rounding(*tensors), *(KEPT.get(setting, 0.0) for setting in _settings()))


def _settings() -> list[str]:
    """What PyTorch says of float32 products; a setting that it cannot tell is another's business.

    Since 2.9 the old question raises an error where the settings of backends differ.
    """
    backends = torch.backends
    found = []
    with suppress(RuntimeError):
        found.append(torch.get_float32_matmul_precision())
    for backend in (backends.cuda, backends.mkldnn):
        with suppress(RuntimeError, AttributeError):  # there since 2.9
            found.append(backend.matmul.fp32_precision)
    return found or ["highest"]
