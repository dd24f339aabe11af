"""How pairs of a head and a token are scored, to be ranked: by a measure, a control, or chance."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from captum_cw import functional
from captum_cw.attr import (
    AttentionWeights,
    ContributionWeights,
    TokenScores,
    VWAttention,
    VWONAttention,
)
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.functional import (
    AttentionLayer,
    Measure,
    Reduction,
    Space,
    check_choice,
    token_scores,
)
from captum_cw.removal.sinks import real_tokens

__all__ = [
    "CONTROLS",
    "METHODS",
    "PairScorer",
    "RandomPairs",
    "model_of",
    "pair_scorer",
    "space_of",
    "whole_token_scorer",
]

#: The measures, by the names that users type.
METHODS: dict[str, type[AttentionAttribution]] = {
    method.name: method
    for method in (ContributionWeights, VWONAttention, VWAttention, AttentionWeights)
}


class Control(NamedTuple):
    """What the measures are compared with.

    Args:
        measure: The measure.
        signed: Whether signs are kept.
        space: Where it is measured.
    """

    measure: Measure
    signed: bool = False
    space: Space = "attention"


#: Each leaves out, or changes, one thing of a contribution.
CONTROLS: dict[str, Control] = {
    "contribution-signed": Control(functional.contribution("inter"), signed=True),
    "contribution-intra": Control(functional.contribution("intra")),
    "contribution-residual": Control(functional.contribution("inter"), space="residual"),
    "relative-norm": Control(functional.relative_norm),
    "cosine": Control(functional.cosine_with("inter")),
    "attention-cosine": Control(functional.attention_cosine),
    "relative-norm-cosine": Control(functional.geometry("inter")),
    "projection": Control(functional.projection),
    "closeness": Control(functional.closeness, signed=True),
}

RANDOM = "random"


class PairScorer(Protocol):
    """Scores the pairs of a layer."""

    @property
    def space(self) -> Space:
        """Where it must be possible to see the layer."""

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        """``(B, H, S)`` for the layer that runs as the ``number``-th of a pass."""
        ...  # pragma: no cover


@dataclass(frozen=True)
class MeasuredPairs:
    """Eq. 15: a measure reduced over the queries that see a token.

    Args:
        measure: The measure.
        reduction: Over queries.
        signed: Whether signs are kept.
        space: Where it is measured.
    """

    measure: Measure
    reduction: Reduction
    signed: bool
    space: Space

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        seen = layer.seen_in(self.space)
        return token_scores(seen, self.measure, self.reduction, signed=self.signed)


@dataclass(frozen=True)
class RandomPairs:
    """Chance, seeded: the same for an example whatever batch it is in.

    Args:
        seed: Of all.
        examples: What tells the examples of a batch apart; by default their places in it.

    Example:
        >>> RandomPairs(seed=1) == pair_scorer("random", seed=1)
        True
    """

    seed: int = 0
    examples: tuple[str, ...] | None = None
    space: ClassVar[Space] = "attention"

    def __call__(self, layer: AttentionLayer, number: int) -> Tensor:
        """Uniform numbers ``(B, H, S)``."""
        real = real_tokens(layer).cpu()
        examples = self.examples or tuple(map(str, range(len(real))))
        scores = torch.zeros(len(real), layer.H, layer.S, dtype=torch.float32, device="cpu")
        for b, example in enumerate(examples):
            seed = zlib.crc32(f"{self.seed}/{example}/{number}".encode())
            generator = torch.Generator().manual_seed(seed)
            # Token by token, so that padding changes nothing.
            drawn = scores.new_empty(int(real[b].sum()), layer.H).uniform_(generator=generator)
            scores[b, :, real[b]] = drawn.T
        return scores.to(layer.value.device)


def pair_scorer(method: object, reduction: Reduction = "mean", seed: int = 0) -> PairScorer:
    """What scores pairs as ``method`` says.

    Args:
        method: A measure, a ``TokenScores`` around one (whose ``reduction`` and ``signed``
            count), or a name: of a measure, of one of :data:`CONTROLS`, or ``"random"``.
        reduction: Over queries, where ``method`` does not bring its own.
        seed: Of ``"random"``.

    Raises:
        TypeError, ValueError: If ``method`` is none of these.

    Example:
        >>> pair_scorer("vwon") == pair_scorer(VWONAttention(model))
        True
    """
    check_choice("reduction", reduction, Reduction)
    whole = whole_token_scorer(method, reduction)
    if whole is not None:
        what = f"layers={whole.layers!r}" if whole is method else type(method).__name__
        raise ValueError(
            f"{what} gives scores of whole tokens, but pairs of head and token are ranked here: "
            "use ComprehensivenessSufficiency, which removes whole tokens by such scores, or "
            "remove_values."
        )
    if isinstance(method, TokenScores):
        if method.queries != "all":
            raise ValueError(
                f"queries={method.queries!r}: pairs are ranked by all queries that see them; "
                "leave queries='all'."
            )
        _check_all_layers(method.method)
        inner = method.method
        return MeasuredPairs(inner.measure, method.reduction, method.signed, inner.space)
    if isinstance(method, AttentionAttribution):
        _check_all_layers(method)
        return MeasuredPairs(method.measure, reduction, False, method.space)
    if not isinstance(method, str):
        raise TypeError(
            f"method is of type {type(method).__name__}: give a measure such as "
            f"ContributionWeights(model), TokenScores around one, or a name: {known_names()}."
        )
    if method == RANDOM:
        return RandomPairs(seed)
    if method in METHODS:
        return MeasuredPairs(METHODS[method].measure, reduction, False, METHODS[method].space)
    if method in CONTROLS:
        measure, signed, space = CONTROLS[method]
        return MeasuredPairs(measure, reduction, signed, space)
    raise ValueError(f"method={method!r} is unknown; known: {known_names()}.")


def whole_token_scorer(method: object, reduction: Reduction = "mean") -> TokenScores | None:
    """What scores whole tokens as ``method`` says; None if it scores pairs, or is no measure.

    Args:
        method: A measure, or a ``TokenScores`` around one.
        reduction: Over queries, where ``method`` does not bring its own.

    Example:
        >>> whole_token_scorer(ALTIWeights(model)).layers, whole_token_scorer("alti")
        ('mean', None)
    """
    if isinstance(method, AttentionAttribution):
        method = TokenScores(method, reduction)
    return method if isinstance(method, TokenScores) and method.ranks_whole_tokens else None


def _check_all_layers(method: AttentionAttribution) -> None:
    if method.layer is not None:
        raise ValueError(
            f"{method.get_name()} is of some layers, but pairs are ranked and removed in all: make "
            "it without layer=."
        )


def space_of(scorers: Iterable[PairScorer]) -> Space:
    """Where layers must be seen so that all of these can score them."""
    return "residual" if any(scorer.space == "residual" for scorer in scorers) else "attention"


def model_of(method: object) -> nn.Module | None:
    """The model that a measure, or ``TokenScores`` around one, belongs to; None for others."""
    if isinstance(method, TokenScores):
        method = method.method
    return method.model if isinstance(method, AttentionAttribution) else None


def known_names() -> str:
    """The names of all methods, for messages."""
    return ", ".join(map(repr, (*METHODS, *CONTROLS, RANDOM)))
