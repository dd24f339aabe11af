"""Influence across layers: rollout and ALTI, against the definitions in full."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from captum_cw import (
    ALTIWeights,
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
    comprehensiveness,
    functional,
    remove_tokens,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.model import parameters_of
from captum_cw.functional import (
    AttentionLayer,
    FrozenUpdate,
    QueryMask,
    ResidualSum,
    dense_map,
)
from captum_cw.removal.scoring import pair_scorer
from captum_cw.rollout import (
    Rollout,
    alti,
    attention_mixing,
    contribution_mixing,
    norm_mixing,
)
from support import reference
from support.inputs import padded_batch, position_ids, token_ids
from support.models import SIZES, bert, build, gemma2, gpt2, gptj, llama, mistral, olmo2
from support.reference import eager_layers, norm_updates
from support.state import state_of

NO_BOS: dict[str, Any] = {**SIZES, "bos_token_id": None, "eos_token_id": None}


def bert_with_gains() -> Any:
    model: Any = bert(transformers.BertModel, bos_token_id=None, eos_token_id=None)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" in name:
                p.normal_(0.5, 0.5)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "bert": bert_with_gains,
}

# ---------------------------------------------------------------------------------------------
# The definitions, word by word


@dataclass
class Terms:
    """One layer in full: what each token and head adds to each query's stream, float64.

    ``by_head`` ``(B, H, T, S, d)``, ``stream`` and ``result`` ``(B, T, d)``, ``attention``
    ``(B, H, T, S)``.
    """

    attention: Tensor
    by_head: Tensor
    stream: Tensor
    result: Tensor

    @property
    def transformed(self) -> Tensor:
        """``T_i(x_j)``, ``(B, T, S, d)``."""
        terms = self.by_head.sum(1)
        for i in range(terms.shape[1]):
            terms[:, i, i] += self.stream[:, i]
        return terms


def mixing(terms: Terms, name: str) -> Tensor:
    """``M`` of one layer, ``(B, T, T)``, with loops over queries."""
    B, _, T, _ = terms.attention.shape
    out = torch.zeros(B, T, T, dtype=torch.float64)
    parts = terms.transformed
    for b in range(B):
        for i in range(T):
            if name == "attention":
                row = 0.5 * terms.attention[b, :, i].mean(0)
                row[i] += 0.5
            elif name == "vw":
                row = terms.by_head[b, :, i].norm(dim=-1).sum(0)
                row[i] += terms.stream[b, i].norm()
            elif name == "contribution":
                r = parts[b, i].sum(0)
                row = parts[b, i] @ r / (r @ r)
                assert abs(float(row.sum()) - 1) < 1e-9
                row = row.abs()
            else:
                y = terms.result[b, i]
                row = torch.stack([y.abs().sum() - (y - t).abs().sum() for t in parts[b, i]])
                row = row.clamp(min=0)
            out[b, i] = row / row.sum()
    return out


def rolled_out(maps: list[Tensor], real: Tensor) -> Tensor:
    T = maps[0].shape[1]
    product = torch.eye(T, dtype=torch.float64).expand(len(real), T, T)
    both = real[:, :, None] & real[:, None]
    for mixed in maps:
        product = (mixed.nan_to_num() * both) @ product
    return product * both


def inputs_of(modules: list[Any], model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What modules are given in a pass, in order."""
    given: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args[0] if args else kwargs["hidden_states"]).double())

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return given


