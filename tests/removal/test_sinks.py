"""Sinks by each representation, and how much attention they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw.removal.sinks import find_sinks, first_token_mass, sink_rate, sinks_among
from support import reference
from support.inputs import padded_batch, position_ids, token_ids
from support.models import MODELS, SIZES, build, llama
from support.reference import eager_layers
from support.state import state_of


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def norms_before_attention(model: nn.Module) -> list[nn.Module]:
    names = ("input_layernorm", "ln_1")
    return [m for n, m in model.named_modules() if n.rpartition(".")[2] in names]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("space", ["normed", "residual"])
def test_sinks_are_found_by_the_states_around_the_norm(
    model: nn.Module, space: Any, side: str
) -> None:
    inputs, real = padded_batch(side)
    states: list[Tensor] = []
    handles = [
        norm.register_forward_hook(
            lambda m, args, out: states.append(out if space == "normed" else args[0])
        )
        for norm in norms_before_attention(model)
    ]
    with torch.no_grad():
        model(**inputs, position_ids=position_ids(real))
    for handle in handles:
        handle.remove()
    before = state_of(model)
    for threshold in (0.95, 0.3, -0.2):
        found = find_sinks(model, inputs, space=space, threshold=threshold)
        expected = [reference.sinks(x, real, threshold) for x in states]
        assert len(found) == 2
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert any(x.sum() > len(real) for x in found)
    assert state_of(model) == before


@pytest.mark.parametrize("space", ["key", "value"])
def test_sinks_are_found_by_keys_and_values(space: Any) -> None:
    model = llama()
    seen = eager_layers(model, input_ids=token_ids())
    real = torch.ones(2, 9, dtype=torch.bool)
    found = find_sinks(model, token_ids(), space=space, threshold=0.2)
    if space == "value":
        for x, layer in zip(found, seen, strict=True):
            states = layer.value.transpose(1, 2).flatten(2)
            assert torch.equal(x, reference.sinks(states, real, 0.2))
    assert all(x[:, 0].all() for x in found)


def test_a_planted_copy_of_the_first_token_is_a_sink() -> None:
    states = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    states[0, 4] = 3 * states[0, 0]
    states[1, 2] = -states[1, 1]
    real = torch.tensor([[True] * 6, [False] + [True] * 5])
    assert sinks_among(states, real).nonzero().tolist() == [[0, 0], [0, 4], [1, 1]]


def test_a_model_that_normalises_afterwards_has_one_state() -> None:
    """BERT's attention reads the residual stream itself."""
    config = transformers.BertConfig(**{**SIZES, "bos_token_id": None, "eos_token_id": None})
    model = build(transformers.BertModel, config)
    for threshold in (0.0, 0.5):
        spaces = [
            find_sinks(model, token_ids(), space=space, threshold=threshold)
            for space in ("normed", "residual")
        ]
        assert all(torch.equal(x, y) for x, y in zip(*spaces, strict=True))


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_mass_and_rate_are_means_over_the_queries_that_see_the_token(side: str) -> None:
    model = llama()
    inputs, real = padded_batch(side)
    seen = eager_layers(model, **inputs, position_ids=position_ids(real))
    mass = first_token_mass(model, inputs)
    assert mass.shape == (2, 2, 4)
    for number, layer in enumerate(seen):
        for b in range(2):
            places = real[b].nonzero()[:, 0].tolist()
            expected = layer.attention[b, :, places, places[0]].mean(-1)
            assert torch.allclose(mass[b, number], expected, atol=1e-5)
    for epsilon in (0.1, 0.3, float(mass.median())):
        expected_rate = float((mass > epsilon).float().mean())
        assert sink_rate(model, inputs, epsilon=epsilon) == pytest.approx(expected_rate)
    assert 0.3 < sink_rate(model, inputs, epsilon=float(mass.median())) < 0.7


def test_bad_choices_are_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="space='logits' is unknown"):
        find_sinks(model, token_ids(), space="logits")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="token=9, but the shortest text has 9"):
        sink_rate(model, token_ids(), token=9)


def test_the_first_token_is_a_sink_whatever_its_state() -> None:
    real = torch.tensor([[False, True, True]])
    assert sinks_among(torch.zeros(1, 3, 4), real).tolist() == [[False, True, False]]


@pytest.mark.parametrize("left", [True, False])
def test_a_token_that_only_longer_texts_have_is_refused(left: bool) -> None:
    model, ids = llama(), token_ids()
    mask = torch.ones_like(ids)
    mask[1, slice(2) if left else slice(-2, None)] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    T = ids.shape[1]
    assert 0 <= sink_rate(model, batch, token=T - 3) <= 1
    refusal = f"token={T - 2}, but the shortest text has {T - 2} tokens"
    with pytest.raises(IndexError, match=refusal):
        sink_rate(model, batch, token=T - 2)
