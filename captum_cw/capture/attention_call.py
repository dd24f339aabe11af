"""One call of an attention kernel, and the attention weights that it used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture import module_stack
from captum_cw.capture.module_stack import Run
from captum_cw.capture.rounding import product_rounding, rounding
from captum_cw.functional import (
    QueryMask,
    Weights,
    attention_weights,
    expand_heads,
    grouped_matmul,
)

__all__ = [
    "AttentionCall",
    "DenseKernel",
    "Kind",
    "SoftmaxWeights",
    "UnsupportedModelError",
    "find_weights",
    "hides_later",
    "kind_of",
    "padding_of",
    "query_mask",
    "same_numbers",
    "times",
    "visible_keys",
]

Kind = Literal["self", "cross"]

DenseKernel = Callable[[slice, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Returns the attention weights ``(B, H, t, S)`` of a block of queries: ``(rows, query, key, value,
mask)``."""

#: The names that attention modules give to the states of the keys, if these are not the states of
#: the queries.
OTHER_STATES = {
    *("key_value_states", "encoder_hidden_states", "cross_attention_states"),
    *("encoder_outputs", "encoder_output", "encoder_out", "enc_out", "enc"),
    *("context", "context_hidden_states", "ctx", "memory", "mem", "source"),
    *("kv", "key", "keys", "k", "key_tensor"),
}

#: A logit with an additive mask at or below this has a weight of zero, in every dtype that can
#: hold it.
HIDDEN = -1e8

#: Squares below this are treated as zero.
TINY = 1e-30

#: The queries at which recomputed weights are compared with the model's own, as fractions of T.
PROBED = (0.0, 0.34, 0.67, 1.0)

#: The number of shapes for which a module's source of weights is remembered.
REMEMBERED = 64


class UnsupportedModelError(RuntimeError):
    """The model does something that would make the measures wrong, so nothing is computed."""


def times(value: Tensor, factors: Tensor) -> Tensor:
    """Multiply values ``(B, H, S, d_h)`` by factors ``(B|1, H|1, n)`` of the first ``n`` keys."""
    missing = value.shape[2] - factors.shape[-1]  # later keys, or empty places of a cache
    if missing:
        factors = torch.nn.functional.pad(factors, (0, missing), value=1.0)
    factors = factors.to(value)[..., None]
    # The product alone would give NaN if a value is infinite.
    return (value * factors).masked_fill_(factors == 0, 0)