def in_full(model: Any, inputs: dict[str, Tensor], real: Tensor) -> list[Terms]:
    """All layers of one of the models here."""
    both = (real[:, :, None] & real[:, None])[:, None]
    if isinstance(model, transformers.BertModel):
        return bert_in_full(model, inputs, both)
    given = {**inputs, "position_ids": position_ids(real)}
    seen = eager_layers(model, **given)
    model = copy.deepcopy(model)
    if hasattr(model, "transformer"):
        layers, after = model.transformer.h, [layer.ln_2 for layer in model.transformer.h]
    else:
        layers = model.model.layers
        gemma = hasattr(layers[0], "pre_feedforward_layernorm")
        name = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        after = [getattr(layer, name) for layer in layers]
    streams = inputs_of(list(layers), model, given)
    results = inputs_of(after, model, given)
    maps = norm_updates(model, **given) if len(after) and "pre_feed" in str(layers[0]) else None
    found = []
    for number, layer in enumerate(seen):
        a = layer.attention.double() * both
        v = reference.projected_values(layer.value, layer.output_weight)
        terms = a[..., None] * v[:, :, None]
        if maps is not None:
            terms = torch.einsum("bhtsd,btde->bhtse", terms, maps[number])
        found.append(Terms(a, terms, streams[number], results[number]))
    return found


