"""Observed models, compared with the definitions and with unobserved models."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import (
    AttentionWeights,
    ContributionWeights,
    TokenScores,
    VWAttention,
    functional,
)
from captum_cw.capture import UnsupportedModelError, attention_call, hf_registry
from captum_cw.capture.attention_call import AttentionCall, query_mask
from captum_cw.functional import AttentionLayer
from captum_cw.weights import SoftmaxWeights
from support import reference
from support.inputs import last_tokens_and_cache, padded_batch, position_ids, token_ids
from support.measures import MEASURES_AND_INTRA
from support.models import (
    IMPLEMENTATIONS,
    MODELS,
    SIZES,
    attention_modules,
    build,
    gpt2,
    llama,
    mistral,
)
from support.reference import eager_layers
from support.running import run_in_threads
from support.state import state_of


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_every_measure_equals_the_definition(
    model: nn.Module, implementation: str, side: str
) -> None:
    inputs, real = padded_batch(side)
    seen = eager_layers(model, **inputs, position_ids=position_ids(real))
    model.set_attn_implementation(implementation)
    both = (real[:, :, None] & real[:, None, :])[:, None]
    for name, method in MEASURES_AND_INTRA.items():
        maps = method(model).attribute(inputs)
        assert len(maps) == len(seen) == 2
        for found, layer in zip(maps, seen, strict=True):
            a = layer.attention * both
            expected = reference.measures(a, layer.value, layer.output_weight)[name].nan_to_num()
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), expected, rtol=1e-4, atol=2e-6), name
            assert not found[~both.expand_as(found)].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_token_scores_equal_the_definition(model: nn.Module, implementation: str) -> None:
    inputs, real = padded_batch("left")
    seen = eager_layers(model, **inputs, position_ids=position_ids(real))
    model.set_attn_implementation(implementation)
    i = torch.arange(9)
    visible = (real[:, None, :] & real[:, :, None] & (i <= i[:, None]))[:, None].expand(2, 4, 9, 9)
    if hasattr(model.config, "sliding_window") and model.config.sliding_window:
        visible = visible & (i > i[:, None] - model.config.sliding_window)
    for reduction in ("mean", "sum", "max", "rms"):
        scores = TokenScores(
            ContributionWeights(model), reduction=reduction, layers=None, heads=None
        ).attribute(inputs)
        for number, layer in enumerate(seen):
            g = reference.measures(layer.attention * visible, layer.value, layer.output_weight)
            expected = reference.token_scores(g["inter"].nan_to_num(), visible, reduction)
            assert torch.allclose(scores[:, number].double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_observed_model_computes_bit_for_bit_what_it_computes_alone(
    model: nn.Module, implementation: str, side: str, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    inputs, _ = padded_batch(side)
    inputs["output_attentions"] = implementation == "eager"
    with torch.no_grad():
        alone = model(**inputs)
    outputs: list[Any] = []

    def forward(**kwargs: Tensor) -> Any:
        outputs.append(model(**kwargs))
        return outputs[-1]

    ContributionWeights(forward, attention_modules(model)).attribute(inputs)
    assert torch.equal(outputs[0].logits, alone.logits)
    if implementation == "eager":
        pairs = zip(outputs[0].attentions, alone.attentions, strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    before = state_of(model)
    ContributionWeights(model).attribute(token_ids())
    TokenScores(VWAttention(model)).attribute(token_ids())
    assert state_of(model) == before


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    model = llama()
    before = state_of(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        ContributionWeights(model).attribute(token_ids())
    handle.remove()
    assert state_of(model) == before


def test_training_mode_is_reported_and_restored() -> None:
    model = gpt2().train()  # its dropout is 0.1
    model.lm_head.eval()
    before = state_of(model)
    with pytest.warns(UserWarning, match="training mode: dropout is off"):
        maps = ContributionWeights(model).attribute(token_ids())
    assert state_of(model) == before
    assert torch.equal(maps[0], ContributionWeights(model.eval()).attribute(token_ids())[0])


def test_a_batch_equals_its_single_examples(model: nn.Module) -> None:
    ids = token_ids(B=3)
    for method in MEASURES_AND_INTRA.values():
        whole = method(model).attribute(ids)
        for b in range(3):
            alone = method(model).attribute(ids[b : b + 1])
            for x, y in zip(whole, alone, strict=True):
                assert torch.allclose(x[b : b + 1], y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_does_not_change_the_other_numbers(
    model: nn.Module, side: str, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    inputs, real = padded_batch(side)
    alone = inputs["input_ids"][1:][real[1:]][None]
    cut = slice(3, 9) if side == "left" else slice(0, 6)
    for method in MEASURES_AND_INTRA.values():
        for padded, single in zip(
            method(model).attribute(inputs), method(model).attribute(alone), strict=True
        ):
            assert torch.allclose(padded[1:, :, cut, cut], single, rtol=1e-4, atol=1e-6)
    for queries in ("all", 0, -1, slice(1, 3)):
        method = TokenScores(ContributionWeights(model), queries=queries)
        scores = method.attribute(inputs)[1:, cut]
        assert torch.allclose(scores, method.attribute(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_sums_to_one_percent(
    model: nn.Module, dtype: torch.dtype, implementation: str
) -> None:
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    maps, deltas = ContributionWeights(model).attribute(token_ids(), return_convergence_delta=True)
    for c, delta in zip(maps, deltas, strict=True):
        assert c.dtype == torch.float32
        # Relative to the sum of the terms' sizes, which cancel in random models.
        assert (delta.abs() <= 1e-2 * c.abs().sum((1, 3)).clamp(min=1)).all()


def test_embeddings_give_what_their_ids_give(model: nn.Module) -> None:
    ids = token_ids()
    embeddings = model.get_input_embeddings()(ids).detach()
    expected = ContributionWeights(model).attribute(ids)
    for inputs in (embeddings, {"inputs_embeds": embeddings}):
        for x, y in zip(ContributionWeights(model).attribute(inputs), expected, strict=True):
            assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_callable_that_hides_the_mask_leaves_padding_out(implementation: str) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    inputs, real = padded_batch("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def forward(ids: Tensor, mask: Tensor) -> Any:
        return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(real))

    expected = ContributionWeights(model).attribute(inputs)
    hidden = ContributionWeights(forward, attention_modules(model)).attribute((ids, mask))
    for x, y in zip(hidden, expected, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_in_half_precision_the_output_is_not_rounded(model: nn.Module) -> None:
    def on_layer(execution: Any, layer: AttentionLayer) -> None:
        y = layer.head_output.transpose(1, 2).flatten(2)
        exact = y.double() @ layer.output_weight.flatten(0, 1).double()
        assert layer.output.dtype == torch.float32
        assert torch.allclose(layer.output.double(), exact, rtol=1e-5, atol=1e-6)

    results, _ = ContributionWeights(model.to(torch.bfloat16)).observe(token_ids(), None, on_layer)
    assert len(results) == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("padded", [0, 2])
def test_queries_after_a_cache_have_the_rows_of_the_whole_text(
    implementation: str, T: int, padded: int
) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, :padded] = 0
    where = position_ids(inputs["attention_mask"].bool())
    whole = ContributionWeights(model).attribute(inputs)
    late = ContributionWeights(model).attribute(
        {**last_tokens_and_cache(model, inputs, where, T), "position_ids": where[:, -T:]}
    )
    for x, y in zip(late, whole, strict=True):
        assert x.shape == (2, 4, T, 9)
        assert torch.allclose(x, y[:, :, -T:], atol=1e-6)


def test_one_token_alone_makes_its_whole_output(model: nn.Module) -> None:
    maps = ContributionWeights(model).attribute(token_ids(T=1))
    assert all(torch.allclose(c.sum(1), torch.ones(2, 1, 1), atol=1e-5) for c in maps)


def test_scores_are_aggregated_over_heads_and_layers(model: nn.Module) -> None:
    method = ContributionWeights(model)
    for signed in (False, True):
        whole = TokenScores(method, layers=None, heads=None, signed=signed).attribute(token_ids())
        assert (whole < 0).any() == signed
        for heads in ("mean", "sum", "max", None):
            by_head = whole if heads is None else functional.aggregate(whole, heads, 2)
            for layers in ("mean", "sum", "max", None):
                scores = TokenScores(method, layers=layers, heads=heads, signed=signed)
                expected = by_head if layers is None else functional.aggregate(by_head, layers, 1)
                assert torch.allclose(scores.attribute(token_ids()), expected, atol=1e-6)


def test_the_model_does_not_compute_unused_outputs() -> None:
    model = llama()
    asked: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda m, a, k: asked.append(k), with_kwargs=True)
    ContributionWeights(model).attribute(token_ids())
    assert (asked[0]["use_cache"], asked[0]["logits_to_keep"]) == (False, 1)
    ContributionWeights(model).attribute({"input_ids": token_ids(), "logits_to_keep": 2})
    assert asked[1]["logits_to_keep"] == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_image_model_sees_in_both_directions(implementation: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=4)
    model = build(transformers.ViTModel, config)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(pixels, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    for x, y in zip(AttentionWeights(model).attribute(pixels), expected, strict=True):
        assert torch.allclose(x, y, atol=1e-6)
    _, deltas = ContributionWeights(model).attribute(pixels, return_convergence_delta=True)
    assert max(float(d.abs().max()) for d in deltas) < 1e-4


def test_a_position_bias_does_not_uncover_a_hidden_key() -> None:
    lowest = torch.finfo(torch.float32).min
    hidden = torch.tensor([[0.0, lowest * 0.9], [-5.0, 3.0]])[None, None]
    q = torch.zeros(1, 1, 2, 4)
    call = AttentionCall(
        module=nn.Identity(),
        query=q,
        key=q,
        value=q,
        mask=hidden,
        returned=q.transpose(1, 2),
        by_token=lambda y: y,
        scaled=lambda _: q,
    )
    assert query_mask(call, None).visible.tolist() == [[[[True, False], [True, True]]]]


def test_layers_are_named_in_execution_order() -> None:
    method = ContributionWeights(llama())
    assert method.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert ContributionWeights(gpt2()).layers == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_one_module_gives_a_tensor_and_a_list_gives_a_list() -> None:
    model = llama()
    ids = token_ids()
    every = ContributionWeights(model).attribute(ids)
    modules = [layer.self_attn for layer in model.model.layers]
    assert torch.equal(ContributionWeights(model, modules[1]).attribute(ids), every[1])
    reverse = ContributionWeights(model, modules[::-1]).attribute(ids)
    assert torch.equal(reverse[0], every[1])
    assert torch.equal(reverse[1], every[0])
    as_module_list = ContributionWeights(model, nn.ModuleList(modules)).attribute(ids)
    assert all(torch.equal(x, y) for x, y in zip(as_module_list, every, strict=True))


def test_a_module_that_runs_twice_gives_a_result_each_time() -> None:
    model = llama()
    first = model.model.layers[0].self_attn
    model.model.layers[1].self_attn = first
    every = ContributionWeights(model).attribute(token_ids())
    twice = ContributionWeights(model, first).attribute(token_ids())
    assert isinstance(twice, tuple)
    assert len(twice) == len(every) == 2
    assert torch.equal(twice[1], every[1])
    assert not torch.equal(twice[0], twice[1])


def test_two_threads_on_one_model_do_not_see_each_others_calls() -> None:
    model = llama()
    inputs = [token_ids(B=1, T=5 + 3 * n, seed=n) for n in range(4)]
    expected = [ContributionWeights(model).attribute(ids) for ids in inputs]
    before = state_of(model)

    def work(n: int) -> None:
        for _ in range(10):
            found = ContributionWeights(model).attribute(inputs[n])
            assert len(found) == 2
            for x, y in zip(found, expected[n], strict=True):
                assert torch.allclose(x, y, atol=1e-6)

    run_in_threads(len(inputs), work)
    assert state_of(model) == before


def test_an_observation_inside_an_observation_gives_right_results_for_both() -> None:
    model = llama()
    ids = token_ids()
    expected = ContributionWeights(model).attribute(ids)
    inner: list[list[Tensor]] = []

    def observe_too(*args: Any) -> None:
        handle.remove()
        inner.append(ContributionWeights(model).attribute(ids))

    handle = model.model.layers[0].mlp.register_forward_hook(observe_too)
    outer = ContributionWeights(model).attribute(ids)
    for found in (outer, inner[0]):
        assert len(found) == 2
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_soft_cap_is_part_of_the_weights() -> None:
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5, sliding_window=4
    )
    model = build(transformers.Gemma2ForCausalLM, config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(token_ids(), output_attentions=True).attentions
    for x, y in zip(AttentionWeights(model).attribute(token_ids()), expected, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_a_kernel_of_its_own_kind_is_replayed_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A soft-cap, under an implementation that returns no weights."""
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5, sliding_window=4
    )
    model = build(transformers.Gemma2ForCausalLM, config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(token_ids(), output_attentions=True).attentions
    file = sys.modules[type(model).__module__]
    eager = file.eager_attention_forward

    def fused(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return eager(*args, **kwargs)[0], None

    monkeypatch.setattr(file, "eager_attention_forward", fused)
    monkeypatch.setattr(hf_registry, "_find_eager", lambda module: eager)
    for elements in (1, 2**20):
        monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", elements)
        for x, y in zip(AttentionWeights(model).attribute(token_ids()), expected, strict=True):
            assert torch.allclose(x, y, atol=1e-6)


def test_a_linear_layer_that_reads_something_else_is_not_the_projection() -> None:
    class Decoyed(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.decoy = base, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            self.decoy(x + 1)
            return self.base(x)

    model = llama()
    expected = ContributionWeights(model).attribute(token_ids())
    for layer in model.model.layers:
        layer.self_attn.o_proj = Decoyed(layer.self_attn.o_proj).eval()
    found = ContributionWeights(model).attribute(token_ids())
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("queries", [slice(None), slice(-1, None)], ids=["all", "last"])
def test_recomputed_weights_that_do_not_give_the_head_outputs_are_refused(queries: slice) -> None:
    """A kernel with a peculiarity of its own is not mistaken for plain attention."""
    model = mistral()
    registry = sys.modules[type(model).__module__].ALL_ATTENTION_FUNCTIONS
    plain = registry["sdpa"]

    def odd(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        y = plain(module, *args, **kwargs)[0].clone()
        y[:, queries] *= 1.01
        return y, None

    registry["sdpa"] = odd
    try:
        with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn.*eager"):
            ContributionWeights(model).attribute(token_ids())
        assert registry["sdpa"] is odd
    finally:
        del registry["sdpa"]


def test_layers_of_a_bare_callable_have_names_of_their_own() -> None:
    model = llama()
    modules = attention_modules(model)
    method = ContributionWeights(lambda ids: model(input_ids=ids), modules)
    method.attribute(token_ids())
    assert method.layers == ["LlamaAttention[0]", "LlamaAttention[1]"]


@pytest.mark.parametrize("padded", [False, True])
def test_what_was_found_for_a_shape_is_checked_again(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the last query is padding, which shows nothing."""
    model = llama()
    inputs = {"input_ids": token_ids()[:1], "attention_mask": torch.ones(1, token_ids().shape[1])}
    if padded:
        inputs["attention_mask"][:, -2:] = 0
    method = ContributionWeights(model)
    expected = method.attribute(inputs)
    assert all(torch.equal(x, y) for x, y in zip(method.attribute(inputs), expected, strict=True))
    right = SoftmaxWeights.__call__
    monkeypatch.setattr(SoftmaxWeights, "__call__", lambda self, rows: right(self, rows).sqrt())
    monkeypatch.setattr(
        attention_call,
        "_dense",
        lambda call, mask, kernel: SoftmaxWeights(call.query, call.key, mask),
    )
    with pytest.raises(UnsupportedModelError, match="do not give the head outputs"):
        method.attribute(inputs)
