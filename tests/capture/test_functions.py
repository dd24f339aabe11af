"""Attention that models compute by themselves: PyTorch's own modules, and written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_cw import (
    ContributionWeights,
    TokenScores,
    remove_tokens,
    remove_values,
)
from captum_cw.capture import UnsupportedModelError, register_adapter
from captum_cw.removal.sinks import find_sinks
from support import reference
from support.measures import check_measures
from support.reference import multihead_measures, projection_measures

B, T, H, D = 2, 7, 4, 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def states(n: int = T) -> Tensor:
    return torch.randn(B, n, D)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


class Written(nn.Module):
    """Causal attention by hand, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(z) for z in self.qkv(x).chunk(3, -1))
        return self.out(getattr(self, self.way)(q, k, v, x.shape[1]))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return self.drop(F.softmax(logits.masked_fill(future, -1e4), dim=-1))

    def fused(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).contiguous().view(-1, n, D)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def product(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        return (self.weights(q, k) @ v).permute(0, 2, 1, 3).reshape(-1, n, D)

    def folded(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        q, k, v = (x.reshape(-1, n, D // H) for x in (q, k, v))
        y = torch.bmm(self.weights(q, k), v)
        return y.view(-1, H, n, D // H).transpose(1, 2).reshape(-1, n, D)

    def summed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        y = torch.einsum("bhij,bjhd->bihd", self.weights(q, k), v.transpose(1, 2))
        return y.reshape(-1, n, D)

    def summed_last(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        y = torch.einsum("bjhd, bhij -> bihd", v.transpose(1, 2), self.weights(q, k))
        return y.reshape(-1, n, D)

    def right(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            q, k, v = (heads(z) for z in self.qkv(x).chunk(3, -1))
            return projection_measures(self.weights(q, k), v, self.out.weight)


WAYS = ["fused", "masked", "product", "folded", "summed", "summed_last"]


@pytest.mark.parametrize("way", WAYS)
def test_attention_written_by_hand(way: str) -> None:
    module, x = Written(way).eval(), states()
    check_measures(module, x, module.right(x))


@pytest.mark.parametrize("way", WAYS)
def test_scores_count_the_queries_that_see_a_key(way: str) -> None:
    module, x = Written(way).eval(), states()
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T)
    right = reference.token_scores(module.right(x)["inter"], visible, "mean")
    found = TokenScores(ContributionWeights(module), layers=None, heads=None).attribute(x)
    assert torch.allclose(found[:, 0].double(), right, atol=1e-5)


def test_attention_with_heads_folded_into_examples_by_einsum() -> None:
    class Folded(Written):
        def folded(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
            q, k, v = (x.reshape(-1, n, D // H) for x in (q, k, v))
            y = torch.einsum("bij,bjd->bid", self.weights(q, k), v)
            return y.view(-1, H, n, D // H).transpose(1, 2).reshape(-1, n, D)

    module, x = Folded("folded").eval(), states()
    check_measures(module, x, module.right(x))
    masks = [torch.rand(B, H, T) < 0.4]
    other = Written("product").eval()
    other.load_state_dict(module.state_dict())
    with torch.no_grad(), remove_values(module, masks):
        found = module(x)
    with torch.no_grad(), remove_values(other, masks):
        assert torch.allclose(found, other(x), atol=1e-6)


def test_attention_in_a_part_of_the_module() -> None:
    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    class Parted(Written):
        def __init__(self) -> None:
            super().__init__("parted")
            self.core = Core()

        def parted(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
            return self.core(q, k, v).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]

    module, x = Parted().eval(), states()
    check_measures(module, x, module.right(x))


def test_values_that_all_examples_share() -> None:
    class Shared(Written):
        def fused(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
            y = F.scaled_dot_product_attention(q, k[:1], v[:1])
            return y.transpose(1, 2).flatten(2)

    c = ContributionWeights(Shared("fused").eval()).attribute(states())[0]
    assert torch.allclose(c.sum((1, 3)), torch.ones(B, T), atol=1e-5)


class TokensFirst(Written):
    """Its stream is (T, B, d)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (H, -1)).permute(1, 2, 0, 3) for z in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.permute(2, 0, 1, 3).flatten(2))  # type: ignore[no-any-return]


class Untransposed(Written):
    """Confuses tokens and heads, as if a transpose were forgotten."""

    def fused(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).reshape(-1, n, D)


@pytest.mark.parametrize("kind", [TokensFirst, Untransposed])
@pytest.mark.parametrize("bias", [True, False])
def test_head_outputs_in_another_order_are_refused(kind: type[Written], bias: bool) -> None:
    module = kind("fused").eval()
    module.out = nn.Linear(D, D, bias=bias)
    with pytest.raises(UnsupportedModelError, match="output projection"):
        ContributionWeights(module).attribute(states())


def test_a_bias_that_is_added_in_place_is_not_part_of_the_output() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))

        def forward(self, y: Tensor) -> Tensor:
            out = F.linear(y, self.weight)
            out += self.bias
            return out

    module, x = Written("fused"), states()
    inner = Biased()
    module.out = inner  # type: ignore[assignment]
    check_measures(module.eval(), x, module.right(x))


def test_linear_attention_is_left_out() -> None:
    class Linear(Written):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(z) for z in self.qkv(x).chunk(3, -1))
            y = q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)
            return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    for n in (T, D // H):  # where there are as many tokens as features, too
        model = nn.Sequential(Linear("fused"), Written("product")).eval()
        with pytest.warns(UserWarning, match="'0' seems to compute attention.*left out"):
            maps = ContributionWeights(model).attribute(states(n))
        assert [c.shape for c in maps] == [(B, H, n, n)]


def test_a_softmax_over_other_things_than_keys_is_left_out() -> None:
    class Latent(Written):
        """A softmax over features, times a table that all tokens share."""

        def __init__(self) -> None:
            super().__init__("fused")
            self.table = nn.Parameter(torch.randn(B, H, D // H, D // H))

        def forward(self, x: Tensor) -> Tensor:
            y = heads(x).softmax(-1) @ self.table
            return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model = nn.Sequential(Latent(), Written("product")).eval()
    with pytest.warns(UserWarning, match="'0' seems to compute attention.*left out"):
        maps = ContributionWeights(model, kind="all").attribute(states())
    assert [c.shape for c in maps] == [(B, H, T, T)]


def test_attention_inside_of_a_torch_function_is_named() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)[0]

    model = nn.Sequential(Written("product"), Own(D, H)).eval()
    with pytest.warns(UserWarning, match="'1' seems to compute attention.*left out"):
        assert len(ContributionWeights(model).attribute(states())) == 1


def test_a_position_bias_does_not_hide_keys() -> None:
    """A slope of one per token takes all weight from far keys, but they are still visible."""

    class Sloping(Written):
        def bias(self, n: int) -> Tensor:
            distance = torch.arange(n)[:, None] - torch.arange(n)
            slopes = torch.tensor([1.0, 0.5, 0.25, 0.1])[:, None, None]
            return (-slopes * distance).masked_fill(distance < 0, -torch.inf)

        def weights(self, q: Tensor, k: Tensor) -> Tensor:
            return F.softmax(q @ k.mT / q.shape[-1] ** 0.5 + self.bias(q.shape[2]), dim=-1)

        def masked(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
            y = F.scaled_dot_product_attention(q, k, v, self.bias(n)[None])
            return y.transpose(1, 2).flatten(2)

    x, scores = torch.randn(1, 1500, D), []
    for way in ("product", "masked"):
        torch.manual_seed(0)
        method = ContributionWeights(Sloping(way).eval())
        scores.append(TokenScores(method, heads=None).attribute(x))
    assert torch.allclose(*scores, rtol=1e-3, atol=1e-7)


def test_the_kind_is_recognised_by_numbers_not_by_objects() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(D)
            self.attention = nn.MultiheadAttention(D, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(self.norm(x), self.norm(x), self.norm(x))[0]
            return x + out

    assert len(ContributionWeights(Thrice().eval(), kind="self").attribute(states())) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_remaining_values_are_attributed_after_a_removal(way: str) -> None:
    model, x = Blocks(way).eval(), states()
    masks = [torch.zeros(B, H, T, dtype=torch.bool) for _ in range(2)]
    masks[1][:, :, 2] = True
    with remove_values(model, masks):
        maps = ContributionWeights(model).attribute(x)
    assert not maps[1][..., 2].any()
    assert maps[0][..., 2].any()


def test_ranking_the_tokens_of_two_texts_is_refused() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, 32, batch_first=True), 2).eval()
    for scoring in ("online", "clean"):
        with (
            torch.no_grad(),
            remove_tokens(model, "contribution", 0.5, scoring=scoring),  # type: ignore[arg-type]
            pytest.raises(UnsupportedModelError, match="multihead_attn.*cross-attention"),
        ):
            model(states(), states())


def test_sinks_of_a_model_with_tokens_first() -> None:
    for n in (T, B):  # as many tokens as examples, too
        x = states(n)
        x[:, 1] = 2 * x[:, 0]
        found = []
        for batch_first in (True, False):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(D, H, 32, batch_first=batch_first)
            model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
            found.append(find_sinks(model, x if batch_first else x.transpose(0, 1))[0])
        assert torch.equal(*found)
        assert found[0][:, :2].all()


class Blocks(nn.Module):
    """Two layers of attention and a residual stream."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Written(way) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("way", WAYS)
def test_values_are_removed_by_head(way: str) -> None:
    model, x = Blocks(way).eval(), states()
    masks = [torch.rand(B, H, T) < 0.4 for _ in range(2)]
    with torch.no_grad():
        expected = x
        for layer, mask in zip(model.layers, masks, strict=True):
            assert isinstance(layer, Written)
            q, k, v = (heads(z) for z in layer.qkv(expected).chunk(3, -1))
            y = layer.weights(q, k) @ v.masked_fill(mask[..., None], 0)
            expected = expected + layer.out(y.transpose(1, 2).flatten(2))
        clean = model(x)
        with remove_values(model, masks):
            found = model(x)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(model(x), clean)


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_all_ways_remove_the_same_tokens(scoring: Any) -> None:
    outputs = []
    x = states()
    for way in WAYS:
        torch.manual_seed(1)
        model = Blocks(way).eval()
        with torch.no_grad(), remove_tokens(model, "contribution", 0.5, scoring=scoring):
            outputs.append(model(x))
    for output in outputs[1:]:
        assert torch.allclose(output, outputs[0], atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_an_observed_model_computes_the_same(way: str) -> None:
    model, x = Blocks(way).eval(), states()
    with torch.no_grad():
        _, observed = ContributionWeights(model).observe(x, None, lambda e, layer: None)
        assert torch.equal(observed, model(x))


def test_attention_over_other_things_than_tokens_is_left_out() -> None:
    class Depth(nn.Module):
        """Each token attends to its own states in earlier layers."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.query = Written("fused"), nn.Parameter(torch.randn(D))

        def forward(self, x: Tensor) -> Tensor:
            both = torch.stack([x, self.inner(x)], 2)  # (B, T, 2, D)
            query = self.query.expand(*x.shape[:2], 1, D)
            return F.scaled_dot_product_attention(query, both, both)[:, :, 0]

    method = ContributionWeights(Depth().eval())
    with pytest.warns(UserWarning, match="'Depth' seems to compute attention.*left out"):
        assert [c.shape for c in method.attribute(states())] == [(B, H, T, T)]
    assert method.layers == ["inner"]


def test_attention_that_is_left_out_is_named() -> None:
    class Windows(nn.Module):
        """Attention within windows of two tokens, beside attention between all of them."""

        def __init__(self) -> None:
            super().__init__()
            self.all, self.near = Written("product"), Near()

        def forward(self, x: Tensor) -> Tensor:
            return self.near(self.all(x))

    class Near(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pairs = x.unflatten(1, (-1, 1, 2))
            return (pairs @ pairs.mT).softmax(-1).matmul(pairs).flatten(1, 3)

    with pytest.warns(UserWarning, match="'near' seems to compute attention.*left out"):
        maps = ContributionWeights(Windows().eval()).attribute(states(8))
    assert len(maps) == 1


def test_dropout_that_stays_on_is_refused() -> None:
    class Dropping(Written):
        def fused(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).transpose(1, 2).flatten(2)

    with pytest.raises(UnsupportedModelError, match="Dropping drops attention weights"):
        ContributionWeights(Dropping("fused").eval()).attribute(states())


# ---------------------------------------------------------------------------------------------
# PyTorch's own


def perturbed(module: nn.Module) -> nn.Module:
    """With biases that are not zero."""
    for name, p in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    return module.eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masking", ["none", "causal", "float", "by head", "padding", "both"])
def test_multihead_attention(batch_first: bool, need_weights: bool, masking: str) -> None:
    module = perturbed(nn.MultiheadAttention(D, H, batch_first=batch_first))
    assert isinstance(module, nn.MultiheadAttention)
    x = states()
    given = x if batch_first else x.transpose(0, 1)
    kwargs: dict[str, Any] = {"query": given, "key": given, "value": given}
    kwargs["need_weights"] = need_weights
    visible = torch.ones(B, H, T, T, dtype=torch.bool)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, -2:] = True
    if masking in ("causal", "both"):
        kwargs["attn_mask"] = future
        visible &= ~future
    if masking == "float":
        kwargs["attn_mask"] = torch.zeros(T, T).masked_fill(future, -torch.inf)
        visible &= ~future
    if masking == "by head":
        hidden = torch.rand(B * H, T, T) < 0.3
        hidden[:, :, 0] = False
        kwargs["attn_mask"] = hidden
        visible &= ~hidden.view(B, H, T, T)
    if masking in ("padding", "both"):
        kwargs["key_padding_mask"] = padding
        visible &= ~padding[:, None, None]
    right = multihead_measures(module, x, x, visible)
    if masking in ("padding", "both"):
        right = {n: g.masked_fill(padding[:, None, :, None], 0) for n, g in right.items()}
    check_measures(module, kwargs, right)
    with torch.no_grad():
        alone = module(**kwargs)
        _, seen = ContributionWeights(module).observe(kwargs, None, lambda e, layer: None)
    # Not to the last bit: while it is observed, the module does not take its fused path.
    assert torch.allclose(alone[0], seen[0], atol=1e-6)
    assert (alone[1] is None) == (seen[1] is None)
    if alone[1] is not None:
        assert torch.allclose(alone[1], seen[1], atol=1e-6)


def test_multihead_attention_between_sequences_of_other_widths() -> None:
    module = perturbed(nn.MultiheadAttention(D, H, kdim=6, vdim=6, batch_first=True))
    assert isinstance(module, nn.MultiheadAttention)
    q, kv = states(), torch.randn(B, 5, 6)
    inputs = {"query": q, "key": kv, "value": kv}
    check_measures(
        module, inputs, multihead_measures(module, q, kv, torch.ones(1, 1, T, 5, dtype=torch.bool))
    )
    with pytest.raises(ValueError, match="kind='self', but all 1 .* are of the kind 'cross'"):
        ContributionWeights(module).attribute(inputs)


def test_multihead_attention_of_one_example() -> None:
    module = perturbed(nn.MultiheadAttention(D, H))
    assert isinstance(module, nn.MultiheadAttention)
    x = states()[:1]
    inputs = dict.fromkeys(("query", "key", "value"), x[0])
    check_measures(
        module, inputs, multihead_measures(module, x, x, torch.ones(1, 1, T, T, dtype=torch.bool))
    )


@pytest.mark.parametrize("option", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_multihead_attention_with_a_key_that_is_not_a_token_is_refused(
    option: dict[str, bool],
) -> None:
    module = nn.MultiheadAttention(D, H, batch_first=True, **option).eval()
    with pytest.raises(UnsupportedModelError, match="a key that is not a token"):
        ContributionWeights(module).attribute(dict.fromkeys(("query", "key", "value"), states()))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_transformer_encoder_though_it_has_a_fused_path(norm_first: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = states()
    kwargs: dict[str, Any] = {"src": x}
    real = torch.ones(B, T, dtype=torch.bool)
    if padded:
        real[1, -2:] = False
        kwargs["src_key_padding_mask"] = ~real
    seen: list[Tensor] = []
    with torch.no_grad():
        plain = model(**kwargs)
        states_now = x
        for block in model.layers:
            assert isinstance(block, nn.TransformerEncoderLayer)
            inside = block.norm1(states_now) if norm_first else states_now
            right = multihead_measures(block.self_attn, inside, inside, real[:, None, None])[
                "inter"
            ]
            seen.append(right.masked_fill(~real[:, None, :, None], 0))
            hidden = None if real.all() else ~real
            states_now = block(states_now, src_key_padding_mask=hidden)
    found = ContributionWeights(model).attribute(kwargs)
    for a, b in zip(found, seen, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(**kwargs), plain)  # left as it was


def test_transformer_decoder_has_both_kinds() -> None:
    layer = nn.TransformerDecoderLayer(D, H, 32, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = states(), states(5)
    inputs = {"tgt": x, "memory": memory}
    shapes = {
        kind: [tuple(c.shape) for c in ContributionWeights(model, kind=kind).attribute(inputs)]
        for kind in ("self", "cross", "all")
    }
    own_, other = (B, H, T, T), (B, H, T, 5)
    assert shapes == {"self": [own_] * 2, "cross": [other] * 2, "all": [own_, other] * 2}
    same = {"tgt": x, "memory": states()}  # of one length: told by what the module was given
    assert len(ContributionWeights(model, kind="cross").attribute(same)) == 2
    named = ContributionWeights(model, model.layers[1].multihead_attn)  # type: ignore[union-attr]
    assert named.attribute(inputs).shape == other


def test_values_of_pytorchs_own_modules_are_removed() -> None:
    layer = nn.TransformerEncoderLayer(D, H, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), states()
    masks = [torch.ones(B, H, T, dtype=torch.bool) for _ in range(2)]
    with torch.no_grad(), remove_values(model, masks):
        removed = model(x)
    with torch.no_grad():
        expected = x
        for block in model.layers:
            assert isinstance(block, nn.TransformerEncoderLayer)
            expected = block.norm1(expected + block.self_attn.out_proj.bias)
            expected = block.norm2(expected + block.linear2(F.relu(block.linear1(expected))))
    assert torch.allclose(removed, expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Adapters


class Looped(Written):
    """Computes heads in a loop, which is not recognised."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.split(D // H, -1) for z in self.qkv(x).chunk(3, -1))
        parts = [self.weights(a, b) @ c for a, b, c in zip(q, k, v, strict=True)]
        return self.out(torch.cat(parts, -1))


@pytest.fixture
def _adapters() -> Any:
    from captum_cw.capture import adapters

    before = dict(adapters._adapters)
    yield
    adapters._adapters.clear()
    adapters._adapters.update(before)


def adapt(change: Callable[[Tensor], Tensor]) -> None:
    @register_adapter(Looped)
    def see(module: Looped, x: Tensor) -> Tensor:
        q, k, v = (heads(z) for z in module.qkv(x).chunk(3, -1))
        return change(module.out(module.fused(q, k, v, x.shape[1])))


@pytest.mark.usefixtures("_adapters")
def test_an_adapter_makes_attention_visible() -> None:
    module, x = Looped("fused").eval(), states()
    with pytest.raises(UnsupportedModelError):
        ContributionWeights(module).attribute(x)
    adapt(lambda out: out)
    check_measures(module, x, module.right(x))
    assert "forward" not in vars(module)


@pytest.mark.usefixtures("_adapters")
def test_an_adapter_that_computes_something_else_is_refused() -> None:
    adapt(lambda out: 1.01 * out)
    with pytest.raises(UnsupportedModelError, match="adapter for Looped does not return"):
        ContributionWeights(Looped("fused").eval()).attribute(states())
