"""One attention map as a graph over tokens, its sinks, and how far heads are from their average.

After *What are you sinking? A geometric approach on attention sink* (arXiv 2508.02546). ``A`` is
a layer's attention averaged over heads, ``(T, T)``. Its graph at a threshold ``t`` is

    B = 1[A > t] with a zero diagonal,   W = max(B, B^T),   L = D - W,

where ``D`` holds the degrees of ``W``; :func:`graph_numbers` says how nearly that is a star. Sinks
are the keys that receive most (:func:`received_attention`, :func:`sinks_above`).

The paper's topological step is left out: it degenerates on causal maps, where attention runs one
way only. Where attention can be negative, its absolute value counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_cw.functional import AttentionLayer, attention, map_blocks

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = [
    "GraphNumbers",
    "Received",
    "average_map",
    "graph_numbers",
    "head_divergence",
    "received_attention",
    "sinks_above",
]


#: A query follows a key if it gives it this many times an even share of its attention, or more.
OF_EVEN = 2.0
#: Keys are compared if this part of the queries that see the most seen key see them, or more.
FEWEST = 0.25


class GraphNumbers(NamedTuple):
    """What the graph of one attention map looks like.

    Attributes:
        edges: Directed edges, as a share of all ``n (n - 1)``.
        fiedler: The second smallest eigenvalue of ``L``: 0 for a graph in several parts, 1 for a
            star, ``n`` for a complete graph.
        gap: The third smallest eigenvalue minus the second; NaN for two tokens.
        centralisation: Freeman's, of the degrees of ``W``: 1 for a star, 0 where all are equal;
            NaN for two tokens.
        degree_variance: Of the degrees of ``W``, over all tokens.
        star_likeness: The largest in-degree of ``B``, divided by ``n - 1``.
        star_gini: 0.3 of that, and 0.7 of the Gini coefficient of the in-degrees.
    """

    edges: float
    fiedler: float
    gap: float
    centralisation: float
    degree_variance: float
    star_likeness: float
    star_gini: float


def graph_numbers(attention: Tensor, threshold: float) -> GraphNumbers:
    """The graph of an attention map at a threshold, in numbers.

    Args:
        attention: Averaged over heads, ``(T, T)``, of two tokens or more; rows are queries.
        threshold: An edge is where attention is greater.

    Example:
        >>> star = torch.zeros(5, 5)
        >>> star[:, 0] = 1
        >>> numbers = graph_numbers(star, 0.5)
        >>> round(numbers.fiedler, 6), numbers.centralisation, numbers.star_likeness
        (1.0, 1.0, 1.0)
    """
    from scipy.linalg import eigvalsh

    directed = attention.numpy(force=True) > threshold
    np.fill_diagonal(directed, False)
    n = len(directed)
    both_ways = (directed | directed.T).astype(np.float64)
    degrees = both_ways.sum(0)
    lowest = eigvalsh(np.diag(degrees) - both_ways, subset_by_index=(0, min(2, n - 1)))
    received = directed.sum(0)
    star = float(received.max()) / (n - 1)
    return GraphNumbers(
        edges=float(received.sum()) / (n * (n - 1)),
        fiedler=max(0.0, float(lowest[1])),  # it is none below zero but by rounding
        gap=float(lowest[2] - lowest[1]) if n > 2 else float("nan"),
        centralisation=(
            float((degrees.max() - degrees).sum()) / ((n - 1) * (n - 2)) if n > 2 else float("nan")
        ),
        degree_variance=float(degrees.var()),
        star_likeness=star,
        star_gini=0.3 * star + 0.7 * _gini(received),
    )


def _gini(x: Array) -> float:
    """The Gini coefficient of numbers that are not negative; 0 where all are zero."""
    n, total = len(x), float(x.sum())
    if total == 0:
        return 0.0
    return float(((2 * np.arange(1, n + 1) - n - 1) * np.sort(x)).sum()) / (n * total)


class Received(NamedTuple):
    """What each key receives from other tokens, ``(T,)`` each.

    Attributes:
        mean: Attention, averaged over the other queries that can see the key; 0 if there is none.
        followers: The share of those queries that give it at least twice what they would if they
            spread their attention evenly over what they see.
        queries: How many they are.
    """

    mean: Array
    followers: Array
    queries: Array

    @property
    def compared(self) -> Array:
        """Which keys can be sinks: those that a quarter as many see as see any key, or more.

        The mean of a key that few queries see says little: the last but one of a causal map is
        seen by its neighbour alone, and every token looks at its neighbours.
        """
        enough: Array = self.queries >= max(1.0, FEWEST * self.queries.max())
        return enough


def received_attention(attention: Tensor, visible: Tensor) -> Received:
    """How much attention each key receives from the other tokens that can see it.

    A token's attention to itself is left out, as in the graph: a sink draws it from others.

    Args:
        attention: Averaged over heads, ``(T, T)``.
        visible: Which keys a query can see, boolean ``(T, T)``.

    Example:
        >>> a = torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.75, 0.125, 0.125]])
        >>> received = received_attention(a, torch.ones(3, 3, dtype=torch.bool).tril())
        >>> received.mean.tolist(), received.followers.tolist(), received.queries.tolist()
        ([0.75, 0.125, 0.0], [0.5, 0.0, 0.0], [2.0, 1.0, 0.0])
    """
    a, sees = attention.double(), visible.double()
    even = a.sum(-1, keepdim=True) / sees.sum(-1, keepdim=True).clamp(min=1)
    others = sees.clone().fill_diagonal_(0)
    queries = others.sum(0)
    mean, followers = (
        ((x * others).sum(0) / queries.clamp(min=1)).numpy(force=True)
        for x in (a, a >= OF_EVEN * even)
    )
    return Received(mean, followers, queries.numpy(force=True))


def sinks_above(received: Received, percentile: float) -> Array:
    """The sinks of a map: keys that receive as much as a percentile of the keys, or more.

    Only keys that enough queries see are compared; those that receive the least of all are no
    sinks, so that a map in which all receive the same has none.

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
    above: Array = compared & (received.mean >= cutoff) & (received.mean > values.min())
    return above


