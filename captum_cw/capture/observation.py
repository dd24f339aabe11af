"""One forward pass, observed: each attention layer is handed over as soon as it has run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_cw.capture.attention import attention_calls
from captum_cw.capture.attention_call import (
    AttentionCall,
    Kind,
    UnsupportedModelError,
    find_weights,
    padding_of,
    query_mask,
)
from captum_cw.capture.hidden_states import GivenStates, StateSpace, hidden_states
from captum_cw.capture.listeners import alter, is_listening, taken_over
from captum_cw.capture.module_stack import Run, entries, running
from captum_cw.capture.output_projection import (
    HeadFlow,
    LinearProduct,
    fits,
    functions,
    projection,
    reads,
    same_place,
)
from captum_cw.capture.residual import ResidualUpdates
from captum_cw.capture.tensor_parallel import HeadGroup, head_group
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer, FrozenUpdate, QueryMask, ResidualSum, Space

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
        projection: The name of the module that its output projection was found in; None before it
            has run.
    """

    module: nn.Module
    name: str
    kind: Kind
    states: Tensor | None = None
    projection: str | None = None


@dataclass(frozen=True)
class _Reading:
    """That something is given the head outputs.

    Args:
        input: What it is given.
        factors: What the head outputs were multiplied by before; None if by nothing.
    """

    input: Tensor
    factors: Tensor | None


