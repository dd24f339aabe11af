"""The clean pass: one unchanged pass, which scores layers and finds sinks before a removal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.attr.effects import Share
from captum_cw.capture import Execution, Observation, UnsupportedModelError, evaluating
from captum_cw.capture.run import no_attention
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer
from captum_cw.removal.options import Factors, RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import PairScorer
from captum_cw.removal.sinks import real_tokens
from captum_cw.removal.virtual_tokens import behind, padding_masks, text_mask, without_prefix
from captum_cw.weights import block_elements, blocks

__all__ = [
    "CleanPass",
    "check_finite",
    "check_kind",
    "cross_attention_error",
    "with_prefix",
]


@dataclass
class CleanPass:
    """The results of a clean pass. Lists have one entry per layer.

    Attributes:
        real: ``(B, S)`` boolean, False at padding and virtual tokens.
        sinks: ``(B, S)`` boolean, True at protected sinks.
        scores: For each scorer's name ``(B, H, S)``.
        keys: The number of keys. It exceeds ``S`` if the layer has a learned prefix.
        ahead: ``(B, S)`` boolean, True at tokens that earlier tokens see in some layer, so earlier
            tokens do not predict them; None without such tokens.
        vanishing: The number of layer outputs that vanish. Their rows count as zeros.
        shares: What scores of a target need to know of each layer; None if it is not wanted.
        output: The output of the model.
        all_registered: Whether all attention ran in kernels of transformers' registry.
    """

    ahead: Tensor | None = None
    vanishing: int = 0
    real: list[Tensor] = field(default_factory=list)
    sinks: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    shares: list[tuple[Execution, Share]] | None = None
    output: Any = None
    all_registered: bool = False

    @classmethod
    def run(
        cls,
        model: nn.Module,
        forward: Callable[[], Any],
        scorers: Mapping[str, PairScorer],
        options: RemovalOptions,
        text_masks: Sequence[Tensor],
        text: TextLayers | None = None,
        with_shares: bool = False,
    ) -> CleanPass:
        """Run ``forward``, a pass of ``model`` over a whole text.

        Args:
            model: The model.
            forward: Runs the pass.
            scorers: The scorers of pairs, by name.
            options: Which tokens are protected sinks.
            text_masks: For each sequence of tokens ``(B, T)`` boolean, False at padding.
            text: Chooses the layers over the text, in a model that also reads images or sounds;
                None for all layers.
            with_shares: Whether :attr:`shares` are wanted.
        """
        clean = cls(scores={name: [] for name in scorers}, shares=[] if with_shares else None)

        def on_layer(execution: Execution, layer: AttentionLayer) -> None:
            check_kind(execution)
            number = len(clean.real)
            clean.keys.append(layer.S)
            if clean.shares is not None:
                clean.shares.append((execution, Share.of(layer)))
            layer = without_prefix(model, layer)
            # Layers may be on several devices, but "global" ranks them together.
            device = clean.real[0].device if clean.real else layer.value.device
            clean.real.append(text_mask(model, real_tokens(layer), text_masks).to(device))
            clean.sinks.append(options.sinks(execution, layer).to(device))
            if not layer.mask.causal and layer.T > 1:
                ahead = _seen_ahead(layer).to(device)
                clean.ahead = ahead if clean.ahead is None else clean.ahead | ahead
            for name, scorer in scorers.items():
                scores = scorer(layer, number)
                check_finite(scores, execution.name)
                clean.scores[name].append(scores.to(device))
            clean.vanishing += int(layer.vanishing("inter"))

        spaces = {scorer.space for scorer in scorers.values()}
        observation = Observation(
            [model],
            on_layer,
            real=padding_masks(model, text_masks),
            states=options.states,
            space="residual" if "residual" in spaces else "attention",
            stream=any(scorer.needs_stream for scorer in scorers.values()),
            text=text,
        )
        with torch.no_grad(), evaluating([model]), observation:
            clean.output = forward()
        clean.all_registered = observation.all_registered
        if not clean.real:
            raise no_attention([model])
        return clean

    @property
    def kept(self) -> list[Tensor]:
        """For each layer ``(B, S)``, True at tokens that stay: sinks, padding, virtual tokens."""
        return [sinks | ~real for sinks, real in zip(self.sinks, self.real, strict=True)]

    def factors(
        self,
        rate: float,
        which: Which,
        options: RemovalOptions,
        scores: Tensor | Sequence[Tensor],
        kept: Sequence[Tensor],
    ) -> Factors:
        """Rank pairs or whole tokens, and return the factors that remove a fraction of them.

        Args:
            rate: The fraction to remove.
            which: ``"top"`` or ``"bottom"``.
            options: How pairs or tokens are ranked.
            scores: For each layer the scores of pairs ``(B, H, S)``, whose means over heads and
                layers rank whole tokens; or scores of whole tokens, ``(B, S)``.
            kept: For each layer ``(B, S)``, True at tokens that stay. A whole token that stays in
                one layer stays in all.

        Returns:
            The factors of all keys of each layer.
        """
        if options.granularity == "token" and not isinstance(scores, Tensor):
            scores = torch.stack([layer.mean(1) for layer in scores]).mean(0)
        if isinstance(scores, Tensor):
            stays = torch.stack([x.to(scores.device) for x in kept]).any(0)
            factors = options.factors(rate, which, [scores[:, None]], self.real[:1], [stays])
            factors *= len(self.real)
        else:
            factors = options.factors(rate, which, scores, self.real, kept)
        return [with_prefix(x, keys) for x, keys in zip(factors, self.keys, strict=True)]


def with_prefix(factors: Tensor | None, keys: int) -> Tensor | None:
    """Extend factors ``(..., S)`` to all keys of a layer; the keys of a learned prefix stay."""
    return None if factors is None else behind(factors, keys, value=1)


def _seen_ahead(layer: AttentionLayer) -> Tensor:
    """Return which tokens an earlier token sees, directly or through tokens between, ``(B, S)``."""
    mask, real = layer.mask, real_tokens(layer)
    farthest = torch.zeros_like(real, dtype=torch.long)
    keys = torch.arange(layer.S, device=real.device)
    for rows in blocks(layer.T, max(1, block_elements(layer.value.device) // layer.S)):
        seen = mask.block(rows, real.device).any(1)
        farthest[:, rows] = (seen * keys[: seen.shape[-1]]).amax(-1)
    reached = (farthest * real).cummax(1).values
    return torch.nn.functional.pad(reached[:, :-1] >= keys[1:], (1, 0)) & real


def check_finite(scores: Tensor, name: str) -> None:
    """Raise a ValueError if the scores of a layer are NaN or infinite."""
    if not scores.isfinite().all():
        raise ValueError(f"The scores of attention layer {name!r} are NaN or infinite.")


def check_kind(execution: Execution) -> None:
    """Raise an UnsupportedModelError if a layer is cross-attention."""
    if execution.kind == "cross":
        raise cross_attention_error(f"{execution.name!r} ({type(execution.module).__name__})")


def cross_attention_error(what: str) -> UnsupportedModelError:
    """Return the error for models that would rank the tokens of two texts together."""
    return UnsupportedModelError(
        f"{what} belongs to a model with cross-attention, whose tokens cannot be ranked for "
        "removal yet: use remove_values, in passes over whole texts."
    )
