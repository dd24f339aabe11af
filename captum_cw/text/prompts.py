"""One text: from the inputs of a user to the inputs of a model, and from layers back to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.caches import find_cache
from captum_cw.capture.model import device_of, parameters_of
from captum_cw.functional import AnyLayer
from captum_cw.text.templates import Encoded, Messages, encode, render_chat
from captum_cw.text.tokens import Span, warn_of_two_begin_tokens
from captum_cw.weights import block_elements, blocks

__all__ = [
    "Text",
    "extended",
    "leading",
    "model_inputs",
    "read_text",
    "refuse_later_tokens",
]

Text = str | tuple[str, str] | Messages | Mapping[str, Any] | Tensor

#: Outputs of tokenizers that not every model accepts.
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
    """Tokenize one text, in any of the forms that a user may give.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: A text; a tuple of two texts; the messages of a chat; the output of a tokenizer for
            one text, or a dict of a model's arguments; or token ids ``(T,)`` or ``(1, T)``.
        add_generation_prompt: Whether the prompt of a chat ends with the start of the model's
            answer.
        chat_template_kwargs: Further arguments of the chat template.

    Raises:
        TypeError: If ``text`` is of another type.
        ValueError: If ``text`` is not exactly one text, is empty or has padding, or if
            ``chat_template_kwargs`` are given and ``text`` is not a chat.

    Example:
        >>> read_text(tokenizer, "The capital of France is", add_generation_prompt=False).ids
        tensor([[63, 64, 65, 66, 67]])
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
            f"chat_template_kwargs={chat_template_kwargs!r} apply to the messages of a chat, but "
            f"the text is of type {type(text).__name__}: give messages, or leave them out."
        )
    if isinstance(text, str):
        read = encode(tokenizer, text)
    elif isinstance(text, tuple):
        read = encode(tokenizer, *text)
    elif isinstance(text, Mapping):
        read = _read_mapping(text)
    elif isinstance(text, Tensor):
        read = Encoded(None, _as_ids(text))
    else:
        raise TypeError(
            f"text is of type {type(text).__name__}: give a text, a tuple of two texts, the "
            "messages of a chat, a BatchEncoding or dict with input_ids, or token ids (T,), "
            "without padding."
        )
    if read.ids.dim() != 2 or len(read.ids) != 1 or not read.ids.numel():
        raise ValueError(
            f"The token ids have shape {tuple(read.ids.shape)}: give one text of at least one "
            "token."
        )
    return read


def _read_mapping(given: Mapping[str, Any]) -> Encoded:
    if "input_ids" not in given:
        raise TypeError(
            f"The dict has {', '.join(map(repr, given)) or 'nothing'}, but no 'input_ids': give "
            "the tokenizer's output for one text (or, for a chat, a list of messages)."
        )
    for name, x in given.items():
        if find_cache((x,)) is not None:
            raise ValueError(
                f"The dict has the cache {name!r}, but tokens in a cache cannot be explained: give "
                "the whole text, without a cache."
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
            f"attention_mask is 0 at token {place}, but padding is not allowed: give one text "
            "without padding (tokenize it alone, without padding=...)."
        )
    return Encoded(None, ids, None, extras)


def _as_tensor(x: Any) -> Any:
    """Convert a list or an array to a tensor of the dtype that tokenizers return."""
    if isinstance(x, Tensor) or not (isinstance(x, list) or hasattr(x, "__array__")):
        return x
    tensor = torch.from_numpy(np.array(x))
    return tensor.float() if isinstance(x, list) and tensor.is_floating_point() else tensor


def _as_ids(ids: Any) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"input_ids is of type {type(ids).__name__}: give integers (T,).")
    if (ids.is_floating_point() and ids.numel()) or ids.dtype == torch.bool:
        raise TypeError(f"The ids have dtype {ids.dtype}: give token ids, integers (T,).")
    return (ids[None] if ids.dim() == 1 else ids).long()


