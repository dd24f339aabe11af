"""The mathematics of attention-based attribution, on plain tensors; needs torch alone.

An attention layer gives, for query ``i`` and head ``h``, ``y_i^h = sum_j a_ij^h v_j^h`` and the
output ``o_i = sum_h y_i^h W_O^h``: a weighted sum of projected values ``v~_j^h = v_j^h W_O^h``.
The measures here say how much each term makes of that sum (*Contribution Weights*,
arXiv 2606.07604, Eq. 5-15). No function builds ``v~`` or anything of size ``T x S x d``: inner
products with ``v~_j`` are inner products of ``v_j`` with a direction pulled back through
``W_O``, and norms of ``v~_j`` come from one small Gram matrix a head.

Letters, the same everywhere: ``B`` examples, ``H`` query heads, ``H_kv`` key-value heads
(``H`` is a multiple of it), ``T`` queries, ``S`` keys, ``d_h`` size of a head's values, ``d``
size of the layer's output. All results are dimensionless but :func:`value_weighted`, which has
the unit of the hidden states.

Two ways in:

* **dense**: :func:`contribution_weights` and its siblings take tensors and give ``(B, H, T, S)``;
* **blockwise**: an :class:`AttentionLayer` gives its weights in blocks of queries, and
  :func:`dense_map`, :func:`token_scores` and :func:`query_scores` run a :data:`Measure` over
  them, so that a map never has to exist as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, get_args

import torch
from torch import Tensor

__all__ = [
    "AttentionLayer",
    "Decomposition",
    "FrozenUpdate",
    "Measure",
    "QueryMask",
    "Reduction",
    "ResidualSum",
    "Scope",
    "Space",
    "aggregate",
    "attention",
    "attention_cosine",
    "attention_weights",
    "closeness",
    "contribution",
    "contribution_weights",
    "cosine_with",
    "decompose",
    "dense_map",
    "geometry",
    "head_share",
    "heads_of",
    "map_blocks",
    "output_gram",
    "projection",
    "pull_back",
    "query_scores",
    "token_scores",
    "value_norms",
    "value_weighted",
    "value_weighted_output_normalised",
    "vw",
    "vwon",
    "widest",
]

Scope = Literal["inter", "intra"]
Reduction = Literal["mean", "sum", "max", "rms"]
Aggregation = Literal["mean", "sum", "max"]
Space = Literal["attention", "residual"]
"""Where projections and norms are measured: at the attention layer's output, or at what is added
to the residual stream, which differs where a model normalises that output first."""

#: Rows whose output is this much smaller than its parts could make it are called zero: their
#: direction is rounding noise.
VANISHING = 1e-6

#: Elements of one block of attention weights. A block passes through the cache several times
#: (logits, softmax, product, sum), so it should fit there; 2^20 floats were fastest.
BLOCK_ELEMENTS = 2**20


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises a ValueError that names ``value`` and the choices of the Literal ``choices``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, allowed))}.")


P = ParamSpec("P")
R = TypeVar("R")


def _outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function on tensors, or on a layer, in their own dtype.

    Under ``torch.autocast``, matrix products would run in half precision, which loses the small
    terms.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for x in (*args, *kwargs.values()):
                x = x.value if isinstance(x, AttentionLayer) else x
                if not isinstance(x, Tensor):
                    continue
                kind = x.device.type
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


# ---------------------------------------------------------------------------------------------
# Parts


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in one dtype: the widest of them, and no narrower than float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def widest(device: torch.device) -> torch.dtype:
    """float64 where a device has it, else float32.

    Example:
        >>> widest(torch.device("cpu"))
        torch.float64
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception:  # each kind of device has its own
        return torch.float32
    return torch.float64


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats key-value heads to query heads: ``(B, H_kv, ...)`` to ``(B, H, ...)``."""
    if heads % x.shape[1]:
        raise ValueError(
            f"{heads} query heads cannot share {x.shape[1]} key-value heads: "
            "the first number must be a multiple of the second."
        )
    return x if heads == x.shape[1] else x.repeat_interleave(heads // x.shape[1], dim=1)


def _grouped_matmul(rows: Tensor, keys: Tensor) -> Tensor:
    """``<rows_i^h, keys_j^g(h)>`` without repeating the shared key-value heads.

    Args:
        rows: ``(B, H, t, d_h)``.
        keys: ``(B, H_kv, S, d_h)``.

    Returns:
        ``(B, H, t, S)``.
    """
    B, H, t, d_h = rows.shape
    shared = keys.shape[1]
    product = rows.reshape(B, shared, H // shared * t, d_h) @ keys.transpose(-1, -2)
    return product.view(B, H, t, keys.shape[2])


@_outside_autocast
def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention (Eq. 1).

    Args:
        query: ``(B, H, T, d_k)``.
        key: ``(B, H_kv, S, d_k)``.
        scaling: Factor of the inner products; ``1 / sqrt(d_k)`` by default.
        mask: Broadcastable to ``(B, H, T, S)``: boolean (True = visible) or additive.
        causal: Without a mask: the queries are the last ``T`` of the ``S`` tokens, and see none
            that comes after them.

    Returns:
        ``(B, H, T, S)``, float32 at least; a query whose keys a boolean mask hides, all of them,
        has a row of zeros.

    Example:
        >>> a = attention_weights(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        >>> a.tolist()
        [[[[0.5, 0.5], [0.5, 0.5]]]]
    """
    query, key = _at_least_float32(query, key)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    expand = query.shape[1] // key.shape[1]
    if query.shape[1] != expand * key.shape[1]:
        expand_heads(key, query.shape[1])  # raises, and says why
    logits = _grouped_matmul(query * scaling, key)
    lowest = torch.finfo(logits.dtype).min
    if mask is None:
        if causal:
            # Only among the last T keys is there one that a query cannot see.
            T = logits.shape[2]
            future = torch.ones(T, T, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., -T:].masked_fill_(future, lowest)
        return logits.softmax(-1)
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, lowest).softmax(-1).mul_(mask.any(-1, keepdim=True))
    return (logits + mask).softmax(-1)


