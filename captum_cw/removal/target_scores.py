"""Scores of pairs and tokens by measures of a target, in passes over the unchanged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_cw import measures
from captum_cw.attr import EffectContributions, InputContributions, TokenScores
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.outputs import predictions_of
from captum_cw.capture.target_value import Target
from captum_cw.functional import AnyLayer, Reduction, token_scores
from captum_cw.removal.clean_pass import CleanPass, check_finite, check_kind
from captum_cw.removal.options import Granularity
from captum_cw.removal.virtual_tokens import behind

__all__ = ["OwnText", "TargetScorer", "TextValue", "target_scorer"]

TextValue = Literal["logits", "expected_logits", "log_likelihood"]
"""What a model gives the tokens of its own text: the sum of their logits, the sum of the logits
that it expects (weighted by its probabilities, which are held fixed), or their mean
log-likelihood."""


@dataclass(frozen=True)
class OwnText:
    """A target: what the model gives the tokens of its own text, each after those before it.

    Args:
        ids: ``(B, T)``.
        counted: ``(B, T - 1)``, True at the tokens from the second on that count.
        value: Which value of the tokens.

    Example:
        >>> target = OwnText(input_ids, torch.ones(1, 4, dtype=torch.bool))
        >>> target(model(input_ids)).shape
        torch.Size([1])
    """

    ids: Tensor
    counted: Tensor
    value: TextValue = "logits"

    @classmethod
    def of(cls, ids: Tensor, real: Tensor) -> OwnText:
        """Return the target in which all tokens count that are not padding.

        Args:
            ids: ``(B, T)``.
            real: ``(B, S)``, False at padding and at tokens before the text.
        """
        mask = real[:, -ids.shape[1] :]
        return cls(ids, mask[:, 1:] & mask[:, :-1])

    def __call__(self, output: Any) -> Tensor:
        """Return the value of each example, ``(B,)``."""
        logits = predictions_of(output)[:, -self.ids.shape[1] :][:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids, counted = (x.to(logits.device) for x in (self.ids[:, 1:], self.counted))
        if self.value == "expected_logits":
            found = (logits.detach().softmax(-1) * logits).sum(-1)
        else:
            found = logits.gather(-1, ids[..., None])[..., 0]
        if self.value == "log_likelihood":
            found = (found - logits.logsumexp(-1)) / counted.sum(1, keepdim=True)
        return found.masked_fill(~counted, 0).sum(1)


@dataclass(frozen=True)
class TargetScorer:
    """Scores the pairs of all layers, or whole tokens, by what they do for a target.

    Args:
        method: The measure.
        reduction: The reduction over queries.
        signed: Whether signs are kept.
        value: What the measure explains if a text has no other target.
        contrast: A second target, which is subtracted; None for none.
    """

    method: AttentionAttribution | InputContributions
    reduction: Reduction = "sum"
    signed: bool = False
    value: TextValue = "logits"
    contrast: Target = None

    @property
    def needs_shares(self) -> bool:
        """Whether :meth:`of` needs the shares of a clean pass."""
        return isinstance(self.method, EffectContributions)

    def of(
        self, inputs: Mapping[str, Any], target: Target, clean: CleanPass
    ) -> Tensor | list[Tensor]:
        """Return the scores of one batch.

        Args:
            inputs: The arguments of the model.
            target: The target, as :class:`~captum_cw.TargetContributions` takes it.
            clean: The clean pass over the same text, with the shares that the measure needs.

        Returns:
            For each layer the scores of pairs ``(B, H, S)``; or scores of whole tokens, ``(B, S)``.
        """
        real = clean.real[0]
        S = real.shape[1]
        if isinstance(self.method, InputContributions):
            shares = self.method.attribute(inputs, target, contrast=self.contrast)
            of_tokens = shares["input_ids"] if isinstance(shares, Mapping) else shares
            found = of_tokens if self.signed else of_tokens.abs()
            return behind(found.to(real.device), S)
        measure = self.method.measure

        def on_layer(execution: Execution, layer: AnyLayer) -> Tensor:
            check_kind(execution)
            scores = token_scores(layer, measure, self.reduction, signed=self.signed)
            check_finite(scores, execution.name)
            return behind(scores.to(real.device), S)

        options: dict[str, Any] = {"text_only": True}
        if self.needs_shares:
            options["shares"] = clean.shares
        results, _ = self.method.observe(
            inputs, None, on_layer, target=target, contrast=self.contrast, **options
        )
        if len(results) != len(clean.real):
            raise UnsupportedModelError(
                f"With gradients, the model ran {len(results)} attention layers over the text, and "
                f"{len(clean.real)} without."
            )
        return [scores for _, scores in results]


def target_scorer(
    method: object, model: nn.Module, granularity: Granularity
) -> TargetScorer | None:
    """Return the scorer of a measure of a target; None for other methods.

    Args:
        method: The measure, ``TokenScores`` around one, or its name.
        model: The model.
        granularity: What is removed.

    Raises:
        ValueError: If the measure is of another model, of some layers or queries, or scores whole
            tokens only.
    """
    entry = measures.find(method) if isinstance(method, str) else None
    if entry is not None and entry.explains_target:
        method = entry.of_model(model)
    scores = method if isinstance(method, TokenScores) else None
    own = method if scores is None else scores.method
    of_layers = isinstance(own, AttentionAttribution) and own.explains_target
    if not of_layers and not isinstance(own, InputContributions):
        return None
    assert isinstance(own, (AttentionAttribution, InputContributions))
    name = own.name
    if own.model not in (None, model):
        raise ValueError(
            f"{name!r} belongs to another model: create it with this model, or give its name."
        )
    if isinstance(own, InputContributions):
        if granularity != "token":
            raise ValueError(
                f"{name!r} scores whole tokens, not pairs of head and token: use "
                "granularity='token'."
            )
        return TargetScorer(own, value="log_likelihood")
    if own.layer is not None or (scores is not None and scores.queries != "all"):
        raise ValueError(
            f"{name!r} is of some layers or queries, but tokens are ranked by all of them: make it "
            "without layer= and queries=."
        )
    value: TextValue = "log_likelihood" if name == measures.TARGET else "logits"
    if scores is None:
        return TargetScorer(own, value=value)
    return TargetScorer(own, scores.reduction, scores.signed, value)
