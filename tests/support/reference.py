"""The definitions word by word, slow and in float64: what the tests hold the package to.

``v~`` and tensors of size ``T x S x d`` exist here and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw import TokenScores, remove_values
from captum_cw.removal.sinks import find_sinks
from support.models import HeadGate


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


def llama_logits(
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


@dataclass
class EagerLayer:
    """What one layer computes: ``(B, H, T, S)``, ``(B, H_kv, S, d_h)``, ``(H, d_h, d)``."""

    attention: Tensor
    value: Tensor
    output_weight: Tensor


def eager_layers(model: nn.Module, **inputs: Tensor) -> list[EagerLayer]:
    """Runs a copy with eager attention and reads what the definitions need.

    The copy stays in float32: in float64, transformers' masks overflow the softmax, which it
    always computes in float32.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    values: list[Tensor] = []
    weights: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "v_proj"):
            module.v_proj.register_forward_hook(lambda m, args, out: values.append(out))
            weights.append(module.o_proj.weight.T)
        elif hasattr(module, "c_attn"):
            module.c_attn.register_forward_hook(
                lambda m, args, out: values.append(out[..., -out.shape[-1] // 3 :])
            )
            weights.append(module.c_proj.weight)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    H = attentions[0].shape[1]
    d_h = weights[0].shape[0] // H
    return [
        EagerLayer(
            a,
            v.unflatten(-1, (-1, d_h)).transpose(1, 2),
            w.detach().unflatten(0, (H, d_h)),
        )
        for a, v, w in zip(attentions, values, weights, strict=True)
    ]


def norm_updates(model: Any, **inputs: Tensor) -> list[Tensor]:
    """``P_i`` of each layer, ``(B, T, d, d)``, from the norm's own formula."""
    model = copy.deepcopy(model)
    found: list[Tensor] = []

    def note(norm: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        x = args[0].double()
        d = x.shape[-1]
        if isinstance(norm, nn.LayerNorm):
            centre = torch.eye(d, dtype=torch.float64) - 1 / d
            x, gain, eps = x @ centre, norm.weight.double(), norm.eps
        else:
            centre = torch.eye(d, dtype=torch.float64)
            gemma = "Gemma" in type(norm).__name__
            gain = norm.weight.double() + (1 if gemma else 0)
            eps = norm.eps if gemma else norm.variance_epsilon
        scale = (x.square().mean(-1) + eps).rsqrt()
        found.append(scale[..., None, None] * (centre * gain))

    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(note)
    with torch.no_grad():
        model(**inputs)
    return found


def gate_factors(model: Any, **inputs: Tensor) -> list[Tensor]:
    """What the heads' values are multiplied by, ``(B, H, T, d_h)``, from the model's formula."""
    model = copy.deepcopy(model)
    found: list[Tensor] = []

    def note(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        if "Norm" in type(module).__name__:
            x = args[0].double()
            eps = module.eps if isinstance(module, nn.RMSNorm) else module.variance_epsilon
            scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            gate = scale * module.weight.double()
        else:
            gate = out.sigmoid()
            if gate.shape[-1] == 4:
                gate = gate.repeat_interleave(8, -1)
        found.append(gate.unflatten(-1, (4, 8)).transpose(1, 2).detach())

    for layer in model.model.layers:
        attention = layer.self_attn
        for place in ("gate_proj", "attn_sub_norm"):
            if hasattr(attention, place):
                getattr(attention, place).register_forward_hook(note)
        if isinstance(attention.o_proj, HeadGate):
            attention.o_proj.gate.register_forward_hook(note)
    with torch.no_grad():
        model(**inputs)
    return found


def projection_measures(a: Tensor, v: Tensor, w: Tensor) -> dict[str, Tensor]:
    """The measures by ``v~`` in full; ``w`` is the weight ``(d, H * d_h)`` of the projection."""
    by_head = w.T.unflatten(0, (v.shape[1], -1)).double()
    projected = torch.einsum("bhsd,hde->bhse", v.double(), by_head)
    expanded = projected[:, :, None].expand(-1, -1, a.shape[2], -1, -1)
    return measures_of(a.double(), expanded)


def multihead_measures(
    module: nn.MultiheadAttention, q: Tensor, kv: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The measures of a MultiheadAttention (batch first); ``mask`` is True where a key is seen."""
    with torch.no_grad():
        if module.in_proj_weight is not None:
            ws = module.in_proj_weight.chunk(3)
        else:
            ws = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        assert module.in_proj_bias is not None
        bs = module.in_proj_bias.chunk(3)
        query, key, value = (
            (x @ w.T + b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((q, kv, kv), ws, bs, strict=True)
        )
        logits = query @ key.transpose(-1, -2) / module.head_dim**0.5
        a = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        return projection_measures(a, value, module.out_proj.weight)


def sorted_pairs(
    scores: list[Tensor],
    real: Tensor,
    kept: list[Tensor],
    rate: str,
    which: str,
    scope: str,
    rate_of: str,
) -> list[Tensor]:
    """The pairs that are removed, by the rules of the ranking, with a plain sort."""
    out = [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    B, H, S = scores[0].shape
    for b in range(B):
        pairs = [
            (layer, h, j)
            for layer in range(len(scores))
            for h in range(H)
            for j in range(S)
            if real[b, j] and (rate_of == "all" or not kept[layer][b, j])
        ]
        group = {"layer": lambda p: p[0], "head": lambda p: p[:2], "global": lambda p: 0}[scope]
        for name in {group(p) for p in pairs}:
            members = [p for p in pairs if group(p) == name]
            sign = -1 if which == "top" else 1
            members.sort(key=lambda p: (sign * float(scores[p[0]][b, p[1], p[2]]), p))
            exact = Fraction(rate) * len(members)
            count = int(exact) + (exact - int(exact) >= Fraction(1, 2))
            for layer, h, j in members[:count]:
                out[layer][b, h, j] = not kept[layer][b, j]
    return out


def logits_removed_layer_by_layer(
    method: Any, given: dict[str, Tensor], real: Tensor, which: Any
) -> Tensor:
    """Logits of online removal at 30%, from a pass for each layer with known removals before it."""
    per_head = TokenScores(method, layers=None, heads=None)
    masks = [torch.zeros(2, 4, real.shape[1], dtype=torch.bool)] * 2
    for number in range(2):
        with remove_values(method.model, masks):
            scores = per_head.attribute(given)[:, number]
            kept = find_sinks(method.model, given)[number]
        masks[number] = sorted_pairs([scores], real, [kept], "0.3", which, "layer", "removable")[0]
    with remove_values(method.model, masks), torch.no_grad():
        logits: Tensor = method.model(**given).logits
    return logits


def mean_nll(logits: Tensor, ids: Tensor, real: Tensor) -> list[float]:
    """Mean negative log-likelihood of each text, with loops."""
    out = []
    for b in range(len(ids)):
        places = real[b].nonzero()[:, 0].tolist()
        losses = [-logits[b, i].double().log_softmax(-1)[ids[b, j]] for i, j in pairwise(places)]
        out.append(float(torch.stack(losses).mean()))
    return out