@_outside_autocast
def output_gram(output_weight: Tensor) -> Tensor:
    """``G_h = W_O^h W_O^h^T``, so that ``||v~_j^h||^2 = v_j^h G_h v_j^h``.

    Args:
        output_weight: ``W_O`` by heads, ``(H, d_h, d)``.

    Returns:
        ``(H, d_h, d_h)``.

    Example:
        >>> output_gram(torch.eye(2)[None]).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    return output_weight @ output_weight.transpose(-1, -2)


@_outside_autocast
def value_norms(value: Tensor, output_weight: Tensor) -> Tensor:
    """Norms of the projected values, ``||v~_j^h||``.

    Args:
        value: ``(B, H_kv, S, d_h)``.
        output_weight: ``(H, d_h, d)``.

    Returns:
        ``(B, H, S)``, in the unit of the hidden states.

    Example:
        >>> value_norms(torch.tensor([[[[3.0, 4.0]]]]), torch.eye(2)[None]).tolist()
        [[[5.0]]]
    """
    form = _OutputForm(output_weight)
    return form.norms(expand_heads(value, output_weight.shape[0])).to(value.dtype)


class _OutputForm:
    """The quadratic form ``v G_h v^T = ||v W_O^h||^2`` of each head.

    It is evaluated in float64, since in float32 it loses what is below 3e-4 of its largest values.
    A device without float64 takes the triangular factor ``R_h`` with ``R_h^T R_h = G_h`` instead,
    whose product ``v R_h^T`` has the norm of ``v W_O^h`` to float32's own rounding.

    Args:
        output_weight: ``(H, d_h, d)``.
    """

    def __init__(self, output_weight: Tensor) -> None:
        self.dtype = torch.promote_types(output_weight.dtype, widest(output_weight.device))
        weight = output_weight.to(self.dtype)
        self.gram = self.factor = None
        if self.dtype == torch.float64:
            self.gram = output_gram(weight)
        else:
            # On the CPU: what has no float64 (MPS) may have no such decomposition either.
            factor = torch.linalg.qr(weight.mT.cpu(), mode="r").R
            self.factor = factor.to(weight.device)

    def norms(self, v: Tensor) -> Tensor:
        """``||v W_O^h||``, ``(B, H, n)``, of ``v`` ``(B, H, n, d_h)``."""
        if self.factor is not None:
            norms: Tensor = torch.linalg.vector_norm(v.to(self.dtype) @ self.factor.mT, dim=-1)
            return norms
        return self.pulled_back(v)[1].sqrt_()

    def pulled_back(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``v G_h``, of the shape of ``v``, and ``||v W_O^h||^2``, ``(B, H, n)``."""
        v = v.to(self.dtype)
        if self.gram is not None:
            u = v @ self.gram
            return u, (u * v).sum(-1).clamp_(min=0)
        assert self.factor is not None
        short = v @ self.factor.mT
        return short @ self.factor, short.square().sum(-1)


@_outside_autocast
def pull_back(direction: Tensor, output_weight: Tensor) -> Tensor:
    """``u_i^h = W_O^h direction_i``, so that ``<direction_i, v~_j^h> = <u_i^h, v_j^h>``.

    Args:
        direction: ``(B, T, d)``; the layer's output for contributions.
        output_weight: ``(H, d_h, d)``.

    Returns:
        ``(B, H, T, d_h)``.

    Example:
        >>> pull_back(torch.tensor([[[3.0, 4.0]]]), torch.eye(2)[None]).tolist()
        [[[[3.0, 4.0]]]]
    """
    H, d_h, d = output_weight.shape
    flat = direction @ output_weight.reshape(H * d_h, d).T
    return flat.view(*flat.shape[:2], H, d_h).transpose(1, 2)


# ---------------------------------------------------------------------------------------------
# One layer, seen blockwise


