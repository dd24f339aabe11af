"""The measures of attention-based attribution, as functions of plain tensors.

An attention layer computes, for query ``i`` and head ``h``, ``y_i^h = sum_j a_ij^h v_j^h`` and the
output ``o_i = sum_h y_i^h W_O^h``. The output is a weighted sum of the projected values
``v~_j^h = v_j^h W_O^h``. The measures here compute how much each term contributes to that sum
(*Contribution Weights*, arXiv 2606.07604, Eq. 5-15). No function builds ``v~``, or any other
tensor of size ``T x S x d``. An inner product with ``v~_j`` is computed as the inner product of
``v_j`` with a direction that is pulled back through ``W_O``. The norms of ``v~_j`` are computed
from one small Gram matrix per head.

Shapes use the same letters everywhere: ``B`` examples, ``H`` query heads, ``H_kv`` key-value heads
(``H`` is a multiple of ``H_kv``), ``T`` queries, ``S`` keys, ``d_h`` the size of a head's values,
``d`` the size of the layer's output. The results of :func:`vw` and :func:`projection` have the unit
of the hidden states, those of :func:`target` and ``effect`` that of the target, and those of
``joint`` a power of it. All others are dimensionless.

An :class:`AttentionLayer` yields its attention weights in blocks of queries. A :data:`Measure`,
such as :func:`contribution` or :func:`vwon`, is applied to each block. :func:`dense_map` returns
the full map. :func:`token_scores` and :func:`query_scores` reduce the blocks, so that the full map
is never in memory. :meth:`AttentionLayer.from_tensors` builds a layer from plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from captum_cw.products import Block, Direction, Product, Reduction, reduce_by_kernel
from captum_cw.weights import (
    QueryMask,
    Weights,
    at_least_float32,
    attention_weights,
    block_elements,
    block_queries,
    blocks,
    expand_heads,
    known_rows,
    without_autocast,
)

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
    "TargetLayer",
    "aggregate",
    "attention",
    "attention_cosine",
    "attention_weights",
    "closeness",
    "contribution",
    "cosine_with",
    "decompose",
    "dense_map",
    "geometry",
    "head_share",
    "heads_of",
    "is_of_each_query",
    "map_blocks",
    "output_gram",
    "projection",
    "pull_back",
    "query_scores",
    "target",
    "token_scores",
    "vw",
    "vwon",
    "widest",
]

Scope = Literal["inter", "intra"]
Aggregation = Literal["mean", "sum", "max"]
Space = Literal["attention", "residual"]
"""Where projections and norms are measured: at the attention layer's output (``"attention"``), or
at what is added to the residual stream (``"residual"``). The two differ where a model normalises
the output before it adds it."""

#: An output counts as zero if its norm is smaller than this fraction of the norm that its parts
#: could reach. Its direction is then only rounding noise.
VANISHING = 1e-6


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a ValueError with the known choices if ``value`` is not one of the Literal's."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, allowed))}.")


# ---------------------------------------------------------------------------------------------
# Building blocks


def widest(device: torch.device) -> torch.dtype:
    """Return float64 if the device supports it, and float32 otherwise.

    Example:
        >>> widest(torch.device("cpu"))
        torch.float64
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception:  # each kind of device raises its own error
        return torch.float32
    return torch.float64


