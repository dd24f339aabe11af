"""Warnings about special tokens: padding without a mask, and a text that begins twice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from captum_cw.capture.caches import holds_tokens
from captum_cw.capture.call_tokens import find_token_mask
from captum_cw.capture.model import special_ids

__all__ = ["warn_of_special_tokens"]

#: The usual number of stack frames from a warning here to the user's line.
STACKLEVEL = 6


def warn_of_special_tokens(model: nn.Module, named: Mapping[str, Any]) -> None:
    """Warn of ids that look like padding without a mask, and of a text that begins twice.

    Args:
        model: The model, whose configuration names the special tokens.
        named: The arguments of a call by name.
    """
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_meta:
        return
    if holds_tokens(named.values()):  # the text begins in the cache
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
            f"The text begins with two begin tokens (bos_token_id={begin}). This happens if a chat "
            "is rendered to text and tokenized again: tokenize it with add_special_tokens=False.",
            stacklevel=STACKLEVEL,
        )


def _begins_twice(ids: Tensor, token_mask: Tensor | None, begin: int) -> bool:
    """Whether an example of ``ids`` ``(B, T)`` begins with two tokens ``begin``."""
    first = [0] * len(ids) if token_mask is None else token_mask.long().argmax(1).tolist()
    starts = (row[start : start + 2] for row, start in zip(ids, first, strict=True))
    return any(start.tolist() == [begin, begin] for start in starts)
