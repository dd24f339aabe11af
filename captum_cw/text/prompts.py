"""One text as a model reads it: from what users give to a call, and from layers back to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.caches import find_cache
from captum_cw.capture.forward_call import device_of, parameters_of
from captum_cw.functional import AttentionLayer, blocks
from captum_cw.text.templates import Encoded, Messages, encode, render_chat
from captum_cw.text.tokens import Span, warn_of_two_begin_tokens

__all__ = [
    "Text",
    "extended",
    "leading",
    "model_inputs",
    "read_text",
    "refuse_later_tokens",
]

Text = str | tuple[str, str] | Messages | Mapping[str, Any] | Tensor

#: What tokenizers return, and not every model takes.
_OF_TOKENIZERS = {
    "assistant_masks",
    "attention_mask",
    "length",
    "num_truncated_tokens",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "special_tokens_mask",
    "token_type_ids",
}


def read_text(
    tokenizer: Any,
    text: Text,
    *,
    add_generation_prompt: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """The tokens of one text, in whatever form it is given.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: A text; a pair of texts, in a tuple; the messages of a chat; what a tokenizer returned
            for one text, or a dict of a model's arguments; or token ids ``(T,)`` or ``(1, T)``.
        add_generation_prompt: Whether the model is to speak next in a chat.
        chat_template_kwargs: Further arguments for a chat's template.

    Raises:
        TypeError: If ``text`` is of another kind.
        ValueError: If there is not exactly one text, it is empty or padded, or
            ``chat_template_kwargs`` are given for something other than a chat.

    Example:
        >>> read_text(tokenizer, ("a b", "c"), add_generation_prompt=False).ids
        tensor([[1, 2, 3]])
    """
    pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(t, str) for t in text)
    if isinstance(text, (list, tuple)) and not pair:
        return render_chat(
            tokenizer,
            text,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )
    if chat_template_kwargs is not None:
        raise ValueError(
            f"chat_template_kwargs={chat_template_kwargs!r} are for the template of a chat, but "
            f"the text is of type {type(text).__name__}: give the messages, or leave them out."
        )
    if isinstance(text, str):
        read = encode(tokenizer, text)
    elif isinstance(text, tuple):
        read = encode(tokenizer, *text)
    elif isinstance(text, Mapping):
        read = _of_mapping(text)
    elif isinstance(text, Tensor):
        read = Encoded(None, _as_ids(text))
    else:
        raise TypeError(
            f"text is of type {type(text).__name__}: give a text, a pair of texts in a tuple, the "
            "messages of a chat, a BatchEncoding or dict with input_ids, or token ids (T,), "
            "without padding."
        )
    if read.ids.dim() != 2 or len(read.ids) != 1 or not read.ids.numel():
        raise ValueError(
            f"The text has token ids of shape {tuple(read.ids.shape)}: give one text of one token "
            "or more."
        )
    return read


def _of_mapping(given: Mapping[str, Any]) -> Encoded:
    if "input_ids" not in given:
        raise TypeError(
            f"The dict has {', '.join(map(repr, given)) or 'nothing'}, but no 'input_ids': give "
            "what the tokenizer returned for one text (or, for a chat, a list of messages)."
        )
    for name, x in given.items():
        if find_cache((x,)) is not None:
            raise ValueError(
                f"The dict has {name!r}, but tokens in a cache cannot be explained: give the whole "
                "text, without a cache."
            )
    ids = _as_ids(_as_tensor(given["input_ids"]))
    T = ids.shape[-1]
    extras = {}
    for name, x in given.items():
        x = _as_tensor(x)
        if name == "input_ids" or x is None:
            continue
        extras[name] = x[None] if isinstance(x, Tensor) and x.shape == (T,) else x
    mask = extras.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
        place = int((mask == 0).nonzero()[0, -1])
        raise ValueError(
            f"attention_mask is 0 at token {place}, which is padding: give one text without "
            "padding (tokenize it alone, without padding=...)."
        )
    return Encoded(None, ids, None, extras)


def _as_tensor(x: Any) -> Any:
    """Lists and arrays as tensors, as tokenizers return them; else ``x``."""
    if isinstance(x, Tensor) or not (isinstance(x, list) or hasattr(x, "__array__")):
        return x
    tensor = torch.from_numpy(np.array(x))
    return tensor.float() if isinstance(x, list) and tensor.is_floating_point() else tensor


def _as_ids(ids: Any) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"input_ids is of type {type(ids).__name__}: give integers (T,).")
    if (ids.is_floating_point() and ids.numel()) or ids.dtype == torch.bool:
        raise TypeError(f"text is a tensor of {ids.dtype}: give token ids, integers (T,).")
    return (ids[None] if ids.dim() == 1 else ids).long()


def model_inputs(model: nn.Module, tokenizer: Any, text: Encoded) -> dict[str, Any]:
    """What the model is given for a text: ids, and what else there is of it that it takes.

    Warns where the text begins with two begin tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: The text.

    Example:
        >>> text = read_text(tokenizer, "a b c", add_generation_prompt=False)
        >>> sorted(model_inputs(model, tokenizer, text))
        ['attention_mask', 'input_ids']
    """
    warn_of_two_begin_tokens(tokenizer, text.ids[0].tolist(), model, stacklevel=4)
    takes, device = parameters_of(model), device_of(model)
    given = {"input_ids": text.ids} | {
        name: x for name, x in text.extras.items() if name in takes or name not in _OF_TOKENIZERS
    }
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}


def extended(inputs: Mapping[str, Any], output: Tensor) -> dict[str, Any]:
    """The inputs of a prompt, with the tokens of its output after it.

    Masks go on with ones, token types with the last one, as when models generate, and positions
    count on. What does not speak of tokens, such as the pixels of images, stays as it is.

    Args:
        inputs: Of the prompt, with ``input_ids`` ``(1, n)``.
        output: ``(m,)`` ids.

    Raises:
        ValueError: If it is not known how something else goes on.

    Example:
        >>> inputs = {"input_ids": torch.tensor([[1, 2]]), "token_type_ids": torch.tensor([[0, 1]])}
        >>> extended(inputs, torch.tensor([3]))["token_type_ids"]
        tensor([[0, 1, 1]])
    """
    n = inputs["input_ids"].shape[1]
    found = dict(inputs)
    for name, x in inputs.items():
        by_token = isinstance(x, Tensor) and x.shape[:2] == (1, n)
        if by_token and x.is_floating_point() and x.dim() > 2 and not name.endswith("mask"):
            by_token = False  # as many channels of an image as tokens, by chance
        if not by_token and name in ("attention_mask", "position_ids"):
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name} is {what}, so it is not known how it goes on over the output: give a "
                f"tensor (1, {n}), or leave it out."
            )
        if by_token:
            found[name] = torch.cat([x, _continued(name, x, output)], dim=1)
    return found


def _continued(name: str, x: Tensor, output: Tensor) -> Tensor:
    """``(1, m)``: what comes after ``x`` ``(1, n)``."""
    m, last = len(output), x[:, -1:]
    if name == "input_ids":
        return output[None].to(x)
    if name == "attention_mask":
        return x.new_ones(1, m)
    if name.endswith("mm_token_type_ids"):  # which are of images, and which are text
        return x.new_zeros(1, m)
    if name == "cross_attention_mask":  # the images that the prompt's last token sees
        return last.expand(1, m, *x.shape[2:])
    if name == "position_ids":
        return last + torch.arange(1, m + 1, device=x.device)
    if name.endswith("token_type_ids"):
        return last.expand(1, m)
    raise ValueError(
        f"{name!r} has an entry for each of the {x.shape[1]} tokens of the prompt, and it is not "
        "known how it goes on over the output: leave it out."
    )


def leading(execution: Execution, layer: AttentionLayer, T: int | None, kept: int | None) -> Span:
    """How many queries and keys of a layer stand before those of the text.

    Learned virtual tokens stand there (prompt tuning adds queries and keys, prefix tuning keys).

    Args:
        execution: The layer.
        layer: The same.
        T: How many tokens the text has; None where that is not known.
        kept: The last tokens of which the model was asked for logits. Some models compute no
            other queries in their last layers: then the first number is negative.

    Raises:
        UnsupportedModelError: If the layer does not attend from these tokens to these tokens.
    """
    if T is None or execution.kind == "cross":
        return 0, 0
    queries, keys = layer.T - T, layer.S - T
    real = layer.mask.real
    # What is padded at the end, as to whole windows, is hidden there.
    virtual = real is None or queries <= 0 or bool(real[:, queries:].all())
    if keys < 0 or (queries < 0 and kept != layer.T) or not virtual:
        raise UnsupportedModelError(
            f"Layer {execution.name!r} attends from {layer.T} queries to {layer.S} keys, but the "
            f"text has {T} tokens, so it is not known which are the text's: use "
            "ContributionWeights(model).attribute."
        )
    return queries, keys


def refuse_later_tokens(
    execution: Execution, layer: AttentionLayer, before: Span, prompt: int
) -> None:
    """Raises an UnsupportedModelError where tokens see the output that comes after them.

    Args:
        execution: The layer.
        layer: The same.
        before: What :func:`leading` gave.
        prompt: How many tokens are not of the output. They may see each other.
    """
    mask = layer.mask
    if mask.causal or execution.kind == "cross":
        return
    for rows in blocks(layer.T, max(1, 2**20 // layer.S)):
        seen = mask.block(rows)
        query = torch.arange(rows.start, rows.stop, device=layer.value.device) - before[0]
        key = torch.arange(layer.S, device=layer.value.device) - before[1]
        later = key > query.clamp(min=prompt - 1)[:, None]
        later = later[:, : mask.keys(rows)]
        if bool(later.any() if seen is None else (seen & later.to(seen.device)).any()):
            raise UnsupportedModelError(
                f"In layer {execution.name!r} ({type(execution.module).__name__}), tokens see "
                "those that come after them, so the model does not predict the next token: use "
                "TokenScores(method) or explain, which explain a text as a whole."
            )
