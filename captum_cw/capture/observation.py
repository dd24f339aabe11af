"""One observed forward pass, which hands over each attention layer as soon as it has run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

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
from captum_cw.capture.listeners import is_listening, replaced, suspended
from captum_cw.capture.module_stack import Run, innermost, notifying
from captum_cw.capture.output_projection import (
    ROUNDING,
    HeadFlow,
    LinearProduct,
    Reading,
    is_plain_product,
    products_observed,
    projection,
    reads,
    same_place,
)
from captum_cw.capture.residual import ResidualUpdates
from captum_cw.capture.tensor_parallel import HeadGroup, head_group
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer, FrozenUpdate, ResidualSum, Space
from captum_cw.weights import QueryMask, Weights

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Execution", "HeadObservation", "Observation", "UnsupportedModelError", "names_of"]

#: The number of masks that are kept: those of sliding and full layers, of encoder and decoder.
MASKS = 6


@dataclass(frozen=True)
class Execution:
    """One execution of an attention module.

    Args:
        module: The attention module.
        name: Its name in the model.
        kind: ``"self"`` if it attends to its own tokens, and ``"cross"`` otherwise.
        number: Its place among all executions of the pass.
        states: The hidden states of its tokens, ``(B, S, n)``; None if they are not requested.
        projection: The name of the module that holds the output projection; None before it has run.
    """

    module: nn.Module
    name: str
    kind: Kind
    number: int
    states: Tensor | None = None
    projection: str | None = None


class _Part:
    """A linear product that reads the head outputs inside of a module.

    Args:
        product: The product.
        reading: Its input.
    """

    def __init__(self, product: LinearProduct, reading: Reading) -> None:
        self.product, self.reading = product, reading
        self._version = _version(product.result)

    def gave(self, x: Any) -> bool:
        """Whether ``x`` is the result of the product, unchanged."""
        result = self.product.result
        return isinstance(x, Tensor) and same_place(result, x) and _version(result) == self._version


@dataclass
class _Pending:
    """A layer whose output projection has not run yet.

    Args:
        execution: The execution of its attention module.
        call: Its attention call.
        mask: Which keys its queries can see.
        flow: The path of its head outputs.
        group: The processes that share its heads; None if this process has all.
        given: The states that the modules of the layer were given; None unless the residual stream
            is requested.
        container: A running module whose only tensor input is made of the head outputs.
        parts: The linear products in the container that read the head outputs. There may be
            several, such as those of a weight and an adapter, whose results are added.
    """

    execution: Execution
    call: AttentionCall
    mask: QueryMask
    flow: HeadFlow
    group: HeadGroup | None = None
    given: GivenStates | None = None
    container: nn.Module | None = None
    parts: list[_Part] = field(default_factory=list)


class HeadObservation:
    """Observes the attention calls inside its ``with`` block, in this thread.

    Args:
        roots: The model, or the modules of it that are known.
        on_heads: Receives each wanted call right after its kernel has run, and the keys that its
            queries can see.
        wanted: The attention modules to hand over; None for all.
        kind: The kind of attention layers to hand over.
        real: The padding masks of the sequences that the model reads, each ``(B, T)``, False at
            padding.
        text: Selects the layers that read the text in a model of images and text; None for all.
        layers: Whether the running modules include single layers of PyTorch.

    Attributes:
        executions: The attention calls so far, including those of layers that are not wanted.
        all_registered: Whether kernels of transformers' registry made all of them.
        missed_some: Whether some modules compute attention that could not be observed.
    """

    def __init__(
        self,
        roots: Collection[nn.Module],
        on_heads: Callable[[Execution, AttentionCall, QueryMask], None],
        wanted: Collection[nn.Module] | None = None,
        *,
        kind: Kind | Literal["all"] = "all",
        real: Sequence[Tensor] = (),
        text: TextLayers | None = None,
        layers: bool = False,
    ) -> None:
        self._layers = layers
        self.executions: list[Execution] = []
        self.all_registered, self.missed_some = True, False
        self._names = names_of(roots)
        self._on_heads, self._wanted, self._kind = on_heads, wanted, kind
        self._padding_masks = real
        # What ran at the calls before and now: the hidden states of a layer are its input.
        self._before: tuple[Run, ...] = ()
        self._running: tuple[Run, ...] = ()
        # Layers share their masks, and so the query masks made of them.
        self._masks: dict[tuple[object, ...], tuple[Tensor | None, QueryMask]] = {}
        # Of the last self-attention layer: the queries of cross-attention are its tokens.
        self._real: Tensor | None = None
        self._text = text
        # The modules with layers over other inputs than the text, which may be missed.
        self._foreign: set[nn.Module] = set()
        self._missed: Callable[[], list[nn.Module]] = list
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._missed = stack.enter_context(self._calls())
            stack.enter_context(notifying(self._on_enter))
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._check_finished()
        finally:
            self._stack.close()
            self._masks.clear()
            self._before, self._running, self._real = (), (), None

    def _calls(self) -> AbstractContextManager[Callable[[], list[nn.Module]]]:
        """Report attention calls to this observation, and yield a list of the missed modules."""
        return attention_calls(self._names, self._on_call, layers=self._layers)

    def _start(self, stack: ExitStack) -> None:
        """Enter further contexts."""

    def _check_finished(self) -> None:
        if self.executions:
            self._warn_of_missed()

    def _warn_of_missed(self) -> None:
        modules = [module for module in self._missed() if module in self._names]
        self.missed_some = bool(modules)
        wanted = set(self._names if self._wanted is None else self._wanted)
        wanted -= {part for module in self._foreign for part in module.modules()}
        missed = [self._names[module] for module in modules if module in wanted]
        for execution in self.executions:
            if execution.module in modules:
                raise UnsupportedModelError(
                    f"Attention layer {execution.name!r} ({type(execution.module).__name__}) also "
                    "computes attention that cannot be assigned to the tokens of its input, such "
                    "as attention within chunks or windows, so the effect of its values is unknown."
                )
        if missed:
            seem = f"and {len(missed) - 1} more seem" if len(missed) > 1 else "seems"
            warnings.warn(
                f"Module {missed[0]!r} {seem} to compute attention that cannot be assigned to the "
                "tokens of the input, such as attention within chunks or windows, so this "
                "attention is left out.",
                stacklevel=7,
            )

    def _on_call(self, call: AttentionCall) -> None:
        if call.module not in self._names:
            return
        self._before, self._running = self._running, call.running
        if self._text is not None and not self._text.holds(call.running, call.B, call.T):
            return
        number = len(self.executions)
        execution = Execution(call.module, self._names[call.module], call.kind, number)
        self.executions.append(execution)
        self.all_registered &= call.registered
        mask = self._mask(call)
        if self._kind not in ("all", call.kind):
            return
        if self._wanted is None or call.module in self._wanted:
            self._on_heads(execution, call, mask)

    def _on_enter(self, run: Run) -> None:
        if self._text is not None and self._text.is_foreign(run):
            self._foreign.add(run.module)

    def _mask(self, call: AttentionCall) -> QueryMask:
        if call.query is None:  # its mask was made of its own weights, so no other layer shares it
            mask = self._new_mask(call)
        else:
            key = id(call.mask), call.causal, call.kind, call.B, call.T, call.S
            if key not in self._masks:
                if len(self._masks) == MASKS:
                    del self._masks[next(iter(self._masks))]
                # The tensor is kept, so that its id is not used again.
                self._masks[key] = call.mask, self._new_mask(call)
            mask = self._masks[key][1]
        if call.kind == "self":
            self._real = mask.real
            if self._real is None:
                self._real = torch.ones(call.B, call.T, dtype=torch.bool, device=call.value.device)
        return mask

    def _new_mask(self, call: AttentionCall) -> QueryMask:
        if call.kind == "self":
            return query_mask(call, padding_of(call, self._padding_masks))
        same_queries = self._real is not None and self._real.shape == (call.B, call.T)
        return query_mask(call, self._real if same_queries else None)


class Observation(HeadObservation):
    """Observes attention layers with their output projections.

    Args:
        roots, wanted, kind, real, text: As for :class:`HeadObservation`.
        on_layer: Receives each wanted layer right after its output projection has run, in order. In
            the residual space it receives the layer when the change of the residual stream is
            known. Layers are not kept. If it returns factors ``(B, H, S)``, the model continues
            with the output that the layer has if its values are multiplied by them.
        states: The hidden states that each execution has; None for none.
        space: The space in which layers are measured. Layers have an update only in the space
            ``"residual"``.
        stream: Whether layers have the residual stream. It needs the residual space. Layers may be
            handed over later, and ``on_layer`` must not return factors.

    Attributes:
        projections: For each layer so far, the ``nn.Linear`` that read the head outputs as they
            are; None if something else did.

    Raises:
        UnsupportedModelError: In the ``with`` block, if a layer cannot be measured.
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
        super().__init__(roots, self._begin, wanted, kind=kind, real=real, text=text, layers=True)
        self._on_layer = on_layer
        # The layer whose projection has not run yet, and what the last projection has read.
        self._pending: _Pending | None = None
        self.projections: list[nn.Module | None] = []
        self._projected: tuple[Execution, Tensor] | None = None
        self._states = states
        self._updates = ResidualUpdates(roots) if space == "residual" else None
        self._stream = stream

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            super().__exit__(kind, *details)
        finally:
            self._pending = self._projected = None

    def _start(self, stack: ExitStack) -> None:
        stack.enter_context(products_observed(self._flow, self._on_linear))
        if self._updates is not None:
            stack.enter_context(self._updates.watching())

    def _check_finished(self) -> None:
        if self._pending is not None:
            raise _no_projection(self._pending)
        if self._updates is not None:
            self._updates.check_arrived()
        super()._check_finished()

    def _on_call(self, call: AttentionCall) -> None:
        if call.module in self._names:
            if self._pending is not None:
                raise _no_projection(self._pending)
            self._projected = None
        super()._on_call(call)

    def _begin(self, execution: Execution, call: AttentionCall, mask: QueryMask) -> None:
        if self._states is not None:
            states = hidden_states(call, self._states, self._before)
            execution = replace(execution, states=states)
        flow = HeadFlow(call.returned, call.by_token)
        group = head_group(call.module, call.H, call.value.shape[3])
        given = None
        if self._stream:
            given = GivenStates.of(call, self._before)
            _check_stream(execution, given, group)
        self._pending = _Pending(execution, call, mask, flow, group, given)

    def _flow(self) -> HeadFlow | None:
        # Functions that run inside a nested observation belong to that one.
        return self._pending.flow if self._pending and is_listening(self._on_call) else None

    def _on_linear(self, product: LinearProduct) -> Tensor | None:
        if not is_listening(self._on_call):
            return None
        pending = self._pending
        if pending is not None:
            reading = pending.flow.reading(product.input)
            if reading is None:
                return None
            _check_whole(pending, product)
            if pending.container is None:
                return self._on_projection(pending, product, innermost(), reading, product.of)
            pending.parts.append(_Part(product, reading))
        elif self._projected is not None and reads(product.input, self._projected[1]):
            raise _two_projections(self._projected[0])
        return None

    def _on_enter(self, run: Run) -> None:
        super()._on_enter(run)
        pending = self._pending
        if pending is None or pending.container is not None or not is_listening(self._on_call):
            return
        given = list(run.tensors())
        # A plain linear layer is one product, which is observed anyway.
        if len(given) != 1 or type(run.module).forward is nn.Linear.forward:
            return
        reading = pending.flow.reading(given[0])
        if reading is None:
            return
        pending.container = run.module

        def on_leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if self._pending is not pending or not is_listening(self._on_call):
                return None  # another thread runs the module
            handle.remove()
            return self._on_leave(pending, module, reading, result)

        handle = run.module.register_forward_hook(on_leave)
        self._stack.callback(handle.remove)

    def _on_leave(
        self, pending: _Pending, container: nn.Module, reading: Reading, result: Any
    ) -> Any:
        """Take the result of the container as the projection, if it is linear as a whole."""
        parts, pending.container, pending.parts = pending.parts, None, []
        only = parts[0] if len(parts) == 1 else None
        if only and isinstance(result, tuple) and only.gave(result[0]):
            product = only.product
            changed = self._on_projection(pending, product, container, only.reading, product.of)
            return None if changed is None else (changed, *result[1:])
        if not isinstance(result, Tensor):
            return None
        run = container.forward
        if not (only and only.gave(result)):
            whole = LinearProduct(reading.input, None, None, result, run)
            with suspended(), torch.no_grad():
                # A module whose weights can be read is not quantised, so it does not round.
                linear = whole.read(1e-3 if parts else ROUNDING)
            if linear is not None:
                return self._on_projection(pending, linear, container, reading, run)
            if len(parts) > 1:
                raise _two_projections(pending.execution)
        if not parts:
            return None
        # The result is that of one product, and possibly of a norm before or after it.
        part = parts[0]
        return self._on_projection(pending, part.product, container, part.reading, run, reading)

    def _on_projection(
        self,
        pending: _Pending,
        product: LinearProduct,
        module: nn.Module | None,
        reading: Reading,
        run: Callable[[Tensor], Tensor],
        given: Reading | None = None,
    ) -> Tensor | None:
        """Hand the layer over, and return the result that replaces the model's own, or None.

        Args:
            pending: The layer.
            product: Its output projection.
            module: The module that computes the projection.
            reading: The input of the projection.
            run: Computes the result.
            given: The input of ``run``, if it is not that of the projection.
        """
        execution, call = pending.execution, pending.call
        if module is not None:
            execution = replace(execution, projection=self._names.get(module))
        plain = reading.factors is None and given is None
        plain = plain and is_plain_product(module, product, call.head_output)
        self.projections.append(module if plain else None)
        read = product.input.detach().reshape(call.head_output.shape)
        self._pending, self._projected = None, (execution, read)

        def hand_over(update: FrozenUpdate | None, residual: ResidualSum | None) -> Tensor | None:
            with suspended():
                # The model's own functions run under its autocast; measures are not cast.
                readable = product if product.weight is not None else product.read()
                with torch.autocast(call.value.device.type, enabled=False):
                    layer = self._layer(pending, readable, reading.factors)
                    if residual is not None:
                        residual = residual.to(call.dtype)
                    layer = replace(layer, update=update, residual=residual)
                    with torch._C.DisableTorchFunction():  # nothing in it is observed
                        factors = self._on_layer(execution, layer)
                if factors is None:
                    return None
                if self._updates is not None and pending.group is not None:
                    raise UnsupportedModelError(
                        f"The heads of layer {execution.name!r} are spread over processes, so a "
                        "pass that measures them in the residual space cannot change their values: "
                        "use scoring='clean' or space='attention'."
                    )
                if pending.group is not None:
                    factors = pending.group.part(factors)
                heads = call.scaled(factors)
                return replaced(run(pending.flow.again(heads, given or reading)))

        if self._updates is None:
            return hand_over(None, None)
        self._updates.follow(execution.name, product.result, hand_over, pending.given)
        return None

    def _layer(
        self, pending: _Pending, product: LinearProduct | None, gate: Tensor | None
    ) -> AttentionLayer:
        call, mask, name = pending.call, pending.mask, pending.execution.name
        o, w = projection(product, call.head_output, gate, call.dtype, name)
        self._check_output(o, mask, name)
        with torch._C.DisableTorchFunction():
            weights = self._find_weights(call, mask, name)
        layer = AttentionLayer(
            weights=weights,
            value=call.read(call.value),
            head_output=call.head_output.transpose(1, 2).to(call.dtype),
            output_weight=w,
            output=o,
            mask=mask,
            gate=None if gate is None else gate.transpose(1, 2).to(call.dtype),
        )
        return layer if pending.group is None else pending.group.whole(layer)

    def _check_output(self, output: Tensor, mask: QueryMask, name: str) -> None:
        broken = ~output.sum(-1).isfinite()
        if mask.real is not None:
            broken &= mask.real
        if broken.any():
            b, t = broken.nonzero()[0].tolist()
            raise ValueError(
                f"The output of attention layer {name!r} is NaN or infinite at example {b}, token "
                f"{t}: check the inputs and weights; in float16, load the model in bfloat16 or "
                "float32."
            )

    def _find_weights(self, call: AttentionCall, mask: QueryMask, name: str) -> Weights:
        return find_weights(call, mask, name)


