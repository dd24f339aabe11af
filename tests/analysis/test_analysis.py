"""What value geometry does, against the definitions: ``v~`` built in full, loops, float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from matplotlib import pyplot as plt
from sklearn.model_selection import KFold
from torch import Tensor, nn

from captum_cw import AttentionWeights, measures, scale_values
from captum_cw.analysis import (
    AnalysisResult,
    component_correlations,
    component_dispersion,
    component_regression,
    first_token_weight,
    interference,
    output_norms,
    semantic_cone,
    sink_scaling,
    value_alignment,
    weight_entropy,
    weight_maps,
)
from captum_cw.analysis.components import Moments, r2, regression_of
from captum_cw.analysis.first_token import alignment, row_entropy
from captum_cw.analysis.streaming import SeenLayer
from captum_cw.analysis.suppression import (
    cone,
    fit_norms,
    head_norms,
    predicted_norm,
    sink_rate_of_least_norm,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import (
    AttentionLayer,
    QueryMask,
    attention,
    contribution,
    cosine_with,
    dense_map,
    geometry,
    map_blocks,
    vw,
)
from support import reference
from support.inputs import token_ids
from support.models import (
    GATED_MODELS,
    SIZES,
    afmoe,
    build,
    gpt2,
    llama,
    mistral,
    with_bare_projections,
)
from support.reference import eager_layers, gate_factors
from support.state import state_of

Array = np.ndarray[Any, Any]
LENGTHS = (9, 6, 7)
WINDOW = 3


def texts(count: int = 3) -> list[Tensor]:
    return [token_ids(1, T, seed=T)[0] for T in LENGTHS[:count]]


def batches(count: int = 3) -> list[Tensor]:
    return [ids[None] for ids in texts(count)]


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "mistral": mistral}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Any:
    """A model, and what its layers do to each text, by text and layer."""
    model = MODELS[request.param]()
    return SimpleNamespace(
        model=model,
        layers=[definitions(model, ids, request.param == "mistral") for ids in texts()],
    )


def definitions(model: nn.Module, ids: Tensor, slides: bool) -> list[dict[str, Tensor]]:
    """By layer every measure ``(H, T, T)``, ``v~`` ``(H, T, d)``, and what is visible."""
    T = len(ids)
    visible = torch.ones(T, T).tril().bool()
    if slides:
        visible &= ~torch.ones(T, T).tril(-WINDOW).bool()
    found = []
    for seen in eager_layers(model, input_ids=ids[None]):
        parts = {
            name: x[0]
            for name, x in reference.measures(
                seen.attention, seen.value, seen.output_weight
            ).items()
        }
        projected = reference.projected_values(seen.value, seen.output_weight)[0]
        found.append({**parts, "v": projected, "visible": visible})
    return found


def cells(layers: list[list[dict[str, Tensor]]], *names: str, least: int = 0) -> list[list[float]]:
    """What measures hold at each visible pair, with its key, in order."""
    rows = []
    for text in layers:
        for layer in text:
            H, T, _ = layer["attention"].shape
            rows += [
                [float(j)] + [float(layer[name][h, i, j]) for name in names]
                for h in range(H)
                for i in range(least, T)
                for j in range(T)
                if layer["visible"][i, j]
            ]
    return rows


def close(found: object, expected: object, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(
        np.asarray(found, dtype=float),
        np.asarray(expected, dtype=float),
        rtol=tolerance,
        atol=tolerance,
    )


# ---------------------------------------------------------------------------------------------
# Maps of functional.py


def planted_layer(B: int = 2, H: int = 4, T: int = 7, seed: int = 0) -> AttentionLayer:
    torch.manual_seed(seed)
    a = torch.rand(B, H, T, T, dtype=torch.float64).tril()
    a /= a.sum(-1, keepdim=True)
    value = torch.randn(B, 2, T, 3, dtype=torch.float64)
    weight = torch.randn(H, 3, 8, dtype=torch.float64)
    return AttentionLayer.from_tensors(a, value, weight, QueryMask(T, T, causal=True))


@pytest.mark.parametrize("scope", ["inter", "intra"])
def test_geometry_and_cosine_are_what_their_names_say(scope: Any) -> None:
    layer = planted_layer()
    a = dense_map(layer, attention)
    v = reference.projected_values(layer.value, layer.output_weight)
    heads, o = reference.outputs(a, v)
    found = dense_map(layer, geometry(scope)), dense_map(layer, cosine_with(scope))
    for b, h, i, j in np.ndindex(*a.shape):
        out = heads[b, h, i] if scope == "intra" else o[b, i]
        inner = float(out @ v[b, h, j]) if j <= i else 0.0
        assert found[0][b, h, i, j] == pytest.approx(inner / float(out @ out))
        norms = float(out.norm() * v[b, h, j].norm())
        assert found[1][b, h, i, j] == pytest.approx(inner / norms)
    # A contribution is attention times geometry.
    c = dense_map(layer, contribution(scope))
    assert torch.allclose(c, a * found[0])


def test_geometry_of_an_unknown_scope_is_refused() -> None:
    for measure in (geometry, cosine_with):
        with pytest.raises(ValueError, match="scope='all' is unknown"):
            measure("all")  # type: ignore[arg-type]


def test_measures_in_blocks_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = planted_layer()
    measures = attention, vw, contribution("intra"), geometry("inter"), vw, attention
    whole = [dense_map(layer, measure) for measure in measures]
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", 2 * 2 * 4 * 7)
    rows = []
    for block, found in map_blocks(layer, *measures):
        rows.append((block.start, block.stop))
        for g, expected in zip(found, whole, strict=True):
            assert torch.equal(g, expected[:, :, block, : g.shape[-1]])
            g.fill_(torch.nan)  # which no other may notice
    assert rows == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_rows_that_are_not_chosen_are_zero_in_every_map() -> None:
    layer = planted_layer()
    chosen = torch.zeros(2, 7, dtype=torch.bool)
    chosen[0, 3] = chosen[1, 5] = True
    measures = attention, contribution("inter"), geometry("intra")
    for _, found in map_blocks(layer, *measures, chosen=chosen):
        for g, measure in zip(found, measures, strict=True):
            expected = dense_map(layer, measure) * chosen[:, None, :, None]
            assert torch.equal(g, expected)


# ---------------------------------------------------------------------------------------------
# Tables 1 and 3


def line(x: Array, y: Array) -> tuple[float, float, float]:
    slope = float((x * y).sum() / (x * x).sum())
    rest = float(((y - slope * x) ** 2).sum())
    return slope, 1 - rest / float(((y - y.mean()) ** 2).sum()), 1 - rest / float((y * y).sum())


def test_regression_is_the_fit_over_all_visible_pairs(case: Any) -> None:
    check_regression(case.model, case.layers, log=False)


def test_logarithms_are_fitted_by_sums_of_logarithms() -> None:
    model = llama()
    check_regression(model, [definitions(model, ids, False) for ids in texts()], log=True)


def check_regression(model: nn.Module, layers: list[list[dict[str, Tensor]]], log: bool) -> None:
    table = np.array(cells(layers, "attention", "relative_norm", "cosine", "inter"))
    found = component_regression(model, batches(), log=log, seed=3)
    assert len(found.to_dataframe()) == 18
    names = {"attention": 1, "relative norm": 2, "cosine": 3}
    for row in found.to_dataframe().itertuples():
        kept = {"all": table[:, 0] >= 0, "first": table[:, 0] == 0, "others": table[:, 0] > 0}
        chosen = table[kept[row.group]]
        assert row.points == len(chosen)
        product = np.prod([chosen[:, names[name]] for name in row.components.split(" x ")], axis=0)
        x, y = product, chosen[:, 4]
        if log:
            x, y = np.log(np.abs(x)), np.log(np.abs(y))
        slope, centred, uncentred = line(x, y)
        close([row.slope, row.r2, row.r2_uncentred], [slope, centred, uncentred])
        assert found.numbers[f"{row.group}: {row.components}"] == row.r2
        held_out = []
        for known, unknown in KFold(5, shuffle=True, random_state=3).split(x):
            b = line(x[known], y[known])[0]
            t = y[unknown]
            held_out.append(1 - ((t - b * x[unknown]) ** 2).sum() / ((t - t.mean()) ** 2).sum())
        folds = found.tables["folds"]
        of = folds[(folds.components == row.components) & (folds.group == row.group)]
        close(of.r2, held_out, 1e-3)
        close(row.r2_held_out, np.mean(held_out), 1e-3)


def test_the_product_of_all_factors_would_explain_everything() -> None:
    layers = [definitions(llama(), texts()[0], False)]
    table = np.array(cells(layers, "attention", "relative_norm", "cosine", "inter"))
    assert line(table[:, 1:4].prod(1), table[:, 4])[:2] == pytest.approx((1, 1))


def test_a_sample_is_of_the_size_that_was_asked_for() -> None:
    found = component_regression(llama(), batches(), points=50)
    assert set(found.to_dataframe().points) == {50}
    again = component_regression(llama(), batches(), points=50)
    other = component_regression(llama(), batches(), points=50, seed=1)
    assert found.numbers == again.numbers != other.numbers


def synthetic(n: int = 4000, noise: float = 0.0) -> Array:
    random = np.random.default_rng(0)
    a, norm, cos = random.uniform(0.1, 1, (3, n)) * np.array([[1], [2], [-1]])
    return np.stack([a, norm, cos, 3 * a * cos + noise * random.normal(size=n)], 1)


def test_a_known_slope_and_share_are_found() -> None:
    sample = synthetic(noise=0.5)
    y = sample[:, 3]
    result = regression_of({"all": sample}, {}, False, 0)
    row = result.to_dataframe().set_index("components").loc["attention x cosine"]
    assert row.slope == pytest.approx(3, abs=0.05)
    assert row.r2 == pytest.approx(1 - 0.25 / y.var(), abs=0.02)
    assert row.r2_uncentred == pytest.approx(1 - 0.25 / (y**2).mean(), abs=0.01)
    assert row.r2_held_out == pytest.approx(row.r2, abs=0.02)
    exact = regression_of({"all": synthetic()}, {}, False, 0)
    assert exact.numbers["all: attention x cosine"] == pytest.approx(1)
    assert exact.numbers["all: attention"] < 0.9


def test_the_logarithmic_form_drops_and_counts_zeros() -> None:
    sample = synthetic()
    sample[:, 3] = (sample[:, 0] * sample[:, 2]) ** 2
    sample[:7, 1] = 0
    sample[7:10, 3] = 0
    result = regression_of({"all": sample}, {}, True, 0)
    row = result.to_dataframe().set_index("components").loc["attention x cosine"]
    assert row.slope == pytest.approx(2)
    assert row.r2 == pytest.approx(1)
    assert row.points == 3990
    assert result.numbers["dropped"] == 10


@pytest.mark.parametrize("constant", [0.0, 0.1, -1 / 3])
def test_nothing_is_explained_of_what_does_not_vary(constant: float) -> None:
    y = np.full(7, constant)
    assert np.isnan(r2(y, y))
    assert np.isnan(r2(y, y + 1))
    assert r2(y, y, centred=False) == 1 or constant == 0
    assert np.isnan(r2(np.zeros(7), y, centred=False))


def test_too_few_points_have_no_fit() -> None:
    few, none = synthetic(4), np.zeros((0, 4))
    result = regression_of({"all": few, "first": none, "others": none}, {}, False, 0)
    assert result.to_dataframe().r2.isna().all()
    assert result.tables["folds"].r2.isna().all()
    result.plot(use_pyplot=False)


# ---------------------------------------------------------------------------------------------
# Table 2, Fig. 7, section D.6


def test_correlations_are_those_of_all_logarithms(case: Any) -> None:
    table = np.array(cells(case.layers, "attention", "relative_norm", "cosine"))[:, 1:]
    expected = np.corrcoef(np.log(np.abs(table)).T)
    found = component_correlations(case.model, batches())
    close(found.to_dataframe().iloc[:, 1:], expected)
    close(found.numbers["relative norm, cosine"], expected[1, 2])
    assert found.numbers["points"] == len(table)
    assert found.numbers["dropped"] == 0


def test_dispersion_is_that_of_the_factors_as_they_are(case: Any) -> None:
    for text in case.layers:
        for layer in text:
            layer["norm"] = layer["v"].norm(dim=-1)[:, None].expand_as(layer["attention"])
    table = np.array(cells(case.layers, "attention", "norm", "cosine"))[:, 1:]
    found = component_dispersion(case.model, batches(), points=10_000)
    close(found.to_dataframe(), table, 2e-5)
    close(found.numbers["mean cosine"], table[:, 2].mean())
    close(found.numbers["attention, cosine"], np.corrcoef(table.T)[0, 2])
    few = component_dispersion(case.model, batches(), points=20)
    assert len(few.to_dataframe()) == 20
    assert few.numbers == found.numbers  # which are over all
    assert set(few.to_dataframe().attention) < set(found.to_dataframe().attention)


def test_interference_is_the_ratio_against_the_cosine_within_heads(case: Any) -> None:
    for text in case.layers:
        for layer in text:
            head = torch.einsum("hij,hjd->hid", layer["attention"], layer["v"])
            layer["cos"] = torch.nn.functional.cosine_similarity(
                head[:, :, None], layer["v"][:, None], dim=-1
            )
            layer["ratio"] = layer["intra"] / layer["attention"]
    # The first query sees one key alone.
    table = np.array(cells(case.layers, "ratio", "cos", least=1))[:, 1:]
    found = interference(case.model, batches(), points=10_000)
    close(found.to_dataframe(), table, 1e-3)
    close(found.numbers["r"], np.corrcoef(table.T)[0, 1])
    assert found.numbers["points"] == len(table)
    assert len(interference(case.model, batches(), points=20).to_dataframe()) == 20


def test_moments_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 100))
    x[1] += x[0]
    for shift in (0.0, 1e6):  # squares of which drown the variance
        moments = Moments(3)
        for part in np.split(x + shift, [10, 10, 60], axis=1):
            moments.add(torch.from_numpy(part))
        assert moments.count == 100
        close(moments.means(), x.mean(1) + shift)
        close(moments.correlations(), np.corrcoef(x), 1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_a_constant_has_no_correlation(constant: float) -> None:
    moments = Moments(2)
    for n in (1, 5, 7):
        x = torch.arange(n, dtype=torch.float64)
        moments.add(torch.stack([torch.full_like(x, constant), x]))
    found = moments.correlations()
    assert np.isnan(found[0, 1])
    assert np.isnan(found[0, 0])
    assert found[1, 1] == pytest.approx(1)
    assert moments.means().tolist() == pytest.approx([constant, 31 / 13])


def test_no_points_have_no_correlation() -> None:
    assert np.isnan(Moments(2).correlations()).all()
    assert Moments(2).means().isnan().all()


# ---------------------------------------------------------------------------------------------
# Tables 4 and 5


def test_the_weight_on_the_first_token_is_eq_22(case: Any) -> None:
    weights: dict[str, Any] = {}
    for name in ("attention", "vw", "vw, rows normalised", "contribution"):
        weights[name] = np.zeros((len(LENGTHS), 2))
    for t, text in enumerate(case.layers):
        for n, layer in enumerate(text):
            H, T, _ = layer["attention"].shape
            for h in range(H):
                for i in range(T):
                    row = layer["vw"][h, i]
                    weights["attention"][t, n] += layer["attention"][h, i, 0] / (H * T)
                    weights["vw"][t, n] += row[0] / (H * T)
                    weights["vw, rows normalised"][t, n] += row[0] / row.sum() / (H * T)
                    weights["contribution"][t, n] += layer["inter"][h, i, 0] / T
    found = first_token_weight(case.model, batches())
    assert set(found.numbers) == set(weights)
    for name, x in weights.items():
        close(found.numbers[name], x.mean())
        by_text, by_layer = (found.tables[k] for k in ("texts", "layers"))
        close(by_text[by_text.measure == name].weight, x.mean(1))
        close(by_layer[by_layer.measure == name].weight, x.mean(0))


def test_entropy_is_eq_23_with_the_first_token_and_without(case: Any) -> None:
    measures = {
        "attention": "attention",
        "vw": "vw",
        "contribution": "inter",
        "contribution, intra": "intra",
    }
    found = weight_entropy(case.model, batches())
    for name, measure in measures.items():
        for first in (True, False):
            x = np.zeros((len(LENGTHS), 2))
            for t, text in enumerate(case.layers):
                for n, layer in enumerate(text):
                    rows = []
                    H, T, _ = layer["attention"].shape
                    for h in range(H):
                        for i in range(0 if first else 1, T):
                            g = layer[measure][h, i, 0 if first else 1 : i + 1].abs().tolist()
                            shares = [y / sum(g) for y in g if y > 0]
                            rows.append(-sum(y * np.log(y) for y in shares))
                    x[t, n] = np.mean(rows)
            suffix = "" if first else ", without first"
            close(found.numbers[name + suffix], x.mean())
            for by, axis in (("texts", 1), ("layers", 0)):
                table = found.tables[by]
                of = table[(table.measure == name) & (table["first"] == first)]
                close(of.entropy, x.mean(axis))
    assert found.numbers["empty rows"] == 0


def test_entropy_in_blocks_is_that_of_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    whole = weight_entropy(model, batches()), first_token_weight(model, batches())
    for elements in (1, 100):
        monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", elements)
        parts = weight_entropy(model, batches()), first_token_weight(model, batches())
        for one, other in zip(whole, parts, strict=True):
            assert other.numbers == pytest.approx(one.numbers, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "entropy"),
    [
        ([1.0, 0.0, 0.0], 0.0),
        ([0.5, 0.5, 0.0], np.log(2)),
        ([-3.0, 3.0, -3.0], np.log(3)),
        ([1e-30, 1e-30, 0.0], np.log(2)),
        ([0.75, 0.25, 0.0], 0.75 * np.log(4 / 3) + 0.25 * np.log(4)),
        ([0.0, 0.0, 0.0], np.nan),
    ],
)
def test_the_entropy_of_a_row(row: list[float], entropy: float) -> None:
    found = float(row_entropy(torch.tensor(row)))
    assert found == pytest.approx(entropy, nan_ok=True)


# ---------------------------------------------------------------------------------------------
# Fig. 5a


def mean_cosines(v: Tensor) -> tuple[float, float]:
    """Of one head's ``v~`` ``(T, d)``, pair by pair."""

    def cos(x: Tensor, y: Tensor) -> float:
        norms = float(x.norm() * y.norm())
        return float(x @ y) / norms if norms else 0.0

    T = len(v)
    first = [cos(v[0], v[j]) for j in range(1, T)]
    among = [cos(v[i], v[j]) for i in range(1, T) for j in range(1, T) if i != j]
    return float(np.mean(first)), float(np.mean(among))


