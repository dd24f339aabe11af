"""Layers whose token scores a kernel computes, and their definition in float64."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from captum_cw import functional
from captum_cw.functional import AttentionLayer, EffectLayer, QueryMask, Reduction
from captum_cw.products import BLOCKWISE, KERNEL, VARIABLE, Product
from captum_cw.weights import SoftmaxWeights
from support import reference
from support.masks import MASKS, make_mask

MEASURES: dict[str, functional.Measure] = {
    "attention": functional.attention,
    "vw": functional.vw,
    "vwon": functional.vwon,
    "inter": functional.contribution("inter"),
    "intra": functional.contribution("intra"),
    "projection": functional.projection,
    "relative_norm": functional.relative_norm,
    "cosine": functional.cosine_with("inter"),
    "geometry": functional.geometry("inter"),
    "attention_cosine": functional.attention_cosine,
    "target": functional.target,
    "effect": functional.effect,
    "joint": functional.joint(0.25),
}
#: The measures of an :class:`~captum_cw.functional.EffectLayer`.
OF_TARGET = ("target", "effect", "joint")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "max", "rms")

#: The largest error, relative to the largest score of a head.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


@dataclass(frozen=True)
class Case:
    """One attention layer with random tensors. Extras are a bias, a soft-cap and sinks."""

    measure: str = "inter"
    mask: str = "causal"
    dtype: torch.dtype = torch.float32
    B: int = 2
    H: int = 2
    H_kv: int = 1
    T: int = 20
    S: int | None = None  # with a cache; only for the mask "causal"
    d_k: int = 5
    d_v: int = 3
    softcap: float | None = None
    sink: bool = False
    bias: bool = False
    chosen: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """The layer of a case, its map in float64, and which of its entries count."""

    layer: Any
    map: Tensor
    visible: Tensor
    queries: Tensor | None

    def expected(self, reduction: Reduction, *, signed: bool) -> Tensor:
        """The scores by their definition, ``(B, H, S)`` in float64."""
        return reference.token_scores(self.map, self.visible, reduction, signed=signed)


def make(case: Case) -> Made:
    """Make the layer of a case on its device, and compute the definition on the CPU."""
    g = torch.Generator().manual_seed(case.seed)
    B, H, T, S = case.B, case.H, case.T, case.S or case.T

    def random(*shape: int, rounded: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=g)
        return x.to(case.dtype).float() if rounded else x

    q = 2 * random(B, H, T, case.d_k, rounded=True)
    k = random(B, case.H_kv, S, case.d_k, rounded=True)
    v = random(B, case.H_kv, S, case.d_v, rounded=True)
    w, sink, bias = random(H, case.d_v, 7), random(H), random(H, T, S)[None]
    if S == T:
        mask, visible = make_mask(case.mask, B, H, T)
    else:
        mask = QueryMask(T, S, causal=True)
        visible = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(B, H, T, S)
    queries = torch.rand(B, T, generator=g) < 0.3 if case.chosen else None
    a = _attention(
        q, k, visible, case.softcap, sink if case.sink else None, bias if case.bias else None
    )
    gradient, share = random(B, H, T, case.d_v), random(B, H, T, case.d_v)
    effect = random(B, T)
    found = _maps(a, v, w, gradient, share, effect)[case.measure].nan_to_num() * visible
    move, lowest = case.device, torch.finfo(torch.float32).min
    added = bias.expand(B, H, T, S).masked_fill(~visible, lowest).to(move) if case.bias else None
    mask = QueryMask(T, S, _to(mask.visible, move), mask.causal, _to(mask.real, move))
    if case.bias:
        mask = replace(mask, visible=visible.to(move))
    weights = SoftmaxWeights(
        q.to(move),
        k.to(move),
        mask,
        added,
        softcap=case.softcap,
        sink=sink.to(move) if case.sink else None,
        dtype=case.dtype,
    )
    if case.measure in OF_TARGET:
        own = (x.to(move) for x in (v, gradient))
        layer: Any = EffectLayer(weights, *own, mask, share.to(move), effect.to(move))
    else:
        layer = AttentionLayer.from_tensors(*(x.to(move, torch.float32) for x in (a, v, w)), mask)
        layer = replace(layer, weights=weights)
    counted = visible if queries is None else visible & queries[:, None, :, None]
    return Made(layer, found, counted, _to(queries, move))


def _to(x: Tensor | None, device: str) -> Tensor | None:
    return None if x is None else x.to(device)


def _attention(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    softcap: float | None,
    sink: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Attention by its definition, in float64; a query that sees nothing has zeros."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ k.mT / q.shape[-1] ** 0.5
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if bias is not None:
        logits = logits + bias.double()
    size = logits.masked_fill(~visible, -torch.inf).exp()
    total = size.sum(-1, keepdim=True)
    if sink is not None:
        total = total + sink.double().exp()[:, None, None]
    return (size / total).nan_to_num()


def _maps(
    a: Tensor, v: Tensor, w: Tensor, gradient: Tensor, share: Tensor, effect: Tensor
) -> dict[str, Tensor]:
    found = reference.measures(a, v, w)
    v_of = v.double().repeat_interleave(len(w) // v.shape[1], 1)
    t, c = (x.double() @ v_of.mT for x in (gradient, share))
    outputs = torch.einsum("bhts,bhse,hed->btd", a, v_of, w.double())
    v_to = torch.einsum("bhse,hed->bhsd", v_of, w.double())
    along = torch.einsum("btd,bhsd->bhts", outputs, v_to)
    length = outputs.norm(dim=-1)[:, None, :, None]
    return {
        **found,
        "projection": a * along / length,
        "geometry": along / length**2,
        "attention_cosine": a * found["cosine"],
        "target": a * t,
        "effect": a * c * effect.double()[:, None, :, None],
        "joint": a * t.abs() ** 0.25 * c.abs() ** 0.75,
    }


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Choose an engine, or none."""
    before = os.environ.pop(VARIABLE, None)
    if name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _counted(module: ModuleType) -> Any:
    """Count the calls of the kernels."""
    return mock.patch.object(module, "reduce_queries", wraps=module.reduce_queries)