def names_of(roots: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Return the names of all modules. A root is named by its class, and its number if needed."""
    names: dict[nn.Module, str] = {}
    for number, root in enumerate(roots):
        own = type(root).__name__ + (f"[{number}]" if len(roots) > 1 else "")
        for name, module in root.named_modules():
            names.setdefault(module, name or own)
    return names


def _no_projection(pending: _Pending) -> UnsupportedModelError:
    execution, flow = pending.execution, pending.flow
    # Without autograd, functions between the heads and the projection cannot be followed.
    blind = flow.recorded or torch.is_inference_mode_enabled()
    hint = "Run it under torch.no_grad()." if blind else "Such models are not supported yet."
    return UnsupportedModelError(
        f"No linear layer reads the head outputs of attention layer {execution.name!r} "
        f"({type(execution.module).__name__}), directly or after a gate or a norm, so its output "
        f"projection W_O is unknown. {hint}"
    )


def _two_projections(execution: Execution) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Two linear layers read the head outputs of layer {execution.name!r}, and no module "
        "combines their outputs, so it is unknown which one is the output projection."
    )


def _check_stream(execution: Execution, given: GivenStates | None, group: HeadGroup | None) -> None:
    """Check that the residual stream of a layer can be followed."""
    if given is not None and group is None:
        return
    why = "is given no hidden states (B, T, d)"
    if given is not None:
        why = "has its heads spread over processes"
    raise UnsupportedModelError(
        f"Attention layer {execution.name!r} ({type(execution.module).__name__}) {why}, so its "
        "residual stream is unknown: use another choice of layers, such as 'mean', or roll out "
        "AttentionWeights, which do not need it."
    )


def _check_whole(pending: _Pending, product: LinearProduct) -> None:
    """Check that unknown processes do not hold other heads of the layer."""
    declared, here = getattr(innermost(), "in_features", None), product.input.shape[-1]
    if isinstance(declared, int) and declared != here and pending.group is None:
        raise UnsupportedModelError(
            f"The output projection of layer {pending.execution.name!r} reads {here} of {declared} "
            "features: its heads are spread over processes (tensor parallel) in an unknown way. "
            "Load the model without tp_plan; device_map spreads whole layers."
        )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