def test_alignment_is_the_mean_over_pairs(case: Any) -> None:
    # (text, layer, head, which)
    expected = np.array(
        [[[mean_cosines(v) for v in layer["v"]] for layer in text] for text in case.layers]
    )
    found = value_alignment(case.model, batches())
    table = found.tables["layers"]
    heads = expected.mean(0)
    for n, name in enumerate(("first", "among")):
        close(table[name], heads[:, :, n].mean(1))
        close(table[f"{name}_25"], np.quantile(heads[:, :, n], 0.25, axis=1))
        close(table[f"{name}_75"], np.quantile(heads[:, :, n], 0.75, axis=1))
        close(found.tables["texts"][name], expected[:, :, :, n].mean((1, 2)))
    assert table.depth.tolist() == [0, 1]
    close(found.numbers["first to others"], expected[..., 0].mean())
    close(found.numbers["among others"], expected[..., 1].mean())
    opposed = (expected[..., 0].mean((0, 2)) < 0).mean()
    assert found.numbers["layers opposed"] == opposed


def test_alignment_with_values_of_norm_zero() -> None:
    torch.manual_seed(0)
    value = torch.randn(2, 6, 3, dtype=torch.float64)
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    value[0, 2] = 0
    value[1, 0] = 0
    found = alignment(value, weight @ weight.transpose(1, 2))
    for h in range(2):
        close([found[0][h], found[1][h]], mean_cosines(value[h] @ weight[h]), 1e-12)


