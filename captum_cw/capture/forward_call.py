"""Check the user's inputs, and build one forward call of the model from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.arguments import arguments_by_name, read_arguments, takes_mapping
from captum_cw.capture.attention_call import Kind, UnsupportedModelError
from captum_cw.capture.caches import find_cache, own_copy
from captum_cw.capture.call_tokens import (
    find_token_masks,
    find_tokens,
    named_values,
    warn_of_special_tokens,
)
from captum_cw.capture.model import LOGITS, Parameters, parameters_of, text_config, vocabulary_size
from captum_cw.capture.positions import position_ids, rows_before_positions
from captum_cw.capture.text_layers import TextLayers

__all__ = ["Doubt", "ForwardCall", "forward_call", "run_on_copies"]


@dataclass(frozen=True)
class Doubt:
    """A possible mistake in the inputs, which only running the model can confirm.

    Args:
        text: What may be wrong, and what to do about it.
        settled_by: The kinds of attention layers. Once a layer of one of these kinds has run, the
            inputs are right.
    """

    text: str
    settled_by: tuple[Kind, ...] = ("self", "cross")


@dataclass(frozen=True)
class ForwardCall:
    """The arguments of one forward pass, and what is known of them.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        token_masks: For each sequence of tokens in the call, ``(B, T)``, False at padding.
        doubt: A possible mistake in the inputs; None if there is no sign of one.
        text: Distinguishes the layers over the tokens from those over images and the like; None if
            there are no other inputs.
        last_only: Whether only the logits of the last token are requested, though the caller did
            not say so.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    token_masks: tuple[Tensor, ...]
    doubt: Doubt | None
    text: TextLayers | None = None
    last_only: bool = False

    def explain(self, error: Exception, ran: Collection[Kind]) -> str | None:
        """Explain an error of the model by its inputs.

        Args:
            error: The error that the forward pass raised.
            ran: The kinds of the attention layers that ran before.

        Returns:
            The explanation; None if the inputs are not the reason.
        """
        if isinstance(error, (UnsupportedModelError, MemoryError, torch.OutOfMemoryError)):
            return None
        doubt = self.doubt
        if doubt is None or _is_ours(error) or any(kind in ran for kind in doubt.settled_by):
            return None
        return f"{doubt.text} (The model raised {type(error).__name__}: {error})"

    def with_all_logits(self) -> ForwardCall:
        """Return the same call with the logits of all tokens."""
        kwargs = {name: x for name, x in self.kwargs.items() if name != LOGITS}
        return replace(self, kwargs=kwargs, last_only=False)


def run_on_copies(
    forward: Callable[..., Any], kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()
) -> Any:
    """Call a model with copies, since it may append to a cache or write into a tensor."""
    args, kwargs = own_copy((args, dict(kwargs)))
    return forward(*args, **kwargs)


def forward_call(
    model: nn.Module | None, forward: Callable[..., Any], inputs: object, additional: object
) -> ForwardCall:
    """Check Captum's ``inputs`` and ``additional_forward_args``, and build a call from them.

    Args:
        model: The model; None if only a callable is known.
        forward: The function that is called: the model's forward, or another one.
        inputs: A tensor, a tuple of tensors, or a mapping of keyword arguments.
        additional: None, one more positional argument, or a tuple of them.

    Raises:
        TypeError: If ``inputs`` is of another type, holds a list, or more arguments follow a
            mapping.
        ValueError: If an argument is empty, token ids are not ``(B, T)`` or are outside of the
            vocabulary, a mask does not fit the tokens, or the model does not have weights.

    Example:
        >>> inputs = tokenizer("The capital of France", return_tensors="pt")
        >>> call = forward_call(model, model.forward, inputs, None)
        >>> call.token_masks[0].shape, call.last_only
        (torch.Size([1, 4]), True)
    """
    args, kwargs = read_arguments(model, forward, inputs, additional)
    if model is None:
        # Without a mask, it is unknown what the callable does about padding.
        named = named_values(args, kwargs)
        masks = find_token_masks(named) if named.get("attention_mask") is not None else ()
        return ForwardCall(args, kwargs, masks, _doubt(args, {}, named))
    _check_weights(model)
    parameters = parameters_of(model, forward)
    if not takes_mapping(args):
        args, kwargs = arguments_by_name(model, parameters, args, kwargs)
    return _checked_call(model, parameters, args, kwargs)


