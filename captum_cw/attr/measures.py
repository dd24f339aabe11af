"""The measures as Captum layer attributions.

Each class says what it computes from a layer; :class:`AttentionAttribution` runs the model,
observes the layers and gives results in Captum's form.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from captum_cw import functional, rollout
from captum_cw._utils.memory import free_bytes
from captum_cw._utils.progress import progress_bar
from captum_cw.attr._captum import LayerAttribution, logged
from captum_cw.capture import (
    Execution,
    Observation,
    StateSpace,
    UnsupportedModelError,
    evaluating,
    names_of,
)
from captum_cw.capture.forward_call import ForwardCall, forward_call, two_tokens
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import (
    Aggregation,
    AttentionLayer,
    Decomposition,
    Measure,
    Scope,
    Space,
)

__all__ = [
    "ALTIWeights",
    "AttentionAttribution",
    "AttentionWeights",
    "ContributionWeights",
    "VWAttention",
    "VWONAttention",
]

Result = TypeVar("Result")
Kind = Literal["self", "cross", "all"]
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class _Watched:
    """What is asked for beside the layers; see :meth:`AttentionAttribution.observe`."""

    states: StateSpace | None
    stream: bool
    one_text: bool
    text: TextLayers | None


class _ShortenedError(Exception):
    """A model that is asked for the last logits alone leaves queries out (Gemma 4)."""


class AttentionAttribution(LayerAttribution):  # type: ignore[misc]  # captum has no types for it
    """What the measures have in common.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them (an ``nn.ModuleList`` counts as one), or None
            for every attention layer in the order in which they run.
        device_ids: As in Captum; not needed where ``forward_func`` is the model.
        kind: Which attention layers, where ``layer`` does not say: those whose tokens attend to
            each other (``"self"``), those of a decoder that attend to the states of an encoder
            (``"cross"``: ``S`` is the encoder's length), or ``"all"``.
    """

    name: str
    """What users call the measure, on the command line too."""
    measure: Measure
    """What is computed from each layer."""
    normaliser: Scope | None = None
    """The output that the measure divides by, if any."""
    space: Space = "attention"
    """Where its projections and norms are measured."""
    needs_stream = False
    """Whether it looks at the residual stream that attention adds to."""
    mixes_stream = True
    """Whether :meth:`mixing` does."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        kind: Kind = "self",
    ) -> None:
        functional.check_choice("kind", kind, Kind)
        self.kind: Kind = kind
        forward_func = unwrapped(forward_func)
        self.model = _model_of(forward_func)
        if isinstance(layer, (nn.ModuleList, list, tuple)):
            layer = list(layer)
        _check_layers(layer, self.model)
        super().__init__(forward_func, layer, device_ids)
        self._chosen: list[nn.Module] | None = None
        if layer is not None:
            self._chosen = [layer] if isinstance(layer, nn.Module) else list(layer)
        self._roots: list[nn.Module] = self._chosen or [] if self.model is None else [self.model]
        self._layers: list[str] | None = None
        self._all_logits = False  # whether the model leaves queries out that have no logits

    @classmethod
    def get_name(cls) -> str:
        """The class's name; Captum would put a space before each capital."""
        return cls.__name__

    @property
    def layers(self) -> list[str]:
        """Names of the attention layers that are attributed, in execution order.

        Known after the first ``attribute``; before that, a pass over two tokens finds them.
        """
        if self._layers is None:
            inputs = None if self.model is None else two_tokens(self.model)
            if inputs is None:
                raise RuntimeError(
                    "The layers are found by running the model: call attribute once, then read "
                    ".layers."
                )
            self.observe(inputs, None, _ignore)
        assert self._layers is not None
        return self._layers

    def mixing(self, heads: Aggregation | None) -> Measure:
        """How a layer mixes tokens by this measure, for what goes through all layers.

        Args:
            heads: How they are aggregated; ``"mean"`` is each measure's own way.

        Returns:
            A measure whose rows sum to one (see :mod:`captum_cw.rollout`).

        Raises:
            ValueError: If heads cannot be aggregated so, or the measure has no such map.
        """
        raise ValueError(
            f"{self.get_name()} does not say how a layer mixes tokens: use layers='mean', or "
            "another measure."
        )

    def observe(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        *,
        states: StateSpace | None = None,
        stream: bool = False,
        one_text: bool = False,
        text_only: bool = False,
        show_progress: bool = False,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Runs the model once and applies ``on_layer`` to each chosen layer, in order.

        With ``states``, executions bring the hidden states of their tokens; with ``stream``, layers
        bring the residual stream, and are seen in its space; with ``one_text``, there must be no
        cross-attention from the first of them to the last. With ``text_only``, the layers are those
        that read the text, where none are chosen: not those of a vision tower. Where the first pass
        shows that the model leaves queries out, ``on_layer`` is applied anew, once and for all.

        Returns:
            One result for each execution, and what the model returned.
        """
        forward = self.forward_func
        called = forward.forward if isinstance(forward, nn.Module) else forward
        call = forward_call(self.model, called, inputs, additional_forward_args)
        if call.last_only and self._all_logits:
            call = call.with_all_logits()
        text = call.text if text_only and self._chosen is None else None
        watched = _Watched(states, stream or self.needs_stream, one_text, text)
        try:
            results, output, vanishing = self._pass(call, on_layer, watched, show_progress)
        except UnsupportedModelError as error:
            way_out = self._layers_of_text(call, watched)
            if way_out is None:
                raise
            raise UnsupportedModelError(
                f"{error} To leave out what does not read the text, give {way_out}."
            ) from error
        except _ShortenedError:
            self._all_logits = True
            results, output, vanishing = self._pass(
                call.with_all_logits(), on_layer, watched, show_progress
            )
        if vanishing:
            warnings.warn(
                f"{vanishing} attention outputs vanish: their rows are returned as zeros.",
                stacklevel=3,
            )
        self._layers = [execution.name for execution, _ in results]
        return results, output

    def _pass(
        self,
        call: ForwardCall,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        watched: _Watched,
        show_progress: bool,
    ) -> tuple[list[tuple[Execution, Result]], Any, int]:
        """The results of the layers, the output of the model, and how many rows vanish.

        Raises:
            _ShortenedError: If later layers leave queries out, since we asked for no more logits.
        """
        results: list[tuple[Execution, Result]] = []
        vanishing = longest = 0
        space: Space = "residual" if watched.stream else self.space
        expected = None if self._chosen is None else len(self._chosen)

        with progress_bar(expected, f"{self.get_name()}: layers", show=show_progress) as bar:

            def collect(execution: Execution, layer: AttentionLayer) -> None:
                nonlocal vanishing, longest
                if watched.one_text:
                    _check_own_text(execution)
                longest = max(longest, layer.T)
                if call.last_only and longest > layer.T:
                    raise _ShortenedError
                layer = layer.seen_in(space)
                if bar.total is None:
                    bar.total = expected_layers(self._roots, [execution])
                result = on_layer(execution, layer)
                results.append((replace(execution, states=None), result))
                if self.normaliser is not None and not watched.stream:
                    vanishing += layer.vanishing(self.normaliser)
                bar.update()

            observation = Observation(
                self._roots,
                collect,
                self._chosen,
                kind=self.kind if self._chosen is None else "all",
                real=call.real,
                states=watched.states,
                space=space,
                stream=watched.stream,
                text=watched.text,
            )
            with (
                torch.no_grad(),
                evaluation_mode(self._roots, self.model),
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
        if not observation.executions and self._chosen is None:
            raise no_attention(self._roots)
        _check_executions(observation.executions, self._chosen, self._roots, self.kind)
        if watched.one_text:
            _check_one_text(observation.executions, self._chosen)
        return results, output, vanishing

    def _layers_of_text(self, call: ForwardCall, watched: _Watched) -> str | None:
        """How the layers that read the text are chosen; None where that helps nothing."""
        if self._chosen is not None or call.text is None or watched.text is not None:
            return None
        try:
            results, _, _ = self._pass(
                call.with_all_logits(), _ignore, replace(watched, text=call.text), False
            )
        except (UnsupportedModelError, ValueError):  # nor can they be seen
            return None
        return choice_of([execution.name for execution, _ in results], self._roots[0])

    @logged
    def attribute(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """The measure at every query and key.

        Args:
            inputs: Token ids ``(B, T)``, a tokenizer's ``BatchEncoding`` or a dict of keyword
                arguments, embeddings ``(B, T, d)`` for a model whose main input is ids, else
                the model's main input; or a tuple of tensors, passed in order. A model of multiple
                choice takes ids ``(B, choices, T)``. A module that takes one mapping, such as a
                ``SentenceTransformer``, is given the dict as a whole, in a copy.
            additional_forward_args: Further positional arguments, as in Captum.
            target: Must be None: an attention measure explains a layer's output, not a class.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            ``(B, H, T, S)`` for one attention module, a list of such tensors for a list or None;
            float32, detached. Note that this is a map over queries and keys, not of the
            size of the layer's output. Where a module runs several times in a pass, its place
            holds a tuple with one map for each time (one entry each where ``layer`` is None).
            Padded queries and keys are zeros. A tensor given in a tuple of one comes back in one.
            Of ids ``(B, choices, T)`` there are ``B * choices`` examples: the choices of the first
            example, then those of the second, and so on.

        Raises:
            TypeError: If ``inputs`` or ``layer`` is of a kind that cannot be read.
            ValueError: If ids, mask or positions do not fit the model, the input is empty, the
                model needs tokens for its decoder and is given none, a layer does not run
                attention, ``target`` is given, or activations are NaN.
            MemoryError: If the maps would not fit into memory, with their size.
            UnsupportedModelError: If the model does something that would make the result wrong.
        """
        refuse_target(target)
        return as_given(
            inputs, self._maps(inputs, additional_forward_args, self.measure, show_progress)
        )

    def _maps(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        measure: Measure,
        show_progress: bool,
    ) -> Any:
        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            return functional.dense_map(layer, measure).float()

        return self._dense(inputs, additional_forward_args, on_layer, show_progress)

    def _dense(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        show_progress: bool,
        maps: int = 1,
    ) -> Any:
        """Runs ``on_layer``, which makes ``maps`` dense maps a layer, if the maps fit."""
        seen: list[Execution] = []

        def if_it_fits(execution: Execution, layer: AttentionLayer) -> Result:
            seen.append(execution)
            chosen = self._chosen
            total = expected_layers(self._roots, seen) if chosen is None else len(chosen)
            _check_memory(layer, max(total - len(seen) + 1, 1), maps, self.maps_of(layer.H))
            return on_layer(execution, layer)

        results, _ = self.observe(
            inputs, additional_forward_args, if_it_fits, show_progress=show_progress
        )
        return self._in_captums_form(results)

    def maps_of(self, heads: int) -> int:
        """How many maps it makes of a layer of so many heads: as many, or one of all of them."""
        return functional.heads_of(self.measure, heads)

    def _in_captums_form(self, results: list[tuple[Execution, Result]]) -> Any:
        """One module: its result; a list or None: a list; several executions: a tuple."""
        if self.layer is None:
            return [result for _, result in results]

        def of(module: nn.Module) -> Result | tuple[Result, ...]:
            runs = [result for execution, result in results if execution.module is module]
            return runs[0] if len(runs) == 1 else tuple(runs)

        return of(self.layer) if isinstance(self.layer, nn.Module) else [of(m) for m in self.layer]


def choice_of(names: Sequence[str], model: nn.Module) -> str:
    """The argument ``layer=`` that chooses modules of a model, as users would write it.

    Example:
        >>> choice_of(["model.layers.0.self_attn", "model.layers.1.self_attn"], model)
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


def _ignore(execution: Execution, layer: AttentionLayer) -> None:
    return None


def as_given(inputs: object, result: Any) -> Any:
    """A tensor in a tuple of one, where the input came in one: so do Captum's metrics expect it."""
    one = isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(result, Tensor)
    return (result,) if one else result


def refuse_target(target: object) -> None:
    if target is not None:
        raise ValueError(
            f"target={target!r}: an attention measure explains the output of a layer, not a class "
            "or token, so there is no target. To explain one prediction, use TokenScores(method, "
            "queries=position) or LLMTokenAttribution."
        )


def _model_of(forward_func: object) -> nn.Module | None:
    if isinstance(forward_func, nn.Module):
        return forward_func
    owner = getattr(forward_func, "__self__", None)
    if isinstance(owner, nn.Module):
        return owner
    if not callable(forward_func):
        raise TypeError(
            f"forward_func is of type {type(forward_func).__name__}: give the model, or a callable."
        )
    return None


def unwrapped(forward_func: Any) -> Any:
    """The model inside of wrappers, whose inputs and layers are the ones that are known."""
    while True:
        if isinstance(forward_func, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            forward_func = forward_func.module
        elif hasattr(forward_func, "_orig_mod"):  # compiled
            forward_func = forward_func._orig_mod
        else:
            return forward_func


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


def no_attention(roots: Sequence[nn.Module]) -> UnsupportedModelError:
    """What to raise where a pass made no attention call that can be seen."""
    kinds = ", ".join(type(root).__name__ for root in roots)
    return UnsupportedModelError(
        f"No attention was found in {kinds}: it is seen where a model uses the attention registry "
        "of transformers, torch.nn.functional.scaled_dot_product_attention, or a softmax over keys "
        "and a product with values, each (B, H, T, S). For others, see "
        "captum_cw.capture.register_adapter."
    )


def _check_executions(
    executions: list[Execution],
    chosen: list[nn.Module] | None,
    roots: list[nn.Module],
    kind: Kind,
) -> None:
    if chosen is None and kind != "all" and all(e.kind != kind for e in executions):
        raise ValueError(
            f"kind={kind!r}, but all {len(executions)} attention layers that ran are of the kind "
            f"{executions[0].kind!r}: choose that, or 'all'."
        )
    ran = {execution.module for execution in executions}
    missing = [module for module in chosen or () if module not in ran]
    if missing:
        names = names_of(roots)
        found = list(dict.fromkeys(execution.name for execution in executions))
        known = ", ".join(found[:4]) + (f", ... ({len(found)} in all)" if len(found) > 4 else "")
        raise ValueError(
            f"Layer {names[missing[0]]!r} ({type(missing[0]).__name__}) is no attention "
            f"module: it made no attention call. Attention modules: {known or 'none were seen'}."
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


def _check_memory(layer: AttentionLayer, layers: int, maps: int, heads: int) -> None:
    B, T = layer.value.shape[0], layer.T
    check_fits(
        4 * B * heads * T * layer.S * layers * maps,
        layer.value.device,
        f"{layers} layers of {B} x {heads} x {T} x {layer.S}, float32",
        "Choose fewer layers (layer=...), or use TokenScores, which never holds a map.",
    )


def check_fits(needed: int, device: torch.device, what: str, way_out: str) -> None:
    """Raises a MemoryError if maps of ``needed`` bytes exceed what is free."""
    free = free_bytes(device)
    if needed > free:
        raise MemoryError(
            f"The maps need {needed / 1e9:.1f} GB ({what}), but {free / 1e9:.1f} GB are free. "
            f"{way_out}"
        )


def evaluation_mode(
    roots: list[nn.Module], model: nn.Module | None
) -> AbstractContextManager[None]:
    """Turns dropout off, and says so; leaves the modules as they were, whatever they do."""
    if any(m.training for root in roots for m in root.modules()):
        if model is None:
            raise ValueError(
                "The layers are in training mode, and the model around them is not known, so "
                "its dropout would stay on: call model.eval() first, or give the model as "
                "forward_func."
            )
        warnings.warn(
            "The model is in training mode: dropout is off for the attribution.", stacklevel=5
        )
    return evaluating(roots)


def uncompiled() -> AbstractContextManager[None]:
    """Runs compiled functions as they were written: what they fuse cannot be seen."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import is slow
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


class _ValueAttribution(AttentionAttribution):
    """A measure that looks at values, in one of the spaces where they can be measured.

    Args:
        space: Where projections and norms are measured: ``"attention"``, the layer's output; or
            ``"residual"``, what is added to the residual stream.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        space: Space = "attention",
        kind: Kind = "self",
    ) -> None:
        functional.check_choice("space", space, Space)
        super().__init__(forward_func, layer, device_ids, kind=kind)
        self.space = space

    def mixing(self, heads: Aggregation | None) -> Measure:
        """The norms of what each token, and the stream itself, add to the stream."""
        _check_together(heads)
        return rollout.norm_mixing


def _check_together(heads: Aggregation | None) -> None:
    if heads != "mean":
        raise ValueError(
            f"heads={heads!r}: what heads add to the residual stream is added up; leave "
            "heads='mean'."
        )


class AttentionWeights(AttentionAttribution):
    """The attention weights ``a_ij`` that the model used (Eq. 1).

    Its own mask, bias, soft-cap and sinks are included.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> a = AttentionWeights(model).attribute(input_ids)
        >>> len(a), a[0].shape
        (2, torch.Size([1, 4, 5, 5]))
    """

    name = "attention"
    measure = staticmethod(functional.attention)
    mixes_stream = False

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Half of it attention, aggregated over heads, and half of it the stream."""
        if heads not in ("mean", "max"):
            raise ValueError(
                f"heads={heads!r}: the stream counts as much as the attention of all heads "
                "together, so heads are averaged; use 'mean', or 'max'."
            )
        return rollout.attention_mixing(heads)


class VWAttention(_ValueAttribution):
    """Value-weighted attention ``|a_ij| ||v~_j||``, in the unit of the hidden states.

    Measure ii of arXiv 2606.07604, section 5.2 (Kobayashi et al. 2020).

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        space: Where norms are taken: ``"attention"``, at the layer's output; or ``"residual"``, at
            what is added to the residual stream, after a norm that follows attention.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> VWAttention(model, model.model.layers[0].self_attn).attribute(input_ids).shape
        torch.Size([1, 4, 5, 5])
    """

    name = "vw"
    measure = staticmethod(functional.vw)


class VWONAttention(_ValueAttribution):
    """Value-weighted attention over the norm of the layer's output, ``|a_ij| ||v~_j|| / ||o_i||``.

    Measure iii of arXiv 2606.07604, section 5.2.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        space: Where norms are taken: ``"attention"``, at the layer's output; or ``"residual"``, at
            what is added to the residual stream, after a norm that follows attention.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> VWONAttention(model).attribute(input_ids)[1].shape
        torch.Size([1, 4, 5, 5])
    """

    name = "vwon"
    measure = staticmethod(functional.vwon)
    normaliser = "inter"


class ContributionWeights(_ValueAttribution):
    """Contribution weights: each token's share of the attention output (arXiv 2606.07604).

    ``c_ij = a_ij <o_i, v~_j> / ||o_i||^2``: attention, magnitude and direction together. A
    negative contribution opposes the output.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        scope: ``"inter"`` projects on the layer's output (Eq. 12) and sums to one over heads and
            keys; ``"intra"`` projects on the head's own (Eq. 9) and sums to one over keys.
        space: ``"attention"``: the output is that of the attention layer (the paper).
            ``"residual"``: it is what is added to the residual stream, which differs where a norm
            follows attention (Gemma 2 and 3, OLMo 2); the norm's scale is held fixed.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> c = ContributionWeights(model).attribute(input_ids)
        >>> torch.allclose(c[0].sum((1, 3)), torch.ones(1, 5), atol=1e-5)
        True
    """

    name = "contribution"
    measure = staticmethod(functional.contribution("inter"))

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        scope: Scope = "inter",
        space: Space = "attention",
        kind: Kind = "self",
    ) -> None:
        super().__init__(forward_func, layer, device_ids, space=space, kind=kind)
        self.measure = functional.contribution(scope)
        self.normaliser = self.scope = scope

    def mixing(self, heads: Aggregation | None) -> Measure:
        """The shares of each token, and of the stream itself, in what goes on."""
        if self.scope != "inter":
            raise ValueError(
                f"scope={self.scope!r} speaks of the output of one head, but what goes through "
                "all layers is the residual stream: use scope='inter'."
            )
        _check_together(heads)
        return rollout.contribution_mixing

    def has_convergence_delta(self) -> bool:
        """True: contributions sum to one, and the delta says how nearly."""
        return True

    def compute_convergence_delta(self, attributions: Any) -> Any:
        """One minus the sum of the contributions; zero for padded queries and vanishing outputs.

        Args:
            attributions: What :meth:`attribute` gave: a tensor, or a list of them.

        Returns:
            ``(B, T)`` for inter, ``(B, H, T)`` for intra; a list for a list.

        Example:
            >>> method = ContributionWeights(model)
            >>> delta = method.compute_convergence_delta(method.attribute(input_ids))
            >>> [tuple(d.shape) for d in delta], bool(delta[0].abs().max() < 1e-5)
            ([(1, 5), (1, 5)], True)
        """
        if isinstance(attributions, (list, tuple)):
            return type(attributions)(self.compute_convergence_delta(a) for a in attributions)
        dims = (1, 3) if self.scope == "inter" else (3,)
        anything = (attributions != 0).sum(dims) > 0
        return (1 - attributions.sum(dims)) * anything

    @logged
    def attribute(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: None = None,
        *,
        return_convergence_delta: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """The contribution of every key to every query's output.

        Args:
            inputs: As for every measure (see
                :meth:`~captum_cw.attr.measures.AttentionAttribution.attribute`).
            additional_forward_args: Further positional arguments, as in Captum.
            target: Must be None.
            return_convergence_delta: Also returns :meth:`compute_convergence_delta`.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            As for every measure; with ``return_convergence_delta`` a pair of that and the delta.
        """
        refuse_target(target)
        maps = self._maps(inputs, additional_forward_args, self.measure, show_progress)
        given = as_given(inputs, maps)
        return (given, self.compute_convergence_delta(maps)) if return_convergence_delta else given

    def decompose(
        self, inputs: Inputs, additional_forward_args: object = None, *, show_progress: bool = False
    ) -> Any:
        """The factors of the inter-head contributions (Eq. 14).

        Args and errors as :meth:`attribute`.

        Returns:
            For each layer a :class:`captum_cw.functional.Decomposition` ``(attention,
            relative_norm, cosine, contribution)`` of float32 tensors ``(B, H, T, S)``; in a list
            where ``layer`` is None or a list.

        Example:
            >>> d = ContributionWeights(model).decompose(input_ids)[0]
            >>> torch.allclose(d.attention * d.relative_norm * d.cosine, d.contribution, atol=1e-6)
            True
        """
        if self.scope != "inter":
            raise ValueError(
                f"scope={self.scope!r} has no decomposition: Eq. 14 speaks of the layer's output; "
                "use scope='inter'."
            )

        def on_layer(execution: Execution, layer: AttentionLayer) -> Decomposition:
            return Decomposition(*(x.float() for x in functional.decompose(layer)))

        return self._dense(inputs, additional_forward_args, on_layer, show_progress, maps=4)

    def head_share(
        self, inputs: Inputs, additional_forward_args: object = None, *, show_progress: bool = False
    ) -> Tensor:
        """How much of its layer's output each head makes: ``sum_j c_ij^h``, inter-head.

        Args and errors as :meth:`attribute`; no map is built.

        Returns:
            ``(B, L, H, T)``, float32: sums to one over ``H``; zero for padded queries.

        Example:
            >>> share = ContributionWeights(model).head_share(input_ids)
            >>> share.shape, torch.allclose(share.sum(2), torch.ones(1, 2, 5), atol=1e-5)
            (torch.Size([1, 2, 4, 5]), True)
        """

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            return functional.head_share(layer).float()

        results, _ = self.observe(
            inputs, additional_forward_args, on_layer, show_progress=show_progress
        )
        return stack_layers([share for _, share in results], "head_share")


class ALTIWeights(AttentionAttribution):
    """How near each token's part comes to what a layer makes of a token (ALTI).

    ``T_i(x_j) = sum_h a_ij^h v~_j^h``, with the residual stream ``x_i`` added for ``j = i``, are
    the parts of ``y_i``, the stream after attention; the weight is ``max(0, ||y_i||_1 - ||y_i -
    T_i(x_j)||_1)``, rows normalised (Ferrando, Gallego & Costa-jussa 2022). Heads are put
    together. The aggregation over layers that gives ALTI its name is
    ``TokenScores(ALTIWeights(model), layers="rollout")``.

    It needs vectors of size ``T x S x d`` a layer, made in blocks: about as many times dearer than
    contributions as there are heads.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.

    Example:
        >>> mixing = ALTIWeights(model).attribute(input_ids)
        >>> mixing[0].shape, torch.allclose(mixing[0].sum(-1), torch.ones(1, 1, 5))
        (torch.Size([1, 1, 5, 5]), True)
    """

    name = "alti"
    measure = staticmethod(rollout.alti)
    space: Space = "residual"
    needs_stream = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)

    def mixing(self, heads: Aggregation | None) -> Measure:
        """The weights themselves."""
        _check_together(heads)
        return rollout.alti


def stack_layers(results: list[Tensor], what: str) -> Tensor:
    """``L`` tensors ``(B, ...)`` as one ``(B, L, ...)``."""
    shapes = Counter(tuple(r.shape) for r in results)
    if len(shapes) > 1:
        raise ValueError(
            f"The layers differ in heads or length ({', '.join(map(str, shapes))}), so {what} has "
            "no common shape: choose layers of one shape with layer=..., or aggregate over heads."
        )
    return torch.stack([r.to(results[0].device) for r in results], dim=1)
