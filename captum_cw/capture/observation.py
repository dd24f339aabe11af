"""One forward pass, observed: each attention layer is handed over as soon as it has run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from captum_cw.capture.attention import attention_calls
from captum_cw.capture.calls import (
    AttentionCall,
    Kind,
    UnsupportedModelError,
    find_weights,
    padding_of,
    query_mask,
)
from captum_cw.capture.listening import is_listening, taken_over
from captum_cw.capture.projections import HeadFlow, LinearProduct, functions, projection
from captum_cw.capture.running import Run
from captum_cw.capture.states import StateSpace, hidden_states
from captum_cw.capture.updates import ResidualUpdates
from captum_cw.functional import AttentionLayer, FrozenUpdate, QueryMask, Space

__all__ = ["Execution", "Observation", "UnsupportedModelError", "names_of"]


#: How many masks are kept: those of sliding and full layers, of an encoder and a decoder.
MASKS = 6


@dataclass(frozen=True)
class Execution:
    """That an attention module ran once.

    Args:
        module: The attention module.
        name: Its name in the model.
        kind: Whether it attends to its own tokens (``"self"``) or to others (``"cross"``).
        states: The hidden states of its tokens, ``(B, S, n)``, where they are asked for.
    """

    module: nn.Module
    name: str
    kind: Kind
    states: Tensor | None = None


@dataclass(frozen=True)
class _Way:
    """How head outputs became the output.

    Args:
        product: The output projection.
        flow: What led to it.
        factors: What the head outputs were multiplied by on the way; None if by nothing.
    """

    product: LinearProduct
    flow: HeadFlow
    factors: Tensor | None

    def output_of(self, head_output: Tensor) -> Tensor:
        """The output that other head outputs, as a kernel gives them, would have."""
        x = self.product.input
        if self.factors is None:
            return self.product.of(self.flow.by_token(head_output).reshape(x.shape))
        return self.product.of(self.flow.again(head_output, x))


@dataclass(frozen=True)
class _Pending:
    """A layer whose projection has not run yet.

    Args:
        execution: The layer.
        call: Its attention call.
        mask: Which keys its queries can see.
        flow: Its head outputs on their way.
    """

    execution: Execution
    call: AttentionCall
    mask: QueryMask
    flow: HeadFlow


class Observation:
    """Watches the attention layers that run inside its ``with`` block, in this thread.

    Args:
        roots: The model, or the modules of it that are known.
        on_layer: Told of each wanted layer right after its output projection has run, in order
            (in the residual's space: once it is known what is added to the stream); what it is
            given is not kept. Where it returns factors ``(B, H, S)``, the model goes
            on with the output that the layer has with its values multiplied by them.
        wanted: The attention modules to hand over; None for all.
        kind: Which layers to hand over: those that attend to their own tokens, to others, or all.
        real: For each sequence of tokens that the model reads and of which it is told, ``(B, T)``,
            False at padding.
        states: The hidden states that each execution brings along; None for none.
        space: Where layers can be seen: in the ``"residual"`` one only if that is asked for.

    Attributes:
        executions: Every attention call so far, wanted or not.
    """

    def __init__(
        self,
        roots: Collection[nn.Module],
        on_layer: Callable[[Execution, AttentionLayer], Tensor | None],
        wanted: Collection[nn.Module] | None = None,
        *,
        kind: Kind | Literal["all"] = "all",
        real: Sequence[Tensor] = (),
        states: StateSpace | None = None,
        space: Space = "attention",
    ) -> None:
        self.executions: list[Execution] = []
        self._names = names_of(roots)
        self._on_layer, self._wanted, self._kind = on_layer, wanted, kind
        self._told = real
        self._before: tuple[Run, ...] = ()
        # The layer whose projection has not run yet, and what the last projection has read.
        self._pending: _Pending | None = None
        self._projected: tuple[Execution, Tensor] | None = None
        # Layers share their mask: one view of it serves all.
        self._masks: dict[tuple[object, ...], tuple[Tensor | None, QueryMask]] = {}
        # Of the last layer that attends to its own tokens: the next one's queries, as a rule.
        self._real: Tensor | None = None
        self._states = states
        self._updates = ResidualUpdates(roots) if space == "residual" else None
        self._missed: Callable[[], list[nn.Module]] = list
        self._stack = ExitStack()

    def __enter__(self) -> Observation:
        with ExitStack() as stack:
            self._missed = stack.enter_context(attention_calls(self._names, self._on_call))
            stack.enter_context(functions(self._followed, self._on_linear))
            if self._updates is not None:
                stack.enter_context(self._updates.watching())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._pending is not None:
                raise _no_projection(self._pending)
            if kind is None and self._updates is not None:
                self._updates.check_arrived()
            if kind is None and self.executions:
                self._tell_of_missed()
        finally:
            self._stack.close()
            self._pending = self._projected = None
            self._masks.clear()
            self._before, self._real = (), None

    def _tell_of_missed(self) -> None:
        modules = [module for module in self._missed() if module in self._names]
        missed = [self._names[module] for module in modules]
        for execution in self.executions:
            if execution.module in modules:
                raise UnsupportedModelError(
                    f"Attention layer {execution.name!r} ({type(execution.module).__name__}) also "
                    "computes attention that is not between the tokens it was given, as within "
                    "chunks or windows, so what it makes of its values is not known."
                )
        if missed:
            others = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
            warnings.warn(
                f"Module {missed[0]!r}{others} seems to compute attention that is not between the "
                "tokens it was given, as within chunks or windows: it is left out.",
                stacklevel=6,
            )

    def _on_call(self, call: AttentionCall) -> None:
        if call.module not in self._names:
            return
        if self._pending is not None:
            raise _no_projection(self._pending)
        execution = Execution(call.module, self._names[call.module], call.kind)
        self.executions.append(execution)
        self._projected = None
        mask = self._mask(call)
        of_kind = self._kind in ("all", call.kind)
        if of_kind and (self._wanted is None or call.module in self._wanted):
            if self._states is not None:
                states = hidden_states(call, self._states, self._before)
                execution = replace(execution, states=states)
            flow = HeadFlow(call.returned, call.by_token)
            self._pending = _Pending(execution, call, mask, flow)
        self._before = call.running

    def _followed(self) -> HeadFlow | None:
        # Not while an observation inside this one is at work.
        return self._pending.flow if self._pending and is_listening(self._on_call) else None

    def _on_linear(self, product: LinearProduct) -> Tensor | None:
        if not is_listening(self._on_call):
            return None
        if self._pending is not None:
            pending = self._pending
            call, flow = pending.call, pending.flow
            factors = None
            if flow.overwritten:  # what the kernel gave is no longer there to be compared
                return None
            if not product.reads(call.head_output):
                if not product.fits(call.head_output) or not flow.holds(product.input):
                    return None
                factors = flow.factors(product.input)
                if factors is None:
                    return None
            read = product.input.detach().reshape(call.head_output.shape)
            self._pending, self._projected = None, (pending.execution, read)
            way = _Way(product, flow, factors)

            def found(update: FrozenUpdate | None) -> Tensor | None:
                return self._hand_over(pending, way, update)

            if self._updates is None:
                return found(None)
            self._updates.follow(pending.execution.name, product.result, found)
        elif self._projected is not None and product.reads(self._projected[1]):
            raise UnsupportedModelError(
                f"Two linear layers read the head outputs of layer {self._projected[0].name!r}, so "
                "neither is its output projection. With LoRA adapters, merge them first."
            )
        return None

    def _hand_over(
        self, pending: _Pending, way: _Way, update: FrozenUpdate | None
    ) -> Tensor | None:
        """The result that the projection is to have instead, if it is to have another."""
        call = pending.call
        # What is computed here is not the model's. Geometry is float32 at least, whatever the
        # model is cast to.
        with taken_over(), torch.autocast(call.value.device.type, enabled=False):
            layer = self._layer(pending, way)
            factors = self._on_layer(pending.execution, replace(layer, update=update))
            return None if factors is None else way.output_of(call.scaled(factors))

    def _layer(self, pending: _Pending, way: _Way) -> AttentionLayer:
        call, mask, name = pending.call, pending.mask, pending.execution.name
        o, w = projection(way.product, call.head_output, way.factors, call.dtype, name)
        _check_finite(o, mask.real, name)
        return AttentionLayer(
            weights=find_weights(call, mask, name),
            value=call.value.to(call.dtype),
            head_output=call.head_output.transpose(1, 2).to(call.dtype),
            output_weight=w,
            output=o,
            mask=mask,
            gate=None if way.factors is None else way.factors.transpose(1, 2).to(call.dtype),
        )

    def _mask(self, call: AttentionCall) -> QueryMask:
        key = id(call.mask), call.causal, call.kind, call.B, call.T, call.S
        if key not in self._masks:
            if len(self._masks) == MASKS:
                del self._masks[next(iter(self._masks))]
            real = self._real
            if call.kind == "self":
                real = padding_of(call, self._told)
            elif real is not None and real.shape != (call.B, call.T):
                real = None
            # The tensor is kept, so that its id stays its own.
            self._masks[key] = call.mask, query_mask(call, real)
        mask = self._masks[key][1]
        if call.kind == "self":
            self._real = mask.real
            if self._real is None:
                self._real = torch.ones(call.B, call.T, dtype=torch.bool, device=call.value.device)
        return mask


def names_of(roots: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Every module with its name; a root has none of its own: its class, and which one it is."""
    names: dict[nn.Module, str] = {}
    for number, root in enumerate(roots):
        own = type(root).__name__ + (f"[{number}]" if len(roots) > 1 else "")
        for name, module in root.named_modules():
            names.setdefault(module, name or own)
    return names


def _no_projection(pending: _Pending) -> UnsupportedModelError:
    execution, flow = pending.execution, pending.flow
    # Autograd tells what stands between, but not where it is at other work, or is off.
    other = flow.recorded or torch.is_inference_mode_enabled()
    hint = "Run it under torch.no_grad()." if other else "Such models are not supported yet."
    return UnsupportedModelError(
        f"No linear layer reads the head outputs of attention layer {execution.name!r} "
        f"({type(execution.module).__name__}), nor what becomes of them by a gate or a norm, so "
        f"its output projection W_O is not known. {hint}"
    )


def _check_finite(output: Tensor, real: Tensor | None, name: str) -> None:
    finite = output.sum(-1).isfinite()
    if real is not None:
        finite |= ~real
    if not finite.all():
        b, t = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"The output of attention layer {name!r} is NaN or infinite at example {b}, token {t}: "
            "check the inputs and weights; in float16, load the model in bfloat16 or float32."
        )
