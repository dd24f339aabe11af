"""The graphs of attention, its sinks, and the type of a model's reference frame."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw.analysis.attention_graph import (
    Received,
    average_map,
    graph_numbers,
    head_divergence,
    received_attention,
    sinks_above,
)
from captum_cw.analysis.frame_rule import Anchors, FrameEvidence, anchors_of, find_frame
from captum_cw.analysis.frames import (
    FramesOverCheckpoints,
    ReferenceFrames,
    check_square,
    frames_over_checkpoints,
    reference_frames,
)
from captum_cw.analysis.result import AnalysisResult
from captum_cw.analysis.streaming import SeenLayer
from captum_cw.functional import AttentionLayer, QueryMask
from support.inputs import token_ids
from support.models import MODELS, SIZES, build, llama
from support.reference import eager_layers

# -- the definitions, with loops ------------------------------------------------------------------


def plain_graph(a: Tensor, threshold: float) -> dict[str, float]:
    n = len(a)
    edge = [[i != j and float(a[i, j]) > threshold for j in range(n)] for i in range(n)]
    laplacian = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if edge[i][j] or edge[j][i]:
                laplacian[i, i] += 1
                laplacian[i, j] = -1
    eigenvalues = np.linalg.eigvals(laplacian).real
    eigenvalues.sort()
    degrees = np.diag(laplacian)
    received = [sum(edge[i][j] for i in range(n)) for j in range(n)]
    differences = sum(abs(x - y) for x in received for y in received)
    gini = differences / (2 * n * sum(received)) if sum(received) else 0.0
    star = max(received) / (n - 1)
    return {
        "edges": sum(received) / (n * (n - 1)),
        "fiedler": eigenvalues[1],
        "gap": eigenvalues[2] - eigenvalues[1],
        "centralisation": sum(max(degrees) - d for d in degrees) / ((n - 1) * (n - 2)),
        "degree_variance": sum((d - sum(degrees) / n) ** 2 for d in degrees) / n,
        "star_likeness": star,
        "star_gini": 0.3 * star + 0.7 * gini,
    }


def plain_received(a: Tensor, visible: Tensor) -> Received:
    n = len(a)
    mean, followers, count = np.zeros(n), np.zeros(n), np.zeros(n)
    for j in range(n):
        queries = [i for i in range(n) if i != j and visible[i, j]]
        count[j] = len(queries)
        if queries:
            mean[j] = sum(float(a[i, j]) for i in queries) / len(queries)
            even = [float(a[i].sum()) / int(visible[i].sum()) for i in queries]
            follow = [float(a[i, j]) >= 2 * e for i, e in zip(queries, even, strict=True)]
            followers[j] = sum(follow) / len(queries)
    return Received(mean, followers, count)


def plain_divergence(heads: Tensor, sinks: Sequence[bool]) -> list[float]:
    """Sums with and without sinks, rows, and rows in which nothing is left."""
    average, sums = heads.double().mean(0), [0.0, 0.0, 0.0, 0.0]
    left_out = torch.tensor(sinks)
    for h in range(len(heads)):
        for i in range(len(average)):
            p, q = heads[h, i].double(), average[i]
            if float(p[~left_out].sum()) == 0:
                sums[3] += 1
                continue
            sums[2] += 1
            for number, keep in enumerate((torch.ones_like(left_out), ~left_out)):
                p_kept, q_kept = p[keep] / p[keep].sum(), q[keep] / q[keep].sum()
                sums[number] += sum(
                    float(x * math.log(x / y)) for x, y in zip(p_kept, q_kept, strict=True) if x > 0
                )
    return sums


def plain_frame(maps: Sequence[Anchors], p: int = 0) -> dict[str, float]:
    some = [m for m in maps if m.counts[p]]
    sets = [(m.text, set(m.places[: m.counts[p]].tolist())) for m in some]
    tops = [(int(m.places[0]), int(m.places[0]) - m.T) for m in some]
    candidates = {position for top in tops for position in top}
    again, could = 0, 0
    for x, (text, anchors) in enumerate(sets):
        for y, (other, others) in enumerate(sets):
            if x != y and text == other:
                again += len(anchors & others)
                could += len(anchors)
    first = [0 in anchors for _, anchors in sets]
    last = [m.T - 1 in anchors for m, (_, anchors) in zip(some, sets, strict=True)]
    n = len(some)
    return {
        "with_anchor": n / len(maps),
        "top_share": max(sum(c in top for top in tops) for c in candidates) / n,
        "alone_share": sum(len(anchors) == 1 for _, anchors in sets) / n,
        "anchors": sum(len(anchors) for _, anchors in sets) / n,
        "first_share": sum(first) / n,
        "last_share": sum(last) / n,
        "both_share": sum(f and z for f, z in zip(first, last, strict=True)) / n,
        "either_share": sum(f or z for f, z in zip(first, last, strict=True)) / n,
        "rarer_share": min(sum(first), sum(last)) / n,
        "recurrence": again / could if could else float("nan"),
    }


# -- graphs with known numbers ---------------------------------------------------------------------


def ring(n: int) -> Tensor:
    """Each attends to the one before it."""
    return torch.eye(n).roll(-1, dims=1)


def star(n: int, centre: int = 0) -> Tensor:
    """All attend to one token."""
    a = torch.zeros(n, n)
    a[:, centre] = 1
    return a


@pytest.mark.parametrize("n", [3, 4, 7, 20])
def test_star_ring_and_complete_graph_have_their_known_numbers(n: int) -> None:
    found = graph_numbers(star(n, n // 2), 0.5)
    assert found.fiedler == pytest.approx(1)
    # The second and third smallest eigenvalues are 1, but for the smallest star, where it is 3.
    assert found.gap == pytest.approx(2 if n == 3 else 0)
    assert found.centralisation == found.star_likeness == 1
    assert found.edges == pytest.approx(1 / n)
    assert found.star_gini == pytest.approx(0.3 + 0.7 * (n - 1) / n)

    found = graph_numbers(ring(n), 0.5)
    assert found.fiedler == pytest.approx(2 - 2 * math.cos(2 * math.pi / n))
    assert found.centralisation == found.degree_variance == 0
    assert found.star_likeness == pytest.approx(1 / (n - 1))
    assert found.star_gini == pytest.approx(0.3 / (n - 1))  # all have in-degree one

    found = graph_numbers(torch.full((n, n), 1 / n), 0.5 / n)
    assert found.fiedler == pytest.approx(n)
    assert found.gap == pytest.approx(0)
    assert (found.edges, found.centralisation, found.star_likeness) == (1, 0, 1)


def test_parts_without_a_connection_have_fiedler_value_zero() -> None:
    parts = torch.block_diag(star(4), star(3))
    assert graph_numbers(parts, 0.5).fiedler == pytest.approx(0, abs=1e-12)
    nothing = graph_numbers(star(5), 1.0)  # an edge needs more than the threshold
    assert nothing == (0, 0, 0, 0, 0, 0, 0)


def test_two_anchors_are_known_by_hand() -> None:
    """Six tokens attend to two others, which do not attend: the complete bipartite graph."""
    a = torch.zeros(8, 8)
    a[2:, :2] = 0.5
    found = graph_numbers(a, 0.1)
    assert found.fiedler == pytest.approx(2)
    assert found.centralisation == pytest.approx(6 * 4 / (7 * 6))
    assert found.degree_variance == pytest.approx(3.0)  # 2 of degree 6 and 6 of degree 2
    assert found.star_likeness == pytest.approx(6 / 7)
    assert found.star_gini == pytest.approx(0.3 * 6 / 7 + 0.7 * 0.75)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 0.2])
@pytest.mark.parametrize("causal", [True, False])
def test_graph_follows_the_definition(causal: bool, threshold: float) -> None:
    a = random_heads(1, 11, causal=causal)[0]
    found, expected = graph_numbers(a, threshold)._asdict(), plain_graph(a, threshold)
    assert found == pytest.approx(expected, abs=1e-9)


def test_two_tokens_have_no_gap_and_no_centralisation() -> None:
    found = graph_numbers(star(2), 0.5)
    assert found.fiedler == pytest.approx(2)
    assert math.isnan(found.gap)
    assert math.isnan(found.centralisation)
    assert found.star_likeness == 1


# -- sinks of one map ------------------------------------------------------------------------------


def random_heads(H: int, T: int, *, causal: bool, seed: int = 0) -> Tensor:
    logits = 3 * torch.randn(H, T, T, generator=torch.Generator().manual_seed(seed))
    if causal:
        logits = logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1)


def layer_of(heads: Tensor, mask: QueryMask | None = None) -> AttentionLayer:
    H, T, _ = heads.shape
    return AttentionLayer.from_tensors(
        heads[None], torch.ones(1, 1, T, 2), torch.ones(H, 2, 3), mask
    )


@pytest.mark.parametrize("window", [2, 4, 99])
@pytest.mark.parametrize("causal", [True, False])
def test_received_attention_is_a_mean_over_the_others_that_see_the_key(
    causal: bool, window: int
) -> None:
    T = 9
    i, j = torch.arange(T)[:, None], torch.arange(T)
    visible = (i - j).abs() < window
    if causal:
        visible &= j <= i
    a = random_heads(1, T, causal=causal)[0] * visible
    for found, expected in zip(
        received_attention(a, visible), plain_received(a, visible), strict=True
    ):
        assert np.allclose(found, expected, atol=1e-12)


def test_the_last_token_of_a_causal_map_is_no_sink_of_its_own() -> None:
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    received = received_attention(torch.eye(5), visible)
    assert received.mean.tolist() == received.followers.tolist() == [0] * 5
    assert received.queries.tolist() == [4, 3, 2, 1, 0]


def test_keys_that_few_queries_see_are_not_compared() -> None:
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    a = causal / causal.sum(-1, keepdim=True)
    assert received_attention(a, causal).compared.tolist() == [True] * 9 + [False] * 3
    everything = torch.ones(12, 12, dtype=torch.bool)
    assert received_attention(a, everything).compared.all()
    window = causal.triu(-4)  # all but the last keys are seen by the same number
    assert received_attention(a, window).compared.tolist() == [True] * 11 + [False]


def test_uniform_attention_has_no_anchor_in_any_mask() -> None:
    for visible in (torch.ones(9, 9), torch.ones(9, 9).tril()):
        a = visible / visible.sum(-1, keepdim=True)
        received = received_attention(a, visible.bool())
        assert not received.followers.any()
        assert not len(anchors_of(received, (50, 80)).places)
    # The causal map's first key receives most all the same, and is a sink by percentile.
    assert sinks_above(received, 80).nonzero()[0].tolist() == [0, 1]


def test_looking_at_neighbours_makes_no_anchor() -> None:
    """Though the last but one receives all attention of the only query that sees it."""
    a = torch.zeros(40, 40)
    for i in range(40):
        a[i, max(0, i - 3) : i + 1] = 1 / min(i + 1, 4)
    received = received_attention(a, torch.ones(40, 40, dtype=torch.bool).tril())
    assert received.mean.argmax() >= 36
    assert not len(anchors_of(received, (50, 80)).places)


def of_keys(mean: Sequence[float]) -> Received:
    """All seen by all, and followed by all."""
    n = len(mean)
    return Received(np.array(mean), np.ones(n), np.full(n, n - 1.0))


def test_sinks_are_at_or_above_the_percentile_and_not_the_least() -> None:
    received = of_keys(np.arange(11.0).tolist())
    assert sinks_above(received, 80).nonzero()[0].tolist() == [8, 9, 10]
    assert sinks_above(received, 95).nonzero()[0].tolist() == [10]
    assert not sinks_above(of_keys([1.0] * 11), 80).any()
    # More of the same size than the percentile leaves room for are all sinks.
    assert sinks_above(of_keys([1.0] * 4 + [0.0] * 7), 95).sum() == 4
    assert not sinks_above(received._replace(queries=np.zeros(11)), 80).any()
    late = np.array([10.0] * 9 + [2, 1])
    assert sinks_above(received._replace(queries=late), 80).nonzero()[0].tolist() == [7, 8]


def test_anchors_stand_out() -> None:
    received = of_keys([0.1, 0.4, 0.19, 0.2, 0.0, 0.0, 0.0, 0.0])
    found = anchors_of(received, (90, 50), text=3)
    assert found.places.tolist() == [1, 3]  # 0.19 is less than half of 0.4
    assert (found.counts, found.text, found.T) == ((1, 2), 3, 8)
    # What half of the queries do not follow is no anchor, and others are not held against it.
    followers = np.array([1, 0.49, 0.5, 1, 1, 1, 1, 1])
    assert anchors_of(received._replace(followers=followers), (50,)).places.tolist() == [3, 2, 0]


@pytest.mark.parametrize("causal", [True, False])
def test_divergence_follows_the_definition(causal: bool) -> None:
    heads = random_heads(3, 7, causal=causal)
    heads[1, 4] = star(7, 2)[4]  # one head looks at sinks alone
    sinks = torch.tensor([[False] * 7, [True, False, True, False, False, False, False], [True] * 7])
    layer = layer_of(heads, QueryMask(7, 7, causal=causal))
    found = head_divergence(layer, average_map(layer)[0], sinks)
    for p, some in enumerate(sinks.tolist()):
        assert found[:, p].tolist() == pytest.approx(plain_divergence(heads, some), abs=1e-6)
    assert found[3].tolist() == [0, 4 if causal else 1, 21]


def test_one_head_is_its_own_average() -> None:
    layer = layer_of(random_heads(1, 6, causal=True), QueryMask(6, 6, causal=True))
    average, visible = average_map(layer)
    sinks = torch.zeros(1, 6, dtype=torch.bool)
    sinks[0, 2] = True
    assert head_divergence(layer, average, sinks)[:2].abs().max() < 1e-12
    assert torch.equal(visible, torch.ones(6, 6, dtype=torch.bool).tril())


def test_negative_attention_counts_by_its_size() -> None:
    heads = random_heads(2, 5, causal=False)
    signs = torch.tensor([1.0, -1.0]).repeat(3)[:5]
    first, second = (average_map(layer_of(x))[0] for x in (heads, heads * signs))
    assert torch.equal(first, second)
    sinks = torch.zeros(1, 5, dtype=torch.bool)
    both = [head_divergence(layer_of(x), first, sinks) for x in (heads, heads * signs)]
    assert torch.equal(*both)


# -- the frame of many maps ------------------------------------------------------------------------


def frame_of(maps: Sequence[tuple[int, Tensor]], causal: bool = False) -> FrameEvidence:
    """The frame of head-averaged maps, each with the number of its text."""
    anchors = []
    for text, a in maps:
        visible = torch.ones_like(a, dtype=torch.bool)
        received = received_attention(a, visible.tril() if causal else visible)
        anchors.append(anchors_of(received, (80,), text))
    (found,) = find_frame(anchors)
    return found


def test_all_attention_on_one_position_is_centralised() -> None:
    for causal, position in ((True, 0), (False, 0), (False, 3)):
        maps = [(text, star(8 + text, position)) for text in range(4) for _ in range(3)]
        found = frame_of(maps, causal)
        assert (found.frame, found.top_position) == ("centralised", position)
        assert found.top_share == found.alone_share == found.anchors == found.with_anchor == 1
        assert found.p_value == found.p_centralised == 1 / 1001


def test_a_sink_at_the_end_is_fixed_though_texts_differ_in_length() -> None:
    maps = [(text, star(8 + text, 7 + text)) for text in range(6)]
    found = frame_of(maps)
    assert (found.frame, found.top_position, found.top_share) == ("centralised", -1, 1)
    assert found.p_value < 0.01


def test_several_varying_positions_are_distributed() -> None:
    maps = []
    for text in range(5):
        places = np.random.default_rng(text).choice(19, 3, replace=False)
        a = torch.zeros(20, 20)
        a[:, places] = torch.tensor([0.4, 0.3, 0.3])
        maps += [(text, a)] * 4
    found = frame_of(maps)
    assert found.frame == "distributed"
    assert (found.anchors, found.alone_share, found.recurrence) == (3, 0, 1)
    assert found.p_value == found.p_distributed == 1 / 1001


def test_several_fixed_positions_are_distributed_too() -> None:
    a = torch.zeros(20, 20)
    a[:, [0, 5, 9]] = torch.tensor([0.4, 0.3, 0.3])
    assert frame_of([(text, a) for text in range(4) for _ in range(2)]).frame == "distributed"


def test_the_first_and_the_last_are_bidirectional() -> None:
    maps, by_layer = [], []
    for text in range(6):
        T = 9 + text
        a = (star(T, 0) + star(T, T - 1)) / 2
        maps += [(text, a)] * 2
        by_layer += [(text, star(T, 0)), (text, star(T, T - 1))]  # each layer has one of them
    for found, both in ((frame_of(maps), 1), (frame_of(by_layer), 0)):
        assert (found.frame, found.either_share, found.both_share) == ("bidirectional", 1, both)
        assert found.p_value == found.p_bidirectional == 1 / 1001


def test_uniform_attention_has_no_frame_and_is_not_rejected() -> None:
    for causal in (True, False):
        a = torch.ones(12, 12).tril() if causal else torch.ones(12, 12)
        found = frame_of([(text, a / a.sum(-1, keepdim=True)) for text in range(5)], causal)
        assert (found.frame, found.p_value, found.with_anchor) == ("none", 1, 0)
        assert found.p_centralised == found.p_distributed == found.p_bidirectional == 1
        assert math.isnan(found.top_position)


def placed(
    text: int, T: int, places: Sequence[int], *, counts: tuple[int, ...] | None = None
) -> Anchors:
    return Anchors(text, T, np.array(places, int), counts or (len(places),), np.arange(T))


def random_maps(seed: int, texts: int = 3, layers: int = 4) -> list[Anchors]:
    random = np.random.default_rng(seed)
    maps = []
    for text in range(texts):
        T = int(random.integers(8, 14))
        for _ in range(layers):
            k = int(random.integers(0, 4))
            counts = (k, int(random.integers(0, k + 1)))
            maps.append(placed(text, T, random.choice(T, k, replace=False), counts=counts))
    return maps


@pytest.mark.parametrize("seed", range(5))
def test_evidence_follows_the_definition(seed: int) -> None:
    maps = random_maps(seed)
    for p, found in enumerate(find_frame(maps, permutations=1)):
        expected = plain_frame(maps, p)
        assert {name: getattr(found, name) for name in expected} == pytest.approx(
            expected, nan_ok=True
        )


def test_random_places_are_rarely_rejected() -> None:
    """The test holds its level, for each statistic."""
    found = [find_frame(random_maps(seed), permutations=99)[0] for seed in range(120)]
    for name in ("p_centralised", "p_distributed", "p_bidirectional"):
        assert np.mean([getattr(x, name) <= 0.05 for x in found]) < 0.12, name


def test_p_values_are_the_chances_that_can_be_counted() -> None:
    """One anchor each in maps of four tokens: the second stands where the first does in 1 of 4."""
    two_texts = [placed(0, 4, [2]), placed(1, 4, [2])]
    (found,) = find_frame(two_texts, permutations=4000)
    assert found.p_centralised == pytest.approx(0.25, abs=0.03)
    assert found.chance_top_share == pytest.approx(0.25 + 0.75 / 2, abs=0.02)
    assert found.p_distributed == 1  # no text has two layers
    assert math.isnan(found.recurrence)
    one_text = [placed(0, 4, [2]), placed(0, 4, [2])]
    (found,) = find_frame(one_text, permutations=4000)
    assert found.p_distributed == pytest.approx(0.25, abs=0.03)
    assert found.chance_recurrence == pytest.approx(0.25, abs=0.03)
    (found,) = find_frame([placed(0, 4, [0, 3])], permutations=4000)
    assert found.p_bidirectional == pytest.approx(1 / 6, abs=0.03)
    # Anchors are placed among the positions that another query sees.
    first = [m._replace(free=np.arange(3)) for m in (placed(0, 4, [0]), placed(1, 4, [0]))]
    assert find_frame(first, permutations=4000)[0].p_centralised == pytest.approx(1 / 3, abs=0.03)


def test_the_rule_has_its_thresholds() -> None:
    half = [placed(n, 30, [0] if n < 2 else [3 + 2 * n]) for n in range(4)]
    assert find_frame(half)[0].frame == "centralised"
    less = [placed(n, 30, [0] if n < 2 else [3 + 2 * n]) for n in range(5)]
    assert find_frame(less)[0].frame == "distributed"
    accompanied = [placed(n, 30, [0] if n < 1 else [0, 4]) for n in range(4)]
    assert find_frame(accompanied)[0].frame == "distributed"
    rare = [placed(n, 30, [0, 29] if n < 1 else [0]) for n in range(4)]
    assert find_frame(rare)[0].frame == "bidirectional"
    rarer = [placed(n, 30, [0, 29] if n < 1 else [0]) for n in range(5)]
    assert find_frame(rarer)[0].frame == "centralised"
    assert find_frame([placed(n, 30, [0] if n < 2 else []) for n in range(5)])[0].frame == "none"
    assert find_frame([placed(n, 30, [0] if n < 2 else []) for n in range(4)])[0].frame != "none"


# -- models ----------------------------------------------------------------------------------------


def looking_for(model: nn.Module, strength: float) -> None:
    """GPT-2 or BERT attends to tokens with a large first component, in all heads and layers."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name or "LayerNorm" in name:
                p.fill_(float(name.endswith("weight")))
            elif "wte" not in name:
                p.zero_()
        for module in model.modules():
            if hasattr(module, "c_attn"):
                module.c_attn.bias[0:32:8] = 1
                module.c_attn.weight[0, 32:64:8] = strength
            elif hasattr(module, "query"):
                module.query.bias[::8] = 1
                module.key.weight[::8, 0] = strength


