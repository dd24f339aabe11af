"""Scores of pairs from other work, written for the layers of this package.

Each takes a layer and returns its block function, as the measures of ``captum_cw.functional`` do.
The caches of that work score tokens while a model generates. Here all scores are taken over the
whole text, and removal sets values to zero, so the tables compare formulas, not caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_cw import measures
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.functional import (
    AttentionLayer,
    Block,
    Measure,
    contribution,
    expand_heads,
    vw,
    vwon,
)

__all__ = ["PEERS", "KVzipPlus", "register_peers"]

#: The number that CriticalKV adds to attention weights.
EPSILON = 1e-4


def vatp(layer: AttentionLayer) -> Block:
    """``a |v|_1`` (VATP, arXiv 2406.12335)."""
    size = expand_heads(layer.value, layer.H).abs().sum(-1)[:, :, None]
    return lambda a, rows: a * size[..., : a.shape[-1]]


def critical_kv(layer: AttentionLayer) -> Block:
    """``(a + e) |W_O v|`` (CriticalKV, arXiv 2502.03805), where the query sees the key."""

    def block(a: Tensor, rows: slice) -> Tensor:
        seen = layer.mask.block(rows, a.device)
        return (a + EPSILON) * seen * layer.norms(rows, a.shape[-1])

    return block


def ob_cache(layer: AttentionLayer) -> Block:
    """``a^2 |v|^2``, the value term of OBCache (arXiv 2510.07651)."""
    size = expand_heads(layer.value, layer.H).square().sum(-1)[:, :, None]
    return lambda a, rows: a.square() * size[..., : a.shape[-1]]


def caote(layer: AttentionLayer) -> Block:
    """``a / (1 - a) |v - y|`` with the head output ``y`` (CAOTE, arXiv 2504.14051)."""
    values, heads = expand_heads(layer.value, layer.H), layer.head_output

    def block(a: Tensor, rows: slice) -> Tensor:
        distance = torch.cdist(heads[:, :, rows], values[:, :, : a.shape[-1]])
        return a / (1 - a).clamp(min=torch.finfo(a.dtype).eps) * distance

    return block


def marginal_at(rate: float) -> Measure:
    """``2 rate c + (1 - 2 rate) r^2``: what a term explains of its output at a rate of removal."""

    def measure(layer: AttentionLayer) -> Block:
        share, size = contribution()(layer), vwon(layer)

        def block(a: Tensor, rows: slice) -> Tensor:
            c = share(a.clone(), rows)
            return 2 * rate * c + (1 - 2 * rate) * size(a, rows).square()

        return block

    return measure


def kvzip_plus(layer: AttentionLayer) -> Block:
    """``a |W_O v| / |h|``."""
    assert layer.residual is not None
    weighted, length = vw(layer), layer.residual.stream.norm(dim=-1)
    return lambda a, rows: weighted(a, rows) / length[:, None, rows, None]


class KVzipPlus(AttentionAttribution):
    """The length of a term relative to the residual stream ``h`` (KVzip+, arXiv 2601.07891)."""

    name = "KVzip+"
    measure = staticmethod(kvzip_plus)
    space = "residual"
    needs_stream = True


#: The scores by name, with what they are.
PEERS = {
    "VATP": (vatp, "attention times the L1 norm of the value"),
    "CriticalKV": (
        critical_kv,
        "attention, slightly raised, times the norm of the value",
    ),
    "OBCache": (ob_cache, "the squared length of the weighted value"),
    "CAOTE": (
        caote,
        "how far the head's output moves if attention is renormalised",
    ),
    "marginal-30": (marginal_at(0.3), "the marginal of a term where 30% are removed"),
    "marginal-70": (marginal_at(0.7), "the marginal of a term where 70% are removed"),
}


def register_peers() -> None:
    """Add the scores to the registry of measures, as controls."""
    for name, (measure, about) in PEERS.items():
        if measures.find(name) is None:
            is_signed = name.startswith("marginal")
            entry = measures.Entry(
                name, measure, name, about, signed=is_signed, control=True, explained=False
            )
            measures.register(entry)