@dataclass
class _Pending:
    """A layer whose projection has not run yet.

    Args:
        execution: The layer.
        call: Its attention call.
        mask: Which keys its queries can see.
        flow: Its head outputs on their way.
        spread: The processes that its heads are spread over; None for this one alone.
        given: What the modules of the layer were given; None if the stream is not asked for.
        container: A module that is given the head outputs alone, and runs.
        parts: The linear products in it that read them: several where it adds up a weight and an
            adapter.
        versions: Of their results, which what comes after may change in place.
    """

    execution: Execution
    call: AttentionCall
    mask: QueryMask
    flow: HeadFlow
    spread: HeadGroup | None = None
    given: GivenStates | None = None
    container: nn.Module | None = None
    parts: list[tuple[LinearProduct, _Reading]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def reading(self, x: Tensor) -> _Reading | None:
        """How ``x`` is made of the head outputs; None if it is not."""
        if self.flow.overwritten:  # what the kernel gave is no longer there to be compared
            return None
        if reads(x, self.call.head_output):
            return _Reading(x, None)
        if not fits(x, self.call.head_output) or not self.flow.holds(x):
            return None
        factors = self.flow.factors(x)
        return None if factors is None else _Reading(x, factors)

    def output_of(
        self, run: Callable[[Tensor], Tensor], reading: _Reading, factors: Tensor
    ) -> Tensor:
        """What ``run`` gives once values are multiplied by factors."""
        if self.spread is not None:
            factors = self.spread.part(factors)
        heads = self.call.scaled(factors)
        if reading.factors is None:
            return run(self.call.by_token(heads).reshape(reading.input.shape))
        return run(self.flow.again(heads, reading.input))


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
        stream: Whether layers come with the residual stream, which needs that space. They may come
            a little later then, and return no factors.
        text: Tells the layers that read the text from those over images and the like, which are
            left out; None where all count.

    Attributes:
        executions: Every attention call so far that counts, wanted or not.
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
        stream: bool = False,
        text: TextLayers | None = None,
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
        self._stream = stream
        self._text = text
        # The modules around layers of other inputs, which are not missed if they cannot be seen.
        self._foreign: set[nn.Module] = set()
        self._missed: Callable[[], list[nn.Module]] = list
        self._stack = ExitStack()

    def __enter__(self) -> Observation:
        with ExitStack() as stack:
            self._missed = stack.enter_context(attention_calls(self._names, self._on_call))
            stack.enter_context(entries(self._on_enter))
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
        asked = set(self._names if self._wanted is None else self._wanted)
        asked -= {part for module in self._foreign for part in module.modules()}
        missed = [self._names[module] for module in modules if module in asked]
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
        self._projected = None
        if self._text is not None and not self._text.holds(call.running, call.B, call.T):
            self._before = call.running
            return
        execution = Execution(call.module, self._names[call.module], call.kind)
        self.executions.append(execution)
        mask = self._mask(call)
        of_kind = self._kind in ("all", call.kind)
        if of_kind and (self._wanted is None or call.module in self._wanted):
            if self._states is not None:
                states = hidden_states(call, self._states, self._before)
                execution = replace(execution, states=states)
            flow = HeadFlow(call.returned, call.by_token)
            spread = head_group(call.module, call.H, call.value.shape[3])
            given = self._given(call, execution, spread) if self._stream else None
            self._pending = _Pending(execution, call, mask, flow, spread, given)
        self._before = call.running

    def _given(
        self, call: AttentionCall, execution: Execution, spread: HeadGroup | None
    ) -> GivenStates:
        given = GivenStates.of(call, self._before)
        if given is None or spread is not None:
            why = "is given no hidden states (B, T, d)"
            if given is not None:
                why = "has its heads spread over processes"
            raise UnsupportedModelError(
                f"Attention layer {execution.name!r} ({type(call.module).__name__}) {why}, so the "
                "residual stream is not known: use another choice of layers, such as 'mean', or "
                "roll out AttentionWeights, which do not need it."
            )
        return given

    def _followed(self) -> HeadFlow | None:
        # Not while an observation inside this one is at work.
        return self._pending.flow if self._pending and is_listening(self._on_call) else None

    def _on_linear(self, product: LinearProduct) -> Tensor | None:
        if not is_listening(self._on_call):
            return None
        pending = self._pending
        if pending is not None:
            reading = pending.reading(product.input)
            if reading is None:
                return None
            _check_whole(pending, product)
            if pending.container is None:
                module = running()[-1].module if running() else None
                return self._found(pending, product, module, reading, product.of)
            pending.parts.append((product, reading))
            pending.versions.append(_version(product.result))
        elif self._projected is not None and reads(product.input, self._projected[1]):
            raise _two_projections(self._projected[0])
        return None

    def _on_enter(self, run: Run) -> None:
        if self._text is not None and self._text.is_foreign(run):
            self._foreign.add(run.module)
        pending = self._pending
        if pending is None or pending.container is not None or not is_listening(self._on_call):
            return
        given = list(run.tensors())
        # A plain linear layer is one product, which is seen.
        if len(given) != 1 or type(run.module).forward is nn.Linear.forward:
            return
        reading = pending.reading(given[0])
        if reading is None:
            return
        pending.container = run.module

        def left(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if self._pending is not pending or not is_listening(self._on_call):
                return None  # another thread runs it
            handle.remove()
            return self._left(pending, reading, result)

        handle = run.module.register_forward_hook(left)
        self._stack.callback(handle.remove)

    def _left(self, pending: _Pending, reading: _Reading, result: Any) -> Any:
        """Takes what a module made of the head outputs as a whole, if that is linear."""
        container, parts, versions = pending.container, pending.parts, pending.versions
        assert container is not None
        pending.container, pending.parts, pending.versions = None, [], []

        def is_part(x: Any) -> bool:
            """Whether a result is that of the one product, as it was."""
            if len(parts) != 1 or not isinstance(x, Tensor):
                return False
            own = parts[0][0].result
            return same_place(own, x) and _version(own) == versions[0]

        if isinstance(result, tuple) and is_part(result[0]):
            part, given = parts[0]
            changed = self._found(pending, part, container, given, part.of)
            return None if changed is None else (changed, *result[1:])
        if not isinstance(result, Tensor):
            return None
        if is_part(result):
            part, given = parts[0]
            return self._found(pending, part, container, given, container.forward, reading)
        whole = LinearProduct(reading.input, None, None, result, container.forward)
        with taken_over(), torch.no_grad():
            # What is made of weights that can be read is not rounded.
            product = whole.read(1e-3) if parts else whole.read()
        if product is not None:
            return self._found(pending, product, container, reading, container.forward)
        if len(parts) > 1:
            raise _two_projections(pending.execution)
        if parts:  # and something else, as a norm, before or after it
            part, given = parts[0]
            return self._found(pending, part, container, given, container.forward, reading)
        return None

    def _found(
        self,
        pending: _Pending,
        product: LinearProduct,
        module: nn.Module | None,
        reading: _Reading,
        run: Callable[[Tensor], Tensor],
        given: _Reading | None = None,
    ) -> Tensor | None:
        """Hands the layer over; the result that there is to be instead, if there is.

        Args:
            pending: The layer.
            product: Its output projection.
            module: What made it.
            reading: Of the head outputs, by the projection.
            run: What gives the result.
            given: What ``run`` reads, where that is not what the projection reads.
        """
        read = product.input.detach().reshape(pending.call.head_output.shape)
        execution = pending.execution
        if module is not None:
            execution = replace(execution, projection=self._names.get(module))
        self._pending, self._projected = None, (execution, read)

        def found(update: FrozenUpdate | None, residual: ResidualSum | None) -> Tensor | None:
            device = pending.call.value.device.type
            with taken_over():  # what is computed here is not the model's
                # The model's own functions run under the autocast that it runs under; geometry is
                # float32 at least, whatever the model is cast to.
                readable = product if product.weight is not None else product.read()
                with torch.autocast(device, enabled=False):
                    layer = self._layer(pending, readable, reading.factors)
                    if residual is not None:
                        residual = residual.to(pending.call.dtype)
                    layer = replace(layer, update=update, residual=residual)
                    with torch._C.DisableTorchFunction():  # nobody follows what is computed of it
                        factors = self._on_layer(execution, layer)
                if factors is None:
                    return None
                if self._updates is not None and pending.spread is not None:
                    raise UnsupportedModelError(
                        f"The heads of layer {pending.execution.name!r} are spread over processes: "
                        "their values cannot be changed by what is measured in the residual's "
                        "space in the same pass. Use scoring='clean' or space='attention'."
                    )
                return alter(pending.output_of(run, given or reading, factors))

        if self._updates is None:
            return found(None, None)
        self._updates.follow(pending.execution.name, product.result, found, pending.given)
        return None

    def _layer(
        self, pending: _Pending, product: LinearProduct | None, gate: Tensor | None
    ) -> AttentionLayer:
        call, mask, name = pending.call, pending.mask, pending.execution.name
        o, w = projection(product, call.head_output, gate, call.dtype, name)
        _check_finite(o, mask.real, name)
        with torch._C.DisableTorchFunction():
            weights = find_weights(call, mask, name)
        layer = AttentionLayer(
            weights=weights,
            value=call.read(call.value),
            head_output=call.head_output.transpose(1, 2).to(call.dtype),
            output_weight=w,
            output=o,
            mask=mask,
            gate=None if gate is None else gate.transpose(1, 2).to(call.dtype),
        )
        if pending.spread is not None:
            layer = pending.spread.whole(layer)
        return layer

    def _mask(self, call: AttentionCall) -> QueryMask:
        if call.query is None:  # it was made of this call's weights: nothing shares it
            mask = self._new_mask(call)
        else:
            key = id(call.mask), call.causal, call.kind, call.B, call.T, call.S
            if key not in self._masks:
                if len(self._masks) == MASKS:
                    del self._masks[next(iter(self._masks))]
                # The tensor is kept, so that its id stays its own.
                self._masks[key] = call.mask, self._new_mask(call)
            mask = self._masks[key][1]
        if call.kind == "self":
            self._real = mask.real
            if self._real is None:
                self._real = torch.ones(call.B, call.T, dtype=torch.bool, device=call.value.device)
        return mask

    def _new_mask(self, call: AttentionCall) -> QueryMask:
        if call.kind == "self":
            return query_mask(call, padding_of(call, self._told))
        fits_queries = self._real is not None and self._real.shape == (call.B, call.T)
        return query_mask(call, self._real if fits_queries else None)


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


def _two_projections(execution: Execution) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Two linear layers read the head outputs of layer {execution.name!r}, so neither is its "
        "output projection, and no module makes one output of both."
    )


def _check_whole(pending: _Pending, product: LinearProduct) -> None:
    """Raises an UnsupportedModelError where processes that are not known hold other heads."""
    module = running()[-1].module if running() else None
    declared, here = getattr(module, "in_features", None), product.input.shape[-1]
    if isinstance(declared, int) and declared != here and pending.spread is None:
        raise UnsupportedModelError(
            f"The output projection of layer {pending.execution.name!r} reads {here} of {declared} "
            "features: its heads are spread over processes (tensor parallel) in a way that is not "
            "known. Load the model without tp_plan; device_map spreads whole layers."
        )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


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
