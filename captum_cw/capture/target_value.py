"""The target of an attribution: one number an example, chosen from the output of a model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from captum_cw.capture.function_call import varies
from captum_cw.capture.outputs import predictions_of
from captum_cw.capture.rounding import in_widest

__all__ = ["Target", "linear_values", "needs_all_logits", "read_target", "target_values"]

Target = Any
"""A class or token, a tuple ``(position, token)``, a list or tensor of one an example, a callable
``(output) -> (B,)``, or None for the model's own prediction. An output ``(B, C, H, W)`` takes a
tuple ``(c, h, w)``, and an output ``(B,)`` takes None."""

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
    is_other = isinstance(output, Tensor) and output.dim() not in (2, 3)
    logits: Tensor = output if is_other else predictions_of(output)
    if len(logits) != examples:
        raise ValueError(
            f"The model returns logits of {len(logits)} examples for {examples} inputs: give the "
            f"{name} as a callable (output) -> (B,)."
        )
    if is_other:
        places = _indices(logits, target, name)
        at = torch.tensor(places, dtype=torch.long, device=logits.device)
        return logits[tuple(at.T)], places
    real = _mask_of(logits, token_masks)
    choices = _choices(target, name, examples)
    if logits.dim() == 3 and real is None and any(n is None or n < 0 for n, _ in choices):
        _check_end(logits, token_masks, name)
    places = [_place(logits, real, b, choice, name) for b, choice in enumerate(choices)]
    chosen = torch.tensor(places, dtype=torch.long, device=logits.device)
    return logits[tuple(chosen.T)], places


def _indices(output: Tensor, target: Target, name: str) -> list[tuple[int, ...]]:
    """Return the chosen place of each example in an output ``(B,)`` or ``(B, C, H, W)``."""
    B, sizes = len(output), tuple(output.shape[1:])
    if not sizes:
        if target is None:
            return [(b,) for b in range(B)]
        raise ValueError(
            f"{name}={target!r} chooses a class, but the model returns one number an example: "
            f"leave {name} out."
        )
    chosen = target if isinstance(target, list) else [target] * B
    for entry in chosen:
        is_index = isinstance(entry, tuple) and all(isinstance(n, int) for n in entry)
        if not is_index or len(entry) != len(sizes):
            raise TypeError(
                f"{name}={entry!r} is not a place in an output of shape {tuple(output.shape)}: "
                f"give a tuple of {len(sizes)} indices, a list of one an example, or a callable "
                "(output) -> (B,)."
            )
        if not all(0 <= n < size for n, size in zip(entry, sizes, strict=True)):
            raise IndexError(f"{name}={entry!r} is out of range: the model returns {sizes}.")
    if len(chosen) != B:
        raise ValueError(f"{name} has {len(chosen)} entries for {B} examples: give one an example.")
    return [(b, *entry) for b, entry in enumerate(chosen)]


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
        if isinstance(target, list) and len(target) == 1:  # one for all, as in Captum
            (target,) = target
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
    if isinstance(entry, tuple) and len(entry) == 1:
        (entry,) = entry
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


def _check_end(logits: Tensor, token_masks: Sequence[Tensor], name: str) -> None:
    """Check that the last logits do not belong to padding, if masks have another length."""
    padded = [mask for mask in token_masks if not mask[:, -1].all()]
    if padded and logits.shape[1] > 1:
        b = int((~padded[-1][:, -1]).nonzero()[0])
        raise ValueError(
            f"The model predicts at {logits.shape[1]} positions for an input of length "
            f"{padded[-1].shape[1]}, of which example {b} has padding at its end, so its last "
            f"position is unknown: give {name} as a tuple (position, class), or one example at a "
            "time without padding."
        )


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


def read_target(
    output: Any,
    last_function: Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]] | None],
    target: Target,
    contrast: Target,
    examples: int,
    token_masks: Sequence[Tensor],
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], bool]:
    """Read the target of a linearised pass.

    The arguments are those of :func:`target_values`, and ``last_function``, which returns what a
    softmax or sigmoid at the end of a model was applied to, and the function; None for others.

    Returns:
        The target's values ``(B,)``; the tensors that it is computed from, each with its gradient;
        and whether the target is linear in them.
    """
    found: list[tuple[Tensor, Tensor]] = []
    fixed: list[Tensor] = []
    is_linear = not callable(target) and not callable(contrast)

    def as_leaf(x: Any) -> Any:
        nonlocal is_linear
        last = None if varies(x) or not isinstance(x, Tensor) else last_function(x)
        if not varies(x) and last is None:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            fixed.append(x.detach().requires_grad_())
            return fixed[-1]
        source, run = last or (x, None)
        leaf = source.detach().requires_grad_()
        found.append((source, leaf))
        if run is None:
            return leaf
        is_linear = False
        return run(leaf)

    copied = pytree.tree_map(as_leaf, output)
    values = target_values(copied, target, contrast, examples, token_masks)
    leaves = [*(leaf for _, leaf in found), *fixed]
    grads = (
        torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        if found and values.requires_grad
        else ()
    )
    if not grads or any(g is not None and g.any() for g in grads[len(found) :]):
        raise ValueError(
            "The target, or a part of it, does not depend on the inputs by a gradient: the model "
            f"returns {type(output).__name__}. Give the model itself, or a callable that returns "
            "its logits. Generated ids and quantised activations have no gradient, and what comes "
            "after a sigmoid, a softmax or another gate inside of a model is held fixed."
        )
    pairs = zip(found, grads, strict=False)
    return values, [(x, g) for (x, _), g in pairs if g is not None], is_linear


def linear_values(values: Tensor, outputs: list[tuple[Tensor, Tensor]], is_linear: bool) -> Tensor:
    """Return ``<d target / d output, output>`` of each example."""
    if is_linear:
        return values.detach().float()
    B = len(values)
    total = in_widest(values.new_zeros(B))
    for x, g in outputs:
        product = in_widest(x) * in_widest(g)
        if x.dim() == 0 or len(x) != B:
            if B > 1:
                raise ValueError(
                    f"The target depends on a tensor of shape {tuple(x.shape)}, whose first "
                    f"dimension is not that of the {B} examples: give one example at a time."
                )
            product = product[None]
        total += product.reshape(B, -1).sum(1).to(total)
    return total.to(values.device, torch.float32)
