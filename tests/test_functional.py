"""The mathematics against the definitions, with ``v~`` built in full, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_cw import functional
from captum_cw.functional import (
    AttentionLayer,
    EffectLayer,
    QueryMask,
    TargetLayer,
    contribution,
    dense_map,
    vw,
)
from captum_cw.weights import SoftmaxWeights, grouped_matmul
from support import reference
from support.masks import MASKS, make_mask

MEASURES = {
    "attention": functional.attention,
    "vw": functional.vw,
    "vwon": functional.vwon,
    "inter": contribution("inter"),
    "intra": contribution("intra"),
    "relative_norm": functional.relative_norm,
    "cosine": functional.cosine_with("inter"),
}


def make_layer(
    kind: str = "causal",
    B: int = 2,
    H: int = 4,
    H_kv: int = 2,
    T: int = 6,
    d_h: int = 3,
    d: int = 10,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[AttentionLayer, Tensor, Tensor, Tensor, Tensor]:
    """A layer, and its dense attention, values, ``W_O`` and visibility."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, T, d_h, generator=g, dtype=dtype) for n in (H, H_kv, H_kv))
    w = torch.randn(H, d_h, d, generator=g, dtype=dtype)
    mask, visible = make_mask(kind, B, H, T)
    a = functional.attention_weights(q, k, mask=visible)
    return AttentionLayer.from_tensors(a, v, w, mask), a, v, w, visible


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


@pytest.mark.parametrize(("B", "H_kv"), [(1, 1), (1, 2), (1, 3), (2, 1), (5, 1), (1, 4)])
@pytest.mark.parametrize("tokens", [5, 200], ids=["small", "large"])
def test_products_of_groups_are_the_same_for_any_number_of_threads(
    threads: int, B: int, H_kv: int, tokens: int
) -> None:
    g = torch.Generator().manual_seed(B)
    rows = torch.randn(B, 2 * H_kv, tokens, 8, generator=g, dtype=torch.float64)
    keys = torch.randn(B, H_kv, 2 * tokens, 8, generator=g, dtype=torch.float64)
    expected = torch.einsum("bhtd,bhsd->bhts", rows, keys.repeat_interleave(2, 1))
    assert torch.allclose(grouped_matmul(rows, keys), expected, atol=1e-12)
    rows.requires_grad_()
    (gradient,) = torch.autograd.grad(grouped_matmul(rows, keys).sum(), rows)
    slope = keys.sum(2, keepdim=True).repeat_interleave(2, 1)
    assert torch.allclose(gradient, slope.expand_as(rows), atol=1e-12)


