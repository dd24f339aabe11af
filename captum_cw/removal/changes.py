"""Change the values of attention layers during the passes of a model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
from captum_cw.capture.run import no_attention
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer
from captum_cw.removal.clean_pass import (
    CleanPass,
    check_finite,
    check_kind,
    mean_of_pairs,
    of_all_keys,
    of_two_texts,
)
from captum_cw.removal.options import Factors, RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import (
    PairScorer,
    TokenMethod,
    space_of,
)
from captum_cw.removal.sinks import real_tokens
from captum_cw.removal.virtual_tokens import behind, behind_prefix, known_to, own_tokens

__all__ = [
    "CleanRemoval",
    "FixedChange",
    "Intervention",
    "OnlineRemoval",
    "Scaled",
    "check_self_attention",
]


#: Arguments that say how a model runs, not what it reads: a scorer of tokens does not get them.
NOT_OF_TEXT = ("use_cache", LOGITS, "return_dict")


@dataclass(frozen=True)
class _Call:
    """What runs a pass, what it is called with, and what that says of its tokens."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tokens


class _State(threading.local):
    """Where a thread stands in an intervention: a context may be copied into several threads."""

    def __init__(self) -> None:
        self.factors: Factors = []
        self.length = 0
        self.cache: Callable[[], Any] = _no_cache
        self.running = False
        # Whether passes run unchanged, as those that score tokens do.
        self.suspended = False
        # Within model.generate: the first text that it ran, (B, T).
        self.generating = False
        self.prompt: Tensor | None = None
        # Tells the layers that read it from those over images; None without images.
        self.text: TextLayers | None = None


def _no_cache() -> None:
    return None


