"""One attention map as a graph over tokens: its sinks, and the divergence of heads from their mean.

After *What are you sinking? A geometric approach on attention sink* (arXiv 2508.02546). ``A`` is
the attention of a layer averaged over heads, ``(T, T)``. Its graph at a threshold ``t`` is

    B = 1[A > t] with a zero diagonal,   W = max(B, B^T),   L = D - W,

where ``D`` holds the degrees of ``W``. :func:`graph_numbers` measures how close the graph is to a
star. Sinks are the keys that receive the most attention (:func:`received_attention`,
:func:`sinks_above`).

The paper's topological step is left out. It degenerates on causal maps, because attention goes in
one direction only. If attention is negative, its absolute value is used.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import eigvalsh
from torch import Tensor

from captum_cw.analysis.result import Array
from captum_cw.analysis.streaming import visible_blocks
from captum_cw.functional import AttentionLayer, attention, map_blocks

#: By our rule, a query follows a key if the attention is at least this many times that of a uniform
#: row.
FOLLOWER_FACTOR = 2.0
#: By our rule, a key can be a sink if at least this fraction of the queries of the most visible key
#: see it.
MIN_QUERY_FRACTION = 0.25


class GraphNumbers(NamedTuple):
    """Measures of the graph of one attention map.

    Attributes:
        edges: The number of directed edges, as a fraction of ``n (n - 1)``.
        fiedler: The second smallest eigenvalue of ``L``: 0 for a disconnected graph, 1 for a star,
            ``n`` for a complete graph.
        gap: The third smallest eigenvalue minus the second; NaN for two tokens.
        centralisation: Freeman's centralisation of the degrees of ``W``: 1 for a star, 0 if all
            degrees are equal; NaN for two tokens.
        degree_variance: The variance of the degrees of ``W`` over tokens.
        star_likeness: The largest in-degree of ``B``, divided by ``n - 1``.
        star_gini: 0.3 times ``star_likeness`` plus 0.7 times the Gini coefficient of the
            in-degrees.
    """

    edges: float
    fiedler: float
    gap: float
    centralisation: float
    degree_variance: float
    star_likeness: float
    star_gini: float


def graph_numbers(attention: Tensor, threshold: float) -> GraphNumbers:
    """Measure the graph of an attention map at a threshold.

    Args:
        attention: Attention averaged over heads, ``(T, T)``, of two or more tokens. Rows are
            queries.
        threshold: Attention above this is an edge.

    Example:
        >>> star = torch.zeros(5, 5)
        >>> star[:, 0] = 1
        >>> numbers = graph_numbers(star, 0.5)
        >>> round(numbers.fiedler, 6), numbers.centralisation, numbers.star_likeness
        (1.0, 1.0, 1.0)
    """
    directed = attention.numpy(force=True) > threshold
    np.fill_diagonal(directed, False)
    n = len(directed)
    undirected = (directed | directed.T).astype(np.float64)
    degrees = undirected.sum(0)
    lowest = eigvalsh(np.diag(degrees) - undirected, subset_by_index=(0, min(2, n - 1)))
    received = directed.sum(0)
    star = float(received.max()) / (n - 1)
    return GraphNumbers(
        edges=float(received.sum()) / (n * (n - 1)),
        fiedler=max(0.0, float(lowest[1])),  # rounding can make it negative
        gap=float(lowest[2] - lowest[1]) if n > 2 else float("nan"),
        centralisation=(
            float((degrees.max() - degrees).sum()) / ((n - 1) * (n - 2)) if n > 2 else float("nan")
        ),
        degree_variance=float(degrees.var()),
        star_likeness=star,
        star_gini=0.3 * star + 0.7 * _gini(received),
    )


def _gini(x: Array) -> float:
    """Compute the Gini coefficient of nonnegative numbers; 0 if all are zero."""
    n, total = len(x), float(x.sum())
    if total == 0:
        return 0.0
    return float(((2 * np.arange(1, n + 1) - n - 1) * np.sort(x)).sum()) / (n * total)


class Received(NamedTuple):
    """The attention that each key receives from other tokens, ``(T,)`` each.

    Attributes:
        mean: The mean attention from the other queries that can see the key; 0 if none can.
        followers: The fraction of these queries that give the key at least twice the attention of a
            uniform row.
        queries: The number of these queries.
    """

    mean: Array
    followers: Array
    queries: Array

    @property
    def compared(self) -> Array:
        """Select the keys that can be sinks: those that enough queries see (our rule).

        Enough is a quarter of the queries that see the most visible key. The mean of a key that few
        queries see says little: only one other token sees the last but one token of a causal map,
        and every token attends to its neighbours.
        """
        enough: Array = self.queries >= max(1.0, MIN_QUERY_FRACTION * self.queries.max())
        return enough


def received_attention(attention: Tensor, visible: Tensor) -> Received:
    """Compute how much attention each key receives from the other tokens that can see it.

    The attention of a token to itself is left out, as in the graph: a sink attracts the attention
    of other tokens.

    Args:
        attention: Attention averaged over heads, ``(T, T)``.
        visible: Which keys each query can see, boolean ``(T, T)``.

    Example:
        >>> a = torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.75, 0.125, 0.125]])
        >>> received = received_attention(a, torch.ones(3, 3, dtype=torch.bool).tril())
        >>> received.mean.tolist(), received.followers.tolist(), received.queries.tolist()
        ([0.75, 0.125, 0.0], [0.5, 0.0, 0.0], [2.0, 1.0, 0.0])
    """
    a, sees = attention.double(), visible.double()
    uniform = a.sum(-1, keepdim=True) / sees.sum(-1, keepdim=True).clamp(min=1)
    others = sees.clone().fill_diagonal_(0)
    queries = others.sum(0)
    mean, followers = (
        ((x * others).sum(0) / queries.clamp(min=1)).numpy(force=True)
        for x in (a, a >= FOLLOWER_FACTOR * uniform)
    )
    return Received(mean, followers, queries.numpy(force=True))


def sinks_above(received: Received, percentile: float) -> Array:
    """Select the sinks: keys whose received attention reaches a percentile of all keys.

    By our rule, only keys that enough queries see are compared (:attr:`Received.compared`), and the
    keys that receive the least are never sinks. So a map in which all keys receive the same
    attention does not have a sink.

    Returns:
        Boolean ``(T,)``.

    Example:
        >>> import numpy as np
        >>> received = Received(np.array([0.5, 0.1, 0.1, 0.2]), np.zeros(4), np.full(4, 3))
        >>> sinks_above(received, 80).tolist()
        [True, False, False, False]
    """
    compared = received.compared
    values = received.mean[compared]
    if not len(values):
        return compared
    cutoff = np.percentile(values, percentile)
    sinks: Array = compared & (received.mean >= cutoff) & (received.mean > values.min())
    return sinks


def head_divergence(layer: AttentionLayer, average: Tensor, sinks: Tensor) -> Tensor:
    """Compute how far heads diverge from their mean, with and without the columns of sinks.

    For each query and head, this is ``KL(a_i^h || A_i)``. Without sinks, their columns are left out
    of both rows, and the rest is renormalised. If all attention of a row is on sinks, nothing is
    left, as for the first query of a causal map. Such a row has no divergence: it is left out of
    both means and counted.

    Args:
        layer: A layer with one example.
        average: Its attention averaged over heads, ``(T, T)``.
        sinks: ``P`` sets of columns, boolean ``(P, T)``.

    Returns:
        ``(4, P)``, float64: the sums of both divergences in nats, the number of rows they are over,
        and the number of rows with nothing left.

    Example:
        >>> a = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]]])
        >>> layer = AttentionLayer.from_tensors(a, torch.ones(1, 1, 2, 3), torch.ones(2, 3, 3))
        >>> sums = head_divergence(layer, a[0].mean(0), torch.tensor([[True, False]]))
        >>> sums[:, 0].tolist()
        [0.143..., 0.0, 3.0, 1.0]
    """
    average = average.double()
    keep = torch.cat([torch.ones_like(sinks[:1]), ~sinks]).double().T  # row 0 keeps all columns
    average_left = average @ keep
    out = torch.zeros(4, len(sinks), dtype=torch.float64, device=average.device)
    for rows, (block,) in map_blocks(layer, attention):
        a, n = block[0].double().abs(), block.shape[-1]
        terms = torch.xlogy(a, a) - torch.xlogy(a, average[rows, :n])
        left = a @ keep[:n]
        # sum_j p_j ln(p_j / q_j) with p = a / left and q = A / left of A.
        divergence = (terms @ keep[:n]) / left + (average_left[rows] / left).log()
        not_empty = left[..., 1:] > 0
        out[0] += torch.where(not_empty, divergence[..., :1], 0).sum((0, 1))
        out[1] += torch.where(not_empty, divergence[..., 1:], 0).sum((0, 1))
        out[2] += not_empty.sum((0, 1))
        out[3] += (~not_empty).sum((0, 1))
    return out


def average_map(layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """Return the attention averaged over heads, and which keys a query sees in any head.

    Both have shape ``(T, T)``.
    """
    average = layer.value.new_zeros(layer.T, layer.S, dtype=torch.float64)
    visible = torch.zeros_like(average, dtype=torch.bool)
    for rows, sees, (block,) in visible_blocks(layer, attention):
        n = block.shape[-1]
        average[rows, :n] = block.double().abs().mean(0)
        visible[rows, :n] = sees.any(0)
    return average, visible
