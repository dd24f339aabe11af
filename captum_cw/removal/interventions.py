"""Context managers under which a model runs with value vectors removed or scaled.

To remove the pair ``(h, j)`` is to set the projected value ``v~_j^h`` to zero for every query that
sees token ``j``. Attention is not renormalised (arXiv 2606.07604, section 5.2). One pass removes
layer by layer, so later layers see what earlier layers have lost.

All queries decide what is removed, later ones included. This is right for an explanation and wrong
for a cache policy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_cw.capture.model import unwrapped
from captum_cw.capture.target_value import Target
from captum_cw.removal.changes import FixedChange, RankedRemoval, Scaled
from captum_cw.removal.options import (
    RemovalKeywords,
    check_rate,
    options_from,
    removal_factors,
)
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import PairScorer, TokenMethod, model_of, pair_scorer, scorer_of
from captum_cw.removal.target_scores import TargetScorer, target_scorer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

__all__ = ["remove_tokens", "remove_values", "scale_values"]


@contextmanager
def remove_tokens(
    model: nn.Module,
    method: object,
    rate: float,
    which: Which = "bottom",
    *,
    target: Target = None,
    contrast: Target = None,
    **options: Unpack[RemovalKeywords],
) -> Iterator[None]:
    """Remove the pairs of head and token that a method scores lowest, or highest.

    Every forward pass of ``model`` inside this context is changed. Pairs are scored and ranked
    within each example. Padding is known from the attention mask; without a mask every token
    counts.

    Each pass ranks its own text, except in generation: the pass over the prompt decides what is
    removed, this stays removed, and generated tokens are kept. This holds under ``model.generate``
    with and without a key-value cache, and in a loop of your own with a cache. A ``generate`` that
    reads its prompt in parts, or other texts beside it (assistants, guidance), is refused.

    Learned virtual tokens (prompt and prefix tuning) are neither ranked nor removed. In a model of
    images and text, only the layers over the tokens of ``input_ids`` are changed, not those of a
    vision tower.

    Args:
        model: The model.
        method: How pairs are scored. A measure such as ``ContributionWeights(model)``; a
            ``TokenScores`` around one, whose ``reduction`` and ``signed`` count; or a name:
            ``"contribution"``, ``"vwon"``, ``"vw"``, ``"attention"``, ``"random"``, a control,
            ``"joint"``, ``"effect"``, ``"sensitivity"`` or ``"target"``. Measures of a target are
            summed over queries, and always scored in an unchanged pass.
            With ``granularity="token"`` also ``"input"``; a measure of whole tokens, such as
            ``ALTIWeights(model)``; or scores ``(B, T)``, as a tensor or as a callable of the
            model's keyword arguments.
        rate: The fraction of pairs to remove, in [0, 1].
        which: ``"bottom"`` (sufficiency) or ``"top"`` (comprehensiveness).
        target: What measures of a target explain, as for
            :class:`~captum_cw.TargetContributions`. None is the sum of the logits that a model
            gives the tokens of its own text, or the class that a classifier predicts.
        contrast: A second target, which is subtracted: what speaks for the target, and not for
            this?
        options: ``reduction``, ``scoring``, ``ranking``, ``granularity``, ``rate_of``,
            ``protect_sinks``, ``sink_threshold``, ``sink_space`` and ``seed``.
            :class:`~captum_cw.removal.options.RemovalOptions` describes them.

    Raises:
        TypeError: If ``model`` or ``method`` is of another type.
        ValueError: If a choice is unknown, ``rate`` is not in [0, 1], or ``method`` belongs to
            another model.
        UnsupportedModelError: If the model has cross-attention.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> with remove_tokens(model, ContributionWeights(model), 0.5):
        ...     logits = model(ids).logits
    """
    check_rate(rate, which)
    chosen = options_from(options)
    scorer: PairScorer | TokenMethod | TargetScorer | None
    scorer = target_scorer(method, unwrapped(model), chosen.granularity)
    if scorer is None:
        for name, given in (("target", target), ("contrast", contrast)):
            if given is not None:
                raise ValueError(
                    f"{name}={given!r}, but method={method!r} does not explain a target."
                )
        if model_of(method) not in (None, unwrapped(model)):
            raise ValueError(
                "method belongs to another model: create it with this model, or give its name. "
                "(ComprehensivenessSufficiency accepts scores of another model.)"
            )
        settings = method, chosen.reduction, chosen.seed
        scorer = scorer_of(*settings) if chosen.granularity == "token" else pair_scorer(*settings)
    elif contrast is not None:
        if target is None:
            raise ValueError(f"contrast={contrast!r}, but there is no target: give both.")
        scorer = replace(scorer, contrast=contrast)
    with RankedRemoval(model, scorer, rate, which, chosen, target=target).in_force():
        yield


@contextmanager
def remove_values(model: nn.Module, masks: Sequence[Tensor]) -> Iterator[None]:
    """Remove the values that masks choose, in every forward pass of ``model`` inside this context.

    Args:
        model: The model.
        masks: For each attention layer in execution order a boolean mask ``(B, H, S)``, True at
            the values to remove. ``B`` or ``H`` may be 1, for all examples or heads. Layers of
            cross-attention and of a vision tower have a mask too. A mask without True may have any
            shape, such as ``torch.zeros(1, 1, 1, dtype=torch.bool)``.

    Raises:
        TypeError: If a mask is not a boolean tensor of three dimensions.
        ValueError: If the masks do not fit a pass: their number or their shapes.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> masks = [torch.zeros(1, 4, 5, dtype=torch.bool) for _ in range(2)]
        >>> masks[0][:, :, 1] = True  # " capital", in all heads of the first layer
        >>> with remove_values(model, masks):
        ...     logits = model(ids).logits
    """
    for number, mask in enumerate(masks):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3:
            what = (
                f"{mask.dtype} of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else f"of type {type(mask).__name__}"
            )
            raise TypeError(f"Mask {number} is {what}: give boolean tensors (B, H, S).")
    factors = [removal_factors(mask) for mask in masks]
    with FixedChange(model, factors, every_layer=True).in_force():
        yield


@contextmanager
def scale_values(
    model: nn.Module,
    factor: float,
    positions: int | Sequence[int],
    layers: int | Sequence[int] | None = None,
) -> Iterator[None]:
    """Scale the values of some tokens, in every forward pass of ``model`` inside this context.

    Args:
        model: The model.
        factor: A finite factor; 0 removes the values, 1 keeps them.
        positions: Positions of tokens in each example, without padding; negative positions count
            from the end.
        layers: Indices of attention layers in execution order, without those of a vision tower;
            None for all.

    Raises:
        ValueError: If ``factor`` is not finite.
        IndexError: If a position or a layer does not exist in a pass.
        UnsupportedModelError: If the model has cross-attention.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> with scale_values(model, 0.5, positions=0, layers=[1]):
        ...     logits = model(ids).logits
    """
    try:
        is_finite = math.isfinite(factor)
    except TypeError:
        is_finite = False
    if not is_finite:
        raise ValueError(f"factor={factor!r} is not a finite number.")
    places = _numbers("positions", positions)
    chosen = None if layers is None else _numbers("layers", layers)
    with Scaled(model, float(factor), places, chosen).in_force():
        yield


def _numbers(name: str, given: int | Sequence[int]) -> list[int]:
    """Return one index or several as a list."""
    several = given if isinstance(given, Iterable) else [given]
    try:
        return [operator.index(number) for number in several]
    except TypeError:
        raise TypeError(f"{name}={given!r}: give an index, or a list of indices.") from None