@without_autocast
def output_gram(output_weight: Tensor) -> Tensor:
    """Compute ``G_h = W_O^h W_O^h^T``, so that ``||v~_j^h||^2 = v_j^h G_h v_j^h``.

    Args:
        output_weight: ``W_O`` by heads, ``(H, d_h, d)``.

    Returns:
        ``(H, d_h, d_h)``.

    Example:
        >>> output_gram(torch.eye(2)[None]).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    return output_weight @ output_weight.transpose(-1, -2)


class _OutputForm:
    """The quadratic form ``v G_h v^T = ||v W_O^h||^2`` of each head.

    It is evaluated in float64. In float32, values below 3e-4 of the largest would be lost. A device
    without float64 uses the triangular factor ``R_h`` with ``R_h^T R_h = G_h`` instead: the product
    ``v R_h^T`` has the norm of ``v W_O^h`` up to the rounding of float32.

    Args:
        output_weight: ``(H, d_h, d)``.
    """

    def __init__(self, output_weight: Tensor) -> None:
        self.dtype = torch.promote_types(output_weight.dtype, widest(output_weight.device))
        weight = output_weight.to(self.dtype)
        self.exact = self.dtype == torch.float64
        if self.exact:
            self.matrix = output_gram(weight)
        else:
            # A device without float64 (MPS) may also lack the QR decomposition.
            factor = torch.linalg.qr(weight.mT.cpu(), mode="r").R
            self.matrix = factor.mT.to(weight.device)

    def norms(self, v: Tensor) -> Tensor:
        """Return ``||v W_O^h||`` ``(B, H, n)`` for ``v`` ``(B, H, n, d_h)``."""
        return self.pulled_back(v)[1].sqrt_()

    def pulled_back(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``v G_h``, in the shape of ``v``, and ``||v W_O^h||^2`` ``(B, H, n)``."""
        v = v.to(self.dtype)
        u = v @ self.matrix
        if self.exact:
            return u, (u * v).sum(-1).clamp_(min=0)
        return u @ self.matrix.mT, u.square().sum(-1)


@without_autocast
def pull_back(direction: Tensor, output_weight: Tensor) -> Tensor:
    """Compute ``u_i^h = W_O^h direction_i``, so that ``<direction_i, v~_j^h> = <u_i^h, v_j^h>``.

    Args:
        direction: ``(B, T, d)``. For contributions it is the layer's output.
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
# One attention layer, in blocks of queries


@dataclass(frozen=True)
class FrozenUpdate:
    """The linear map from an attention output to what is added to the residual stream.

    ``update_i = scale_i * gain * output_i``, where the mean over ``d`` is first subtracted from the
    output if ``centred``. It describes a norm without its bias. The norm's scale is held fixed at
    the value for this output, which makes the map linear.

    Args:
        gain: ``(d,)``.
        scale: ``(B, T)``.
        centred: Whether the mean over ``d`` is subtracted, as in a layer norm.

    Example:
        >>> update = FrozenUpdate(torch.tensor([1.0, 2.0]), torch.ones(1, 1), centred=True)
        >>> update.without_scale(torch.tensor([3.0, 1.0])).tolist()
        [1.0, -2.0]
    """

    gain: Tensor
    scale: Tensor
    centred: bool

    def at(self, rows: list[int]) -> FrozenUpdate:
        """Return the map of a few queries."""
        return replace(self, scale=self.scale[:, rows])

    def without_scale(self, x: Tensor) -> Tensor:
        """Return ``gain * x`` for ``x`` ``(..., d)``, centred first if ``centred``."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


@dataclass(frozen=True)
class ResidualSum:
    """The residual stream before and after an attention output is added to it.

    Args:
        stream: ``x_i`` before the sum, ``(B, T, d)``.
        result: The sum with all biases, after ``norm`` if there is one, ``(B, T, d)``.
        norm: The norm that is applied to the sum, as in BERT; None if there is not one.
    """

    stream: Tensor
    result: Tensor
    norm: FrozenUpdate | None = None

    def to(self, dtype: torch.dtype) -> ResidualSum:
        """Return the same sum in another floating dtype."""
        return replace(self, stream=self.stream.to(dtype), result=self.result.to(dtype))