def same_numbers(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors are equal, in the same memory or not."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a is b or torch.equal(a, b)


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The inputs and the output of one call of an attention kernel.

    Args:
        module: The attention module that made the call.
        value: ``(B, H_kv, S, d_h)``.
        returned: The tensor that the kernel returned to the model.
        by_token: Arranges a tensor of the shape of ``returned`` as ``(B, T, H, d_h)``.
        scaled: Returns what the kernel returns if the values are multiplied by factors
            ``(B, H, S)``.
        query, key: ``(B, H, T, d_k)`` and ``(B, H_kv, S, d_k)``; None if only the weights are
            known.
        mask: Boolean (True = visible) or additive, broadcastable to ``(B, H, T, S)``, or None.
        causal: Whether the kernel hides later keys if there is no mask.
        scaling: The factor of the inner products; None is ``1 / sqrt(d_k)``.
        weights: ``(B, H, T, S)`` if the kernel returned them; else None.
        dense_kernel: The model's own kernel that returns weights, with all of its peculiarities;
            None if the model does not have one.
        registered: Whether a kernel of transformers' registry made the call.
        running: The modules that are running, innermost last. ``module`` is one of them.
    """

    module: nn.Module
    value: Tensor
    returned: Tensor
    by_token: Callable[[Tensor], Tensor]
    scaled: Callable[[Tensor], Tensor]
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scaling: float | None = None
    weights: Tensor | None = None
    dense_kernel: DenseKernel | None = None
    registered: bool = False
    running: tuple[Run, ...] = field(default_factory=module_stack.running)

    @cached_property
    def head_output(self) -> Tensor:
        """The head outputs ``y``, ``(B, T, H, d_h)``."""
        return self.by_token(self.returned)

    @property
    def B(self) -> int:
        """The number of examples."""
        return self.head_output.shape[0]

    @property
    def T(self) -> int:
        """The number of queries."""
        return self.head_output.shape[1]

    @property
    def H(self) -> int:
        """The number of query heads."""
        return self.head_output.shape[2]

    @property
    def S(self) -> int:
        """The number of keys."""
        return self.value.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the measures: the model's, but at least float32."""
        return torch.promote_types(self.value.dtype, torch.float32)

    def read(self, x: Tensor) -> Tensor:
        """Return queries, keys or values as the kernel read them, in :attr:`dtype`.

        Autocast and kernels of half precision round them to the dtype of their output.
        """
        return x.to(self.returned.dtype).to(self.dtype)

    @property
    def own(self) -> Run | None:
        """The run of the attention module; None if it was not observed."""
        return next((run for run in reversed(self.running) if run.module is self.module), None)

    @cached_property
    def kind(self) -> Kind:
        """``"self"`` if the keys are the tokens of the queries, else ``"cross"``."""
        return kind_of(self.own, self.T, self.S)


def kind_of(own: Run | None, T: int, S: int) -> Kind:
    """Return the kind of attention of a module.

    Args:
        own: The run of the attention module; None if it was not observed.
        T: The number of queries.
        S: The number of keys.
    """
    if S < T:
        return "cross"
    if own is None:
        return "self"
    states = own.states()
    others = {
        name: x
        for name, x in (*enumerate(own.args), *own.kwargs.items())
        if isinstance(x, Tensor) and x.dim() == 3 and not same_numbers(x, states)
    }
    # If the numbers of queries and keys differ, other states are recognised by their length.
    if T != S and any(x.shape[1] == S for x in others.values()):
        return "cross"
    if not others:
        return "self"
    names = list(inspect.signature(own.module.forward).parameters)
    given = (names[n] if isinstance(n, int) and n < len(names) else n for n in others)
    return "cross" if any(name in OTHER_STATES for name in given) else "self"


def visible_keys(mask: Tensor) -> Tensor:
    """Convert a mask to a boolean one, True where a key is visible."""
    if mask.dtype == torch.bool:
        return mask
    # Models write the minimum or -1e9. Half of the minimum is enough, since masks are added up and
    # a position bias may be added to them. No bias comes near.
    return mask > max(torch.finfo(mask.dtype).min / 2, HIDDEN)


def query_mask(call: AttentionCall, real: Tensor | None) -> QueryMask:
    """Return which keys the queries of a call can see.

    Args:
        call: The call.
        real: ``(B, T)``, False at padded tokens; None to infer padding from the mask of the call.
    """
    T, S = call.T, call.S
    if call.mask is None:
        real = None if real is None or real.all() else real
        return QueryMask(T, S, causal=call.causal, real=real)
    visible = visible_keys(call.mask)
    if real is None:
        real = _infer_real(call, visible)
    causal = hides_later(visible, T, S)
    return QueryMask(T, S, visible, causal=causal, real=None if real.all() else real)


def hides_later(visible: Tensor, T: int, S: int) -> bool:
    """Return True if no query sees a later key.

    The queries are the last ``T`` of ``S`` tokens.
    """
    future = torch.ones(T, S, dtype=torch.bool, device=visible.device).triu(S - T + 1)
    return not bool((visible & future).any())


def _infer_real(call: AttentionCall, visible: Tensor) -> Tensor:
    """Infer from the mask which queries are not padding, ``(B, T)``.

    A query that sees no key is padding. If queries and keys are the same tokens, so is a token that
    no query sees.
    """
    B, T = call.B, call.T
    real = visible.any(-1).any(1).expand(B, T)
    same_tokens = T == call.S and call.kind == "self"
    if same_tokens and not (visible.shape[2] == 1 and visible.shape[3] == 1):
        rows = visible & real[:, None, :, None]
        real = real & rows.any(-2).any(1).expand(B, T)
    return real


def padding_of(call: AttentionCall, masks: Sequence[Tensor]) -> Tensor | None:
    """Select the padding mask that applies to a call.

    An encoder and a decoder, or an image and a text, may have the same length. So the mask of the
    call must hide the padding. If several padding masks fit, the one with the most padding is
    selected.

    Args:
        call: A call of self-attention.
        masks: The padding masks of the sequences that the model reads, each ``(B, T)``, False at
            padded tokens.

    Returns:
        ``(B, T)``; None if no padding mask fits.
    """
    candidates = [x.to(call.value.device) for x in masks if x.shape == (call.B, call.T)]
    fitting = [real for real in candidates if real.all() or _hides(call, real)]
    return min(fitting, key=lambda real: int(real.sum()), default=None)


def _hides(call: AttentionCall, real: Tensor) -> bool:
    """Whether the mask of a call hides the padded keys."""
    if call.S != call.T:  # the padding of earlier tokens is unknown
        return True
    if call.mask is None:
        return False
    seen = visible_keys(call.mask).any(1).expand(call.B, call.T, call.S)
    ahead = seen.triu(1).any(-1)
    rows = torch.ones_like(real)
    if not (ahead & real).any():
        # A causal mask may show everything to a padded query that would see no key.
        rows = real | ~ahead
    return not (seen & rows[:, :, None] & ~real[:, None]).any()


@dataclass(frozen=True)
class SoftmaxWeights:
    """Weights by the plain softmax of Eq. 1, in blocks of queries.

    Args:
        query: ``(B, H, T, d_k)``, in single precision at least.
        key: ``(B, H_kv, S, d_k)``.
        mask: Which keys the queries can see.
        bias: What is added to the logits, broadcastable to ``(B, H, T, S)``; None for nothing.
        scaling: The factor of the inner products; None is ``1 / sqrt(d_k)``.
    """

    query: Tensor
    key: Tensor
    mask: QueryMask
    bias: Tensor | None = None
    scaling: float | None = None

    def __call__(self, rows: slice) -> Tensor:
        """Return ``(B, H, t, n)``, for the leading keys that ``rows`` see."""
        n, bias = self.mask.keys(rows), self.bias
        seen = self.mask.visible_block(rows) if bias is None else _block(bias, rows)[..., :n]
        return attention_weights(
            self.query[:, :, rows],
            self.key[:, :, :n],
            scaling=self.scaling,
            mask=seen,
            causal=seen is None and self.mask.causal,
        )


def find_weights(call: AttentionCall, mask: QueryMask, name: str) -> Weights:
    """Return the attention weights that the call used, in blocks of queries.

    There are three sources, from the cheapest to the most expensive: the weights that the kernel
    returned, a plain softmax, and the model's own dense kernel, which runs block by block. The
    first source that gives the head outputs at a few queries is used. If the softmax and the dense
    kernel differ, the dense kernel comes first, since head outputs in half precision cannot tell
    soft-capped weights from plain ones.

    Args:
        call: The call.
        mask: Which keys its queries can see.
        name: The name of the attention layer, for the error message.

    Raises:
        UnsupportedModelError: If no source gives the head outputs.
    """
    known = _found.setdefault(call.module, {})
    given = call.weights, call.mask, call.dense_kernel
    key = (call.T, call.S, call.dtype, *(x is None for x in given))
    if key in known:
        weights = _weights(known[key], call, mask)
        ends_in_padding = mask.real is not None and not mask.real[:, -1].all()
        probed = _probed(mask) if ends_in_padding else _probed(mask)[-1:]
        if _reproduces(weights, call, mask, probed):
            return weights
    sources = _sources(call, mask)
    for source in (*sources, *(f"rescaled {source}" for source in sources)):
        weights = _weights(source, call, mask)
        if _reproduces(weights, call, mask, _probed(mask)):
            if len(known) >= REMEMBERED:
                known.clear()
            known[key] = source
            return weights
    raise UnsupportedModelError(
        f"The attention weights recomputed for layer {name!r} ({type(call.module).__name__}) do "
        "not give the head outputs of the model, so every measure would be wrong. Try "
        "model.set_attn_implementation('eager'), or a kernel that returns its weights "
        "(B, H, T, S) as its second result."
    )


#: The source that was found for a module, by the shape and the kind of its call. Later calls check
#: it at the last query, or at a few if that is padding.
_found: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


def _sources(call: AttentionCall, mask: QueryMask) -> tuple[str, ...]:
    """Return the names of the sources of weights, the likeliest first."""
    if call.weights is not None:
        return ("returned",)
    if call.dense_kernel is None:
        return ("softmax",)
    softmax, dense = (_weights(source, call, mask) for source in ("softmax", "dense"))
    late = _probed(mask)[-2:]  # they see most keys
    agree = all(_agree(softmax(rows), dense(rows)) for rows in late)
    return ("softmax", "dense") if agree else ("dense", "softmax")


def _weights(source: str, call: AttentionCall, mask: QueryMask) -> Weights:
    """Return the weights of a source."""
    scaled, _, base = source.rpartition(" ")
    if scaled:
        return _rescaled(_weights(base, call, mask), call)
    if source == "softmax":
        assert call.query is not None
        assert call.key is not None
        query, key = call.read(call.query), call.read(call.key)
        bias = None if call.mask is None or call.mask.dtype == torch.bool else call.mask
        return SoftmaxWeights(query, key, mask, bias, call.scaling)
    if source == "dense":
        assert call.dense_kernel is not None
        return _dense(call, mask, call.dense_kernel)
    returned = call.weights
    assert returned is not None
    return lambda rows: returned[:, :, rows, : mask.keys(rows)].to(call.dtype, copy=True)


def _probed(mask: QueryMask) -> list[slice]:
    """Return a few single queries, from the first to the last."""
    at = sorted({round(f * (mask.T - 1)) for f in PROBED})
    return [slice(i, i + 1) for i in at]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two blocks of weights are equal up to rounding."""
    return bool(((a - b).abs().sum(-1) < max(1e-4, 4 * product_rounding(a, b))).all())


def _reproduces(
    weights: Weights, call: AttentionCall, mask: QueryMask, probed: list[slice]
) -> bool:
    """Whether ``sum_j a_ij v_j`` equals the head outputs at a few real queries."""
    tolerance = max(1e-4, 4 * product_rounding(call.value, call.returned))
    values = call.read(call.value).transpose(-1, -2)
    output = call.head_output.transpose(1, 2)
    for rows in probed:
        a = weights(rows)
        n = a.shape[-1]
        v = values[..., :n]
        error = a.abs() * (tolerance + _logit_rounding(call, rows, n))
        # NaN does not count here: it is reported later, with its place.
        gap = (grouped_matmul(a, v) - output[:, :, rows]).abs()
        wrong = gap > grouped_matmul(error, v.abs()) + TINY
        if mask.real is not None:
            wrong &= mask.real[:, None, rows, None]
        if wrong.any():
            return False
    return True


def _logit_rounding(call: AttentionCall, rows: slice, n: int) -> Tensor | float:
    """Return the error of logits if PyTorch is set to round the operands of their product.

    Each of the ``d_k`` terms of a logit has a random error of up to the rounding of two operands.
    So the error of their sum is about that rounding times the root of the sum of their squares.

    Returns:
        ``(B, H, t, n)``; zero if operands are not rounded.
    """
    if call.query is None or call.key is None or call.weights is not None:
        return 0.0
    q, k = call.query[:, :, rows], call.key[:, :, :n]
    coarse = product_rounding(q, k)
    if coarse <= rounding(q, k):
        return 0.0
    scaling = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    terms = grouped_matmul(q.to(call.dtype).square(), k.to(call.dtype).square())
    return 4 * coarse * scaling * terms.sqrt()


def _block(mask: Tensor, rows: slice) -> Tensor:
    """Return the rows of a mask, which may be the same for all queries."""
    return mask[:, :, rows] if mask.shape[2] > 1 else mask


def _rescaled(weights: Weights, call: AttentionCall) -> Weights:
    """Return weights that are scaled for each query and head to give the head outputs.

    Kernels that apply a learned sink to the output, instead of the weights, need this (Granite).
    """
    value = expand_heads(call.read(call.value), call.H)
    output = call.head_output.transpose(1, 2).to(call.dtype)

    def rescaled(rows: slice) -> Tensor:
        a = weights(rows)
        y = a @ value[:, :, : a.shape[-1]]
        size = y.square().sum(-1, keepdim=True)
        scale = (y * output[:, :, rows]).sum(-1, keepdim=True) / size.clamp(min=TINY)
        return a.mul_(scale.clamp(0, 1))  # a sink takes attention from the tokens, never adds any

    return rescaled


def _dense(call: AttentionCall, mask: QueryMask, kernel: DenseKernel) -> Weights:
    """Return weights by the model's own dense kernel, which runs on a block of queries."""
    assert call.query is not None
    assert call.key is not None
    query, key, value = (call.read(x) for x in (call.query, call.key, call.value))
    given, S = call.mask, mask.S

    def weights(rows: slice) -> Tensor:
        if given is None or given.dtype == torch.bool:
            causal = given is None and call.causal
            seen = QueryMask(mask.T, S, given, causal=causal).block(rows, query.device)
            seen = torch.nn.functional.pad(seen, (0, S - seen.shape[-1]))  # False: hidden
            bias = query.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(query.dtype).min)
        else:
            bias = _block(given, rows).to(query.dtype)
        a = kernel(rows, query[:, :, rows], key, value, bias)
        return a.to(call.dtype)[..., : mask.keys(rows)]

    return weights
