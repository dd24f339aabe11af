"""The maps of single heads, of which an explanation keeps the keys that matter most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_cw import functional
from captum_cw.functional import Decomposition, Measure
from captum_cw.measures import SIGNED

__all__ = ["FACTORS", "OF_HEADS", "HeadMaps", "most_important"]

#: The factors of a contribution (Eq. 14), and the functions of a layer that compute them.
FACTORS: dict[str, Measure] = {
    "attention": functional.attention,
    "relative_norm": functional.relative_norm,
    "cosine": functional.cosine_with("inter"),
}
#: The registered measures that :meth:`HeadMaps.measure` computes from what is kept of a head.
OF_HEADS = ("attention", "vw", "vwon", "contribution", SIGNED)


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """The heads of one layer: for each query, the ``K`` keys that matter most.

    The importance of a key is its attention or its absolute contribution, each divided by the
    largest of the row, whichever is larger. Keys are in descending order of importance. If a query
    sees fewer than ``K`` keys, the remaining entries have an attention of 0.

    Args:
        name: The layer's name in the model.
        keys: The positions of the keys, ``(H, T, K)``, int32.
        attention: Attention weights, ``(H, T, K)`` float32, like the next two without a unit
            (Eq. 14).
        relative_norm: Value norm divided by output norm, ``(H, T, K)``; 0 if the output is zero.
        cosine: Cosine of value and output, ``(H, T, K)``; 0 if the output is zero.
        output_norm: The norm of the layer's output, ``(T,)``, in the unit of the hidden states; NaN
            if it is unknown.
        share: The sum of each head's contributions over all keys, ``(H, T)``.
        effect: What each head adds to the target of the explanation, over all of its queries and
            keys, ``(H,)``, in the unit of the target; None without a target.
    """

    name: str
    keys: Tensor
    attention: Tensor
    relative_norm: Tensor
    cosine: Tensor
    output_norm: Tensor
    share: Tensor
    effect: Tensor | None = None

    @classmethod
    def from_decomposition(cls, name: str, factors: Decomposition, top_k: int) -> HeadMaps:
        """Keep the most important keys of dense maps.

        Args:
            name: The layer's name in the model.
            factors: The factors of the contributions, ``(H, T, S)`` each.
            top_k: The number of keys to keep for each query, at most ``S``.

        Returns:
            The heads, with an unknown output norm.
        """
        attention, relative_norm, cosine, contribution = factors
        keys = most_important(attention, contribution, top_k)
        return cls(
            name,
            keys=keys.int(),
            attention=attention.gather(-1, keys),
            relative_norm=relative_norm.gather(-1, keys),
            cosine=cosine.gather(-1, keys),
            output_norm=attention.new_full((attention.shape[1],), torch.nan),
            share=contribution.sum(-1),
        )

    def measure(self, name: str) -> Tensor:
        """Compute a measure at the keys that are kept, ``(H, T, K)``.

        Args:
            name: ``"attention"``, ``"vw"``, ``"vwon"``, ``"contribution"`` (its absolute value) or
                ``"contribution-signed"``.

        Raises:
            ValueError: If the name is not one of these.

        Example:
            >>> layer = explain(model, tokenizer, "The capital of France is").heads[0]
            >>> layer.measure("contribution").shape
            torch.Size([4, 5, 5])
        """
        match name:
            case "attention":
                return self.attention
            case "vwon":
                return self.attention.abs() * self.relative_norm
            case "vw":
                return self.measure("vwon") * self.output_norm[:, None]
            case "contribution-signed":
                return self.attention * self.relative_norm * self.cosine
            case "contribution":
                return self.measure(SIGNED).abs()
        raise ValueError(
            f"measure={name!r} is not known for single heads: choose {', '.join(OF_HEADS)}."
        )


def most_important(attention: Tensor, contribution: Tensor, top_k: int) -> Tensor:
    """Find the keys that matter most to each query (see :class:`HeadMaps`).

    Args:
        attention: ``(H, T, S)``.
        contribution: ``(H, T, S)``.
        top_k: The number of keys, at most ``S``.

    Returns:
        The keys, most important first, ``(H, T, min(top_k, S))``.
    """
    importance = torch.maximum(_relative(attention), _relative(contribution))
    return importance.topk(min(top_k, attention.shape[-1])).indices


def _relative(x: Tensor) -> Tensor:
    """Divide absolute values by the largest of their row; a row of zeros stays zero."""
    x = x.abs()
    return (x / x.amax(-1, keepdim=True)).nan_to_num(0)
