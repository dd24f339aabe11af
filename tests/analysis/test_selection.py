"""Sets of the keys with the most attention, regimes of heads, and what the theory assumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy.stats import pearsonr
from torch import Tensor, nn

from captum_cw.analysis.assumptions import (
    SelectionAssumptions,
    fit_decay,
    fit_profile,
    norm_sums,
    profile_sums,
    selection_assumptions,
    similarity_sums,
)
from captum_cw.analysis.regimes import (
    HeadRegimes,
    head_regimes,
    head_sums,
    label_regimes,
)
from captum_cw.analysis.result import AnalysisResult
from captum_cw.analysis.selection import TokenSelection, selection_sums, token_selection
from captum_cw.analysis.selection_geometry import (
    Terms,
    attention_ranks,
    draw_queries,
    random_ranks,
    separation,
    terms_of,
)
from captum_cw.functional import AttentionLayer, QueryMask
from support.inputs import token_ids
from support.models import SIZES, bert, build, gpt2, llama, mistral
from support.reference import eager_layers

# ---------------------------------------------------------------------------------------------
# The definition, with loops


def by_definition(
    a: Tensor, v: Tensor, chosen: list[int], seen: list[int], distance: str = "euclidean"
) -> tuple[float, float, float, float]:
    """Precision, recall, F and cos(v_1, s_N) of one set of one query; ``(S,)`` and ``(S, d_h)``."""
    z = a.double()[:, None] * v.double()
    s = sum((z[j] for j in chosen), torch.zeros(v.shape[1]).double())
    if distance == "euclidean":
        D = {j: float((z[j] - s).norm()) for j in seen}
    else:
        D = {j: 1 - cosine(z[j], s) for j in seen}
    r_max = max(D[j] for j in chosen)
    r_min = min(D[j] for j in seen if j not in chosen)
    N = len(chosen)
    precision = N / (N + sum(D[j] <= r_max for j in seen if j not in chosen))
    recall = sum(D[j] < r_min for j in chosen) / N
    f = 2 * precision * recall / (precision + recall)
    return precision, recall, f, cosine(v[0].double(), s)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def most_attended(a: Tensor, seen: list[int], size: int) -> list[int]:
    return sorted(seen, key=lambda j: (-float(a[j]), j))[:size]


def planted(H: int = 3, T: int = 12, d_h: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Causal attention ``(H, T, T)`` and values ``(H, T, d_h)``, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(H, T, T, generator=generator, dtype=torch.float64)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    value = torch.randn(H, T, d_h, generator=generator, dtype=torch.float64)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1), value


def causal(T: int) -> Tensor:
    return torch.ones(1, T, T, dtype=torch.bool).tril()


# ---------------------------------------------------------------------------------------------
# Precision, recall and F of one set


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_separation_is_the_definition(distance: Any, size: int) -> None:
    a, v = planted()
    terms = Terms.of(a, v, causal(12))
    orders = [attention_ranks(terms), random_ranks(terms.visible, torch.Generator().manual_seed(1))]
    for ranks in orders:
        found = separation(terms, ranks < size, distance)
        for h in range(3):
            for i in range(size, 12):
                seen = list(range(i + 1))
                row = ranks[h % len(ranks), i]
                chosen = [j for j in seen if row[j] < size]
                if ranks is orders[0]:
                    assert chosen == sorted(most_attended(a[h, i], seen, size))
                expected = by_definition(a[h, i], v[h], chosen, seen, distance)
                assert [float(x[h, i]) for x in found] == pytest.approx(expected)


def four_keys(z: list[float]) -> Terms:
    a = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    return Terms.of(a[None, None], (torch.tensor(z).double() / a)[None, :, None])


@pytest.mark.parametrize(
    ("z", "precision", "recall"),
    [
        # The sum is 1. Distances 1, 2; 2.5, 1.5: one key intrudes, and one of the two is nearer.
        ([2, -1, 3.5, 2.5], 2 / 3, 1 / 2),
        # 1, 2; 3, 4: apart.
        ([2, -1, 4, 5], 1, 1),
        # 1, 2; 0.5, 4: an outsider is the nearest.
        ([2, -1, 1.5, 5], 2 / 3, 0),
        # 1, 2; 2, 2: touching counts against precision, and against the recall of the 2.
        ([2, -1, 3, -1], 1 / 2, 1 / 2),
        # 1, 2; 1, 4: touching from within.
        ([2, -1, 0, 5], 2 / 3, 0),
    ],
)
def test_four_keys_by_hand(z: list[float], precision: float, recall: float) -> None:
    terms = four_keys(z)
    found = separation(terms, attention_ranks(terms) < 2)
    assert float(found.precision) == pytest.approx(precision)
    assert float(found.recall) == pytest.approx(recall)
    assert float(found.f) == pytest.approx(2 * precision * recall / (precision + recall))


def test_of_equal_weights_the_lower_index_comes_first() -> None:
    a = torch.tensor([[[0.2, 0.3, 0.0, 0.3, 0.2], [0.2] * 5, [0.0] * 5]])
    visible = torch.ones(1, 3, 5, dtype=torch.bool)
    visible[0, 1, 0] = False
    ranks = attention_ranks(Terms.of(a, torch.ones(1, 5, 1), visible))
    assert ranks.tolist() == [[[2, 0, 4, 1, 3], [4, 0, 1, 2, 3], [0, 1, 2, 3, 4]]]


def test_one_key_is_apart_from_all_others() -> None:
    """Even where the terms differ by many orders of magnitude."""
    a, v = planted(T=40)
    a = a ** torch.tensor([1.0, 4.0, 12.0])[:, None, None]
    terms = Terms.of(a, v, causal(40))
    draws = torch.Generator().manual_seed(0)
    for ranks in (attention_ranks(terms), *(random_ranks(terms.visible, draws) for _ in range(4))):
        assert (separation(terms, ranks < 1).f[:, 1:] == 1).all()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equal_keys_are_not_separated(distance: Any) -> None:
    value = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0)).expand(1, 7, 64)
    alike = value.clone()
    alike[0, :] = value[0, 0]
    terms = Terms.of(torch.full((1, 1, 7), 1 / 7), alike)
    found = separation(terms, attention_ranks(terms) < 2, distance)
    assert (float(found.precision), float(found.recall), float(found.f)) == (2 / 7, 0, 0)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_head_without_values_is_finite(distance: Any) -> None:
    a, v = planted()
    terms = Terms.of(a, 0 * v, causal(12))
    found = separation(terms, attention_ranks(terms) < 2, distance)
    seen = torch.arange(3, 13).double()
    assert torch.allclose(found.precision[:, 2:], 2 / seen)
    assert not found.f[:, 2:].any()
    assert not found.sink_similarity.any()


def test_random_sets_are_uniform_among_the_keys_that_are_seen() -> None:
    visible = torch.tensor([[[True, True, False, True, True]]]).expand(1, 4000, 5)
    chosen = random_ranks(visible, torch.Generator().manual_seed(0)) < 2
    assert (chosen.sum(-1) == 2).all()
    share = chosen.double().mean((0, 1))
    assert share[2] == 0
    assert torch.allclose(share[[0, 1, 3, 4]], torch.tensor(0.5).double(), atol=0.03)


def test_queries_are_drawn_once_each_and_as_the_seed_says() -> None:
    texts = [torch.arange(100)] * 2
    drawn, other = draw_queries(texts, 8, 20, seed=1)
    assert len(set(drawn.tolist())) == 20
    assert min(drawn) >= 8
    assert torch.equal(drawn, drawn.sort().values)
    assert not torch.equal(drawn, other)
    assert torch.equal(drawn, draw_queries(texts, 8, 20, seed=1)[0])
    assert not torch.equal(drawn, draw_queries(texts, 8, 20, seed=2)[0])


def test_blocks_give_the_rows_of_the_chosen_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", 4 * 12 * 5)
    a, v = planted(4)
    layer = AttentionLayer.from_tensors(
        a[None], v[None, :2], torch.randn(4, 5, 6).double(), QueryMask(12, 12, causal=True)
    )
    queries = torch.tensor([1, 2, 6, 11])
    places = []
    for some, terms in terms_of(layer, queries):
        S = terms.attention.shape[-1]
        assert torch.equal(terms.attention, a[:, some, :S])
        assert torch.equal(terms.value, v[[0, 0, 1, 1], :S])
        assert torch.equal(terms.seen, some[None] + 1)
        places.append(some)
    assert len(places) > 1
    assert torch.equal(torch.cat(places), queries)


# ---------------------------------------------------------------------------------------------
# Over sizes and contexts


def test_sums_are_those_of_each_query_and_set() -> None:
    a, v = planted()
    terms = Terms.of(a, v, causal(12))
    found = selection_sums(terms, (1, 2, 4), "euclidean", 3, torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    orders = [random_ranks(terms.visible, draws) for _ in range(3)]
    expected = torch.zeros_like(found)
    for n, size in enumerate((1, 2, 4)):
        for h in range(3):
            for i in range(size, 12):
                seen = list(range(i + 1))
                context = next(k for k in range(9) if 2**k < i + 1 <= 2 ** (k + 1))
                sets = [(0, most_attended(a[h, i], seen, size))]
                sets += [(1, [j for j in seen if order[0, i, j] < size]) for order in orders]
                for kind, chosen in sets:
                    p, r, f, s = by_definition(a[h, i], v[h], chosen, seen)
                    row = torch.tensor([p, r, f, s, s * s, r * r, s * r, 1.0])
                    expected[kind, n, h, context] += row
    assert torch.allclose(found, expected, atol=1e-9)


def expected_rows(model: nn.Module, ids: Tensor, sizes: tuple[int, ...]) -> pd.DataFrame:
    """A row a text, layer, head, query and size, of eager attention."""
    rows = []
    for number, seen in enumerate(eager_layers(model, input_ids=ids)):
        B, H, T, _ = seen.attention.shape
        value = seen.value.repeat_interleave(H // seen.value.shape[1], dim=1)
        for b in range(B):
            for h in range(H):
                for i in range(T):
                    keys = list(range(i + 1))
                    for size in sizes:
                        if size > i:
                            continue
                        a = seen.attention[b, h, i]
                        chosen = most_attended(a, keys, size)
                        figures = by_definition(a, value[b, h], chosen, keys)
                        rows.append((number, h, i + 1, size, *figures))
    columns = ["layer", "head", "seen", "size", "precision", "recall", "f", "sink_similarity"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_figures_are_means_over_layers_heads_and_queries(make: Any) -> None:
    model, ids, sizes = make(), token_ids(), (1, 2, 4, 20)
    found = token_selection(model, ids, sizes=sizes, queries=None, random_sets=2)
    rows = expected_rows(model, ids, sizes)
    names = ["precision", "recall", "f", "sink_similarity"]

    by_size = found.to_dataframe()
    top = by_size[by_size["set"] == "top"].set_index("size")
    assert top.index.tolist() == [1, 2, 4]  # no query sees more than 20 keys
    expected = rows.groupby("size")[names].mean()
    np.testing.assert_allclose(top[names], expected, atol=1e-4)
    assert top["sets"].tolist() == rows.groupby("size").size().tolist()
    assert (by_size[by_size["set"] == "random"]["sets"].to_numpy() == 2 * top["sets"]).all()

    heads = found.tables["heads"]
    heads = heads[heads["set"] == "top"].set_index(["layer", "head", "size"])[names]
    expected = rows.groupby(["layer", "head", "size"])[names].mean()
    np.testing.assert_allclose(heads, expected, atol=2e-3)

    assert np.isnan(top.loc[1, "sink_recall_r"])  # recall is one throughout
    for size in (2, 4):
        some = rows[rows["size"] == size]
        r = pearsonr(some["sink_similarity"], some["recall"]).statistic
        assert top.loc[size, "sink_recall_r"] == pytest.approx(r, abs=2e-3)
        means = expected.xs(size, level="size")
        r = pearsonr(means["sink_similarity"], means["recall"]).statistic
        assert top.loc[size, "sink_recall_r_heads"] == pytest.approx(r, abs=1e-2)


def test_contexts_hold_the_same_queries_for_all_sizes_and_name_the_best() -> None:
    found = token_selection(llama(), token_ids(), sizes=(1, 2, 4), queries=None, random_sets=2)
    contexts = found.tables["contexts"]
    # 2 texts, 2 layers, 4 heads; queries that see 2; 3 and 4; 5 to 8; 9 keys.
    expected = [(1, 2, 1, 16)]
    expected += [(2, 4, size, 32) for size in (1, 2)]
    expected += [(4, 8, size, 64) for size in (1, 2, 4)]
    expected += [(8, 16, size, 16) for size in (1, 2, 4)]
    columns = ["above", "up_to", "size", "queries"]
    assert [tuple(row) for row in contexts[columns].to_numpy()] == expected
    assert np.allclose(contexts["excess"], contexts["f"] - contexts["f_random"])
    assert (contexts[contexts["size"] == 1]["excess"] == 0).all()
    for _, best in found.tables["best"].iterrows():
        rows = contexts[(contexts["above"] == best["above"]) & (contexts["size"] > 1)]
        assert best["excess"] == rows["excess"].max()
        assert rows.set_index("size").loc[best["size"], "excess"] == best["excess"]
        assert best["f"] == rows["f"].max()
    assert found.tables["best"]["above"].tolist() == [2, 4, 8]
    by_size = found.to_dataframe().pivot(index="size", columns="set", values="f").loc[2:]
    excess = by_size["top"] - by_size["random"]
    assert found.numbers["largest_f_size"] == by_size["top"].idxmax()
    assert found.numbers["best_size"] == excess.idxmax()
    assert found.numbers["best_excess"] == pytest.approx(excess.max())


def test_planted_retrieval_of_four_keys_is_best_below_eight() -> None:
    generator = torch.Generator().manual_seed(0)
    T = 64
    a = torch.zeros(1, T, T)
    for i in range(T):
        a[0, i, torch.randperm(i + 1, generator=generator)[:4]] = 0.25
    terms = Terms.of(a[:, 32:], torch.eye(T)[None], causal(T)[:, 32:])
    found = selection_sums(terms, (1, 2, 4, 8), "euclidean", 8, generator).sum((2, 3))
    f = found[..., 2] / found[..., -1]
    assert f[0, :3].tolist() == [1, 1, 1]
    excess = f[0] - f[1]
    assert excess[1:3].min() > 0.9
    assert excess[3] < 0.5


def test_the_same_input_gives_the_same_result_and_padding_changes_nothing() -> None:
    model, ids = llama(), token_ids(1, 12)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    batch = {"input_ids": padded, "attention_mask": (torch.arange(15) >= 3).long()[None]}
    found = [token_selection(model, x, sizes=(2, 4), queries=5) for x in (ids, ids, [batch])]
    for other in found[1:]:
        assert str(other.numbers) == str(found[0].numbers)  # a NaN is not itself
        for name, table in other.tables.items():
            pd.testing.assert_frame_equal(table, found[0].tables[name])
    assert found[0].to_dataframe()["sets"].max() == 2 * 4 * 5 * 16


def test_windows_leave_out_what_their_queries_do_not_see() -> None:
    found = token_selection(mistral(), token_ids(), sizes=(1, 2, 4), queries=None, random_sets=1)
    by_size = found.to_dataframe()
    assert by_size["size"].unique().tolist() == [1, 2]
    assert by_size[by_size["set"] == "top"]["sets"].tolist() == [2 * 2 * 4 * 8, 2 * 2 * 4 * 7]
    with pytest.raises(ValueError, match="No query sees more than 4 keys"):
        token_selection(mistral(), token_ids(), sizes=(4,))
    with pytest.raises(ValueError, match="no query sees more than 4 keys: give a smaller size"):
        head_regimes(mistral(), token_ids(), size=4)
    with pytest.raises(ValueError, match="No query sees 8 keys, half of the shortest text"):
        selection_assumptions(mistral(), token_ids(1, 16))


# ---------------------------------------------------------------------------------------------
# Regimes


def planted_layer(each: int = 4, T: int = 48, d_h: int = 32) -> AttentionLayer:
    """Heads in turn that retrieve, mix and reset, and no two alike."""
    generator = torch.Generator().manual_seed(0)
    H = 3 * each
    a = torch.zeros(H, T, T)
    v = torch.randn(H, T, d_h, generator=generator)
    for h in range(H):
        for i in range(T):
            if h % 3 == 0:  # eight keys of its own take nearly all
                keys = 1 + torch.randperm(i, generator=generator)[:8] if i else 0
                a[h, i, keys] = 1 + torch.rand(1, generator=generator)
                a[h, i, : i + 1] += 1e-3
            elif h % 3 == 1:
                a[h, i, : i + 1] = 1 + 0.1 * torch.rand(i + 1, generator=generator)
            else:  # the first key takes all
                a[h, i, : i + 1] = 1e-3 * (1 + torch.rand(i + 1, generator=generator)) / T
                a[h, i, 0] = 1 + h / H
        if h % 3 == 1:
            v[h, :, 3:] = 0  # values that are not told apart
        if h % 3 == 2:
            v[h, 0] *= 0.02
    a = a / a.sum(-1, keepdim=True)
    w = torch.randn(H, d_h, 16, generator=generator)
    return AttentionLayer.from_tensors(a[None], v[None], w, QueryMask(T, T, causal=True))


def features(layer: AttentionLayer, size: int = 8) -> pd.DataFrame:
    sums = head_sums(layer, torch.arange(layer.T), size)
    means = (sums[:, :-1] / sums[:, -1:]).numpy()
    names = ["precision", "recall", "f", "sink_similarity", "first_weight", "top_weight"]
    heads = pd.DataFrame(means, columns=[*names, "output_norm"])
    heads["output_norm"] /= heads["output_norm"].median()
    return heads


def test_features_of_heads_are_means_over_queries() -> None:
    layer = planted_layer(1, T=12)
    sums = head_sums(layer, torch.tensor([2, 5, 9, 11]), 4)
    a, v = layer.weights(slice(0, 12))[0], layer.value[0]
    for h in range(3):
        expected = torch.zeros(8, dtype=torch.float64)
        for i in (5, 9, 11):  # the query 2 sees no more than four keys
            seen = list(range(i + 1))
            chosen = most_attended(a[h, i], seen, 4)
            output = (a[h, i] @ v[h]).double() @ layer.output_weight[h].double()
            weights = float(a[h, i, 0]), float(a[h, i, chosen].sum())
            separated = by_definition(a[h, i], v[h], chosen, seen)
            expected += torch.tensor([*separated, *weights, float(output.norm()), 1.0])
        assert torch.allclose(sums[h], expected, atol=1e-4)


def test_planted_heads_are_named_rightly() -> None:
    heads = features(planted_layer())
    tables = label_regimes(heads)
    assert tables["heads"]["regime"].tolist() == ["Retriever", "Mixer", "Reset"] * 4
    assert tables["regimes"]["has_signature"].all()
    assert tables["regimes"]["heads"].tolist() == [4, 4, 4]
    clusters = tables["clusters"].set_index("k")["silhouette"]
    assert clusters.idxmax() == 3
    assert clusters[3] > 0.6


def test_names_do_not_depend_on_the_order_of_heads_or_the_seed() -> None:
    heads = features(planted_layer())
    expected = label_regimes(heads)["heads"]["regime"]
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(heads))
        mixed = heads.iloc[order].reset_index(drop=True)
        found = label_regimes(mixed, seed)["heads"]["regime"]
        assert found.tolist() == expected[order].tolist()


def test_clusters_that_are_nothing_of_the_kind_have_no_signature() -> None:
    random = np.random.default_rng(0)
    names = ["precision", "recall", "f", "sink_similarity", "first_weight", "top_weight"]
    heads = pd.DataFrame(0.5 + 1e-3 * random.uniform(size=(30, 6)), columns=names)
    heads["first_weight"] = 0.1 * random.uniform(size=30)
    regimes = label_regimes(heads.assign(output_norm=1.0))["regimes"].set_index("regime")
    assert not regimes.loc["Reset", "has_signature"]


def test_regimes_of_a_model() -> None:
    found = head_regimes(llama(), token_ids(2, 16), size=4)
    heads = found.to_dataframe()
    assert len(heads) == 8
    assert set(heads["regime"]) == {"Retriever", "Mixer", "Reset"}
    shares = [found.numbers[name] for name in ("retriever", "mixer", "reset")]
    assert sum(shares) == pytest.approx(1)
    for _, layer in heads.groupby("layer"):
        assert layer["output_norm"].median() == pytest.approx(1)


def one_layer(heads: int) -> nn.Module:
    sizes = {**SIZES, "num_hidden_layers": 1, "num_attention_heads": heads}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=heads)
    return build(transformers.LlamaForCausalLM, config)


def test_few_heads_are_refused_by_name_and_one_layer_is_enough() -> None:
    for heads in (1, 2):
        with pytest.raises(ValueError, match=f"Only {heads} of {heads} heads differ"):
            head_regimes(one_layer(heads), token_ids(), size=2)
    assert len(head_regimes(one_layer(4), token_ids(), size=2).to_dataframe()) == 4
    for heads in (1, 4):
        assert token_selection(one_layer(heads), token_ids(), sizes=(1, 2)).numbers["best_size"]
        selection_assumptions(one_layer(heads), token_ids(1, 16))


def test_a_head_whose_output_is_zero_has_figures() -> None:
    model: Any = llama(4)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:8] = 0
    heads = head_regimes(model, token_ids(2, 20), size=2).to_dataframe()
    dead = heads[(heads["layer"] == 0) & (heads["head"] == 0)].iloc[0]
    assert dead["output_norm"] == 0
    assert dead["f"] == 0
    numeric = heads.drop(columns="regime").to_numpy(dtype=float)
    assert np.isfinite(numeric).all()
    assert np.isfinite(token_selection(model, token_ids(), sizes=(2,)).numbers["best_f"])
    found = selection_assumptions(model, token_ids(2, 20))
    assert np.isnan(found.to_dataframe().iloc[0]["cv"])
    assert np.isfinite(found.numbers["value_norm_cv"])


# ---------------------------------------------------------------------------------------------
# Assumptions


def test_norms_and_similarities_are_those_of_loops() -> None:
    model, ids = llama(), [token_ids(1, 17), token_ids(2, 20, seed=1)]
    found = selection_assumptions(model, ids, queries=None)
    texts = [row[None] for batch in ids for row in batch]
    seen = [eager_layers(model, input_ids=text) for text in texts]
    table = found.to_dataframe().set_index(["layer", "head"])
    total, count = np.zeros(19), np.zeros(19)
    for layer in range(2):
        for head in range(2):
            values = [text[layer].value[0, head].double() for text in seen]
            norms = torch.cat([v[1:].norm(dim=-1) for v in values]).numpy()
            first = np.mean([float(v[0].norm()) for v in values])
            row = table.loc[(layer, head)]
            assert row["mean"] == pytest.approx(norms.mean(), rel=1e-4)
            assert row["cv"] == pytest.approx(norms.std() / norms.mean(), rel=1e-3)
            assert row["first_over_mean"] == pytest.approx(first / norms.mean(), rel=1e-4)
            for v in values:
                for i in range(1, len(v)):
                    for j in range(i + 1, len(v)):
                        total[j - i] += cosine(v[i], v[j])
                        count[j - i] += 1
    similarity = found.tables["similarity"]
    assert similarity["distance"].tolist() == list(range(1, 19))
    np.testing.assert_allclose(similarity["cosine"], total[1:] / count[1:], atol=1e-5)
    assert (4 * similarity["pairs"] == count[1:]).all()


def test_lags_beyond_a_text_are_empty() -> None:
    v = planted(2)[1]
    found = similarity_sums(v, 15)
    assert found.shape == (2, 15)
    assert not found[:, 11:].any()
    expected = [
        sum(cosine(v[0, i], v[0, i + lag]) for i in range(12 - lag)) for lag in range(1, 12)
    ]
    assert found[0, :11].tolist() == pytest.approx(expected)


def test_a_zero_value_is_not_similar_to_any_other() -> None:
    v = torch.ones(1, 4, 3, dtype=torch.float64)
    v[0, 1] = 0
    assert similarity_sums(v, 3)[0].tolist() == pytest.approx([1, 1, 1])
    assert norm_sums(0 * v).tolist() == [[3, 0, 0, 0, 1]]


def test_a_compressed_sink_is_seen_and_a_model_without_one_too() -> None:
    v = torch.nn.functional.normalize(planted(1, T=30)[1], dim=-1)
    v[0, 0] *= 0.1
    count, total, squares, first, _ = norm_sums(v)[0].tolist()
    assert first / (total / count) == pytest.approx(0.1)
    assert squares / count - (total / count) ** 2 == pytest.approx(0, abs=1e-12)
    found = selection_assumptions(llama(), token_ids(4, 20))
    assert 0.5 < found.numbers["first_over_mean"] < 2


def test_a_planted_decay_is_found() -> None:
    distance = np.arange(1.0, 60)
    pairs = 60 - distance
    noise = 0.002 * np.random.default_rng(0).standard_normal(59)
    cosines = 0.6 * np.exp(-distance / 7) + noise
    amplitude, length, level, r2 = fit_decay(distance, cosines, pairs, constant=False)
    assert (amplitude, length) == pytest.approx((0.6, 7), rel=0.02)
    assert level == 0
    assert r2 > 0.99
    raised = fit_decay(distance, cosines + 0.2, pairs, constant=True)
    assert raised[:3] == pytest.approx([0.6, 7, 0.2], rel=0.03)
    assert fit_decay(distance, cosines + 0.2, pairs, constant=False)[3] < raised[3] - 0.05
    weighted = np.average(cosines, weights=pairs)
    line = amplitude * np.exp(-distance / length)
    missed = np.average((cosines - line) ** 2, weights=pairs)
    assert r2 == pytest.approx(1 - missed / np.average((cosines - weighted) ** 2, weights=pairs))


def test_what_cannot_be_fitted_is_nan() -> None:
    distance = np.arange(1.0, 20)
    assert np.isnan(fit_decay(distance, np.full(19, 0.3), distance, constant=True)).all()
    assert np.isnan(fit_decay(distance[:2], distance[:2], distance[:2], constant=False)).all()
    for weights in (np.full(20, 0.05), np.array([1.0] + [0.0] * 19)):
        assert np.isnan(fit_profile(weights).two_piece_r2)
        assert np.isnan(fit_profile(weights).fitted).all()


def test_a_planted_break_is_found_and_two_lines_never_fit_worse() -> None:
    rank = np.arange(1.0, 65)
    fits = fit_profile(np.where(rank < 16, rank**-0.5, 16**1.5 * rank**-2.0))
    assert fits.break_rank == 16
    assert (fits.slope_before, fits.slope_after) == pytest.approx((-0.5, -2))
    assert fits.two_piece_r2 == pytest.approx(1)
    assert fits.one_piece_r2 < 0.97
    straight = fit_profile(rank**-1.0)
    assert straight.one_piece_r2 == pytest.approx(1)
    assert straight.slope == pytest.approx(-1)
    noisy = fit_profile(rank**-1.0 * np.exp(np.random.default_rng(0).standard_normal(64)))
    assert noisy.two_piece_r2 >= noisy.one_piece_r2
    short = fit_profile(np.where(rank < 20, 1 / rank, 0))
    assert np.isfinite(short.fitted[:, :19]).all()
    assert np.isnan(short.fitted[:, 19:]).all()


def test_profiles_are_means_of_sorted_rows() -> None:
    a, _ = planted()
    found = profile_sums(a, causal(12).sum(-1), 5)
    rows = a[:, 4:].sort(dim=-1, descending=True).values[..., :5]
    assert torch.allclose(found[:, :5], rows.sum(1))
    assert found[:, 5].tolist() == [8, 8, 8]
    assert not profile_sums(a[..., :4], torch.full((1, 12), 4), 5).any()


# ---------------------------------------------------------------------------------------------
# What all three share


@pytest.fixture(scope="module")
def results() -> list[AnalysisResult]:
    model, ids = llama(), token_ids(2, 20)
    return [
        token_selection(model, ids, sizes=(1, 2, 4), random_sets=2),
        head_regimes(model, ids, size=4),
        selection_assumptions(model, ids),
    ]


def test_results_come_back_from_disk(results: list[AnalysisResult], tmp_path: Path) -> None:
    kinds = (TokenSelection, HeadRegimes, SelectionAssumptions)
    for kind, result in zip(kinds, results, strict=True):
        result.save(tmp_path / "result.json")
        back = AnalysisResult.load(tmp_path / "result.json")
        assert isinstance(back, kind)
        assert back.settings == result.settings
        assert str(back.numbers) == str(result.numbers)
        for name, table in result.tables.items():
            pd.testing.assert_frame_equal(back.tables[name], table)
        back.plot(use_pyplot=False)


def test_figures_are_labelled(results: list[AnalysisResult]) -> None:
    titles = [
        ["Separation", "Excess over random", "Best size by context", "Sinks and rec"],
        ["Regime of each head", "Heads, means over queries, N = 4"],
        ["Norms of values", "Similarity of values", "Attention by rank"],
    ]
    for expected, result in zip(titles, results, strict=True):
        fig, axes = result.plot(use_pyplot=False)
        fig.canvas.draw()
        assert len(axes.flat) == len(expected)
        for title, ax in zip(expected, axes.flat, strict=True):
            assert ax.get_title().startswith(title)
            assert ax.get_xlabel()
            assert ax.get_ylabel()
            assert ax.get_legend() or title.startswith(("Sinks", "Regime"))


@pytest.mark.parametrize("analysis", [token_selection, head_regimes, selection_assumptions])
def test_bidirectional_models_are_refused(analysis: Any) -> None:
    model = bert(transformers.BertModel, bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="is bidirectional"):
        analysis(model, token_ids(1, 20))


@pytest.mark.parametrize(
    ("analysis", "options", "message"),
    [
        (token_selection, {"sizes": ()}, r"sizes=\[\]: .*give larger sizes"),
        (token_selection, {"sizes": (1,)}, "a single key always has an F of one"),
        (token_selection, {"sizes": (0, 1)}, "a size=0: give an integer of at least 1"),
        (token_selection, {"sizes": (20,)}, "has 20 tokens, but this analysis needs 21"),
        (token_selection, {"distance": "dot"}, "distance='dot' is unknown"),
        (token_selection, {"queries": 0}, "queries=0: give an integer of at least 1"),
        (token_selection, {"random_sets": 1.5}, "random_sets=1.5: give an integer"),
        (head_regimes, {"size": 0}, "size=0: give an integer of at least 1"),
        (head_regimes, {"size": 20}, "has 20 tokens, but this analysis needs 21"),
        (head_regimes, {"queries": -1}, "queries=-1"),
        (selection_assumptions, {"queries": True}, "queries=True: give an integer"),
    ],
)
def test_bad_input_is_named(analysis: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analysis(llama(), token_ids(1, 20), **options)


def test_short_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="Text 0 has 9 tokens, but this analysis needs 16"):
        selection_assumptions(llama(), token_ids())
