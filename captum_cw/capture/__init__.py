"""Observe a running model: its attention calls, output projections and adapters.

:class:`Observation` observes one forward pass and hands over each attention layer as a
:class:`captum_cw.functional.AttentionLayer`. It does not know models by name. It uses the queries,
keys and values of the attention call, weights that are recomputed from them and checked against the
head outputs, and the linear layer that reads those head outputs.
"""

from captum_cw.capture.adapters import register_adapter
from captum_cw.capture.attention import changed_values
from captum_cw.capture.attention_call import Kind
from captum_cw.capture.hidden_states import StateSpace
from captum_cw.capture.listeners import ValueChange, is_observed
from captum_cw.capture.observation import (
    Execution,
    Observation,
    UnsupportedModelError,
    names_of,
)
from captum_cw.capture.passes import around_passes
from captum_cw.capture.restoring import evaluating

__all__ = [
    "Execution",
    "Kind",
    "Observation",
    "StateSpace",
    "UnsupportedModelError",
    "ValueChange",
    "around_passes",
    "changed_values",
    "evaluating",
    "is_observed",
    "names_of",
    "register_adapter",
]
