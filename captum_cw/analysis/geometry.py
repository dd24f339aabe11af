"""Inner products of projected values, without projecting them."""

from __future__ import annotations

from torch import Tensor

from captum_cw.analysis.streaming import SeenLayer
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import expand_heads, output_gram

__all__ = ["inner_products", "projected"]


def projected(seen: SeenLayer) -> tuple[Tensor, Tensor]:
    """A layer's values by query head, and what makes inner products of projected ones of them.

    Returns:
        ``(H, S, d_h)`` and ``(H, d_h, d_h)``, float64.

    Raises:
        UnsupportedModelError: If an elementwise gate makes them differ from query to query.
    """
    layer = seen.layer
    if layer.gate is not None:
        raise UnsupportedModelError(
            f"Layer {seen.name!r} multiplies head outputs by a gate, or by a norm, so its "
            "projected values differ from query to query, and this analysis does not apply."
        )
    return expand_heads(layer.value, layer.H)[0].double(), output_gram(layer.output_weight.double())


def inner_products(a: Tensor, gram: Tensor, b: Tensor) -> Tensor:
    """``<a~_n, b~_n>``, row by row.

    Args:
        a: ``(H, N, d_h)``.
        gram: ``(H, d_h, d_h)``.
        b: ``(H, N, d_h)``, or one row for all.

    Returns:
        ``(H, N)``.

    Example:
        >>> inner_products(torch.ones(1, 2, 2), torch.eye(2)[None], torch.ones(1, 1, 2)).tolist()
        [[2.0, 2.0]]
    """
    return ((a @ gram) * b).sum(-1)
