"""The runner: it runs a model once, and hands its attention layers over one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.capture.forward_call import ForwardCall, forward_call, run_on_copies
from captum_cw.capture.hidden_states import StateSpace
from captum_cw.capture.known_passes import (
    KnownObservation,
    KnownPass,
    Signature,
    UnknownPassError,
    by_device,
    recall,
    remember,
)
from captum_cw.capture.model import (
    evaluation_mode,
    model_of,
    two_tokens,
    uncompiled,
    unwrapped,
)
from captum_cw.capture.observation import (
    Execution,
    HeadObservation,
    Observation,
    UnsupportedModelError,
    names_of,
)
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer, Scope, Space

__all__ = [
    "Inputs",
    "Kinds",
    "Queries",
    "Runner",
    "expected_layers",
    "ignore_layer",
    "no_attention",
    "run_or_explain",
]

Result = TypeVar("Result")
Kinds = Literal["self", "cross", "all"]
Queries = tuple[Sequence[int], Tensor]
"""The queries that count in some example, and ``(B, T)``, True at those that count."""

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]


class _ShortenedError(Exception):
    """Raised if later layers have fewer queries, because only the last logits were requested.

    Gemma 4 does so.
    """


class Runner:
    """Runs a model and hands over the chosen attention layers, one at a time.

    Args:
        forward_func: The model, or a callable that runs it. A callable needs ``layer``.
        layer: An attention module, or a list of them (an ``nn.ModuleList`` counts as a list); None
            for every attention layer, in the order of execution.
        kind: Which attention layers to choose if ``layer`` is None: ``"self"``, ``"cross"`` or
            ``"all"``.
        needs_layers: Whether the layers matter. If not, a callable needs no ``layer``.

    Attributes:
        forward_func: The model without its wrappers, or the callable.
        model: The model; None if only a callable is known.
        layer: The argument ``layer``, with any sequence as a list.
        chosen: The chosen modules; None for all.
        roots: The observed modules: the model, or the chosen modules without a model.

    Raises:
        TypeError: If ``forward_func`` is not callable, or ``layer`` is not a module.
        ValueError: If ``layer`` is empty, is not given with a callable, or is not in the model.

    Example:
        >>> runner = Runner(model)
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> results, output = runner.observe(inputs, lambda execution, layer: (layer.H, layer.T))
        >>> [(execution.name, shape) for execution, shape in results]
        [('model.layers.0.self_attn', (4, 6)), ('model.layers.1.self_attn', (4, 6))]
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        *,
        kind: Kinds = "self",
        needs_layers: bool = True,
    ) -> None:
        self.forward_func = unwrapped(forward_func)
        self.model = model_of(self.forward_func)
        self.layer = list(layer) if isinstance(layer, (nn.ModuleList, list, tuple)) else layer
        chosen: Any = self.layer if isinstance(self.layer, list) else [self.layer]
        self.chosen: list[nn.Module] | None = None if layer is None else chosen
        if needs_layers:
            _check_layers(self.chosen, self.model)
        self.kind: Kinds = kind
        self.roots: list[nn.Module] = self.chosen or [] if self.model is None else [self.model]
        self._names: list[str] | None = None
        self._needs_all_logits = False  # without them, the model leaves queries out

    @property
    def names(self) -> list[str]:
        """The names of the chosen layers in the order of execution.

        They are known after the first pass. Before it, a pass over two tokens finds them.

        Raises:
            RuntimeError: If no pass has been run and the model does not read text.
        """
        if self._names is None:
            inputs = None if self.model is None else two_tokens(self.model)
            if inputs is None:
                raise RuntimeError(
                    "The layers are found by running the model: call attribute once, then read "
                    ".layers."
                )
            self.observe(inputs, ignore_layer)
        assert self._names is not None
        return self._names

    def remember_names(self, executions: Sequence[Execution]) -> None:
        """Keep the names of the layers that were handed over."""
        self._names = [execution.name for execution in executions]

    def observe(
        self,
        inputs: Inputs,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        additional_forward_args: object = None,
        *,
        space: Space = "attention",
        states: StateSpace | None = None,
        stream: bool = False,
        one_text: bool = False,
        text_only: bool = False,
        normaliser: Scope | None = None,
        queries: Callable[[AttentionLayer], Queries | None] | None = None,
        repeatable: bool = False,
        show_progress: bool = False,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Run the model once and apply ``on_layer`` to each chosen layer, in order.

        If the first pass shows that the model leaves queries out, a second pass applies
        ``on_layer`` to all layers again. Later calls need one pass.

        Args:
            inputs: The inputs, as for :meth:`captum_cw.ContributionWeights.attribute`.
            on_layer: The function that receives each execution and its layer. The layer is released
                afterwards.
            additional_forward_args: More positional arguments, as in Captum.
            space: Where projections and norms are measured.
            states: The hidden states that executions carry; None for none.
            stream: Whether layers carry the residual stream. They are then in its space.
            one_text: Whether to refuse cross-attention layers from the first to the last layer.
            text_only: Whether to skip the layers of a vision tower if no layers were chosen.
            normaliser: The scope of the outputs that a measure divides by. A warning counts those
                that vanish. None if the measure does not divide.
            queries: Returns the queries of a layer that count, so that ``on_layer`` receives a
                layer with these only. None for all.
            repeatable: Whether results do not depend on earlier calls of ``on_layer``. Then a pass
                like an earlier one is observed with fewer checks, and again in full if it differs.
            show_progress: Whether to show a progress bar over the layers, after two seconds.

        Returns:
            The result for each execution, and the output of the model.

        Raises:
            UnsupportedModelError: If the model's attention layers cannot be observed.
            TypeError, ValueError: If the inputs are wrong, see
                :meth:`captum_cw.ContributionWeights.attribute`.
        """
        forward = self.forward_func
        called = forward.forward if isinstance(forward, nn.Module) else forward
        call = forward_call(self.model, called, inputs, additional_forward_args)
        if call.last_only and self._needs_all_logits:
            call = call.with_all_logits()
        run = partial(
            self._pass,
            on_layer=on_layer,
            space="residual" if stream else space,
            states=states,
            stream=stream,
            one_text=one_text,
            text=call.text if text_only and self.chosen is None else None,
            normaliser=None if stream else normaliser,
            queries=queries,
            repeatable=repeatable,
            show_progress=show_progress,
        )
        try:
            results, output, vanishing = run(call)
        except UnsupportedModelError as error:
            if call.text is None or self.chosen is not None or text_only:
                raise
            raise UnsupportedModelError(
                f"{error} If the layer does not read the text, give the layers that do, such as "
                "layer=[m.self_attn for m in model.get_decoder().layers]."
            ) from error
        except _ShortenedError:
            self._needs_all_logits = True
            results, output, vanishing = run(call.with_all_logits())
        if vanishing:
            warnings.warn(
                f"{vanishing} attention outputs vanish: their rows are returned as zeros.",
                stacklevel=4,
            )
        self.remember_names([execution for execution, _ in results])
        return results, output

    def _pass(
        self,
        call: ForwardCall,
        *,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        space: Space,
        states: StateSpace | None,
        stream: bool,
        text: TextLayers | None,
        repeatable: bool,
        **options: Any,
    ) -> tuple[list[tuple[Execution, Result]], Any, int]:
        """Return the results of the layers, the model's output, and the number of vanishing rows.

        Raises:
            _ShortenedError: If later layers have fewer queries, because of ``call.last_only``.
        """
        asked: dict[str, Any] = {
            "wanted": self.chosen,
            "kind": self.kind if self.chosen is None else "all",
            "real": call.token_masks,
        }
        full = partial(
            Observation, self.roots, states=states, space=space, stream=stream, text=text, **asked
        )

        def run(
            observe: Callable[..., Observation],
        ) -> tuple[list[tuple[Execution, Result]], Any, int, Observation]:
            return self._run(call, observe, on_layer=on_layer, space=space, **options)

        signature, model = None, self.model
        if repeatable and model is not None and space == "attention" and states is None:
            signature = Signature.of(model, self.forward_func, call, self.chosen, asked["kind"])
        if signature is None or model is None:
            return run(full)[:-1]
        known = recall(model, signature)
        if known is not None:
            with suppress(UnknownPassError):
                return run(partial(KnownObservation, known, model, **asked))[:-1]
        results, output, vanishing, observation = run(full)
        found = KnownPass.of(observation, [execution for execution, _ in results])
        remember(model, signature, found, failed=known is not None)
        return results, output, vanishing

    def _run(
        self,
        call: ForwardCall,
        observe: Callable[..., Observation],
        *,
        space: Space,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        one_text: bool,
        normaliser: Scope | None,
        queries: Callable[[AttentionLayer], Queries | None] | None,
        show_progress: bool,
    ) -> tuple[list[tuple[Execution, Result]], Any, int, Observation]:
        """Run the model in an observation, which ``observe`` makes from ``on_layer``."""
        results: list[tuple[Execution, Result]] = []
        vanishing: list[Tensor] = []
        longest = 0
        expected = None if self.chosen is None else len(self.chosen)

        with progress_bar(expected, "layers", show=show_progress) as bar:

            def collect(execution: Execution, layer: AttentionLayer) -> None:
                nonlocal longest
                if one_text:
                    _refuse_cross_attention([execution])
                longest = max(longest, layer.T)
                if call.last_only and longest > layer.T:
                    raise _ShortenedError
                layer = layer.seen_in(space)
                if show_progress and bar.total is None:
                    bar.total = expected_layers(self.roots, [execution])
                chosen = None if queries is None else queries(layer)
                if chosen is not None:
                    layer = layer.at(*chosen)
                result = on_layer(execution, layer)
                results.append((replace(execution, states=None), result))
                if normaliser is not None:
                    vanishing.append(layer.vanishing(normaliser))
                bar.update()

            observation = observe(on_layer=collect)
            with (
                torch.no_grad(),
                evaluation_mode(self.roots, self.model),
                observation,
                uncompiled(),
            ):
                run = partial(run_on_copies, self.forward_func, call.kwargs, call.args)
                output = run_or_explain(run, call, observation)
        self.check_executions(observation.executions)
        if one_text:
            executions, chosen = observation.executions, self.chosen
            places = [n for n, e in enumerate(executions) if not chosen or e.module in chosen]
            _refuse_cross_attention(executions[places[0] : places[-1] + 1])
        return results, output, sum(int(found.sum()) for found in by_device(vanishing)), observation

    def check_executions(self, executions: list[Execution]) -> None:
        """Check that the chosen layers have run."""
        if self.chosen is None:
            if not executions:
                raise no_attention(self.roots)
            if self.kind != "all" and all(e.kind != self.kind for e in executions):
                raise ValueError(
                    f"kind={self.kind!r}, but all {len(executions)} attention layers that ran are "
                    f"of the kind {executions[0].kind!r}: use this kind, or 'all'."
                )
        ran = {execution.module: execution.name for execution in executions}
        missing = [module for module in self.chosen or () if module not in ran]
        if missing:
            names = list(ran.values())
            more = f", ... ({len(names)} in all)" if len(names) > 4 else ""
            raise ValueError(
                f"Layer {names_of(self.roots)[missing[0]]!r} ({type(missing[0]).__name__}) is not "
                "an attention module: it made no attention call. Attention modules: "
                f"{', '.join(names[:4]) + more or 'none were seen'}."
            )


def run_or_explain(
    run: Callable[[], Result], call: ForwardCall, observation: HeadObservation
) -> Result:
    """Run a model, and explain its errors by the inputs of the call if these are the reason."""
    try:
        return run()
    except Exception as error:
        explanation = call.explain(error, {e.kind for e in observation.executions})
        if explanation is None:
            raise
        raise ValueError(explanation) from error


def _check_layers(layers: list[Any] | None, model: nn.Module | None) -> None:
    if layers is None:
        if model is None:
            raise ValueError("layer is None, but forward_func is not a module: name the layers.")
        return
    if not layers:
        raise ValueError("layer is an empty list: give attention modules, or None for all.")
    known = None if model is None else set(model.modules())
    for module in layers:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"layer={module!r} is not a module: give an attention module, such as "
                "model.get_submodule('model.layers.0.self_attn'), a list of them, or None."
            )
        if known is not None and module not in known:
            raise ValueError(f"layer {type(module).__name__} is not part of the model.")


def ignore_layer(execution: Execution, layer: AttentionLayer) -> None:
    """Do nothing with a layer, in passes that only find the layers."""


def no_attention(roots: Sequence[nn.Module]) -> UnsupportedModelError:
    """Return the error for a pass in which no attention call was observed."""
    kinds = ", ".join(type(root).__name__ for root in roots)
    return UnsupportedModelError(
        f"No attention was found in {kinds}: captum_cw sees attention that uses the attention "
        "registry of transformers, torch.nn.functional.scaled_dot_product_attention, or a softmax "
        "over keys and a product with values, each (B, H, T, S). For other models, see "
        "captum_cw.capture.register_adapter."
    )


def _refuse_cross_attention(executions: list[Execution]) -> None:
    for execution in executions:
        if execution.kind == "cross":
            raise UnsupportedModelError(
                f"Layer {execution.name!r} ({type(execution.module).__name__}) is cross-attention, "
                "which reads a second sequence. Influence can only be followed through layers that "
                "read one sequence: name them with layer=..., such as those of the encoder, or "
                "aggregate the layers in another way, such as layers='mean'."
            )


def expected_layers(roots: list[nn.Module], seen: list[Execution]) -> int:
    """Return the minimum number of layers that a pass will have, from the layers seen so far."""
    kinds = {type(execution.module) for execution in seen}
    return max(len(seen), sum(type(m) in kinds for root in roots for m in root.modules()))
