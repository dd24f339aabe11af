"""The runner: it runs a model once, and hands its attention layers over one at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.capture.forward_call import ForwardCall, forward_call, two_tokens
from captum_cw.capture.hidden_states import StateSpace
from captum_cw.capture.model import evaluation_mode, model_of, uncompiled, unwrapped
from captum_cw.capture.observation import (
    Execution,
    Observation,
    UnsupportedModelError,
    names_of,
)
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer, Scope, Space

__all__ = [
    "Inputs",
    "Kinds",
    "Runner",
    "expected_layers",
    "ignore_layer",
    "layer_argument",
    "no_attention",
]

Result = TypeVar("Result")
Kinds = Literal["self", "cross", "all"]
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class _Asked:
    """What is asked for beside the layers; see :meth:`Runner.observe`."""

    space: Space
    states: StateSpace | None
    stream: bool
    one_text: bool
    text: TextLayers | None
    normaliser: Scope | None
    description: str
    show_progress: bool


class _ShortenedError(Exception):
    """The model computes fewer queries since it was asked for the last logits alone (Gemma 4)."""


class Runner:
    """Runs a model and hands over the attention layers that were chosen.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them (an ``nn.ModuleList`` counts as a list), or None
            for every attention layer in execution order.
        kind: Which attention layers count where ``layer`` is None: ``"self"``, ``"cross"`` or
            ``"all"``.

    Attributes:
        forward_func: What is called: the model without its wrappers.
        model: The model; None where only a callable is known.
        layer: As given, a sequence as a list.
        chosen: The modules that were chosen; None for all.
        roots: The modules that are observed: the model, or else the chosen modules.

    Raises:
        TypeError: If ``forward_func`` cannot be called, or ``layer`` is not a module.
        ValueError: If ``layer`` is empty, is missing beside a callable, or is not in the model.

    Example:
        >>> runner = Runner(model)
        >>> results, output = runner.observe(input_ids, lambda execution, layer: layer.H)
        >>> [(execution.name, heads) for execution, heads in results]
        [('model.layers.0.self_attn', 4), ('model.layers.1.self_attn', 4)]
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        *,
        kind: Kinds = "self",
    ) -> None:
        self.forward_func = unwrapped(forward_func)
        self.model = model_of(self.forward_func)
        self.layer = list(layer) if isinstance(layer, (nn.ModuleList, list, tuple)) else layer
        _check_layers(self.layer, self.model)
        self.kind: Kinds = kind
        self.chosen: list[nn.Module] | None = None
        if self.layer is not None:
            self.chosen = [self.layer] if isinstance(self.layer, nn.Module) else list(self.layer)
        self.roots: list[nn.Module] = self.chosen or [] if self.model is None else [self.model]
        self._names: list[str] | None = None
        self._all_logits = False  # whether the model leaves queries out that have no logits

    @property
    def names(self) -> list[str]:
        """Names of the chosen layers in execution order.

        They are known after the first pass; before that, a pass over two tokens finds them.
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
        description: str = "layers",
        show_progress: bool = False,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Runs the model once and applies ``on_layer`` to each chosen layer, in order.

        Where the first pass shows that the model leaves queries out, ``on_layer`` is applied anew,
        once and for all.

        Args:
            inputs: As :meth:`captum_cw.ContributionWeights.attribute` takes them.
            on_layer: Takes each layer; the layer is forgotten afterwards.
            additional_forward_args: Further positional arguments, as in Captum.
            space: Where projections and norms are measured.
            states: Executions bring the hidden states of their tokens, taken there.
            stream: Layers bring the residual stream, and are seen in its space.
            one_text: There must be no cross-attention from the first layer to the last.
            text_only: Where no layers are chosen, those of a vision tower are left out.
            normaliser: Warns of outputs that vanish, as a measure divides by them.
            description: Of the progress bar.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            One result for each execution, and what the model returned.
        """
        forward = self.forward_func
        called = forward.forward if isinstance(forward, nn.Module) else forward
        call = forward_call(self.model, called, inputs, additional_forward_args)
        if call.last_only and self._all_logits:
            call = call.with_all_logits()
        asked = _Asked(
            space="residual" if stream else space,
            states=states,
            stream=stream,
            one_text=one_text,
            text=call.text if text_only and self.chosen is None else None,
            normaliser=None if stream else normaliser,
            description=description,
            show_progress=show_progress,
        )
        try:
            results, output, vanishing = self._pass(call, on_layer, asked)
        except UnsupportedModelError as error:
            hint = self._layers_of_text(call, asked)
            if hint is None:
                raise
            raise UnsupportedModelError(
                f"{error} To leave out what does not read the text, give {hint}."
            ) from error
        except _ShortenedError:
            self._all_logits = True
            results, output, vanishing = self._pass(call.with_all_logits(), on_layer, asked)
        if vanishing:
            warnings.warn(
                f"{vanishing} attention outputs vanish: their rows are returned as zeros.",
                stacklevel=4,
            )
        self._names = [execution.name for execution, _ in results]
        return results, output

    def _pass(
        self,
        call: ForwardCall,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        asked: _Asked,
    ) -> tuple[list[tuple[Execution, Result]], Any, int]:
        """The results of the layers, the output of the model, and how many rows vanish.

        Raises:
            _ShortenedError: If later layers leave queries out, since we asked for no more logits.
        """
        results: list[tuple[Execution, Result]] = []
        vanishing = longest = 0
        expected = None if self.chosen is None else len(self.chosen)

        with progress_bar(expected, asked.description, show=asked.show_progress) as bar:

            def collect(execution: Execution, layer: AttentionLayer) -> None:
                nonlocal vanishing, longest
                if asked.one_text:
                    _check_own_text(execution)
                longest = max(longest, layer.T)
                if call.last_only and longest > layer.T:
                    raise _ShortenedError
                layer = layer.seen_in(asked.space)
                if bar.total is None:
                    bar.total = expected_layers(self.roots, [execution])
                result = on_layer(execution, layer)
                results.append((replace(execution, states=None), result))
                if asked.normaliser is not None:
                    vanishing += layer.vanishing(asked.normaliser)
                bar.update()

            observation = Observation(
                self.roots,
                collect,
                self.chosen,
                kind=self.kind if self.chosen is None else "all",
                real=call.real,
                states=asked.states,
                space=asked.space,
                stream=asked.stream,
                text=asked.text,
            )
            with (
                torch.no_grad(),
                evaluation_mode(self.roots, self.model),
                observation,
                uncompiled(),
            ):
                try:
                    output = call.run(self.forward_func)
                except Exception as error:
                    ran = {execution.kind for execution in observation.executions}
                    explained = call.explained(error, ran)
                    if explained is None:
                        raise
                    raise explained from error
        self._check_executions(observation.executions)
        if asked.one_text:
            _check_one_text(observation.executions, self.chosen)
        return results, output, vanishing

    def _layers_of_text(self, call: ForwardCall, asked: _Asked) -> str | None:
        """How the layers that read the text are chosen; None where that helps nothing."""
        if self.chosen is not None or call.text is None or asked.text is not None:
            return None
        asked = replace(asked, text=call.text, show_progress=False)
        try:
            results, _, _ = self._pass(call.with_all_logits(), ignore_layer, asked)
        except (UnsupportedModelError, ValueError):  # nor can they be seen
            return None
        return layer_argument([execution.name for execution, _ in results], self.roots[0])

    def _check_executions(self, executions: list[Execution]) -> None:
        """Raises an error where what was chosen did not run."""
        if self.chosen is None:
            if not executions:
                raise no_attention(self.roots)
            if self.kind != "all" and all(e.kind != self.kind for e in executions):
                raise ValueError(
                    f"kind={self.kind!r}, but all {len(executions)} attention layers that ran are "
                    f"of the kind {executions[0].kind!r}: choose that, or 'all'."
                )
        ran = {execution.module for execution in executions}
        missing = [module for module in self.chosen or () if module not in ran]
        if missing:
            names = names_of(self.roots)
            found = list(dict.fromkeys(execution.name for execution in executions))
            more = f", ... ({len(found)} in all)" if len(found) > 4 else ""
            raise ValueError(
                f"Layer {names[missing[0]]!r} ({type(missing[0]).__name__}) is no attention "
                "module: it made no attention call. Attention modules: "
                f"{', '.join(found[:4]) + more or 'none were seen'}."
            )