def test_a_planted_sink_opposes() -> None:
    value = torch.tensor([[[-2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.5, 0.0]]]).double()
    first, among = alignment(value, torch.eye(2, dtype=torch.float64)[None])
    assert (first.tolist(), among.tolist()) == ([-1.0], [1.0])


# ---------------------------------------------------------------------------------------------
# Fig. 5c


def perplexity(logits: Tensor, ids: Tensor) -> float:
    logs = logits[0].double().log_softmax(-1)
    nll = [-float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    return float(np.exp(np.mean(nll)))


def test_measures_have_the_colours_of_the_registry_in_figures() -> None:
    _, axes = first_token_weight(llama(), batches()).plot(use_pyplot=False)
    (ax,) = np.ravel(axes)
    drawn = {line.get_label(): line.get_color() for line in ax.get_lines()}
    for name in ("attention", "vw, rows normalised", "contribution"):
        assert drawn[name] == measures.find(name.partition(",")[0]).colour  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_scaling_the_sink_is_scaling_by_hand(make: Any) -> None:
    model = make()
    mass = first_token_weight(model, batches()).tables["layers"]
    mass = mass[mass.measure == "attention"].weight.tolist()
    factors = (0.0, 0.3, 1.0)
    deltas = []
    for epsilon in (min(mass) - 0.01, sum(mass) / 2):
        layers = [n for n, x in enumerate(mass) if x > epsilon]
        found = sink_scaling(model, batches(), factors=factors, epsilon=epsilon)
        assert found.settings["layers"] == layers
        rows = found.to_dataframe().set_index(["text", "factor"])
        for number, ids in enumerate(texts()):
            with torch.no_grad():
                clean = perplexity(model(ids[None]).logits, ids)
                for factor in factors:
                    with scale_values(model, factor, positions=0, layers=layers):
                        changed = perplexity(model(ids[None]).logits, ids)
                    assert rows.loc[(number, factor)].perplexity == pytest.approx(changed)
                    delta = rows.loc[(number, factor)].delta
                    assert delta == pytest.approx(changed - clean, abs=1e-4)
        assert (rows.xs(1.0, level="factor").delta == 0).all()
        assert found.numbers["delta at 1"] == 0
        of = rows.xs(0.3, level="factor").delta
        assert found.numbers["delta at 0.3"] == pytest.approx(of.mean())
        assert found.numbers["clean"] == pytest.approx(
            np.mean([perplexity(model(ids[None]).logits.detach(), ids) for ids in texts()])
        )
        deltas.append((layers, found.numbers["delta at 0"]))
    # More layers, another change.
    assert [len(layers) for layers, _ in deltas] == [2, 1]
    assert deltas[0][1] != deltas[1][1]


def test_a_sink_of_factor_zero_is_one_whose_value_is_not_there() -> None:
    model = llama()
    ids = texts()[0]
    found = sink_scaling(model, ids[None], factors=[0], epsilon=0.01)
    assert found.settings["layers"] == [0, 1]

    def first_of_all_heads(number: int, measures: dict[str, Tensor]) -> Tensor:
        removed = torch.zeros(measures["attention"].shape[:3], dtype=torch.bool)
        removed[:, :, 0] = True
        return removed

    real = torch.ones(1, len(ids), dtype=torch.bool)
    logits = reference.llama_logits(model, ids[None], real, first_of_all_heads)
    assert found.to_dataframe().perplexity[0] == pytest.approx(perplexity(logits, ids), rel=1e-4)


def test_without_a_sink_there_is_nothing_to_scale() -> None:
    with pytest.raises(
        ValueError, match=r"epsilon=0.99: the first token is not a sink.*attention is 0\.\d+"
    ):
        sink_scaling(llama(), batches(), epsilon=0.99)


@pytest.mark.parametrize(
    ("factors", "message"),
    [([], "factors"), ([0.5, float("nan")], "factor=nan is not a finite")],
)
def test_factors_that_say_nothing_are_refused(factors: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sink_scaling(llama(), batches(), factors=factors, epsilon=0.01)


def test_a_model_without_logits_is_refused() -> None:
    model = llama().model
    assert isinstance(model, nn.Module)
    with pytest.raises(TypeError, match="without logits"):
        sink_scaling(model, batches(), epsilon=0.01)


# ---------------------------------------------------------------------------------------------
# Figs. 5b and 11, Appendix E


def norms_of_head(layers: list[list[dict[str, Tensor]]], n: int, h: int) -> Any:
    """Position, sink rate, norms and inner products of one head, query by query."""
    rows, first, others = [], [], []
    for text in layers:
        a, v, visible = (text[n][name] for name in ("attention", "v", "visible"))
        T = len(visible)
        first.append(float(v[h, 0].norm()))
        others.append(np.mean([float(v[h, j].norm()) for j in range(1, T)]))
        for i in range(1, T):
            if not visible[i, 0]:
                continue
            w = torch.zeros_like(v[h, 0])
            for j in range(1, i + 1):
                w += a[h, i, j] * v[h, j]
            o = w + a[h, i, 0] * v[h, 0]
            norms = [float(o.norm()), float(w.norm())]
            rows.append([i / (T - 1), float(a[h, i, 0]), *norms, float(w @ v[h, 0])])
    return np.array(rows), float(np.sqrt(np.mean(np.square(first)))), float(np.mean(others))


def test_norms_of_outputs_are_fitted_as_in_appendix_e(case: Any) -> None:
    found = output_norms(case.model, batches())
    heads = found.tables["heads"].set_index(["layer", "head"])
    assert len(heads) == found.numbers["heads"] == 8
    spreads = {}
    for (n, h), of in heads.iterrows():
        rows, v1, mean_norm = norms_of_head(case.layers, n, h)
        a = rows[:, 1]
        k, r2_k, _ = line(1 - a, rows[:, 3])
        g, r2_g, _ = line(1 - a, rows[:, 4])
        close([of.v1, of.mean_norm], [v1, mean_norm])
        close([of.k, of.r2_k, of.g, of.r2_g], [k, r2_k, g, r2_g], 1e-3)
        squares = a**2 * v1**2 + 2 * a * (1 - a) * g + (1 - a) ** 2 * k**2
        rest = ((rows[:, 2] - np.sqrt(squares.clip(0))) ** 2).sum()
        close(of.r2_norm, 1 - rest / ((rows[:, 2] - rows[:, 2].mean()) ** 2).sum(), 1e-3)
        close(of.least, np.clip((k**2 - g) / (k**2 - 2 * g + v1**2), 0, 1), 1e-3)
        close(of.least_without_g, k**2 / (k**2 + v1**2), 1e-3)
        close([of.mean_sink_rate, of.spread], [a.mean(), a.std()])
        spreads[n, h] = a.std()
    shown = found.settings["layer"], found.settings["head"]
    assert shown == max(spreads, key=lambda place: spreads[place])
    names = ["position", "sink_rate", "norm", "rest", "along"]
    close(found.tables["points"][names], norms_of_head(case.layers, *shown)[0])
    table = found.tables["heads"]
    assert found.numbers["least below 1"] == (table.least < 1).sum()
    assert found.numbers["least below 1 without g"] == 8
    assert found.numbers["heads opposed"] == (table.g < 0).sum()
    assert found.numbers["median r2 of k"] == table.r2_k.median()
    chosen = output_norms(case.model, batches(), layer=1, head=3)
    close(chosen.tables["points"][names], norms_of_head(case.layers, 1, 3)[0])


def test_norms_of_a_sample_are_some_of_all_norms() -> None:
    model = llama()
    whole = output_norms(model, batches(), layer=0, head=0).tables["points"]
    for seed in range(2):  # some texts add nothing
        some = output_norms(model, batches() * 3, tokens=4, layer=0, head=0, seed=seed)
        points = some.tables["points"]
        assert len(points) == 4
        for row in points.to_numpy():
            assert (np.abs(whole.to_numpy() - row).max(1) < 1e-6).any()
    again = output_norms(model, batches() * 3, tokens=4, layer=0, head=0, seed=1)
    pd.testing.assert_frame_equal(again.tables["heads"], some.tables["heads"])


def test_the_points_of_a_picture_are_of_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_cw.analysis.suppression.SHOWN", 6)
    found = output_norms(llama(), batches(), layer=0, head=0)
    monkeypatch.undo()
    whole = output_norms(llama(), batches(), layer=0, head=0).tables["points"].sink_rate
    shown = found.tables["points"].sink_rate
    assert len(shown) == 6
    assert set(shown) < set(whole)
    assert shown.max() == pytest.approx(whole[whole.isin(shown)].max())
    assert not set(shown) <= set(whole[: LENGTHS[0] - 1])


def planted_head(
    v1: float, cos: float, k: float, T: int = 40, mask: QueryMask | None = None
) -> tuple[SeenLayer, float]:
    """A head all of whose values but the first are one vector of norm ``k``, and its ``g``.

    So ``w = (1 - a) u`` exactly, and ``||w|| = k (1 - a)``, ``<v~_1, w> = g (1 - a)``.
    """
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T[None]
    value = torch.zeros(1, 1, T, 3, dtype=torch.float64)
    value[..., 0, :2] = v1 * torch.tensor([cos, np.sqrt(1 - cos**2)], dtype=torch.float64)
    value[..., 1:, 0] = k
    a = torch.rand(1, 1, T, T, dtype=torch.float64).tril()
    a[..., 0] = 0
    a /= a.sum(-1, keepdim=True).clamp(min=1e-9)
    sink = torch.linspace(0.02, 0.98, T, dtype=torch.float64)[torch.randperm(T)]
    sink[0] = 1
    a *= 1 - sink[:, None]
    a[..., 0] = sink
    layer = AttentionLayer.from_tensors(a, value, weight, mask or QueryMask(T, T, causal=True))
    return SeenLayer(0, 0, "planted", layer), v1 * cos * k


@pytest.mark.parametrize(
    ("v1", "cos", "k"), [(0.5, -0.9, 2.0), (1.0, 0.0, 1.0), (3.0, 0.6, 1.0), (0.2, 0.9, 2.0)]
)
def test_a_planted_sink_gives_back_its_geometry(v1: float, cos: float, k: float) -> None:
    seen, g = planted_head(v1, cos, k)
    found = head_norms(seen)
    close(found.first, [v1], 1e-9)
    close(found.others, [k], 1e-9)
    points = found.queries[0, 1:].numpy()
    fit = fit_norms(points, float(found.first[0]), float(found.others[0]))
    close([fit["k"], fit["g"]], [k, g], 1e-9)
    # Where g is zero, what is fitted by it is rounding.
    close([fit["r2_k"], fit["r2_norm"]] + [fit["r2_g"]] * (g != 0), 1, 1e-9)
    # The norm itself, over all sink rates that could be.
    u, first = seen.layer.value[0, 0, 1], seen.layer.value[0, 0, 0]
    rates = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    norms = (rates * first + (1 - rates) * u).norm(dim=-1)
    close(predicted_norm(rates[:, 0].numpy(), v1, g, k), norms, 1e-9)
    assert fit["least"] == pytest.approx(float(rates[norms.argmin()]), abs=1e-4)
    # The sign as printed in Eq. 28 says something else, unless there is none.
    printed = fit["least_as_printed"]
    assert printed == pytest.approx(np.clip((k**2 + g) / (k**2 + 2 * g + v1**2), 0, 1), abs=1e-6)
    others = abs(v1 - k) > 1e-9 and g != 0
    assert (abs(printed - fit["least"]) > 0.01) == others
    assert fit["least_without_g"] == pytest.approx(k**2 / (k**2 + v1**2))


def test_what_a_model_has_rounded_is_summed_anew() -> None:
    """A head output in half precision is the sink's value alone, if that has nearly all weight."""
    seen, _ = planted_head(1.0, -0.5, 1.0)
    a = dense_map(seen.layer, attention)
    a[..., 1:] *= 1e-4
    a[..., 0] = 1 - a[..., 1:].sum(-1)
    value, weight, mask = seen.layer.value, seen.layer.output_weight, seen.layer.mask
    whole = AttentionLayer.from_tensors(a, value, weight, mask)
    rounded = replace(whole, head_output=whole.head_output.bfloat16().double())
    exact, found = (head_norms(replace(seen, layer=layer)).queries for layer in (whole, rounded))
    close(found, exact, 1e-12)
    close(found[0, 1:, 2] / (1 - found[0, 1:, 0]), 1, 1e-6)


def test_queries_that_do_not_see_the_first_token_are_left_out() -> None:
    T = 40
    window = torch.ones(T, T).tril().bool() & ~torch.ones(T, T).tril(-9).bool()
    seen, _ = planted_head(0.5, -0.5, 1.0, mask=QueryMask(T, T, visible=window[None, None]))
    queries = head_norms(seen).queries[0]
    assert queries[:9, 0].isfinite().all()
    assert queries[9:, 0].isnan().all()
    fit = fit_norms(queries[1:].numpy(), 0.5, 1.0)
    assert fit["mean_sink_rate"] == pytest.approx(float(queries[1:9, 0].mean()))
    with pytest.raises(ValueError, match="No sampled query sees the first token"):
        fit_norms(queries[9:].numpy(), 0.5, 1.0)


def test_a_head_that_gives_all_to_the_sink_has_no_fit() -> None:
    points = np.tile([1.0, 0.5, 0.0, 0.0], (6, 1))
    fit = fit_norms(points, 0.5, 1.0)
    assert all(np.isnan(fit[name]) for name in ("k", "g", "r2_k", "r2_g", "least", "r2_norm"))
    assert fit["mean_sink_rate"] == 1


def test_the_least_norm_is_where_a_grid_finds_it() -> None:
    random = np.random.default_rng(0)
    rates = np.linspace(0, 1, 10_001)
    curved = flat = 0
    for _ in range(500):
        v1, k = random.uniform(0, 3, 2)
        g = random.uniform(-2, 2) * (v1 * k if random.random() < 0.5 else (v1**2 + k**2) / 2)
        squares = rates**2 * v1**2 + 2 * rates * (1 - rates) * g + (1 - rates) ** 2 * k**2
        found = sink_rate_of_least_norm(v1, g, k)
        assert 0 <= found <= 1
        at = found**2 * v1**2 + 2 * found * (1 - found) * g + (1 - found) ** 2 * k**2
        assert at <= squares.min() + 1e-12
        curved += int(0 < found < 1)
        flat += int(k**2 - 2 * g + v1**2 <= 0)
    assert curved > 100
    assert flat > 90


@pytest.mark.parametrize(
    ("v1", "g", "k", "least"),
    [
        (1, 0, 1, 0.5),
        (1, -1, 1, 0.5),
        (1, -0.5, 2, 4.5 / 6),
        (0, 0, 1, 1),
        (1, 0, 0, 0),
        (1, 1, 1, np.nan),  # constant
        (0, 0, 0, np.nan),
        (2, 4, 1, 0),  # falls towards both ends, lower where the sink is not
        (1, 4, 2, 1),
        (1, 2, 1, np.nan),  # both ends alike
    ],
)
def test_known_least_norms(v1: float, g: float, k: float, least: float) -> None:
    assert sink_rate_of_least_norm(v1, g, k) == pytest.approx(least, nan_ok=True)


# ---------------------------------------------------------------------------------------------
# Fig. 6


def angle_between(x: Tensor, y: Tensor) -> float:
    norms = float(x.norm() * y.norm())
    return float(np.degrees(np.arccos(np.clip(float(x @ y) / norms, -1, 1)))) if norms else 90.0


def cone_of(v: Tensor, a: Tensor) -> dict[str, Any]:
    """Of one head: ``v~`` ``(T, d)`` and attention ``(T, T)``."""
    T = len(v)
    mean = v[1:].mean(0)
    angle = float(np.quantile([angle_between(v[j], mean) for j in range(1, T)], 0.9))
    with_sink = [sum((a[i, j] * v[j] for j in range(T)), 0 * mean) for i in range(1, T)]
    without = [sum((a[i, j] * v[j] for j in range(1, T)), 0 * mean) for i in range(1, T)]
    norms = [float(o.norm()) for o in with_sink]
    order = sorted(range(T - 1), key=lambda i: norms[i])
    lowest, rest = order[: (T - 1) // 4], order[(T - 1) // 4 :]

    def share(outputs: list[Tensor], which: list[int]) -> float:
        return float(np.mean([angle_between(outputs[i], mean) <= angle for i in which]))

    unit = mean / mean.norm()
    across = v[0] - (v[0] @ unit) * unit
    across = across / across.norm()
    return {
        "with_sink": share(with_sink, lowest),
        "without": share(without, lowest),
        "others_with_sink": share(with_sink, rest),
        "others_without": share(without, rest),
        "angle": angle,
        "sink_angle": angle_between(v[0], mean),
        "points": [
            [float(o @ unit), float(o @ across), norm]
            for outputs in (with_sink, without)
            for o, norm in zip(outputs, norms, strict=True)
        ],
        "sink": [float(v[0] @ unit), float(v[0] @ across)],
    }


def test_the_cone_is_the_definition(case: Any) -> None:
    found = semantic_cone(case.model, batches())
    expected = [
        {"text": t, "layer": n, "head": h, **cone_of(layer["v"][h], layer["attention"][h])}
        for t, text in enumerate(case.layers)
        for n, layer in enumerate(text)
        for h in range(4)
    ]
    names = ["with_sink", "without", "others_with_sink", "others_without", "angle", "sink_angle"]
    table = pd.DataFrame(expected)
    close(found.tables["heads"][names], table.groupby(["layer", "head"])[names].mean(), 1e-3)
    close(found.tables["texts"][names], table.groupby("text")[names].mean(), 1e-3)
    close(found.numbers["inside with sink"], table.with_sink.mean())
    close(found.numbers["others inside without"], table.others_without.mean())
    heads = found.tables["heads"]
    gain = heads.without - heads.with_sink
    shown = found.settings["layer"], found.settings["head"]
    assert shown == tuple(heads.loc[gain.idxmax(), ["layer", "head"]])
    of = next(x for x in expected if (x["text"], x["layer"], x["head"]) == (0, *shown))
    close(found.tables["points"][["along", "across", "norm"]], of["points"], 1e-3)
    close(found.tables["sink"][["along", "across", "angle"]], [[*of["sink"], of["angle"]]], 1e-3)
    assert found.tables["points"].outputs.value_counts().to_dict() == {"with": 8, "without": 8}


def test_outputs_are_counted_where_they_were_put() -> None:
    """Values around one axis, a sink against it: outputs leave the cone by its attention."""
    T = 9
    torch.manual_seed(0)
    value = torch.tensor([1.0, 0.0, 0.0]).repeat(T, 1).double()
    turns = [0.6, -0.2, -0.1, -0.1, 0.1, 0.0, -0.05, 0.05]  # radians off the first axis
    value[1:, 0], value[1:, 1] = torch.tensor(turns).cos(), torch.tensor(turns).sin()
    value[0] = torch.tensor([-0.5, 0.0, 0.8])
    a = torch.zeros(T, T, dtype=torch.float64)
    a[0, 0] = 1
    for i in range(1, T):
        sink = 0.7 if i in (2, 5) else 0.1
        a[i, 0], a[i, 1 : i + 1] = sink, (1 - sink) / i
    gram = torch.eye(3, dtype=torch.float64)[None]
    found = cone(value[None], gram, a[:, 0][None], (a[:, 1:] @ value[1:])[None])
    # 90% of the values: all but the outermost.
    assert 0.25 < float(torch.deg2rad(found.angle[0])) < 0.5
    norms = (a @ value)[1:].norm(dim=1)
    assert set(norms.argsort()[:2].tolist()) == {1, 4}  # the queries 2 and 5
    with_sink, without, others_with, others_without = found.shares[0].tolist()
    # Two of eight have the lowest norms: out with the sink, in without it.
    assert (with_sink, without) == (0, 1)
    # Of the others, the first query sees the outermost value alone.
    assert others_without == pytest.approx(5 / 6)
    assert others_with <= others_without
    assert found.sink_angle[0] == pytest.approx(angle_between(value[0], value[1:].mean(0)))


def test_values_that_cancel_leave_no_direction() -> None:
    value = torch.zeros(1, 7, 2, dtype=torch.float64)
    a = torch.full((1, 7), 0.5, dtype=torch.float64)
    found = cone(value, torch.eye(2, dtype=torch.float64)[None], a, torch.zeros_like(value))
    for x in (found.shares, found.angle, found.sink_angle, found.plane, found.sink):
        assert x.isfinite().all()


# ---------------------------------------------------------------------------------------------
# Figs. 1 and 2


def test_maps_are_the_factors_and_their_product(case: Any) -> None:
    found = weight_maps(case.model, batches(), count=2, length=7)
    table = found.to_dataframe()
    assert len(table) == 2 * 49
    # The first tokens of the first text, which no later one changes.
    names = {
        "attention": "attention",
        "relative norm": "relative_norm",
        "cosine": "cosine",
        "contribution": "inter",
    }
    for (n, h), rows in table.groupby(["layer", "head"]):
        layer = case.layers[0][n]
        for row in rows.to_dict("records"):
            i, j = row["query"], row["key"]
            for name, measure in names.items():
                expected = float(layer[measure][h, i, j]) * bool(layer["visible"][i, j])
                assert row[name] == pytest.approx(expected, abs=1e-4, rel=1e-4)
    first = table[table.key == 0]
    assert found.numbers["first: attention"] == pytest.approx(first.attention.mean())
    assert found.numbers["first: contribution"] == pytest.approx(first.contribution.mean())


def test_drawn_heads_are_different() -> None:
    for count in (1, 2, 5, 9):
        seen = set()
        for seed in range(3):
            found = weight_maps(llama(), batches(), count=count, seed=seed, length=4)
            pairs = [tuple(pair) for pair in found.settings["pairs"]]
            assert len(set(pairs)) == len(pairs) == min(count, 8)
            assert len({layer for layer, _ in pairs}) == min(count, 2)
            assert pairs == sorted(pairs)
            seen.add(tuple(pairs))
        assert len(seen) > 1 or count == 9
    found.plot(use_pyplot=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"length": 1}, "length=1"),
        ({"tokens": ["a"]}, "tokens has 1 names, but 9"),
    ],
)
def test_maps_that_are_not_there_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_maps(llama(), batches(), **options)


