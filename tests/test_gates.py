"""Gates and norms between the heads and their projection, against ``v~`` made by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import transformers
from models import SIZES, build, llama, look, token_ids
from test_capture import padded_batch, positions, state_of
from test_interventions import removed_layer_by_layer
from torch import Tensor, nn

from captum_cw import (
    ContributionWeights,
    VWAttention,
    VWONAttention,
    remove_tokens,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import AttentionLayer, dense_map, head_share, vw


def afmoe() -> nn.Module:
    if not hasattr(transformers, "AfmoeConfig"):
        pytest.skip("transformers has AFMoE since 5.0")
    """A gate of each feature, and a norm after the projection."""
    config = transformers.AfmoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_dense_layers=1, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    return build(transformers.AfmoeForCausalLM, config)


def bitnet() -> nn.Module:
    """A norm before the projection."""
    config = transformers.BitNetConfig(**SIZES, num_key_value_heads=2)
    model = build(transformers.BitNetForCausalLM, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attn_sub_norm" in name:
                p.normal_(0.5, 0.5)
    return model


class _HeadGate(nn.Module):
    """One factor a head, after the heads are side by side."""

    def __init__(self, o_proj: nn.Linear, gate: nn.Module) -> None:
        super().__init__()
        self.o_proj, self.gate = o_proj, gate
        self.hidden: Tensor = torch.empty(0)

    def forward(self, y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (4, -1)) * self.gate(self.hidden).sigmoid()[..., None]
        return self.o_proj(heads.flatten(2))  # type: ignore[no-any-return]


class _Normed(_HeadGate):
    """PyTorch's own norm before the projection."""

    def forward(self, y: Tensor) -> Tensor:
        return self.o_proj(self.gate(y))  # type: ignore[no-any-return]


def normed() -> nn.Module:
    """A fused norm before the projection."""
    model: Any = llama()
    torch.manual_seed(3)
    for layer in model.model.layers:
        norm = nn.RMSNorm(32, eps=1e-6)
        nn.init.normal_(norm.weight)
        layer.self_attn.o_proj = _Normed(layer.self_attn.o_proj, norm)
    return model.eval()  # type: ignore[no-any-return]


def _keep(attention: Any, args: object, kwargs: dict[str, Tensor]) -> None:
    attention.o_proj.hidden = kwargs["hidden_states"]


def head_gated() -> nn.Module:
    """A gate of each head."""
    model: Any = llama()
    torch.manual_seed(2)
    for layer in model.model.layers:
        layer.self_attn.o_proj = _HeadGate(layer.self_attn.o_proj, nn.Linear(32, 4))
        layer.self_attn.register_forward_pre_hook(_keep, with_kwargs=True)
    return model.eval()  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], Any]] = {
    "afmoe": afmoe,
    "bitnet": bitnet,
    "head-gated": head_gated,
    "rms-norm": normed,
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "vw": VWAttention,
    "vwon": VWONAttention,
    "inter": ContributionWeights,
    "intra": lambda model: ContributionWeights(model, scope="intra"),
}


def gates(model: Any, **inputs: Tensor) -> list[Tensor]:
    """What the heads' values are multiplied by, ``(B, H, T, d_h)``, from the model's formula."""
    model = copy.deepcopy(model)
    found: list[Tensor] = []

    def note(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        if "Norm" in type(module).__name__:
            x = args[0].double()
            eps = module.eps if isinstance(module, nn.RMSNorm) else module.variance_epsilon
            scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            gate = scale * module.weight.double()
        else:
            gate = out.sigmoid()
            if gate.shape[-1] == 4:
                gate = gate.repeat_interleave(8, -1)
        found.append(gate.unflatten(-1, (4, 8)).transpose(1, 2).detach())

    for layer in model.model.layers:
        attention = layer.self_attn
        for place in ("gate_proj", "attn_sub_norm"):
            if hasattr(attention, place):
                getattr(attention, place).register_forward_hook(note)
        if isinstance(attention.o_proj, _HeadGate):
            attention.o_proj.gate.register_forward_hook(note)
    with torch.no_grad():
        model(**inputs)
    return found


def bare(model: Any) -> Any:
    """A copy in which ``o_proj`` is the linear layer again: what ``look`` reads."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if isinstance(layer.self_attn.o_proj, _HeadGate):
            layer.self_attn.o_proj.weight = layer.self_attn.o_proj.o_proj.weight
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_values_are_gated_at_each_query(model: Any, name: str, side: str) -> None:
    inputs, real = padded_batch(side)
    given = {**inputs, "position_ids": positions(real)}
    before = state_of(model)
    maps = METHODS[name](model).attribute(inputs)
    assert state_of(model) == before
    layers = look(bare(model), **given)
    for found, seen, gate in zip(maps, layers, gates(model, **given), strict=True):
        expected = reference.measures(
            seen.attention, seen.value, seen.output_weight, gate=gate
        )[name]  # fmt: skip
        rows = real[:, None, :, None].expand(expected.shape)
        scale = float(expected[rows].abs().max())
        assert torch.allclose(found[rows].double(), expected[rows], atol=1e-4 * scale)
        assert not found[~rows].any()
        without = reference.measures(seen.attention, seen.value, seen.output_weight)[name]
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
    given = {**inputs, "position_ids": positions(real)}
    expected = removed_layer_by_layer(ContributionWeights(model), given, real, which)
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
    """Changes what it is given in place."""

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
def test_what_is_more_than_a_factor_is_refused(kind: type[_Overwriting]) -> None:
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
