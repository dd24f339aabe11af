"""Forward passes in which value vectors are removed or scaled.

Removing the pair ``(h, j)`` sets the projected value ``v~_j^h`` to zero for every query that sees
``j``; attention is not renormalised (arXiv 2606.07604, section 5.2). It is done layer by layer in
one pass, so that a change reaches the later layers. What is removed is decided from all queries,
later ones included: right for an explanation, wrong for a cache policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_cw.capture.model import unwrapped
from captum_cw.removal.changes import CleanRemoval, FixedChange, Intervention, OnlineRemoval, Scaled
from captum_cw.removal.options import RemovalKeywords, RemovalOptions, check_rate, kept
from captum_cw.removal.ranking import Which
from captum_cw.removal.scoring import (
    PairScorer,
    TokenMethod,
    model_of,
    pair_scorer,
    scorer_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

__all__ = ["remove_tokens", "remove_values", "scale_values"]


@contextmanager
def remove_tokens(
    model: nn.Module,
    method: object,
    rate: float,
    which: Which = "bottom",
    **options: Unpack[RemovalKeywords],
) -> Iterator[None]:
    """Every forward pass of ``model`` removes the pairs of head and token that score low, or high.

    Pairs are scored and ranked within each example. Under ``model.generate``, with or without a
    key-value cache, and in passes that go on with a cache, what is removed is decided when the
    prompt is read, and generated tokens stay; a ``generate`` that reads its prompt in parts, or
    other texts beside it (assistants, guidance), is refused. Any other pass ranks its own text.
    Padding is known from the mask that the model is given; without one, every token counts. Learned
    virtual tokens (prompt and prefix tuning) are neither ranked nor removed. Of a model of images
    and text, the layers count whose queries are the tokens of ``input_ids``; those of a vision
    tower are left alone.

    Args:
        model: The model.
        method: A measure such as ``ContributionWeights(model)``, ``TokenScores`` around one
            (whose ``reduction`` and ``signed`` count), or a name: ``"contribution"``, ``"vwon"``,
            ``"vw"``, ``"attention"``, ``"random"`` or a control. With ``granularity="token"`` also
            a measure that scores whole tokens, such as ``ALTIWeights(model)``; or a callable of
            the model's keyword arguments, or a tensor, that gives ``(B, T)`` scores.
        rate: The fraction of pairs to remove, in [0, 1].
        which: ``"bottom"`` (sufficiency) or ``"top"`` (comprehensiveness).
        options: How pairs are scored, ranked and protected, as
            :class:`~captum_cw.removal.options.RemovalOptions` says: ``reduction``, ``scoring``,
            ``ranking``, ``granularity``, ``rate_of``, ``protect_sinks``, ``sink_threshold``,
            ``sink_space`` and ``seed``.

    Raises:
        TypeError, ValueError: If a choice is unknown, or ``rate`` does not lie in [0, 1].

    Example:
        >>> with remove_tokens(model, ContributionWeights(model), 0.5):
        ...     logits = model(input_ids).logits
    """
    check_rate(rate, which)
    chosen = RemovalOptions(**options)
    if model_of(method) not in (None, unwrapped(model)):
        raise ValueError(
            "method belongs to another model: make it with this one, or give its name. (Scores of "
            "another model are for ComprehensivenessSufficiency.)"
        )
    scorer: PairScorer | TokenMethod
    if chosen.granularity == "token":
        scorer = scorer_of(method, chosen.reduction, chosen.seed)
    else:
        scorer = pair_scorer(method, chosen.reduction, chosen.seed)
    if chosen.scores_before:
        removal: Intervention = CleanRemoval(model, scorer, rate, which, chosen)
    else:
        assert not isinstance(scorer, TokenMethod)
        removal = OnlineRemoval(model, scorer, rate, which, chosen)
    with removal.in_force():
        yield


@contextmanager
def remove_values(model: nn.Module, masks: Sequence[Tensor]) -> Iterator[None]:
    """Every forward pass of ``model`` is without the given values.

    Args:
        model: The model.
        masks: For each attention layer, cross-attention included, in execution order,
            ``(B, H, S)`` boolean, True where the value is removed; of size 1 in ``B`` or ``H`` for
            all examples or heads. The layers of a vision tower are among them; a mask without True
            may have any shape, such as ``torch.zeros(1, 1, 1, dtype=torch.bool)``.

    Raises:
        TypeError, ValueError: If the masks are not boolean, or do not fit the pass that is run.

    Example:
        >>> masks = [torch.zeros(1, 4, 5, dtype=torch.bool) for _ in range(2)]
        >>> masks[0][:, :, 1] = True
        >>> with remove_values(model, masks):
        ...     logits = model(input_ids).logits
    """
    for number, mask in enumerate(masks):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3:
            what = (
                f"{mask.dtype} of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else f"of type {type(mask).__name__}"
            )
            raise TypeError(f"Mask {number} is {what}: give boolean tensors (B, H, T).")
    with FixedChange(model, [kept(mask) for mask in masks], every_layer=True).in_force():
        yield


@contextmanager
def scale_values(
    model: nn.Module,
    factor: float,
    positions: int | Sequence[int],
    layers: int | Sequence[int] | None = None,
) -> Iterator[None]:
    """Every forward pass of ``model`` has the values of some tokens multiplied by a factor.

    Args:
        model: The model.
        factor: A finite number; 0 removes the values, 1 leaves them.
        positions: Places among the real tokens of each example; negative ones count from its end.
        layers: Places of attention layers in execution order, those of a vision tower left out;
            None for all.

    Raises:
        ValueError: If ``factor`` is not finite.
        IndexError: If a position or a layer does not exist in the pass that is run.

    Example:
        >>> with scale_values(model, 0.5, positions=0, layers=[1]):
        ...     logits = model(input_ids).logits
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor={factor!r} is not finite.")
    places = [positions] if isinstance(positions, int) else list(positions)
    chosen = [layers] if isinstance(layers, int) else layers
    with Scaled(model, factor, places, None if chosen is None else list(chosen)).in_force():
        yield
