"""The positions of tokens: position ids for padded texts, and tables of learned positions.

A table limits the length of a text. It is recognised by its lookups: consecutive rows, one for each
token. The number of rows in a config is not reliable, since RoBERTa's table starts at its third
row, and models with rotary positions do not have a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture.listeners import suspended
from captum_cw.capture.model import special_ids, two_tokens, uncompiled
from captum_cw.capture.restoring import evaluating
from captum_cw.capture.rounding import are_near

__all__ = ["check_positions", "position_ids", "rows_before_positions"]

#: The largest row at which a table may start. Those of RoBERTa and OPT start after padding rows.
OFFSET = 4


#: The functions that look up rows of a table.
LOOKUPS = {torch.nn.functional.embedding, torch.gather, Tensor.gather}


def check_positions(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a model looks up positions beyond the end of their table.

    Args:
        func: The function that the model calls, which may be a lookup.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
    """
    if func not in LOOKUPS:
        return
    if func is torch.nn.functional.embedding:
        (rows, table), dim = args, 0
    else:
        given = {**dict(zip(("input", "dim", "index"), args, strict=False)), **kwargs}
        table, dim, rows = given["input"], given["dim"], given["index"]
    if not isinstance(rows, Tensor) or rows.is_meta or not rows.numel():
        return
    rows, size = rows[..., 0] if rows.dim() > 2 else rows, table.shape[dim]
    if int(rows.max()) < size:
        return
    row = rows if rows.dim() == 1 else rows[rows.amax(-1).argmax()]
    padding = kwargs.get("padding_idx")
    if padding is not None:
        row = row[row != padding]
    values, counts = torch.unique(row, return_counts=True)
    if len(counts) and counts[0] > 1:  # all padding shares one row, before the first position
        values = values[1:]
    length = len(values)
    if length < 2 or int(values[-1] - values[0]) + 1 != length:  # these are ids of a vocabulary
        return
    # With a cache or given positions, the first row is not the start of the text.
    first = int(values[0])
    offset = first if first <= OFFSET else 0
    limit = size - offset
    raise ValueError(
        f"The text has {first + length - offset} tokens, but the model's table of positions ends "
        f"after {limit}: cut the text (truncation=True, max_length={limit}) or use a model with a "
        "longer context."
    )


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
    from_zero, skips_padding = _counting_of(model)
    # Images may have positions on a grid, which only the model knows.
    if not from_zero or (has_images and skips_padding):
        return None
    return (token_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -T:]


def rows_before_positions(model: nn.Module) -> int:
    """Return the number of rows of a table before its first position.

    RoBERTa counts from its padding token, so its table holds fewer positions than its config says.
    """
    from_zero, _ = _counting_of(model)
    return 0 if from_zero else special_ids(model).get("pad_token_id", -1) + 1


def _counting_of(model: nn.Module) -> tuple[bool, bool]:
    if model not in _counting:
        _counting[model] = _find_counting(model)
    return _counting[model]


#: Whether position ids 0, 1, 2 change nothing in a model (RoBERTa counts from its padding), and
#: whether padding before a text changes nothing without position ids.
_counting: WeakKeyDictionary[nn.Module, tuple[bool, bool]] = WeakKeyDictionary()


def _find_counting(model: nn.Module) -> tuple[bool, bool]:
    """Find out how a model counts by passes over three tokens."""
    unknown = True, False
    text = two_tokens(model, 3)
    if text is None:
        return unknown
    ids = text["input_ids"]
    padded = nn.functional.pad(ids, (1, 0), value=special_ids(model).get("pad_token_id", 0))
    mask = nn.functional.pad(torch.ones_like(ids), (1, 0))
    positions = torch.arange(3, device=ids.device)[None]
    try:
        with torch.no_grad(), evaluating([model]), suspended(), uncompiled():
            plain = _first_states(model(**text), 3)
            counted = _first_states(model(**text, position_ids=positions), 3)
            behind = model(**{**text, "input_ids": padded, "attention_mask": mask})
            skipped = _first_states(behind, 4)[:, 1:]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # the model does not run on a plain text
        return unknown
    return are_near(plain, counted), are_near(plain, skipped)


def _first_states(output: Any, T: int) -> Tensor:
    """Return the first result ``(B, T, n)`` of a pass."""
    results = output.values() if isinstance(output, Mapping) else output
    results = [results] if isinstance(results, Tensor) else list(results)
    return next(x for x in results if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == T)
