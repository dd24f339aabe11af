"""Influence of tokens across layers: rollout, flow, and the mixing of tokens in one layer.

Attention adds to the residual stream ``x_i`` of each token a sum over others, so that one layer
makes of it ``r_i = x_i + sum_j sum_h a_ij^h v~_j^h``. How much of ``r_i`` each token ``j`` makes is
a map ``M`` ``(T, T)`` whose rows sum to one; the stream's own part stands on the diagonal. There
are four of them, each a :data:`~captum_cw.functional.Measure` that puts heads together:

* :func:`attention_mixing`: ``0.5 A + 0.5 I``, ``A`` the attention averaged over heads, rows
  normalised (Abnar & Zuidema 2020): the stream counts as much as all that is added to it;
* :func:`norm_mixing`: the norms of the terms, ``sum_h |a_ij^h| ||v~_j^h||``, and ``||x_i||`` for
  the stream;
* :func:`contribution_mixing`: the share of each term, ``<r_i, sum_h a_ij^h v~_j^h> / ||r_i||^2``,
  and ``<r_i, x_i> / ||r_i||^2`` for the stream. Shares sum to one; their absolute values are taken
  once heads are added up, and rows are normalised again;
* :func:`alti`: with ``T_i(x_j) = sum_h a_ij^h v~_j^h``, and ``x_i`` added to it for ``j = i``, what
  ``max(0, ||y_i||_1 - ||y_i - T_i(x_j)||_1)`` is of its sum over ``j``; ``y_i`` is ``r_i`` with
  the biases (ALTI: Ferrando, Gallego & Costa-jussa 2022).

Layers are put together by :class:`Rollout`, the product ``M_L ... M_1``, or by :class:`Flow`, the
maximum flow from an output position to each input token through the layers, whose edges have the
capacities ``M`` (Abnar & Zuidema 2020).

Where a norm stands between attention and the sum (Gemma 2), terms are measured after it, and where
one follows the sum (BERT), all of them are, its scale held fixed. What else a layer does, as its
MLP, is a map of each token alone: it mixes nothing, and is left out. What mixes tokens without
attention, as a state space model or a convolution, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from captum_cw.functional import (
    BLOCK_ELEMENTS,
    Aggregation,
    AttentionLayer,
    Block,
    Measure,
    QueryMask,
    Reduction,
    aggregate,
    blocks,
    check_choice,
    contribution,
    dense_map,
    expand_heads,
    of_whole_tokens,
    vw,
    widest,
)

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "Flow",
    "LayerPath",
    "Rollout",
    "Through",
    "alti",
    "attention_mixing",
    "contribution_mixing",
    "max_flow",
    "norm_mixing",
    "reduced",
]

Through = Literal["rollout", "flow"]

#: How many units a capacity of one is, since SciPy counts in 32-bit integers.
UNITS = 10**9

#: Flows times the edges that each may run through, at most. A model of 30 layers, one query and 512
#: tokens come near it, and take minutes; 128 tokens take seconds.
FLOW_STEPS = 2**32


# ---------------------------------------------------------------------------------------------
# One layer: how it mixes tokens


def attention_mixing(heads: Aggregation = "mean") -> Measure:
    """``0.5 A + 0.5 I``, rows normalised; ``A`` is ``|a_ij|`` aggregated over heads.

    Args:
        heads: How; the mean is that of Abnar & Zuidema (2020).

    Example:
        >>> a = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> layer = AttentionLayer.from_tensors(a, torch.ones(1, 1, 2, 3), torch.ones(1, 3, 3))
        >>> dense_map(layer, attention_mixing()).tolist()
        [[[[1.0, 0.0], [0.25, 0.75]]]]
    """
    return of_whole_tokens(partial(_attention_mixing, heads))


def _attention_mixing(heads: Aggregation, layer: AttentionLayer) -> Block:
    half = layer.value.new_full((layer.value.shape[0], layer.T), 0.5)
    return lambda a, rows: _mixed(aggregate(a.abs_(), heads, dim=1).mul_(0.5), half, rows)


@of_whole_tokens
def norm_mixing(layer: AttentionLayer) -> Block:
    """``sum_h |a_ij^h| ||v~_j^h||``, and ``||x_i||`` on the diagonal, rows normalised."""
    stream, layer = _on_the_stream(layer)
    norms, size = vw(layer), stream.norm(dim=-1)
    return lambda a, rows: _mixed(norms(a, rows).sum(1), size, rows)


@of_whole_tokens
def contribution_mixing(layer: AttentionLayer) -> Block:
    """``|<r_i, sum_h a_ij^h v~_j^h + [i = j] x_i>|``, rows normalised: shares of the stream.

    ``r_i`` is without the biases, so that the shares sum to one before the absolute value.
    """
    stream, layer = _on_the_stream(layer)
    scale = None if layer.scale is None else layer.scale[:, :, None]
    added = layer.output if scale is None else layer.output * scale
    # A row of shares is normalised, whatever it is relative to.
    whole = replace(layer, output=stream + added)
    shares = contribution("inter")(whole)
    norm2 = whole.direction("inter")[1][:, 0]
    own = torch.where(norm2 == 0, 0, (whole.output * stream).sum(-1) / norm2)

    def block(a: Tensor, rows: slice) -> Tensor:
        together = shares(a, rows).sum(1)
        return _mixed(together if scale is None else together * scale[:, rows], own, rows)

    return block


@of_whole_tokens
def alti(layer: AttentionLayer) -> Block:
    """``max(0, ||y_i||_1 - ||y_i - T_i(x_j)||_1)``, rows normalised (Ferrando et al. 2022).

    A row in which no part leads towards ``y_i`` stays zero. The vectors ``T_i(x_j)`` are made in
    blocks of keys, since all of them are ``T x S x d``.
    """
    stream, layer = _on_the_stream(layer)
    assert layer.residual is not None
    y = layer.residual.result
    sign, size = torch.where(y < 0, -1.0, 1.0).to(y.dtype)[:, None], y.abs()[:, None]
    transformed = _transformed(layer)

    def block(a: Tensor, rows: slice) -> Tensor:
        B, _, t, n = a.shape
        out = a.new_zeros(B, t, n)
        along, reach = sign[:, :, rows], 2 * size[:, :, rows]
        for keys in blocks(n, max(1, BLOCK_ELEMENTS // (B * t * y.shape[-1]))):
            terms = transformed(a[..., keys], rows, keys)  # (B, m, t, d)
            first, end = max(rows.start, keys.start), min(rows.stop, keys.stop)
            own = torch.arange(first, max(first, end), device=a.device)
            terms[:, own - keys.start, own - rows.start] += stream[:, own]
            # |y| - |y - T| is the least of the two, and loses no small T beside a large y.
            terms *= along
            torch.minimum(terms, reach - terms, out=terms)
            out[:, :, keys] = terms.sum(-1).transpose(1, 2)
        return _normalised(out.clamp_(min=0))

    return block


def _on_the_stream(layer: AttentionLayer) -> tuple[Tensor, AttentionLayer]:
    """The stream ``(B, T, d)``, and the layer, both measured where their sum goes on."""
    residual, layer = layer.residual, layer.seen_in("residual")
    if residual is None:
        raise ValueError(
            "The residual stream that the layer adds to is not known: give AttentionLayer.residual."
        )
    stream, norm = residual.stream, residual.norm
    if norm is None:
        return stream, layer
    return norm.without_scale(stream) * norm.scale[:, :, None], replace(
        layer,
        output_weight=norm.without_scale(layer.output_weight),
        output=norm.without_scale(layer.output),
        scale=norm.scale if layer.scale is None else layer.scale * norm.scale,
    )


def _transformed(layer: AttentionLayer) -> Callable[[Tensor, slice, slice], Tensor]:
    """What gives ``sum_h a_ij^h v~_ij^h`` ``(B, m, t, d)`` of ``a`` ``(B, H, t, m)``."""
    w, gate = layer.output_weight, layer.gate

    def together(a: Tensor, rows: slice, keys: slice) -> Tensor:
        if layer.scale is not None:
            a = a * layer.scale[:, None, rows, None]
        value = expand_heads(layer.value[:, :, keys], layer.H)
        if gate is None or layer.gates_heads:
            a = a if gate is None else a * gate[:, :, rows, :1]
            projected = torch.einsum("bhme,hed->bmhd", value, w)
            return a.permute(0, 3, 2, 1) @ projected
        gated = (a[..., None] * gate[:, :, rows, None]) * value[:, :, None]
        return gated.permute(0, 3, 2, 1, 4).flatten(3) @ w.flatten(0, 1)

    return together


def _mixed(others: Tensor, own: Tensor, rows: slice) -> Tensor:
    """``(B, t, n)`` with ``own`` ``(B, T)`` added on the diagonal; absolute, rows normalised."""
    others.diagonal(rows.start, 1, 2).add_(own[:, rows])
    return _normalised(others.abs_())


def _normalised(x: Tensor) -> Tensor:
    """Rows ``(B, t, n)`` over their sums, as ``(B, 1, t, n)``; rows of zeros stay."""
    total = x.sum(-1, keepdim=True)
    return (x / torch.where(total == 0, 1, total))[:, None]


# ---------------------------------------------------------------------------------------------
# All layers


class LayerPath:
    """Takes layers in order, and says what each query owes to each token of the text."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None  # (B, T, T): what reaches a query through all layers
        self._last: tuple[QueryMask, bool] | None = None

    def add(self, layer: AttentionLayer, mixing: Measure, name: str = "") -> None:
        """Goes through one more layer.

        Args:
            layer: The layer.
            mixing: How it mixes tokens.
            name: Of the layer, for messages.

        Raises:
            ValueError: If it is of other tokens than those before it.
        """
        if layer.T != layer.S:
            raise ValueError(
                f"Attention layer {name!r} has {layer.S} keys for {layer.T} queries, and only "
                "layers whose tokens attend to each other can be put together: give the whole text "
                "at once, without a cache, and layers that are no cross-attention."
            )
        if self._seen is not None and self._seen.shape[1] != layer.T:
            raise ValueError(
                f"Attention layer {name!r} has {layer.T} tokens, those before it "
                f"{self._seen.shape[1]}: choose layers over one text (layer=...), such as those "
                "of the encoder, or another choice of layers, such as 'mean'."
            )
        mixed = dense_map(layer, mixing)[:, 0]
        if self._seen is not None:
            mixed = mixed.to(self._seen.device)  # layers may lie on several
        self._reach(layer.mask, mixed)
        self._take(mixed)

    def _reach(self, mask: QueryMask, mixed: Tensor) -> None:
        if self._seen is None:
            self._seen, self._last = _visible(mask, mixed), None
            return
        if self._last is not None and self._last[0] is mask and self._last[1]:
            return  # the same mask showed nothing more before
        wider = (_visible(mask, mixed).to(mixed) @ self._seen.to(mixed)) > 0
        self._last = mask, torch.equal(wider, self._seen)
        self._seen = wider

    def _take(self, mixed: Tensor) -> None:
        raise NotImplementedError

    def rows(self, chosen: Tensor | None = None) -> Tensor:
        """The influence of each token on each query.

        Args:
            chosen: ``(B, T)`` boolean, which queries are asked for; None for all.

        Returns:
            ``(B, T, T)``; rows of other queries, and of padding, are zero.
        """
        raise NotImplementedError

    def scores(self, reduction: Reduction = "mean", chosen: Tensor | None = None) -> Tensor:
        """The influence of each token, reduced over the queries that it reaches (Eq. 15).

        Args:
            reduction: Over queries.
            chosen: ``(B, T)`` boolean, which queries count; None for all.

        Returns:
            ``(B, T)``.
        """
        assert self._seen is not None  # a layer was added
        if chosen is not None:
            chosen = chosen.to(self._seen.device)
        seen = self._seen if chosen is None else self._seen & chosen[:, :, None]
        return reduced(self.rows(chosen), seen, reduction)


