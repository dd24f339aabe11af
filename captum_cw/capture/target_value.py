"""The target of an attribution: one number an example, chosen from the output of a model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.outputs import predictions_of

__all__ = ["Target", "needs_all_logits", "target_values"]

Target = Any
"""A class or token, a tuple ``(position, token)``, a list or tensor of one an example, a callable
``(output) -> (B,)``, or None for the model's own prediction."""

#: A position, or None for the last token; and a class or token, or None for the model's prediction.
_Choice = tuple[int | None, int | None]

WAYS = (
    "give a class or token, a tuple (position, token), a list of one an example, or a callable "
    "(output) -> (B,)"
)


def needs_all_logits(*targets: Target) -> bool:
    """Whether a target may need the logits of other tokens than the last."""
    return any(
        callable(target)
        or isinstance(target, tuple)
        or (isinstance(target, Sequence) and any(isinstance(x, tuple) for x in target))
        for target in targets
    )


def target_values(
    output: Any,
    target: Target,
    contrast: Target,
    examples: int,
    token_masks: Sequence[Tensor],
) -> Tensor:
    """Return the target of each example, minus its contrast if there is one.

    Args:
        output: The output of the model.
        target: The target; None for the model's own prediction.
        contrast: The target that is subtracted; None for none.
        examples: The number of examples ``B``.
        token_masks: The padding masks of the texts, each ``(B, T)``, False at padding; that of a
            decoder last.

    Returns:
        ``(B,)``.

    Raises:
        IndexError: If a target is out of range.
        TypeError: If a target is of a wrong type, or the output does not have logits.
        ValueError: If a target does not fit the examples, is at padding, or equals its contrast.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 5.0]]])
        >>> target_values(logits, 1, 0, 1, []).tolist()
        [3.0]
    """
    if contrast is None:
        return _values(output, target, "target", examples, token_masks)[0]
    ours, chosen = _values(output, target, "target", examples, token_masks)
    theirs, opposed = _values(output, contrast, "contrast", examples, token_masks)
    if chosen is None or opposed is None:
        same = contrast is target
    else:
        same = any(a == b for a, b in zip(chosen, opposed, strict=True))
    if same:
        raise ValueError(
            f"contrast={contrast!r} is the same as the target ({target!r}), so their difference "
            "is zero: give another contrast, or none."
        )
    return ours - theirs


def _values(
    output: Any, target: Target, name: str, examples: int, token_masks: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[int, ...]] | None]:
    """Return the values ``(B,)``, and the places of the logits; None for those of a callable."""
    if callable(target):
        return _checked(target(output), name, examples), None
    logits = predictions_of(output)
    if len(logits) != examples:
        raise ValueError(
            f"The model returns logits of {len(logits)} examples for {examples} inputs: give the "
            f"{name} as a callable (output) -> (B,)."
        )
    real = _mask_of(logits, token_masks)
    places = [
        _place(logits, real, b, choice, name)
        for b, choice in enumerate(_choices(target, name, examples))
    ]
    chosen = torch.tensor(places, dtype=torch.long, device=logits.device)
    return logits[tuple(chosen.T)], places


def _checked(values: Any, name: str, examples: int) -> Tensor:
    """Return the values of a callable, ``(B,)``."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(
            f"The callable {name} returned {type(values).__name__}, but it must return a floating "
            f"tensor of shape ({examples},)."
        )
    if values.dim() == 0 and examples == 1:
        values = values.view(1)
    if values.shape != (examples,):
        raise ValueError(
            f"The callable {name} returned shape {tuple(values.shape)}, but it must return one "
            f"number an example, ({examples},)."
        )
    if not values.requires_grad:
        raise ValueError(
            f"The callable {name} returned a tensor without a gradient: compute it from the "
            "output by differentiable functions, without detach or argmax."
        )
    found: Tensor = values
    return found


def _choices(target: Target, name: str, examples: int) -> list[_Choice]:
    """Return the position and token of each example."""
    if isinstance(target, Tensor) or type(target).__module__ == "numpy":
        target = target.tolist()
    if not isinstance(target, list):
        return [_choice(target, name)] * examples
    if len(target) != examples:
        raise ValueError(
            f"{name} has {len(target)} entries for {examples} examples: give one an example, or "
            "one for all."
        )
    return [_choice(entry, name) for entry in target]


def _choice(entry: Any, name: str) -> _Choice:
    if entry is None:
        return None, None
    position, token = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
    try:
        if isinstance(token, bool) or isinstance(position, bool):
            raise TypeError
        place = None if position is None else operator.index(position)
        return place, None if token is None else operator.index(token)
    except TypeError:
        raise TypeError(f"{name}={entry!r} is not a target: {WAYS}.") from None


def _mask_of(logits: Tensor, token_masks: Sequence[Tensor]) -> Tensor | None:
    """Return the padding mask of the tokens that logits ``(B, T, V)`` belong to; None if unknown.

    Logits of the last token alone belong to the last token, whatever the mask.
    """
    if logits.dim() == 2:
        return None
    fitting = [mask for mask in token_masks if mask.shape == logits.shape[:2]]
    return fitting[-1].to(logits.device) if fitting else None


def _place(
    logits: Tensor, real: Tensor | None, b: int, choice: _Choice, name: str
) -> tuple[int, ...]:
    """Return the indices of the chosen logit of one example."""
    position, token = choice
    if logits.dim() == 2:
        if position is not None:
            raise ValueError(
                f"{name}={(position, token)!r} has a position, but the model predicts one class "
                "for each example: give the class alone."
            )
        return b, _in_range(logits[b], token, name)
    T = logits.shape[1]
    tokens = range(T) if real is None else real[b].nonzero()[:, 0].tolist()
    if position is None:
        t = tokens[-1]
    elif position < 0:
        if -position > len(tokens):
            raise IndexError(f"{name} has position {position}, but example {b} has {len(tokens)}.")
        t = tokens[position]
    else:
        if position >= T:
            raise IndexError(f"{name} has position {position}, but the model predicts {T}.")
        if position not in tokens:
            raise ValueError(
                f"{name} has position {position}, which is padding in example {b}: negative "
                "positions count from the last token of each example."
            )
        t = position
    return b, t, _in_range(logits[b, t], token, name)


def _in_range(scores: Tensor, token: int | None, name: str) -> int:
    if token is None:
        return int(scores.argmax())
    if not 0 <= token < len(scores):
        raise IndexError(
            f"{name}={token} is out of range: the model predicts 0..{len(scores) - 1}."
        )
    return token