def planted_gpt2(strength: float = 5) -> nn.Module:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model: Any = build(transformers.GPT2LMHeadModel, config)
    looking_for(model, strength)
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 0
    return model


def sinking_at_start(strength: float = 5) -> nn.Module:
    model: Any = planted_gpt2(strength)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = 10
    return model


def sinking_at(token: int) -> nn.Module:
    model: Any = planted_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[token, 0] = 10
    return model


def texts_with(token: int) -> Tensor:
    """Five texts of 24 tokens, with that one at three places in each."""
    ids = token_ids(5, 24)
    ids[ids == token] -= 1
    for text, row in enumerate(ids):
        row[np.random.default_rng(text).choice(16, 3, replace=False) + 1] = token
    return ids


def sinking_at_both_ends(T: int) -> nn.Module:
    config = transformers.BertConfig(**{**SIZES, "bos_token_id": None, "eos_token_id": None})
    model: Any = build(transformers.BertModel, config)
    looking_for(model, 5)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_(0, 0.2)
        model.embeddings.word_embeddings.weight[:, 0] = 0
        model.embeddings.position_embeddings.weight[[0, T - 1], 0] = 10
    return model


def test_a_model_that_looks_at_its_start_is_centralised() -> None:
    found = reference_frames(sinking_at_start(), token_ids(4, 16))
    assert (found.frame, found.numbers["top_position"]) == ("centralised", 0)
    assert found.p_value == 1 / 1001
    assert found.tables["frames"]["frame"].tolist() == ["centralised"] * 3
    graph = found.tables["graph"]
    assert (graph.loc[graph["threshold"] == 0.1, "star_likeness"] == 1).all()
    assert graph.loc[graph["threshold"] == 0.2, "fiedler"].to_numpy() == pytest.approx(1)
    positions = found.tables["positions"].set_index(["layer", "position"])
    assert positions.loc[(1, 0), "anchor_share"] == 1
    assert positions.loc[(1, 0), "received"] > 0.9
    assert found.numbers["chance_top_share"] < 0.6


