"""Measures in the residual's space, against ``v~`` put through the norm after attention by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import transformers
from models import SIZES, build, in_threads, llama, look, token_ids
from test_capture import padded_batch, positions, state_of
from test_interventions import removed_layer_by_layer
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


def with_gains(model: nn.Module) -> nn.Module:
    """Norms with gains far from one, so that leaving them out is seen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(0.5, 0.5)
    return model


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        attn_implementation="eager",  # where SDPA is possible, it leaves out the soft-cap
    )  # fmt: skip
    return with_gains(build(transformers.Gemma2ForCausalLM, config))


def gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return with_gains(build(transformers.Gemma3ForCausalLM, config))


def olmo2() -> nn.Module:
    config = transformers.Olmo2Config(**SIZES, num_key_value_heads=2)
    return with_gains(build(transformers.Olmo2ForCausalLM, config))


def layer_norm() -> nn.Module:
    """A norm that takes off the mean, and adds a bias."""
    model: Any = gemma2()
    torch.manual_seed(1)
    for layer in model.model.layers:
        norm = nn.LayerNorm(32)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        layer.post_attention_layernorm = norm
    return model.eval()  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "olmo2": olmo2,
    "layer-norm": layer_norm,
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "vw": lambda model: VWAttention(model, space="residual"),
    "vwon": lambda model: VWONAttention(model, space="residual"),
    "inter": lambda model: ContributionWeights(model, space="residual"),
    "intra": lambda model: ContributionWeights(model, scope="intra", space="residual"),
}


def updates(model: Any, **inputs: Tensor) -> list[Tensor]:
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


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_values_and_output_are_measured_after_the_norm(model: Any, name: str, side: str) -> None:
    inputs, real = padded_batch(side)
    given = {**inputs, "position_ids": positions(real)}
    method = METHODS[name](model)
    before = state_of(model)
    maps = method.attribute(inputs)
    assert state_of(model) == before
    for found, seen, update in zip(
        maps, look(model, **given), updates(model, **given), strict=True
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


def test_the_spaces_differ_where_there_is_a_norm_and_are_the_same_where_there_is_none() -> None:
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
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        layerscale_value=1.0,
    )  # fmt: skip
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


def test_what_is_no_norm_is_refused() -> None:
    model: Any = gemma2()
    model.model.layers[1].post_attention_layernorm = _Doubled().eval()
    ids, before = token_ids(), state_of(model)
    with pytest.raises(
        UnsupportedModelError, match=r"'model.layers.1.self_attn' goes into _Doubled, which is no"
    ):
        ContributionWeights(model, space="residual").attribute(ids)
    assert state_of(model) == before
    ContributionWeights(model).attribute(ids)
    assert len(ContributionWeights(model, model.model.layers[0].self_attn).attribute(ids)) == 2


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_online_removal_equals_removal_layer_by_layer(model: Any, which: Any) -> None:
    inputs, real = padded_batch("left")
    given = {**inputs, "position_ids": positions(real)}
    expected = removed_layer_by_layer(
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

    in_threads(4, work)


def test_attention_weights_have_no_space() -> None:
    with pytest.raises(TypeError, match="space"):
        AttentionWeights(gemma2(), space="residual")  # type: ignore[call-arg]
