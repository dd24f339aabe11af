"""Unwrap a model, and run it in evaluation mode, uncompiled."""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from captum_cw._utils.memory import free_bytes
from captum_cw.capture.restoring import evaluating

__all__ = ["check_fits", "evaluation_mode", "model_of", "uncompiled", "unwrapped"]


def unwrapped(forward_func: Any) -> Any:
    """The model inside of wrappers, whose inputs and layers are the ones that are known."""
    while True:
        if isinstance(forward_func, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            forward_func = forward_func.module
        elif hasattr(forward_func, "_orig_mod"):  # compiled
            forward_func = forward_func._orig_mod
        else:
            return forward_func


def model_of(forward_func: object) -> nn.Module | None:
    """The module that a callable belongs to; None where it belongs to none.

    Raises:
        TypeError: If ``forward_func`` cannot be called.
    """
    if isinstance(forward_func, nn.Module):
        return forward_func
    owner = getattr(forward_func, "__self__", None)
    if isinstance(owner, nn.Module):
        return owner
    if not callable(forward_func):
        raise TypeError(
            f"forward_func is of type {type(forward_func).__name__}: give the model, or a callable."
        )
    return None


def evaluation_mode(
    roots: list[nn.Module], model: nn.Module | None
) -> AbstractContextManager[None]:
    """Turns dropout off, and says so; leaves the modules as they were, whatever they do."""
    if any(m.training for root in roots for m in root.modules()):
        if model is None:
            raise ValueError(
                "The layers are in training mode, and the model around them is not known, so "
                "its dropout would stay on: call model.eval() first, or give the model as "
                "forward_func."
            )
        warnings.warn(
            "The model is in training mode: dropout is off for the attribution.", stacklevel=5
        )
    return evaluating(roots)


def uncompiled() -> AbstractContextManager[None]:
    """Runs compiled functions as they were written: what they fuse cannot be seen."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import is slow
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def check_fits(needed: int, device: torch.device, what: str, way_out: str) -> None:
    """Raises a MemoryError if maps of ``needed`` bytes exceed what is free."""
    free = free_bytes(device)
    if needed > free:
        raise MemoryError(
            f"The maps need {needed / 1e9:.1f} GB ({what}), but {free / 1e9:.1f} GB are free. "
            f"{way_out}"
        )