# ---------------------------------------------------------------------------------------------
# All of them

ANALYSES: dict[str, Callable[..., AnalysisResult]] = {
    "regression": component_regression,
    "correlations": component_correlations,
    "dispersion": component_dispersion,
    "interference": interference,
    "first token": first_token_weight,
    "entropy": weight_entropy,
    "alignment": value_alignment,
    "scaling": lambda *args, **kw: sink_scaling(*args, epsilon=0.01, **kw),
    "norms": output_norms,
    "cone": semantic_cone,
    "maps": weight_maps,
}
NEEDS = {"alignment": 3, "norms": 3, "cone": 5}
OF_PROJECTED_VALUES = ("alignment", "norms", "cone")
every = pytest.mark.parametrize("name", ANALYSES)


def some() -> list[Tensor]:
    """Fewer of the texts."""
    return batches(2)


def equal(one: AnalysisResult, other: AnalysisResult, *, exact: bool = True) -> None:
    assert dict(one.settings) == dict(other.settings)
    assert list(one.numbers) == list(other.numbers)
    tolerance = 0 if exact else 1e-3
    close(list(one.numbers.values()), list(other.numbers.values()), tolerance)
    assert list(one.tables) == list(other.tables)
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(
            table, other.tables[name], check_exact=exact, rtol=tolerance, atol=tolerance
        )


