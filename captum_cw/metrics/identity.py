"""What tells models, data and methods apart, so that runs of different ones do not mix."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from captum_cw.attr import TokenScores
from captum_cw.attr.layer import _AttentionAttribution

__all__ = ["checksum", "described", "fingerprint"]


def checksum(*tensors: Tensor) -> str:
    """Of the bytes of some tensors."""
    crc = 0
    for x in tensors:
        x = x.detach().cpu().contiguous()
        crc = zlib.crc32(repr((x.dtype, tuple(x.shape))).encode(), crc)
        crc = zlib.crc32(bytes(x.view(torch.uint8).numpy()) if x.numel() else b"", crc)
    return f"{crc:08x}"


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by a thousand numbers of each weight."""
    parts = []
    for x in model.state_dict().values():
        if not x.is_meta:
            flat = x.detach().flatten()
            parts.append(flat[:: max(1, len(flat) // 1000)])
    return checksum(*parts)


def described(method: object) -> str:
    """A method, or another callable, in a word that tells it from others."""
    if isinstance(method, str):
        return method
    if isinstance(method, Tensor):
        return f"scores {checksum(method)}"
    if isinstance(method, TokenScores):
        return f"{described(method.method)}, {method.reduction}, signed={method.signed}"
    if isinstance(method, _AttentionAttribution):
        return f"{method.get_name()} {getattr(method, 'scope', '')}".strip()
    return str(getattr(method, "__qualname__", type(method).__qualname__))