def test_a_model_that_looks_for_a_token_is_distributed() -> None:
    """Positions count, not the token that stands there."""
    found = reference_frames(sinking_at(60), texts_with(60))
    assert found.frame == "distributed"
    assert found.numbers["recurrence"] == 1
    assert found.p_value == 1 / 1001


def test_a_model_that_looks_at_both_ends_is_bidirectional() -> None:
    found = reference_frames(sinking_at_both_ends(14), token_ids(4, 14))
    assert found.frame == "bidirectional"
    assert found.numbers["both_share"] == 1
    assert found.p_value == 1 / 1001
    last = found.tables["positions"].query("position == -1")
    assert (last["anchor_share"] == 1).all()
    assert (found.tables["sinks"].query("percentile == 80")["last_share"] == 1).all()


def test_a_model_without_a_sink_has_no_frame() -> None:
    found = reference_frames(sinking_at_start(0), token_ids(4, 16))
    assert (found.frame, found.p_value) == ("none", 1)
    assert found.tables["sinks"]["anchors"].tolist() == [0] * 6
    assert found.tables["sinks"]["divergence"].abs().max() < 1e-6  # all heads are the same


@pytest.mark.parametrize("name", ["llama-2-of-4-heads", "mistral-sliding", "gpt2"])
def test_tables_follow_the_definitions(name: str) -> None:
    model, ids = MODELS[name](), [token_ids(1, 12), token_ids(1, 9, seed=1)]
    found = reference_frames(model, ids, permutations=19)
    visible = [
        torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        .tril()
        .triu(-2 if name == "mistral-sliding" else -99)
        for x in ids
    ]
    maps = []
    for text, x in enumerate(ids):
        maps += [
            (text, number, seen.attention[0])
            for number, seen in enumerate(eager_layers(model, input_ids=x))
        ]
    graph = found.tables["graph"].set_index(["layer", "threshold"])
    sinks = found.tables["sinks"].set_index(["layer", "percentile"])
    positions = found.tables["positions"].set_index(["layer", "position"])
    for layer in range(2):
        heads = [a for _, number, a in maps if number == layer]
        received = [plain_received(a.mean(0), v) for a, v in zip(heads, visible, strict=True)]
        for threshold in (0.05, 0.2):
            by_text = [plain_graph(a.mean(0), threshold) for a in heads]
            for column in by_text[0]:
                expected = (by_text[0][column] + by_text[1][column]) / 2
                assert graph.loc[(layer, threshold), column] == pytest.approx(expected, abs=1e-9)
        for percentile in (80, 90, 95):
            some = [sinks_above(r, percentile) for r in received]
            sums = np.sum(
                [plain_divergence(a, s.tolist()) for a, s in zip(heads, some, strict=True)], axis=0
            )
            row = sinks.loc[(layer, percentile)]
            assert row["sinks"] == np.mean([s.sum() for s in some])
            assert (row["rows"], row["empty_rows"]) == tuple(sums[2:])
            assert row["divergence"] == pytest.approx(sums[0] / sums[2], rel=1e-4)
            assert row["divergence_without"] == pytest.approx(sums[1] / sums[2], rel=1e-4)
            mass = [
                float(a.mean(0).sum(0)[torch.from_numpy(s)].sum()) / a.shape[1]
                for a, s in zip(heads, some, strict=True)
            ]
            assert row["mass"] == pytest.approx(np.mean(mass), rel=1e-4)
        for place in (0, 3, 8, 10):
            here = [r.mean[place] for r in received if place < len(r.mean) and r.queries[place]]
            row = positions.loc[(layer, place)]
            assert row["texts"] == len(here)
            assert row["received"] == pytest.approx(np.mean(here), rel=1e-4)
        end = [r.mean[-2] for r in received]
        assert positions.loc[(layer, -2), "received"] == pytest.approx(np.mean(end), rel=1e-4)
        assert (layer, -1) not in positions.index  # no other query sees it
    anchors = [
        anchors_of(plain_received(a.mean(0), visible[text]), (80, 90, 95), text)
        for text, _, a in maps
    ]
    expected_frames = find_frame(anchors, permutations=19)
    for percentile, evidence in zip((80, 90, 95), expected_frames, strict=True):
        row = found.tables["frames"].set_index("percentile").loc[percentile]
        for column, value in evidence._asdict().items():
            assert row[column] == value or (math.isnan(value) and math.isnan(row[column]))
    assert found.frame == expected_frames[0].frame  # that of the lowest percentile