class Intervention:
    """Changes the values that the attention layers of a model read, in each of its passes.

    What the values of a prompt were multiplied by stays so for the tokens that follow it in a
    key-value cache; values that come later are left alone.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = unwrapped(model)
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}: give the model itself.")
        self._modules = set(self.model.modules())
        self._state = _State()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Changes all passes of the model in this context."""
        with (
            changed_values(self._modules, self._only_in_passes),
            around_passes(self.model, self._pass),
            around_passes(self.model, self._generation, "generate"),
            uncompiled(),
        ):
            yield

    @contextmanager
    def _generation(
        self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Callable[[Any], None]]:
        """Around ``model.generate``, which runs a prompt, then the same text with more tokens."""
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

    def _only_in_passes(self, module: nn.Module, heads: int, value: Tensor) -> None:
        state = self._state
        if not (state.running or state.suspended):
            # Newer releases of transformers make states of images before the first pass.
            if state.text is not None and not state.text.holds(running(), value.shape[0]):
                return
            raise RuntimeError(
                f"{type(module).__name__} runs outside of a pass of the {type(self.model).__name__}"
                " whose values are changed: call the model itself, not a part of it, and turn off "
                "gradient checkpointing, which runs parts again."
            )

    @contextmanager
    def _pass(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Callable[[Any], None]]:
        state = self._state
        if state.suspended:
            yield _ignore
            return
        tokens = tokens_of(self.model, args, kwargs)
        if isinstance(tokens.cache, (tuple, list)):
            raise TypeError(
                "The key-value cache is a tuple of tensors, which does not tell whether it goes on "
                "with the same text: give one of transformers' Cache classes."
            )
        if tokens.cached:
            check_self_attention(self.model)
            self._check_cache(tokens)
        state.running = True
        try:
            if tokens.cached or self._goes_on(tokens):
                with self._changed(tokens, later=True):
                    yield _ignore
            else:
                warn_of_special_tokens(self.model, tokens.named)
                state.length, state.cache = 0, _no_cache
                state.prompt = tokens.ids if state.generating else None
                with self._prompt(_Call(forward, args, kwargs, tokens)):
                    yield partial(self._keep_cache, tokens.cache)
        finally:
            state.running = False
        state.length = tokens.cached + (tokens.T or 0)

    def _goes_on(self, tokens: Tokens) -> bool:
        """Whether this pass runs a generated text once more from its start, without a cache.

        What was removed from the prompt then stays removed, as it does with a cache.
        """
        prompt, ids = self._state.prompt, tokens.ids
        if prompt is None:
            return False
        n = prompt.shape[1]
        if ids is None or ids.shape[1] <= n or not torch.equal(ids[:, :n], prompt.to(ids.device)):
            raise RuntimeError(
                f"generate runs another text than its prompt of {n} tokens, so it is not known "
                "what is removed from it: generate without assistants, guidance and the like, or "
                "call the model itself."
            )
        return True

    def _keep_cache(self, given: Any, output: Any) -> None:
        cache = find_cache(output)
        cache = given if cache is None else cache
        self._state.cache = _no_cache if cache is None else weakref.ref(cache)

    def _check_cache(self, tokens: Tokens) -> None:
        state = self._state
        if state.cache() is not tokens.cache or tokens.cached != state.length:
            raise RuntimeError(
                f"The key-value cache holds {tokens.cached} tokens that were not read as the last "
                "text since values are changed: what was removed from them is not known. Start "
                "with the whole text and an empty cache."
            )
        if tokens.T != 1:
            raise RuntimeError(
                f"{tokens.T} tokens follow {tokens.cached} in a key-value cache: what is removed "
                "is decided from a whole text, so give it at once, not in pieces."
            )

    def _prompt(self, call: _Call) -> AbstractContextManager[None]:
        """Around a pass over a text from its start; leaves the factors behind."""
        raise NotImplementedError

    def _of_counted(self, tokens: Tokens, change: ValueChange) -> ValueChange:
        """The same change, of the layers that read the text alone, beside images and the like."""
        text = tokens.text
        if text is None:
            return change

        def of_text(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
            reads = text.holds(running(), value.shape[0])
            return change(module, heads, value) if reads else None

        return of_text

    @contextmanager
    def _changed(self, tokens: Tokens, later: bool = False) -> Iterator[None]:
        """Multiplies the values of the layers of a pass by the factors that are known.

        Args:
            tokens: The tokens of the pass.
            later: Whether the pass goes on with a text, so that values came after the factors.
        """
        known, number = self._state.factors, 0

        def change(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
            nonlocal number
            number += 1
            if number > len(known):
                raise ValueError(
                    f"Values are changed in {len(known)} attention layers, but the model runs "
                    "more: give one mask for each."
                )
            factors = known[number - 1]
            if factors is not None:
                _check_factors(factors, heads, value, tokens, number - 1, later)
            return factors

        with changed_values(self._modules, self._of_counted(tokens, change)):
            yield
        if not number:
            raise no_attention([self.model])
        if number != len(known):
            raise ValueError(
                f"Values are changed in {len(known)} attention layers, but the model ran {number}: "
                "give one mask for each."
            )


def _check_factors(
    factors: Tensor, heads: int, value: Tensor, tokens: Tokens, number: int, later: bool
) -> None:
    """Checks that factors fit the values of a layer.

    Args:
        factors: The factors, ``(B|1, H|1, S)``.
        heads: The number of query heads.
        value: The values, ``(B, H_kv, S, d_h)``.
        tokens: The tokens of the pass.
        number: The layer's place in the pass.
        later: Whether the pass goes on with a text, so that values came after the factors.
    """
    B, H, S = factors.shape
    here = tokens.cached + (value.shape[2] if tokens.T is None else tokens.T)
    # A model may put prompt tokens of its own before those that it is given.
    fits = here > S if later and here != S else S in (here, value.shape[2])
    if B not in (1, value.shape[0]) or H not in (1, heads) or not fits:
        raise ValueError(
            f"Layer {number} has {value.shape[0]} examples, {heads} heads and {here} tokens, but "
            f"what changes its values has shape {(B, H, S)}: expected (B, H, T)."
        )
    if tokens.cached and value.shape[2] < here:
        raise RuntimeError(
            f"Layer {number} holds {value.shape[2]} of {here} tokens in its cache, so it is not "
            "known which are removed: use a cache without a window, or none."
        )


class FixedChange(Intervention):
    """The same factors in every pass.

    Args:
        model: The model.
        factors: The factors of each layer.
        every_layer: Whether they are of every attention layer, rather than of those that read the
            text.
    """

    def __init__(self, model: nn.Module, factors: Factors, every_layer: bool = False) -> None:
        super().__init__(model)
        self._given, self._every_layer = factors, every_layer

    def _of_counted(self, tokens: Tokens, change: ValueChange) -> ValueChange:
        return change if self._every_layer else super()._of_counted(tokens, change)

    def _prompt(self, call: _Call) -> AbstractContextManager[None]:
        self._state.factors = self._given
        return self._changed(call.tokens)


class Scaled(Intervention):
    """One factor for some tokens of some layers."""

    def __init__(
        self, model: nn.Module, factor: float, positions: list[int], layers: list[int] | None
    ) -> None:
        super().__init__(model)
        check_self_attention(self.model)
        self._factor, self._positions, self._layers = factor, positions, layers

    @contextmanager
    def _prompt(self, call: _Call) -> Iterator[None]:
        made: Factors = []
        self._state.factors = made

        def change(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
            _check_own_tokens(module, value)
            number = len(made)
            wanted = self._layers is None or number in self._layers
            changes = wanted and self._positions and self._factor != 1
            factors = self._of(call.tokens, value) if changes else None
            made.append(factors)
            return factors

        with changed_values(self._modules, self._of_counted(call.tokens, change)):
            yield
        if not made:
            raise no_attention([self.model])
        missing = sorted({*(self._layers or ())} - {*range(len(made))})
        if missing:
            raise IndexError(
                f"layers={missing}: the model has attention layers 0..{len(made) - 1}."
            )

    def _of(self, tokens: Tokens, value: Tensor) -> Tensor:
        B, T = value.shape[0], value.shape[2] if tokens.T is None else tokens.T
        factors = value.new_ones(B, 1, T)
        for b in range(B):
            places = (
                range(T)
                if tokens.token_mask is None
                else tokens.token_mask[b].nonzero()[:, 0].tolist()
            )
            n = len(places)
            for position in self._positions:
                if not -n <= position < n:
                    raise IndexError(f"positions={position}, but example {b} has {n} tokens.")
                factors[b, :, places[position]] = self._factor
        return factors


class CleanRemoval(Intervention):
    """Removes what scores of an unchanged pass rank, which runs first.

    Args:
        model: The model.
        scorer: What scores the pairs of a layer, or whole tokens.
        rate: The fraction to remove.
        which: ``"top"`` or ``"bottom"``.
        options: How pairs or tokens are ranked and protected.
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: PairScorer | TokenMethod,
        rate: float,
        which: Which,
        options: RemovalOptions,
    ) -> None:
        super().__init__(model)
        check_self_attention(self.model)
        self._scorer, self._rate, self._which, self._options = scorer, rate, which, options

    @contextmanager
    def _prompt(self, call: _Call) -> Iterator[None]:
        _check_evaluation(self.model)
        # An empty cache, such as generate gives, would be filled twice.
        alone = {n: own_copy(v) for n, v in call.tokens.named.items() if not is_cache(v)}
        if "use_cache" in parameters_of(self.model):
            alone["use_cache"] = False
        mask = alone.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of a static cache
            alone["attention_mask"] = mask[..., : call.tokens.T]
        scorer, options = self._scorer, self._options
        clean = CleanPass.run(
            self.model,
            partial(call.forward, **alone),
            {} if isinstance(scorer, TokenMethod) else {"": scorer},
            options,
            call.tokens.token_masks,
            call.tokens.text,
        )
        if options.granularity == "token":
            scores = self._token_scores(call.tokens, clean, alone)
            kept = [s | ~r for s, r in zip(clean.sinks, clean.real, strict=True)]
            factors = clean.whole_tokens(self._rate, self._which, options, scores, kept)
        else:
            pairs = clean.scores[""], clean.real, clean.sinks
            factors = clean.of_keys(options.factors(self._rate, self._which, *pairs))
        self._state.factors = factors
        with self._changed(call.tokens):
            yield

    def _token_scores(self, tokens: Tokens, clean: CleanPass, inputs: Mapping[str, Any]) -> Tensor:
        """The scores of whole tokens, ``(B, S)``."""
        if not isinstance(self._scorer, TokenMethod):
            return mean_of_pairs(clean.scores[""])
        whole = clean.real[0]
        shape = whole.shape if tokens.ids is None else tokens.ids.shape[:2]
        batch = {
            name: own_copy(x)
            for name, x in inputs.items()
            if x is not None and name not in NOT_OF_TEXT
        }
        self._state.suspended = True
        try:
            scores = self._scorer.checked(batch, shape, whole.shape)
        finally:
            self._state.suspended = False
        return behind(scores.to(whole.device), whole.shape[1])


class OnlineRemoval(Intervention):
    """Removes what scores say that each layer has after the changes of earlier layers.

    Args:
        model: The model.
        scorer: What scores the pairs of a layer.
        rate: The fraction to remove.
        which: ``"top"`` or ``"bottom"``.
        options: How pairs are ranked and protected.
        sinks: Those of each layer where they are known already, as from a clean pass.
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: PairScorer,
        rate: float,
        which: Which,
        options: RemovalOptions,
        sinks: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        check_self_attention(self.model)
        self._scorer, self._rate, self._which = scorer, rate, which
        self._options, self._sinks = options, sinks

    @contextmanager
    def _prompt(self, call: _Call) -> Iterator[None]:
        _check_evaluation(self.model)
        if is_observed():
            raise RuntimeError(
                "Under online removal a layer changes while it is scored, so it cannot be "
                "attributed at the same time: use scoring='clean', or remove_values."
            )
        self._state.factors = []
        states = self._options.states if self._sinks is None else None
        space = space_of([self._scorer])
        tokens = call.tokens
        with Observation(
            [self.model],
            partial(self._remove, tokens.token_masks),
            real=known_to(self.model, tokens.token_masks),
            states=states,
            space=space,
            text=tokens.text,
        ):
            yield
        if not self._state.factors:
            raise no_attention([self.model])

    @torch.no_grad()
    def _remove(
        self, told: Sequence[Tensor], execution: Execution, layer: AttentionLayer
    ) -> Tensor | None:
        check_kind(execution)
        made, keys = self._state.factors, layer.S
        layer = behind_prefix(self.model, layer)
        if self._sinks is None:
            sinks = self._options.sinks(execution, layer)
        else:
            sinks = self._sinks[len(made)].to(layer.value.device)
        scores = self._scorer(layer, len(made))
        check_finite(scores, execution.name)
        real = own_tokens(self.model, real_tokens(layer), told)
        (factors,) = self._options.factors(self._rate, self._which, [scores], [real], [sinks])
        made.append(of_all_keys(factors, keys))
        return made[-1]


def _ignore(output: Any) -> None:
    return None


def check_self_attention(model: nn.Module) -> None:
    """Raises an UnsupportedModelError where there is cross-attention."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if any(getattr(config, n, False) for n in ("is_encoder_decoder", "add_cross_attention")):
            raise of_two_texts(type(module).__name__)


def _check_evaluation(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError(
            "The model is in training mode, and dropout changes what is scored: call model.eval()."
        )


def _check_own_tokens(module: nn.Module, value: Tensor) -> None:
    """Raises an UnsupportedModelError where a module that runs attends to other tokens."""
    own = next((run for run in reversed(running()) if run.module is module), None)
    states = None if own is None else own.states()
    if states is not None and kind_of(own, states.shape[1], value.shape[2]) == "cross":
        raise of_two_texts(type(module).__name__)
