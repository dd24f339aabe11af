"""One unchanged pass of a model: the scores, sinks and real tokens of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture import (
    Execution,
    Observation,
    UnsupportedModelError,
    evaluating,
)
from captum_cw.capture.run import no_attention
from captum_cw.capture.text_layers import TextLayers
from captum_cw.functional import AttentionLayer, blocks
from captum_cw.removal.options import Factors, RemovalOptions
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import (
    PairScorer,
    space_of,
)
from captum_cw.removal.sinks import real_tokens
from captum_cw.removal.virtual_tokens import behind, behind_prefix, known_to, own_tokens

__all__ = [
    "CleanPass",
    "check_finite",
    "check_kind",
    "mean_of_pairs",
    "of_all_keys",
    "of_two_texts",
]


@dataclass
class CleanPass:
    """What an unchanged pass shows, layer by layer.

    Attributes:
        real: ``(B, S)``, False at padding and virtual tokens.
        sinks: ``(B, S)``.
        scores: By name of the method, ``(B, H, S)``.
        keys: How many keys each layer has: more than ``S`` where a prefix was learned.
        ahead: ``(B, S)``, True at tokens that tokens before them see, in some layer, so that these
            do not predict them; None where there are none.
        vanishing: How many layer outputs vanish, so that their rows count as zeros.
        output: What the model returned.
    """

    ahead: Tensor | None = None
    vanishing: int = 0
    real: list[Tensor] = field(default_factory=list)
    sinks: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    output: Any = None

    @classmethod
    def run(
        cls,
        model: nn.Module,
        forward: Callable[[], Any],
        scorers: Mapping[str, PairScorer],
        options: RemovalOptions,
        told: Sequence[Tensor],
        text: TextLayers | None = None,
    ) -> CleanPass:
        """Runs ``forward``, a pass of ``model`` over a whole text.

        Args:
            model: The model.
            forward: Runs the pass.
            scorers: What scores the pairs of each layer, by name.
            options: Which tokens are protected sinks.
            told: For each sequence of tokens ``(B, T)``, False at padding.
            text: Tells the layers that read the text, which alone count; None where all do.
        """
        seen = cls(scores={name: [] for name in scorers})

        def on_layer(execution: Execution, layer: AttentionLayer) -> None:
            check_kind(execution)
            number = len(seen.real)
            seen.keys.append(layer.S)
            layer = behind_prefix(model, layer)
            # Layers may lie on several devices, and are ranked together.
            home = seen.real[0].device if seen.real else layer.value.device
            seen.real.append(own_tokens(model, real_tokens(layer), told).to(home))
            seen.sinks.append(options.sinks(execution, layer).to(home))
            if not layer.mask.causal and layer.T > 1:
                ahead = _seen_ahead(layer).to(home)
                seen.ahead = ahead if seen.ahead is None else seen.ahead | ahead
            for name, scorer in scorers.items():
                scores = scorer(layer, number)
                check_finite(scores, execution.name)
                seen.scores[name].append(scores.to(home))
            seen.vanishing += layer.vanishing("inter")

        space = space_of(scorers.values())
        known = known_to(model, told)
        observation = Observation(
            [model], on_layer, real=known, states=options.states, space=space, text=text
        )
        with torch.no_grad(), evaluating([model]), observation:
            seen.output = forward()
        if not seen.real:
            raise no_attention([model])
        return seen

    def whole_tokens(
        self,
        rate: float,
        which: Which,
        options: RemovalOptions,
        scores: Tensor,
        kept: Sequence[Tensor],
    ) -> Factors:
        """The factors that remove whole tokens in all heads and layers.

        Args:
            rate: The fraction to remove.
            which: ``"top"`` or ``"bottom"``.
            options: How tokens are ranked.
            scores: ``(B, S)``.
            kept: For each layer ``(B, S)``, True at tokens that stay; a token that stays in one
                layer stays in all.
        """
        stays = torch.stack([x.to(scores.device) for x in kept]).any(0)
        factors = options.factors(rate, which, [scores[:, None]], self.real[:1], [stays])
        return self.of_keys(factors * len(self.real))

    def of_keys(self, factors: Factors) -> Factors:
        """Factors of the tokens of each layer as those of its keys."""
        return [of_all_keys(x, keys) for x, keys in zip(factors, self.keys, strict=True)]


def of_all_keys(factors: Tensor | None, keys: int) -> Tensor | None:
    """Factors of all keys of a layer: those of a learned prefix stay."""
    return None if factors is None else behind(factors, keys, value=1)


def _seen_ahead(layer: AttentionLayer) -> Tensor:
    """``(B, S)``: which tokens a token before them sees, or one after them that it sees."""
    mask, real = layer.mask, real_tokens(layer)
    farthest = torch.full(real.shape, layer.S - 1, dtype=torch.long, device=real.device)
    keys = torch.arange(layer.S, device=real.device)
    for rows in blocks(layer.T, max(1, 2**20 // layer.S)):
        seen = mask.block(rows)
        if seen is not None:
            shape = len(real), rows.stop - rows.start, seen.shape[-1]
            seen = seen.any(1).to(real.device).expand(shape)
            farthest[:, rows] = (seen * keys[: seen.shape[-1]]).amax(-1)
    reached = (farthest * real).cummax(1).values
    return torch.nn.functional.pad(reached[:, :-1] >= keys[1:], (1, 0)) & real


def mean_of_pairs(scores: Sequence[Tensor]) -> Tensor:
    """Scores of whole tokens, ``(B, S)``: means of pairs ``(B, H, S)`` over heads and layers."""
    return torch.stack([layer.mean(1) for layer in scores]).mean(0)


def check_finite(scores: Tensor, name: str) -> None:
    """Raises a ValueError where scores of a layer cannot be ranked."""
    if not scores.isfinite().all():
        raise ValueError(f"Scores of attention layer {name!r} are NaN or infinite.")


def check_kind(execution: Execution) -> None:
    """Raises an UnsupportedModelError for a layer of cross-attention."""
    if execution.kind == "cross":
        raise of_two_texts(f"{execution.name!r} ({type(execution.module).__name__})")


def of_two_texts(what: str) -> UnsupportedModelError:
    """The error to raise where tokens of two texts would be ranked together."""
    return UnsupportedModelError(
        f"{what} belongs to a model with cross-attention, whose tokens cannot be ranked for "
        "removal yet: use remove_values, in passes over whole texts."
    )
