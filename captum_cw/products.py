"""Measures that are products, and the engine that reduces them over queries.

A :class:`Product` says as data what a measure is made of. Two engines read it. The blockwise engine
of :mod:`captum_cw.functional` calls it on blocks of attention weights, on every device, and is the
reference. ``captum_cw/kernels.py`` computes all token scores of a layer in two kernels of Triton.

The kernels are used on CUDA devices, where Triton is installed and the attention weights come from
a softmax of known logits. The environment variable ``CAPTUM_CW_KERNEL`` changes the choice:
``torch`` always takes the blockwise engine; ``triton`` takes the kernels wherever they apply, also
on the CPU where Triton interprets kernels (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from captum_cw.weights import (
    QueryMask,
    SoftmaxWeights,
    Weights,
    grouped_matmul,
    inner_weights,
)

__all__ = ["Block", "Direction", "Product", "Reduction", "reduce_by_kernel"]

Reduction = Literal["mean", "sum", "max", "rms"]

Block = Callable[[Tensor, slice], Tensor]
"""Takes ``a`` ``(B, H, t, n)`` and its rows, and returns the measure there. It may overwrite
``a``."""

#: The environment variable that chooses the engine, and its values.
VARIABLE, BLOCKWISE, KERNEL = "CAPTUM_CW_KERNEL", "torch", "triton"

#: The kernels are used for heads of this size at most, and for so many heads of all examples.
LARGEST_HEAD, MOST_HEADS = 256, 2**16 - 1

#: The kernels need the tensor cores of this generation of NVIDIA's GPUs or of a later one.
CAPABILITY = (8, 0)


class Direction(NamedTuple):
    """A factor ``<u_i, v_j>`` of a measure.

    Args:
        vectors: ``u_i``, ``(B, H, T, d_h)``.
        power: Where it is given, the factor is ``|<u_i, v_j>|^power``.
    """

    vectors: Tensor
    power: float | None = None


@dataclass(frozen=True)
class Product:
    """A measure ``a_ij q_i k_j <u_i, v_j> <w_i, v_j>``, of which any factor may be missing.

    Args:
        value: ``v_j``, ``(B, H_kv, S, d_h)``.
        directions: The inner products, two at most.
        per_query: ``q_i``, broadcastable to ``(B, H, T)``; None for one.
        per_key: ``k_j``, ``(B, H, S)``, not negative; None for one.
        instead: A mask that takes the place of the attention weights: ``a_ij`` is one where the
            query sees the key, and zero elsewhere.
        absolute: Whether ``|a_ij|`` takes the place of ``a_ij``.

    Example:
        >>> value, a = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[0.25, 0.75]]]])
        >>> product = Product(value, (Direction(torch.tensor([[[[4.0]]]])),))
        >>> product(a, slice(0, 1)).tolist()
        [[[[1.0, 6.0]]]]
    """

    value: Tensor
    directions: tuple[Direction, ...] = ()
    per_query: Tensor | None = None
    per_key: Tensor | None = None
    instead: QueryMask | None = None
    absolute: bool = False

    def __call__(self, a: Tensor, rows: slice) -> Tensor:
        """Return the measure for a block of attention weights, which is overwritten."""
        n = a.shape[-1]
        if self.instead is not None:
            a.copy_(self.instead.block(rows, a.device))
        elif self.absolute:
            a.abs_()
        for vectors, power in self.directions:
            along = grouped_matmul(vectors[:, :, rows], self.value[:, :, :n])
            a.mul_(along if power is None else along.abs_().pow_(power))
        if self.per_query is not None:
            a.mul_(self.per_query[:, :, rows, None])
        if self.per_key is not None:
            a.mul_(self.per_key[:, :, None, :n])
        return a


def reduce_by_kernel(
    weights: Weights,
    block: Block,
    mask: QueryMask,
    chosen: Tensor | None,
    reduction: Reduction,
    *,
    signed: bool,
) -> Tensor | None:
    """Reduce a measure over queries with the kernels of Triton, where they apply.

    Args:
        weights: The attention weights of a layer.
        block: The measure of the layer.
        mask: The mask of the layer.
        chosen: ``(B, T)`` boolean, the queries that count; None for all.
        reduction: The reduction; a mean is returned as a sum, and ``"rms"`` as a sum of squares.
        signed: Whether to keep signs.

    Returns:
        ``(B, H, S)`` float32; None where the kernels do not apply.

    Raises:
        ValueError: If ``CAPTUM_CW_KERNEL`` has an unknown value.
        ImportError: If it asks for Triton, which is not installed.
    """
    weights = inner_weights(weights)
    engine = os.environ.get(VARIABLE) or None
    if engine not in (None, BLOCKWISE, KERNEL):
        raise ValueError(
            f"{VARIABLE}={engine!r} is unknown: set it to {BLOCKWISE!r} for the blockwise engine, "
            f"to {KERNEL!r} for the kernels, or remove it, so that the device decides."
        )
    if engine == BLOCKWISE or not (
        isinstance(weights, SoftmaxWeights)
        and isinstance(block, Product)
        and weights.mask is mask
        and (block.instead is None or block.instead is mask)
        and (engine == KERNEL or block.value.is_cuda)
        and _fits(weights, block)
    ):
        return None
    if find_spec("triton") is None:
        if engine is None:
            return None
        raise ImportError(
            f"{VARIABLE}={KERNEL!r} needs Triton, which is not installed: it comes with the CUDA "
            "build of torch, and `pip install triton` installs it on Linux."
        )
    from captum_cw import kernels

    if not (_has_tensor_cores(block.value) or kernels.INTERPRETED):
        return None
    return kernels.reduce_queries(weights, block, chosen, reduction, signed=signed)


def _fits(weights: SoftmaxWeights, product: Product) -> bool:
    """Whether the kernels can read the tensors of a measure."""
    sizes = weights.query.shape[-1], product.value.shape[-1]
    tensors = weights.query, weights.key, product.value, *(x.vectors for x in product.directions)
    return (
        max(sizes) <= LARGEST_HEAD
        and weights.query.shape[:2].numel() <= MOST_HEADS
        and all(x.dtype == torch.float32 for x in tensors)
        and len({x.device for x in tensors}) == 1
        and len(product.directions) <= 2
    )


def _has_tensor_cores(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    amd = torch.version.hip is not None
    return amd or torch.cuda.get_device_capability(x.device) >= CAPABILITY
