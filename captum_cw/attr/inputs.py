"""From what a person passes to ``attribute`` to one call of the model, checked."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ForwardCall",
    "Tokens",
    "device_of",
    "forward_call",
    "longest_text",
    "parameters_of",
    "tokens_of",
    "two_tokens",
]

Parameters = Mapping[str, inspect.Parameter]
#: By which models are asked for the logits of the last tokens alone.
LOGITS = "logits_to_keep"


@dataclass(frozen=True)
class ForwardCall:
    """Arguments for one forward pass.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        real: For each sequence of tokens that the call tells of, ``(B, T)``, False at padding.
        last_only: Whether the model was asked for the logits of the last token alone, though the
            caller did not say so.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: tuple[Tensor, ...]
    last_only: bool = False

    def with_all_logits(self) -> ForwardCall:
        """The same call, with the logits of all tokens."""
        kwargs = {name: x for name, x in self.kwargs.items() if name != LOGITS}
        return replace(self, kwargs=kwargs, last_only=False)


def forward_call(
    model: nn.Module | None, forward: Callable[..., Any], inputs: object, additional: object
) -> ForwardCall:
    """Reads Captum's ``inputs`` and ``additional_forward_args``.

    Args:
        model: The model, or None where only a callable is known.
        forward: What will be called: the model's forward, or another function of it.
        inputs: A tensor, a tuple of tensors, or a mapping of keyword arguments.
        additional: None, one further argument or a tuple of them, positional after ``inputs``.

    Raises:
        TypeError, ValueError: As :meth:`captum_cw.ContributionWeights.attribute` says.
    """
    rest = (
        () if additional is None else additional if isinstance(additional, tuple) else (additional,)
    )
    args: tuple[Any, ...]
    if isinstance(inputs, Mapping):
        args, kwargs = rest, dict(inputs)
        if rest:
            raise TypeError(
                "additional_forward_args cannot follow a mapping, which names its arguments: put "
                "them into the mapping."
            )
    elif isinstance(inputs, Tensor) or (
        isinstance(inputs, tuple) and inputs and all(isinstance(x, Tensor) for x in inputs)
    ):
        args, kwargs = ((inputs,) if isinstance(inputs, Tensor) else inputs) + rest, {}
    else:
        raise TypeError(
            f"inputs is {_kind(inputs)}: give token ids (B, T), embeddings (B, T, d), a "
            "tokenizer's BatchEncoding (return_tensors='pt'), a dict of keyword arguments or a "
            "tuple of tensors."
        )
    if model is None:
        # Nor is it known what it does about a mask that it is not given.
        told = kwargs.get("attention_mask") is not None
        return ForwardCall(args, kwargs, _told(kwargs) if told else ())
    _check_weights(model)
    parameters = parameters_of(model, forward)
    args, kwargs = _by_name(model, parameters, args, kwargs)
    return _checked(model, parameters, args, kwargs)


def parameters_of(model: nn.Module, forward: Callable[..., Any] | None = None) -> Parameters:
    """What a model's forward, or another function of it, can be called with.

    Where it passes on what it does not name, as PEFT's and FSDP's do, to the model that is wrapped.
    """
    own = inspect.signature(forward or model.forward).parameters
    base = getattr(model, "get_base_model", lambda: getattr(model, "module", None))()
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    if not isinstance(base, nn.Module) or not passes_on:
        return own
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: p for name, p in own.items() if p.kind not in variable}
    return {**named, **{n: p for n, p in parameters_of(base).items() if n not in named}}


def two_tokens(model: nn.Module) -> dict[str, Tensor] | None:
    """The shortest text that a model can be run on; None where it takes no text."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    # The embedding of padding is often zero, and so would be all that comes of it.
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    first = [n for n in range(3) if n != padding][:2]
    ids = torch.tensor([first], dtype=torch.long, device=device_of(model))
    inputs = {"input_ids": ids}
    if "decoder_input_ids" in parameters_of(model):
        inputs["decoder_input_ids"] = ids
    return inputs


def longest_text(model: nn.Module) -> int | None:
    """How many positions a model has, by its configuration; None where that does not tell."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens from: anywhere if it is offloaded, as its hooks move them."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@dataclass(frozen=True)
