"""Change the values of attention layers in the passes of a model.

An :class:`Intervention` runs code around each pass. The pass over a text from its start decides the
factors of the values; a pass that continues the text applies the same factors again. The subclasses
differ in how they decide:

* :class:`FixedChange` has the factors from the start;
* :class:`Scaled` has one factor for some tokens of some layers;
* :class:`RankedRemoval` removes by scores, either from an unchanged pass, which it runs first, or
  of each layer while that layer runs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture import (
    Execution,
    Observation,
    ValueChange,
    around_passes,
    changed_values,
    is_observed,
)
from captum_cw.capture.attention_call import kind_of
from captum_cw.capture.caches import find_cache, is_cache, own_copy
from captum_cw.capture.call_tokens import Tokens, tokens_of, warn_of_special_tokens
from captum_cw.capture.model import LOGITS, parameters_of, uncompiled, unwrapped
from captum_cw.capture.module_stack import running
from captum_cw.capture.outputs import predictions_of
from captum_cw.capture.run import no_attention
from captum_cw.capture.target_value import Target
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer
from captum_cw.removal.clean_pass import (
    CleanPass,
    check_finite,
    check_kind,
    cross_attention_error,
    with_prefix,
)
from captum_cw.removal.options import Factors, RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import PairScorer, TokenMethod
from captum_cw.removal.sinks import real_tokens
from captum_cw.removal.target_scores import OwnText, TargetScorer
from captum_cw.removal.virtual_tokens import padding_masks, text_mask, without_prefix

__all__ = [
    "FixedChange",
    "Intervention",
    "RankedRemoval",
    "Scaled",
    "check_self_attention",
]


#: Arguments about how a model runs. Scorers of whole tokens do not receive them.
NOT_OF_TEXT = ("use_cache", LOGITS, "return_dict")

Forward = Callable[..., Any]
FactorsOf = Callable[[int, nn.Module, int, Tensor], Tensor | None]
"""Takes a layer's index, its module, ``H`` and its values; returns the factors of the values."""


class _State(threading.local):
    """The state of an intervention in one thread."""

    #: The factors of the last text, which has ``length`` tokens and was read into ``cache``.
    factors: Sequence[Tensor | None] = ()
    length = 0
    cache: weakref.ref[Any] | None = None
    #: Whether a pass is running.
    running = False
    #: Whether passes run unchanged, as a scorer of whole tokens needs them.
    suspended = False
    #: Whether ``model.generate`` is running, and the text of its first pass, ``(B, T)``.
    generating = False
    prompt: Tensor | None = None
    #: Distinguishes the layers over the text while it runs; None without images or sounds.
    text: TextLayers | None = None


