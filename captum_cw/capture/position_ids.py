"""Position ids for padded texts, so that a text has the positions that it has alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture.listeners import suspended
from captum_cw.capture.model import special_ids, two_tokens
from captum_cw.capture.restoring import evaluating

__all__ = ["position_ids"]


def position_ids(
    model: nn.Module, mask: object, T: int, *, has_images: bool = False
) -> Tensor | None:
    """Compute position ids from the attention mask, as ``generate`` does.

    Args:
        model: the model.
        mask: the attention mask of the call, if it has one.
        T: the number of tokens of the call.
        has_images: whether the call has other inputs than a text, such as images.

    Returns:
        ``(B, T)``; None if the model's own position ids are right.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    token_mask = mask != 0
    if token_mask.all() or not getattr(model, "can_generate", lambda: False)():
        return None
    if model not in _counting:
        _counting[model] = _find_counting(model)
    counting = _counting[model]
    # Images may have positions on a grid, which only the model knows.
    if not counting.from_zero or (has_images and counting.skips_padding):
        return None
    return (token_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -T:]


@dataclass(frozen=True)
class _Counting:
    """How a model counts the positions of a text.

    Args:
        from_zero: Whether position ids 0, 1, 2 change nothing. RoBERTa counts from its padding.
        skips_padding: Whether padding before a text changes nothing without position ids.
    """

    from_zero: bool
    skips_padding: bool


_counting: WeakKeyDictionary[nn.Module, _Counting] = WeakKeyDictionary()


def _find_counting(model: nn.Module) -> _Counting:
    """Find out how a model counts by passes over three tokens."""
    unknown = _Counting(from_zero=True, skips_padding=False)
    text = two_tokens(model, 3)
    if text is None:
        return unknown
    ids = text["input_ids"]
    padded = nn.functional.pad(ids, (1, 0), value=special_ids(model).get("pad_token_id", 0))
    mask = nn.functional.pad(torch.ones_like(ids), (1, 0))
    positions = torch.arange(3, device=ids.device)[None]
    try:
        with torch.no_grad(), evaluating([model]), suspended():
            plain = _first_states(model(**text), 3)
            counted = _first_states(model(**text, position_ids=positions), 3)
            behind = model(**{**text, "input_ids": padded, "attention_mask": mask})
            skipped = _first_states(behind, 4)[:, 1:]
    except Exception:  # the model does not run on a plain text
        return unknown
    return _Counting(_is_near(plain, counted), _is_near(plain, skipped))


def _first_states(output: Any, T: int) -> Tensor:
    """Return the first result ``(B, T, n)`` of a pass."""
    results = output.values() if isinstance(output, Mapping) else output
    results = [results] if isinstance(results, Tensor) else list(results)
    return next(x for x in results if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == T)


def _is_near(a: Tensor, b: Tensor) -> bool:
    tolerance = max(1e-4, 8 * torch.finfo(a.dtype).eps) * float(a.abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance)
