"""Learned virtual tokens, which precede a text and do not have ids (PEFT).

Prompt tuning puts embeddings before those of a text, so that layers have more queries and keys than
the text has tokens; prefix tuning puts keys and values into each layer. What ranks and removes
tokens counts from the end, and leaves virtual ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from captum_cw.functional import AttentionLayer

__all__ = ["behind", "behind_prefix", "known_to", "own_tokens", "virtual_tokens"]


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens a model puts before each text.

    Example:
        >>> virtual_tokens(model)
        0
    """
    config = getattr(model, "active_peft_config", None)
    learnt = bool(getattr(config, "is_prompt_learning", False))
    return int(config.num_virtual_tokens) if learnt and config is not None else 0


def behind(x: Tensor, length: int, value: float = 0) -> Tensor:
    """``x``, ``(..., T)``, as ``(..., length)``.

    Tokens are counted from the end: ``value`` comes before them, or the first ones are left out.

    Example:
        >>> behind(torch.tensor([1, 2]), 3).tolist(), behind(torch.tensor([1, 2]), 1).tolist()
        ([0, 1, 2], [2])
    """
    x = x[..., -length:]
    return torch.nn.functional.pad(x, (length - x.shape[-1], 0), value=value)


def known_to(model: nn.Module, told: Sequence[Tensor]) -> list[Tensor]:
    """What is told of padding, ``(B, T)``, and the same behind virtual tokens."""
    virtual = virtual_tokens(model)
    more = [behind(real, real.shape[1] + virtual, value=True) for real in told] if virtual else []
    return [*told, *more]


def own_tokens(model: nn.Module, real: Tensor, told: Sequence[Tensor]) -> Tensor:
    """The real tokens of a layer, ``(B, S)``, without virtual ones.

    Args:
        model: The model.
        real: The real tokens.
        told: What is told of the padding of the text, ``(B, T)``.
    """
    virtual = virtual_tokens(model)
    T = told[0].shape[1] if told else real.shape[1] - virtual
    return behind(real[:, virtual:], T + virtual) if real.shape[1] == T + virtual else real


def behind_prefix(model: nn.Module, layer: AttentionLayer) -> AttentionLayer:
    """The layer without the keys of prefix tuning; its outputs stay what they are.

    Args:
        model: The model.
        layer: Its layer.
    """
    virtual = virtual_tokens(model)
    if not virtual or layer.T + virtual != layer.S:
        return layer
    weights, mask = layer.weights, layer.mask
    visible = mask.visible
    if visible is not None and visible.shape[3] > 1:
        visible = visible[..., virtual:]
    return replace(
        layer,
        weights=lambda rows: weights(rows)[..., virtual:],
        value=layer.value[:, :, virtual:],
        mask=replace(mask, S=layer.T, visible=visible),
    )
