"""Passes that repeat a known one: equal results, changes that are noticed, and few waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_cw import AttentionWeights, ContributionWeights, TokenScores, VWAttention
from captum_cw.capture import known_passes, run
from captum_cw.capture.known_passes import KnownObservation
from support.inputs import padded_batch, token_ids
from support.models import MODELS, SIZES, gpt2, llama

#: The operations that wait until a device has finished.
WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func._schema.name in WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def finished(monkeypatch: pytest.MonkeyPatch) -> list[KnownObservation]:
    """The observations of known passes that have found everything as before."""
    done: list[KnownObservation] = []
    check = KnownObservation._check_finished

    def check_and_count(self: KnownObservation) -> None:
        check(self)
        done.append(self)

    monkeypatch.setattr(KnownObservation, "_check_finished", check_and_count)
    return done


def scores(model: nn.Module, inputs: Any, **options: Any) -> Tensor:
    found: Tensor = TokenScores(
        ContributionWeights(model), layers=None, heads=None, **options
    ).attribute(inputs)
    return found


def observed_in_full(model: nn.Module, inputs: Any, **options: Any) -> Tensor:
    known_passes._memory.pop(model, None)
    return scores(model, inputs, **options)


#: The models whose output projections are plain linear layers.
KNOWN = [name for name in MODELS if name != "gpt2"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("queries", ["all", -1, slice(-3, None)])
def test_a_repeated_pass_gives_the_same_scores(
    name: str, side: str, queries: Any, finished: list[KnownObservation]
) -> None:
    model, (inputs, _) = MODELS[name](), padded_batch(side)
    first = scores(model, inputs, queries=queries)
    assert torch.equal(scores(model, inputs, queries=queries), first)
    assert bool(finished) == (name in KNOWN)


def test_a_simple_model_is_known_after_one_pass(finished: list[KnownObservation]) -> None:
    model, ids = llama(), token_ids()
    scores(model, ids)
    assert not finished
    scores(model, ids)
    scores(model, ids)
    assert len(finished) == 2
    scores(model, ids[:, :-1])  # another shape
    assert len(finished) == 2
    assert not model.model.layers[0].self_attn.o_proj._forward_hooks


def test_batches_with_and_without_padding_are_known_in_turn(
    finished: list[KnownObservation],
) -> None:
    model, (padded, _) = llama(), padded_batch("right")
    whole = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    for inputs in (whole, padded):
        scores(model, inputs)
    for inputs in (whole, padded, whole):
        found = scores(model, inputs)
    assert len(finished) == 3
    assert torch.equal(found, observed_in_full(model, whole))


def test_a_model_that_always_differs_is_observed_in_full_at_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids, tried = llama(), token_ids(), []

    def fail(self: KnownObservation) -> None:
        tried.append(self)
        raise known_passes.UnknownPassError

    monkeypatch.setattr(KnownObservation, "_check_finished", fail)
    monkeypatch.setattr(known_passes, "FAILURES", 2)
    for _ in range(6):
        scores(model, ids)
    assert len(tried) == 3


def test_a_model_with_another_kind_of_projection_is_not_known(
    finished: list[KnownObservation],
) -> None:
    model, ids = gpt2(), token_ids()
    for _ in range(2):
        scores(model, ids)
    assert not finished


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("queries", ["all", -1])
def test_a_repeated_pass_waits_equally_often_for_any_number_of_layers(
    side: str, queries: Any, finished: list[KnownObservation]
) -> None:
    inputs, _ = padded_batch(side)
    counts = []
    for layers in (2, 5):
        torch.manual_seed(0)
        model = llama_of(layers)
        scores(model, inputs, queries=queries)
        with Waits() as waits:
            scores(model, inputs, queries=queries)
        counts.append(waits.count)
    assert len(finished) == 2
    assert counts[0] == counts[1] > 0


def llama_of(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        **{**SIZES, "num_hidden_layers": layers}, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def new_weights(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)


def new_projection(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj = nn.Linear(32, 32, bias=True).eval()


def two_products(model: Any) -> None:
    parts = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    model.model.layers[1].self_attn.o_proj = nn.Sequential(*parts).eval()


def hooked_projection(model: Any) -> None:
    def double(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        return 2 * result

    model.model.layers[0].self_attn.o_proj.register_forward_hook(double)


def gated_heads(model: Any) -> None:
    def gate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * torch.linspace(0.5, 2, 32),)

    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(gate)


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def other_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


CHANGES = [
    new_weights,
    new_projection,
    two_products,
    hooked_projection,
    gated_heads,
    eager,
    other_scaling,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("queries", ["all", -1])
def test_a_changed_model_is_noticed(change: Callable[[Any], None], queries: Any) -> None:
    model, ids = llama(), token_ids()
    torch.manual_seed(0)
    before = [scores(model, ids, queries=queries) for _ in range(2)][1]
    change(model)
    found = scores(model, ids, queries=queries)
    torch.testing.assert_close(found, observed_in_full(model, ids, queries=queries))
    if change not in (eager, hooked_projection):  # which change no weight of the first layer
        assert not torch.allclose(found, before, atol=1e-4)


def test_head_outputs_that_are_overwritten_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), token_ids()
    for _ in range(2):
        scores(model, ids)
    kind = type(model.model.layers[0].self_attn.o_proj)
    own = kind.__call__

    def call(self: nn.Module, x: Tensor) -> Any:
        is_projection = self is model.model.layers[0].self_attn.o_proj
        return own(self, x.mul_(2) if is_projection else x)

    monkeypatch.setattr(kind, "__call__", call)
    with pytest.raises(run.UnsupportedModelError, match=r"layers\.0\.self_attn"):
        scores(model, ids)


def test_a_broken_layer_is_named_by_the_pass_in_full() -> None:
    model, ids = llama(), token_ids()
    for _ in range(2):
        scores(model, ids)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn' is NaN"):
        scores(model, ids)


def test_recomputed_weights_that_no_longer_fit_are_noticed(
    monkeypatch: pytest.MonkeyPatch, finished: list[KnownObservation]
) -> None:
    model, ids = llama(), token_ids()
    for _ in range(2):
        expected = scores(model, ids)
    assert len(finished) == 1
    real = torch.nn.functional.scaled_dot_product_attention

    def halved(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return real(query / 2, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", halved)
    with pytest.raises(run.UnsupportedModelError, match="do not give the head outputs"):
        scores(model, ids)
    assert len(finished) == 1
    monkeypatch.undo()
    assert torch.equal(scores(model, ids), expected)


def test_measures_of_other_queries_are_those_of_the_whole_layer() -> None:
    model, (inputs, real) = llama(), padded_batch("right")
    maps = torch.stack(VWAttention(model).attribute(inputs), 1)
    found = TokenScores(VWAttention(model), layers=None, heads=None, queries=-1).attribute(inputs)
    for b, mask in enumerate(real):
        last = int(mask.nonzero().max())
        torch.testing.assert_close(found[b], maps[b, :, :, last], atol=1e-6, rtol=1e-6)


class Placed(AttentionWeights):
    """A measure that depends on the places of queries: it counts from each query back."""

    @staticmethod
    def measure(layer: Any) -> Any:
        keys = torch.arange(layer.S)

        def block(a: Tensor, rows: slice) -> Tensor:
            places = torch.arange(rows.start, rows.stop)[:, None] + layer.S - layer.T
            return a.mul_((places - keys[: a.shape[-1]]).clamp(min=0))

        return block


@pytest.mark.parametrize("side", ["left", "right"])
def test_measures_of_users_see_the_places_of_queries(side: str) -> None:
    model, (inputs, real) = llama(), padded_batch(side)
    found = TokenScores(Placed(model), "sum", layers=None, heads=None, queries=-1).attribute(inputs)
    maps = Placed(model).attribute(inputs)
    for b in range(2):
        last = int(real[b].nonzero()[-1])
        for layer, x in enumerate(maps):
            torch.testing.assert_close(found[b, layer], x[b, :, last])
