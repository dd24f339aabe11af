"""The definitions word by word, slow and in float64: what the tests hold the package to.

``v~`` and tensors of size ``T x S x d`` exist here and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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


def measures(
    attention: Tensor,
    value: Tensor,
    output_weight: Tensor,
    update: Tensor | None = None,
    gate: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every measure ``(B, H, T, S)``, by the name that users type.

    With an ``update`` ``(B, T, d, d)``, of what becomes of ``v~`` and ``o`` at each query; with a
    ``gate`` ``(B, H, T, d_h)``, of what values are multiplied by before the projection.
    """
    v = projected_values(value, output_weight)[:, :, None]  # (B, H, 1 or T, S, d)
    T = attention.shape[2]
    if gate is not None:
        H = len(output_weight)
        repeated = torch.stack([value[:, h * value.shape[1] // H] for h in range(H)], 1).double()
        gated = gate.double()[:, :, :, None] * repeated[:, :, None]
        v = torch.einsum("bhtse,hed->bhtsd", gated, output_weight.double())
    if update is not None:
        v = torch.einsum("bhtsd,btde->bhtse", v.expand(-1, -1, T, -1, -1), update)
    return measures_of(attention, v)


def measures_of(attention: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Every measure from ``v~`` ``(B, H, 1 or T, S, d)``, as each query has it."""
    a = attention.double()
    terms = a[..., None] * v  # (B, H, T, S, d)
    o_head = terms.sum(3)
    o = o_head.sum(1)
    norms = v.norm(dim=-1)
    return {
        "attention": a,
        "vw": a.abs() * norms,
        "vwon": a.abs() * norms / o.norm(dim=-1)[:, None, :, None],
        "inter": (terms * o[:, None, :, None]).sum(-1) / o.square().sum(-1)[:, None, :, None],
        "intra": (terms * o_head[:, :, :, None]).sum(-1) / o_head.square().sum(-1)[..., None],
        "relative_norm": norms / o.norm(dim=-1)[:, None, :, None],
        "cosine": torch.nn.functional.cosine_similarity(o[:, None, :, None], v, dim=-1),
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


def sinks(hidden: Tensor, real: Tensor, threshold: float = 0.95) -> Tensor:
    """Tokens whose hidden state is nearly collinear with that of the first real one."""
    out = torch.zeros_like(real)
    for b in range(len(hidden)):
        places = real[b].nonzero()[:, 0].tolist()
        first = hidden[b, places[0]]
        for j in places:
            cosine = (hidden[b, j] @ first) / (hidden[b, j].norm() * first.norm())
            out[b, j] = j == places[0] or cosine > threshold
    return out


def plain_llama(
    model: Any, ids: Tensor, real: Tensor, remove: Callable[[int, dict[str, Tensor]], Tensor]
) -> Tensor:
    """Logits of a Llama in float64, its attention written out, with ``v~`` zeroed by hand.

    Args:
        model: The model.
        ids: ``(B, T)``.
        real: ``(B, T)``, False at padding.
        remove: Given the number of a layer and its ``measures`` (and what is ``visible``, and the
            ``hidden`` states that it reads), the pairs ``(B, H, T)`` to remove.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = copy.deepcopy(model).double()
    B, T = ids.shape
    visible = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None, :] & real[:, :, None]

    def forward(number: int, module: Any) -> Callable[..., tuple[Tensor, None]]:
        def attention(
            hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
        ) -> tuple[Tensor, None]:
            def heads(projection: Any) -> Tensor:
                return projection(hidden_states).unflatten(-1, (-1, d_h)).transpose(1, 2)

            d_h = module.head_dim
            q, k, v = (heads(p) for p in (module.q_proj, module.k_proj, module.v_proj))
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            H = q.shape[1]
            w = module.o_proj.weight.T.unflatten(0, (H, d_h))
            a = torch.zeros(B, H, T, T, dtype=torch.float64)
            for h in range(H):
                logits = q[:, h] @ k[:, h * k.shape[1] // H].transpose(1, 2) * module.scaling
                a[:, h] = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
            found = measures(a, v, w)
            found = {name: x.nan_to_num() for name, x in found.items()}
            found["visible"] = visible[:, None].expand(B, H, T, T)
            found["hidden"] = hidden_states
            removed = remove(number, found)
            projected = projected_values(v, w)
            o = torch.zeros(B, T, w.shape[-1], dtype=torch.float64)
            for h in range(H):
                for j in range(T):
                    for b in range(B):
                        if not removed[b, h, j]:
                            o[b] += a[b, h, :, j, None] * projected[b, h, j]
            return o, None

        return attention

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.forward = forward(number, layer.self_attn)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: Tensor = model(ids, position_ids=positions, use_cache=False).logits
    return logits