class Tokens:
    """What a call of a model says of its tokens.

    Args:
        T: How many there are; None where the main input is no text.
        cached: How many stand before them in a key-value cache.
        real: ``(B, T)``, False at padding; None where that is not told.
        cache: That key-value cache.
        named: The arguments of the call by their names.
    """

    T: int | None
    cached: int
    real: Tensor | None
    cache: Any
    named: dict[str, Any]

    @property
    def told(self) -> tuple[Tensor, ...]:
        """``real``, where that is told."""
        return () if self.real is None else (self.real,)


def tokens_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
    """Reads a call that is not ours, and leaves it as it is.

    Raises:
        TypeError: If the call has a cache that does not tell its length.
    """
    _, named = _by_name(model, parameters_of(model), args, dict(kwargs))
    tokens, cache = _tokens(named), named.get("past_key_values")
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise TypeError(
            f"past_key_values is of type {type(cache).__name__}: give one of transformers' Cache "
            "classes, which tell their length."
        )
    cached = 0 if cache is None else int(cache.get_seq_length())
    T = None if tokens is None else tokens.shape[1]
    return Tokens(T, cached, _padding(named), cache, named)


def _kind(x: object) -> str:
    if isinstance(x, (list, tuple)):
        kinds = ", ".join(sorted({type(e).__name__ for e in x}))
        return f"a {type(x).__name__} of {kinds or 'nothing'}"
    return f"of type {type(x).__name__}"


def _check_weights(model: nn.Module) -> None:
    """A model on the meta device has no weights, unless hooks load them at each call."""
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise ValueError(
            f"Parameter {meta!r} is on the meta device and nothing loads it: load the model's "
            "weights with from_pretrained, or offload with device_map."
        )