def _checked_call(
    model: nn.Module, parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ForwardCall:
    named = named_values(args, kwargs)
    for name, value in [*enumerate(args), *named.items()]:
        if isinstance(value, Tensor) and value.numel() == 0:
            raise ValueError(
                f"Argument {name!r} is empty (shape {tuple(value.shape)}): attribution needs at "
                "least one example of one token."
            )
        if isinstance(value, list) and (name in kwargs or name == "input_ids"):
            raise TypeError(f"Argument {name!r} is a list: tokenize with return_tensors='pt'.")
    for name in ("input_ids", "decoder_input_ids"):
        if isinstance(named.get(name), Tensor):
            _check_ids(model, name, named[name])
    tokens, masks = find_tokens(named), find_token_masks(named)
    text, doubt = TextLayers.of(tokens, named), _doubt(args, parameters, named)
    warn_of_special_tokens(model, named)
    if tokens is None or takes_mapping(args):
        return ForwardCall(args, kwargs, masks, doubt, text)
    T = tokens.shape[1]
    if kwargs.get("position_ids") is None and "position_ids" in parameters:
        mask = kwargs.get("attention_mask")
        positions = position_ids(model, mask, T, has_images=text is not None)
        if positions is not None:
            kwargs = {**kwargs, "position_ids": positions}
    # Attribution needs neither a cache nor the logits of all tokens.
    lean = dict(kwargs)
    if "use_cache" in parameters and find_cache(kwargs) is None:
        lean.setdefault("use_cache", False)
    if LOGITS in parameters and kwargs.get("labels") is None:
        lean.setdefault(LOGITS, 1)
    return ForwardCall(
        args,
        lean,
        masks,
        _length_doubt(model, T) or doubt,
        TextLayers.of(tokens, lean),
        last_only=LOGITS in lean and LOGITS not in kwargs,
    )


def _check_weights(model: nn.Module) -> None:
    """Check that parameters on the meta device are loaded by hooks at each call."""
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise ValueError(
            f"Parameter {meta!r} is on the meta device and nothing loads it: load the model's "
            "weights with from_pretrained, or offload with device_map."
        )


def _check_ids(model: nn.Module, name: str, ids: Tensor) -> None:
    if ids.dim() != 2 and (name, ids.dim()) != ("input_ids", 3):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}: expected (B, T); for one text, ids[None]."
        )
    # The decoder of a translation model may have its own vocabulary.
    reader = getattr(model, "get_decoder", lambda: None)() if name.startswith("decoder") else model
    size = vocabulary_size(reader)
    low, high = int(ids.min()), int(ids.max())
    if size is not None and (low < 0 or high >= size):
        raise ValueError(
            f"Token id {low if low < 0 else high} of {name} is outside of the model's vocabulary "
            f"0..{size - 1}: use the model's own tokenizer, and mark padding in attention_mask "
            "instead of by a special id."
        )


def _doubt(args: tuple[Any, ...], parameters: Parameters, named: Mapping[str, Any]) -> Doubt | None:
    """Return a possible mistake in inputs that some models accept and others do not."""
    if takes_mapping(args):
        return Doubt(
            f"The forward function has no arguments {', '.join(map(repr, args[0]))}, so it was "
            "given the mapping as a whole. If it takes something else, give a dict with the names "
            "of its own arguments, or a tuple of tensors."
        )
    ids = named.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 3:
        return Doubt(
            f"input_ids has shape {tuple(ids.shape)}, as for a model of multiple choice: expected "
            "(B, T); for one text, ids[None]."
        )
    decoder = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "encoder_outputs")
    if decoder[0] in parameters and all(named.get(name) is None for name in decoder):
        return Doubt(
            "The model has an encoder and a decoder. The inputs do not include the decoder's "
            "tokens, and the model does not make them by itself: give a dict with "
            f"{next(iter(named), 'input_ids')} and decoder_input_ids (or labels).",
            settled_by=("cross",),
        )
    return None


def _length_doubt(model: nn.Module, T: int) -> Doubt | None:
    """Return a doubt if a text is longer than the model's config says. Most models run it."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or not 0 < limit < T:
        return None
    limit -= rows_before_positions(model)
    return Doubt(
        f"The text has {T} tokens, but the model has {limit} positions (by "
        f"max_position_embeddings): cut the text (truncation=True, max_length={limit}) or use a "
        "model with a longer context."
    )


def _is_ours(error: Exception) -> bool:
    """Whether this package raised an error, and not the model that it observes."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    # Errors of torch also end in this package, since it intercepts torch's functions.
    of_torch = isinstance(error, (RuntimeError, IndexError, TypeError))
    return module.split(".")[0] == __name__.split(".")[0] and not of_torch
