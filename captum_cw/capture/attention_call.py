"""One call of an attention kernel, and the attention weights that it used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from captum_cw.capture.module_stack import Run
from captum_cw.capture.rounding import product_rounding, rounding
from captum_cw.functional import QueryMask, Weights, attention_weights, expand_heads

__all__ = [
    "AttentionCall",
    "Kind",
    "UnsupportedModelError",
    "find_weights",
    "kind_of",
    "padding_of",
    "query_mask",
    "same_numbers",
    "times",
    "visible_keys",
]

Kind = Literal["self", "cross"]

#: What attention modules call the states that keys are made of, where these are not those that
#: queries are made of.
OTHER_STATES = (
    "key_value_states", "encoder_hidden_states", "cross_attention_states", "encoder_outputs",
    "encoder_output", "encoder_out", "enc_out", "enc", "context", "context_hidden_states", "ctx",
    "memory", "mem", "source", "kv", "key", "keys", "k", "key_tensor",
)  # fmt: skip

#: An additive mask at or below this leaves no weight, in any dtype that can hold it.
HIDDEN = -1e8

#: Below this a square is zero.
TINY = 1e-30

#: Queries at which recomputed weights are compared with the model's own, as fractions of T.
PROBED = (0.0, 0.34, 0.67, 1.0)


class UnsupportedModelError(RuntimeError):
    """The model does something that would make the measures wrong, so nothing is computed."""


def times(value: Tensor, factors: Tensor) -> Tensor:
    """Values ``(B, H, S, d_h)`` times factors ``(B|1, H|1, n)`` of the first ``n`` keys."""
    missing = value.shape[2] - factors.shape[-1]  # keys that came later, or empty places
    factors = torch.nn.functional.pad(factors, (0, missing), value=1.0).to(value)[..., None]
    # Not a product alone: a value may be infinite.
    return (value * factors).masked_fill(factors == 0, 0)


def same_numbers(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors are equal, wherever they lie."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a is b or torch.equal(a, b)


@dataclass(frozen=True)
class AttentionCall:
    """What went into an attention kernel, and what came out.

    Args:
        module: The attention module that made the call.
        running: The modules that were running, ``module`` among them, the innermost last.
        query, key: ``(B, H, T, d_k)`` and ``(B, H_kv, S, d_k)``; None where the weights are all
            that is known.
        value: ``(B, H_kv, S, d_h)``.
        mask: Boolean (True = visible) or additive, broadcastable to ``(B, H, T, S)``, or None.
        causal: Whether the kernel takes no mask to mean that queries see no later key.
        scaling: Factor of the inner products; None is ``1 / sqrt(d_k)``.
        returned: What the kernel gave to the model.
        by_token: Puts something of the shape of ``returned`` into that of ``y``,
            ``(B, T, H, d_h)``.
        weights: ``(B, H, T, S)`` where the kernel returned them, else None.
        dense_kernel: The model's own kernel that returns weights, with all of its
            peculiarities: ``(rows, query, key, value, mask) -> (B, H, t, S)``. None where it
            has none.
        scaled: What the same kernel gives once the values are multiplied by factors
            ``(B, H, S)``.
    """

    module: nn.Module
    running: tuple[Run, ...]
    query: Tensor | None
    key: Tensor | None
    value: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float | None
    returned: Tensor
    by_token: Callable[[Tensor], Tensor]
    weights: Tensor | None
    dense_kernel: Callable[[slice, Tensor, Tensor, Tensor, Tensor], Tensor] | None
    scaled: Callable[[Tensor], Tensor]

    @cached_property
    def head_output(self) -> Tensor:
        """``y``, ``(B, T, H, d_h)``."""
        return self.by_token(self.returned)

    @property
    def B(self) -> int:
        """Number of examples."""
        return self.head_output.shape[0]

    @property
    def T(self) -> int:
        """Number of queries."""
        return self.head_output.shape[1]

    @property
    def H(self) -> int:
        """Number of query heads."""
        return self.head_output.shape[2]

    @property
    def S(self) -> int:
        """Number of keys."""
        return self.value.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that geometry is computed in: the model's, but float32 at least."""
        return torch.promote_types(self.value.dtype, torch.float32)

    def read(self, x: Tensor) -> Tensor:
        """Queries, keys or values as the kernel read them, in :attr:`dtype`.

        Autocast and kernels of half precision cast them to the dtype that they return.
        """
        return x.to(self.returned.dtype).to(self.dtype)

    @property
    def own(self) -> Run | None:
        """What the attention module was given; None where that was not seen."""
        return next((run for run in reversed(self.running) if run.module is self.module), None)

    @cached_property
    def kind(self) -> Kind:
        """Whether keys are made of the tokens that queries are made of."""
        return kind_of(self.own, self.T, self.S)