def test_padding_changes_nothing() -> None:
    model, ids = llama(), token_ids(2, 9)
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    padded = reference_frames(model, {"input_ids": ids, "attention_mask": mask}, permutations=19)
    alone = reference_frames(model, [ids[:1], ids[1:, 3:]], permutations=19)
    assert padded.numbers == pytest.approx(alone.numbers, nan_ok=True)
    for name, table in padded.tables.items():
        pd.testing.assert_frame_equal(table, alone.tables[name])


def test_equal_seeds_give_equal_results() -> None:
    model, ids = sinking_at_start(0.8), token_ids(3, 12)
    first, second, other = (
        reference_frames(model, ids, permutations=50, seed=seed).numbers for seed in (0, 0, 1)
    )
    assert first == pytest.approx(second, rel=0, abs=0, nan_ok=True)
    assert first["chance_top_share"] != other["chance_top_share"]


def test_the_smallest_model_and_text() -> None:
    sizes = {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = build(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes, num_key_value_heads=1)
    )
    found = reference_frames(model, token_ids(1, 2), permutations=9)
    # The only key that another query sees is neither more nor less than the others.
    assert found.frame == "none"
    assert found.tables["graph"]["gap"].isna().all()
    assert found.tables["sinks"]["sinks"].tolist() == [0] * 3
    assert found.tables["positions"]["position"].tolist() == [-2, 0]
    found.plot(use_pyplot=False)[0].draw_without_rendering()
    longer = reference_frames(model, token_ids(1, 12), permutations=9)
    assert longer.numbers["p_distributed"] == 1  # one layer: nothing recurs