def bert_in_full(model: Any, inputs: dict[str, Tensor], both: Tensor) -> list[Terms]:
    """Each layer's norm after the sum is linear once its mean and deviation are numbers."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    layers = list(model.encoder.layer)
    streams = inputs_of([layer.attention for layer in layers], model, inputs)
    values: list[Tensor] = []
    for layer in layers:
        layer.attention.self.value.register_forward_hook(lambda m, args, out: values.append(out))
    sums = inputs_of([layer.attention.output.LayerNorm for layer in layers], model, inputs)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    found = []
    for number, layer in enumerate(layers):
        w = layer.attention.output.dense.weight.detach().T.unflatten(0, (4, 8))
        v = values[number].unflatten(-1, (4, 8)).transpose(1, 2)
        a = attentions[number].double() * both
        terms = a[..., None] * reference.projected_values(v, w)[:, :, None]
        norm = layer.attention.output.LayerNorm
        gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
        r = sums[number]
        deviation = (r.var(-1, unbiased=False) + norm.eps).sqrt()

        def linear(x: Tensor, deviation: Tensor, gain: Tensor = gain) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) * gain / deviation

        found.append(
            Terms(
                a,
                linear(terms, deviation[:, None, :, None, None]),
                linear(streams[number], deviation[..., None]),
                linear(r, deviation[..., None]) + bias,
            )
        )
    return found


METHODS: dict[str, Callable[[Any], Any]] = {
    "attention": AttentionWeights,
    "vw": VWAttention,
    "contribution": ContributionWeights,
    "alti": ALTIWeights,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def rollout_rows(method: Any, inputs: Any, T: int = 9) -> Tensor:
    rows: Tensor = TokenScores(method, layers="rollout").rows(inputs, slice(0, T))[0]
    return rows


# ---------------------------------------------------------------------------------------------
# Rollout


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_rollout_is_the_product_of_the_maps_in_full(model: Any, side: str) -> None:
    inputs, real = padded_batch(side)
    layers = in_full(model, inputs, real)
    before = state_of(model)
    for name, method in METHODS.items():
        expected = rolled_out([mixing(terms, name) for terms in layers], real)
        found = rollout_rows(method(model), inputs)
        assert state_of(model) == before
        assert torch.allclose(found.double(), expected, atol=2e-5), name
        assert torch.allclose(found.sum(-1), real.float(), atol=1e-5)
        assert not found[~real].any()
        assert not found.transpose(1, 2)[~real].any()


@pytest.mark.parametrize("side", ["none", "left"])
def test_alti_of_one_layer_is_the_definition(model: Any, side: str) -> None:
    inputs, real = padded_batch(side)
    found = ALTIWeights(model).attribute(inputs)
    assert [x.shape for x in found] == [(2, 1, 9, 9)] * 2
    for x, terms in zip(found, in_full(model, inputs, real), strict=True):
        expected = mixing(terms, "alti").nan_to_num() * real[:, :, None] * real[:, None]
        assert torch.allclose(x[:, 0].double(), expected, atol=2e-5)
        assert x.dtype == torch.float32
        assert not x[:, 0][~real].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "rms"])
@pytest.mark.parametrize("queries", ["all", -1, slice(2, 5)])
def test_scores_reduce_the_rolled_out_map_over_the_queries_that_a_token_reaches(
    reduction: Any, queries: Any
) -> None:
    model = mistral()  # sees three tokens back in each layer, and twice as far in two
    inputs, real = padded_batch("left")
    method = AttentionWeights(model)
    rows = rollout_rows(method, inputs)
    i = torch.arange(9)
    back = i[:, None] - i
    reached = (back >= 0) & (back <= 4) & real[:, :, None] & real[:, None]
    assert torch.equal(rows > 0, reached)
    chosen = torch.zeros_like(real)
    for b in range(2):
        places = real[b].nonzero()[:, 0]
        chosen[b, places if queries == "all" else places[queries]] = True
    visible = (reached & chosen[:, :, None])[:, None]
    expected = reference.token_scores(rows[:, None], visible, reduction)[:, 0]
    scores = TokenScores(method, reduction, layers="rollout", queries=queries)
    assert torch.allclose(scores.attribute(inputs).double(), expected, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", ["rollout", "mean"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_does_not_change_the_other_numbers(name: str, layers: Any, side: str) -> None:
    model = llama()
    inputs, real = padded_batch(side)
    scores = TokenScores(METHODS[name](model), layers=layers, queries=-1)
    together = scores.attribute(inputs)
    alone = scores.attribute(inputs["input_ids"][1:, real[1]])
    assert torch.allclose(together[1, real[1]], alone[0], atol=1e-5)
    assert not together[1, ~real[1]].any()


def test_through_one_layer_a_rollout_is_its_map() -> None:
    model: Any = llama()
    ids = token_ids()
    method = ALTIWeights(model, model.model.layers[1].self_attn)
    assert torch.allclose(rollout_rows(method, ids), method.attribute(ids)[:, 0], atol=1e-6)


def test_vw_and_vwon_mix_alike() -> None:
    """The norm of the output, by which they differ, goes as rows are normalised."""
    model, ids = llama(), token_ids()
    rows = [rollout_rows(method(model), ids) for method in (VWAttention, VWONAttention)]
    assert torch.equal(*rows)


def test_the_method_s_own_space_does_not_matter() -> None:
    model, ids = gemma2(), token_ids()
    rows = [
        rollout_rows(ContributionWeights(model, space=space), ids)  # type: ignore[arg-type]
        for space in ("attention", "residual")
    ]
    assert torch.equal(*rows)


def test_heads_of_attention_may_be_put_together_by_their_maximum() -> None:
    model, ids = llama(), token_ids()
    maps = []
    for a in AttentionWeights(model).attribute(ids):
        mixed = 0.5 * a.amax(1) + 0.5 * torch.eye(9)
        maps.append(mixed / mixed.sum(-1, keepdim=True))
    scores = TokenScores(AttentionWeights(model), "sum", layers="rollout", heads="max")
    assert torch.allclose(scores.attribute(ids), (maps[1] @ maps[0]).sum(1), atol=1e-5)


def test_layers_may_have_different_numbers_of_heads() -> None:
    torch.manual_seed(0)
    path, expected = Rollout(), torch.eye(4, dtype=torch.float64)
    for heads in (3, 1):
        layer = random_layer(1, heads, 4)
        path.add(layer, contribution_mixing)
        expected = mixing(terms_of(layer), "contribution")[0] @ expected
    assert torch.allclose(path.rows()[0], expected, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# One layer, on plain tensors


def random_layer(B: int, H: int, T: int, d: int = 10, *, causal: bool = True) -> AttentionLayer:
    """Float64, with a residual stream and a bias."""
    a = torch.rand(B, H, T, T, dtype=torch.float64)
    mask = QueryMask(T, T, causal=causal)
    a = a.tril() if causal else a
    value = torch.randn(B, 1, T, 3, dtype=torch.float64)
    layer = AttentionLayer.from_tensors(a, value, torch.randn(H, 3, d, dtype=torch.float64), mask)
    stream, bias = (torch.randn(*n, d, dtype=torch.float64) for n in ((B, T), (1,)))
    return replace(layer, residual=ResidualSum(stream, stream + layer.output + bias))


def terms_of(layer: AttentionLayer) -> Terms:
    """Every ``v~_ij^h`` as a vector, with gate, update and norm."""
    assert layer.residual is not None
    a = dense_map(layer, functional.attention)
    B, H, T, S = a.shape
    v = layer.value.expand(B, H, S, 3)[:, :, None].expand(B, H, T, S, 3)
    if layer.gate is not None:
        v = v * layer.gate[:, :, :, None]
    terms = a[..., None] * torch.einsum("bhtse,hed->bhtsd", v, layer.output_weight)
    stream = layer.residual.stream
    for linear in (layer.update, layer.residual.norm):
        if linear is not None:
            terms = linear.without_scale(terms) * linear.scale[:, None, :, None, None]
    norm = layer.residual.norm
    if norm is not None:
        stream = norm.without_scale(stream) * norm.scale[..., None]
    return Terms(a, terms, stream, layer.residual.result)


MIXINGS = {
    "attention": attention_mixing(),
    "vw": norm_mixing,
    "contribution": contribution_mixing,
    "alti": alti,
}


@pytest.mark.parametrize("block", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gate", [None, "feature", "head"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", MIXINGS)
def test_maps_of_a_layer_with_gates_and_norms(
    name: str,
    norms: bool,
    gate: str | None,
    causal: bool,
    block: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    B, H, T, d = 2, 3, 6, 10
    layer = random_layer(B, H, T, d, causal=causal)
    if gate is not None:
        factors = torch.randn(B, H, T, 3 if gate == "feature" else 1, dtype=torch.float64)
        layer = replace(layer, gate=factors.expand(B, H, T, 3))
        heads = torch.einsum("bhte,hed->btd", layer.head_output * factors, layer.output_weight)
        layer = replace(layer, output=heads)
    if norms:
        assert layer.residual is not None
        update, norm = (
            FrozenUpdate(
                torch.randn(d, dtype=torch.float64),
                torch.rand(B, T, dtype=torch.float64) + 0.5,
                centred,
            )
            for centred in (False, True)
        )
        added = update.without_scale(layer.output) * update.scale[..., None]
        total = norm.without_scale(layer.residual.stream + added) * norm.scale[..., None]
        result = total + torch.randn(d, dtype=torch.float64)
        residual = replace(layer.residual, norm=norm, result=result)
        layer = replace(layer, update=update, residual=residual)
    if block is not None:
        monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", block)
    found = dense_map(layer, MIXINGS[name])
    assert found.shape == (B, 1, T, T)
    expected = mixing(terms_of(layer), name)
    # By ALTI, all parts may lead away.
    nothing = expected.isnan().any(-1)
    assert not nothing.all() if name == "alti" else not nothing.any()
    assert torch.allclose(found[:, 0], expected.nan_to_num(), atol=1e-9)
    assert torch.allclose(found[:, 0].sum(-1), (~nothing).double())


def test_alti_sees_small_parts_beside_a_large_stream() -> None:
    """In float32 ``||y|| - ||y - T||`` would be rounding noise."""
    stream = torch.tensor([[[0.0, 0.0], [1e6, 0.0]]])
    value = torch.tensor([[[[3e-3, 4e-3], [1e-3, 0.0]]]])
    a = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
    layer = AttentionLayer.from_tensors(a, value, torch.eye(2)[None], QueryMask(2, 2, causal=True))
    layer = replace(layer, residual=ResidualSum(stream, stream + layer.output))
    first = float(dense_map(layer, alti)[0, 0, 1, 0])
    assert first == pytest.approx(7e-3 / 1e6, rel=1e-3)


def test_parts_that_lead_away_count_nothing_by_alti_and_their_size_by_contribution() -> None:
    a = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    value, stream = torch.tensor([[[[-1.0], [0.0]]]]), torch.tensor([[[3.0], [3.0]]])
    layer = AttentionLayer.from_tensors(a, value, torch.ones(1, 1, 1), QueryMask(2, 2, causal=True))
    layer = replace(layer, residual=ResidualSum(stream, stream + layer.output))
    assert dense_map(layer, alti)[0, 0, 1].tolist() == [0, 1]
    # Shares are -1/2 and 3/2.
    assert dense_map(layer, contribution_mixing)[0, 0, 1].tolist() == [0.25, 0.75]


def test_a_stream_that_is_not_known_is_refused() -> None:
    layer = replace(random_layer(1, 1, 3), residual=None)
    for measure in (norm_mixing, contribution_mixing, alti):
        with pytest.raises(ValueError, match=r"set AttentionLayer\.residual"):
            dense_map(layer, measure)


# ---------------------------------------------------------------------------------------------
# The residual stream of a running model


def falcon() -> Any:
    config = transformers.FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return build(transformers.FalconForCausalLM, config)


def cohere() -> Any:
    return build(transformers.CohereForCausalLM, transformers.CohereConfig(**SIZES))


def granite() -> Any:
    config = transformers.GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.25)
    return build(transformers.GraniteForCausalLM, config)


def albert() -> Any:
    return build(transformers.AlbertModel, transformers.AlbertConfig(**NO_BOS, embedding_size=16))


def modernbert() -> Any:
    config = transformers.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)
    return build(transformers.ModernBertModel, config)


def xlm() -> Any:
    config = transformers.XLMConfig(
        vocab_size=64,
        emb_dim=32,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        bos_index=1,
        eos_index=2,
        pad_index=0,
    )
    return build(transformers.XLMModel, config)


#: Models, and whether the sum goes through a norm before it goes on.
STREAMS: dict[str, tuple[Callable[[], Any], bool]] = {
    "before": (llama, False),
    "after-attention": (gemma2, False),
    "reads-the-stream": (olmo2, False),
    "mlp-beside": (gptj, False),
    "mlp-beside-in-place": (falcon, False),
    "mlp-beside-after": (cohere, False),
    "factor": (granite, False),
    "after-the-sum": (bert_with_gains, True),
    "after-the-sum-one-module": (albert, True),
    "after-the-sum-no-layers": (xlm, True),
    "none-in-the-first-layer": (modernbert, False),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_residual_stream_is_what_the_layer_was_given(name: str) -> None:
    make, normed = STREAMS[name]
    model, ids = make(), token_ids()
    lean = {"logits_to_keep": 1, "use_cache": False}  # as attribution asks for
    lean = {name: x for name, x in lean.items() if name in parameters_of(model)}
    with torch.no_grad():
        alone = model(ids, output_hidden_states=True, **lean)
    found: list[ResidualSum] = []

    def note(execution: Any, layer: AttentionLayer) -> None:
        assert layer.residual is not None
        found.append(layer.residual)
        if layer.residual.norm is None:
            added = layer.output if layer.scale is None else layer.output * layer.scale[..., None]
            # But for the bias, which is the same for all.
            bias = layer.residual.result - layer.residual.stream - added
            assert torch.allclose(bias, bias[:1, :1].expand_as(bias), atol=1e-4)

    _, output = ALTIWeights(model).observe(ids, None, note)
    for residual, hidden in zip(found, alone.hidden_states[:2], strict=True):
        assert torch.allclose(residual.stream, hidden, atol=1e-6)
        assert (residual.norm is not None) == normed
    assert torch.equal(output[0], alone[0])


class _Block(nn.Module):
    """One head, written by hand."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.norm, self.proj, self.factor = nn.LayerNorm(8), nn.Linear(8, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)[:, None]
        y = F.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0]
        return self.factor * x + self.proj(y)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_stream_that_the_layer_was_not_given_is_refused(factor: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_Block(1.0), _Block(factor)).eval()
    x = torch.randn(2, 5, 8)
    rollout = TokenScores(ContributionWeights(model), layers="rollout")
    if factor == 1:
        assert rollout.attribute(x).shape == (2, 5)
        return
    with pytest.raises(UnsupportedModelError, match=r"'1' is added to something .* 'mean'"):
        rollout.attribute(x)
    TokenScores(AttentionWeights(model), layers="rollout").attribute(x)


