"""Scores of tokens for the quantity that a metric measures: contributions to its own target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_cw import measures
from captum_cw.attr import InputContributions, TargetContributions, TokenScores

__all__ = ["TargetScores"]


@dataclass(frozen=True)
class TargetScores:
    """Sizes of the contributions of whole tokens, by values or by inputs.

    Args:
        name: ``"target"`` for values, which all heads and layers read, or ``"input"``.
    """

    name: str

    def of(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Tensor | Callable[[Any], Tensor],
    ) -> Tensor:
        """Return the scores of one batch, ``(B, T)``.

        Args:
            model: The model.
            inputs: Its arguments.
            target: The token or class of each example, ``(B,)``; or a callable of the output.
        """
        if self.name == measures.INPUT:
            shares = InputContributions(model).attribute(inputs, target)
            found: Tensor = shares["input_ids"] if isinstance(shares, Mapping) else shares
            return found.abs()
        method = TargetContributions(model)
        summed = TokenScores(method, reduction="sum", layers="sum", heads="sum")
        scores: Tensor = summed.attribute(inputs, target=target)
        return scores