def test_a_cache_before_the_text_is_refused() -> None:
    layer = AttentionLayer.from_tensors(
        torch.rand(1, 1, 2, 3), torch.ones(1, 1, 3, 2), torch.ones(1, 2, 3)
    )
    seen = SeenLayer(0, 0, "layer", layer)
    with pytest.raises(ValueError, match="2 queries and 3 keys"):
        check_square(seen)


def test_bad_input_is_refused() -> None:
    model, ids = llama(), token_ids()
    with pytest.raises(ValueError, match="Text 0 has 1 tokens"):
        reference_frames(model, ids[:, :1])
    with pytest.raises(ValueError, match="permutations must be 1 or more, got 0"):
        reference_frames(model, ids, permutations=0)
    with pytest.raises(ValueError, match="maps is empty"):
        find_frame([])


# -- results ---------------------------------------------------------------------------------------


def same(result: AnalysisResult, other: AnalysisResult) -> None:
    assert type(result) is type(other)
    assert result.settings == other.settings
    assert result.numbers == pytest.approx(other.numbers, rel=0, abs=0, nan_ok=True)
    assert list(result.tables) == list(other.tables)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(table, other.tables[name], check_exact=True)


@pytest.mark.parametrize("strength", [5, 0])
def test_results_come_back_from_disk(tmp_path: Path, strength: float) -> None:
    result = reference_frames(sinking_at_start(strength), token_ids(3, 12), permutations=19)
    result.save(tmp_path / "frames.json")
    same(AnalysisResult.load(tmp_path / "frames.json"), result)
    assert isinstance(AnalysisResult.load(tmp_path / "frames.json"), ReferenceFrames)


