"""Measures in the residual's space, against ``v~`` put through the norm after attention by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import (
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    VWAttention,
    VWONAttention,
    remove_tokens,
)
from captum_cw.capture import UnsupportedModelError
from support import reference
from support.inputs import padded_batch, position_ids, token_ids
from support.models import SIZES, build, gemma2, gemma2_with_layer_norm, gemma3, llama, olmo2
from support.reference import eager_layers, logits_removed_layer_by_layer, norm_updates
from support.running import run_in_threads
from support.state import state_of

MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "olmo2": olmo2,
    "layer-norm": gemma2_with_layer_norm,
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "vw": lambda model: VWAttention(model, space="residual"),
    "vwon": lambda model: VWONAttention(model, space="residual"),
    "inter": lambda model: ContributionWeights(model, space="residual"),
    "intra": lambda model: ContributionWeights(model, scope="intra", space="residual"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_values_and_output_are_measured_after_the_norm(model: Any, name: str, side: str) -> None:
    inputs, real = padded_batch(side)
    given = {**inputs, "position_ids": position_ids(real)}
    method = METHODS[name](model)
    before = state_of(model)
    maps = method.attribute(inputs)
    assert state_of(model) == before
    for found, seen, update in zip(
        maps, eager_layers(model, **given), norm_updates(model, **given), strict=True
    ):
        expected = reference.measures(seen.attention, seen.value, seen.output_weight, update)[name]
        rows = real[:, None, :, None].expand(expected.shape)
        scale = expected[rows].abs().max()
        assert torch.allclose(found[rows].double(), expected[rows], atol=1e-4 * float(scale))
        assert not found[~rows].any()
    if name in ("inter", "intra"):
        dims = (1, 3) if name == "inter" else (3,)
        sums = maps[0].sum(dims)
        there = real if name == "inter" else real[:, None].expand(sums.shape)
        assert torch.allclose(sums[there], torch.ones(int(there.sum())), atol=1e-5)


def test_decomposition_and_shares_are_of_the_same_space(model: Any) -> None:
    method = ContributionWeights(model, space="residual")
    c = method.attribute(token_ids())
    for d, expected in zip(method.decompose(token_ids()), c, strict=True):
        product = d.attention * d.relative_norm * d.cosine
        assert torch.allclose(product, expected, atol=1e-5 * float(expected.abs().max()))
    shares = torch.stack([x.sum(3) for x in c], 1)
    assert torch.allclose(method.head_share(token_ids()), shares, atol=1e-4)


def test_logits_are_those_of_the_unobserved_model(model: Any) -> None:
    ids = token_ids()
    with torch.no_grad():
        alone = model(ids, logits_to_keep=1).logits  # no more are asked for
    _, output = ContributionWeights(model, space="residual").observe(ids, None, lambda e, x: None)
    assert torch.equal(output.logits, alone)


def test_the_spaces_differ_only_if_a_norm_follows_attention() -> None:
    for build_model, differ in ((gemma2, True), (llama, False)):
        model = build_model()
        a, b = (
            ContributionWeights(model, space=space).attribute(token_ids())
            for space in ("attention", "residual")
        )
        assert torch.equal(a[1], b[1]) != differ


def test_a_factor_on_the_way_to_the_residual_stream_is_part_of_the_norms() -> None:
    config = transformers.GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.25)
    model = build(transformers.GraniteForCausalLM, config)
    a, b = (VWAttention(model, space=s).attribute(token_ids()) for s in ("attention", "residual"))
    assert torch.allclose(0.25 * a[0], b[0], rtol=1e-4)
    a, b = (
        ContributionWeights(model, space=s).attribute(token_ids())
        for s in ("attention", "residual")
    )
    assert torch.allclose(a[0], b[0], atol=1e-5)


def test_a_learned_scale_of_each_feature_counts_as_a_norm() -> None:
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        layerscale_value=1.0,
    )
    model: Any = build(transformers.Dinov2Model, config)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain_norms = VWAttention(model).attribute(pixels)
    method = ContributionWeights(model, space="residual")
    c = method.attribute(pixels)
    new = hasattr(model.encoder.layer[0].attention, "o_proj")  # since transformers 5
    for number, layer in enumerate(model.encoder.layer):
        gain = layer.layer_scale1.lambda1.detach()
        with torch.no_grad():  # the same model with the scale moved into the projection
            moved = copy.deepcopy(model)
            to = moved.encoder.layer[number]
            projection = to.attention.o_proj if new else to.attention.output.dense
            projection.weight *= gain[:, None]
            projection.bias *= gain
            to.layer_scale1.lambda1.fill_(1)
        expected = ContributionWeights(moved).attribute(pixels)[number]
        assert torch.allclose(c[number], expected, atol=1e-4 * float(expected.abs().max()))
        moved_norms = VWAttention(moved).attribute(pixels)[number]
        found = VWAttention(model, space="residual").attribute(pixels)[number]
        assert torch.allclose(found, moved_norms, rtol=1e-3)
        assert not torch.allclose(found, plain_norms[number], rtol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: Any, dtype: torch.dtype) -> None:
    half = copy.deepcopy(model).to(dtype)
    # The same numbers, so that only what is rounded on the way differs.
    full = copy.deepcopy(half).float()
    a, b = (
        TokenScores(ContributionWeights(m, space="residual"), layers=None, heads=None).attribute(
            token_ids()
        )
        for m in (half, full)
    )
    assert float((a - b).norm() / b.norm()) < 0.15
    c = ContributionWeights(half, space="residual").attribute(token_ids())
    assert torch.allclose(c[0].sum((1, 3)), torch.ones(2, 9), atol=1e-2)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_a_module_that_is_not_a_norm_is_refused() -> None:
    model: Any = gemma2()
    model.model.layers[1].post_attention_layernorm = _Doubled().eval()
    ids, before = token_ids(), state_of(model)
    with pytest.raises(
        UnsupportedModelError, match=r"'model.layers.1.self_attn' goes into _Doubled, which is not"
    ):
        ContributionWeights(model, space="residual").attribute(ids)
    assert state_of(model) == before
    ContributionWeights(model).attribute(ids)
    assert len(ContributionWeights(model, model.model.layers[0].self_attn).attribute(ids)) == 2


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_online_removal_equals_removal_layer_by_layer(model: Any, which: Any) -> None:
    inputs, real = padded_batch("left")
    given = {**inputs, "position_ids": position_ids(real)}
    expected = logits_removed_layer_by_layer(
        ContributionWeights(model, space="residual"), given, real, which
    )
    method = ContributionWeights(model, space="residual")
    with remove_tokens(model, method, 0.3, which), torch.no_grad():
        found = model(**given).logits
    assert torch.allclose(found[real], expected[real], atol=1e-4)
    with remove_tokens(model, ContributionWeights(model), 0.3, which), torch.no_grad():
        other = model(**given).logits
    assert not torch.allclose(other[real], expected[real], atol=1e-3)


def test_online_removal_without_a_norm_is_that_of_the_other_space() -> None:
    model, ids = llama(), token_ids()
    logits = []
    for space in ("attention", "residual"):
        method = ContributionWeights(model, space=space)  # type: ignore[arg-type]
        with torch.no_grad(), remove_tokens(model, method, 0.5):
            logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-6)


def test_nothing_removed_is_bit_identical(model: Any) -> None:
    ids = token_ids()
    with torch.no_grad():
        alone = model(ids).logits
        with remove_tokens(model, ContributionWeights(model, space="residual"), 0.0):
            assert torch.equal(model(ids).logits, alone)


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_the_metric_takes_it_by_name_and_as_a_measure(scoring: Any) -> None:
    model, ids = gemma2(), token_ids(4, 12)
    metric = ComprehensivenessSufficiency(model, [0.3, 0.6], scoring=scoring)
    methods = {
        "name": "contribution-residual",
        "measure": ContributionWeights(model, space="residual"),
        "contribution": "contribution",
    }
    result = metric.evaluate(methods, ids, show_progress=False)
    alone = metric.evaluate({"contribution": "contribution"}, ids, show_progress=False)
    for side in (result.comprehensiveness, result.sufficiency):
        assert torch.equal(side["name"], side["measure"])
        assert not torch.equal(side["name"], side["contribution"])
    assert torch.equal(result.sufficiency["contribution"], alone.sufficiency["contribution"])
    assert "residual" in result.settings["methods"]["measure"]


def test_threads_do_not_see_each_other() -> None:
    model, ids = gemma2(), token_ids()
    expected = [
        ContributionWeights(model, space=space).attribute(ids)
        for space in ("attention", "residual")
    ]

    def work(number: int) -> None:
        space = ("attention", "residual")[number % 2]
        for _ in range(5):
            found = ContributionWeights(model, space=space).attribute(ids)  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(found, expected[number % 2], strict=True))

    run_in_threads(4, work)


def test_attention_weights_do_not_have_a_space() -> None:
    with pytest.raises(TypeError, match="space"):
        AttentionWeights(gemma2(), space="residual")  # type: ignore[call-arg]
