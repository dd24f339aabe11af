"""Learned virtual tokens, which come before a text and do not have ids (PEFT).

Prompt tuning puts embeddings before those of the text, so layers have more queries and keys than
the text has tokens. Prefix tuning puts keys and values into each layer. Virtual tokens are never
ranked or removed. The tokens of the text are the last ones, so they are counted from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from captum_cw.functional import AttentionLayer

__all__ = ["behind", "padding_masks", "text_mask", "virtual_tokens", "without_prefix"]


def virtual_tokens(model: nn.Module) -> int:
    """Return the number of virtual tokens that a model puts before each text.

    Example:
        >>> virtual_tokens(model)
        0
    """
    config = getattr(model, "active_peft_config", None)
    learnt = bool(getattr(config, "is_prompt_learning", False))
    return int(config.num_virtual_tokens) if learnt and config is not None else 0


def behind(x: Tensor, length: int, value: float = 0) -> Tensor:
    """Fit the last dimension of ``x`` to ``length``: fill or cut it at the start.

    Args:
        x: ``(..., T)``.
        length: The new length of the last dimension.
        value: The value to fill with.

    Example:
        >>> behind(torch.tensor([1, 2]), 3).tolist(), behind(torch.tensor([1, 2]), 1).tolist()
        ([0, 1, 2], [2])
    """
    x = x[..., -length:]
    return torch.nn.functional.pad(x, (length - x.shape[-1], 0), value=value)


def padding_masks(model: nn.Module, text_masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the padding masks of a text ``(B, T)``, with and without its virtual tokens."""
    virtual = virtual_tokens(model)
    if not virtual:
        return list(text_masks)
    return [*text_masks, *(behind(mask, mask.shape[1] + virtual, 1) for mask in text_masks)]


def text_mask(model: nn.Module, token_mask: Tensor, text_masks: Sequence[Tensor]) -> Tensor:
    """Exclude virtual tokens from the token mask of a layer.

    Args:
        model: The model.
        token_mask: The layer's token mask, ``(B, S)`` boolean, False at padding.
        text_masks: The padding masks of the text, ``(B, T)``; empty if there are none.

    Returns:
        ``(B, S)`` boolean, False at padding and virtual tokens.
    """
    virtual, S = virtual_tokens(model), token_mask.shape[1]
    T = text_masks[0].shape[1] if text_masks else S - virtual
    return behind(token_mask[:, virtual:], S) if T + virtual == S else token_mask


def without_prefix(model: nn.Module, layer: AttentionLayer) -> AttentionLayer:
    """Return a layer without the keys of prefix tuning. Its output stays the same.

    Args:
        model: The model.
        layer: A layer of the model.
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
