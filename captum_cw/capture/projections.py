"""The output projection of an attention layer, found by the data.

``W_O`` is the linear layer whose input is the head outputs that the kernel returned, whatever
its name and wherever it stands (BERT keeps it beside the attention module).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from captum_cw.capture.calls import UnsupportedModelError

__all__ = ["linear_types", "output_and_weight", "reads"]


def linear_types() -> tuple[type[nn.Module], ...]:
    """Layers that multiply by a weight; transformers is not imported for its own."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(pytorch_utils, "Conv1D", None)
    return (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)


def reads(x: object, head_output: Tensor) -> bool:
    """Whether ``x``, the input of a layer, is the head outputs ``(B, T, H, d_h)``."""
    if not isinstance(x, Tensor) or x.numel() != head_output.numel() or x.dtype != head_output.dtype:
        return False
    return x.data_ptr() == head_output.data_ptr() or torch.equal(
        x.reshape(head_output.shape), head_output
    )


def output_and_weight(
    layer: nn.Module, head_output: Tensor, result: Tensor, dtype: torch.dtype, name: str
) -> tuple[Tensor, Tensor]:
    """``o`` without the bias, and ``W_O`` by heads.

    Args:
        layer: The linear layer.
        head_output: ``(B, T, H, d_h)``.
        result: What the layer returned for it.
        dtype: What to compute in.
        name: The attention layer, for messages.

    Returns:
        ``(B, T, d)`` and ``(H, d_h, d)``.

    Raises:
        UnsupportedModelError: If the weight does not account for what the layer returned, as with
            quantised weights.
    """
    B, T, H, d_h = head_output.shape
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if weight.is_floating_point() and weight.dim() == 2:
        by_input = weight.T if isinstance(layer, nn.Linear) else weight
        if by_input.shape[0] == H * d_h:
            y = head_output.reshape(B, T, H * d_h)
            w = by_input.to(dtype)
            if _accounts(y[:, -1], w, bias, result.view(B, T, -1)[:, -1], result.dtype):
                # In half precision the result is rounded, and a bias would have to come off.
                exact = bias is None and result.dtype == dtype
                o = result.view(B, T, -1) if exact else y.to(dtype) @ w
                return o, w.view(H, d_h, -1)
    raise UnsupportedModelError(
        f"The output projection of layer {name!r} is a {type(layer).__name__} whose weight "
        f"{tuple(weight.shape)} ({weight.dtype}) does not account for its output: quantised "
        "projections are not supported; load the model in floating point."
    )


def _accounts(
    y: Tensor, w: Tensor, bias: object, result: Tensor, model_dtype: torch.dtype
) -> bool:
    """Whether ``y @ w + bias`` is the result, at one query of each example."""
    tolerance = max(1e-4, 4 * torch.finfo(model_dtype).eps)
    expected = y.to(w.dtype) @ w
    scale = y.to(w.dtype).abs() @ w.abs()
    if isinstance(bias, Tensor):
        expected, scale = expected + bias.detach(), scale + bias.detach().abs()
    # NaN passes here: it is reported as NaN, with its place.
    return not bool(((expected - result).abs() > tolerance * scale + 1e-30).any())