@dataclass(frozen=True)
class QueryMask:
    """Which keys each query of a layer can see.

    Args:
        T: Number of queries.
        S: Number of keys.
        visible: Boolean, broadcastable to ``(B, H, T, S)``; None if nothing but ``causal`` and
            ``real`` hides a key.
        causal: The query ``i`` sees no key beyond ``i + S - T``. With ``visible`` it is a promise
            about that tensor, which lets blocks leave out the keys that none of them sees.
        real: ``(B, T)``, False where a query is padding; None if none is. Padded keys
            are hidden by ``visible``.

    Example:
        >>> QueryMask(2, 2, causal=True).block(slice(0, 2)).tolist()
        [[[[True, False], [True, True]]]]
    """

    T: int
    S: int
    visible: Tensor | None = None
    causal: bool = False
    real: Tensor | None = None

    def keys(self, rows: slice) -> int:
        """How many leading keys the queries ``rows`` can see at most."""
        return min(self.S, rows.stop + self.S - self.T) if self.causal else self.S

    def block(self, rows: slice) -> Tensor | None:
        """Visibility of the leading keys for ``rows``: ``(B|1, H|1, t, keys)``; None is all."""
        n = self.keys(rows)
        if self.visible is not None or not self.causal:
            return self.visible_block(rows)
        t = rows.stop - rows.start
        device = None if self.real is None else self.real.device
        return torch.ones(1, 1, t, n, dtype=torch.bool, device=device).tril(n - t)

    def visible_block(self, rows: slice) -> Tensor | None:
        """The rows of ``visible`` for the leading keys; None where there is no such tensor."""
        v = self.visible
        if v is None:
            return None
        n = self.keys(rows) if v.shape[3] > 1 else None
        return v[:, :, rows if v.shape[2] > 1 else slice(None), :n]

    def of_any_head(self) -> QueryMask:
        """What the heads see together."""
        v = self.visible
        return self if v is None or v.shape[1] == 1 else replace(self, visible=v.any(1, True))

    def counts(self, chosen: Tensor | None, device: torch.device) -> Tensor:
        """How many chosen queries see each key.

        Args:
            chosen: ``(B, T)`` boolean, None for every query. Padded queries never count.
            device: Where the result goes.

        Returns:
            ``(B|1, H|1, S)``, float32.
        """
        chosen = self.chosen(chosen)
        if self.visible is None and chosen is None:
            j = torch.arange(self.S, device=device)
            seen_by = (
                (self.T - (j - (self.S - self.T)).clamp(min=0)) if self.causal else self.T + 0 * j
            )
            return seen_by.float()[None, None]
        counts: Tensor | None = None
        for rows in blocks(self.T, max(1, BLOCK_ELEMENTS // self.S)):
            seen = self.block(rows)
            t = rows.stop - rows.start
            if seen is None:
                seen = torch.ones(1, 1, t, self.S, dtype=torch.bool, device=device)
            if chosen is not None:
                seen = seen.to(device) & chosen[:, None, rows, None]
            part = seen.sum(-2).float()
            if seen.shape[2] != t:
                part = part * t
            part = torch.nn.functional.pad(part, (0, self.S - part.shape[-1])).to(device)
            counts = part if counts is None else counts + part
        assert counts is not None  # T > 0
        return counts

    def chosen(self, chosen: Tensor | None) -> Tensor | None:
        """``chosen`` without the padded queries."""
        if chosen is None or self.real is None:
            return self.real if chosen is None else chosen
        return chosen & self.real


def blocks(T: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` queries that cover ``range(T)``."""
    for start in range(0, T, size):
        yield slice(start, min(start + size, T))


class Weights(Protocol):
    """Gives attention weights for a block of queries."""

    def __call__(self, rows: slice) -> Tensor:
        """The weights ``(B, H, t, n)`` of the queries ``rows`` on the first ``n`` keys.

        Those on the other keys are zero. The caller may overwrite the result.
        """
        ...  # pragma: no cover


@dataclass(frozen=True)
class FrozenUpdate:
    """What a model makes of an attention output before it adds it to the residual stream.

    ``update_i = scale_i * gain * output_i``, of the centred output where ``centred``: a norm with
    its scale held fixed at that output, which makes it linear, and without its bias.

    Args:
        gain: ``(d,)``.
        scale: ``(B, T)``.
        centred: Whether the mean over ``d`` is taken off, as by a layer norm.

    Example:
        >>> update = FrozenUpdate(torch.tensor([1.0, 2.0]), torch.ones(1, 1), centred=True)
        >>> update.without_scale(torch.tensor([3.0, 1.0])).tolist()
        [1.0, -2.0]
    """

    gain: Tensor
    scale: Tensor
    centred: bool

    def without_scale(self, x: Tensor) -> Tensor:
        """``gain * x``, of the centred ``x`` where ``centred``; ``x`` is ``(..., d)``."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


@dataclass(frozen=True)
class ResidualSum:
    """The residual stream that an attention output is added to, and what goes on from there.

    Args:
        stream: ``x_i`` before the sum, ``(B, T, d)``.
        result: The sum, biases included, or what ``norm`` makes of it, ``(B, T, d)``.
        norm: What the sum goes through before it goes on, as in BERT; None if it goes on as it is.
    """

    stream: Tensor
    result: Tensor
    norm: FrozenUpdate | None = None

    def to(self, dtype: torch.dtype) -> ResidualSum:
        """The same in another floating dtype."""
        return replace(self, stream=self.stream.to(dtype), result=self.result.to(dtype))


@dataclass(frozen=True)
class AttentionLayer:
    """One execution of an attention layer: what every measure is computed from.

    Args:
        weights: ``a_ij`` in blocks of queries, in the dtype of ``value``.
        value: ``v_j``, ``(B, H_kv, S, d_h)``, a bias included.
        head_output: ``y_i^h``, ``(B, H, T, d_h)``.
        output_weight: ``W_O`` by heads, ``(H, d_h, d)``.
        output: ``o_i = sum_h y_i^h W_O^h``, ``(B, T, d)``, without the output bias: only so do
            contributions sum to one.
        mask: Which keys a query can see.
        scale: ``(B, T)``, what the output of each query is multiplied by beyond
            ``output_weight``; None is one. It cancels in what is relative to the output.
        gate: ``(B, H, T, d_h)``, what the head outputs are multiplied by before ``output_weight``,
            as by an output gate or a norm; None is one.
        update: What becomes of the output on its way to the residual stream; None if it is added
            as it is.
        residual: The stream that it is added to; None where that was not asked for.

    All tensors have one floating dtype, float32 or wider: geometry in half precision loses the
    small terms.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> layer.H, layer.T, layer.S, layer.value_norms.shape
        (2, 3, 3, torch.Size([1, 2, 3]))
    """

    weights: Weights
    value: Tensor
    head_output: Tensor
    output_weight: Tensor
    output: Tensor
    mask: QueryMask
    scale: Tensor | None = None
    gate: Tensor | None = None
    update: FrozenUpdate | None = None
    residual: ResidualSum | None = None

    @classmethod
    @_outside_autocast
    def from_tensors(
        cls, attention: Tensor, value: Tensor, output_weight: Tensor, mask: QueryMask | None = None
    ) -> AttentionLayer:
        """A layer from dense weights.

        Args:
            attention: ``(B, H, T, S)``.
            value: ``(B, H_kv, S, d_h)``.
            output_weight: ``(H, d_h, d)``.
            mask: By default every key is visible to every query.
        """
        B, H, T, S = attention.shape
        shapes = (value.shape[0], value.shape[2], output_weight.shape[:2])
        if shapes != (B, S, (H, value.shape[-1])):
            raise ValueError(
                f"attention {tuple(attention.shape)}, value {tuple(value.shape)} and output_weight "
                f"{tuple(output_weight.shape)} do not fit: expected (B, H, T, S), "
                "(B, H_kv, S, d_h) and (H, d_h, d)."
            )
        attention, value, output_weight = _at_least_float32(attention, value, output_weight)
        y = attention @ expand_heads(value, H)
        o = torch.einsum("bhte,hed->btd", y, output_weight)
        mask = mask or QueryMask(T, S)
        return cls(
            lambda rows: attention[:, :, rows, : mask.keys(rows)].clone(),
            value, y, output_weight, o, mask,
        )  # fmt: skip

    @property
    def T(self) -> int:
        """Number of queries."""
        return self.head_output.shape[2]

    @property
    def S(self) -> int:
        """Number of keys."""
        return self.value.shape[2]

    @property
    def H(self) -> int:
        """Number of query heads."""
        return self.output_weight.shape[0]

    def on_cpu(self) -> AttentionLayer:
        """The layer as its output projection made it, without ``residual``, on the CPU."""

        def moved(x: Tensor | None) -> Any:
            return None if x is None else x.cpu()

        mask = replace(self.mask, visible=moved(self.mask.visible), real=moved(self.mask.real))
        update = self.update
        if update is not None:
            update = replace(update, gain=update.gain.cpu(), scale=update.scale.cpu())
        return AttentionLayer(
            lambda rows: self.weights(rows).cpu(),
            moved(self.value), moved(self.head_output), moved(self.output_weight),
            moved(self.output), mask, moved(self.scale), moved(self.gate), update,
        )  # fmt: skip

    def seen_in(self, space: Space) -> AttentionLayer:
        """The layer with its output and values measured in that space."""
        check_choice("space", space, Space)
        return self if space == "attention" or self.update is None else self._in_residual

    @cached_property
    def _in_residual(self) -> AttentionLayer:
        assert self.update is not None
        return replace(
            self,
            output_weight=self.update.without_scale(self.output_weight),
            output=self.update.without_scale(self.output),
            scale=self.update.scale,
            update=None,
        )

    @cached_property
    def _output_form(self) -> _OutputForm:
        return _OutputForm(self.output_weight)

    @cached_property
    def value_norms(self) -> Tensor:
        """``||v~_j^h||``, ``(B, H, S)``, without scale and gate."""
        return value_norms(self.value, self.output_weight)

    def norms(self, rows: slice, n: int) -> Tensor:
        """``||v~_ij^h||`` of the first ``n`` keys for the queries ``rows``, without the scale.

        Returns:
            ``(B, H, t, n)``; of size 1 for ``t`` where nothing depends on the query.
        """
        if self.gate is None:
            return self.value_norms[:, :, None, :n]
        gate = self.gate[:, :, rows]
        if self.gates_heads:
            return self.value_norms[:, :, None, :n] * gate[..., :1].abs()
        form = self._output_form
        v = expand_heads(self.value[:, :, :n], self.H)[:, :, None].to(form.dtype)
        out = self.value.new_empty(*gate.shape[:3], n)
        per_query = v.numel()
        for some in blocks(gate.shape[2], max(1, BLOCK_ELEMENTS // per_query)):
            gated = v * gate[:, :, some, None].to(form.dtype)
            out[:, :, some] = form.norms(gated.flatten(2, 3)).view_as(out[:, :, some]).to(out.dtype)
        return out

    @cached_property
    def gates_heads(self) -> bool:
        """Whether the gate is one number a head and query."""
        assert self.gate is not None
        return bool((self.gate == self.gate[..., :1]).all())

    @cached_property
    def _gated_output(self) -> Tensor:
        """``y`` as the projection reads it, ``(B, H, T, d_h)``."""
        return self.head_output if self.gate is None else self.head_output * self.gate

    @cached_property
    def _directions(self) -> dict[Scope, tuple[Tensor, Tensor]]:
        return {}

    def direction(self, scope: Scope) -> tuple[Tensor, Tensor]:
        """The output to project on, pulled back through ``W_O``, and its squared norm.

        Returns:
            ``u``: ``(B, H, T, d_h)``, and ``||o||^2``: ``(B, 1, T)`` for ``"inter"``, where
            the output is the layer's (Eq. 12), ``(B, H, T)`` for ``"intra"``, where it is the
            head's own (Eq. 9). The norm is zero where the output vanishes.
        """
        if scope not in self._directions:
            self._directions[scope] = self._direction(scope)
        return self._directions[scope]

    def _direction(self, scope: Scope) -> tuple[Tensor, Tensor]:
        if scope == "inter":
            u = pull_back(self.output, self.output_weight)
            norm2 = self.output.square().sum(-1)[:, None]
            y2 = self._gated_output.square().sum((1, 3))[:, None]
            w2 = self.output_weight.square().sum()
        else:
            # o_i^h itself is not needed: W_O^h o_i^h = G_h y_i^h.
            found = self._output_form.pulled_back(self._gated_output)
            u, norm2 = (x.to(self.value.dtype) for x in found)
            y2 = self._gated_output.square().sum(-1)
            w2 = self.output_weight.square().sum((1, 2))[:, None]
        if self.gate is not None:
            u = u * self.gate
        return u, norm2.masked_fill(norm2 <= VANISHING**2 * y2 * w2, 0)

    def vanishing(self, scope: Scope) -> int:
        """How many outputs of real queries vanish, so that their rows are returned as zeros."""
        norm2 = self.direction(scope)[1]
        gone = norm2 == 0
        return int((gone if self.mask.real is None else gone & self.mask.real[:, None]).sum())


def _reciprocal(x: Tensor) -> Tensor:
    """``1 / x``, and zero where ``x`` is zero."""
    return torch.where(x == 0, 0, x.reciprocal())


# ---------------------------------------------------------------------------------------------
# Measures: what each makes of a block of attention weights


Block = Callable[[Tensor, slice], Tensor]
"""Takes ``a`` ``(B, H, t, n)`` and its rows, gives the measure there; may overwrite ``a``."""

Measure = Callable[[AttentionLayer], Block]
"""Prepares what one layer needs once, and returns what to do with each block of its weights."""

MeasureT = TypeVar("MeasureT", bound=Measure)


def of_whole_tokens(measure: MeasureT) -> MeasureT:
    """Marks a measure that puts heads together: its blocks are ``(B, 1, t, n)``."""
    measure.puts_heads_together = True  # type: ignore[attr-defined]
    return measure


def heads_of(measure: Measure, heads: int) -> int:
    """How many maps a measure gives of a layer of ``heads`` heads: as many, or one.

    Example:
        >>> heads_of(attention, 12)
        12
    """
    return 1 if getattr(measure, "puts_heads_together", False) else heads


def attention(layer: AttentionLayer) -> Block:
    """``a_ij``."""
    return lambda a, rows: a


def vw(layer: AttentionLayer) -> Block:
    """``|a_ij| ||v~_j||``."""
    return _scaled(layer, _value_weighted(layer))


def _value_weighted(layer: AttentionLayer) -> Block:
    return lambda a, rows: a.abs_().mul_(layer.norms(rows, a.shape[-1]))


def _scaled(layer: AttentionLayer, block: Block) -> Block:
    """In the unit of the output, where the layer's own leaves out a scale."""
    if layer.scale is None:
        return block
    scale = layer.scale.abs()[:, None, :, None]
    return lambda a, rows: block(a, rows).mul_(scale[:, :, rows])


def vwon(layer: AttentionLayer) -> Block:
    """``|a_ij| ||v~_j|| / ||o_i||``."""
    scale = _reciprocal(layer.direction("inter")[1].sqrt())[..., None]
    weighted = _value_weighted(layer)
    return lambda a, rows: weighted(a, rows).mul_(scale[:, :, rows])


def contribution(scope: Scope = "inter") -> Measure:
    """``a_ij <o_i, v~_j> / ||o_i||^2``, for the layer's output (Eq. 12) or the head's (Eq. 9)."""
    check_choice("scope", scope, Scope)
    return partial(_contribution, scope)  # not a closure, so that measures can be pickled


def _contribution(scope: Scope, layer: AttentionLayer) -> Block:
    u, norm2 = layer.direction(scope)
    u = u * _reciprocal(norm2)[..., None]
    return lambda a, rows: a.mul_(_grouped_matmul(u[:, :, rows], layer.value[:, :, : a.shape[-1]]))


def relative_norm(layer: AttentionLayer) -> Block:
    """``||v~_j|| / ||o_i||`` where the query sees the key, else zero (a factor of Eq. 14)."""
    scale = _reciprocal(layer.direction("inter")[1].sqrt())[..., None]
    return lambda a, rows: _seen(layer, rows, scale[:, :, rows] * layer.norms(rows, a.shape[-1]))


def cosine_with(scope: Scope) -> Measure:
    """The cosine of a value with the layer's output, or with the head's own, where it is seen."""
    check_choice("scope", scope, Scope)
    return partial(_cosine_with, scope)


def _cosine_with(scope: Scope, layer: AttentionLayer) -> Block:
    u, norm2 = layer.direction(scope)
    u = u * _reciprocal(norm2.sqrt())[..., None]

    def block(a: Tensor, rows: slice) -> Tensor:
        n = a.shape[-1]
        along = _grouped_matmul(u[:, :, rows], layer.value[:, :, :n])
        return _seen(layer, rows, along.mul_(_reciprocal(layer.norms(rows, n))))

    return block


def geometry(scope: Scope) -> Measure:
    """``<o_i, v~_j> / ||o_i||^2`` where seen: what a contribution is beyond attention (Eq. 24)."""
    check_choice("scope", scope, Scope)
    return partial(_geometry, scope)


def _geometry(scope: Scope, layer: AttentionLayer) -> Block:
    u, norm2 = layer.direction(scope)
    u = u * _reciprocal(norm2)[..., None]
    return lambda a, rows: _seen(
        layer, rows, _grouped_matmul(u[:, :, rows], layer.value[:, :, : a.shape[-1]])
    )


def attention_cosine(layer: AttentionLayer) -> Block:
    """``a_ij cos(o_i, v~_j)``: a contribution without its magnitude (two factors of Eq. 14)."""
    factor = cosine_with("inter")(layer)
    return lambda a, rows: a.mul_(factor(a, rows))


def projection(layer: AttentionLayer) -> Block:
    """``a_ij <o_i, v~_j> / ||o_i||``: how far a term reaches along the output, not its share."""
    share = contribution()(layer)
    norm = layer.direction("inter")[1].sqrt()[..., None]
    return _scaled(layer, lambda a, rows: share(a, rows).mul_(norm[:, :, rows]))


def closeness(layer: AttentionLayer) -> Block:
    """``2c - r^2 = 1 - ||o_i - a_ij v~_j||^2 / ||o_i||^2``, with ``r = |a_ij| ||v~_j|| / ||o_i||``.

    How much nearer than nothing one term alone comes to the output.
    """
    share, size = contribution()(layer), vwon(layer)

    def block(a: Tensor, rows: slice) -> Tensor:
        c = share(a.clone(), rows)
        return c.mul_(2).sub_(size(a, rows).square_())

    return block


def _seen(layer: AttentionLayer, rows: slice, x: Tensor) -> Tensor:
    seen = layer.mask.block(rows)
    return x if seen is None else x * seen.to(x.device)


# ---------------------------------------------------------------------------------------------
# The engine: one pass over a layer in blocks of queries


def map_blocks(
    layer: AttentionLayer, *measures: Measure, chosen: Tensor | None = None
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The maps of measures in blocks of queries, so that none has to exist as a whole.

    Args:
        layer: The layer.
        measures: What to make of its weights, which are computed once.
        chosen: ``(B, T)`` boolean, which queries count; None for all. Rows of others, and of
            padding, are zero, and blocks without any are left out.

    Yields:
        Rows, and for each measure ``(B, H, t, n)`` at the first ``n`` keys; it may be overwritten.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> [(rows, a.shape, c.shape) for rows, (a, c) in map_blocks(layer, attention, vwon)]
        [(slice(0, 3, None), torch.Size([1, 2, 3, 3]), torch.Size([1, 2, 3, 3]))]
    """
    *first, last = (measure(layer) for measure in measures)
    chosen = layer.mask.chosen(chosen)
    wanted = None if chosen is None else chosen.any(0).cpu()
    per_query = layer.value.shape[0] * layer.H * layer.S
    for rows in blocks(layer.T, max(1, BLOCK_ELEMENTS // per_query)):
        if wanted is not None and not wanted[rows].any():
            continue
        a = layer.weights(rows)
        found = (*(apply(a.clone(), rows) for apply in first), last(a, rows))
        if chosen is not None and not chosen[:, rows].all():
            for g in found:
                # Not a product: what a padded query computes may be NaN.
                g.masked_fill_(~chosen[:, None, rows, None], 0)
        yield rows, found


@_outside_autocast
def dense_map(layer: AttentionLayer, measure: Measure) -> Tensor:
    """The whole map of a measure, ``(B, H, T, S)``.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> dense_map(layer, contribution("intra")).shape
        torch.Size([1, 2, 3, 3])
    """
    B, H = layer.value.shape[0], heads_of(measure, layer.H)
    out = layer.value.new_zeros(B, H, layer.T, layer.S)
    for rows, (g,) in map_blocks(layer, measure):
        out[:, :, rows, : g.shape[-1]] = g
    return out


@_outside_autocast
def token_scores(
    layer: AttentionLayer,
    measure: Measure,
    reduction: Reduction = "mean",
    *,
    signed: bool = False,
    queries: Tensor | None = None,
) -> Tensor:
    """A measure reduced over the queries that can see each key (Eq. 15).

    Holds one block of queries at a time, so memory grows linearly with the text.

    Args:
        layer: The layer.
        measure: What to reduce.
        reduction: ``"mean"`` over the queries that see the key is Eq. 15; ``"sum"``,
            ``"max"`` and ``"rms"`` (root of the mean square over the same queries).
        signed: Keeps signs; by default absolute values are taken before the reduction (measure
            iv of the paper).
        queries: ``(B, T)`` boolean, which queries count; None for all.

    Returns:
        ``(B, H, S)``; zero for a key that none of the queries sees. ``H`` is 1 for a measure that
        puts heads together.

    Example:
        >>> a = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> mask = QueryMask(2, 2, causal=True)
        >>> values, weight = torch.ones(1, 1, 2, 3), torch.ones(1, 3, 3)
        >>> layer = AttentionLayer.from_tensors(a, values, weight, mask)
        >>> token_scores(layer, attention).tolist()
        [[[0.75, 0.5]]]
    """
    check_choice("reduction", reduction, Reduction)
    B, H = layer.value.shape[0], heads_of(measure, layer.H)
    total = layer.value.new_zeros(B, H, layer.S)
    if reduction == "max" and signed:
        total.fill_(-math.inf)
    mask = layer.mask if H == layer.H else layer.mask.of_any_head()
    chosen = mask.chosen(queries)
    for rows, (g,) in map_blocks(layer, measure, chosen=queries):
        if not signed:
            g.abs_()
        part = total[..., : g.shape[-1]]
        if reduction == "max":
            if signed:
                g.masked_fill_(~_counted(mask, rows, chosen, g), -math.inf)
            torch.maximum(part, g.amax(-2), out=part)
        else:
            # A product with ones, since summing over rows reads memory in the wrong order.
            part += (g.new_ones(1, g.shape[-2]) @ (g.square_() if reduction == "rms" else g))[
                ..., 0, :
            ]
    counts = mask.counts(queries, total.device).to(total.dtype)
    if reduction in ("mean", "rms"):
        total /= counts.clamp(min=1)
    if reduction == "rms":
        total.sqrt_()
    return total.masked_fill_(counts == 0, 0)


def _counted(mask: QueryMask, rows: slice, chosen: Tensor | None, g: Tensor) -> Tensor:
    """Where in a block a chosen query sees the key; elsewhere its zero is no value."""
    seen = mask.block(rows)
    seen = torch.ones_like(g, dtype=torch.bool) if seen is None else seen.to(g.device)
    return seen if chosen is None else seen & chosen[:, None, rows, None]


@_outside_autocast
def query_scores(
    layer: AttentionLayer,
    measure: Measure,
    queries: slice,
    *,
    heads: Aggregation = "mean",
    signed: bool = False,
) -> Tensor:
    """The rows of a few queries, aggregated over heads.

    Holds these rows and one block of queries, so memory grows linearly with the text.

    Args:
        layer: The layer.
        measure: What to aggregate.
        queries: A slice of queries with a start and a stop.
        heads: How.
        signed: Keeps signs; by default absolute values are aggregated.

    Returns:
        ``(B, t, S)``.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> query_scores(layer, vwon, slice(1, 3)).shape
        torch.Size([1, 2, 3])
    """
    B = layer.value.shape[0]
    start, stop, _ = queries.indices(layer.T)
    chosen = torch.zeros(B, layer.T, dtype=torch.bool, device=layer.value.device)
    chosen[:, start:stop] = True
    out = layer.value.new_zeros(B, max(0, stop - start), layer.S)
    for rows, (g,) in map_blocks(layer, measure, chosen=chosen):
        first, end = max(rows.start, start), min(rows.stop, stop)
        part = g[:, :, first - rows.start : end - rows.start]
        asked = out[:, first - start : end - start, : g.shape[-1]]
        asked.copy_(aggregate(part if signed else part.abs_(), heads, dim=1))
    return out


@_outside_autocast
def head_share(layer: AttentionLayer) -> Tensor:
    """``sum_j c_ij^h``: how much of the layer's output each head makes; needs no map.

    Returns:
        ``(B, H, T)``; sums to one over ``H``. Padded queries have zeros.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> torch.allclose(head_share(layer).sum(1), torch.ones(1, 3), atol=1e-5)
        True
    """
    u, norm2 = layer.direction("inter")
    share = (u * layer.head_output).sum(-1) * _reciprocal(norm2)
    real = layer.mask.real
    return share if real is None else share.masked_fill(~real[:, None], 0)


def aggregate(scores: Tensor, how: Aggregation | None, dim: int) -> Tensor:
    """Reduces heads or layers; None keeps them.

    Example:
        >>> aggregate(torch.tensor([[1.0, 3.0]]), "mean", dim=1).tolist()
        [2.0]
    """
    if how is None:
        return scores
    check_choice("aggregation", how, Aggregation)
    if how == "max":
        return scores.amax(dim)
    return scores.sum(dim) if how == "sum" else scores.mean(dim)


# ---------------------------------------------------------------------------------------------
# Dense: from tensors to maps


class Decomposition(NamedTuple):
    """The factors of a contribution (Eq. 14), each ``(B, H, T, S)``, dimensionless.

    ``contribution = attention * relative_norm * cosine``. The two geometric factors are zero
    where a query cannot see a key.
    """

    attention: Tensor
    relative_norm: Tensor
    cosine: Tensor
    contribution: Tensor


def contribution_weights(
    attention: Tensor,
    value: Tensor,
    output_weight: Tensor,
    *,
    scope: Scope = "inter",
) -> Tensor:
    """Contribution weights: each token's share of the attention output (Eq. 9, 12).

    Args:
        attention: ``(B, H, T, S)``.
        value: ``(B, H_kv, S, d_h)``.
        output_weight: ``W_O`` by heads, ``(H, d_h, d)``.
        scope: ``"inter"`` projects on the layer's output, ``"intra"`` on the head's own.

    Returns:
        ``(B, H, T, S)``: inter sums to one over heads and keys (Eq. 13), intra over keys
        (Eq. 10). Rows of a vanishing output are zero.

    Raises:
        ValueError: If the shapes do not fit, or ``scope`` is unknown.

    Example:
        >>> a, v, w = torch.rand(2, 4, 5, 5), torch.randn(2, 2, 5, 8), torch.randn(4, 8, 32)
        >>> c = contribution_weights(a, v, w)
        >>> torch.allclose(c.sum((1, 3)), torch.ones(2, 5), atol=1e-5)
        True
    """
    layer = AttentionLayer.from_tensors(attention, value, output_weight)
    return dense_map(layer, contribution(scope))


def value_weighted(attention: Tensor, value: Tensor, output_weight: Tensor) -> Tensor:
    """Value-weighted attention ``|a_ij| ||v~_j||`` (section 5.2, measure ii).

    Args and errors as :func:`contribution_weights`.

    Returns:
        ``(B, H, T, S)``, in the unit of the hidden states.

    Example:
        >>> a, v, w = torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8)
        >>> value_weighted(a, v, w).shape
        torch.Size([1, 2, 3, 3])
    """
    return dense_map(AttentionLayer.from_tensors(attention, value, output_weight), vw)


def value_weighted_output_normalised(
    attention: Tensor, value: Tensor, output_weight: Tensor
) -> Tensor:
    """VW-ON, ``|a_ij| ||v~_j|| / ||o_i||`` (section 5.2, measure iii).

    Args and errors as :func:`contribution_weights`.

    Returns:
        ``(B, H, T, S)``.

    Example:
        >>> a, v, w = torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8)
        >>> bool((value_weighted_output_normalised(a, v, w) >= 0).all())
        True
    """
    return dense_map(AttentionLayer.from_tensors(attention, value, output_weight), vwon)


def decompose(layer: AttentionLayer) -> Decomposition:
    """Attention, relative norm, cosine and their product, the contribution (Eq. 14).

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> d = decompose(layer)
        >>> torch.allclose(d.attention * d.relative_norm * d.cosine, d.contribution, atol=1e-5)
        True
    """
    factors = attention, relative_norm, cosine_with("inter"), contribution("inter")
    return Decomposition(*(dense_map(layer, measure) for measure in factors))
