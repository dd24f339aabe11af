"""An overview of a model's attention layers, and the memory that their maps would need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from captum_cw.capture import Execution, Kind
from captum_cw.capture.model import two_tokens
from captum_cw.capture.run import Inputs, Runner
from captum_cw.functional import AttentionLayer

__all__ = ["LayerOverview", "attention_layers", "maps_bytes"]

#: The attribute with the window size in the attention modules of transformers.
WINDOW = "sliding_window"


@dataclass(frozen=True)
class LayerOverview:
    """One execution of an attention layer.

    Args:
        name: The name of the module, as in ``model.get_submodule(name)``.
        module: The class of the module.
        kind: ``"self"`` if queries and keys are the same tokens, and ``"cross"`` otherwise.
        heads: ``H``, the number of query heads.
        key_value_heads: ``H_kv``, the number of key-value heads.
        head_size: ``d_h``, the size of a head's values.
        causal: Whether a causal mask hides later tokens.
        window: The size of the sliding window, if the module has the attribute; else None.
        gate: Whether a gate or a norm multiplies the head outputs before ``W_O``.
        rows_below_one: Whether attention weights sum to less than one, because of learned sinks or
            a change after the softmax.
        projection: The module that holds ``W_O``.
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
    """Run a model once and describe its attention layers.

    Args:
        model: The model.
        inputs: The inputs, in a form that :class:`captum_cw.AttentionWeights` accepts; None for two
            tokens.

    Returns:
        The layers in execution order, including cross-attention.

    Raises:
        UnsupportedModelError: If measures cannot be computed for the model.
        ValueError: If ``inputs`` is None and the model does not take tokens.

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
            f"{type(model).__name__} takes {needed} instead of tokens: give inputs, as in "
            "captum_cw.models.inspection.attention_layers(model, inputs)."
        )
    found, _ = Runner(model, kind="all").observe(inputs, _describe_layer)
    return [layer for _, layer in found]


def _describe_layer(execution: Execution, layer: AttentionLayer) -> LayerOverview:
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
    """Return the bytes of the maps ``(H, T, S)`` of all layers for one text, in float32.

    Args:
        layers: The layers.
        length: The number of tokens, ``T`` and ``S``.

    Example:
        >>> maps_bytes(attention_layers(model), 512) == 2 * 4 * 512**2 * 4
        True
    """
    return 4 * sum(layer.heads for layer in layers) * length**2