@pytest.fixture(params=[1, 7, 10**6], ids=["tiny-blocks", "odd-blocks", "one-block"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", request.param * 48)
    return int(request.param)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_measures_equal_the_definition(
    name: str, kind: str, H_kv: int, block_elements: int
) -> None:
    layer, a, v, w, visible = make_layer(kind, H_kv=H_kv)
    expected = reference.measures(a, v, w)[name].nan_to_num() * visible
    assert torch.allclose(dense_map(layer, MEASURES[name]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "rms"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_token_scores_equal_the_definition(
    reduction: functional.Reduction, signed: bool, kind: str, block_elements: int
) -> None:
    layer, a, v, w, visible = make_layer(kind)
    g = reference.measures(a, v, w)["inter"].nan_to_num()
    expected = reference.token_scores(g, visible, reduction, signed=signed)
    scores = functional.token_scores(layer, contribution("inter"), reduction, signed=signed)
    assert torch.allclose(scores, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_token_scores_of_chosen_queries_equal_the_definition(kind: str) -> None:
    layer, a, v, w, visible = make_layer(kind)
    queries = torch.zeros(2, 6, dtype=torch.bool)
    queries[0, 4], queries[1, 1:3] = True, True
    g = reference.measures(a, v, w)["inter"].nan_to_num()
    for reduction in ("mean", "sum", "max", "rms"):
        expected = reference.token_scores(g, visible & queries[:, None, :, None], reduction)
        scores = functional.token_scores(layer, contribution(), reduction, queries=queries)
        assert torch.allclose(scores, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("kind", MASKS)
def test_a_layer_of_chosen_queries_equals_the_definition(
    name: str, kind: str, block_elements: int
) -> None:
    layer, a, v, w, visible = make_layer(kind)
    gate = 1 + torch.rand(2, 4, 6, 3, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
    queries = torch.zeros(2, 6, dtype=torch.bool)
    queries[0, 4], queries[1, [1, 2, 5]] = True, True
    rows = [1, 2, 4, 5]
    few = layer.at(rows, queries)
    expected = reference.measures(a, v, w)[name].nan_to_num() * visible * queries[:, None, :, None]
    found = dense_map(few, MEASURES[name])
    assert torch.allclose(found, expected[:, :, rows], rtol=1e-10, atol=1e-12)
    gated, whole = (replace(x, gate=g) for x, g in ((few, gate[:, :, rows]), (layer, gate)))
    maps = dense_map(whole, MEASURES[name]) * queries[:, None, :, None]
    found = dense_map(gated, MEASURES[name])
    assert torch.allclose(found, maps[:, :, rows], rtol=1e-10, atol=1e-12)


def test_a_padded_query_counts_nowhere_even_where_it_is_chosen() -> None:
    layer, *_ = make_layer("padded")
    every = torch.ones(2, 6, dtype=torch.bool)
    for reduction in ("mean", "sum", "max", "rms"):
        scores = functional.token_scores(layer, contribution(), reduction, queries=every)
        assert torch.equal(scores, functional.token_scores(layer, contribution(), reduction))


def test_causal_queries_after_cached_keys_see_those_before_them(block_elements: int) -> None:
    _, a, v, w, visible = make_layer("causal", T=6)
    late = AttentionLayer.from_tensors(a[:, :, 4:], v, w, QueryMask(2, 6, causal=True))
    expected = reference.measures(a, v, w)["inter"] * visible
    assert torch.allclose(dense_map(late, contribution()), expected[:, :, 4:], atol=1e-12)
    for reduction in ("mean", "sum", "max", "rms"):
        scores = functional.token_scores(late, contribution(), reduction)
        slow = reference.token_scores(expected[:, :, 4:], visible[:, :, 4:], reduction)
        assert torch.allclose(scores, slow, atol=1e-12)


def test_scores_at_single_queries_are_rows_of_the_map() -> None:
    layer, a, v, w, _ = make_layer()
    rows = functional.query_scores(layer, contribution(), slice(2, 5))
    expected = reference.measures(a, v, w)["inter"].abs().mean(1)[:, 2:5]
    assert torch.allclose(rows, expected, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    H_kv=st.integers(1, 3),
    groups=st.integers(1, 3),
    d_h=st.integers(1, 5),
    d=st.integers(2, 12),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(MASKS),
)
def test_contributions_sum_to_one(
    B: int, T: int, H_kv: int, groups: int, d_h: int, d: int, seed: int, kind: str
) -> None:
    layer, *_, visible = make_layer(
        kind, B, H_kv * groups, H_kv, T, d_h, d, dtype=torch.float32, seed=seed
    )
    real = visible.any(-1).any(1)  # (B, T)
    inter = dense_map(layer, contribution("inter")).sum((1, 3))
    intra = dense_map(layer, contribution("intra")).sum(3)
    # Eq. 13 and 10. A sum of terms much larger than itself cannot hold to 1e-5 in float32.
    share = functional.dense_map(layer, contribution("inter")).abs().sum((1, 3)).clamp(min=1)
    assert ((inter - real.float()).abs() <= 1e-5 * share).all()
    share = functional.dense_map(layer, contribution("intra")).abs().sum(3).clamp(min=1)
    assert ((intra - real[:, None].float()).abs() <= 1e-5 * share).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), kind=st.sampled_from(MASKS))
def test_the_factors_multiply_to_the_contribution(seed: int, kind: str) -> None:
    layer, *_ = make_layer(kind, seed=seed)
    d = functional.decompose(layer)
    assert torch.allclose(d.attention * d.relative_norm * d.cosine, d.contribution, atol=1e-12)
    assert (d.cosine.abs() <= 1 + 1e-12).all()


def test_head_shares_are_row_sums_of_contributions() -> None:
    layer, *_ = make_layer("padded")
    expected = dense_map(layer, contribution("inter")).sum(-1)
    assert torch.allclose(functional.head_share(layer), expected, atol=1e-12)
    assert not functional.head_share(layer)[0, :, :3].any()  # padding


@pytest.mark.parametrize(("tokens", "queries"), [(512, 113), (1024, 64), (2048, 56), (8192, 14)])
def test_blocks_are_halved_if_they_keep_enough_queries(tokens: int, queries: int) -> None:
    value, gradient = torch.zeros(1, 3, tokens, 1), torch.zeros(1, 9, tokens, 1)
    mask = QueryMask(tokens, tokens, causal=True)
    weights = SoftmaxWeights(gradient, value, mask)
    assert functional.block_size(TargetLayer(weights, value, gradient, mask)) == queries


@pytest.mark.parametrize("kind", ["padded", "bidirectional-padded"])
def test_padding_does_not_change_the_other_numbers(kind: str) -> None:
    layer, a, v, w, _ = make_layer(kind, T=6)
    alone = AttentionLayer.from_tensors(a[:1, :, 3:, 3:], v[:1, :, 3:], w)
    for measure in MEASURES.values():
        padded = dense_map(layer, measure)[:1]
        whole = dense_map(alone, measure)
        if kind == "padded":
            whole = whole * torch.ones(3, 3).tril()
        assert torch.allclose(padded[:, :, 3:, 3:], whole, atol=1e-12)
        assert not padded[:, :, :3].any()
        assert not padded[..., :3].any()


def test_what_padding_holds_does_not_matter() -> None:
    layer, _, v, w, _ = make_layer("padded")
    y = layer.head_output.clone()
    o = layer.output.clone()
    y[0, :, :3], o[0, :3] = float("nan"), float("nan")
    dirty = AttentionLayer(layer.weights, v, y, w, o, layer.mask)
    for measure in (*MEASURES.values(),):
        assert torch.equal(dense_map(dirty, measure), dense_map(layer, measure))
    scores = functional.token_scores(dirty, contribution())
    assert torch.equal(scores, functional.token_scores(layer, contribution()))


def test_a_vanishing_output_gives_zeros_and_is_counted() -> None:
    layer, a, v, w, _ = make_layer("none", B=1, H=2, H_kv=2, T=3, d_h=2, d=4)
    v = v.clone()
    v[:, 1] = -v[:, 0]  # with equal weights and projections the heads cancel
    a = a[:, :1].expand(-1, 2, -1, -1)
    w = w[:1].expand(2, -1, -1)
    layer = AttentionLayer.from_tensors(a, v, w)
    assert not dense_map(layer, contribution("inter")).any()
    assert not dense_map(layer, functional.vwon).any()
    assert layer.vanishing("inter") == 3
    assert layer.vanishing("intra") == 0
    assert dense_map(layer, contribution("intra")).isfinite().all()


def test_a_small_output_does_not_vanish() -> None:
    _, a, v, w, _ = make_layer()
    small, large = (AttentionLayer.from_tensors(a, x, w) for x in (1e-9 * v, v))
    c = dense_map(small, contribution())
    assert torch.allclose(c, dense_map(large, contribution()), atol=1e-9)


def test_negative_attention_counts_by_its_size() -> None:
    _, a, v, w, _ = make_layer()
    negative, positive = (AttentionLayer.from_tensors(x, v, w) for x in (-a, a))
    assert torch.equal(dense_map(negative, vw), dense_map(positive, vw))


def test_a_query_that_sees_nothing_has_no_weights() -> None:
    q = torch.randn(1, 1, 2, 3)
    mask = torch.tensor([[True, True], [False, False]])
    a = functional.attention_weights(q, q, mask=mask)
    assert torch.allclose(a.sum(-1), torch.tensor([[[1.0, 0.0]]]))


def test_tensors_whose_shapes_do_not_fit_are_refused() -> None:
    _, a, v, w, _ = make_layer()
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 6\).*\(B, H, T, S\)"):
        AttentionLayer.from_tensors(a, v[:, :, 1:], w)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key-value heads"):
        AttentionLayer.from_tensors(a, v[:, :1].expand(-1, 3, -1, -1), w)
    with pytest.raises(ValueError, match="scope='both'.*'inter', 'intra'"):
        contribution("both")  # type: ignore[arg-type]
    layer, *_ = make_layer()
    with pytest.raises(ValueError, match="reduction='median'"):
        functional.token_scores(layer, contribution(), "median")  # type: ignore[arg-type]


#: Heads, heads of keys and values, their size, and the width of known models, and a length.
BIG = {
    "8B": (32, 8, 128, 4096, 2048),
    "70B": (64, 8, 128, 8192, 2048),
    "405B": (128, 8, 128, 16384, 1024),
}


@pytest.mark.parametrize("size", BIG)
@pytest.mark.parametrize("name", ["inter", "joint"])
def test_the_shapes_of_big_layers(size: str, name: str) -> None:
    """On the meta device tensors have shapes and no numbers, and one on a CPU would be refused."""
    H, H_kv, d_h, d, T = BIG[size]

    def empty(*shape: int) -> Tensor:
        return torch.empty(1, *shape, device="meta")

    mask = QueryMask(T, T, causal=True)
    weights = SoftmaxWeights(empty(H, T, d_h), empty(H_kv, T, d_h), mask)
    value, heads = empty(H_kv, T, d_h), empty(H, T, d_h)
    layer: functional.AnyLayer
    if name in MEASURES:
        measure = MEASURES[name]
        layer = AttentionLayer(weights, value, heads, empty(H, d_h, d)[0], empty(T, d), mask)
    else:
        measure = functional.joint(0.25)
        layer = EffectLayer(weights, value, heads, mask, share=heads, effect=empty(T))
    assert (layer.H, layer.T, layer.S) == (H, T, T)
    reductions: tuple[functional.Reduction, ...] = ("mean", "rms")
    for reduction in reductions:
        scores = functional.token_scores(layer, measure, reduction)
        assert (scores.device.type, scores.shape) == ("meta", (1, H, T))
        assert scores.dtype == torch.float32