def test_the_figure_says_what_it_shows() -> None:
    for model, ids, title in (
        (
            sinking_at_start(),
            token_ids(4, 16),
            "Centralised reference frame: the top anchor is at 0",
        ),
        (sinking_at_both_ends(16), token_ids(4, 16), "Bidirectional reference frame: the first"),
        (sinking_at_start(0), token_ids(4, 16), "No reference frame: 0% of the maps"),
        (sinking_at(60), texts_with(60), "Distributed reference frame: 3.0 anchors per map, of"),
    ):
        figure, axes = reference_frames(model, ids, permutations=19).plot(use_pyplot=False)
        assert figure.get_suptitle().startswith(title)
        assert axes.shape == (2, 2)
        for ax in axes.flat:
            assert ax.get_xlabel()
            assert ax.get_ylabel()
            assert ax.get_title()
        assert len(axes[0, 1].get_legend().get_texts()) == 7
        assert len(axes[1, 1].get_legend().get_texts()) == 4
        figure.draw_without_rendering()
    figure, _ = reference_frames(llama(), token_ids(1, 5), permutations=9).plot()
    assert figure.number in plt.get_fignums()
    plt.close(figure)


# -- checkpoints -----------------------------------------------------------------------------------


def grown(revision: str) -> nn.Module:
    """Its sink grows with the number at the end of the revision's name."""
    return sinking_at_start(float(revision.removeprefix("step")) / 100)