def _check_layers(layer: object, model: nn.Module | None) -> None:
    if layer is None:
        if model is None:
            raise ValueError("layer is None, but forward_func is no module: name the layers.")
        return
    layers = layer if isinstance(layer, list) else [layer]
    if not layers:
        raise ValueError("layer is an empty list: give attention modules, or None for all.")
    known = None if model is None else set(model.modules())
    for module in layers:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"layer={module!r} is no module: give an attention module, such as "
                "model.get_submodule('model.layers.0.self_attn'), a list of them, or None."
            )
        if known is not None and module not in known:
            raise ValueError(f"layer {type(module).__name__} is no part of the model.")


def layer_argument(names: Sequence[str], model: nn.Module) -> str:
    """The argument ``layer=`` that chooses modules of a model, as users would write it.

    Example:
        >>> layer_argument(["model.layers.0.self_attn", "model.layers.1.self_attn"], model)
        'layer=[m.self_attn for m in model.model.layers]'
    """
    names = list(dict.fromkeys(names))
    parts = [re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name) for name in names]
    places = {(part[1], part[3]) for part in parts if part is not None}
    if all(parts) and len(places) == 1:
        around, inside = places.pop()
        if len(names) == len(list(model.get_submodule(around).children())):
            return f"layer=[m.{inside} for m in model.{around}]"
    return f"layer=[model.get_submodule(name) for name in {names}]"


def ignore_layer(execution: Execution, layer: AttentionLayer) -> None:
    """Does nothing with a layer: for passes that are run to find the layers."""


def no_attention(roots: Sequence[nn.Module]) -> UnsupportedModelError:
    """What to raise where a pass made no attention call that can be seen."""
    kinds = ", ".join(type(root).__name__ for root in roots)
    return UnsupportedModelError(
        f"No attention was found in {kinds}: it is seen where a model uses the attention registry "
        "of transformers, torch.nn.functional.scaled_dot_product_attention, or a softmax over keys "
        "and a product with values, each (B, H, T, S). For others, see "
        "captum_cw.capture.register_adapter."
    )


def _check_one_text(executions: list[Execution], chosen: list[nn.Module] | None) -> None:
    """Raises an UnsupportedModelError if what is chosen is of more than one text."""
    places = [n for n, e in enumerate(executions) if chosen is None or e.module in chosen]
    for execution in executions[places[0] : places[-1] + 1]:
        _check_own_text(execution)


def _check_own_text(execution: Execution) -> None:
    if execution.kind == "cross":
        raise UnsupportedModelError(
            f"Layer {execution.name!r} ({type(execution.module).__name__}) is cross-attention, "
            "between two texts, and influence can only be followed through layers over one: "
            "choose those of the encoder (layer=...), or another choice of layers, such as 'mean'."
        )


def expected_layers(roots: list[nn.Module], seen: list[Execution]) -> int:
    """At least how many layers a pass will have, before it has ended."""
    kinds = {type(execution.module) for execution in seen}
    return max(len(seen), sum(type(m) in kinds for root in roots for m in root.modules()))