class Rollout(LayerPath):
    """The product of the maps of all layers, ``M_L ... M_1``; holds no map of a single layer.

    Example:
        >>> a = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> layer = AttentionLayer.from_tensors(a, torch.ones(1, 1, 2, 3), torch.ones(1, 3, 3))
        >>> path = Rollout()
        >>> path.add(layer, attention_mixing())
        >>> path.add(layer, attention_mixing())
        >>> path.rows().tolist()
        [[[1.0, 0.0], [0.4375, 0.5625]]]
    """

    def __init__(self) -> None:
        super().__init__()
        self._product: Tensor | None = None

    def _take(self, mixed: Tensor) -> None:
        # No entry is negative, so nothing cancels and float32 loses nothing that matters.
        self._product = mixed if self._product is None else mixed @ self._product

    def rows(self, chosen: Tensor | None = None) -> Tensor:
        """See :meth:`LayerPath.rows`; each row sums to one."""
        assert self._product is not None  # a layer was added
        return self._product if chosen is None else self._product * chosen[:, :, None]


class Flow(LayerPath):
    """The maximum flow from a query, after the last layer, to each token, before the first.

    Holds the maps of all layers; runs on the CPU, and slowly: one flow for each query and token.

    Example:
        >>> a = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> layer = AttentionLayer.from_tensors(a, torch.ones(1, 1, 2, 3), torch.ones(1, 3, 3))
        >>> path = Flow()
        >>> path.add(layer, attention_mixing())
        >>> path.add(layer, attention_mixing())
        >>> path.rows(torch.tensor([[False, True]])).tolist()
        [[[0.0, 0.0], [0.5, 0.75]]]
    """

    def __init__(self) -> None:
        super().__init__()
        self._maps: list[Tensor] = []

    def _take(self, mixed: Tensor) -> None:
        self._maps.append(mixed.cpu())
        self._check(1)

    def _check(self, queries: int) -> None:
        L, T = len(self._maps), self._maps[0].shape[1]
        steps = queries * L * T**3
        if steps > FLOW_STEPS:
            raise ValueError(
                f"Flows to {T} tokens from {queries} of them, through {L} layers or more, need "
                f"{steps:.1e} steps, and {FLOW_STEPS:.1e} are the most that is waited for: choose "
                "fewer queries, a shorter text, or layers='rollout'."
            )

    def rows(self, chosen: Tensor | None = None) -> Tensor:
        """See :meth:`LayerPath.rows`; a row has no fixed sum, each entry is at most one.

        Raises:
            ValueError: If that would take too long, with the figure.
        """
        out = torch.zeros_like(self._maps[0])
        wanted = out.new_ones(out.shape[:2], dtype=torch.bool) if chosen is None else chosen.cpu()
        self._check(int(wanted.sum(1).max()))
        for b in range(len(out)):
            maps = [mixed[b] for mixed in self._maps]
            for query in wanted[b].nonzero()[:, 0].tolist():
                out[b, query] = max_flow(maps, query)
        assert self._seen is not None
        return out.to(self._seen.device)


