"""The tokens of a call: ids or embeddings, their padding mask, and warnings about them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.arguments import arguments_by_name
from captum_cw.capture.caches import find_cache, tokens_in
from captum_cw.capture.model import parameters_of, special_ids
from captum_cw.capture.text_layers import TextLayers

__all__ = [
    "Tokens",
    "find_token_mask",
    "find_token_masks",
    "find_tokens",
    "named_values",
    "tokens_of",
    "warn_of_special_tokens",
]

#: The usual number of stack frames from a warning here to the user's line.
STACKLEVEL = 6


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call of a model.

    Args:
        ids: ``(B, T)``, or embeddings ``(B, T, d)``; None if the main input is not a text.
        token_mask: ``(B, T)``, False at padding; None if it is unknown.
        cache: The key-value cache of the call; None without one.
        cached: The number of tokens in the cache before the call.
        named: The arguments of the call by name.
        text: Distinguishes the layers over the tokens from those over images and the like; None if
            there are no other inputs.
    """

    ids: Tensor | None
    token_mask: Tensor | None
    cache: Any
    cached: int
    named: dict[str, Any]
    text: TextLayers | None

    @property
    def T(self) -> int | None:
        """The number of tokens; None if the main input is not a text."""
        return None if self.ids is None else self.ids.shape[1]

    @property
    def token_masks(self) -> tuple[Tensor, ...]:
        """``token_mask`` in a tuple; an empty tuple if it is unknown."""
        return () if self.token_mask is None else (self.token_mask,)


def tokens_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a call with these arguments, which are not changed.

    Raises:
        ValueError: If the attention mask does not fit the tokens.

    Example:
        >>> tokens = tokens_of(model, (), tokenizer("The capital of France", return_tensors="pt"))
        >>> tokens.T, tokens.cached, tokens.token_mask.tolist()
        (4, 0, [[True, True, True, True]])
    """
    args, named = arguments_by_name(model, parameters_of(model), args, dict(kwargs))
    cache = find_cache((*named.values(), *args))
    values = named_values(args, named)
    ids = find_tokens(values)
    token_mask, text = find_token_mask(values), TextLayers.of(ids, values)
    return Tokens(ids, token_mask, cache, tokens_in(cache), named, text)


def named_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments, and, if they have no text, the content of mappings."""
    if find_tokens(kwargs) is not None:
        return kwargs
    mappings = [x for x in (*args, *kwargs.values()) if isinstance(x, Mapping)]
    return {name: x for mapping in (*mappings, kwargs) for name, x in mapping.items()}


def find_tokens(named: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """Return the token ids ``(B, T)`` or embeddings ``(B, T, d)`` of a call; None without them.

    Inputs for multiple choice, ``(B, choices, T)``, become ``(B * choices, T)``.

    Args:
        named: The arguments of the call by name.
        prefix: ``"decoder_"`` for the tokens of a decoder.
    """
    for name in ("input_ids", "inputs_embeds"):
        tokens = named.get(f"{prefix}{name}")
        if isinstance(tokens, Tensor) and tokens.dim() > 1:
            several = tokens.dim() > 2 + tokens.is_floating_point()
            return tokens.flatten(0, 1) if several else tokens
    return None


def find_token_masks(named: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the token masks of a call's encoder and decoder, without those that are unknown."""
    masks = find_token_mask(named), find_token_mask(named, "decoder_")
    return tuple(mask for mask in masks if mask is not None)


def find_token_mask(named: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """Return which tokens of a call are not padding.

    Args:
        named: The arguments of the call by name.
        prefix: ``"decoder_"`` for the tokens of a decoder.

    Returns:
        ``(B, T)`` boolean; None without tokens, or if the attention mask has four dimensions.

    Raises:
        ValueError: If the attention mask does not fit the tokens, or an example is all padding.
    """
    mask, tokens = named.get(f"{prefix}attention_mask"), find_tokens(named, prefix)
    if tokens is None or not isinstance(mask, Tensor | None):
        return None
    B, T = tokens.shape[:2]
    if mask is None:
        return torch.ones(B, T, dtype=torch.bool, device=tokens.device)
    if mask.dim() == 3 and mask.shape[:2].numel() == B:  # multiple choice
        mask = mask.flatten(0, 1)
    if mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[2] in (1, T):
        return None
    cached = tokens_in(find_cache(named))
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (T, cached + T):
        after = f" after {cached} in a cache" if cached else ""
        raise ValueError(
            f"{prefix}attention_mask has shape {tuple(mask.shape)}, but the inputs are {B} x {T} "
            f"tokens{after}: it must be ({B}, {cached + T}), 1 at tokens and 0 at padding (or "
            "four-dimensional)."
        )
    token_mask = mask[:, -T:] != 0
    empty = ~token_mask.any(-1)
    if empty.any():
        raise ValueError(
            f"Example {int(empty.nonzero()[0])} is empty: {prefix}attention_mask is 0 at all of "
            "its tokens."
        )
    return token_mask


def warn_of_special_tokens(model: nn.Module, named: Mapping[str, Any]) -> None:
    """Warn of ids that look like padding without a mask, and of a text that begins twice.

    Args:
        model: The model, whose configuration names the special tokens.
        named: The arguments of a call by name.
    """
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_meta:
        return
    if tokens_in(find_cache(named)):  # the text begins in the cache
        return
    special = special_ids(model)
    pad = special.pop("pad_token_id", None)
    if pad is not None and named.get("attention_mask") is None:
        # If another special token also serves as padding, a text may begin or end with one of it.
        n = 2 if pad in special.values() else 1
        padded = (ids[:, :n] == pad).all(-1) | (ids[:, -n:] == pad).all(-1)
        if padded.any() and ids.shape[1] > n:
            warnings.warn(
                f"Example {int(padded.nonzero()[0])} begins or ends with pad_token_id={pad}, but "
                "there is no attention_mask: every id counts as a token of the text, as it does "
                "for the model. Pass the tokenizer's attention_mask to leave padding out.",
                stacklevel=STACKLEVEL,
            )
    begin = special.get("bos_token_id")
    if begin is not None and begin != pad and _begins_twice(ids, find_token_mask(named), begin):
        warnings.warn(
            f"The text begins with two beginning-of-sequence (BOS) tokens (bos_token_id={begin}). "
            "This happens if a chat is rendered to text and tokenized again: tokenize it with "
            "add_special_tokens=False.",
            stacklevel=STACKLEVEL,
        )


def _begins_twice(ids: Tensor, token_mask: Tensor | None, begin: int) -> bool:
    """Whether an example of ``ids`` ``(B, T)`` begins with two tokens ``begin``."""
    first = [0] * len(ids) if token_mask is None else token_mask.long().argmax(1).tolist()
    starts = (row[start : start + 2] for row, start in zip(ids, first, strict=True))
    return any(start.tolist() == [begin, begin] for start in starts)
