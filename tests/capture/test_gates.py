"""Gates and norms between heads and projection, compared with ``v~`` computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ContributionWeights,
    VWAttention,
    VWONAttention,
    remove_tokens,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import AttentionLayer, dense_map, head_share, vw
from support import reference
from support.inputs import padded_batch, position_ids, token_ids
from support.models import (
    GATED_MODELS,
    llama,
    with_bare_projections,
)
from support.reference import eager_layers, gate_factors, logits_removed_layer_by_layer
from support.state import state_of

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "vw": VWAttention,
    "vwon": VWONAttention,
    "inter": ContributionWeights,
    "intra": lambda model: ContributionWeights(model, scope="intra"),
}


@pytest.fixture(params=GATED_MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return GATED_MODELS[request.param]()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_values_are_gated_at_each_query(model: Any, name: str, side: str) -> None:
    inputs, real = padded_batch(side)
    given = {**inputs, "position_ids": position_ids(real)}
    before = state_of(model)
    maps = METHODS[name](model).attribute(inputs)
    assert state_of(model) == before
    layers = eager_layers(with_bare_projections(model), **given)
    for found, seen, gate in zip(maps, layers, gate_factors(model, **given), strict=True):
        tensors = seen.attention, seen.value, seen.output_weight
        expected = reference.measures(*tensors, gate=gate)[name]
        rows = real[:, None, :, None].expand(expected.shape)
        scale = float(expected[rows].abs().max())
        assert torch.allclose(found[rows].double(), expected[rows], atol=1e-4 * scale)
        assert not found[~rows].any()
        without = reference.measures(*tensors)[name]
        if not (name == "intra" and gate.eq(gate[..., :1]).all()):  # a factor of the head cancels
            assert not torch.allclose(without[rows], expected[rows], atol=1e-2 * scale)


def test_contributions_sum_to_one_and_factor(model: Any) -> None:
    ids = token_ids()
    method = ContributionWeights(model)
    c = method.attribute(ids)
    for d, expected in zip(method.decompose(ids), c, strict=True):
        assert torch.allclose(expected.sum((1, 3)), torch.ones(2, 9), atol=1e-5)
        product = d.attention * d.relative_norm * d.cosine
        assert torch.allclose(product, expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(method.head_share(ids), torch.stack([x.sum(3) for x in c], 1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_the_unobserved_model(model: Any, dtype: torch.dtype) -> None:
    model, ids = model.to(dtype), token_ids()
    with torch.no_grad():
        alone = model(ids, logits_to_keep=1).logits
    sums: list[Tensor] = []
    _, output = ContributionWeights(model).observe(
        ids, None, lambda e, x: sums.append(head_share(x).sum(1))
    )
    assert torch.equal(output.logits, alone)
    assert not output.logits.requires_grad
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert len(sums) == 2
    assert all(torch.allclose(s, torch.ones(2, 9), atol=tolerance) for s in sums)


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_online_removal_equals_removal_layer_by_layer(model: Any, which: Any) -> None:
    inputs, real = padded_batch("left")
    given = {**inputs, "position_ids": position_ids(real)}
    expected = logits_removed_layer_by_layer(ContributionWeights(model), given, real, which)
    with remove_tokens(model, "contribution", 0.3, which), torch.no_grad():
        found = model(**given).logits
    assert torch.allclose(found[real], expected[real], atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(**given).logits[real], expected[real], atol=1e-2)


def test_gradients_pass_as_they_do_unobserved(model: Any) -> None:
    """Online removal of nothing is a plain pass, in training too."""
    ids = token_ids()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(logits: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        return [torch.empty(0) if g is None else g for g in found]

    plainly = gradients(model(ids).logits)
    with remove_tokens(model, "contribution", 0.0):
        if any(type(m) is nn.RMSNorm or "sub_norm" in n for n, m in model.named_modules()):
            with pytest.raises(UnsupportedModelError, match="no_grad"):
                model(ids)
            return
        logits = model(ids).logits
    observed = gradients(logits)
    assert any(g.abs().max() > 0 for g in plainly if g.numel())
    assert all(torch.equal(a, b) for a, b in zip(plainly, observed, strict=True))


class _Overwriting(nn.Module):
    """Changes its input in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, y: Tensor) -> Tensor:
        y.mul_(2)
        return self.inner(y)  # type: ignore[no-any-return]


class _Squared(_Overwriting):
    def forward(self, y: Tensor) -> Tensor:
        return self.inner(y * y.abs())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [_Overwriting, _Squared])
def test_anything_but_factors_is_refused(kind: type[_Overwriting]) -> None:
    model: Any = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj = kind(model.model.layers[1].self_attn.o_proj)
        alone = model(token_ids()).logits
    model.eval()
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.1.self_attn'"):
        ContributionWeights(model).attribute(token_ids())
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, alone)


def test_norms_of_gated_values_are_exact_for_small_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 2, 3, 3, generator=generator)
    v = torch.randn(1, 1, 3, 4, generator=generator)
    w = torch.randn(2, 4, 6, generator=generator)
    gate = 10.0 ** torch.randint(-6, 3, (1, 2, 3, 4), generator=generator)
    layer = AttentionLayer.from_tensors(a, v, w)
    layer = AttentionLayer(**{**vars(layer), "gate": gate})
    expected = reference.measures(a, v, w, gate=gate)["vw"]
    assert torch.allclose(dense_map(layer, vw).double(), expected, rtol=1e-4)