def _visible(mask: QueryMask, like: Tensor) -> Tensor:
    """Which tokens a layer shows to each query, itself included, ``(B, T, T)`` boolean."""
    B, T, _ = like.shape
    seen = mask.of_any_head().block(slice(0, T))
    own = torch.eye(T, dtype=torch.bool, device=like.device)
    seen = own.new_ones(B, T, T) if seen is None else seen[:, 0].to(like.device) | own
    seen = seen.expand(B, T, T)
    return seen if mask.real is None else seen & mask.real.to(like.device)[:, :, None]


def max_flow(maps: Sequence[Tensor], query: int) -> Tensor:
    """The maximum flow from one query to each token, through maps ``(T, T)`` of all layers.

    Needs SciPy. Capacities are rounded to a billionth.

    Args:
        maps: The first layer's first; an edge from each query to each key.
        query: After the last layer.

    Returns:
        ``(T,)``.

    Example:
        >>> max_flow([torch.tensor([[1.0, 0.0], [0.25, 0.75]])] * 2, 1).tolist()
        [0.5, 0.75]
    """
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    edges = np.stack([_in_units(mixed) for mixed in maps])
    L, T, _ = edges.shape
    below = _reached(edges[::-1], query)[::-1]  # by the query: after no layer, one, ...
    flows = maps[0].new_zeros(T)
    for token in np.flatnonzero(below[0]).tolist():
        above = _reached(edges.transpose(0, 2, 1), token)
        used = edges * below[1:, :, None] * above[:-1, None, :]
        layer, i, j = used.nonzero()
        graph = csr_matrix(
            (used[layer, i, j], ((layer + 1) * T + i, layer * T + j)), shape=((L + 1) * T,) * 2
        )
        flows[token] = maximum_flow(graph, L * T + query, token).flow_value / UNITS
    return flows