@pytest.mark.parametrize("name", ["contribution", "alti"])
def test_half_precision(name: str) -> None:
    half = llama().bfloat16()
    # The same numbers, so that only what is rounded on the way differs.
    rows = [
        rollout_rows(METHODS[name](m), token_ids()) for m in (half, copy.deepcopy(half).float())
    ]
    assert float((rows[0] - rows[1]).norm() / rows[1].norm()) < 0.1
    assert torch.allclose(rows[0].sum(-1), torch.ones(2, 9), atol=1e-5)


def test_images_have_influence_too() -> None:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
    )
    model = build(transformers.ViTModel, config)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for method in METHODS.values():
        scores = TokenScores(method(model), layers="rollout", queries=0).attribute(pixels)
        assert scores.shape == (2, 5)
        assert torch.allclose(scores.sum(-1), torch.ones(2), atol=1e-5)


# ---------------------------------------------------------------------------------------------
# In the metric, and beside it


def test_the_metric_takes_scores_of_whole_tokens() -> None:
    model, ids = llama(), token_ids(2, 12)
    methods = {
        "rollout": TokenScores(AttentionWeights(model), "sum", layers="rollout"),
        "contribution": TokenScores(ContributionWeights(model), "sum", layers="rollout"),
        "alti": TokenScores(ALTIWeights(model), "sum", layers="rollout"),
        "alti-mean": TokenScores(ALTIWeights(model), "sum"),
        "alti-bare": ALTIWeights(model),
        "pairs": TokenScores(ContributionWeights(model)),
    }
    metric = ComprehensivenessSufficiency(model, [0.3, 0.6], reduction="sum")
    result = metric.evaluate(methods, ids, show_progress=False)
    for name in methods:
        for deltas in (result.comprehensiveness[name], result.sufficiency[name]):
            assert deltas.isfinite().all()
    assert torch.equal(result.sufficiency["alti-mean"], result.sufficiency["alti-bare"])
    assert "rollout" in result.settings["methods"]["alti"]
    # They are the scores of the model unchanged, though removal is online for pairs.
    for name, method in methods.items():
        if isinstance(method, TokenScores) and name != "pairs":
            given = comprehensiveness(model, ids, method.attribute(ids), [0.3, 0.6])
            assert torch.allclose(result.per_example[name]["comprehensiveness"], given)


