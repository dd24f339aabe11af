"""Run a model in float64 throughout, parts that it writes for float32 included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Turns every conversion to float32 into one to float64, as in norms and softmaxes.

    Example:
        >>> with InDouble():
        ...     torch.ones(1, dtype=torch.float64).float().dtype
        torch.float64
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {n: torch.float64 if x is torch.float32 else x for n, x in (kwargs or {}).items()}
        return func(*args, **kwargs)