@dataclass(frozen=True)
class AttentionLayer:
    """One execution of an attention layer: the data from which every measure is computed.

    All tensors have one floating dtype, float32 or wider, since the geometry of small terms is lost
    in half precision.

    Args:
        weights: Returns ``a_ij`` for a block of queries, in the dtype of ``value``.
        value: ``v_j``, ``(B, H_kv, S, d_h)``, with the bias.
        head_output: ``y_i^h``, ``(B, H, T, d_h)``.
        output_weight: ``W_O`` by heads, ``(H, d_h, d)``.
        output: ``o_i = sum_h y_i^h W_O^h``, ``(B, T, d)``, without the output bias. With the bias,
            contributions would not sum to one.
        mask: The attention mask.
        scale: ``(B, T)``, a factor of each query's output in addition to ``output_weight``; None
            for one. It cancels in all measures that are relative to the output.
        gate: ``(B, H, T, d_h)``, a factor of the head outputs before ``output_weight``, such as an
            output gate or a norm; None for one.
        update: The map from the output to what is added to the residual stream; None if the output
            itself is added.
        residual: The residual stream; None if it was not requested.

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
    @without_autocast
    def from_tensors(
        cls, attention: Tensor, value: Tensor, output_weight: Tensor, mask: QueryMask | None = None
    ) -> AttentionLayer:
        """Build a layer from dense attention weights.

        Args:
            attention: ``(B, H, T, S)``.
            value: ``(B, H_kv, S, d_h)``.
            output_weight: ``(H, d_h, d)``.
            mask: The attention mask. By default every query sees every key.

        Raises:
            ValueError: If the shapes do not fit.
        """
        B, H, T, S = attention.shape
        shapes = (value.shape[0], value.shape[2], output_weight.shape[:2])
        if shapes != (B, S, (H, value.shape[-1])):
            raise ValueError(
                f"attention {tuple(attention.shape)}, value {tuple(value.shape)} and output_weight "
                f"{tuple(output_weight.shape)} do not fit: expected (B, H, T, S), "
                "(B, H_kv, S, d_h) and (H, d_h, d)."
            )
        attention, value, output_weight = at_least_float32(attention, value, output_weight)
        y = attention @ expand_heads(value, H)
        o = torch.einsum("bhte,hed->btd", y, output_weight)
        mask = mask or QueryMask(T, S)
        return cls(
            weights=lambda rows: attention[:, :, rows, : mask.keys(rows)].clone(),
            value=value,
            head_output=y,
            output_weight=output_weight,
            output=o,
            mask=mask,
        )

    @property
    def T(self) -> int:
        """The number of queries."""
        return self.head_output.shape[2]

    @property
    def S(self) -> int:
        """The number of keys."""
        return self.value.shape[2]

    @property
    def H(self) -> int:
        """The number of query heads."""
        return self.output_weight.shape[0]

    def on_cpu(self) -> AttentionLayer:
        """Copy the layer to the CPU."""
        layer: AttentionLayer = _on_cpu(self)
        return replace(layer, weights=lambda rows: self.weights(rows).cpu())

    def at(self, rows: Sequence[int], chosen: Tensor) -> AttentionLayer:
        """Return the layer with a few queries only; all others count as padding.

        What measures compute for each query is then computed for these queries alone.

        Args:
            rows: The queries that count in some example, in order.
            chosen: ``(B, T)`` boolean, the queries that count. Padded queries must not.

        Example:
            >>> layer = AttentionLayer.from_tensors(
            ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
            >>> last = layer.at([2], torch.tensor([[False, False, True]]))
            >>> torch.allclose(dense_map(last, vwon), dense_map(layer, vwon)[:, :, 2:])
            True
        """
        rows, update, residual = list(rows), self.update, self.residual
        if residual is not None:
            residual = ResidualSum(
                residual.stream[:, rows],
                residual.result[:, rows],
                None if residual.norm is None else residual.norm.at(rows),
            )
        return replace(
            self,
            weights=partial(_weights_at, self.weights, rows, self.S),
            head_output=self.head_output[:, :, rows],
            output=self.output[:, rows],
            mask=self.mask.at(rows, chosen),
            scale=None if self.scale is None else self.scale[:, rows],
            gate=None if self.gate is None else self.gate[:, :, rows],
            update=None if update is None else update.at(rows),
            residual=residual,
        )

    def seen_in(self, space: Space) -> AttentionLayer:
        """Return the layer with its output and values measured in ``space``."""
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
        """``||v~_j^h||``, ``(B, H, S)``, without the scale and the gate."""
        return self._output_form.norms(expand_heads(self.value, self.H)).to(self.value.dtype)

    def norms(self, rows: slice, n: int) -> Tensor:
        """Return ``||v~_ij^h||`` of the first ``n`` keys for ``rows``, without the scale.

        Returns:
            ``(B, H, t, n)``. ``t`` is 1 if the norms are the same for all queries.
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
        for some in blocks(gate.shape[2], max(1, block_elements(v.device) // per_query)):
            gated = v * gate[:, :, some, None].to(form.dtype)
            out[:, :, some] = form.norms(gated.flatten(2, 3)).view_as(out[:, :, some]).to(out.dtype)
        return out

    @cached_property
    def gates_heads(self) -> bool:
        """Whether the gate has one number for each head and query."""
        assert self.gate is not None
        return bool((self.gate == self.gate[..., :1]).all())

    @cached_property
    def _gated_output(self) -> Tensor:
        """The input of the output projection, ``(B, H, T, d_h)``."""
        return self.head_output if self.gate is None else self.head_output * self.gate

    @cached_property
    def _directions(self) -> dict[Scope, tuple[Tensor, Tensor]]:
        return {}

    def direction(self, scope: Scope) -> tuple[Tensor, Tensor]:
        """Return the output, pulled back through ``W_O``, and its squared norm.

        Returns:
            ``u``, ``(B, H, T, d_h)``, and ``||o||^2``. For ``"inter"``, ``o`` is the layer's output
            (Eq. 12) and its norm has shape ``(B, 1, T)``. For ``"intra"``, ``o`` is the head's own
            output (Eq. 9) and its norm has shape ``(B, H, T)``. The norm is zero if the output
            vanishes (see ``VANISHING``).
        """
        if scope not in self._directions:
            self._directions[scope] = self._direction(scope)
        return self._directions[scope]

    def _direction(self, scope: Scope) -> tuple[Tensor, Tensor]:
        if scope == "inter":
            u = pull_back(self.output, self.output_weight)
            norm2 = torch.linalg.vector_norm(self.output, dim=-1).square()[:, None]
            y = self._gated_output.transpose(1, 2).flatten(2)
            y2 = torch.linalg.vector_norm(y, dim=-1).square()[:, None]
            w2 = torch.linalg.vector_norm(self.output_weight).square()
        else:
            # o_i^h itself is not needed, since W_O^h o_i^h = G_h y_i^h.
            found = self._output_form.pulled_back(self._gated_output)
            u, norm2 = (x.to(self.value.dtype) for x in found)
            y2 = self._gated_output.square().sum(-1)
            w2 = self.output_weight.square().sum((1, 2))[:, None]
        if self.gate is not None:
            u = u * self.gate
        return u, norm2.masked_fill(norm2 <= VANISHING**2 * y2 * w2, 0)

    def vanishing(self, scope: Scope) -> Tensor:
        """Count the outputs of real queries that vanish. Their rows are returned as zeros.

        The count is a tensor, because reading it waits for the device.
        """
        norm2 = self.direction(scope)[1]
        gone = norm2 == 0
        return (gone if self.mask.real is None else gone & self.mask.real[:, None]).sum()


def _weights_at(weights: Weights, rows: list[int], S: int, block: slice) -> Tensor:
    """Return the weights of a few queries on all keys, ``(B, H, t, S)``."""
    found = []
    for run in _runs(rows[block]):
        a = weights(run)
        found.append(torch.nn.functional.pad(a, (0, S - a.shape[-1])))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _runs(rows: Sequence[int]) -> Iterator[slice]:
    """Yield the runs of successive numbers among sorted ones."""
    start = 0
    for n in range(1, len(rows) + 1):
        if n == len(rows) or rows[n] != rows[n - 1] + 1:
            yield slice(rows[start], rows[n - 1] + 1)
            start = n


def _on_cpu(x: Any) -> Any:
    """Copy a tensor, or the tensors in a dataclass, to the CPU."""
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _on_cpu(getattr(x, f.name)) for f in fields(x)})
    return x.cpu() if isinstance(x, Tensor) else x


@dataclass(frozen=True)
class TargetLayer:
    """One execution of an attention layer, and the gradient of a target at its heads.

    Args:
        weights: Returns ``a_ij`` for a block of queries, in the dtype of ``value``.
        value: ``v_j``, ``(B, H_kv, S, d_h)``.
        head_gradient: The gradient of the target at the head outputs, ``(B, H, T, d_h)``. It is the
            gradient at the layer's output, pulled back through ``W_O``.
        mask: The attention mask.
    """

    weights: Weights
    value: Tensor
    head_gradient: Tensor
    mask: QueryMask

    @property
    def T(self) -> int:
        """The number of queries."""
        return self.head_gradient.shape[2]

    @property
    def S(self) -> int:
        """The number of keys."""
        return self.value.shape[2]

    @property
    def H(self) -> int:
        """The number of query heads."""
        return self.head_gradient.shape[1]


@dataclass(frozen=True)
class EffectLayer(TargetLayer):
    """One execution of an attention layer with the gradient of a target, and with its output.

    Args:
        share: The output ``o_i`` divided by its squared length and pulled back through ``W_O``,
            ``(B, H, T, d_h)``; its product with a value is a contribution.
        effect: What the output of each query does for the target, ``(B, T)``: ``<g_i, o_i>``, or
            ``|g_i| |o_i|``.
    """

    share: Tensor
    effect: Tensor


AnyLayer = AttentionLayer | TargetLayer
"""A layer with its output, or with the gradient of a target."""


def _reciprocal(x: Tensor) -> Tensor:
    """Return ``1 / x``, and zero where ``x`` is zero."""
    return torch.where(x == 0, 0, x.reciprocal())


# ---------------------------------------------------------------------------------------------
# Measures


Measure = Callable[[Any], Block]
"""Takes a layer, computes what all blocks need, and returns the function for one block."""

MeasureT = TypeVar("MeasureT", bound=Measure)


def of_whole_tokens(measure: MeasureT) -> MeasureT:
    """Mark a measure that aggregates heads: its blocks are ``(B, 1, t, n)``."""
    measure.puts_heads_together = True  # type: ignore[attr-defined]
    return measure


def heads_of(measure: Measure, heads: int) -> int:
    """Return the number of maps that a measure gives for a layer with ``heads`` heads.

    Example:
        >>> heads_of(attention, 12)
        12
    """
    return 1 if getattr(measure, "puts_heads_together", False) else heads


def attention(layer: AttentionLayer) -> Block:
    """Attention weights, ``a_ij``."""
    return Product(layer.value)


def vw(layer: AttentionLayer) -> Block:
    """Value-weighted attention, ``|a_ij| ||v~_j||``."""
    return _times_norms(layer, Product(layer.value, per_query=_scale(layer), absolute=True))


def vwon(layer: AttentionLayer) -> Block:
    """Value-weighted attention relative to the output, ``|a_ij| ||v~_j|| / ||o_i||``."""
    shorter = _reciprocal(layer.direction("inter")[1].sqrt())
    return _times_norms(layer, Product(layer.value, per_query=shorter, absolute=True))


def _scale(layer: AttentionLayer) -> Tensor | None:
    """Return the factor ``(B, 1, T)`` of a measure that has the unit of the output."""
    return None if layer.scale is None else layer.scale.abs()[:, None]


def _times_norms(layer: AttentionLayer, product: Product) -> Block:
    """Multiply by ``||v~_j||``. With a gate, the norms are different for each query."""
    if layer.gate is None:
        return replace(product, per_key=layer.value_norms)
    return lambda a, rows: product(a, rows).mul_(layer.norms(rows, a.shape[-1]))


def _over_norms(layer: AttentionLayer, product: Product) -> Block:
    """Divide by ``||v~_j||``, as :func:`_times_norms` multiplies."""
    if layer.gate is None:
        return replace(product, per_key=_reciprocal(layer.value_norms))
    return lambda a, rows: product(a, rows).mul_(_reciprocal(layer.norms(rows, a.shape[-1])))


def contribution(scope: Scope = "inter") -> Measure:
    """Contribution weights, ``a_ij <o_i, v~_j> / ||o_i||^2`` (Eq. 12 inter, Eq. 9 intra)."""
    check_choice("scope", scope, Scope)
    return partial(_contribution, scope)  # not a closure, so that measures can be pickled


def _contribution(scope: Scope, layer: AttentionLayer) -> Product:
    u, norm2 = layer.direction(scope)
    return Product(layer.value, (Direction(u * _reciprocal(norm2)[..., None]),))


def relative_norm(layer: AttentionLayer) -> Block:
    """``||v~_j|| / ||o_i||`` where the query sees the key, and zero elsewhere (Eq. 14)."""
    shorter = _reciprocal(layer.direction("inter")[1].sqrt())
    return _times_norms(layer, Product(layer.value, per_query=shorter, instead=layer.mask))


def cosine_with(scope: Scope) -> Measure:
    """``cos(o_i, v~_j)`` where the query sees the key, and zero elsewhere (Eq. 14)."""
    check_choice("scope", scope, Scope)
    return partial(_cosine_with, scope)


def _cosine_with(scope: Scope, layer: AttentionLayer) -> Block:
    seen = Product(layer.value, (_unit_direction(layer, scope),), instead=layer.mask)
    return _over_norms(layer, seen)


def _unit_direction(layer: AttentionLayer, scope: Scope) -> Direction:
    u, norm2 = layer.direction(scope)
    return Direction(u * _reciprocal(norm2.sqrt())[..., None])


def geometry(scope: Scope) -> Measure:
    """``<o_i, v~_j> / ||o_i||^2`` where the query sees the key: ``c_ij / a_ij`` (Eq. 24)."""
    check_choice("scope", scope, Scope)
    return partial(_geometry, scope)


def _geometry(scope: Scope, layer: AttentionLayer) -> Block:
    return replace(_contribution(scope, layer), instead=layer.mask)


def attention_cosine(layer: AttentionLayer) -> Block:
    """``a_ij cos(o_i, v~_j)``: a contribution without the relative norm (Eq. 14)."""
    along = Product(layer.value, (_unit_direction(layer, "inter"),))
    return _over_norms(layer, along)


def projection(layer: AttentionLayer) -> Block:
    """``a_ij <o_i, v~_j> / ||o_i||``: the length of a term along the output."""
    return Product(layer.value, (_unit_direction(layer, "inter"),), per_query=_scale(layer))


def closeness(layer: AttentionLayer) -> Block:
    """``1 - ||o_i - a_ij v~_j||^2 / ||o_i||^2``: how well one term alone approximates the output.

    It is computed as ``2c - r^2`` with ``r = |a_ij| ||v~_j|| / ||o_i||``.
    """
    share, size = contribution()(layer), vwon(layer)

    def block(a: Tensor, rows: slice) -> Tensor:
        c = share(a.clone(), rows)
        return c.mul_(2).sub_(size(a, rows).square_())

    return block


def target(layer: TargetLayer) -> Block:
    """Return ``a_ij <g_i, v~_j>``, what each term adds to a target with the gradient ``g_i``."""
    return Product(layer.value, (Direction(layer.head_gradient),))


def effect(layer: EffectLayer) -> Block:
    """Return ``R_i c_ij``, the effect ``R_i`` of an output, shared out by contributions."""
    return Product(layer.value, (Direction(layer.share),), per_query=layer.effect[:, None])


def joint(weight: float) -> Measure:
    """Contributions joined with target contributions, ``|t_ij|^weight |c_ij|^(1 - weight)``."""
    return partial(_joint, weight)


def _joint(weight: float, layer: EffectLayer) -> Block:
    both = Direction(layer.head_gradient, weight), Direction(layer.share, 1 - weight)
    return Product(layer.value, both)


# ---------------------------------------------------------------------------------------------
# The engine: one pass over a layer, in blocks of queries


#: The measures of a query that use neither its place in the text nor other queries.
_OF_EACH_QUERY: frozenset[Any] = frozenset(
    {
        *(attention, vw, vwon, _contribution, relative_norm, _cosine_with, _geometry),
        *(attention_cosine, projection, closeness),
    }
)


def is_of_each_query(measure: Measure) -> bool:
    """Whether a measure of a few queries is the same if a layer has no other queries.

    See :meth:`AttentionLayer.at`. It is unknown of measures of users, and False for them.

    Example:
        >>> is_of_each_query(contribution()), is_of_each_query(lambda layer: attention(layer))
        (True, False)
    """
    return (measure.func if isinstance(measure, partial) else measure) in _OF_EACH_QUERY


def block_size(layer: AnyLayer) -> int:
    """Return the number of queries of a block."""
    return block_queries(layer.value.shape[0] * layer.H * layer.S, layer.value.device)


def map_blocks(
    layer: AnyLayer, *measures: Measure, chosen: Tensor | None = None
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield the maps of one or more measures, in blocks of queries.

    Args:
        layer: The layer.
        measures: The measures. The attention weights are computed once for all of them.
        chosen: ``(B, T)`` boolean, the queries that count; None for all. The rows of other queries,
            and of padding, are zero. Blocks without a chosen query are skipped.

    Yields:
        The rows of the block, and for each measure ``(B, H, t, n)`` at the first ``n`` keys. The
        caller may overwrite these maps.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> [(rows, a.shape, c.shape) for rows, (a, c) in map_blocks(layer, attention, vwon)]
        [(slice(0, 3, None), torch.Size([1, 2, 3, 3]), torch.Size([1, 2, 3, 3]))]
    """
    *first, last = (measure(layer) for measure in measures)
    known = layer.mask.known_rows if chosen is None else known_rows(layer.mask.chosen(chosen))
    chosen = layer.mask.chosen(chosen)
    for rows in blocks(layer.T, block_size(layer)):
        if known is not None and not any(known[0][rows]):
            continue
        a = layer.weights(rows)
        found = (*(apply(a.clone(), rows) for apply in first), last(a, rows))
        if known is not None and chosen is not None and not all(known[1][rows]):
            for g in found:
                # A product would keep NaN, which padded queries may have.
                g.masked_fill_(~chosen[:, None, rows, None], 0)
        yield rows, found


@without_autocast
def dense_map(layer: AnyLayer, measure: Measure) -> Tensor:
    """Compute the full map of a measure, ``(B, H, T, S)``.

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


@without_autocast
def token_scores(
    layer: AnyLayer,
    measure: Measure,
    reduction: Reduction = "mean",
    *,
    signed: bool = False,
    queries: Tensor | None = None,
) -> Tensor:
    """Reduce a measure over the queries that can see each key (Eq. 15).

    Only one block of queries is in memory at a time, so memory grows linearly with the text. On a
    GPU, one kernel computes the scores of a measure that is a :class:`~captum_cw.products.Product`,
    and holds no block in memory (see :mod:`captum_cw.products`).

    Args:
        layer: The layer.
        measure: The measure.
        reduction: ``"mean"`` (Eq. 15), ``"sum"``, ``"max"`` or ``"rms"`` (the root of the mean
            square), over the queries that see the key.
        signed: Whether to keep signs. By default the absolute values are reduced (measure iv of the
            paper).
        queries: ``(B, T)`` boolean, the queries that count; None for all.

    Returns:
        ``(B, H, S)``. A key that none of the queries sees has the score zero. ``H`` is 1 for a
        measure that aggregates heads.

    Example:
        >>> a = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> mask = QueryMask(2, 2, causal=True)
        >>> values, weight = torch.ones(1, 1, 2, 3), torch.ones(1, 3, 3)
        >>> layer = AttentionLayer.from_tensors(a, values, weight, mask)
        >>> token_scores(layer, attention).tolist()
        [[[0.75, 0.5]]]
    """
    check_choice("reduction", reduction, Reduction)
    H, block = heads_of(measure, layer.H), measure(layer)
    mask = layer.mask if H == layer.H else layer.mask.of_any_head()
    chosen = mask.chosen(queries)
    total = reduce_by_kernel(layer.weights, block, mask, chosen, reduction, signed=signed)
    if total is None:
        total = _reduce_by_blocks(layer, block, mask, H, queries, reduction, signed=signed)
    counts = mask.counts(queries, total.device).to(total.dtype)
    if reduction in ("mean", "rms"):
        total /= counts.clamp(min=1)
    if reduction == "rms":
        total.sqrt_()
    return total.masked_fill_(counts == 0, 0)


def _reduce_by_blocks(
    layer: AnyLayer,
    block: Block,
    mask: QueryMask,
    H: int,
    queries: Tensor | None,
    reduction: Reduction,
    *,
    signed: bool,
) -> Tensor:
    """Return the sums, sums of squares or maxima over queries, ``(B, H, S)``."""
    B, chosen = layer.value.shape[0], mask.chosen(queries)
    total = layer.value.new_full((B, H, layer.S), -math.inf if reduction == "max" else 0.0)
    for rows, (g,) in map_blocks(layer, lambda _: block, chosen=queries):
        if not signed:
            g.abs_()
        part = total[..., : g.shape[-1]]
        if reduction == "max":
            counted = mask.block(rows, g.device)
            if chosen is not None:
                counted = counted & chosen[:, None, rows, None]
            g.masked_fill_(~counted, -math.inf)  # elsewhere, a zero in g is not a value
            torch.maximum(part, g.amax(-2), out=part)
        else:
            # A product with ones is faster than a sum over rows, which reads memory out of order.
            terms = g.square_() if reduction == "rms" else g
            part += (g.new_ones(1, g.shape[-2]) @ terms)[..., 0, :]
    return total


@without_autocast
def query_scores(
    layer: AnyLayer,
    measure: Measure,
    queries: slice,
    *,
    heads: Aggregation = "mean",
    signed: bool = False,
) -> Tensor:
    """Compute the rows of a few queries, aggregated over heads.

    Only these rows and one block of queries are in memory, so memory grows linearly with the text.

    Args:
        layer: The layer.
        measure: The measure.
        queries: A slice of queries with a start and a stop.
        heads: How to aggregate heads.
        signed: Whether to keep signs. By default the absolute values are aggregated.

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


@without_autocast
def head_share(layer: AttentionLayer) -> Tensor:
    """Compute ``sum_j c_ij^h``, each head's share of the layer's output, without a map.

    Returns:
        ``(B, H, T)``, which sums to one over ``H``. Padded queries have zeros.

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
    """Aggregate scores over one dimension, such as heads or layers; None keeps the dimension.

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
# Dense maps from tensors


class Decomposition(NamedTuple):
    """The factors of a contribution (Eq. 14), each ``(B, H, T, S)`` and dimensionless.

    ``contribution = attention * relative_norm * cosine``. ``relative_norm`` and ``cosine`` are zero
    where a query cannot see a key.
    """

    attention: Tensor
    relative_norm: Tensor
    cosine: Tensor
    contribution: Tensor


def decompose(layer: AttentionLayer) -> Decomposition:
    """Compute attention, relative norm, cosine and their product, the contribution (Eq. 14).

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> d = decompose(layer)
        >>> torch.allclose(d.attention * d.relative_norm * d.cosine, d.contribution, atol=1e-5)
        True
    """
    factors = attention, relative_norm, cosine_with("inter"), contribution("inter")
    return Decomposition(*(dense_map(layer, measure) for measure in factors))
