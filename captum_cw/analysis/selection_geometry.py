"""Measure how well selected keys are separated from the other keys, on plain tensors.

In one head, a query turns its keys into the terms ``z_j = a_j v_j`` (before ``W_O``, and before any
gate). A set ``S`` of ``N`` keys has the sum ``s_N = sum_S z_j``, not renormalised. Each key has a
distance from that sum, ``D_j = ||z_j - s_N||`` or ``1 - cos(z_j, s_N)`` (*Geometric Analysis of
Token Selection in Multi-Head Attention*, arXiv 2602.01893). With ``r_max`` the largest distance in
``S`` and ``r_min`` the smallest distance outside,

    precision = N / (N + #{j not in S: D_j <= r_max})
    recall    = #{j in S: D_j < r_min} / N

and F is their harmonic mean. A distance that equals ``r_max`` or ``r_min`` counts against both.

The code never builds a tensor of size ``T x S x d_h``. It compares ``||z_j||^2 - 2 <z_j, s_N>``, in
float64. The full squared distance also has ``||s_N||^2``, which is the same for all keys and would
only round away small terms.

``Q`` is the number of sampled queries, of the ``T`` queries of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_cw.analysis.streaming import visible_blocks
from captum_cw.functional import AttentionLayer, attention
from captum_cw.weights import expand_heads

Distance = Literal["euclidean", "cosine"]
"""The distance of a term from the sum of a set: ``||z_j - s||``, or ``1 - cos(z_j, s)``."""

EPSILON = torch.finfo(torch.float64).eps


class Terms(NamedTuple):
    """The terms ``z_j = a_j v_j`` of some queries, in factors; float64.

    Args:
        attention: ``a_j``, ``(H, Q, S)``, zero for keys that a query does not see.
        value: ``v_j``, ``(H, S, d_h)``.
        visible: Which keys each query sees, boolean ``(H or 1, Q, S)``.
        norms: ``||z_j||``, ``(H, Q, S)``.
    """

    attention: Tensor
    value: Tensor
    visible: Tensor
    norms: Tensor

    @classmethod
    def of(cls, attention: Tensor, value: Tensor, visible: Tensor | None = None) -> Terms:
        """Build the terms from attention weights and values.

        Args:
            attention: ``(H, Q, S)``.
            value: ``(H, S, d_h)``.
            visible: ``(H or 1, Q, S)``; by default, all keys are visible.

        Example:
            >>> Terms.of(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[2.0], [4.0]]])).norms
            tensor([[[1., 2.]]], dtype=torch.float64)
        """
        attention, value = attention.double(), value.double()
        if visible is None:
            visible = torch.ones_like(attention[:1], dtype=torch.bool)
        attention = attention.masked_fill(~visible, 0)
        norms = attention.abs() * value.norm(dim=-1)[:, None]
        return cls(attention, value, visible, norms)

    @property
    def seen(self) -> Tensor:
        """The number of keys that each query sees, ``(H or 1, Q)``."""
        return self.visible.sum(-1)


class Separation(NamedTuple):
    """How well a set of keys is separated from the other keys, ``(H, Q)`` each.

    By our definition, ``sink_similarity`` is ``cos(v_1, s_N)``, of the first key's value and the
    sum. The paper's formula is not known to us.
    """

    precision: Tensor
    recall: Tensor
    f: Tensor
    sink_similarity: Tensor


def separation(terms: Terms, chosen: Tensor, distance: Distance = "euclidean") -> Separation:
    """Compute precision, recall and F of one set of keys per query, around its own sum.

    Distances that differ by no more than the rounding error of an inner product count as equal. The
    cosine with a zero vector is zero.

    Args:
        terms: The terms.
        chosen: The set of each query, boolean ``(H or 1, Q, S)``. All sets have the same size, of
            at least one key and fewer keys than the query sees. Results for queries that see fewer
            keys are meaningless.
        distance: ``"euclidean"`` or ``"cosine"``.

    Returns:
        Four numbers per query. The first three are between 0 and 1.

    Example:
        >>> terms = Terms.of(torch.tensor([[[0.6, 0.3, 0.1]]]), torch.ones(1, 3, 1))
        >>> apart = separation(terms, torch.tensor([[[True, True, False]]]))
        >>> apart.precision.item(), apart.recall.item(), apart.sink_similarity.item()
        (1.0, 1.0, 1.0)
    """
    a, v, visible, norms = terms
    total = (a * chosen) @ v
    along = (total @ v.transpose(-1, -2)).mul_(a)  # <z_j, s>
    length = total.norm(dim=-1, keepdim=True)
    rounding = 4 * v.shape[-1] * EPSILON
    if distance == "euclidean":
        squares = norms.square()
        far = along.mul_(-2).add_(squares)
        error = squares.addcmul_(norms, length, value=2).mul_(rounding)
    else:
        sizes = norms * length
        far = torch.where(sizes > 0, along / sizes, 0).neg_()  # grows as 1 - cos does
        error = torch.full_like(length, rounding)
    inside = torch.where(chosen, far + error, -torch.inf)
    outside = torch.where(visible & ~chosen, far - error, torch.inf)
    r_max, r_min = inside.amax(-1, keepdim=True), outside.amin(-1, keepdim=True)
    size = chosen.sum(-1)
    precision = size / (size + (outside <= r_max).sum(-1)).double()
    recall = 1 - (inside >= r_min).sum(-1).double() / size
    f = 2 * precision * recall / (precision + recall)
    sizes = length * v[:, :1].norm(dim=-1, keepdim=True)
    similarity = torch.where(sizes > 0, total @ v[:, 0, :, None] / sizes, 0)[..., 0]
    return Separation(precision, recall, f, similarity)


def attention_ranks(terms: Terms) -> Tensor:
    """Rank the keys of each query by falling attention, from 0: ``(H, Q, S)``.

    Keys with equal weights are ranked by index; keys that a query does not see are last.

    Example:
        >>> attention_ranks(Terms.of(torch.tensor([[[0.2, 0.4, 0.4]]]), torch.ones(1, 3, 1)))
        tensor([[[2, 0, 1]]])
    """
    return _ranks(terms.attention.masked_fill(~terms.visible, -torch.inf))


def random_ranks(visible: Tensor, generator: torch.Generator) -> Tensor:
    """Rank the keys that each query sees at random, from 0, in the shape of ``visible``.

    Keys that a query does not see are last. The first ``N`` ranks are a uniform sample of ``N``
    visible keys.
    """
    keys = torch.rand(visible.shape, generator=generator, dtype=torch.float32, device="cpu")
    keys = keys.to(visible.device)
    return _ranks(keys.masked_fill(~visible, -1))


def _ranks(score: Tensor) -> Tensor:
    """Rank by falling score along the last dimension, from 0."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def draw_queries(
    texts: Sequence[Tensor], lowest: int, count: int | None, seed: int
) -> list[Tensor]:
    """Draw ``count`` of the queries ``lowest, ..., T - 1`` of each text, ascending; None gives all.

    Raises:
        ValueError: If ``count`` is not an integer of at least 1.

    Example:
        >>> draw_queries([torch.arange(6)], 2, None, seed=0)
        [tensor([2, 3, 4, 5])]
    """
    if count is not None:
        check_count("queries", count)
    drawn = []
    for text, ids in enumerate(texts):
        queries = np.arange(lowest, len(ids))
        if count is not None and count < len(queries):
            queries = np.random.default_rng([seed, text]).choice(queries, count, replace=False)
        drawn.append(torch.from_numpy(np.sort(queries)))
    return drawn


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: give an integer of at least 1.")


def terms_of(layer: AttentionLayer, queries: Tensor) -> Iterator[tuple[Tensor, Terms]]:
    """Yield the terms of some queries of a layer, in blocks.

    Args:
        layer: A layer with one example.
        queries: The queries, ``(Q,)``.

    Yields:
        The queries of a block, and their terms over the keys that any query of the block can see.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> [(some.tolist(), terms.attention.shape)
        ...  for some, terms in terms_of(layer, torch.tensor([0, 2]))]
        [([0, 2], torch.Size([2, 2, 3]))]
    """
    device = layer.value.device
    chosen = torch.zeros(1, layer.T, dtype=torch.bool, device=device)
    chosen[0, queries.to(device)] = True
    value = expand_heads(layer.value, layer.H)[0]
    for rows, visible, (a,) in visible_blocks(layer, attention, chosen=chosen):
        picked = chosen[0, rows]
        places = picked.nonzero()[:, 0].cpu() + rows.start
        yield places, Terms.of(a[:, picked], value[:, : a.shape[-1]], visible[:, picked])
