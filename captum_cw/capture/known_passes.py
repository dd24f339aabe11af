"""Passes that repeat an earlier one, and so need less observation.

The first pass of a model over inputs of some shapes is observed in full. Most models turn out to be
simple: all their attention runs in kernels of transformers' registry, and one ``nn.Linear`` of each
layer reads the head outputs as they are. A :class:`KnownObservation` of the same model and shapes
watches these kernels and linear layers only, without a function mode. It keeps the outcome of each
check as a tensor, and reads all of them once, after the pass. If anything is not as before, the
pass is observed again in full, which finds what has changed or raises the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import AttentionCall, CheckedWeights, Kind, known_weights
from captum_cw.capture.forward_call import ForwardCall
from captum_cw.capture.hf_registry import registered_kernels
from captum_cw.capture.listeners import is_listening, listening
from captum_cw.capture.module_stack import tracking
from captum_cw.capture.observation import Execution, Observation, names_of
from captum_cw.capture.output_projection import LinearProduct, Reading, is_unchanged
from captum_cw.functional import AttentionLayer
from captum_cw.weights import QueryMask, Weights

__all__ = [
    "KnownObservation",
    "KnownPass",
    "Signature",
    "UnknownPassError",
    "by_device",
    "recall",
    "remember",
]

#: The number of shapes of inputs that are remembered for a model.
REMEMBERED = 256

#: After this number of passes that differ from the known one, passes are observed in full at once.
FAILURES = 8

#: The hooks that may change what a module reads or returns.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class UnknownPassError(Exception):
    """A pass is not like the known one, so it must be observed in full."""


@dataclass(frozen=True)
class Signature:
    """What must be equal in two passes, so that the second one repeats the first.

    Args:
        code: For each module, its name, its class and the function that it runs.
        inputs: The names of the arguments, with the shapes of tensors and the values of others.
        asked: The function of the model that runs, and the layers that are observed.
    """

    code: tuple[object, ...]
    inputs: tuple[object, ...]
    asked: tuple[object, ...]

    @classmethod
    def of(
        cls,
        root: nn.Module,
        forward: Callable[..., Any],
        call: ForwardCall,
        chosen: list[nn.Module] | None,
        kind: str,
    ) -> Signature | None:
        """Return the signature of a pass; None if such passes cannot be known.

        Args:
            root: The model.
            forward: The model, or a method of it.
            call: The arguments of the pass.
            chosen: The chosen layers; None for all.
            kind: The kind of the chosen layers.
        """
        names = names_of([root])
        if call.text is not None or any("forward" in vars(module) for module in names):
            return None
        inputs = tuple(
            (name, *_described(x)) for name, x in (*enumerate(call.args), *call.kwargs.items())
        )
        if any(len(described) == 1 for described in inputs):
            return None
        code = tuple((name, type(m), type(m).forward) for m, name in names.items())
        wanted = None if chosen is None else tuple(names.get(module) for module in chosen)
        function = getattr(forward, "__func__", type(forward))
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        mode = *autocast, torch.is_inference_mode_enabled()
        return cls(code, inputs, (function, wanted, kind, *mode))


def _described(x: object) -> tuple[object, ...]:
    """Return the shape of a tensor or the value of a plain argument; nothing for other objects."""
    if type(x) is Tensor:
        return (x.shape, x.dtype, x.device)
    return (type(x), x) if x is None or isinstance(x, (bool, int, float, str)) else ()


@dataclass(frozen=True)
class KnownPass:
    """What the full observation of a pass has found.

    Args:
        calls: The attention calls in order: the name of the module, and the kind of attention.
        projections: For each module that was handed over, the name of the linear layer that reads
            its head outputs.
    """

    calls: tuple[tuple[str, Kind], ...]
    projections: dict[str, str]

    @classmethod
    def of(cls, observation: Observation, handed_over: list[Execution]) -> KnownPass | None:
        """Return what a finished observation has found; None if the model is not a simple one."""
        names = [execution.projection for execution in handed_over]
        simple = observation.all_registered and not observation.missed_some
        if not simple or None in observation.projections or None in names:
            return None
        projections: dict[str, str] = {}
        for execution in handed_over:
            assert execution.projection is not None
            if projections.setdefault(execution.name, execution.projection) != execution.projection:
                return None
        return cls(tuple((e.name, e.kind) for e in observation.executions), projections)


@dataclass
class _Memory:
    """What is kept of passes with one signature, and how many of them were not as known."""

    signature: Signature
    known: KnownPass | None
    failures: int = 0


#: The known passes of a model, by their inputs and what was asked.
_memory: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], _Memory]] = WeakKeyDictionary()


def recall(root: nn.Module, signature: Signature) -> KnownPass | None:
    """Return what is known of a pass with this signature; None if it must be observed in full."""
    memory = _memory.get(root, {}).get((signature.inputs, signature.asked))
    if memory is None or memory.signature != signature or memory.failures > FAILURES:
        return None
    known = memory.known
    if known is None or any(_global_hooks()):
        return None
    for name in set(known.projections.values()):
        # A hook may change what the linear layer reads or returns.
        if any(vars(root.get_submodule(name))[hooks] for hooks in _HOOKS):
            return None
    return known


def by_device(numbers: list[Tensor]) -> list[Tensor]:
    """Stack numbers that are on the same device, so that they can be read at once."""
    found: dict[torch.device, list[Tensor]] = {}
    for x in numbers:
        found.setdefault(x.device, []).append(x)
    return [torch.stack(on_device) for on_device in found.values()]


def _global_hooks() -> list[Any]:
    return [getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]


def remember(
    root: nn.Module, signature: Signature, known: KnownPass | None, *, failed: bool
) -> None:
    """Keep what the full observation of a pass has found.

    Args:
        root: The model.
        signature: The signature of the pass.
        known: What was found; None if such passes cannot be known.
        failed: Whether the pass differed from the one that was known before.
    """
    passes = _memory.setdefault(root, {})
    key = signature.inputs, signature.asked
    before = passes.get(key)
    failures = (0 if before is None else before.failures) + failed
    if len(passes) >= REMEMBERED:
        passes.clear()
    passes[key] = _Memory(signature, known, failures)


class KnownObservation(Observation):
    """Observes a pass that repeats a known one.

    Args:
        known: What is known of the pass.
        root: The model.
        on_layer, wanted, kind, real: As for :class:`Observation`. ``on_layer`` must not return
            factors. It may receive layers before it is known whether the pass is as expected.

    Raises:
        UnknownPassError: In the ``with`` block or at its end, if the pass differs from the known
            one. Then the results must not be used.
    """

    def __init__(
        self,
        known: KnownPass,
        root: nn.Module,
        on_layer: Callable[[Execution, AttentionLayer], Tensor | None],
        wanted: list[nn.Module] | None,
        **options: Any,
    ) -> None:
        super().__init__([root], self._check_layer, wanted, **options)
        self._receive = on_layer
        modules = {name: module for module, name in self._names.items()}
        self._known = known
        self._projection_of = {
            modules[name]: modules[projection] for name, projection in known.projections.items()
        }
        self._attending = {modules[name] for name, _ in known.calls}
        self._version = 0
        # The weights of the current layer; the failed checks, and the sums of outputs, of all.
        self._weights: CheckedWeights | None = None
        self._failures: list[Tensor] = []
        self._sums: list[Tensor] = []

    @contextmanager
    def _calls(self) -> Iterator[Callable[[], list[nn.Module]]]:
        with tracking(self._attending), registered_kernels(self._names), listening(self._on_call):
            yield list

    def _start(self, stack: ExitStack) -> None:
        for module in set(self._projection_of.values()):
            stack.callback(module.register_forward_hook(self._on_product).remove)

    def _check_finished(self) -> None:
        if self._pending is not None or len(self.executions) != len(self._known.calls):
            raise UnknownPassError
        failed = any(found.any() for found in by_device(self._failures))
        if failed or not all(found.isfinite().all() for found in by_device(self._sums)):
            raise UnknownPassError

    def _on_call(self, call: AttentionCall) -> None:
        if self._pending is not None:
            raise UnknownPassError
        self._version = -1 if call.returned.is_inference() else call.returned._version
        super()._on_call(call)
        place = len(self.executions) - 1
        now = [(execution.name, execution.kind) for execution in self.executions[place:]]
        if tuple(now) != self._known.calls[place : place + 1] or not call.registered:
            raise UnknownPassError

    def _on_product(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        pending = self._pending
        if pending is None or not is_listening(self._on_call):
            return  # another thread runs the module
        if module is not self._projection_of.get(pending.call.module):
            return
        x = args[0] if args else None
        y = pending.call.head_output
        if not isinstance(x, Tensor) or not is_unchanged(x, y, self._version):
            raise UnknownPassError
        assert isinstance(module, nn.Linear)
        weight = module.weight.detach().T
        if type(weight) is not Tensor:  # for example, it was quantised since
            raise UnknownPassError
        product = LinearProduct(x, weight, module.bias, result, module.forward)
        self._on_projection(pending, product, module, Reading(x, None), module.forward)

    def _check_output(self, output: Tensor, mask: QueryMask, name: str) -> None:
        sums = output.sum(-1)
        self._sums.append((sums if mask.real is None else sums.masked_fill(~mask.real, 0)).sum())

    def _find_weights(self, call: AttentionCall, mask: QueryMask, name: str) -> Weights:
        self._weights = known_weights(call, mask)
        if self._weights is None:
            raise UnknownPassError
        return self._weights

    def _check_layer(self, execution: Execution, layer: AttentionLayer) -> Tensor | None:
        factors = self._receive(execution, layer)
        assert self._weights is not None
        self._failures.append(self._weights.are_wrong())
        self._weights = None
        return factors
