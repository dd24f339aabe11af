"""The influence of tokens through all layers: maps of single layers, and their rollout.

Attention adds a weighted sum over all tokens to the residual stream ``x_i`` of each token. After
one layer the stream is ``r_i = x_i + sum_j sum_h a_ij^h v~_j^h``. A map ``M`` ``(T, T)`` says how
much of ``r_i`` comes from each token ``j``. Its rows sum to one, and its diagonal includes the
stream itself. There are four such maps. Each is a :data:`~captum_cw.functional.Measure` that
aggregates heads:

* :func:`attention_mixing`: ``0.5 A + 0.5 I``, where ``A`` is the attention averaged over heads,
  with normalised rows. The stream counts as much as everything that is added to it (Abnar & Zuidema
  2020);
* :func:`norm_mixing`: the norms of the terms, ``sum_h |a_ij^h| ||v~_j^h||``, and ``||x_i||`` for
  the stream;
* :func:`contribution_mixing`: the share of each term, ``<r_i, sum_h a_ij^h v~_j^h> / ||r_i||^2``,
  and ``<r_i, x_i> / ||r_i||^2`` for the stream. These shares sum to one. Their absolute values are
  taken after the sum over heads, and the rows are then normalised again;
* :func:`alti`: ``max(0, ||y_i||_1 - ||y_i - T_i(x_j)||_1)``, divided by its sum over ``j``. Here
  ``T_i(x_j) = sum_h a_ij^h v~_j^h``, plus ``x_i`` for ``j = i``, and ``y_i`` is ``r_i`` with the
  biases (ALTI: Ferrando, Gallego & Costa-jussa 2022).

:class:`Rollout` multiplies the maps of all layers, ``M_L ... M_1`` (Abnar & Zuidema 2020).

If a model applies a norm between attention and the sum (Gemma 2), terms are measured after that
norm. If a norm follows the sum (BERT), all terms are measured after it, with its scale held fixed.
The rest of a layer, such as its MLP, maps each token alone. It does not mix tokens, so it is left
out. Layers that mix tokens without attention, such as state space models or convolutions, are not
taken into account.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from captum_cw.functional import (
    Aggregation,
    AttentionLayer,
    Measure,
    QueryMask,
    Reduction,
    aggregate,
    check_choice,
    contribution,
    dense_map,
    of_whole_tokens,
    vw,
)
from captum_cw.products import Block
from captum_cw.weights import block_elements, blocks, expand_heads

__all__ = [
    "Rollout",
    "alti",
    "attention_mixing",
    "contribution_mixing",
    "norm_mixing",
    "reduced",
]

# ---------------------------------------------------------------------------------------------
# The map of one layer


def attention_mixing(heads: Aggregation = "mean") -> Measure:
    """``0.5 A + 0.5 I`` with normalised rows, where ``A`` is ``|a_ij|`` aggregated over heads.

    Args:
        heads: How to aggregate heads. Abnar & Zuidema (2020) take the mean.

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
    """``sum_h |a_ij^h| ||v~_j^h||``, plus ``||x_i||`` on the diagonal, with normalised rows."""
    stream, layer = _after_norms(layer)
    norms, size = vw(layer), stream.norm(dim=-1)
    return lambda a, rows: _mixed(norms(a, rows).sum(1), size, rows)