def _in_units(capacities: Tensor) -> npt.NDArray[Any]:
    import numpy as np

    known = capacities.to(widest(capacities.device)).numpy()
    return np.rint(known.astype(np.float64) * UNITS).astype(np.int32)


def _reached(edges: npt.NDArray[Any], start: int) -> npt.NDArray[Any]:
    """What can be reached from one node through the first 0, 1, ... layers, ``(L + 1, T)``."""
    import numpy as np

    reached = np.zeros((len(edges) + 1, edges.shape[1]), dtype=bool)
    reached[0, start] = True
    for n, layer in enumerate(edges):
        reached[n + 1] = (layer[reached[n]] > 0).any(0)
    return reached


def reduced(influence: Tensor, seen: Tensor, reduction: Reduction = "mean") -> Tensor:
    """A map reduced over the queries that see each token (Eq. 15).

    Args:
        influence: ``(B, T, S)``, not negative, zero where not ``seen``.
        seen: ``(B, T, S)`` boolean: which queries count for which token.
        reduction: ``"mean"``, ``"sum"``, ``"max"`` or ``"rms"``.

    Returns:
        ``(B, S)``; zero for a token that no query sees.

    Example:
        >>> influence = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
        >>> reduced(influence, influence > 0).tolist()
        [[0.75, 0.5]]
    """
    check_choice("reduction", reduction, Reduction)
    if reduction == "max":
        return influence.amax(1)
    if reduction == "sum":
        return influence.sum(1)
    counts = seen.sum(1).clamp(min=1)
    if reduction == "mean":
        return influence.sum(1) / counts
    return (influence.square().sum(1) / counts).sqrt()