def kind_of(own: Run | None, T: int, S: int) -> Kind:
    """Whether an attention module attends to the tokens that its queries are made of.

    Args:
        own: What the module was given; None where that was not seen.
        T: The number of queries.
        S: The number of keys.
    """
    if S < T:
        return "cross"
    if own is None:
        return "self"
    parameters = inspect.signature(own.module.forward).parameters
    given = {**dict(zip(parameters, own.args, strict=False)), **own.kwargs}
    states = own.states()
    for name, other in given.items():
        if not isinstance(other, Tensor) or other.dim() != 3 or same_numbers(other, states):
            continue
        # Where lengths differ, it tells itself by its own.
        if name in OTHER_STATES or T != S == other.shape[1]:
            return "cross"
    return "self"


def visible_keys(mask: Tensor) -> Tensor:
    """A mask as a boolean one, True where a key is seen."""
    if mask.dtype == torch.bool:
        return mask
    # Half of the minimum, since masks add up and a position bias may sit on top of them; and
    # -1e9 where people write masks: no bias comes near, and no weight is left.
    return mask > max(torch.finfo(mask.dtype).min / 2, HIDDEN)


def query_mask(call: AttentionCall, real: Tensor | None) -> QueryMask:
    """Which keys the queries of a call can see.

    Args:
        call: The call.
        real: ``(B, T)``, False at padded tokens; None where that is not told, so that it is to be
            inferred from the mask.
    """
    told = real is not None
    if real is not None and real.all():
        real = None
    T, S = call.T, call.S
    if call.mask is None:
        return QueryMask(T, S, causal=call.causal, real=real)
    visible = visible_keys(call.mask)
    future = torch.ones(T, S, dtype=torch.bool, device=visible.device).triu(S - T + 1)
    if not told:
        real = _inferred(call, visible)
    return QueryMask(T, S, visible, causal=not bool((visible & future).any()), real=real)


def _inferred(call: AttentionCall, visible: Tensor) -> Tensor | None:
    """``(B, T)``: which queries are no padding, by the mask alone; None for all.

    A query that sees nothing is padding, and so is, where queries and keys are the same tokens, one
    that no other sees, itself included.
    """
    B, T = call.B, call.T
    real = visible.any(-1).any(1).expand(B, T)
    same = T == call.S and call.kind == "self"
    if same and not (visible.shape[2] == 1 and visible.shape[3] == 1):
        rows = visible & real[:, None, :, None]
        real = real & rows.any(-2).any(1).expand(B, T)
    return None if real.all() else real


def padding_of(call: AttentionCall, told: Sequence[Tensor]) -> Tensor | None:
    """Which tokens of a call are no padding, of what was told of all sequences of a model.

    An encoder and a decoder, or an image beside a text, may be of one length: a call's own padding
    is the one that its mask bears out, and of several the one that explains most of it.

    Args:
        call: A call of self-attention.
        told: Each ``(B, T)``, False at padded tokens of one sequence.

    Returns:
        ``(B, T)``; None where none fits.
    """
    best: Tensor | None = None
    for real in told:
        if real.shape != (call.B, call.T):
            continue
        real = real.to(call.value.device)
        if (best is None or real.sum() < best.sum()) and (real.all() or _hides(call, real)):
            best = real
    return best


