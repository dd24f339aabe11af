"""What tells models, data and methods apart, so that runs of different ones do not mix."""

from __future__ import annotations

import zlib
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.attr import TokenScores
from captum_cw.attr.layer import AttentionAttribution

__all__ = ["checksum", "described", "fingerprint"]


def checksum(*tensors: Tensor) -> str:
    """Of the bytes of some tensors, as eight hexadecimal digits."""
    crc = 0
    for x in tensors:
        x = x.detach().cpu().contiguous()
        crc = zlib.crc32(repr((x.dtype, tuple(x.shape))).encode(), crc)
        crc = zlib.crc32(bytes(x.flatten().view(torch.uint8).numpy()) if x.numel() else b"", crc)
    return f"{crc:08x}"


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by their configuration and weights, as eight hexadecimal digits.

    Of each weight that is in memory, by the sum of its bytes, which any change of a number
    changes, and a thousand of its numbers, since the sum does not tell where they stand. Weights
    that are kept elsewhere (offloaded to disk) are not read.
    """
    config = getattr(model, "config", None)
    settings: dict[str, Any] = getattr(config, "to_diff_dict", dict)()
    crc = zlib.crc32(repr(sorted(settings.items(), key=str)).encode())
    for name, x in model.state_dict().items():
        crc = zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), crc)
        if not x.is_meta and x.numel():
            flat = x.detach().contiguous().flatten()
            # Integers, so that the order in which they are added does not matter.
            total = int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
            sample = checksum(flat[:: max(1, len(flat) // 1000)])
            crc = zlib.crc32(f"{total} {sample}".encode(), crc)
    return f"{crc:08x}"


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def described(method: object, model: nn.Module | None = None) -> str:
    """A method, or another callable, in words that tell it from others.

    Args:
        method: What is described.
        model: The model that is evaluated; those of measures of other models are told apart.
    """
    if isinstance(method, str):
        return method
    if isinstance(method, Tensor):
        return f"scores {checksum(method)}"
    if isinstance(method, TokenScores):
        choices = [method.reduction, method.layers, method.heads, method.queries]
        return f"{described(method.method, model)}, {choices}, signed={method.signed}"
    if isinstance(method, AttentionAttribution):
        name = f"{method.get_name()} {getattr(method, 'scope', '')}".strip()
        name += "" if method.space == "attention" else f" in the {method.space}'s space"
        own = method.model
        return name if own is None or own is model else f"{name} of {fingerprint(own)}"
    if isinstance(method, partial):
        given = [described(x, model) for x in (method.func, *method.args)]
        return f"partial {given} {method.keywords}"
    if isinstance(method, MethodType):
        return f"{described(method.__self__, model)}.{method.__name__}"
    if isinstance(method, FunctionType):
        code = method.__code__
        inside = zlib.crc32(code.co_code + repr(code.co_names).encode())
        return f"{method.__module__}.{method.__qualname__} {inside:08x}"
    return f"{type(method).__module__}.{type(method).__qualname__}"
