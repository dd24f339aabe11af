"""Attention calls of a linearised pass, whose results wait for the gradient of the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.attention_call import (
    AttentionCall,
    SoftmaxWeights,
    UnsupportedModelError,
    find_weights,
)
from captum_cw.capture.frozen_attention import ValueGradient, node_of
from captum_cw.capture.function_call import varies
from captum_cw.capture.observation import Execution
from captum_cw.capture.tensor_parallel import head_group
from captum_cw.functional import QueryMask, TargetLayer

__all__ = ["Heads", "OnLayer", "watched"]

OnLayer = Callable[[Execution, TargetLayer], Any]


@dataclass
class Heads:
    """An attention call, and the result of its layer once the gradient is known."""

    execution: Execution
    layer: TargetLayer
    node: Any = None  # of fixed attention in the graph
    result: Any = None
    is_done: bool = False
    hook: Any = None

    def finish(self, gradient: Tensor, on_layer: OnLayer) -> None:
        """Compute the result, now that the gradient at the heads is known."""
        weights = self.layer.weights
        if self.node is not None:
            weights = ValueGradient(weights, gradient, self.node.shape[1], self.layer.S)
            self.node.gathered = weights
        layer = replace(self.layer, weights=weights, head_gradient=gradient)
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            self.result = on_layer(self.execution, layer)
        self.is_done = True
        if self.hook is not None:
            self.hook.remove()


def watched(
    execution: Execution,
    call: AttentionCall,
    mask: QueryMask,
    on_layer: OnLayer,
) -> Heads:
    """Return an attention call whose result is computed as soon as its gradient is known."""
    if head_group(call.module, call.H, call.value.shape[3]) is not None:
        raise UnsupportedModelError(
            f"The heads of layer {execution.name!r} are spread over processes (tensor parallel), "
            "where targets are not supported: load the model without tp_plan."
        )

    def fixed(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach()

    with torch.no_grad(), torch._C.DisableTorchFunction():
        seen = replace(
            call,
            value=call.value.detach(),
            returned=call.returned.detach(),
            query=fixed(call.query),
            key=fixed(call.key),
            mask=fixed(call.mask),
            weights=fixed(call.weights),
        )
        layer = TargetLayer(
            weights=find_weights(seen, mask, execution.name),
            value=seen.read(seen.value),
            head_gradient=_zeros(call),
            mask=mask,
        )
        node = node_of(call.returned) if isinstance(layer.weights, SoftmaxWeights) else None
    heads = Heads(execution, layer, node)

    def on_gradient(gradient: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            by_head = call.by_token(gradient).transpose(1, 2).to(seen.dtype)
            heads.finish(by_head, on_layer)

    if varies(call.returned):
        with torch._C.DisableTorchFunction():
            hook = call.returned.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        heads.hook = hook
    return heads


def _zeros(call: AttentionCall) -> Tensor:
    """Return the gradient of a target that does not depend on a call, ``(B, H, T, d_h)``."""
    zero = call.value.new_zeros((), dtype=call.dtype)
    return zero.expand(call.B, call.H, call.T, call.value.shape[-1])