def test_the_metric_takes_padded_batches_and_masked_language_models() -> None:
    inputs, _ = padded_batch("left")
    model = llama()
    method = TokenScores(ContributionWeights(model), "sum", layers="rollout")
    assert comprehensiveness(model, inputs, method, [0.5]).isfinite().all()
    masked = build(transformers.BertForMaskedLM, transformers.BertConfig(**NO_BOS))
    found = comprehensiveness(
        masked, token_ids(), ALTIWeights(masked), [0.5], mask_token_id=3, protect_sinks=False
    )
    assert found.isfinite().all()


def test_pairs_cannot_be_ranked_by_scores_of_whole_tokens() -> None:
    model = llama()
    rollout = TokenScores(ContributionWeights(model), layers="rollout")
    for method, named in (
        (rollout, "layers='rollout'"),
        (ALTIWeights(model), "ALTIWeights"),
        (TokenScores(ALTIWeights(model)), "ALTIWeights"),
    ):
        with pytest.raises(ValueError, match=f"{named} scores whole tokens"):
            pair_scorer(method)
    with (
        pytest.raises(ValueError, match="whole tokens, not pairs"),
        remove_tokens(model, rollout, 0.5),
    ):
        pass


def test_generated_text_is_explained_through_all_layers(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    method = TokenScores(AttentionWeights(tiny_model), layers="rollout")
    result = LLMTokenAttribution(method, tiny_tokenizer).attribute("a b c", target="d e")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for o, query in enumerate((2, 3)):
        scores = TokenScores(AttentionWeights(tiny_model), layers="rollout", queries=query)
        assert torch.allclose(result.token_attr[o], scores.attribute(ids)[0, :3], atol=1e-6)


def test_dense_results_of_alti_count_one_map_a_layer() -> None:
    scores = TokenScores(ALTIWeights(llama()), layers=None, heads=None).attribute(token_ids())
    assert scores.shape == (2, 2, 1, 9)
    model: Any = llama()
    one = ALTIWeights(model, model.model.layers[0].self_attn).attribute(token_ids())
    assert one.shape == (2, 1, 9, 9)


# ---------------------------------------------------------------------------------------------
# Refusals


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    return build(transformers.BartModel, config)


@pytest.mark.parametrize("kind", ["self", "cross", "all"])
@pytest.mark.parametrize("length", [7, 9])
@pytest.mark.parametrize("name", ["attention", "contribution"])
def test_encoder_decoders_are_refused(name: str, length: int, kind: Any) -> None:
    model = bart()
    method = {"attention": AttentionWeights, "contribution": ContributionWeights}[name]
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, length)}
    with pytest.raises((ValueError, UnsupportedModelError), match="layers that read"):
        TokenScores(method(model, kind=kind), layers="rollout").attribute(inputs)