@of_whole_tokens
def contribution_mixing(layer: AttentionLayer) -> Block:
    """``|<r_i, sum_h a_ij^h v~_j^h + [i = j] x_i>|`` with normalised rows.

    ``r_i`` excludes the biases, so that the shares sum to one before the absolute value.
    """
    stream, layer = _after_norms(layer)
    scale = None if layer.scale is None else layer.scale[:, :, None]
    added = layer.output if scale is None else layer.output * scale
    # Rows are normalised, so a common factor of a row does not matter.
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
    """``max(0, ||y_i||_1 - ||y_i - T_i(x_j)||_1)`` with normalised rows (Ferrando et al. 2022).

    A row stays zero if all its entries are zero. The vectors ``T_i(x_j)`` are computed in blocks of
    keys, since all of them together have size ``T x S x d``.
    """
    stream, layer = _after_norms(layer)
    assert layer.residual is not None
    y = layer.residual.result
    sign, size = torch.where(y < 0, -1.0, 1.0).to(y.dtype)[:, None], y.abs()[:, None]
    terms_of = _term_function(layer)

    def block(a: Tensor, rows: slice) -> Tensor:
        B, _, t, n = a.shape
        out = a.new_zeros(B, t, n)
        along, reach = sign[:, :, rows], 2 * size[:, :, rows]
        for keys in blocks(n, max(1, block_elements(y.device) // (B * t * y.shape[-1]))):
            terms = terms_of(a[..., keys], rows, keys)  # (B, m, t, d)
            first, end = max(rows.start, keys.start), min(rows.stop, keys.stop)
            own = torch.arange(first, max(first, end), device=a.device)
            terms[:, own - keys.start, own - rows.start] += stream[:, own]
            # The minimum equals |y| - |y - T|, but does not cancel where T is small beside y.
            terms *= along
            torch.minimum(terms, reach - terms, out=terms)
            out[:, :, keys] = terms.sum(-1).transpose(1, 2)
        return _normalised(out.clamp_(min=0))

    return block


def _after_norms(layer: AttentionLayer) -> tuple[Tensor, AttentionLayer]:
    """Return the stream ``(B, T, d)`` and the layer, both measured after the layer's norms."""
    residual, layer = layer.residual, layer.seen_in("residual")
    if residual is None:
        raise ValueError("The layer's residual stream is unknown: set AttentionLayer.residual.")
    stream, norm = residual.stream, residual.norm
    if norm is None:
        return stream, layer
    return norm.without_scale(stream) * norm.scale[:, :, None], replace(
        layer,
        output_weight=norm.without_scale(layer.output_weight),
        output=norm.without_scale(layer.output),
        scale=norm.scale if layer.scale is None else layer.scale * norm.scale,
    )


def _term_function(layer: AttentionLayer) -> Callable[[Tensor, slice, slice], Tensor]:
    """Return a function from ``a`` ``(B, H, t, m)`` to the terms ``(B, m, t, d)``."""
    w, gate = layer.output_weight, layer.gate

    def terms(a: Tensor, rows: slice, keys: slice) -> Tensor:
        if layer.scale is not None:
            a = a * layer.scale[:, None, rows, None]
        value = expand_heads(layer.value[:, :, keys], layer.H)
        if gate is None or layer.gates_heads:
            a = a if gate is None else a * gate[:, :, rows, :1]
            projected = torch.einsum("bhme,hed->bmhd", value, w)
            return a.permute(0, 3, 2, 1) @ projected
        gated = (a[..., None] * gate[:, :, rows, None]) * value[:, :, None]
        return gated.permute(0, 3, 2, 1, 4).flatten(3) @ w.flatten(0, 1)

    return terms


def _mixed(others: Tensor, own: Tensor, rows: slice) -> Tensor:
    """Add ``own`` ``(B, T)`` to the diagonal of a block, take absolutes and normalise its rows."""
    others.diagonal(rows.start, 1, 2).add_(own[:, rows])
    return _normalised(others.abs_())


def _normalised(x: Tensor) -> Tensor:
    """Divide the rows of ``(B, t, n)`` by their sums, as ``(B, 1, t, n)``. Zero rows stay zero."""
    total = x.sum(-1, keepdim=True)
    return (x / torch.where(total == 0, 1, total))[:, None]


# ---------------------------------------------------------------------------------------------
# The product of all layers


class Rollout:
    """The influence of tokens through all layers: the product of their maps, ``M_L ... M_1``.

    It holds two maps of size ``T x T``: the product, and which tokens reach which.

    Example:
        >>> a = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> layer = AttentionLayer.from_tensors(a, torch.ones(1, 1, 2, 3), torch.ones(1, 3, 3))
        >>> rollout = Rollout()
        >>> rollout.add(layer, attention_mixing())
        >>> rollout.add(layer, attention_mixing())
        >>> rollout.rows().tolist()
        [[[1.0, 0.0], [0.4375, 0.5625]]]
    """

    def __init__(self) -> None:
        self._product: Tensor | None = None  # (B, T, T)
        self._reached: Tensor | None = None  # (B, T, T): which tokens reach which query
        self._unchanged_by: QueryMask | None = None

    def add(self, layer: AttentionLayer, mixing: Measure, name: str = "") -> None:
        """Multiply the product by the map of the next layer.

        Args:
            layer: The next layer, in the order of execution.
            mixing: The measure that gives the layer's map, such as ``attention_mixing()``.
            name: The layer's name, for error messages.

        Raises:
            ValueError: If the layer's queries and keys are not the same tokens, or not the tokens
                of the layers before it.
        """
        if layer.T != layer.S:
            raise ValueError(
                f"Attention layer {name!r} has {layer.S} keys for {layer.T} queries, but a rollout "
                "needs layers whose tokens attend to each other: pass the whole text at once, "
                "without a cache, and choose layers that are not cross-attention."
            )
        if self._product is not None and self._product.shape[1] != layer.T:
            raise ValueError(
                f"Attention layer {name!r} has {layer.T} tokens, but the layers before it have "
                f"{self._product.shape[1]}. A rollout needs layers that read the same tokens: name "
                "them with layer=..., such as those of the encoder, or aggregate the layers in "
                "another way, such as layers='mean'."
            )
        mixed = dense_map(layer, mixing)[:, 0]
        if self._product is not None:
            mixed = mixed.to(self._product.device)  # the layers may lie on several devices
        self._extend_reach(layer.mask, mixed)
        # No entry is negative, so nothing cancels and float32 is precise enough.
        self._product = mixed if self._product is None else mixed @ self._product

    def _extend_reach(self, mask: QueryMask, mixed: Tensor) -> None:
        if self._reached is None:
            self._reached = _visible(mask, mixed)
        elif self._unchanged_by is not mask:  # layers that share a mask need one product
            wider = (_visible(mask, mixed).to(mixed) @ self._reached.to(mixed)) > 0
            self._unchanged_by = mask if torch.equal(wider, self._reached) else None
            self._reached = wider

    def rows(self, chosen: Tensor | None = None) -> Tensor:
        """Return the influence of each token on each query.

        Args:
            chosen: ``(B, T)`` boolean, the queries to return; None for all.

        Returns:
            ``(B, T, T)``. Each row sums to one; the rows of other queries, and of padding, are
            zero.
        """
        assert self._product is not None  # a layer was added
        return self._product if chosen is None else self._product * chosen[:, :, None]

    def scores(self, reduction: Reduction = "mean", chosen: Tensor | None = None) -> Tensor:
        """Reduce the influence of each token over the queries that it reaches (Eq. 15).

        Args:
            reduction: How to reduce over queries.
            chosen: ``(B, T)`` boolean, the queries that count; None for all.

        Returns:
            ``(B, T)``.
        """
        assert self._reached is not None  # a layer was added
        if chosen is not None:
            chosen = chosen.to(self._reached.device)
        seen = self._reached if chosen is None else self._reached & chosen[:, :, None]
        return reduced(self.rows(chosen), seen, reduction)


def _visible(mask: QueryMask, like: Tensor) -> Tensor:
    """Return the tokens that each query sees in a layer, and itself, ``(B, T, T)`` boolean."""
    B, T, _ = like.shape
    seen = mask.of_any_head().block(slice(0, T), like.device)[:, 0]
    seen = (seen | torch.eye(T, dtype=torch.bool, device=like.device)).expand(B, T, T)
    return seen if mask.real is None else seen & mask.real.to(like.device)[:, :, None]


def reduced(influence: Tensor, seen: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Reduce a map over the queries that see each token (Eq. 15).

    Args:
        influence: ``(B, T, S)``, not negative, and zero where not ``seen``.
        seen: ``(B, T, S)`` boolean: whether the query sees the token and counts.
        reduction: ``"mean"``, ``"sum"``, ``"max"`` or ``"rms"``.

    Returns:
        ``(B, S)``. A token that no query sees has the score zero.

    Example:
        >>> influence = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
        >>> reduced(influence, influence > 0).tolist()
        [[0.75, 0.5]]
    """
    check_choice("reduction", reduction, Reduction)
    if reduction in ("max", "sum"):
        return aggregate(influence, reduction, dim=1)
    counts = seen.sum(1).clamp(min=1)
    if reduction == "mean":
        return influence.sum(1) / counts
    return (influence.square().sum(1) / counts).sqrt()