@cache
def on_llama(name: str) -> AnalysisResult:
    return ANALYSES[name](llama(), some())


@every
def test_padding_changes_nothing(name: str) -> None:
    model = gpt2()  # whose positions are learned
    ids, mask = torch.zeros(2, 2, 12, dtype=torch.long)
    for row, side, text in ((0, slice(-9, None), texts()[0]), (1, slice(6), texts()[1])):
        ids[row, side], mask[row, side] = text, 1
    padded = ANALYSES[name](model, {"input_ids": ids, "attention_mask": mask})
    equal(padded, ANALYSES[name](model, some()))


@every
def test_the_same_call_gives_the_same_result_and_leaves_the_model_alone(name: str) -> None:
    model = llama()
    before = state_of(model)
    ids = texts()[0][None]
    with torch.no_grad():
        logits = model(ids).logits
    equal(ANALYSES[name](model, some()), on_llama(name))
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert all(isinstance(x, float | int) for x in on_llama(name).numbers.values())


@every
def test_results_come_back_from_disk(name: str, tmp_path: Path) -> None:
    on_llama(name).save(tmp_path / "result.json")
    found = AnalysisResult.load(tmp_path / "result.json")
    assert type(found) is type(on_llama(name))
    equal(on_llama(name), found)
    drawn(found.plot(use_pyplot=False))


