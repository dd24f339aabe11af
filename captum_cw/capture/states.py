"""The hidden states of the tokens of an attention call, by which sinks are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from captum_cw.capture.calls import AttentionCall, UnsupportedModelError, same_numbers
from captum_cw.capture.running import Run

__all__ = ["StateSpace", "hidden_states"]

StateSpace = Literal["normed", "residual", "key", "value"]


def hidden_states(call: AttentionCall, space: StateSpace, before: Sequence[Run]) -> Tensor:
    """The states of the tokens of a call, ``(B, S, n)``; heads are put side by side.

    Args:
        call: The call.
        space: Which states: the ``"normed"`` input of the attention layer, the ``"residual"``
            stream that was normalised to it, or its ``"key"`` or ``"value"`` vectors.
        before: What was running at the call before: what it was given is of an earlier layer.

    Raises:
        UnsupportedModelError: If the attention module is not given hidden states.
    """
    if space in ("key", "value"):
        vectors = call.key if space == "key" else call.value
        if vectors is None:
            raise UnsupportedModelError(
                f"{type(call.module).__name__} multiplies queries and keys by itself, so sinks "
                "cannot be found by keys: choose another space."
            )
        return vectors.transpose(1, 2).flatten(2)
    # Modules of a layer are often given the same: the layer around them is what differs.
    fresh = [_by_example(run.states(), call) for run in reversed(call.running) if run not in before]
    given = [states for states in fresh if states is not None]
    if not given or call.own is None or call.own.states() is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} is given no hidden states (B, T, d), so sinks "
            "cannot be found by them: choose the space 'key' or 'value'."
        )
    normed = _by_example(call.own.states(), call)
    assert normed is not None
    if space == "normed":
        return normed
    return next((states for states in given if not same_numbers(states, normed)), normed)


def _by_example(states: Tensor | None, call: AttentionCall) -> Tensor | None:
    """States ``(B, S, d)``, where some modules have tokens before examples."""
    if states is None:
        return None
    shape = tuple(states.shape[:2])
    swapped = shape == (call.T, call.B) and (shape != (call.B, call.T) or _tokens_first(call))
    return states.transpose(0, 1) if swapped else states


def _tokens_first(call: AttentionCall) -> bool:
    return not getattr(call.module, "batch_first", True)
