"""The hidden states that the modules of an attention layer were given.

Sinks are found by them, and the residual stream is told by them from what else is added to an
attention output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from captum_cw.capture.attention_call import AttentionCall, UnsupportedModelError, same_numbers
from captum_cw.capture.module_stack import Run

__all__ = ["GivenStates", "StateSpace", "hidden_states"]

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
    states = GivenStates.of(call, before)
    if states is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} is given no hidden states (B, T, d), so sinks "
            "cannot be found by them: choose the space 'key' or 'value'."
        )
    normed = states.by_example(states.own)
    if space == "normed":
        return normed
    # Modules of a layer are often given the same: the layer around them is what differs.
    given = [states.by_example(x) for x in states.given]
    return next((x for x in given if not same_numbers(x, normed)), normed)


@dataclass(frozen=True)
class GivenStates:
    """The hidden states that the modules of an attention layer were given, as they were given.

    Args:
        call: The attention call of the layer.
        own: Those of the attention module.
        given: Those of all modules that began since the call before, the innermost first.
    """

    call: AttentionCall
    own: Tensor
    given: list[Tensor]

    @classmethod
    def of(cls, call: AttentionCall, before: Sequence[Run]) -> GivenStates | None:
        """None where the attention module was given none."""
        own = None if call.own is None else call.own.states()
        fresh = [run.states() for run in reversed(call.running) if run not in before]
        given = [states for states in fresh if states is not None]
        return None if own is None or not given else cls(call, own, given)

    def holds(self, x: Tensor) -> bool:
        """Whether a module of the layer was given ``x``."""
        return any(same_numbers(x, states) for states in self.given)

    def by_example(self, x: Tensor) -> Tensor:
        """``x`` as ``(B, S, n)``."""
        arranged = _by_example(x, self.call)
        assert arranged is not None
        return arranged


def _by_example(states: Tensor | None, call: AttentionCall) -> Tensor | None:
    """States ``(B, S, d)``, where some modules have tokens before examples."""
    if states is None:
        return None
    shape = tuple(states.shape[:2])
    swapped = shape == (call.T, call.B) and (shape != (call.B, call.T) or _tokens_first(call))
    return states.transpose(0, 1) if swapped else states


def _tokens_first(call: AttentionCall) -> bool:
    return not getattr(call.module, "batch_first", True)
