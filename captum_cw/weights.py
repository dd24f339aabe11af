"""Attention weights in blocks of queries: masks, and the softmax of Eq. 1.

A full map of attention weights has ``T x S`` entries for each head. It is never needed at once, so
everything here computes the weights of a block of queries, ``(B, H, t, n)``, on the first ``n``
keys. :mod:`captum_cw.functional` explains the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from captum_cw._utils.memory import free_bytes

__all__ = [
    "QueryMask",
    "SoftmaxWeights",
    "Weights",
    "at_least_float32",
    "attention_weights",
    "block_elements",
    "block_queries",
    "blocks",
    "expand_heads",
    "grouped_matmul",
    "inner_weights",
    "known_rows",
    "without_autocast",
]

#: The number of elements of one block of attention weights. Several operations (logits, softmax,
#: product, sum) pass over a block, so it should fit into the CPU cache.
BLOCK_ELEMENTS = 2**20

#: On a CPU, half of these elements are faster, unless a block then has fewer queries than this. A
#: matrix product of few rows is slow.
ENOUGH_QUERIES = 64

#: A GPU has no use for small blocks, since each of them starts several kernels. There, a block has
#: one element for so many bytes of free memory, but never more than the most. While a block is
#: reduced, up to five tensors of its size are alive (20 bytes an element in float32), so a block
#: takes about a third of the free memory at the worst.
FREE_BYTES_AN_ELEMENT, MOST_ELEMENTS = 64, 2**28

#: A matrix product whose result has fewer elements gains nothing from several threads.
LARGE_PRODUCT = 2**16

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function run in the dtype of its tensors or its layer, also under ``torch.autocast``.

    Autocast would run matrix products in half precision, which loses the small terms.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        values = (getattr(x, "value", x) for x in given)  # a layer is where its values are
        kind = next(x for x in values if isinstance(x, Tensor)).device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert all tensors to their widest dtype, or to float32 if that is wider."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key-value heads for the query heads: ``(B, H_kv, ...)`` becomes ``(B, H, ...)``."""
    if heads % x.shape[1]:
        raise ValueError(
            f"{heads} query heads cannot share {x.shape[1]} key-value heads: the number of query "
            "heads must be a multiple of the number of key-value heads."
        )
    return x if heads == x.shape[1] else x.repeat_interleave(heads // x.shape[1], dim=1)


def grouped_matmul(rows: Tensor, keys: Tensor) -> Tensor:
    """Compute ``<rows_i^h, keys_j^g(h)>`` without a copy of the shared key-value heads.

    Args:
        rows: ``(B, H, t, d_h)``.
        keys: ``(B, H_kv, S, d_h)``.

    Returns:
        ``(B, H, t, S)``.
    """
    B, H, t, d_h = rows.shape
    shared, S = keys.shape[1:3]
    grouped = rows.reshape(B, shared, H // shared * t, d_h)
    return _products(grouped.flatten(0, 1), keys.transpose(-1, -2).flatten(0, 1)).view(B, H, t, S)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, ``(n, r, k)`` by ``(n, k, c)``.

    On a CPU, a batched product gives each thread whole matrices, so with three matrices on two
    threads one thread waits. Large matrices that are left over are therefore multiplied one by one,
    each of them by all threads.
    """
    shape = len(left), left.shape[1], right.shape[2]
    rest = shape[0] % torch.get_num_threads()
    recorded = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if not rest or recorded or left.device.type != "cpu" or shape[1] * shape[2] < LARGE_PRODUCT:
        return torch.bmm(left, right)
    out, even = left.new_empty(shape), shape[0] - rest
    torch.bmm(left[:even], right[:even], out=out[:even])
    for one, other, result in zip(left[even:], right[even:], out[even:], strict=True):
        torch.mm(one, other, out=result)
    return out


@without_autocast
def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Compute softmax attention (Eq. 1).

    Args:
        query: ``(B, H, T, d_k)``.
        key: ``(B, H_kv, S, d_k)``.
        scaling: The factor of the inner products; ``1 / sqrt(d_k)`` by default.
        mask: The attention mask, broadcastable to ``(B, H, T, S)``: boolean (True = visible) or
            additive.
        causal: Whether the queries are the last ``T`` of the ``S`` tokens, and do not see later
            tokens. It applies only without ``mask``.
        softcap: If it is given, a logit ``x`` becomes ``softcap * tanh(x / softcap)`` before it is
            masked (Gemma 2, arXiv 2408.00118).
        sink: One learned logit for each head, ``(H,)``. It takes attention, and has no key; None
            for none.

    Returns:
        ``(B, H, T, S)`` in float32 or wider. If a boolean mask hides all keys from a query, the
        query's row is zero.

    Example:
        >>> a = attention_weights(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        >>> a.tolist()
        [[[[0.5, 0.5], [0.5, 0.5]]]]
    """
    query, key = at_least_float32(query, key)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[1] % key.shape[1]:
        expand_heads(key, query.shape[1])  # raises an error with the reason
    lowest = torch.finfo(query.dtype).min
    logits = grouped_matmul(query * scaling, key)
    if softcap is not None:
        logits = (logits / softcap).tanh_().mul_(softcap)
    if mask is None:
        T, S = query.shape[2], key.shape[2]
        if causal and T > 1:
            first = max(0, S - T + 1)  # of the keys that are later than some query
            later = torch.ones(T, S - first, dtype=torch.bool, device=query.device)
            logits[..., first:].masked_fill_(later.triu_(S - T + 1 - first), lowest)
        return _softmax(logits, sink)
    if mask.dtype == torch.bool:
        weights = _softmax(logits.masked_fill_(~mask, lowest), sink)
        return weights.mul_(mask.any(-1, keepdim=True))
    return _softmax(logits + mask, sink)


def _softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Return the softmax of ``(B, H, t, S)``, in which a sink ``(H,)`` takes part."""
    if sink is None:
        return logits.softmax(-1)
    extra = sink.to(logits).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, extra], -1).softmax(-1)[..., :-1].contiguous()


@dataclass(frozen=True)
class QueryMask:
    """The attention mask of a layer: which keys each query can see.

    Args:
        T: The number of queries.
        S: The number of keys.
        visible: Boolean, broadcastable to ``(B, H, T, S)``; None if only ``causal`` and ``real``
            hide keys.
        causal: Whether the query ``i`` sees no key after ``i + S - T``. If ``visible`` is given,
            it must agree; blocks then skip the keys that none of their queries sees.
        real: ``(B, T)``, False where a query is padding; None without padding. Padded keys must be
            hidden by ``visible``.

    Example:
        >>> QueryMask(2, 2, causal=True).block(slice(0, 2), torch.device("cpu")).tolist()
        [[[[True, False], [True, True]]]]
    """

    T: int
    S: int
    visible: Tensor | None = None
    causal: bool = False
    real: Tensor | None = None

    def keys(self, rows: slice) -> int:
        """Return the number of leading keys that at least one of the queries ``rows`` can see."""
        return min(self.S, rows.stop + self.S - self.T) if self.causal else self.S

    def block(self, rows: slice, device: torch.device) -> Tensor:
        """Return which leading keys ``rows`` see, ``(B|1, H|1, t, keys)`` boolean."""
        t, n = rows.stop - rows.start, self.keys(rows)
        seen = self.visible_block(rows)
        if seen is None:
            seen = torch.ones(t, n, dtype=torch.bool, device=device)
            seen = (seen.tril(n - t) if self.causal else seen)[None, None]
        return seen.to(device).expand(-1, -1, t, n)

    def visible_block(self, rows: slice) -> Tensor | None:
        """Return the part of ``visible`` for the leading keys; None if ``visible`` is None."""
        v = self.visible
        if v is None:
            return None
        n = self.keys(rows) if v.shape[3] > 1 else None
        return v[:, :, rows if v.shape[2] > 1 else slice(None), :n]

    def sees(self, query: int, start: int, device: torch.device) -> bool:
        """Return whether a query sees keys from ``start`` on, in any example and head.

        Example:
            >>> QueryMask(3, 3, causal=True).sees(0, 1, torch.device("cpu"))
            False
        """
        return bool(self.block(slice(query, query + 1), device)[..., start:].any())

    def at(self, rows: Sequence[int], chosen: Tensor) -> QueryMask:
        """Return the mask of a few queries; all others count as padding.

        Args:
            rows: The queries, in order.
            chosen: ``(B, T)`` boolean, the queries that count.

        Example:
            >>> mask = QueryMask(3, 3, causal=True).at([1], torch.tensor([[False, True, False]]))
            >>> mask.visible.tolist(), mask.real.tolist()
            ([[[[True, True, False]]]], [[True]])
        """
        real, device = chosen[:, rows], chosen.device
        visible = self.visible
        if visible is None and self.causal:
            last = torch.tensor(rows, dtype=torch.long, device=device) + self.S - self.T
            visible = (torch.arange(self.S, device=device) <= last[:, None])[None, None]
        elif visible is not None and visible.shape[2] > 1:
            visible = visible[:, :, rows]
        return QueryMask(len(rows), self.S, visible, real=real)

    def of_any_head(self) -> QueryMask:
        """Return the mask that shows a key if any head sees it."""
        v = self.visible
        return self if v is None or v.shape[1] == 1 else replace(self, visible=v.any(1, True))

    def counts(self, chosen: Tensor | None, device: torch.device) -> Tensor:
        """Count the chosen queries that see each key.

        Args:
            chosen: ``(B, T)`` boolean; None for every query. Padded queries never count.
            device: The device of the result.

        Returns:
            ``(B|1, H|1, S)``, float32.
        """
        if chosen is None:
            return self._all_counts.to(device)
        return self._counts(chosen, device)

    @cached_property
    def _all_counts(self) -> Tensor:
        known = self.real if self.visible is None else self.visible
        return self._counts(None, torch.device("cpu") if known is None else known.device)

    def _counts(self, chosen: Tensor | None, device: torch.device) -> Tensor:
        chosen = self.chosen(chosen)
        if self.visible is None:
            counted = torch.ones(1, self.T, dtype=torch.bool, device=device)
            counted = counted if chosen is None else chosen.to(device)
            # From the first query that sees a key, all queries see it.
            later = counted.float().flip(1).cumsum(1).flip(1)
            first = torch.arange(self.S, device=device) - (self.S - self.T)
            return later[:, None, first.clamp(min=0) * self.causal]
        counts = torch.zeros(1, 1, self.S, dtype=torch.float32, device=device)
        for rows in blocks(self.T, max(1, block_elements(device) // self.S)):
            seen = self.block(rows, device)
            if chosen is not None:
                seen = seen & chosen[:, None, rows, None].to(device)
            part = seen.sum(-2)
            counts = counts + torch.nn.functional.pad(part, (0, self.S - part.shape[-1]))
        return counts

    @cached_property
    def known_rows(self) -> Rows:
        """The queries that are real in some example, and in every one."""
        return known_rows(self.real)

    def chosen(self, chosen: Tensor | None) -> Tensor | None:
        """Return ``chosen`` without the padded queries."""
        if chosen is None or self.real is None:
            return self.real if chosen is None else chosen
        return chosen & self.real


Rows = tuple[list[bool], list[bool]] | None
"""Which queries count in some example, and in every one; None if all count."""


def known_rows(chosen: Tensor | None) -> Rows:
    """Return which queries are chosen in some example, and in every one; None if all are.

    They are read from the device at once, since each read waits for it.
    """
    if chosen is None:
        return None
    some, every = torch.stack([chosen.any(0), chosen.all(0)]).tolist()
    return some, every


def block_elements(device: torch.device) -> int:
    """Return the number of elements of one block of attention weights on a device.

    It is ``BLOCK_ELEMENTS`` on a CPU. A GPU takes the larger blocks that its free memory allows.

    Example:
        >>> block_elements(torch.device("cpu")) == 2**20
        True
    """
    if device.type != "cuda":
        return BLOCK_ELEMENTS
    most = min(MOST_ELEMENTS, free_bytes(device) // FREE_BYTES_AN_ELEMENT)
    return max(BLOCK_ELEMENTS, most)


def block_queries(per_query: int, device: torch.device) -> int:
    """Return the number of queries of a block.

    Args:
        per_query: The number of weights of a query, in all examples and heads.
        device: The device of the weights.

    Example:
        >>> [block_queries(9 * tokens, torch.device("cpu")) for tokens in (512, 1024, 2048)]
        [113, 64, 56]
    """
    most = max(1, block_elements(device) // per_query)
    return most if device.type == "cuda" else min(most, max(ENOUGH_QUERIES, most // 2))


def blocks(T: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` queries that together cover ``range(T)``."""
    for start in range(0, T, size):
        yield slice(start, min(start + size, T))


Weights = Callable[[slice], Tensor]
"""Takes the rows of a block of queries, and returns their weights on the first ``n`` keys,
``(B, H, t, n)``. The weights on all other keys are zero. The caller may overwrite the result."""


def inner_weights(weights: Weights) -> Weights:
    """Return the weights inside of an object that hands them on, and has them as ``weights``.

    Example:
        >>> weights = SoftmaxWeights(*torch.zeros(2, 1, 1, 2, 4), QueryMask(2, 2))
        >>> inner_weights(weights) is weights
        True
    """
    return getattr(weights, "weights", weights)


@dataclass(frozen=True)
class SoftmaxWeights:
    """Weights by the softmax of Eq. 1, in blocks of queries.

    Args:
        query: ``(B, H, T, d_k)``, in single precision at least.
        key: ``(B, H_kv, S, d_k)``.
        mask: Which keys the queries can see.
        bias: What is added to the logits, broadcastable to ``(B, H, T, S)``; None for nothing. It
            also hides the keys that ``mask`` hides, by numbers that are low enough.
        scaling: The factor of the inner products; None is ``1 / sqrt(d_k)``.
        softcap, sink: As for :func:`attention_weights`.
        dtype: The dtype that queries, keys and values were rounded to before they were converted;
            None if they were not.

    Example:
        >>> weights = SoftmaxWeights(*torch.zeros(2, 1, 1, 2, 4), QueryMask(2, 2, causal=True))
        >>> weights(slice(0, 2)).tolist()
        [[[[1.0, 0.0], [0.5, 0.5]]]]
    """

    query: Tensor
    key: Tensor
    mask: QueryMask
    bias: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    sink: Tensor | None = None
    dtype: torch.dtype | None = None

    def __call__(self, rows: slice) -> Tensor:
        """Return ``(B, H, t, n)``, for the leading keys that ``rows`` see."""
        n, bias = self.mask.keys(rows), self.bias
        seen = self.mask.visible_block(rows)
        if bias is not None:
            seen = (bias[:, :, rows] if bias.shape[2] > 1 else bias)[..., :n]
        return attention_weights(
            self.query[:, :, rows],
            self.key[:, :, :n],
            scaling=self.scaling,
            mask=seen,
            causal=seen is None and self.mask.causal,
            softcap=self.softcap,
            sink=self.sink,
        )