def test_a_frame_emerges_over_checkpoints(tmp_path: Path) -> None:
    revisions = ["step0", "step10", "step300", "step400"]
    found = frames_over_checkpoints(grown, revisions, token_ids(4, 16), permutations=99)
    table = found.to_dataframe()
    assert table["revision"].tolist() == revisions
    assert table["frame"].tolist() == ["none", "none", "centralised", "centralised"]
    assert table["p_value"].tolist() == [1, 1, 0.01, 0.01]
    assert found.numbers == {"settled_at": 2}
    assert found.settings["frame"] == "centralised"
    by_hand = reference_frames(grown("step300"), token_ids(4, 16), permutations=99)
    assert table.loc[2, list(by_hand.numbers)].to_dict() == by_hand.numbers

    found.save(tmp_path / "checkpoints.json")
    same(AnalysisResult.load(tmp_path / "checkpoints.json"), found)
    assert isinstance(AnalysisResult.load(tmp_path / "checkpoints.json"), FramesOverCheckpoints)
    figure, axes = found.plot(use_pyplot=False)
    labels = [label.get_text() for label in axes[0].get_xticklabels()]
    assert labels[1:3] == ["step10\nnone\np = 1", "step300\ncentralised\np = 0.01"]
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_legend() for ax in axes)
    figure.draw_without_rendering()


def test_one_model_is_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def load(revision: str) -> nn.Module:
        assert not any(model() for model in alive)
        model = grown(revision)
        alive.append(weakref.ref(model))
        return model

    gc.disable()  # nothing but the function itself collects
    try:
        found = frames_over_checkpoints(
            load, ["step1", "step2", "step3"], iter([token_ids(2, 9)]), permutations=9
        )
    finally:
        gc.enable()
    assert len(alive) == 3
    assert found.numbers["settled_at"] in (0, 1, 2)


def test_bad_revisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"revisions=\['main'\]: give two or more"):
        frames_over_checkpoints(grown, ["main"], token_ids())
