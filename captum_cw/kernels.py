"""Token scores of a layer in two kernels of Triton, which hold no attention weights in memory.

The first kernel finds the maximum and the sum of each row of the softmax. Each program of the
second kernel reads a block of keys, and goes through the queries that see them. For each tile of
queries and keys, it computes the logits, the attention weights, the inner products of a
:class:`~captum_cw.products.Product`, and their reduction over queries, in float32.

Inner products of a float32 model are products of float32. A model in half precision rounds its
queries, keys and values. They are read in half precision, which loses nothing, and multiplied by
tensor cores, which sum in float32. A direction ``u`` has float32 precision. There, it is scaled to
a maximum of one, and split into two vectors of half precision whose sum keeps 16 bits.

This module imports Triton, so it is imported only where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from captum_cw.products import Direction, Product, Reduction
    from captum_cw.weights import SoftmaxWeights

__all__ = ["INTERPRETED", "Tiles", "reduce_queries", "tiles_for"]

#: The bytes of shared memory that every supported GPU has for one program, and how many of them a
#: program needs beside the tiles that it reads.
SHARED_MEMORY, OTHER_MEMORY = 99 * 1024, 16 * 1024

#: The smallest side of a tile that tensor cores multiply.
SMALLEST = 16

#: The largest tiles, in queries and keys. Products in float32 keep their operands in registers, so
#: there a tile has at most so many numbers on each side.
HALF_TILE, SINGLE_TILE, SINGLE_NUMBERS = (64, 64), (32, 32), 2048


# ---------------------------------------------------------------------------------------------
# The kernels
#
# Pointers have names in capitals, and so have constants of the compilation. ``pair`` counts the
# heads of all examples. Sizes of heads are padded to powers of two, as Triton requires.

# One line for each of forty arguments would hide what a kernel does.
# fmt: off


@triton.jit
def _vectors(START, rows, T, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Load vectors of size ``D`` of a head, ``(rows, D_PADDED)``."""
    features = tl.arange(0, D_PADDED)
    inside = (rows < T)[:, None] & (features < D)[None, :]
    return tl.load(START + rows[:, None] * D + features[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(
    query, key, rows, columns, T, S, scaling, softcap, MASK, mask_t,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr,
):
    """Return the logits of a tile, and minus infinity where a query does not see a key.

    Without weights, the logits of all visible keys are zero.
    """
    seen = (rows < T)[:, None] & (columns < S)[None, :]
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None] + (S - T))
    if WEIGHTED:
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        if CAPPED:
            small = tl.exp(-2.0 * tl.abs(logits) / softcap)
            capped = softcap * (1.0 - small) / (1.0 + small)  # the hyperbolic tangent of the size
            logits = tl.where(logits < 0, -capped, capped)
    else:
        logits = tl.where(seen, 0.0, float("-inf"))
    if MASKED != "":
        places = rows.to(tl.int64)[:, None] * mask_t + columns[None, :]
        given = tl.load(MASK + places, mask=seen, other=0)
        if MASKED == "boolean":
            seen = seen & (given != 0)
        else:
            logits += given
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def statistics_kernel(
    QUERY, KEY, MASK, SINK, BOUNDS, HIGHEST, INVERSE,
    mask_b, mask_h, mask_t, H, T, S, scaling, softcap,
    GROUP: tl.constexpr, D_K: tl.constexpr, D_K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr, HAS_SINK: tl.constexpr,
):
    """Write the largest logit of each query, and one over its sum of exponentials."""
    pair = tl.program_id(1).to(tl.int64)
    MASK += (pair // H) * mask_b + (pair % H) * mask_h
    KEY += (pair // GROUP) * S * D_K
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    query = _vectors(QUERY + pair * T * D_K, rows, T, D_K, D_K_PADDED)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    if HAS_SINK:
        highest = tl.full([ROWS], 0.0, tl.float32) + tl.load(SINK + pair % H)
        total = tl.full([ROWS], 1.0, tl.float32)
    start = tl.load(BOUNDS + 2 * (pair // H))
    stop = tl.load(BOUNDS + 2 * (pair // H) + 1)
    end = tl.where((first_row < stop) & (first_row + ROWS > start), S, 0)
    if CAUSAL:
        end = tl.minimum(end, first_row + ROWS + S - T)
    for column in range(0, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        key = _vectors(KEY, columns, S, D_K, D_K_PADDED)
        logits = _logits(
            query, key, rows, columns, T, S, scaling, softcap, MASK, mask_t,
            True, MASKED, CAPPED, CAUSAL,
        )
        new = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # the query has not seen a key yet
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        highest = new
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    nothing = total == 0.0
    inverse = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total))
    tl.store(HIGHEST + pair * T + rows, highest, mask=rows < T)
    tl.store(INVERSE + pair * T + rows, inverse, mask=rows < T)


@triton.jit
def _along(
    DIRECTION, next_part, value, rows, T,
    D_V: tl.constexpr, D_V_PADDED: tl.constexpr, PARTS: tl.constexpr, POWER: tl.constexpr,
):
    """Return the inner products of values and of a direction, which is the sum of its parts."""
    vectors = _vectors(DIRECTION, rows, T, D_V, D_V_PADDED)
    along = tl.dot(vectors, tl.trans(value), input_precision="ieee")
    if PARTS == 2:
        rest = _vectors(DIRECTION + next_part, rows, T, D_V, D_V_PADDED)
        along += tl.dot(rest, tl.trans(value), input_precision="ieee")
    if POWER is not None:
        size = tl.abs(along)
        known = tl.exp2(POWER * tl.log2(tl.where(size == 0.0, 1.0, size)))
        along = tl.where(size == 0.0, 0.0, known)
    return along


@triton.jit
def reduce_kernel(
    QUERY, KEY, VALUE, DIRECTION, OTHER, FACTOR, HIGHEST, CHOSEN, MASK, BOUNDS, OUT,
    mask_b, mask_h, mask_t, next_part, H, T, S, scaling, softcap,
    GROUP: tl.constexpr, D_K: tl.constexpr, D_K_PADDED: tl.constexpr,
    D_V: tl.constexpr, D_V_PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, CAUSAL: tl.constexpr, HAS_CHOSEN: tl.constexpr,
    WEIGHTED: tl.constexpr, DIRECTIONS: tl.constexpr, PARTS: tl.constexpr,
    POWER: tl.constexpr, OTHER_POWER: tl.constexpr,
    SIGNED: tl.constexpr, REDUCTION: tl.constexpr,
):
    """Write the sum, the sum of squares or the maximum of a measure over queries, for each key."""
    pair = tl.program_id(1).to(tl.int64)
    MASK += (pair // H) * mask_b + (pair % H) * mask_h
    QUERY += pair * T * D_K
    DIRECTION += pair * T * D_V
    OTHER += pair * T * D_V
    first_column = tl.program_id(0) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    if WEIGHTED:
        key = _vectors(KEY + (pair // GROUP) * S * D_K, columns, S, D_K, D_K_PADDED)
    else:
        key = columns  # not read
    if DIRECTIONS > 0:
        value = _vectors(VALUE + (pair // GROUP) * S * D_V, columns, S, D_V, D_V_PADDED)
    out = tl.full([COLUMNS], float("-inf") if REDUCTION == "max" else 0.0, tl.float32)
    start = tl.load(BOUNDS + 2 * (pair // H))
    stop = tl.load(BOUNDS + 2 * (pair // H) + 1)
    if CAUSAL:
        start = tl.maximum(start, first_column - (S - T))
    for row in range(start, stop, ROWS):
        rows = row + tl.arange(0, ROWS)
        query = _vectors(QUERY, rows, T, D_K, D_K_PADDED) if WEIGHTED else rows
        logits = _logits(
            query, key, rows, columns, T, S, scaling, softcap, MASK, mask_t,
            WEIGHTED, MASKED, CAPPED, CAUSAL,
        )
        seen = logits > float("-inf")
        if WEIGHTED:
            logits -= tl.load(HIGHEST + pair * T + rows, mask=rows < T, other=0.0)[:, None]
        factor = tl.load(FACTOR + pair * T + rows, mask=rows < T, other=0.0)
        found = tl.exp(logits) * factor[:, None]
        if DIRECTIONS > 0:
            found *= _along(DIRECTION, next_part, value, rows, T, D_V, D_V_PADDED, PARTS, POWER)
        if DIRECTIONS > 1:
            found *= _along(OTHER, next_part, value, rows, T, D_V, D_V_PADDED, PARTS, OTHER_POWER)
        if HAS_CHOSEN:
            chosen = tl.load(CHOSEN + (pair // H) * T + rows, mask=rows < T, other=0)
            seen = seen & (chosen != 0)[:, None]
        if not SIGNED:
            found = tl.abs(found)
        if REDUCTION == "max":
            out = tl.maximum(out, tl.max(tl.where(seen, found, float("-inf")), 0))
        elif REDUCTION == "rms":
            out += tl.sum(tl.where(seen, found * found, 0.0), 0)
        else:
            out += tl.sum(tl.where(seen, found, 0.0), 0)
    tl.store(OUT + pair * S + columns, out, mask=columns < S)


# fmt: on

# ---------------------------------------------------------------------------------------------
# How they are started

#: Whether Triton interprets the kernels on the CPU, because ``TRITON_INTERPRET=1`` was set.
INTERPRETED = not isinstance(reduce_kernel, triton.JITFunction)


class Tiles(NamedTuple):
    """The queries and keys of a tile, and the number of tiles of queries that are read ahead."""

    rows: int
    columns: int
    stages: int


def tiles_for(d_k: int, d_v: int, vectors: int, dtype: torch.dtype, memory: int) -> Tiles:
    """Return the largest tiles that fit into the shared memory of a program.

    Args:
        d_k: The size of a head's keys, padded.
        d_v: The size of a head's values, padded.
        vectors: The number of vectors of size ``d_v`` that are read for each query.
        dtype: The dtype of all vectors.
        memory: The bytes of shared memory.

    Example:
        >>> tiles_for(128, 128, 2, torch.bfloat16, memory=227 * 1024)
        Tiles(rows=64, columns=64, stages=2)
    """
    half = dtype.itemsize == 2
    rows, columns = HALF_TILE if half else SINGLE_TILE
    stages = 2 if half else 1
    if not half:
        most = max(SMALLEST, SINGLE_NUMBERS // max(d_k, d_v))
        rows, columns = min(rows, most), min(columns, most)

    def fits() -> bool:
        numbers = columns * (d_k + d_v) + stages * rows * (d_k + vectors * d_v)
        return numbers * dtype.itemsize + OTHER_MEMORY <= memory

    if not fits():
        stages = 1
    while not fits() and rows > SMALLEST:
        rows //= 2
    while not fits() and columns > SMALLEST:
        columns //= 2
    return Tiles(rows, columns, stages)


def reduce_queries(
    weights: SoftmaxWeights,
    product: Product,
    chosen: Tensor | None,
    reduction: Reduction,
    *,
    signed: bool,
) -> Tensor:
    """Reduce a measure over queries.

    The arguments and the result are those of :func:`captum_cw.products.reduce_by_kernel`.
    """
    B, H, T, d_k = weights.query.shape
    S, d_v = product.value.shape[2:]
    dtype = _product_dtype(weights)
    directions = [x for x in product.directions if x.power != 0]
    powers = [*(x.power for x in directions), None, None]
    vectors, factor = _in_parts(directions, product, weights)
    parts = vectors.shape[1]
    sizes = _padded(d_k), _padded(d_v)
    tiles = tiles_for(*sizes, len(directions) * parts, dtype, _shared_memory(factor.device))
    common = _common_arguments(weights, product, chosen, tiles)
    out = factor.new_empty(B, H, S)
    with torch.cuda.device_of(out):
        if product.instead is None:
            factor *= _inverse_sums(weights.sink, (B, H, T), common)
        reduce_kernel[triton.cdiv(S, tiles.columns), B * H](
            VALUE=_stored(product.value, dtype),
            DIRECTION=vectors[0] if directions else out,
            OTHER=vectors[-1] if directions else out,
            FACTOR=factor,
            CHOSEN=out if chosen is None else chosen.to(out.device).contiguous().view(torch.uint8),
            OUT=out,
            next_part=B * H * T * d_v,
            D_V=d_v,
            D_V_PADDED=sizes[1],
            HAS_CHOSEN=chosen is not None,
            WEIGHTED=product.instead is None,
            DIRECTIONS=len(directions),
            PARTS=parts,
            POWER=powers[0],
            OTHER_POWER=powers[1],
            SIGNED=signed and not product.absolute,
            REDUCTION=reduction,
            **common,
        )
    if product.per_key is not None:
        out *= product.per_key.square() if reduction == "rms" else product.per_key
    return out


def _inverse_sums(
    sink: Tensor | None, shape: tuple[int, int, int], common: dict[str, Any]
) -> Tensor:
    """Return one over each query's sum of exponentials, and write the largest logits."""
    highest: Tensor = common["HIGHEST"]
    inverse = torch.empty_like(highest)
    B, H, T = shape
    statistics_kernel[triton.cdiv(T, common["ROWS"]), B * H](
        SINK=highest if sink is None else sink.to(highest).contiguous(),
        INVERSE=inverse,
        HAS_SINK=sink is not None,
        **common,
    )
    return inverse


def _common_arguments(
    weights: SoftmaxWeights, product: Product, chosen: Tensor | None, tiles: Tiles
) -> dict[str, Any]:
    """Return the arguments of both kernels."""
    B, H, T, d_k = weights.query.shape
    shared, S = weights.key.shape[1:3]
    device, dtype = weights.query.device, _product_dtype(weights)
    kind, mask = _mask(weights, weighted=product.instead is None)
    bounds = _bounds(chosen, B, T, device)
    strides = (0, 0, 0) if mask is None else mask.expand(B, H, T, S).stride()[:3]
    return {
        "QUERY": _stored(weights.query, dtype),
        "KEY": _stored(weights.key, dtype),
        "MASK": bounds if mask is None else mask,
        "BOUNDS": bounds,
        "HIGHEST": torch.empty(B, H, T, dtype=torch.float32, device=device),
        **dict(zip(("mask_b", "mask_h", "mask_t"), strides, strict=True)),
        "H": H,
        "T": T,
        "S": S,
        "GROUP": H // shared,
        "D_K": d_k,
        "D_K_PADDED": _padded(d_k),
        "scaling": d_k**-0.5 if weights.scaling is None else float(weights.scaling),
        "softcap": 1.0 if weights.softcap is None else float(weights.softcap),
        "MASKED": kind,
        "CAPPED": weights.softcap is not None,
        "CAUSAL": weights.mask.causal,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "num_stages": tiles.stages,
    }


def _padded(size: int) -> int:
    return max(SMALLEST, int(triton.next_power_of_2(size)))


def _product_dtype(weights: SoftmaxWeights) -> torch.dtype:
    """Return the dtype of vectors: half precision if the model rounds its vectors to it."""
    half = weights.dtype in (torch.bfloat16, torch.float16)
    return weights.dtype if half and weights.dtype is not None else torch.float32


def _in_parts(
    directions: list[Direction], product: Product, weights: SoftmaxWeights
) -> tuple[Tensor, Tensor]:
    """Write directions as sums of vectors in the dtype of the products, times factors.

    Returns:
        The vectors, ``(directions, parts, B, H, T, d_h)``, and the factors of all directions and of
        the measure for each query, ``(B, H, T)``.
    """
    B, H, T, _ = weights.query.shape
    dtype = _product_dtype(weights)
    factor = product.value.new_ones(B, H, T)
    if product.per_query is not None:
        factor *= product.per_query
    split: list[Tensor] = []
    for vectors, power in directions:
        if dtype == torch.float32:
            split.append(vectors[None])
            continue
        # The range of float16 is small, so each vector is scaled.
        size = vectors.abs().amax(-1)
        scaled = vectors / torch.where(size == 0, 1, size)[..., None]
        high = scaled.to(dtype)
        split.append(torch.stack([high, (scaled - high).to(dtype)]))
        factor *= size if power is None else size**power
    if not split:
        return product.value.new_empty(0, 1), factor
    return _stored(torch.stack(split), dtype), factor


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype of the products, as the kernels read it.

    Triton's interpreter does not multiply bfloat16, so it reads the same numbers in float32.
    """
    x = x.to(dtype).contiguous()
    return x.float() if INTERPRETED else x


def _mask(weights: SoftmaxWeights, *, weighted: bool) -> tuple[str, Tensor | None]:
    """Return the kind of a mask and the mask, whose keys are next to each other in memory."""
    visible, bias, S = weights.mask.visible, weights.bias, weights.mask.S
    if bias is not None and weighted:
        mask = bias.to(torch.float32)
        mask = mask if visible is None else mask.masked_fill(~visible, float("-inf"))
        kind = "additive"
    elif visible is not None:
        mask, kind = visible.to(weights.query.device).view(torch.uint8), "boolean"
    else:
        return "", None
    mask = mask.expand(-1, -1, -1, S)
    return kind, mask if mask.stride(-1) == 1 else mask.contiguous()


def _bounds(chosen: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """Return the first query that counts and the end of the last, ``(B, 2)``, without waiting."""
    if chosen is None:
        bounds = torch.zeros(B, 2, dtype=torch.int32, device=device)
        bounds[:, 1] = T
        return bounds
    counted = chosen.to(device=device, dtype=torch.int32)
    some = counted.amax(1)
    first, last = counted.argmax(1), T - counted.flip(1).argmax(1)
    return torch.stack([first, last * some], 1).to(torch.int32).contiguous()


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return SHARED_MEMORY
    known = torch.cuda.get_device_properties(device)
    # The first is what a program may ask for; AMD's GPUs and old releases of torch lack it.
    names = "shared_memory_per_block_optin", "shared_memory_per_block"
    return next((int(n) for x in names if (n := getattr(known, x, 0))), SHARED_MEMORY)