def _hides(call: AttentionCall, real: Tensor) -> bool:
    """Whether a call's mask hides the padded keys."""
    if call.S != call.T:  # earlier tokens are not told of
        return True
    if call.mask is None:
        return False
    seen = visible_keys(call.mask).any(1).expand(call.B, call.T, call.S)
    ahead = seen.triu(1).any(-1)
    rows = torch.ones_like(real)
    if not (ahead & real).any():
        # A causal mask may show everything to a padded query, which would see nothing.
        rows = real | ~ahead
    return not (seen & rows[:, :, None] & ~real[:, None]).any()


def find_weights(call: AttentionCall, mask: QueryMask, name: str) -> Weights:
    """The weights that the call used, in blocks of queries.

    The cheapest source that agrees with the model is taken: the weights that its kernel returned,
    a plain softmax, or its own dense kernel run block by block. All are compared with the
    head outputs at a few queries. Where the softmax and the dense kernel differ, the dense kernel
    is tried first, since head outputs in half precision cannot tell a soft-capped weight from a
    plain one.

    Raises:
        UnsupportedModelError: If no source agrees with the head outputs.
    """
    sources = list(_sources(call, mask))
    for weights in (*sources, *(_Rescaled(source, call, mask) for source in sources)):
        if _reproduces(weights, call, mask):
            return weights
    raise UnsupportedModelError(
        f"The attention weights recomputed for layer {name!r} ({type(call.module).__name__}) do "
        "not give the head outputs that the model computed, so every measure would be wrong. Try "
        "model.set_attn_implementation('eager'), which returns the weights themselves."
    )


def _sources(call: AttentionCall, mask: QueryMask) -> Iterator[Weights]:
    if call.weights is not None:
        yield _Returned(call, mask)
        return
    softmax = _Softmax(call, mask)
    if call.dense_kernel is None:
        yield softmax
        return
    dense = _DenseKernel(call, mask)
    late = _probed(mask)[-2:]  # they see most keys
    agree = all(_agree(softmax(rows), dense(rows)) for rows in late)
    yield from (softmax, dense) if agree else (dense, softmax)


