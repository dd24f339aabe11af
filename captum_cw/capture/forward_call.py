"""Read and check the user's inputs, and build one forward call of the model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture import UnsupportedModelError, evaluating
from captum_cw.capture.attention_call import Kind
from captum_cw.capture.caches import find_cache, holds_tokens, own_copy, tokens_in
from captum_cw.capture.listeners import suspended
from captum_cw.capture.positions import longest_text, too_long
from captum_cw.capture.text_layers import LOGITS, TextLayers

__all__ = [
    "LOGITS",
    "Doubt",
    "ForwardCall",
    "Tokens",
    "begins_twice",
    "device_of",
    "forward_call",
    "parameters_of",
    "run_on_copies",
    "tokens_of",
    "two_tokens",
    "warn_of_special_tokens",
]

Parameters = Mapping[str, inspect.Parameter]
#: From a warning here to the line of the user, as a rule.
STACKLEVEL = 6


@dataclass(frozen=True)
class Doubt:
    """That a model may not take some inputs, which most models only find out for themselves.

    Args:
        text: What may be wrong, and what to do then.
        settled_by: The kinds of attention layers of which one has run only where nothing is wrong.
    """

    text: str
    settled_by: tuple[Kind, ...] = ("self", "cross")


@dataclass(frozen=True)
class ForwardCall:
    """Arguments for one forward pass.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        real: For each sequence of tokens that the call tells of, ``(B, T)``, False at padding.
        last_only: Whether the model was asked for the logits of the last token alone, though the
            caller did not say so.
        too_long: Says why the model fails, where the text has more tokens than its configuration
            names; nothing where its positions are not why, as most models run all the same.
        text: Tells the layers over the tokens from those over images and the like; None where there
            is nothing beside a text.
        doubt: Why the model may not take these inputs; None where nothing speaks for that.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: tuple[Tensor, ...]
    last_only: bool = False
    too_long: Callable[[], str | None] | None = None
    text: TextLayers | None = None
    doubt: Doubt | None = None

    def run(self, forward: Callable[..., Any]) -> Any:
        """Calls ``forward`` with copies of the arguments, as :func:`run_on_copies` does."""
        try:
            return run_on_copies(forward, self.kwargs, self.args)
        except (IndexError, RuntimeError) as error:
            ours = isinstance(error, (UnsupportedModelError, torch.OutOfMemoryError))
            message = None if ours or self.too_long is None else self.too_long()
            if message is None:
                raise
            raise ValueError(message) from error

    def explained(self, error: Exception, ran: Collection[Kind]) -> Exception | None:
        """What to raise in place of an error of the model's own; None to leave it.

        Args:
            error: What was raised in the pass.
            ran: The kinds of the attention layers that ran before.
        """
        doubt = self.doubt
        if doubt is None or _is_ours(error) or isinstance(error, _NOT_OF_INPUTS):
            return None
        if any(kind in ran for kind in doubt.settled_by):
            return None
        return ValueError(f"{doubt.text} (The model raised {type(error).__name__}: {error})")

    def with_all_logits(self) -> ForwardCall:
        """The same call, with the logits of all tokens."""
        kwargs = {name: x for name, x in self.kwargs.items() if name != LOGITS}
        return replace(self, kwargs=kwargs, last_only=False)


def run_on_copies(
    forward: Callable[..., Any], kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()
) -> Any:
    """Calls a model with copies: it may append to a cache, or write into a tensor."""
    args, kwargs = own_copy((args, dict(kwargs)))
    return forward(*args, **kwargs)


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
        if _takes_whole(model, forward, kwargs):
            # With the type that it has, which the model may count on.
            args = (inputs if isinstance(inputs, MutableMapping) else dict(inputs), *rest)
            kwargs = {}
        elif rest:
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
        named = _with_held(args, kwargs)
        told = _told(named) if named.get("attention_mask") is not None else ()
        return ForwardCall(args, kwargs, told, doubt=_doubt(args, {}, named))
    _check_weights(model)
    parameters = parameters_of(model, forward)
    if not _is_whole(args):
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


