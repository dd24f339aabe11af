"""The masks that the engines are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_cw.functional import QueryMask

MASKS = (
    "none",
    "causal",
    "sliding",
    "padded",
    "bidirectional-padded",
    "padded-keys-only",
    "per-head",
)


def make_mask(kind: str, B: int, H: int, T: int) -> tuple[QueryMask, Tensor]:
    """A mask as the package sees it, and as one dense tensor with padded queries seeing nothing."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    real = torch.ones(B, T, dtype=torch.bool)
    if kind == "none":
        return QueryMask(T, T), torch.ones(B, H, T, T, dtype=torch.bool)
    if kind == "causal":
        return QueryMask(T, T, causal=True), (j <= i).expand(B, H, T, T)
    if kind == "sliding":
        visible = (j <= i) & (j > i - 2)
        return QueryMask(T, T, visible[None, None], causal=True), visible.expand(B, H, T, T)
    if kind == "per-head":
        visible = torch.rand(B, H, T, T, generator=torch.Generator().manual_seed(3)) < 0.6
        visible |= torch.eye(T, dtype=torch.bool)
        return QueryMask(T, T, visible), visible
    real[0, : T // 2] = False
    visible = real[:, None, None, :] & ((j <= i) | (kind != "padded"))
    if kind == "padded-keys-only":  # one row for all queries, as models without causality have it
        mask = QueryMask(T, T, real[:, None, None, :], real=real)
        return mask, (visible & real[:, None, :, None]).expand(B, H, T, T)
    mask = QueryMask(T, T, visible, causal=kind == "padded", real=real)
    return mask, (visible & real[:, None, :, None]).expand(B, H, T, T)