def test_the_encoder_alone_is_one_text() -> None:
    model = bart()
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, 7)}
    encoder = [layer.self_attn for layer in model.encoder.layers]
    for method in (AttentionWeights, ContributionWeights):
        scores = TokenScores(method(model, encoder), layers="rollout", queries=-1)
        assert torch.allclose(scores.attribute(inputs).sum(-1), torch.ones(2), atol=1e-5)


def test_choices_that_make_no_sense_are_refused() -> None:
    model = llama()
    contributions, attention = ContributionWeights(model), AttentionWeights(model)
    for method, heads in (
        (attention, "sum"),
        (attention, None),
        (contributions, "max"),
        (VWAttention(model), None),
        (ALTIWeights(model), "sum"),
    ):
        with pytest.raises(ValueError, match=f"heads={heads!r}"):
            TokenScores(method, layers="rollout", heads=heads)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope='intra' refers to the output of one head"):
        TokenScores(ContributionWeights(model, scope="intra"), layers="rollout")
    with pytest.raises(ValueError, match="signed=True, but layers='rollout'"):
        TokenScores(contributions, layers="rollout", signed=True)
    with pytest.raises(ValueError, match="layers='product' is unknown.*'rollout', None"):
        TokenScores(contributions, layers="product")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="queries=9, but example 0 has 9 tokens"):
        TokenScores(attention, layers="rollout", queries=9).attribute(token_ids())


def test_layers_of_other_tokens_are_refused() -> None:
    path = Rollout()
    path.add(random_layer(1, 1, 4), alti, "a")
    with pytest.raises(ValueError, match="'b' has 3 tokens, but the layers before it have 4"):
        path.add(random_layer(1, 1, 3), alti, "b")
    values = torch.ones(1, 1, 3, 2)
    layer = AttentionLayer.from_tensors(torch.rand(1, 1, 2, 3), values, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="'c' has 3 keys for 2 queries"):
        Rollout().add(layer, attention_mixing(), "c")
