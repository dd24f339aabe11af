"""Attention with fixed weights, whose backward pass computes the gradient at the values alone.

The backward pass of a fused kernel computes the gradients at queries, keys and values together.
Where weights are held fixed, only that at the values is needed. It is a sum of weights and
gradients. A measure of the target reads the same weights, so they are computed once for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from captum_cw.capture.attention_call import hides_later
from captum_cw.capture.function_call import FunctionCall
from captum_cw.functional import QueryMask
from captum_cw.weights import SoftmaxWeights, block_elements

__all__ = ["ValueGradient", "frozen_attention", "node_of", "run_frozen"]

#: The number of functions, such as a transposition and a copy, between attention and its result.
REARRANGED = 4


class ValueGradient:
    """The gradient at the values, summed up while somebody reads the attention weights.

    Args:
        weights: The attention weights.
        gradient: The gradient at the head outputs, ``(B, H, T, d_h)``.
        heads: The number of key-value heads.
        S: The number of keys.

    Example:
        >>> a, gradient = torch.eye(3).expand(1, 2, 3, 3), torch.ones(1, 2, 3, 4)
        >>> weights = ValueGradient(lambda rows: a[:, :, rows], gradient, heads=1, S=3)
        >>> weights(slice(0, 2)).shape  # as from the given weights
        torch.Size([1, 2, 2, 3])
        >>> weights.whole()[0, 0, :, 0]
        tensor([2., 2., 2.])
    """

    def __init__(
        self, weights: Callable[[slice], Tensor], gradient: Tensor, heads: int, S: int
    ) -> None:
        self.gradient = gradient
        self._weights, self._done = weights, 0
        B, _, _, d_h = gradient.shape
        self._total = gradient.new_zeros(B, heads, S, d_h)

    def __call__(self, rows: slice) -> Tensor:
        """Return the weights of a block of queries."""
        a = self._weights(rows)
        if rows.start == self._done:  # others are left for later
            self._add(rows, a)
        return a

    def whole(self) -> Tensor:
        """Return the gradient, ``(B, H_kv, S, d_h)``, after all queries that nobody read."""
        B, H, T, _ = self.gradient.shape
        size = max(1, block_elements(self.gradient.device) // (B * H * self._total.shape[2]))
        while self._done < T:
            self(slice(self._done, min(self._done + size, T)))
        return self._total

    def fits(self, gradient: Tensor, shape: torch.Size) -> bool:
        """Return True if the sum was made from this gradient and for values of this shape.

        The model may also use the heads elsewhere or scale them, and a cache may have empty places.
        """
        is_same = torch.equal(gradient.to(self.gradient), self.gradient)
        return is_same and self._total.shape == shape

    def _add(self, rows: slice, a: Tensor) -> None:
        B, H, t, n = a.shape
        heads = self._total.shape[1]
        by_key = a.reshape(B, heads, H // heads * t, n).mT
        g = self.gradient[:, :, rows].reshape(B, heads, H // heads * t, -1)
        self._total[:, :, :n] += by_key @ g
        self._done = rows.stop


def run_frozen(call: FunctionCall) -> Any:
    """Run ``scaled_dot_product_attention`` of fixed queries and keys."""
    query, key, value = call.args[:3]
    mask, causal = call.argument(3, "attn_mask"), call.argument(5, "is_causal", False)
    is_known = (
        query.device.type == "cpu"  # elsewhere, one kernel is faster than many small ones
        and not call.argument(4, "dropout_p", 0.0)
        and not (causal and query.shape[-2] != key.shape[-2])
        and (mask is None or mask.dtype == torch.bool)
        and query.dim() == key.dim() == 4
        and query.shape[0] == key.shape[0]
        and not query.shape[1] % key.shape[1]
        and key.shape[:3] == value.shape[:3]
    )
    if not is_known:
        return call.run()
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    return frozen_attention(
        query,
        key,
        value,
        call.detached().run,
        mask=mask,
        causal=causal,
        scaling=call.kwargs.get("scale"),
    )


def frozen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run: Callable[[], Tensor],
    *,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    """Return the result of a kernel, of which only the values have a gradient.

    Args:
        query: ``(B, H, T, d_k)``.
        key: ``(B, H_kv, S, d_k)``.
        value: ``(B, H_kv, S, d_h)``.
        run: Runs the kernel.
        mask: Boolean, True where a key is visible, broadcastable to ``(B, H, T, S)``; or None.
        causal: Whether a query sees no later key. It counts only without a mask.
        scaling: The factor of the inner products; None is ``1 / sqrt(d_k)``.

    Example:
        >>> q, k = torch.zeros(2, 1, 1, 2, 4)
        >>> v = torch.ones(1, 1, 2, 4, requires_grad=True)
        >>> y = frozen_attention(q, k, v, lambda: v.detach(), mask=None, causal=False, scaling=None)
        >>> y.sum().backward()
        >>> v.grad[0, 0, :, 0]
        tensor([1., 1.])
    """
    result: Tensor = _FrozenAttention.apply(  # type: ignore[no-untyped-call]
        value, query, key, mask, run, causal, scaling
    )
    return result


def node_of(result: Tensor) -> Any:
    """Return the node of :func:`frozen_attention` in the graph of its rearranged result, or None.

    If somebody reads the weights before the backward pass comes to the node, a
    :class:`ValueGradient` that was ``gathered`` can be given to it. Its values have the shape
    ``shape``, ``(B, H_kv, S, d_h)``.
    """
    node: Any = result.grad_fn
    for _ in range(REARRANGED):
        if getattr(node, "_forward_cls", None) is _FrozenAttention:
            return node
        before = [x for x, _ in getattr(node, "next_functions", ()) if x is not None]
        if len(before) != 1:
            break
        (node,) = before
    return None


class _FrozenAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        run: Callable[[], Tensor],
        causal: bool,
        scaling: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, mask)
        ctx.causal, ctx.scaling, ctx.gathered = causal, scaling, None
        ctx.shape, ctx.dtype = value.shape, value.dtype
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = grads
        gathered, ctx.gathered = ctx.gathered, None
        with torch.autocast(gradient.device.type, enabled=False):
            if gathered is None or not gathered.fits(gradient, ctx.shape):
                gathered = _gathered(ctx, gradient)
            return gathered.whole().to(ctx.dtype), None, None, None, None, None, None


def _gathered(ctx: Any, gradient: Tensor) -> ValueGradient:
    query, key, visible = ctx.saved_tensors
    T, S = query.shape[2], key.shape[2]
    causal = ctx.causal if visible is None else hides_later(visible, T, S)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    query, key = (x.to(gradient.dtype).to(wide) for x in (query, key))
    weights = SoftmaxWeights(query, key, QueryMask(T, S, visible, causal), scaling=ctx.scaling)
    return ValueGradient(weights, gradient.to(wide), ctx.shape[1], S)
