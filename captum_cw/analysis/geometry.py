"""Inner products of projected values, computed from the unprojected values."""

from __future__ import annotations

from torch import Tensor

from captum_cw.analysis.streaming import SeenLayer
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import output_gram
from captum_cw.weights import expand_heads


def values_and_gram(seen: SeenLayer) -> tuple[Tensor, Tensor]:
    """Return a layer's values by query head, and the Gram matrices of their projections.

    Returns:
        The values ``(H, S, d_h)`` and ``W_O W_O^T`` of each head, ``(H, d_h, d_h)``, in float64.
        :func:`inner_products` uses both.

    Raises:
        UnsupportedModelError: If the layer has an elementwise gate: projected values then differ
            from query to query.
    """
    layer = seen.layer
    if layer.gate is not None:
        raise UnsupportedModelError(
            f"Layer {seen.name!r} multiplies head outputs by a gate or a norm. Its projected "
            "values differ from query to query, so this analysis does not apply."
        )
    return expand_heads(layer.value, layer.H)[0].double(), output_gram(layer.output_weight.double())


def inner_products(a: Tensor, gram: Tensor, b: Tensor) -> Tensor:
    """Compute ``<a~_n, b~_n>`` row by row.

    Args:
        a: Unprojected vectors, ``(H, N, d_h)``.
        gram: The Gram matrices, ``(H, d_h, d_h)``.
        b: Unprojected vectors, ``(H, N, d_h)``, or one row for all, ``(H, 1, d_h)``.

    Returns:
        The inner products of the projected vectors, ``(H, N)``.

    Example:
        >>> inner_products(torch.ones(1, 2, 2), torch.eye(2)[None], torch.ones(1, 1, 2)).tolist()
        [[2.0, 2.0]]
    """
    return ((a @ gram) * b).sum(-1)


def norms(x: Tensor, gram: Tensor) -> Tensor:
    """Compute ``||x~_n||``, ``(H, N)``, of unprojected vectors ``(H, N, d_h)``."""
    return inner_products(x, gram, x).clamp(min=0).sqrt()
