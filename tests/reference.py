"""The definitions word by word, slow and in float64: what the tests hold the package to.

``v~`` and tensors of size ``T x S x d`` exist here and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projected_values(value: Tensor, output_weight: Tensor) -> Tensor:
    """``v~_j^h = v_j^h W_O^h`` (Eq. 5) with values repeated to query heads: ``(B, H, S, d)``."""
    groups = output_weight.shape[0] // value.shape[1]
    repeated = torch.stack([value[:, h // groups] for h in range(output_weight.shape[0])], dim=1)
    return torch.einsum("bhse,hed->bhsd", repeated.double(), output_weight.double())


def outputs(attention: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """``o_i^h`` ``(B, H, T, d)`` and ``o_i`` ``(B, T, d)`` (Eq. 6)."""
    by_head = torch.einsum("bhts,bhsd->bhtd", attention.double(), projected)
    return by_head, by_head.sum(1)


def measures(attention: Tensor, value: Tensor, output_weight: Tensor) -> dict[str, Tensor]:
    """Every measure ``(B, H, T, S)``, by the name that users type."""
    a = attention.double()
    v = projected_values(value, output_weight)
    o_head, o = outputs(attention, v)
    terms = a[..., None] * v[:, :, None]  # (B, H, T, S, d)
    norms = v.norm(dim=-1)[:, :, None]
    return {
        "attention": a,
        "vw": a.abs() * norms,
        "vwon": a.abs() * norms / o.norm(dim=-1)[:, None, :, None],
        "inter": (terms * o[:, None, :, None]).sum(-1) / o.square().sum(-1)[:, None, :, None],
        "intra": (terms * o_head[:, :, :, None]).sum(-1) / o_head.square().sum(-1)[..., None],
        "relative_norm": norms / o.norm(dim=-1)[:, None, :, None],
        "cosine": torch.nn.functional.cosine_similarity(o[:, None, :, None], v[:, :, None], dim=-1),
    }


def token_scores(g: Tensor, visible: Tensor, reduction: str, *, signed: bool = False) -> Tensor:
    """Eq. 15 with loops: ``g`` and ``visible`` ``(B, H, T, S)`` to ``(B, H, S)``."""
    B, H, _, S = g.shape
    out = torch.zeros(B, H, S, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for j in range(S):
                seen = g[b, h, visible[b, h, :, j], j].double()
                seen = seen if signed else seen.abs()
                if not len(seen):
                    continue
                out[b, h, j] = {
                    "mean": seen.mean(),
                    "sum": seen.sum(),
                    "max": seen.max(),
                    "rms": seen.square().mean().sqrt(),
                }[reduction]
    return out