def _by_name(
    model: nn.Module, parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments by the names of the model's forward, where it names them.

    Embeddings become ``inputs_embeds`` where the main input is ids.
    """
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, p in parameters.items() if p.kind in by_position]
    if len(args) > len(names):
        return args, kwargs
    named = dict(zip(names, args, strict=False))
    main = getattr(model, "main_input_name", None)
    ids = named.get(main) if main == "input_ids" else None
    if isinstance(ids, Tensor) and ids.is_floating_point():
        if ids.dim() != 3 or "inputs_embeds" not in parameters:
            raise ValueError(
                f"input_ids is a {ids.dtype} tensor of shape {tuple(ids.shape)}: token ids are "
                "integers. Noise and interpolation need embeddings: pass "
                "model.get_input_embeddings()(input_ids), of shape (B, T, d)."
            )
        named["inputs_embeds"] = named.pop("input_ids")
    return (), {**named, **kwargs}


def _checked(
    model: nn.Module, parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ForwardCall:
    for name, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor) and value.numel() == 0:
            raise ValueError(
                f"Argument {name!r} is empty (shape {tuple(value.shape)}): attribution needs at "
                "least one example of one token."
            )
        if isinstance(value, list):
            raise TypeError(f"Argument {name!r} is a list: tokenize with return_tensors='pt'.")
    for name in ("input_ids", "decoder_input_ids"):
        if isinstance(kwargs.get(name), Tensor):
            _check_ids(model, name, kwargs[name])
    main, real = _tokens(kwargs), _told(kwargs)
    if main is None:
        return ForwardCall(args, kwargs, real)
    _check_decoder(parameters, kwargs)
    positions = kwargs.get("position_ids")
    if positions is None and "position_ids" in parameters:
        positions = _positions(model, kwargs.get("attention_mask"), main.shape[1])
        if positions is not None:
            kwargs = {**kwargs, "position_ids": positions}
    _check_length(model, main.shape[1], positions)
    lean = _lean(parameters, kwargs)
    return ForwardCall(args, lean, real, last_only=LOGITS in lean and LOGITS not in kwargs)


def _check_decoder(parameters: Parameters, kwargs: dict[str, Any]) -> None:
    given = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "encoder_outputs")
    if given[0] in parameters and all(kwargs.get(name) is None for name in given):
        raise ValueError(
            "The model has an encoder and a decoder, but the inputs say nothing of the decoder's "
            "tokens: give a dict with input_ids and decoder_input_ids (or labels)."
        )


def _check_ids(model: nn.Module, name: str, ids: Tensor) -> None:
    if ids.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}: expected (B, T); for one text, ids[None]."
        )
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of a model that has several
        embeddings = None
    size = getattr(embeddings, "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if size is not None and (low < 0 or high >= size):
        wrong = low if low < 0 else high
        raise ValueError(
            f"Token id {wrong} is outside of the model's vocabulary 0..{size - 1}: use the model's "
            "own tokenizer, and mark padding in attention_mask, not by a special id."
        )


def _tokens(kwargs: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """What holds one entry a token: ids ``(B, T)`` or embeddings ``(B, T, d)``."""
    for name in ("input_ids", "inputs_embeds"):
        tokens = kwargs.get(f"{prefix}{name}")
        if isinstance(tokens, Tensor) and tokens.dim() > 1:
            return tokens
    return None


def _told(kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What a call tells of the tokens of an encoder and of a decoder."""
    told = _padding(kwargs), _padding(kwargs, "decoder_")
    return tuple(real for real in told if real is not None)


def _padding(kwargs: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """Where the attention mask leaves tokens: ``(B, T)`` boolean; None where it does not tell."""
    mask, tokens = kwargs.get(f"{prefix}attention_mask"), _tokens(kwargs, prefix)
    if tokens is None or not isinstance(mask, Tensor | None):
        return None
    B, T = tokens.shape[:2]
    if mask is None:
        return torch.ones(B, T, dtype=torch.bool, device=tokens.device)
    cached = kwargs.get("past_key_values") is not None
    if mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[2] in (1, T):
        return None
    if mask.dim() != 2 or mask.shape[0] != B or (mask.shape[1] != T and not cached):
        raise ValueError(
            f"{prefix}attention_mask has shape {tuple(mask.shape)}, but the inputs are {B} x {T} "
            f"tokens: it must be ({B}, {T}), 1 at tokens and 0 at padding (or four-dimensional)."
        )
    real = mask[:, -T:] != 0
    if not real.any(-1).all():
        raise ValueError(
            f"Example {int((~real.any(-1)).nonzero()[0])} is empty: {prefix}attention_mask is 0 at "
            "all of its tokens."
        )
    return real


def _positions(model: nn.Module, mask: object, T: int) -> Tensor | None:
    """Position ids by the mask, as ``generate`` makes them; None where the model needs none.

    A text must stand where it would stand alone, whatever padding comes before it.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    real = mask != 0
    if real.all() or not getattr(model, "can_generate", lambda: False)():
        return None
    if any(_counts_itself(module) for module in model.modules()):
        return None
    return (real.long().cumsum(-1) - 1).clamp_(min=0)[:, -T:]


def _counts_itself(module: nn.Module) -> bool:
    """Whether a module makes positions of its own: RoBERTa's from the ids, images' from a grid."""
    file = sys.modules.get(type(module).__module__)
    own = ("create_position_ids_from_input_ids", "get_rope_index")
    return any(hasattr(place, name) for place in (module, file) for name in own)


def _check_length(model: nn.Module, T: int, positions: object) -> None:
    limit = longest_text(model)
    length = int(positions.max()) + 1 if isinstance(positions, Tensor) else T
    if limit is not None and length > limit:
        raise ValueError(
            f"The text has {length} tokens, but the model has positions for {limit}: cut the "
            "text (truncation=True, max_length=...) or use a model with a longer context."
        )


def _lean(parameters: Parameters, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what attribution does not look at: a cache, and logits over the vocabulary."""
    lean = dict(kwargs)
    if "use_cache" in parameters and "past_key_values" not in kwargs:
        lean.setdefault("use_cache", False)
    if LOGITS in parameters and kwargs.get("labels") is None:
        lean.setdefault(LOGITS, 1)
    return lean
