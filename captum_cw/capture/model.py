"""The model: unwrap it, read what it takes, and run it in evaluation mode, uncompiled."""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw._utils.memory import free_bytes
from captum_cw.capture.attention_call import UnsupportedModelError
from captum_cw.capture.restoring import evaluating

__all__ = [
    "LOGITS",
    "Parameters",
    "check_fits",
    "device_of",
    "evaluation_mode",
    "model_of",
    "parameters_of",
    "special_ids",
    "text_config",
    "two_tokens",
    "uncompiled",
    "unwrapped",
    "vocabulary_size",
]

Parameters = Mapping[str, inspect.Parameter]

#: The argument of forward that restricts the logits to the last tokens.
LOGITS = "logits_to_keep"

#: The special tokens that configurations name.
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")


def unwrapped(forward_func: Any) -> Any:
    """Return the model inside compiled and parallel wrappers; anything else as it is.

    Raises:
        TypeError: If it is mistaken for a model: a class, a name, a tokenizer or a pipeline.
        UnsupportedModelError: If a module is compiled by TorchScript.

    Example:
        >>> unwrapped(torch.nn.DataParallel(model)) is model
        True
    """
    while True:
        if isinstance(forward_func, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            forward_func = forward_func.module
        elif hasattr(forward_func, "_orig_mod"):  # compiled
            forward_func = forward_func._orig_mod
        else:
            break
    _refuse_mistaken(forward_func)
    for name, module in getattr(forward_func, "named_modules", list)():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"module {name!r} of the model" if name else "model"
            raise UnsupportedModelError(
                f"The {place} is compiled by TorchScript, which lets nobody see its functions: "
                "give the model as it was before torch.jit.script or torch.jit.trace."
            )
    return forward_func


def _refuse_mistaken(given: Any) -> None:
    """Raise a TypeError for what users often give in the place of a model."""
    kind = type(given).__name__
    if isinstance(given, type):
        hint = f"{given.__name__} is a class: give an instance, such as {given.__name__}(...)"
    elif isinstance(given, str):
        hint = f"{given!r} is a name: load the model first, such as with load_model({given!r})"
    elif hasattr(given, "convert_ids_to_tokens"):
        hint = f"{kind} is a tokenizer: give the model first, and then the tokenizer"
    elif hasattr(given, "preprocess") and isinstance(getattr(given, "model", None), nn.Module):
        hint = f"{kind} is a pipeline: give its model, such as pipe.model"
    else:
        return
    raise TypeError(f"{hint}.")


def model_of(forward_func: object) -> nn.Module | None:
    """Return the module that a callable is, or is a method of; None for other callables.

    Raises:
        TypeError: If ``forward_func`` is not callable.

    Example:
        >>> model_of(model.generate) is model, model_of(print) is None
        (True, True)
    """
    owner = getattr(forward_func, "__self__", None)
    for module in (forward_func, owner):
        if isinstance(module, nn.Module):
            return module
    if not callable(forward_func):
        raise TypeError(
            f"forward_func is of type {type(forward_func).__name__}: give the model, or a callable."
        )
    return None


def parameters_of(model: nn.Module, forward: Callable[..., Any] | None = None) -> Parameters:
    """Return the parameters of a model's forward, or of another function of the model.

    PEFT's and FSDP's wrappers pass keyword arguments that they do not name on to the model inside.
    The parameters of that model are then included.

    Example:
        >>> list(parameters_of(model))[:3]
        ['input_ids', 'attention_mask', 'position_ids']
    """
    own = inspect.signature(forward or model.forward).parameters
    base = getattr(model, "get_base_model", lambda: getattr(model, "module", None))()
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    if not isinstance(base, nn.Module) or not passes_on:
        return own
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: p for name, p in own.items() if p.kind not in variable}
    return {**named, **{n: p for n, p in parameters_of(base).items() if n not in named}}


def device_of(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs.

    It is the CPU for an offloaded model, whose hooks move the inputs, and for a model that holds no
    tensors.

    Example:
        >>> device_of(model)
        device(type='cpu')
    """
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None or held.is_meta else held.device


def text_config(model: nn.Module) -> object:
    """Return the configuration of the part of a model that reads text; None without one."""
    config = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)()


def special_ids(model: nn.Module) -> dict[str, int]:
    """Return the ids of special tokens by their names in the model's configuration."""
    ids = {name: getattr(text_config(model), name, None) for name in SPECIAL}
    return {name: x for name, x in ids.items() if isinstance(x, int)}


def vocabulary_size(model: nn.Module | None) -> int | None:
    """Return the number of token ids that a model knows; None if it is unknown."""
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # the model has more than one table
        return None
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None


def two_tokens(model: nn.Module, n: int = 2) -> dict[str, Tensor] | None:
    """Return inputs of two tokens, for a pass that finds out how a model works.

    Args:
        model: The model.
        n: The number of tokens.

    Returns:
        The keyword arguments, with ``input_ids`` ``(1, n)``; None if the model does not read text.

    Example:
        >>> two_tokens(model)
        {'input_ids': tensor([[0, 1]])}
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    special, size = special_ids(model), vocabulary_size(model)
    padding, end = special.get("pad_token_id"), special.get("eos_token_id")
    # The embedding of padding is often zero, which would make the states zero.
    ids = [i for i in range(n + 1) if i != padding][:n]
    if end is not None and end != padding and (size is None or end < size):
        ids[-1] = end  # BART's classifiers read the state of the end token
    inputs = {"input_ids": torch.tensor([ids], dtype=torch.long, device=device_of(model))}
    if "decoder_input_ids" in parameters_of(model):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def evaluation_mode(
    roots: list[nn.Module], model: nn.Module | None
) -> AbstractContextManager[None]:
    """Turn dropout off with a warning, and restore the modules afterwards.

    Args:
        roots: The modules that are observed.
        model: The whole model; None if only ``roots`` are known.

    Raises:
        ValueError: If ``roots`` are in training mode and the model around them is unknown.
    """
    if any(m.training for root in roots for m in root.modules()):
        if model is None:
            raise ValueError(
                "The layers are in training mode, and the model around them is not known, so "
                "its dropout would stay on: call model.eval() first, or give the model as "
                "forward_func."
            )
        warnings.warn(
            "The model is in training mode: dropout is off for the attribution.", stacklevel=5
        )
    return evaluating(roots)


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled functions as they were written, since fused functions cannot be observed."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import is slow
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def check_fits(needed: int, device: torch.device, what: str, hint: str) -> None:
    """Raise a MemoryError if maps do not fit into the free memory.

    Args:
        needed: the size of the maps in bytes.
        device: the device of the maps.
        what: the maps and their shape, for the message.
        hint: what the user can do instead, for the message.
    """
    free = free_bytes(device)
    if needed > free:
        raise MemoryError(
            f"The maps need {needed / 1e9:.1f} GB ({what}), but {free / 1e9:.1f} GB are free. "
            f"{hint}"
        )