def _probed(mask: QueryMask) -> list[slice]:
    """Single queries, from the first to the last, spread over the text."""
    at = sorted({round(f * (mask.T - 1)) for f in PROBED})
    return [slice(i, i + 1) for i in at]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two rows put their weights in the same places, however long they are."""
    return bool(((a - b).abs().sum(-1) < max(1e-4, 4 * product_rounding(a, b))).all())


def _reproduces(weights: Weights, call: AttentionCall, mask: QueryMask) -> bool:
    """Whether ``sum_j a_ij v_j`` is what the model computed, at a few real queries."""
    tolerance = max(1e-4, 4 * product_rounding(call.value, call.returned))
    v = expand_heads(call.read(call.value), call.H)
    for rows in _probed(mask):
        a = weights(rows)
        n = a.shape[-1]
        y = (a @ v[:, :, :n]).transpose(1, 2)
        error = a.abs() * (tolerance + _logit_rounding(call, rows, n))
        wrong = (y - call.head_output[:, rows]).abs() > (error @ v[:, :, :n].abs()).transpose(
            1, 2
        ) + TINY
        # NaN is not "wrong": it is reported as NaN, with its place.
        if mask.real is not None:
            wrong &= mask.real[:, rows, None, None]
        if wrong.any():
            return False
    return True


def _logit_rounding(call: AttentionCall, rows: slice, n: int) -> Tensor | float:
    """How far logits may be off where PyTorch is set to round the operands of their product.

    Each of the ``d_k`` terms of a logit is off by up to the rounding of two operands, at random, so
    that their sum is off by about that times the root of their squares' sum.

    Returns:
        ``(B, H, t, n)``; zero where operands are used as they are.
    """
    if call.query is None or call.key is None or call.weights is not None:
        return 0.0
    q, k = call.query[:, :, rows], expand_heads(call.key[:, :, :n], call.H)
    coarse = product_rounding(q, k)
    if coarse <= rounding(q, k):
        return 0.0
    scaling = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    terms = q.to(call.dtype).square() @ k.to(call.dtype).square().transpose(-1, -2)
    return 4 * coarse * scaling * terms.sqrt()


class _Returned:
    """Weights that the kernel returned."""

    def __init__(self, call: AttentionCall, mask: QueryMask) -> None:
        assert call.weights is not None
        self.weights, self.mask, self.dtype = call.weights, mask, call.dtype

    def __call__(self, rows: slice) -> Tensor:
        return self.weights[:, :, rows, : self.mask.keys(rows)].to(self.dtype, copy=True)


class _Softmax:
    """Weights by the plain softmax of Eq. 1, with the mask of the call."""

    def __init__(self, call: AttentionCall, mask: QueryMask) -> None:
        assert call.query is not None
        assert call.key is not None
        self.scaling = call.scaling
        self.query, self.key = call.read(call.query), call.read(call.key)
        self.mask = mask
        self.bias = call.mask if call.mask is not None and call.mask.dtype != torch.bool else None

    def __call__(self, rows: slice) -> Tensor:
        n = self.mask.keys(rows)
        seen = self.bias
        if seen is not None:
            seen = seen[:, :, rows if seen.shape[2] > 1 else slice(None), :n]
        else:
            seen = self.mask.visible_block(rows)
        return attention_weights(
            self.query[:, :, rows],
            self.key[:, :, :n],
            scaling=self.scaling,
            mask=seen,
            causal=seen is None and self.mask.causal,
        )


class _Rescaled:
    """Weights times what a kernel multiplies the head outputs of each query and head by.

    So do kernels that apply a learned sink to the output, rather than to the weights (Granite).
    """

    def __init__(self, weights: Weights, call: AttentionCall, mask: QueryMask) -> None:
        self.weights, self.mask = weights, mask
        self.value = expand_heads(call.read(call.value), call.H)
        self.output = call.head_output.transpose(1, 2).to(call.dtype)

    def __call__(self, rows: slice) -> Tensor:
        a = self.weights(rows)
        y = a @ self.value[:, :, : a.shape[-1]]
        size = y.square().sum(-1, keepdim=True)
        scale = (y * self.output[:, :, rows]).sum(-1, keepdim=True) / size.clamp(min=TINY)
        return a.mul_(scale.clamp(0, 1))  # a sink takes attention, and gives none


class _DenseKernel:
    """Weights by the model's own dense kernel, run on a block of queries."""

    def __init__(self, call: AttentionCall, mask: QueryMask) -> None:
        assert call.dense_kernel is not None
        assert call.query is not None
        assert call.key is not None
        self.kernel, self.mask, self.call = call.dense_kernel, mask, call
        self.query, self.key, self.value = (
            call.read(x) for x in (call.query, call.key, call.value)
        )

    def __call__(self, rows: slice) -> Tensor:
        given, n = self.call.mask, self.mask.S
        if given is None or given.dtype == torch.bool:
            causal = QueryMask(self.mask.T, n, given, causal=given is None and self.call.causal)
            seen = causal.block(rows)
            bias = self.query.new_zeros(1, 1, rows.stop - rows.start, n)
            if seen is not None:
                seen = torch.nn.functional.pad(seen, (0, n - seen.shape[-1]))  # False: unseen
                bias = bias.masked_fill(~seen.to(bias.device), torch.finfo(bias.dtype).min)
        else:
            bias = given[:, :, rows if given.shape[2] > 1 else slice(None)].to(self.query.dtype)
        a = self.kernel(rows, self.query[:, :, rows], self.key, self.value, bias)
        return a.to(self.call.dtype)[..., : self.mask.keys(rows)]