def two_tokens(model: nn.Module, n: int = 2) -> dict[str, Tensor] | None:
    """A text of two tokens, or of ``n``; None where the model takes no text."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    # The embedding of padding is often zero, and so would be all that comes of it.
    special = _special_ids(model)
    padding, end = special.get("pad_token_id"), special.get("eos_token_id")
    ids = [i for i in range(n + 1) if i != padding][:n]
    known = _vocabulary(model)
    if end is not None and end != padding and (known is None or end < known):
        ids[-1] = end  # where BART's classifiers read a text
    inputs = {"input_ids": torch.tensor([ids], dtype=torch.long, device=device_of(model))}
    if "decoder_input_ids" in parameters_of(model):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens from: anywhere if it is offloaded, as its hooks move them."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@dataclass(frozen=True)
class Tokens:
    """What a call of a model says of its tokens.

    Args:
        T: How many there are; None where the main input is not a text.
        ids: ``(B, T)``, or the embeddings ``(B, T, d)``; None where the main input is not a text.
        cached: How many stand before them in a key-value cache.
        real: ``(B, T)``, False at padding; None where that is not told.
        cache: That key-value cache.
        named: The arguments of the call by their names.
        text: Tells the layers over the tokens from those over images and the like; None where there
            is nothing beside a text.
    """

    T: int | None
    ids: Tensor | None
    cached: int
    real: Tensor | None
    cache: Any
    named: dict[str, Any]
    text: TextLayers | None = None

    @property
    def told(self) -> tuple[Tensor, ...]:
        """``real``, where that is told."""
        return () if self.real is None else (self.real,)


def tokens_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
    """Reads a call that somebody else makes, and leaves it as it is."""
    args, named = _by_name(model, parameters_of(model), args, dict(kwargs))
    cache = find_cache((*named.values(), *args))
    held = _with_held(args, named)
    tokens = _tokens(held)
    T = None if tokens is None else tokens.shape[1]
    text = TextLayers.of(tokens, held)
    return Tokens(T, tokens, tokens_in(cache), _padding(held), cache, named, text)


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
        if ids.dim() not in (3, 4) or "inputs_embeds" not in parameters:
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
    named = _with_held(args, kwargs)
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
    main, real, doubt = _tokens(named), _told(named), _doubt(args, parameters, named)
    warn_of_special_tokens(model, named)
    if main is None or _is_whole(args):
        return ForwardCall(args, kwargs, real, text=TextLayers.of(main, named), doubt=doubt)
    positions = kwargs.get("position_ids")
    if positions is None and "position_ids" in parameters:
        positions = _positions(model, kwargs, main.shape[1])
        if positions is not None:
            kwargs = {**kwargs, "position_ids": positions}
    lean = _lean(parameters, kwargs)
    last_only = LOGITS in lean and LOGITS not in kwargs
    long = _too_long(model, main.shape[1])
    text = TextLayers.of(main, lean)
    return ForwardCall(args, lean, real, last_only, long, text, doubt)


def _takes_whole(
    model: nn.Module | None, forward: Callable[..., Any], given: Mapping[str, Any]
) -> bool:
    """Whether a forward takes a mapping as one argument, rather than what is in it by name."""
    try:
        signature = inspect.signature(forward)
        if model is not None:
            signature = inspect.Signature(list(parameters_of(model, forward).values()))
    except ValueError:  # of a function that is not written in Python, or of several together
        return False
    if signature.parameters.keys() & given.keys():
        return False
    return not _binds(signature, **given) and _binds(signature, given)


def _is_whole(args: tuple[Any, ...]) -> bool:
    """Whether a model is given a mapping as its first argument."""
    return bool(args) and isinstance(args[0], Mapping)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _with_held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The named arguments, and what mappings among the arguments hold where these have no text."""
    if _tokens(kwargs) is not None:
        return kwargs
    mappings = [x for x in (*args, *kwargs.values()) if isinstance(x, Mapping)]
    held = {name: x for mapping in mappings for name, x in mapping.items()}
    return {**held, **kwargs} if held else kwargs


_NOT_OF_INPUTS = (UnsupportedModelError, MemoryError, torch.OutOfMemoryError)


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by this package, which hooks into the model."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    # What torch itself raises seems to come from what looks on at its functions.
    of_torch = isinstance(error, (RuntimeError, IndexError, TypeError))
    return module.split(".")[0] == __name__.split(".")[0] and not of_torch