def head_divergence(layer: AttentionLayer, average: Tensor, sinks: Tensor) -> Tensor:
    """How far the heads are from their average, with and without the columns of sinks.

    For each query and head, ``KL(a_i^h || A_i)``, and the same after the columns of sinks are left
    out of both rows and what remains is renormalised. A row with nothing left (all of a head's
    attention is on sinks, as the first query's of a causal map is on itself) has no such
    divergence: it is left out of both means, and counted.

    Args:
        layer: One example.
        average: Its attention averaged over heads, ``(T, T)``.
        sinks: Boolean ``(P, T)``: ``P`` sets of columns.

    Returns:
        ``(4, P)``, float64: the sums of both divergences, in nats; how many rows they are over;
        and how many have nothing left.

    Example:
        >>> a = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]]])
        >>> layer = AttentionLayer.from_tensors(a, torch.ones(1, 1, 2, 3), torch.ones(2, 3, 3))
        >>> sums = head_divergence(layer, a[0].mean(0), torch.tensor([[True, False]]))
        >>> sums[:, 0].tolist()
        [0.143..., 0.0, 3.0, 1.0]
    """
    average = average.double()
    keep = torch.cat([torch.ones_like(sinks[:1]), ~sinks]).double().T  # the first leaves all
    left_of_average = average @ keep
    out = torch.zeros(4, len(sinks), dtype=torch.float64, device=average.device)
    for rows, (block,) in map_blocks(layer, attention):
        a, n = block[0].double().abs(), block.shape[-1]
        terms = torch.xlogy(a, a) - torch.xlogy(a, average[rows, :n])
        left = a @ keep[:n]
        # sum_j p_j ln(p_j / q_j) with p = a / left and q = A / left of A.
        divergence = (terms @ keep[:n]) / left + (left_of_average[rows] / left).log()
        some = left[..., 1:] > 0
        out[0] += torch.where(some, divergence[..., :1], 0).sum((0, 1))
        out[1] += torch.where(some, divergence[..., 1:], 0).sum((0, 1))
        out[2] += some.sum((0, 1))
        out[3] += (~some).sum((0, 1))
    return out


def average_map(layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """Attention averaged over heads, and which keys a query sees in any head: ``(T, T)`` each."""
    average = layer.value.new_zeros(layer.T, layer.S, dtype=torch.float64)
    visible = torch.zeros_like(average, dtype=torch.bool)
    for rows, (block,) in map_blocks(layer, attention):
        n = block.shape[-1]
        average[rows, :n] = block[0].double().abs().mean(0)
        seen = layer.mask.block(rows)
        visible[rows, :n] = True if seen is None else seen[0].any(0).to(visible.device)
    return average, visible
