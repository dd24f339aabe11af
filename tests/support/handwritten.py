"""What hand-written attention does, asked of the attention module itself.

Attention weights are what its softmax gives. The module runs again with other weights in their
place: with one at one key of one head it returns that key's projected value, whatever lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

#: What grows with every run.
CACHES = ("cache", "past_key_values")


@dataclass
class Call:
    """One run of an attention module, with what its softmax gave, ``(B, H, T, S)``."""

    module: nn.Module
    attention: Tensor
    visible: Tensor
    given: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor | None = None
    linear: nn.Module | None = None
    """What reads the module's output, where that is the head outputs."""
    inner: nn.Module | None = None
    """The first linear layer in the module after its softmax."""


@dataclass
class Softmaxes:
    """Stands around the softmax of hand-written attention.

    Args:
        instead: Gives other weights for a call, by its number and the weights.
    """

    instead: Callable[[int, Tensor], Tensor] | None = None
    calls: list[Call] = field(default_factory=list)
    runs: list[tuple[nn.Module, Any]] = field(default_factory=list)
    inside: bool = False
    projected: Tensor | None = None
    """What the first linear layer after a softmax gave."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for module in model.modules():
            if any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            elif "Linear" in type(module).__name__:
                handles.append(module.register_forward_pre_hook(self._reads))
                handles.append(module.register_forward_hook(self._projects))
        with ExitStack() as stack:
            places = (torch, "softmax"), (nn.functional, "softmax"), (Tensor, "softmax")
            for holder, name in places:
                around = self._around(model, getattr(holder, name))
                stack.enter_context(mock.patch.object(holder, name, around))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.runs.append((module, (args, kwargs)))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.runs.pop()
        if self.calls and self.calls[-1].module is module:
            self.calls[-1].output = _first(out)

    def _reads(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = self.calls[-1] if self.calls else None
        if call is not None and call.output is not None and call.linear is None:
            x, y = args[0], call.output
            if x.numel() == y.numel() and torch.equal(x.flatten(), y.flatten()):
                call.linear = module

    def _projects(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        call = self.calls[-1] if self.calls else None
        if call is not None and call.output is None and call.inner is None:
            call.inner, self.projected = module, _first(out)

    def _around(self, model: nn.Module, softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.inside:  # one softmax calls another
                return softmax(logits, *args, **kwargs)
            self.inside = True
            weights = softmax(logits, *args, **kwargs)
            self.inside = False
            module, given, states = next(
                ((m, g, x) for m, g in reversed(self.runs) for x in _flat(g) if x.dim() == 3),
                (model, None, None),
            )
            if states is None or logits.dim() < 3 or logits.shape[-2] != states.shape[1]:
                return weights
            B = states.shape[0]
            by_head = weights.reshape(B, -1, *weights.shape[-2:])
            masked = logits.reshape(by_head.shape)
            visible = masked > masked.amax(-1, keepdim=True) - 1e3
            self.calls.append(Call(module, by_head, visible, given))
            if self.instead is None:
                return weights
            return self.instead(len(self.calls) - 1, by_head).reshape(weights.shape)

        return run


def _flat(given: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[Tensor]:
    for x in (*given[0], *given[1].values()):
        if isinstance(x, Tensor):
            yield x


def _first(out: Any) -> Tensor:
    while isinstance(out, (tuple, list)):
        out = out[0]
    first: Tensor = out
    return first


def attention_calls(model: nn.Module, inputs: dict[str, Any]) -> list[Call]:
    """The attention calls of a pass."""
    softmaxes = Softmaxes()
    with torch.no_grad(), softmaxes.watching(model):
        model(**inputs)
    return softmaxes.calls


def projected(model: nn.Module, call: Call, inner: bool = False) -> tuple[Tensor, Tensor]:
    """``v~`` ``(B, H, T, S, d)``, and the output ``(B, T, d)`` without what is there for none.

    With ``inner``, the output is that of the first linear layer: a norm may come after it.
    """
    args, kwargs = call.given
    kwargs = kwargs | {name: None for name in CACHES if name in kwargs}
    B, H, T, S = call.attention.shape

    def output(weights: Tensor) -> Tensor:
        softmaxes = Softmaxes(lambda number, old: weights.to(old))
        with torch.no_grad(), softmaxes.watching(model):
            # Of a module that is not called by another there are no hooks.
            out = _first(call.module(*args, **kwargs))
            if inner:
                assert softmaxes.projected is not None
                out = softmaxes.projected
            elif call.linear is not None:
                out = _first(call.linear(out))
            return out.double()

    base = output(torch.zeros(B, H, T, S))
    v = torch.zeros(B, H, T, S, base.shape[-1], dtype=torch.float64)
    for h in range(H):
        for j in range(S):
            one = torch.zeros(B, H, T, S)
            one[:, h, :, j] = 1
            v[:, h, :, j] = output(one) - base
    return v, output(call.attention) - base


def without_values(model: Any, inputs: dict[str, Any], masks: list[Tensor]) -> Any:
    """What the model returns once values ``(B, H, S)`` are removed."""

    def without(number: int, weights: Tensor) -> Tensor:
        return weights * ~masks[number][:, :, None]

    softmaxes = Softmaxes(without)
    with torch.no_grad(), softmaxes.watching(model):
        return model(**inputs)