def _doubt(args: tuple[Any, ...], parameters: Parameters, named: Mapping[str, Any]) -> Doubt | None:
    """What may be wrong with inputs that some models take and others do not."""
    if _is_whole(args):
        return Doubt(
            f"The forward function has no arguments {', '.join(map(repr, args[0]))}, so it was "
            "given the mapping as a whole: if it takes something else, name its own arguments, or "
            "give a tuple of tensors."
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
            "The model has an encoder and a decoder, but the inputs say nothing of the decoder's "
            "tokens, and it does not make them by itself: give a dict with "
            f"{next(iter(named), 'input_ids')} and decoder_input_ids (or labels).",
            settled_by=("cross",),
        )
    return None


def _check_ids(model: nn.Module, name: str, ids: Tensor) -> None:
    if ids.dim() != 2 and (name, ids.dim()) != ("input_ids", 3):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}: expected (B, T); for one text, ids[None]."
        )
    # A decoder of another language may have a vocabulary of its own.
    reader = getattr(model, "get_decoder", lambda: None)() if name.startswith("decoder") else model
    size = _vocabulary(reader)
    low, high = int(ids.min()), int(ids.max())
    if size is not None and (low < 0 or high >= size):
        wrong = low if low < 0 else high
        raise ValueError(
            f"Token id {wrong} of {name} is outside of the model's vocabulary 0..{size - 1}: use "
            "the model's own tokenizer, and mark padding in attention_mask, not by a special id."
        )


def _vocabulary(model: nn.Module | None) -> int | None:
    """How many token ids a model knows; None where that is not known."""
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of a model that has several
        return None
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _tokens(kwargs: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """What holds one entry a token: ids ``(B, T)`` or embeddings ``(B, T, d)``.

    The choices of an example, ``(B, choices, T)``, are examples of their own.
    """
    tokens = _given(kwargs, prefix)
    if tokens is None:
        return None
    return tokens.flatten(0, 1) if tokens.dim() > 2 + tokens.is_floating_point() else tokens


def _given(kwargs: Mapping[str, Any], prefix: str) -> Tensor | None:
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
    if mask is not None and mask.dim() == 3 and tokens is not _given(kwargs, prefix):
        mask = mask.flatten(0, 1)  # that of choices
    if mask is None:
        return torch.ones(B, T, dtype=torch.bool, device=tokens.device)
    cached = tokens_in(find_cache(kwargs))
    if mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[2] in (1, T):
        return None
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (T, cached + T):
        after = f" after {cached} in a cache" if cached else ""
        raise ValueError(
            f"{prefix}attention_mask has shape {tuple(mask.shape)}, but the inputs are {B} x {T} "
            f"tokens{after}: it must be ({B}, {cached + T}), 1 at tokens and 0 at padding (or "
            "four-dimensional)."
        )
    real = mask[:, -T:] != 0
    if not real.any(-1).all():
        raise ValueError(
            f"Example {int((~real.any(-1)).nonzero()[0])} is empty: {prefix}attention_mask is 0 at "
            "all of its tokens."
        )
    return real


def warn_of_special_tokens(model: nn.Module, named: Mapping[str, Any]) -> None:
    """Warns of ids that look like padding without a mask, and of a text that begins twice.

    Args:
        model: The model, whose configuration names the special tokens.
        named: The arguments of a call by their names.
    """
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_meta:
        return
    if holds_tokens(named.values()):  # the text begins in the cache
        return
    special = _special_ids(model)
    pad = special.pop("pad_token_id", None)
    if pad is not None and named.get("attention_mask") is None:
        # One token that begins or ends a text is no sign of padding where it pads too.
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
    if begin is not None and begin != pad and begins_twice(ids, _padding(named), begin):
        warnings.warn(
            f"The text begins with two begin tokens (bos_token_id={begin}), as a chat does that "
            "was rendered to text and tokenized again: tokenize it with add_special_tokens=False.",
            stacklevel=STACKLEVEL,
        )


def begins_twice(ids: Tensor, real: Tensor | None, begin: int) -> bool:
    """Whether a text of a batch begins with two begin tokens.

    Args:
        ids: ``(B, T)``.
        real: ``(B, T)``, False at padding; None where that is not told.
        begin: The id of the begin token.
    """
    first = [0] * len(ids) if real is None else real.long().argmax(1).tolist()
    starts = (row[start : start + 2] for row, start in zip(ids, first, strict=True))
    return any(start.tolist() == [begin, begin] for start in starts)


def _special_ids(model: nn.Module) -> dict[str, int]:
    """The ids of special tokens that a model's configuration names."""
    text = _text_config(model)
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
    found = {name: getattr(text, name, None) for name in names}
    return {name: x for name, x in found.items() if isinstance(x, int)}


def _positions(model: nn.Module, named: Mapping[str, Any], T: int) -> Tensor | None:
    """Position ids by the mask, as ``generate`` makes them; None where the model makes its own.

    A text must stand where it would stand alone, whatever padding comes before it.
    """
    mask = named.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    real = mask != 0
    if real.all() or not getattr(model, "can_generate", lambda: False)():
        return None
    counting = _Counting.of(model)
    # Images may take positions on a grid, which the model knows and we do not.
    if not counting.from_zero or (_beside_text(named) and counting.skips_padding):
        return None
    return (real.long().cumsum(-1) - 1).clamp_(min=0)[:, -T:]


def _beside_text(named: Mapping[str, Any]) -> bool:
    """Whether a call has other inputs than a text, such as the pixels of an image."""
    return any(
        isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 2 and name != "inputs_embeds"
        for name, x in named.items()
        if not name.endswith("mask")
    )


@dataclass(frozen=True)
class _Counting:
    """How a model counts the positions of a text, found by passes over three tokens.

    Args:
        from_zero: Whether position ids 0, 1, 2 change nothing. RoBERTa counts from its padding.
        skips_padding: Whether padding before a text changes nothing without position ids.
    """

    from_zero: bool
    skips_padding: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Counting:
        """What was found of a model, once."""
        if model not in _counting:
            _counting[model] = cls._found(model)
        return _counting[model]

    @classmethod
    def _found(cls, model: nn.Module) -> _Counting:
        text = two_tokens(model, 3)
        if text is None:
            return cls(from_zero=True, skips_padding=False)
        ids = text["input_ids"]
        pad = _special_ids(model).get("pad_token_id", 0)
        padded = torch.nn.functional.pad(ids, (1, 0), value=pad)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (1, 0))
        positions = torch.arange(3, device=ids.device)[None]
        try:
            with torch.no_grad(), evaluating([model]), suspended():
                plain = _first_states(model(**text), 3)
                counted = _first_states(model(**{**text, "position_ids": positions}), 3)
                behind = model(**{**text, "input_ids": padded, "attention_mask": mask})
                skipped = _first_states(behind, 4)[:, 1:]
        except Exception:  # a model that runs on no plain text says nothing
            return cls(from_zero=True, skips_padding=False)
        return cls(_near(plain, counted), _near(plain, skipped))