def test_results_of_chosen_heads_are_saved_whatever_integers_chose_them(tmp_path: Path) -> None:
    layer, head = np.argwhere(np.eye(2))[1]
    result = output_norms(llama(), some(), layer=layer, head=head)
    result.save(tmp_path / "result.json")
    equal(result, AnalysisResult.load(tmp_path / "result.json"))


def drawn(picture: Any) -> None:
    """Draws a figure without a complaint; all axes with data say what they show."""
    fig, _ = picture
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig.draw_without_rendering()
    assert fig.axes
    for ax in fig.axes:
        if ax.get_label() == "<colorbar>":
            assert ax.get_ylabel() or ax.get_xlabel()
            continue
        # Panels that share their rows or columns name them once.
        for axis in (ax.xaxis, ax.yaxis):
            names = [tick.get_text() for tick in axis.get_ticklabels() if tick.get_visible()]
            assert axis.get_label_text() or not any(names)
    width, height = fig.get_size_inches() * fig.dpi
    for ax in fig.axes:
        box = ax.get_tightbbox()
        assert box is not None
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1


def test_pictures_are_of_pyplot_where_that_is_asked_for() -> None:
    on_llama("alignment").plot(use_pyplot=False)
    assert not plt.get_fignums()
    figure, _ = on_llama("alignment").plot()
    assert plt.get_fignums() == [figure.number]
    plt.close("all")


