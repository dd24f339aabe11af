"""What the attention layers of a model look like, and what maps of them would take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from captum_cw.capture import Execution, Kind
from captum_cw.capture.forward_call import two_tokens
from captum_cw.capture.run import Inputs, Runner
from captum_cw.functional import AttentionLayer

__all__ = ["LayerOverview", "attention_layers", "maps_bytes"]

#: What attention modules of transformers call their window.
WINDOW = "sliding_window"


@dataclass(frozen=True)
class LayerOverview:
    """One execution of an attention layer.

    Args:
        name: Of the module, as in ``model.get_submodule(name)``.
        module: Its class.
        kind: Whether it attends to its own tokens (``"self"``) or to others (``"cross"``).
        heads: ``H``.
        key_value_heads: How many heads there are of keys and values, shared by those of queries.
        head_size: ``d_h``, of the values.
        causal: Whether no query sees a later token.
        window: How many tokens a query sees, as the module says; None where it says nothing.
        gate: Whether head outputs are multiplied before ``W_O``, by an output gate or a norm.
        rows_below_one: Whether attention sums to less than one: where learned sinks take the rest,
            or weights are changed after the softmax.
        projection: The module in which ``W_O`` was found.
    """

    name: str
    module: str
    kind: Kind
    heads: int
    key_value_heads: int
    head_size: int
    causal: bool
    window: int | None
    gate: bool
    rows_below_one: bool
    projection: str | None


def attention_layers(model: nn.Module, inputs: Inputs | None = None) -> list[LayerOverview]:
    """Runs a model once and tells what its attention layers look like.

    Args:
        model: The model.
        inputs: As :class:`captum_cw.AttentionWeights` takes them; None for two tokens.

    Returns:
        The layers in execution order, cross-attention included.

    Raises:
        UnsupportedModelError: If no measure can be computed of the model.
        ValueError: If ``inputs`` is None and the model reads no tokens.

    Example:
        >>> first, second = attention_layers(model)
        >>> first.name, first.heads, first.key_value_heads, first.head_size, first.causal
        ('model.layers.0.self_attn', 4, 2, 8, True)
    """
    if inputs is None:
        inputs = two_tokens(model)
    if inputs is None:
        needed = getattr(model, "main_input_name", "other inputs")
        raise ValueError(
            f"{type(model).__name__} reads {needed}, not tokens: give inputs, as in "
            "captum_cw.models.inspection.attention_layers(model, inputs)."
        )
    found, _ = Runner(model, kind="all").observe(inputs, _seen)
    return [layer for _, layer in found]


def _seen(execution: Execution, layer: AttentionLayer) -> LayerOverview:
    window = getattr(execution.module, WINDOW, None)
    attention = layer.weights(slice(layer.T - 1, layer.T))
    return LayerOverview(
        name=execution.name,
        module=type(execution.module).__name__,
        kind=execution.kind,
        heads=layer.H,
        key_value_heads=layer.value.shape[1],
        head_size=layer.value.shape[3],
        causal=layer.mask.causal,
        window=window if isinstance(window, int) and window > 0 else None,
        gate=layer.gate is not None,
        rows_below_one=bool((attention.sum(-1) < 1 - 1e-3).any()),
        projection=execution.projection,
    )


def maps_bytes(layers: Iterable[LayerOverview], length: int) -> int:
    """What the maps ``(H, T, S)`` of all layers take, in float32, of one text.

    Args:
        layers: The layers.
        length: ``T`` and ``S``.

    Example:
        >>> maps_bytes(attention_layers(model), 512) == 2 * 4 * 512**2 * 4
        True
    """
    return 4 * sum(layer.heads for layer in layers) * length**2
