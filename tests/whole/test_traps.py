"""Regression tests for silent errors in numbers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import ContributionWeights, TokenScores, functional
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import AttentionLayer
from support.inputs import last_tokens_and_cache, padded_batch, position_ids, token_ids
from support.models import SIZES, attention_modules, build, gpt2, llama, mistral
from support.running import run_in_threads
from support.state import state_of


def scores(method: Any, inputs: Any, additional: Any = None, **options: Any) -> Tensor:
    result: Tensor = TokenScores(method, **options).attribute(inputs, additional)
    return result


@pytest.mark.parametrize("first", [llama, gpt2], ids=["llama", "gpt2"])
def test_an_observation_that_ends_leaves_those_of_other_models_hearing(first: Any) -> None:
    """Modeling files share a registry, so the first observer must not restore it for all."""
    one, other = (llama(), gpt2()) if first is llama else (gpt2(), llama())
    before = state_of(one), state_of(other)
    expected = ContributionWeights(other).attribute(token_ids())
    inside, ended = threading.Event(), threading.Event()

    def hold(*args: Any) -> None:
        inside.set()
        assert ended.wait(20)

    def observe_first() -> None:
        method = ContributionWeights(lambda ids: one(input_ids=ids), attention_modules(one))
        method.attribute(token_ids())

    release = attention_modules(one)[0].register_forward_hook(hold)
    thread = threading.Thread(target=observe_first)
    thread.start()
    assert inside.wait(20)

    def end_first(*args: Any) -> None:
        ended.set()
        thread.join(20)

    handle = attention_modules(other)[0].register_forward_pre_hook(end_first)
    found = ContributionWeights(
        lambda ids: other(input_ids=ids), attention_modules(other)
    ).attribute(token_ids())
    release.remove()
    handle.remove()
    assert len(found) == 2
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, expected, strict=True))
    assert (state_of(one), state_of(other)) == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_seen_however_the_mask_comes(side: str, implementation: str) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    inputs, real = padded_batch(side)
    ids, mask, where = inputs["input_ids"], inputs["attention_mask"], position_ids(real)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    four = causal & real[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    layers = attention_modules(model)

    def by_position(ids: Tensor, mask: Tensor) -> Any:
        return model(input_ids=ids, attention_mask=mask, position_ids=where)

    ways: list[tuple[Any, Any]] = [
        (ContributionWeights(by_position, layers), (ids, mask)),
        (ContributionWeights(nn.DataParallel(model)), inputs),
    ]
    if implementation == "sdpa":
        ways.append((model_with(model), {**inputs, "attention_mask": four, "position_ids": where}))
    for hidden in (lowest, -1e9):
        additive = torch.zeros(four.shape).masked_fill(~four, hidden)
        ways.append(
            (model_with(model), {**inputs, "attention_mask": additive, "position_ids": where})
        )
    for queries in ("all", -1):
        expected = scores(ContributionWeights(model), inputs, queries=queries)
        for method, given in ways:
            found = scores(method, given, queries=queries)
            assert torch.allclose(found, expected, atol=1e-6)


def model_with(model: nn.Module) -> ContributionWeights:
    return ContributionWeights(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_cached_chunk_keeps_positions(side: str) -> None:
    """The mask covers cached tokens too, and positions follow from the whole mask."""
    model = gpt2()
    inputs, real = padded_batch(side)
    T = 5
    whole = ContributionWeights(model).attribute(inputs)
    late = ContributionWeights(model).attribute(
        last_tokens_and_cache(model, inputs, position_ids(real), T)
    )
    for x, y in zip(late, whole, strict=True):
        assert torch.allclose(x, y[:, :, -T:], atol=1e-6)


def test_a_model_that_counts_positions_from_ids_is_left_to_it() -> None:
    config = transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1, "bos_token_id": 0})
    config.is_decoder = True
    model = build(transformers.RobertaForCausalLM, config)
    inputs, real = padded_batch("right")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~real, 1)
    positions_seen: list[Any] = []
    model.register_forward_pre_hook(
        lambda m, a, k: positions_seen.append(k.get("position_ids")), with_kwargs=True
    )
    try:
        padded = scores(ContributionWeights(model), inputs)
    except UnsupportedModelError:  # before transformers 5 it does not use the registry
        assert int(transformers.__version__.partition(".")[0]) < 5
        padded = None
    assert positions_seen[-1] is None
    if padded is not None:
        alone = scores(ContributionWeights(model), inputs["input_ids"][1:, :6])
        assert torch.allclose(padded[1:, :6], alone, atol=1e-6)


def test_a_callable_in_training_mode_is_refused() -> None:
    model = gpt2().train()
    before = state_of(model)
    method = ContributionWeights(lambda ids: model(input_ids=ids), attention_modules(model))
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        method.attribute(token_ids())
    assert state_of(model) == before


def test_threads_on_a_model_in_training_mode_agree() -> None:
    model = gpt2().train()
    before = state_of(model)
    expected = scores(ContributionWeights(gpt2()), token_ids())

    def work(number: int) -> None:
        for _ in range(5):
            assert torch.allclose(scores(ContributionWeights(model), token_ids()), expected)

    run_in_threads(3, work)
    assert state_of(model) == before


def test_values_that_the_projection_nearly_removes_keep_their_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(1, 8, 24, generator=generator).double())
    scale = torch.ones(8).double()
    scale[-1] = 1e-5  # one direction nearly vanishes
    w = (u * scale) @ v[:, :8]
    value = (u[..., -1] + 0 * torch.randn(1, 1, 6, 8, generator=generator)).float()
    exact = (value.double() @ w).norm(dim=-1)
    layer = AttentionLayer.from_tensors(torch.ones(1, 1, 1, 6), value, w.float())
    assert torch.allclose(layer.value_norms.double(), exact, rtol=1e-2)


def test_half_precision_tensors_are_computed_in_float32() -> None:
    a = torch.rand(1, 2, 4, 4).softmax(-1).to(torch.bfloat16)
    v, w = torch.randn(1, 2, 4, 3).to(torch.bfloat16), torch.randn(2, 3, 8).to(torch.bfloat16)
    c = functional.dense_map(AttentionLayer.from_tensors(a, v, w), functional.contribution())
    assert c.dtype == torch.float32
    assert torch.allclose(c.sum((1, 3)), torch.ones(1, 4), atol=1e-5)
    q = torch.randn(1, 1, 4, 8).to(torch.bfloat16)
    assert functional.attention_weights(q, q).dtype == torch.float32


def test_a_mask_of_one_column_is_broadcast() -> None:
    q = torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True], [False], [True]])
    found = functional.attention_weights(q, q, mask=mask)
    assert torch.equal(found, functional.attention_weights(q, q, mask=mask.expand(3, 3)))


def test_autocast_changes_the_model_and_not_the_geometry() -> None:
    model = llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, deltas = ContributionWeights(model).attribute(
            token_ids(), return_convergence_delta=True
        )
    for c, delta in zip(maps, deltas, strict=True):
        assert c.dtype == torch.float32
        assert (delta.abs() <= 1e-2 * c.abs().sum((1, 3)).clamp(min=1)).all()
        assert ((c.sum((1, 3)) - 1).abs() <= 2e-2 * c.abs().sum((1, 3)).clamp(min=1)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_in_place_is_observed() -> None:
    model = llama()
    expected = scores(ContributionWeights(model), token_ids())
    model.compile(backend="eager")
    assert torch.allclose(scores(ContributionWeights(model), token_ids()), expected, atol=1e-6)


def test_another_function_of_the_model_is_called_by_its_own_names() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not asked for")

        def score(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            result: Tensor = self.model(input_ids=tokens, attention_mask=attention_mask).logits
            return result

    scorer = Scorer().eval()
    found = scores(ContributionWeights(scorer.score), token_ids())
    assert torch.allclose(found, scores(ContributionWeights(llama()), token_ids()), atol=1e-6)


@pytest.mark.parametrize("index", [np.int64(2), torch.tensor(2), 2, -7])
def test_any_whole_number_is_an_index(index: Any) -> None:
    method = ContributionWeights(mistral())
    found = scores(method, token_ids(), queries=index)
    assert torch.equal(found, scores(method, token_ids(), queries=slice(2, 3)))


@pytest.mark.parametrize("queries", [True, 1.5, slice(None, None, -1), "first"])
def test_queries_that_are_not_an_index_are_refused(queries: Any) -> None:
    with pytest.raises(ValueError, match="is unknown: give 'all', an index or a slice"):
        TokenScores(ContributionWeights(mistral()), queries=queries)


def test_layers_share_one_view_of_their_mask() -> None:
    masks: list[Any] = []  # kept, so that no id is used again

    def on_layer(execution: Any, layer: functional.AttentionLayer) -> None:
        masks.append(layer.mask)

    for implementation in ("sdpa", "eager"):
        masks.clear()
        model = llama()
        model.set_attn_implementation(implementation)
        ContributionWeights(model).observe(padded_batch("left")[0], None, on_layer)
        assert len(masks) == 2
        assert masks[0] is masks[1]