def test_pictures_of_maps() -> None:
    result = weight_maps(llama(), some(), tokens=list("abcdefghi"))
    drawn(result.plot(paper_scale=True, use_pyplot=False))
    drawn(result.plot_factors(use_pyplot=False))


@every
def test_texts_that_are_too_short_are_refused(name: str) -> None:
    needs = NEEDS.get(name, 2)
    short = [torch.arange(3, 12)[None], torch.arange(3, 2 + needs)[None]]
    message = f"Text 1 has {needs - 1} tokens, but this analysis needs {needs} or more"
    with pytest.raises(ValueError, match=message):
        ANALYSES[name](llama(), short)
    result = ANALYSES[name](llama(), torch.arange(3, 3 + needs)[None])
    if name in ("regression", "norms"):  # too few points for some fits
        drawn(result.plot(use_pyplot=False))


@every
def test_inputs_that_are_not_text_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="give token ids"):
        ANALYSES[name](llama(), ["a text"])


def small(**sizes: int) -> nn.Module:
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 1, **sizes})
    return build(transformers.LlamaForCausalLM, config)


@every
def test_one_layer_and_one_head_are_enough(name: str) -> None:
    model = small(num_hidden_layers=1, num_attention_heads=1)
    result = ANALYSES[name](model, some())
    assert not result.to_dataframe().isna().any(axis=None)


def with_dead_heads() -> nn.Module:
    """The output of head 1 is zero in layer 0, and the values of all heads in layer 1."""
    model: Any = llama(4)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    return model  # type: ignore[no-any-return]