class Intervention:
    """Change the values that the attention layers of a model read, in each of its passes.

    The values of a prompt keep their factors while a key-value cache continues the text. The values
    of the tokens that follow do not change.

    Args:
        model: The model.

    Raises:
        TypeError: If ``model`` is not a module.
    """

    #: Whether layers of a vision tower, or over sounds, are changed too.
    every_layer = False

    #: Whether all attention is known to run in kernels of transformers' registry.
    registered_only = False

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = unwrapped(model)
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}: give the model itself.")
        self._modules = set(self.model.modules())
        self._state = _State()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Change all passes of the model inside this context."""
        with (
            self._changed_values(self._check_is_pass),
            around_passes(self.model, self._pass),
            around_passes(self.model, self._generation, "generate"),
            uncompiled(),
        ):
            yield

    def _changed_values(self, change: ValueChange) -> AbstractContextManager[None]:
        return changed_values(self._modules, change, registered_only=self.registered_only)

    @contextmanager
    def _generation(
        self, generate: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Callable[[Any], None]]:
        """Run around ``model.generate``: a pass over a prompt, then passes with more tokens."""
        state = self._state
        if state.suspended:
            yield _ignore
            return
        before = state.generating, state.prompt, state.text
        state.generating, state.prompt = True, None
        state.text = tokens_of(self.model, args[:1], kwargs).text
        try:
            yield _ignore
        finally:
            state.generating, state.prompt, state.text = before

    def _check_is_pass(self, module: nn.Module, heads: int, value: Tensor) -> None:
        """Raise a RuntimeError if a layer runs outside of a pass of the model."""
        state = self._state
        if state.running or state.suspended:
            return
        # In newer releases of transformers, generate encodes images before the first pass.
        if state.text is not None and not state.text.holds(running(), value.shape[0]):
            return
        raise RuntimeError(
            f"{type(module).__name__} runs outside of a pass of the {type(self.model).__name__} "
            "whose values are changed: call the model itself, not a part of it, and turn off "
            "gradient checkpointing, which runs parts again."
        )

    @contextmanager
    def _pass(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Callable[[Any], None]]:
        """Run around each forward pass of the model."""
        state = self._state
        if state.suspended:
            yield _ignore
            return
        tokens = tokens_of(self.model, args, kwargs)
        if isinstance(tokens.cache, (tuple, list)):
            raise TypeError(
                "The key-value cache is a tuple of tensors, so it is unknown whether it continues "
                "the same text: give one of transformers' Cache classes."
            )
        if tokens.cached:
            check_self_attention(self.model)
            self._check_cache(tokens)
        state.running = True
        try:
            if tokens.cached or self._repeats_prompt(tokens):
                with self._apply(tokens, later=True):
                    yield _ignore
            else:
                warn_of_special_tokens(self.model, tokens.named)
                state.length, state.cache = 0, None
                state.prompt = tokens.ids if state.generating else None
                with self._first_pass(forward, tokens):
                    yield partial(self._keep_cache, tokens.cache)
        finally:
            state.running = False
        state.length = tokens.cached + (tokens.T or 0)

    def _repeats_prompt(self, tokens: Tokens) -> bool:
        """Whether ``generate`` reads its prompt again in this pass, as it does without a cache.

        Then the values of the prompt keep their factors.
        """
        prompt, ids = self._state.prompt, tokens.ids
        if prompt is None:
            return False
        n = prompt.shape[1]
        if ids is None or ids.shape[1] <= n or not torch.equal(ids[:, :n], prompt.to(ids.device)):
            raise RuntimeError(
                f"generate reads another text than its prompt of {n} tokens, so it is unknown what "
                "to remove from it: generate without assistants, guidance and the like, or call "
                "the model itself."
            )
        return True

    def _keep_cache(self, given: Any, output: Any) -> None:
        cache = find_cache(output)
        cache = given if cache is None else cache
        self._state.cache = None if cache is None else weakref.ref(cache)

    def _check_cache(self, tokens: Tokens) -> None:
        """Raise a RuntimeError unless the cache holds the last text, and one token follows."""
        state = self._state
        known = None if state.cache is None else state.cache()
        if known is not tokens.cache or tokens.cached != state.length:
            raise RuntimeError(
                f"The key-value cache holds {tokens.cached} tokens that were not read as the last "
                "text in this context, so it is unknown what was removed from them: start with the "
                "whole text and an empty cache."
            )
        if tokens.T != 1:
            raise RuntimeError(
                f"{tokens.T} tokens follow {tokens.cached} in a key-value cache, but a whole text "
                "decides what is removed: give it at once, not in pieces."
            )

    def _first_pass(self, forward: Forward, tokens: Tokens) -> AbstractContextManager[None]:
        """Run around a pass over a text from its start, and set the factors of its values.

        Args:
            forward: Runs a pass of the model.
            tokens: The tokens of the pass.
        """
        raise NotImplementedError

    @contextmanager
    def _each_layer(self, tokens: Tokens, factors_of: FactorsOf) -> Iterator[Factors]:
        """Multiply the values of each layer of a pass by factors, and yield those of all layers."""
        text = None if self.every_layer else tokens.text
        applied: Factors = []

        def change(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
            if text is not None and not text.holds(running(), value.shape[0]):
                return None
            applied.append(factors_of(len(applied), module, heads, value))
            return applied[-1]

        with self._changed_values(change):
            yield applied
        if not applied:
            raise no_attention([self.model])

    @contextmanager
    def _apply(self, tokens: Tokens, later: bool = False) -> Iterator[None]:
        """Multiply the values of a pass by the factors of the state.

        Args:
            tokens: The tokens of the pass.
            later: Whether the pass continues a text, so that some values do not have factors.
        """
        known = self._state.factors

        def factors_of(number: int, module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
            factors = known[number] if number < len(known) else None
            if factors is not None:
                _check_factors(factors, heads, value, tokens, number, later)
            return factors

        with self._each_layer(tokens, factors_of) as applied:
            yield
        if len(applied) != len(known):
            raise ValueError(
                f"Values are changed in {len(known)} attention layers, but the model ran "
                f"{len(applied)}: give one mask for each."
            )


def _check_factors(
    factors: Tensor, heads: int, value: Tensor, tokens: Tokens, number: int, later: bool
) -> None:
    """Raise an error if factors do not fit the values of a layer.

    Args:
        factors: The factors, ``(B|1, H|1, S)``.
        heads: ``H``, the number of query heads.
        value: The values, ``(B, H_kv, S, d_h)``.
        tokens: The tokens of the pass.
        number: The index of the layer.
        later: Whether the pass continues a text, so that some values do not have factors.
    """
    B, H, S = factors.shape
    T = tokens.cached + (value.shape[2] if tokens.T is None else tokens.T)
    # A model may put prompt tokens of its own before those that it is given.
    fits = T > S if later and T != S else S in (T, value.shape[2])
    if B not in (1, value.shape[0]) or H not in (1, heads) or not fits:
        raise ValueError(
            f"Layer {number} has {value.shape[0]} examples, {heads} heads and {T} tokens, but the "
            f"factors or mask of its values have shape {(B, H, S)}: expected (B, H, S)."
        )
    if tokens.cached and value.shape[2] < T:
        raise RuntimeError(
            f"Layer {number} has only {value.shape[2]} of {T} tokens in its cache, so it is "
            "unknown which ones are removed: use a cache without a window, or no cache."
        )


class FixedChange(Intervention):
    """The same factors in every pass.

    Args:
        model: The model.
        factors: The factors of each layer.
        every_layer: Whether ``factors`` include layers of a vision tower, or over sounds.
        registered_only: Whether a pass before has shown that all attention of the model runs in
            kernels of transformers' registry.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        *,
        every_layer: bool = False,
        registered_only: bool = False,
    ) -> None:
        super().__init__(model)
        self.factors, self.every_layer = factors, every_layer
        self.registered_only = registered_only

    def _first_pass(self, forward: Forward, tokens: Tokens) -> AbstractContextManager[None]:
        self._state.factors = self.factors
        return self._apply(tokens)


