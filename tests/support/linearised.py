"""Linearised models written out by hand: what every token alone makes of a prediction.

An activation is kept as a sum of parts ``(P, B, ...)``: one part for each input token, and one for
all constants. A function that is linear is applied to each part. Any other function is replaced by
the linear one that has the same value at the sum: a norm keeps its scale, an activation its ratio
of output to input, attention its weights, and a product gives half to each of its factors. So the
last parts are the shares of the logits, without any gradient. Everything is in float64.

A term ``a_ij v~_j`` of an attention head is pushed through the rest of the model in the same way,
as one more part that does not count in the sums. What it makes of the logits is ``t_ij``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Choose = Callable[[Tensor], Tensor]
"""Chooses the target ``(..., B)`` from logits ``(..., B, T, V)``, as a linear function."""


@dataclass
class Parts:
    """An activation as a sum.

    Args:
        parts: ``(P, B, ...)``. The first ``n`` sum to the activation.
        n: The number of tokens, and one for the constants.
    """

    parts: Tensor
    n: int

    @property
    def value(self) -> Tensor:
        """The activation ``(B, ...)``."""
        return self.parts[: self.n].sum(0)

    def map(self, linear: Callable[[Tensor], Tensor]) -> Parts:
        return Parts(linear(self.parts), self.n)

    def __add__(self, other: Parts | Tensor) -> Parts:
        if isinstance(other, Tensor):  # a constant
            parts = self.parts.clone()
            parts[self.n - 1] += other
            return Parts(parts, self.n)
        P = max(len(self.parts), len(other.parts))
        return Parts(padded(self.parts, P) + padded(other.parts, P), self.n)

    def __mul__(self, by: Tensor | float) -> Parts:
        return self.map(lambda x: x * by)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Parts:
        y = self.map(lambda x: x @ number(weight).T)
        return y if bias is None else y + number(bias)

    def through(self, layer: nn.Module) -> Parts:
        """Apply a linear layer, or GPT-2's Conv1D, whose weight is transposed."""
        w: Any = layer.weight
        w = w if isinstance(layer, nn.Linear) else w.T
        bias: Any = getattr(layer, "bias", None)
        return self.linear(w, bias)

    def activated(self, f: Callable[[Tensor], Tensor]) -> Parts:
        """An elementwise function keeps its ratio; only padding is ever zero."""
        x = self.value
        return self * torch.where(x == 0, 0, f(x) / x)

    def normed(self, gain: Tensor, eps: float, *, bias: Tensor | None = None) -> Parts:
        """RMS norm, or layer norm if there is a bias."""
        y = self if bias is None else self.map(lambda x: x - x.mean(-1, keepdim=True))
        y = y * ((y.value.square().mean(-1, keepdim=True) + eps).rsqrt() * number(gain))
        return y if bias is None else y + number(bias)

    def times(self, other: Parts, product: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> Parts:
        """A product of two activations gives half to each."""
        P = max(len(self.parts), len(other.parts))
        mine, theirs = padded(self.parts, P), padded(other.parts, P)
        return Parts((product(mine, other.value) + product(self.value, theirs)) / 2, self.n)


@dataclass
class Layer:
    """Where the terms of an attention layer are among the parts, ``(H, T, S)`` of them."""

    first: int
    shape: tuple[int, int, int]


@dataclass
class Linearised:
    """A pass of the linearised model.

    Args:
        lengths: The number of tokens of each input by its name.
        layers: The attention layers in the order in which they ran.
        logits: The logits.
    """

    lengths: dict[str, int]
    layers: list[Layer] = field(default_factory=list)
    logits: Parts | None = None
    size: int = 0

    def __post_init__(self) -> None:
        self.size = self.n = sum(self.lengths.values()) + 1

    def embedded(self, name: str, embeddings: Tensor) -> Parts:
        """Return embeddings ``(B, T, d)`` of tokens, each token in a part of its own."""
        B, T, d = embeddings.shape
        parts = torch.zeros(self.n, B, T, d, dtype=torch.float64)
        names = list(self.lengths)
        first = sum(self.lengths[x] for x in names[: names.index(name)])
        for j in range(T):
            parts[first + j, :, j] = number(embeddings[:, j])
        return Parts(parts, self.n)

    def attend(self, logits: Tensor, visible: Tensor, value: Parts, w: Tensor) -> Parts:
        """Apply attention with fixed weights, and the output projection without its bias.

        Args:
            logits: ``(B, H, T, S)``.
            visible: Which keys a query sees, in a shape that expands to that of ``logits``.
            value: ``(B, S, H_kv * d_h)``.
            w: The weight of the output projection, ``(d, H * d_h)``.
        """
        a = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
        H, T, S = a.shape[1:]
        out = number(w).T.unflatten(0, (H, -1))
        v = value.map(lambda x: split(x, x.shape[-1] // out.shape[1]))
        v = v.map(lambda x: x.repeat_interleave(H // x.shape[-3], -3))
        y = torch.einsum("bhts,pbhsd,hde->pbte", a, v.parts, out)
        projected = torch.einsum("bhsd,hde->bhse", v.value, out)
        at = torch.eye(T, dtype=torch.float64)
        terms = torch.einsum("bhts,bhse,tu->htsbue", a, projected, at).flatten(0, 2)
        self.layers.append(Layer(self.size, (H, T, S)))
        y = torch.cat([padded(y, self.size), terms])
        self.size = len(y)
        return Parts(y, self.n)

    def shares(self, choose: Choose) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
        """Return the shares ``(B, T)`` by input, of constants ``(B,)``, and ``t (B, H, T, S)``."""
        assert self.logits is not None
        parts = choose(padded(self.logits.parts, self.size)).T
        *inputs, constants = parts[:, : self.n].split([*self.lengths.values(), 1], 1)
        terms = [
            parts[:, x.first : x.first + math.prod(x.shape)].unflatten(1, x.shape)
            for x in self.layers
        ]
        return dict(zip(self.lengths, inputs, strict=True)), constants[:, 0], terms


def padded(x: Tensor, size: int) -> Tensor:
    return torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])


def number(x: Tensor) -> Tensor:
    return x.detach().double()


def split(x: Tensor, H: int) -> Tensor:
    """``(..., T, H * d_h)`` to ``(..., H, T, d_h)``."""
    return x.unflatten(-1, (H, -1)).transpose(-2, -3)


def causal(real: Tensor, window: int | None = None) -> Tensor:
    """Which keys a query sees, ``(B, 1, T, S)``."""
    T = real.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if window is not None:
        seen &= torch.ones(T, T, dtype=torch.bool).triu(1 - window)
    return seen & real[:, None, None, :]


def positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(-1) - 1).clamp(min=0)


def rotated(x: Tensor, places: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions of ``(B, H, T, d_h)``."""
    angles = places[:, None, :, None] * number(frequencies)
    cos, sin = angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Logits ``(B, H, T, S)`` of queries and grouped keys."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale


def gated(x: Parts, weights: Iterable[Tensor], f: Callable[[Tensor], Tensor]) -> Parts:
    """Apply a gated MLP with the weights of gate, up and down."""
    gate, up, down = weights
    return x.linear(gate).activated(f).times(x.linear(up)).linear(down)


def tanh_gelu(x: Tensor) -> Tensor:
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


def gelu(x: Tensor) -> Tensor:
    return x * (1 + (x / math.sqrt(2)).erf()) / 2


def llama(model: Any, inputs: dict[str, Tensor], real: Tensor) -> Linearised:
    run = Linearised({"input_ids": real.shape[1]})
    x = run.embedded("input_ids", model.model.embed_tokens.weight[inputs["input_ids"]])
    H, eps = model.config.num_attention_heads, model.config.rms_norm_eps
    places, frequencies = positions(real), model.model.rotary_emb.inv_freq
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        y = x.normed(layer.input_layernorm.weight, eps)
        q = split(y.through(attention.q_proj).value, H)
        k = split(y.through(attention.k_proj).value, model.config.num_key_value_heads)
        q, k = (rotated(z, places, frequencies) for z in (q, k))
        v, w = y.through(attention.v_proj), attention.o_proj.weight
        x = x + run.attend(scores(q, k, q.shape[-1] ** -0.5), causal(real), v, w)
        y = x.normed(layer.post_attention_layernorm.weight, eps)
        weights = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        x = x + gated(y, weights, F.silu)
    run.logits = x.normed(model.model.norm.weight, eps).through(model.lm_head)
    return run


def gemma(model: Any, inputs: dict[str, Tensor], real: Tensor) -> Linearised:
    """Gemma 2 or 3: norms after attention and MLP, scaled embeddings, soft-caps, windows."""
    config, rotary, embeddings = model.config, model.model.rotary_emb, model.model.embed_tokens
    root = torch.tensor(config.hidden_size**0.5, dtype=torch.float64)
    scale = getattr(embeddings, "embed_scale", root)
    run = Linearised({"input_ids": real.shape[1]})
    x = run.embedded("input_ids", embeddings.weight[inputs["input_ids"]]) * number(scale)
    H, G = config.num_attention_heads, config.num_key_value_heads

    def normed(x: Parts, norm: Any) -> Parts:
        return x.normed(1 + number(norm.weight), config.rms_norm_eps)

    def capped(x: Tensor, cap: float | None) -> Tensor:
        return x if cap is None else (x / cap).tanh() * cap

    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        attention, mlp, sliding = layer.self_attn, layer.mlp, kind == "sliding_attention"
        y = normed(x, layer.input_layernorm)
        q, k = y.through(attention.q_proj), y.through(attention.k_proj)
        q, k = q.map(lambda z: split(z, H)), k.map(lambda z: split(z, G))
        if hasattr(attention, "q_norm"):
            q, k = normed(q, attention.q_norm), normed(k, attention.k_norm)
        of_layer = getattr(model.model, "rotary_emb_local", rotary) if sliding else rotary
        frequencies = getattr(of_layer, f"{kind}_inv_freq", getattr(of_layer, "inv_freq", None))
        assert frequencies is not None
        turned = [rotated(z.value, positions(real), frequencies) for z in (q, k)]
        logits = scores(turned[0], turned[1], config.query_pre_attn_scalar**-0.5)
        logits = capped(logits, config.attn_logit_softcapping)
        visible = causal(real, config.sliding_window if sliding else None)
        y = run.attend(logits, visible, y.through(attention.v_proj), attention.o_proj.weight)
        x = x + normed(y, layer.post_attention_layernorm)
        weights = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        y = gated(normed(x, layer.pre_feedforward_layernorm), weights, tanh_gelu)
        x = x + normed(y, layer.post_feedforward_layernorm)
    cap = config.final_logit_softcapping
    run.logits = normed(x, model.model.norm).through(model.lm_head)
    run.logits = run.logits.activated(lambda x: capped(x, cap))
    return run


def gpt2(model: Any, inputs: dict[str, Tensor], real: Tensor) -> Linearised:
    """Biases, learned positions, and a GELU written with a tanh."""
    transformer, H = model.transformer, model.config.n_head
    run = Linearised({"input_ids": real.shape[1]})
    x = run.embedded("input_ids", transformer.wte.weight[inputs["input_ids"]])
    x = x + number(transformer.wpe.weight[positions(real)])

    def normed(x: Parts, norm: Any) -> Parts:
        return x.normed(norm.weight, norm.eps, bias=norm.bias)

    for block in transformer.h:
        y = normed(x, block.ln_1).through(block.attn.c_attn)
        q, k = (split(z, H) for z in y.value.chunk(3, -1)[:2])
        v, out = y.map(lambda z: z.chunk(3, -1)[2]), block.attn.c_proj
        y = run.attend(scores(q, k, q.shape[-1] ** -0.5), causal(real), v, out.weight.T)
        x = x + (y + number(out.bias))
        y = normed(x, block.ln_2).through(block.mlp.c_fc).activated(tanh_gelu)
        x = x + y.through(block.mlp.c_proj)
    run.logits = normed(x, transformer.ln_f).through(model.lm_head)
    return run


def bert_classifier(model: Any, inputs: dict[str, Tensor], real: Tensor) -> Linearised:
    """Positions and token types are constants; a class is read from the pooled first token."""
    embeddings, H = model.bert.embeddings, model.config.num_attention_heads
    types = inputs.get("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    run = Linearised({"input_ids": real.shape[1]})
    x = run.embedded("input_ids", embeddings.word_embeddings.weight[inputs["input_ids"]])
    x = x + number(embeddings.position_embeddings.weight[: real.shape[1]])
    x = x + number(embeddings.token_type_embeddings.weight[types])

    def normed(x: Parts, norm: Any) -> Parts:
        return x.normed(norm.weight, norm.eps, bias=norm.bias)

    x = normed(x, embeddings.LayerNorm)
    for layer in model.bert.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        q, k = (split(x.through(p).value, H) for p in (own.query, own.key))
        logits, v = scores(q, k, q.shape[-1] ** -0.5), x.through(own.value)
        y = run.attend(logits, real[:, None, None], v, out.dense.weight)
        x = normed(x + (y + number(out.dense.bias)), out.LayerNorm)
        y = x.through(layer.intermediate.dense).activated(gelu).through(layer.output.dense)
        x = normed(x + y, layer.output.LayerNorm)
    pooled = x.map(lambda y: y[..., 0, :]).through(model.bert.pooler.dense).activated(torch.tanh)
    run.logits = pooled.through(model.classifier)
    return run


def t5(model: Any, inputs: dict[str, Tensor], real: Tensor) -> Linearised:
    """Tokens of an encoder and of a decoder; relative positions shift the attention logits."""
    ids, given = inputs["input_ids"], inputs["decoder_input_ids"]
    config, table = model.config, model.shared.weight
    run = Linearised({"input_ids": ids.shape[1], "decoder_input_ids": given.shape[1]})

    def normed(x: Parts, norm: Any) -> Parts:
        return x.normed(norm.weight, norm.variance_epsilon)

    def attended(
        x: Parts, states: Parts | None, layer: Any, module: Any, bias: Tensor | float, seen: Tensor
    ) -> Parts:
        y = normed(x, layer.layer_norm)
        read = y if states is None else states
        q = split(y.through(module.q).value, config.num_heads)
        k = split(read.through(module.k).value, config.num_heads)
        return run.attend(scores(q, k, 1) + bias, seen, read.through(module.v), module.o.weight)

    def stack(x: Parts, blocks: Any, seen: Tensor, states: Parts | None = None) -> Parts:
        decodes = states is not None
        first = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias = number(first)[_buckets(x.parts.shape[2], config, decodes)].permute(2, 0, 1)
        for block in blocks:
            layer = block.layer
            x = x + attended(x, None, layer[0], layer[0].SelfAttention, bias, seen)
            if decodes:
                others = real[:, None, None]
                x = x + attended(x, states, layer[1], layer[1].EncDecAttention, 0, others)
            mlp = layer[-1].DenseReluDense
            y = normed(x, layer[-1].layer_norm).through(mlp.wi).activated(torch.relu)
            x = x + y.through(mlp.wo)
        return x

    encoded = stack(run.embedded("input_ids", table[ids]), model.encoder.block, real[:, None, None])
    encoded = normed(encoded, model.encoder.final_layer_norm)
    every = causal(torch.ones_like(given, dtype=torch.bool))
    x = run.embedded("decoder_input_ids", table[given])
    x = normed(stack(x, model.decoder.block, every, encoded), model.decoder.final_layer_norm)
    run.logits = (x * config.d_model**-0.5).through(model.lm_head)
    return run


def _buckets(T: int, config: Any, decodes: bool) -> Tensor:
    """T5's buckets of distances; short distances each have one."""
    distance = torch.arange(T)[None] - torch.arange(T)[:, None]
    half = config.relative_attention_num_buckets // 2
    assert half // 2 + 1 >= T, "only short distances are written out here"
    return (-distance).clamp(min=0) if decodes else distance.abs() + half * (distance > 0)


def jamba(model: Any, inputs: dict[str, Tensor], real: Tensor) -> Linearised:
    """A state-space layer and an attention layer, and experts in one of their MLPs."""
    config, eps = model.config, model.config.rms_norm_eps
    run = Linearised({"input_ids": real.shape[1]})
    x = run.embedded("input_ids", model.model.embed_tokens.weight[inputs["input_ids"]])
    for layer in model.model.layers:
        y = x.normed(layer.input_layernorm.weight, eps)
        if hasattr(layer, "mamba"):
            x = x + _state_space(y, layer.mamba, real, eps)
        else:
            attention, H, G = layer.self_attn, config.num_attention_heads, 2
            q, k = y.through(attention.q_proj).value, y.through(attention.k_proj).value
            logits = scores(split(q, H), split(k, G), (q.shape[-1] // H) ** -0.5)
            v, w = y.through(attention.v_proj), attention.o_proj.weight
            x = x + run.attend(logits, causal(real), v, w)
        norm = getattr(layer, "pre_ff_layernorm", None) or layer.pre_moe_layernorm
        y, mlp = x.normed(norm.weight, eps), layer.feed_forward
        if hasattr(mlp, "router"):
            probabilities = y.linear(mlp.router.weight).value.softmax(-1)
            chosen = probabilities.topk(config.num_experts_per_tok)
            kept = torch.zeros_like(probabilities).scatter(-1, chosen.indices, chosen.values)
            for n, weights in enumerate(_experts(mlp.experts)):
                x = x + gated(y, weights, F.silu) * kept[..., n, None]
        else:
            own = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
            x = x + gated(y, own, F.silu)
    run.logits = x.normed(model.model.final_layernorm.weight, eps).through(model.lm_head)
    return run


def _experts(experts: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if hasattr(experts, "gate_up_proj"):
        for both, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate, up = both.chunk(2)
            yield gate, up, down
    else:  # before transformers 5
        for e in experts:
            yield e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight


def _state_space(x: Parts, m: Any, real: Tensor, eps: float) -> Parts:
    """Mamba: ``h_t = exp(dt A) h_(t-1) + dt B_t u_t`` and ``y_t = <h_t, C_t> + D u_t``."""
    mask = real[..., None].double()
    u, gate = (
        (x * mask).through(m.in_proj).map(lambda y, n=n: y.chunk(2, -1)[n])  # type: ignore[misc]
        for n in (0, 1)
    )
    weight, K, T = number(m.conv1d.weight)[:, 0], m.conv1d.weight.shape[-1], real.shape[1]

    def convolved(y: Tensor) -> Tensor:
        y = F.pad(y, (0, 0, K - 1, 0))
        return sum(y[..., k : k + T, :] * weight[:, k] for k in range(K))  # type: ignore[return-value]

    u = (u.map(convolved) + number(m.conv1d.bias)).activated(F.silu) * mask
    sizes = [m.dt_layernorm.weight.numel(), *[m.b_layernorm.weight.numel()] * 2]
    dt, b, c = (
        u.through(m.x_proj).map(lambda y, n=n: y.split(sizes, -1)[n]).normed(norm.weight, eps)  # type: ignore[misc]
        for n, norm in enumerate((m.dt_layernorm, m.b_layernorm, m.c_layernorm))
    )
    rate = F.softplus(dt.through(m.dt_proj).value)[..., None]  # (B, T, d, 1)
    decay = (rate * -number(m.A_log).exp()).exp()
    both = b.map(lambda y: y[..., None, :]).times(u.map(lambda y: y[..., None])) * rate
    state = both.map(lambda y: torch.zeros_like(y[:, :, 0]))
    states = []
    for t in range(T):
        state = state * decay[:, t] + both.map(lambda y, t=t: y[:, :, t])  # type: ignore[misc]
        states.append(state.parts)
    all_states = Parts(torch.stack(states, 2), x.n)
    y = all_states.times(c.map(lambda z: z[..., None, :])).map(lambda z: z.sum(-1))
    y = y + u * number(m.D)
    return y.times(gate.activated(F.silu)).through(m.out_proj)