@every
@pytest.mark.filterwarnings("ignore:.*attention outputs (vanish|are zero)")
def test_heads_that_give_nothing_make_no_nan(name: str, tmp_path: Path) -> None:
    result = ANALYSES[name](with_dead_heads(), some())
    undefined = {
        "norms": ["r2_k", "r2_g", "r2_norm", "least", "least_without_g", "least_as_printed"],
        "entropy": ["entropy"],
    }
    for table in result.tables.values():
        known = table.drop(columns=undefined.get(name, []), errors="ignore")
        assert not known.isna().any(axis=None)
    assert np.isfinite(list(result.numbers.values())).all()
    if name == "norms":
        drawn(result.plot(use_pyplot=False))
    result.save(tmp_path / "result.json")
    equal(result, AnalysisResult.load(tmp_path / "result.json"))


@pytest.mark.filterwarnings("ignore:.*attention outputs (vanish|are zero)")
def test_what_dead_heads_do_is_counted() -> None:
    model = with_dead_heads()
    pairs = sum(T * (T + 1) // 2 for T in LENGTHS[:2])
    found = component_correlations(model, some())
    assert found.numbers["dropped"] == pairs * (1 + 4)
    assert found.numbers["points"] == pairs * 3
    found = interference(model, some())
    assert found.numbers["dropped"] == (pairs - 2) * (1 + 4)
    assert found.numbers["points"] == (pairs - 2) * 3
    layers = [definitions(model, ids, False)[:1] for ids in texts(2)]
    table = np.array(cells(layers, "attention", "relative_norm", "cosine"))[:, 1:]
    alive = table[(table != 0).all(1)]
    found = component_correlations(model, some())
    close(found.to_dataframe().iloc[:, 1:], np.corrcoef(np.log(np.abs(alive)).T))
    norms = output_norms(model, some()).tables["heads"]
    assert norms.least.isna().sum() == 5
    assert norms.k.notna().all()
    assert (norms.k == 0).sum() == 5


@pytest.mark.filterwarnings("ignore:.*attention outputs (vanish|are zero)")
def test_a_model_that_attends_to_no_effect_is_still_described() -> None:
    model: Any = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for name, analysis in ANALYSES.items():
        if name != "scaling":
            result = analysis(model, some())
            if name in ("correlations", "interference", "cone"):
                drawn(result.plot(use_pyplot=False))
    found = sink_scaling(model, some(), epsilon=0.01)
    assert (found.to_dataframe().delta == 0).all()


@every
def test_models_that_look_ahead_are_refused(name: str) -> None:
    config = transformers.BertConfig(**{**SIZES, "bos_token_id": None, "eos_token_id": None})
    model = build(transformers.BertForMaskedLM, config)
    if name == "maps":  # which speak of no first token that all see
        assert len(ANALYSES[name](model, some()).settings["pairs"]) == 4
        return
    with pytest.raises(ValueError, match="is bidirectional, but this analysis needs a causal"):
        ANALYSES[name](model, some())


@pytest.mark.parametrize("gated", GATED_MODELS)
@pytest.mark.parametrize("name", OF_PROJECTED_VALUES)
def test_gated_models_are_refused_where_projected_values_differ(name: str, gated: str) -> None:
    with pytest.raises(UnsupportedModelError, match="self_attn.*multiplies head outputs by a"):
        ANALYSES[name](GATED_MODELS[gated](), some())


@pytest.mark.parametrize("name", [x for x in ANALYSES if x not in OF_PROJECTED_VALUES])
def test_gated_models_run_where_each_query_has_its_own_numbers(name: str) -> None:
    result = ANALYSES[name](afmoe(), some())
    assert np.isfinite(list(result.numbers.values())).all()


def test_gated_norms_are_those_that_each_query_sees() -> None:
    """Fig. 7 of a model whose values have another norm for each query."""
    model = afmoe()
    found = component_dispersion(model, texts()[0][None], points=10_000).to_dataframe()
    ids = texts()[0][None]
    layers = eager_layers(with_bare_projections(model), input_ids=ids)
    rows = []
    for seen, gate in zip(layers, gate_factors(model, input_ids=ids), strict=True):
        given = reference.measures(seen.attention, seen.value, seen.output_weight, gate=gate)
        norms = given["vw"] / seen.attention
        rows += [
            [float(seen.attention[0, h, i, j]), float(norms[0, h, i, j])]
            for h in range(4)
            for i in range(9)
            for j in range(i + 1)
        ]
    close(found[["attention", "value norm"]], rows)


def uneven() -> nn.Module:
    """The second layer has two heads where the first has four."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    model: Any = llama()
    sizes = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.LlamaConfig(**sizes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    layer = LlamaAttention(config, layer_idx=1)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.2)
    model.model.layers[1].self_attn = layer
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["first token", "alignment", "norms", "cone", "maps"])
def test_layers_may_differ_in_heads(name: str) -> None:
    result = ANALYSES[name](uneven(), some())
    assert not result.to_dataframe().isna().any(axis=None)
    if "head" in result.to_dataframe() and name != "maps":
        places = result.to_dataframe()[["layer", "head"]].to_numpy().tolist()
        assert places == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]


def test_norms_of_uneven_layers_are_those_of_their_heads() -> None:
    """Each head's numbers stand in its own place."""
    found = output_norms(uneven(), some(), layer=1, head=1)
    alone: Any = uneven()
    with torch.no_grad():
        alone.model.layers[1].self_attn.o_proj.weight[:, 8:] *= 3
    other = output_norms(alone, some(), layer=1, head=1)
    ratio = other.tables["heads"].k / found.tables["heads"].k
    close(ratio, [1, 1, 1, 1, 1, 3])
    close(other.tables["points"].norm, 3 * found.tables["points"].norm)


@pytest.mark.parametrize("name", ["regression", "first token", "scaling", "norms", "cone", "maps"])
def test_half_precision_runs(name: str) -> None:
    whole = on_llama(name)
    half = ANALYSES[name](llama().to(torch.bfloat16), some())
    assert list(half.numbers) == list(whole.numbers)
    assert np.isfinite(list(half.numbers.values())).all()
    if name in ("first token", "maps"):
        assert half.numbers == pytest.approx(whole.numbers, abs=0.05)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ({"layer": 0}, ValueError, "layer=0, head=None: give both"),
        ({"head": 0}, ValueError, "layer=None, head=0: give both"),
        ({"layer": 2, "head": 0}, IndexError, "layer=2, head=0: this head does not exist"),
        ({"layer": 0, "head": -1}, IndexError, "layer=0, head=-1: this head does not exist"),
    ],
)
def test_heads_that_are_not_there_are_refused(place: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        output_norms(llama(), some(), **place)


def test_offloaded_models_run(tmp_path: Path) -> None:
    import accelerate

    offloaded = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    for name in ("first token", "scaling", "maps"):
        equal(ANALYSES[name](offloaded, some()), on_llama(name))
    assert AttentionWeights(offloaded).layers == AttentionWeights(llama()).layers


def test_training_mode_is_left_for_the_analysis_alone() -> None:
    model = gpt2()
    expected = {name: ANALYSES[name](model, some()) for name in ("first token", "scaling")}
    model.train()
    for name, result in expected.items():
        with pytest.warns(UserWarning, match="training mode"):
            equal(ANALYSES[name](model, some()), result)
        assert model.training