_counting: WeakKeyDictionary[nn.Module, _Counting] = WeakKeyDictionary()


def _first_states(output: Any, T: int) -> Tensor:
    """The first result ``(B, T, n)`` of a pass."""
    held = output.values() if isinstance(output, Mapping) else output
    several = [held] if isinstance(held, Tensor) else list(held)
    return next(x for x in several if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == T)


def _near(a: Tensor, b: Tensor) -> bool:
    tolerance = max(1e-4, 8 * torch.finfo(a.dtype).eps) * float(a.abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def _too_long(model: nn.Module, T: int) -> Callable[[], str | None] | None:
    configured = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(configured, int) or not 0 < configured < T:
        return None

    def message() -> str | None:
        short = two_tokens(model)
        if short is None:
            return None
        short["input_ids"][:, 1:] = short["input_ids"][:, :1]  # equal ids are not positions
        try:
            with suspended():  # this pass is not a part of what is observed
                limit = longest_text(lambda: model(**short))
        except Exception:  # whatever ails the model, it is not the length
            return None
        return None if limit is None or limit >= T else too_long(T, min(configured, limit))

    return message


def _text_config(model: nn.Module) -> object:
    """The configuration of the part of a model that reads text; None where it has none."""
    config = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)()


def _lean(parameters: Parameters, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what attribution does not look at: a cache, and logits over the vocabulary."""
    lean = dict(kwargs)
    if "use_cache" in parameters and find_cache(kwargs) is None:
        lean.setdefault("use_cache", False)
    if LOGITS in parameters and kwargs.get("labels") is None:
        lean.setdefault(LOGITS, 1)
    return lean