class Scaled(Intervention):
    """One factor for some tokens of some layers; see :func:`captum_cw.scale_values`."""

    def __init__(
        self, model: nn.Module, factor: float, positions: list[int], layers: list[int] | None
    ) -> None:
        super().__init__(model)
        check_self_attention(self.model)
        self._factor, self._positions, self._layers = factor, positions, layers

    @contextmanager
    def _first_pass(self, forward: Forward, tokens: Tokens) -> Iterator[None]:
        def factors_of(number: int, module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
            _check_own_tokens(module, value)
            if self._layers is not None and number not in self._layers:
                return None
            changes = self._positions and self._factor != 1
            return self._factors(tokens, value) if changes else None

        with self._each_layer(tokens, factors_of) as factors:
            yield
        self._state.factors = factors
        missing = sorted({*(self._layers or ())} - {*range(len(factors))})
        if missing:
            raise IndexError(
                f"layers={missing}: the model has attention layers 0..{len(factors) - 1}."
            )

    def _factors(self, tokens: Tokens, value: Tensor) -> Tensor:
        """Return the factors of a layer, ``(B, 1, T)``."""
        B, T = value.shape[0], value.shape[2] if tokens.T is None else tokens.T
        factors = value.new_ones(B, 1, T)
        mask = tokens.token_mask
        for b in range(B):
            places = list(range(T)) if mask is None else mask[b].nonzero()[:, 0].tolist()
            n = len(places)
            for position in self._positions:
                if not -n <= position < n:
                    raise IndexError(f"positions={position}, but example {b} has {n} tokens.")
                factors[b, :, places[position]] = self._factor
        return factors


class RankedRemoval(Intervention):
    """Remove the pairs or whole tokens that rank highest or lowest by their scores.

    The scores are those of an unchanged pass, which runs first. Under online scoring they are those
    of each layer after the removals from earlier layers.

    Args:
        model: The model.
        scorer: Scores the pairs of a layer, or whole tokens.
        rate: The fraction to remove.
        which: ``"top"`` or ``"bottom"``.
        options: How pairs or tokens are scored, ranked and protected.
        sinks: Under online scoring, for each layer ``(B, S)``, True at tokens that stay, if they
            are known from a clean pass. None finds the sinks in the changed pass.
        target: What a measure of a target explains.
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: PairScorer | TokenMethod | TargetScorer,
        rate: float,
        which: Which,
        options: RemovalOptions,
        sinks: Sequence[Tensor] | None = None,
        target: Target = None,
    ) -> None:
        super().__init__(model)
        check_self_attention(self.model)
        self._scorer, self._rate, self._which = scorer, rate, which
        self._options, self._sinks, self._target = options, sinks, target

    def _first_pass(self, forward: Forward, tokens: Tokens) -> AbstractContextManager[None]:
        if any(module.training for module in self.model.modules()):
            raise ValueError(
                "The model is in training mode, and dropout changes what is scored: call "
                "model.eval()."
            )
        if self._options.scores_before or isinstance(self._scorer, TargetScorer):
            return self._scored_before(forward, tokens)
        return self._scored_online(tokens)

    @contextmanager
    def _scored_before(self, forward: Forward, tokens: Tokens) -> Iterator[None]:
        scorer, options = self._scorer, self._options
        inputs = self._clean_inputs(tokens)
        scorers = {"": scorer} if isinstance(scorer, PairScorer) else {}
        clean = CleanPass.run(
            self.model,
            partial(forward, **inputs),
            scorers,
            options,
            tokens.token_masks,
            tokens.text,
            isinstance(scorer, TargetScorer) and scorer.needs_shares,
        )
        scores: Tensor | Sequence[Tensor] = clean.scores.get("", ())
        if not isinstance(scorer, PairScorer):
            scores = self._own_scores(scorer, tokens, clean, inputs)
            clean.shares = None  # they are large
        self._state.factors = clean.factors(self._rate, self._which, options, scores, clean.kept)
        with self._apply(tokens):
            yield

    def _clean_inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Return the arguments of the unchanged pass.

        They leave out a key-value cache, such as the empty one of ``generate``: two passes would
        fill it twice.
        """
        inputs = {n: own_copy(v) for n, v in tokens.named.items() if not is_cache(v)}
        if "use_cache" in parameters_of(self.model):
            inputs["use_cache"] = False
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of a static cache
            inputs["attention_mask"] = mask[..., : tokens.T]
        return inputs

    def _own_scores(
        self,
        method: TokenMethod | TargetScorer,
        tokens: Tokens,
        clean: CleanPass,
        inputs: Mapping[str, Any],
    ) -> Tensor | list[Tensor]:
        """Return the scores of a method that runs passes of its own."""
        real = clean.real[0]
        batch = {
            name: own_copy(x)
            for name, x in inputs.items()
            if x is not None and name not in NOT_OF_TEXT
        }
        text = real if tokens.ids is None else tokens.ids
        self._state.suspended = True
        try:
            if isinstance(method, TokenMethod):
                return method.checked(batch, text.shape[1], real)
            return method.of(batch, self._target_of(tokens, clean), clean)
        finally:
            self._state.suspended = False

    def _target_of(self, tokens: Tokens, clean: CleanPass) -> Target:
        """Return what a measure explains: without a target the tokens of the text, or a class."""
        if self._target is not None or predictions_of(clean.output).dim() == 2:
            return self._target
        if tokens.ids is None or tokens.ids.is_floating_point():
            raise ValueError(
                "The text is given as embeddings, so its tokens are unknown: give a target, such "
                "as a token or a callable (output) -> (B,)."
            )
        return OwnText.of(tokens.ids, clean.real[0])

    @contextmanager
    def _scored_online(self, tokens: Tokens) -> Iterator[None]:
        assert isinstance(self._scorer, PairScorer)  # other methods score before
        if is_observed():
            raise RuntimeError(
                "Under online removal a layer changes while it is scored, so it cannot be "
                "attributed at the same time: use scoring='clean', or remove_values."
            )
        if self._scorer.needs_stream:
            raise ValueError(
                "The measure reads the residual stream, which is known only after the layer has "
                "run, so it cannot score online: use scoring='clean'."
            )
        made: Factors = []
        self._state.factors = made
        with Observation(
            [self.model],
            partial(self._remove, self._scorer, tokens.token_masks, made),
            real=padding_masks(self.model, tokens.token_masks),
            states=self._options.states if self._sinks is None else None,
            space=self._scorer.space,
            text=tokens.text,
        ):
            yield
        if not made:
            raise no_attention([self.model])

    @torch.no_grad()
    def _remove(
        self,
        scorer: PairScorer,
        text_masks: Sequence[Tensor],
        made: Factors,
        execution: Execution,
        layer: AttentionLayer,
    ) -> Tensor | None:
        """Return the factors of a layer that was just observed, and append them to ``made``."""
        check_kind(execution)
        keys = layer.S
        layer = without_prefix(self.model, layer)
        if self._sinks is None:
            sinks = self._options.sinks(execution, layer)
        else:
            sinks = self._sinks[len(made)].to(layer.value.device)
        scores = scorer(layer, len(made))
        check_finite(scores, execution.name)
        real = text_mask(self.model, real_tokens(layer), text_masks)
        (factors,) = self._options.factors(self._rate, self._which, [scores], [real], [sinks])
        made.append(with_prefix(factors, keys))
        return made[-1]


def _ignore(output: Any) -> None:
    """Do nothing with the output of a pass."""


def check_self_attention(model: nn.Module) -> None:
    """Raise an UnsupportedModelError if the model's configuration has cross-attention."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if any(getattr(config, n, False) for n in ("is_encoder_decoder", "add_cross_attention")):
            raise cross_attention_error(type(module).__name__)


def _check_own_tokens(module: nn.Module, value: Tensor) -> None:
    """Raise an UnsupportedModelError if a running module is cross-attention."""
    own = next((run for run in reversed(running()) if run.module is module), None)
    states = None if own is None else own.states()
    if states is not None and kind_of(own, states.shape[1], value.shape[2]) == "cross":
        raise cross_attention_error(type(module).__name__)
