"""The hidden states that the modules of an attention layer receive.

They are used to find sinks, and to recognise the residual stream among the tensors that are added
to an attention output.
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
    """Return the states of the tokens of an attention call, ``(B, S, n)``, with joined heads.

    Args:
        call: The attention call.
        space: The states to return: the ``"normed"`` input of the attention layer, the
            ``"residual"`` stream before its norm, or the ``"key"`` or ``"value"`` vectors.
        before: The modules that ran at the call before. Their inputs belong to earlier layers.

    Raises:
        UnsupportedModelError: If the attention module does not receive hidden states.
    """
    if space in ("key", "value"):
        vectors = call.key if space == "key" else call.value
        if vectors is None:
            raise UnsupportedModelError(
                f"{type(call.module).__name__} multiplies queries and keys by itself, so its keys "
                "are unknown and cannot show sinks: choose another space."
            )
        return vectors.transpose(1, 2).flatten(2)
    states = GivenStates.of(call, before)
    if states is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} does not receive hidden states (B, T, d), so they "
            "cannot show sinks: choose the space 'key' or 'value'."
        )
    normed = states.by_example(states.own)
    if space == "normed":
        return normed
    # The modules of a layer often receive the same states; those of the layer itself differ.
    given = [states.by_example(x) for x in states.given]
    return next((x for x in given if not same_numbers(x, normed)), normed)


@dataclass(frozen=True)
class GivenStates:
    """The hidden states that the modules of an attention layer received, in their own layout.

    Args:
        call: The attention call of the layer.
        own: The input of the attention module.
        given: The inputs of all modules that started since the call before, innermost first.
    """

    call: AttentionCall
    own: Tensor
    given: list[Tensor]

    @classmethod
    def of(cls, call: AttentionCall, before: Sequence[Run]) -> GivenStates | None:
        """Collect the states; None if the attention module did not receive hidden states."""
        own = None if call.own is None else call.own.states()
        fresh = [run.states() for run in reversed(call.running) if run not in before]
        given = [states for states in fresh if states is not None]
        return None if own is None or not given else cls(call, own, given)

    def holds(self, x: Tensor) -> bool:
        """Whether a module of the layer received ``x``."""
        return any(same_numbers(x, states) for states in self.given)

    def by_example(self, x: Tensor) -> Tensor:
        """Return ``x`` in the layout ``(B, S, n)``, also if its first dimension is the tokens."""
        call, shape = self.call, tuple(x.shape[:2])
        tokens_first = not getattr(call.module, "batch_first", True)
        swapped = shape == (call.T, call.B) and (shape != (call.B, call.T) or tokens_first)
        return x.transpose(0, 1) if swapped else x