def model_inputs(model: nn.Module, tokenizer: Any, text: Encoded) -> dict[str, Any]:
    """Collect the arguments of the model for one text, on the model's device.

    A warning says if the text starts with two beginning-of-sequence (BOS) tokens.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        text: The text.

    Example:
        >>> text = read_text(tokenizer, "The capital of France is", add_generation_prompt=False)
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
    """Append the tokens of an output to the inputs of its prompt.

    The attention mask is continued with ones, token types with the last type, and positions by
    counting on, as models do when they generate. Inputs without an entry per token, such as the
    pixels of images, stay the same.

    Args:
        inputs: The prompt's inputs, with ``input_ids`` ``(1, n)``.
        output: The ids of the output, ``(m,)``.

    Raises:
        ValueError: If the package does not know how to continue another input.

    Example:
        >>> inputs = {"input_ids": torch.tensor([[1, 2]]), "token_type_ids": torch.tensor([[0, 1]])}
        >>> extended(inputs, torch.tensor([3]))["token_type_ids"]
        tensor([[0, 1, 1]])
    """
    n = inputs["input_ids"].shape[1]
    continued = dict(inputs)
    for name, x in inputs.items():
        by_token = isinstance(x, Tensor) and x.shape[:2] == (1, n)
        if by_token and x.is_floating_point() and x.dim() > 2 and not name.endswith("mask"):
            by_token = False  # an image that happens to have n channels
        if not by_token and name in ("attention_mask", "position_ids"):
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name} is {what} and cannot be continued over the output: give a tensor "
                f"(1, {n}), or leave it out."
            )
        if by_token:
            continued[name] = torch.cat([x, _continued(name, x, output)], dim=1)
    return continued


def _continued(name: str, x: Tensor, output: Tensor) -> Tensor:
    """Return the ``(1, m)`` entries that follow ``x`` ``(1, n)``."""
    m, last = len(output), x[:, -1:]
    if name == "input_ids":
        return output[None].to(x)
    if name == "attention_mask":
        return x.new_ones(1, m)
    if name.endswith("mm_token_type_ids"):  # 0 marks text, other numbers mark images
        return x.new_zeros(1, m)
    if name == "cross_attention_mask":  # the images that the prompt's last token sees
        return last.expand(1, m, *x.shape[2:])
    if name == "position_ids":
        return last + torch.arange(1, m + 1, device=x.device)
    if name.endswith("token_type_ids"):
        return last.expand(1, m)
    raise ValueError(
        f"{name!r} has an entry for each of the {x.shape[1]} tokens of the prompt, and cannot be "
        "continued over the output: leave it out."
    )


def leading(execution: Execution, layer: AnyLayer, T: int | None, kept: int | None) -> Span:
    """Return the numbers of queries and keys of a layer before those of the text.

    Learned virtual tokens come before the text: prompt tuning adds queries and keys, and prefix
    tuning adds keys.

    Args:
        execution: The execution of the layer.
        layer: The layer's tensors.
        T: The number of tokens of the text; None if it is unknown.
        kept: The number of last tokens for which the model was asked for logits. Some models
            compute only these queries in their last layers. The first number is then negative.

    Raises:
        UnsupportedModelError: If the layer's queries and keys do not fit the text.
    """
    if T is None or execution.kind == "cross":
        return 0, 0
    queries, keys = layer.T - T, layer.S - T
    real = layer.mask.real
    # Queries that the model adds at the end, to fill whole windows, are hidden by the mask.
    virtual = real is None or queries <= 0 or bool(real[:, queries:].all())
    if keys < 0 or (queries < 0 and kept != layer.T) or not virtual:
        raise UnsupportedModelError(
            f"Layer {execution.name!r} attends from {layer.T} queries to {layer.S} keys, but the "
            f"text has {T} tokens, so the text's own queries and keys are unknown: use "
            "ContributionWeights(model).attribute."
        )
    return queries, keys


def refuse_later_tokens(execution: Execution, layer: AnyLayer, before: Span, prompt: int) -> None:
    """Raise an UnsupportedModelError if tokens see output tokens that come after them.

    Args:
        execution: The execution of the layer.
        layer: The layer's tensors.
        before: The result of :func:`leading`.
        prompt: The number of tokens before the output. They may see each other.
    """
    mask = layer.mask
    if mask.causal or execution.kind == "cross":
        return
    for rows in blocks(layer.T, max(1, block_elements(layer.value.device) // layer.S)):
        seen = mask.block(rows, layer.value.device)
        query = torch.arange(rows.start, rows.stop, device=seen.device) - before[0]
        key = torch.arange(seen.shape[-1], device=seen.device) - before[1]
        if bool((seen & (key > query.clamp(min=prompt - 1)[:, None])).any()):
            raise UnsupportedModelError(
                f"In layer {execution.name!r} ({type(execution.module).__name__}), tokens see "
                "those that come after them, so the model does not predict the next token: use "
                "TokenScores(method) or explain, which explain a text as a whole."
            )