def error_of(
    case: Case, made: Made, reduction: Reduction, *, signed: bool, by: str = KERNEL
) -> float:
    """The largest error of an engine, relative to the largest score of the head.

    It is infinite if the other engine took the place of the kernel.
    """
    module = importlib.import_module("captum_cw.kernels") if by == KERNEL else None
    counted = nullcontext(None) if module is None else _counted(module)
    with engine(by), counted as calls:
        scores = functional.token_scores(
            made.layer, MEASURES[case.measure], reduction, signed=signed, queries=made.queries
        )
    is_product = isinstance(MEASURES[case.measure](made.layer), Product)
    if calls is not None and calls.call_count != is_product:
        return math.inf
    expected = made.expected(reduction, signed=signed)
    gap = (scores.cpu().double() - expected).abs().amax(-1)
    return float((gap / expected.abs().amax(-1).clamp(min=1e-30)).max())


def core_cases(device: str) -> Iterator[tuple[Case, Reduction, bool]]:
    """Some of the cases, in which every choice occurs; compiling all of them takes minutes."""
    yield from islice(_plain_cases(device), 0, None, 9)
    yield from islice(_special_cases(device), 0, None, 5)


def gpu_cases(device: str) -> Iterator[tuple[Case, Reduction, bool]]:
    """Cases for a GPU, where tiles are large: each a layer, a reduction, and whether signs stay."""
    yield from _plain_cases(device)
    yield from _special_cases(device)


def _plain_cases(device: str) -> Iterator[tuple[Case, Reduction, bool]]:
    reductions = cycle(REDUCTIONS)
    for measure, mask, dtype in product(MEASURES, MASKS, (torch.float32, torch.bfloat16)):
        yield (
            Case(measure, mask, dtype, T=150, d_k=80, d_v=48, device=device),
            next(reductions),
            False,
        )


def _special_cases(device: str) -> Iterator[tuple[Case, Reduction, bool]]:
    extras: list[dict[str, Any]] = [
        {"softcap": 2.0},
        {"sink": True},
        {"bias": True},
        {"chosen": True},
    ]
    sizes = {"H": 6, "H_kv": 2, "d_k": 64, "d_v": 96}
    for dtype in TOLERANCES:
        for extra, measure in product(extras, ("attention", "inter", "joint")):
            case = Case(measure, T=130, S=170, dtype=dtype, device=device)
            yield replace(case, **sizes, **extra), "mean", True
        for size in (16, 128, 200, 256):
            yield Case(dtype=dtype, T=140, d_k=size, d_v=size, device=device), "mean", True


__all__ = [
    "BLOCKWISE",
    "KERNEL",
    "MASKS",
    "MEASURES",
    "REDUCTIONS",
    "TOLERANCES",
    "Case",
    "core_cases",
    "engine",
    "error_of",
    "gpu_cases",
    "make",
]
