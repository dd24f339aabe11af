"""Identify models, data and methods, so that records of different runs do not mix."""

from __future__ import annotations

import copyreg
import dis
import hashlib
import importlib
import logging
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw import measures
from captum_cw.attr import TokenScores
from captum_cw.attr.measures import AttentionAttribution

__all__ = ["UNTOLD", "check_told", "checksum", "described", "fingerprint"]

#: In the description of a callable that may not be told from others.
UNTOLD = "not told from others"


def checksum(*tensors: Tensor) -> str:
    """Of the bytes of some tensors, as eight hexadecimal digits."""
    crc = 0
    for x in tensors:
        x = x.detach().cpu().contiguous()
        crc = zlib.crc32(repr((x.dtype, tuple(x.shape))).encode(), crc)
        crc = zlib.crc32(bytes(x.flatten().view(torch.uint8).numpy()) if x.numel() else b"", crc)
    return f"{crc:08x}"


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by configuration, weights and code, as eight hexadecimal digits.

    Of each weight that is in memory, by the sum of its bytes, which any change of a number
    changes, and a thousand of its numbers, since the sum does not tell where they stand. Weights
    that are kept elsewhere (offloaded to disk) are not read. The plain attributes of each module
    count too, and the code of classes that are not of an installed package; hooks do not.
    """
    config = getattr(model, "config", None)
    settings: dict[str, Any] = getattr(config, "to_diff_dict", dict)()
    crc = zlib.crc32(repr(sorted(settings.items(), key=str)).encode())
    for name, x in model.state_dict().items():
        crc = zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), crc)
        if not x.is_meta and x.numel():
            flat = x.detach().contiguous().flatten()
            # Integers, so that the order in which they are added does not matter.
            total = int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
            sample = checksum(flat[:: max(1, len(flat) // 1000)])
            crc = zlib.crc32(f"{total} {sample}".encode(), crc)
    description = _Description(model)
    for module in model.modules():
        crc = zlib.crc32(description.of_parts(module).encode(), crc)
    return f"{crc:08x}"


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def described(method: object, model: nn.Module | None = None) -> str:
    """A method, or another callable, in words that tell it from others in any process.

    A function is told by its code, defaults and closure, and, where it is not of an installed
    package, by the globals and modules that it reads; an object by its class and state; tensors by
    a checksum and models by a fingerprint.

    Args:
        method: What is described.
        model: The model that is evaluated; those of measures of other models are told apart.

    Returns:
        The description. It holds :data:`UNTOLD` where there is something inside, such as an open
        file or a generator, that cannot be told from another one.

    Example:
        >>> def scale(factor):
        ...     return lambda batch: factor * batch["input_ids"]
        >>> described(scale(2)) == described(scale(2)), described(scale(2)) == described(scale(3))
        (True, False)
    """
    description = _Description(model)
    entry = measures.find(method) if isinstance(method, str) else None
    if entry is not None and not entry.is_built_in:
        method = entry.function(), entry.signed, entry.seen_in()
    if isinstance(method, str):
        return method
    text = description.of(method)
    if not isinstance(method, (TokenScores, AttentionAttribution, Tensor)):
        named = method if hasattr(method, "__qualname__") else type(method)
        text = f"{_name(named)} {_digest(text)}"
    if description.untold:
        text += f" ({UNTOLD}: {', '.join(dict.fromkeys(description.untold))})"
    return text


def check_told(descriptions: Mapping[str, str]) -> None:
    """Refuses to keep, or to go on from, records of callables that may not be told from others.

    Args:
        descriptions: By name, what :func:`described` gives.

    Raises:
        ValueError: If one may not be told from others.

    Example:
        >>> check_told({"mine": described(iter([1]).__next__)})
        >>> check_told({"mine": described(lambda batch, file=open(__file__): None)})
        Traceback (most recent call last):
        ...
        ValueError: 'mine' holds a _io.TextIOWrapper, ...
    """
    for name, text in descriptions.items():
        if UNTOLD in text:
            held = text.rpartition(f"({UNTOLD}: ")[2].removesuffix(")")
            raise ValueError(
                f"{name!r} holds a {held}, of which nothing tells whether it is the same in "
                "another run, so records of several runs might mix: leave resume_from out, or give "
                "a callable object whose class has a __getstate__ that tells what it depends on."
            )


class _Description:
    """Words for objects, the same in each process: no addresses, and no order by hashes.

    Args:
        model: The model that is evaluated.

    Attributes:
        untold: The classes of objects that could not be described.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.untold: list[str] = []
        # Objects that are being described, since they may hold themselves; and those that were,
        # which are kept, so that their ids stay theirs.
        self._open: list[int] = []
        self._done: dict[int, tuple[str, object]] = {}

    def of(self, x: object) -> str:
        """What tells ``x`` from others."""
        if type(x) in _PLAIN:
            return repr(x)
        if id(x) in self._open:
            return f"^{self._open.index(id(x))}"
        if id(x) not in self._done:
            self._open.append(id(x))
            text = self._of(x)
            self._open.pop()
            self._done[id(x)] = _digest(text) if len(text) > LONG else text, x
        return self._done[id(x)][0]

    def _of(self, x: Any) -> str:
        if type(x) in (list, tuple):
            return f"{type(x).__name__} {self.of_all(x)}"
        if type(x) in (set, frozenset):
            return f"{type(x).__name__} {sorted(map(self.of, x))}"
        if type(x) in (dict, MappingProxyType):
            items = sorted(((self.of(name), value) for name, value in x.items()), key=_first)
            return self.of_all(part for item in items for part in item)
        describe = next((how for kind, how in _KINDS.items() if isinstance(x, kind)), None)
        return self.of_object(x) if describe is None else describe(self, x)

    def of_all(self, several: Iterable[object]) -> str:
        """Of several in their order."""
        return f"[{', '.join(map(self.of, several))}]"

    def of_tensor(self, x: Tensor) -> str:
        """By its numbers."""
        try:
            return f"scores {checksum(x)}"
        except (NotImplementedError, RuntimeError, TypeError):  # on the meta device, or sparse
            return self.unknown(x)

    def of_array(self, x: Any) -> str:
        """Of NumPy's arrays and numbers."""
        if x.dtype.hasobject:
            return f"array {x.shape} {self.of_all(x.ravel().tolist())}"
        return f"array {x.dtype.str} {x.shape} {zlib.crc32(x.tobytes()):08x}"

    def of_module(self, x: nn.Module) -> str:
        """By its place in the evaluated model, else by its weights and settings."""
        if self.model is not None:
            place = next((name for name, m in self.model.named_modules() if m is x), None)
            if place is not None:
                return f"module {place!r} of the model" if place else "the model"
        looks = re.sub("0x[0-9a-f]+", "", repr(x))
        return f"{_name(type(x))} {fingerprint(x)} {_digest(looks)}"

    def of_parts(self, x: nn.Module) -> str:
        """What a module has beside its weights: its class, plain attributes and other buffers."""
        # Models of libraries note in tensors what they met in their last pass.
        kinds = _NOTED if _is_installed(type(x).__module__) else (*_NOTED, Tensor)
        own = {n: v for n, v in vars(x).items() if n not in _OF_TORCH and isinstance(v, kinds)}
        buffers = {n: v for n, v in x._buffers.items() if n in x._non_persistent_buffers_set}
        return self.of_all((type(x), own, buffers))

    def of_token_scores(self, x: TokenScores) -> str:
        """By the measure and the choices."""
        choices = [x.reduction, x.layers, x.heads, x.queries]
        return f"{self.of(x.method)}, {choices}, signed={x.signed}"

    def of_measure(self, x: AttentionAttribution) -> str:
        """By its name and choices; the evaluated model is not named."""
        name = f"{x.get_name()} {getattr(x, 'scope', '')}".strip()
        name += "" if x.space == "attention" else f" in the {x.space}'s space"
        name += "" if x.kind == "self" else f", kind={x.kind!r}"
        name += "" if x.layer is None else f", layer={self.of(x.layer)}"
        name += "" if _is_installed(type(x).__module__) else f", {self.of(type(x))}"
        if x.model is None:
            return f"{name} of {self.of(x.forward_func)}"
        return name if x.model is self.model else f"{name} of {fingerprint(x.model)}"

    def of_code(self, x: CodeType) -> str:
        """By what it does; where it stands in its file does not matter."""
        counts = (x.co_argcount, x.co_posonlyargcount, x.co_kwonlyargcount, x.co_flags)
        names = (x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars)
        return self.of_all((x.co_code, *counts, *names, *x.co_consts))

    def of_function(self, x: FunctionType) -> str:
        """By its code, what it was given when it was made, and what it reads."""
        cells = dict(zip(x.__code__.co_freevars, map(_content, x.__closure__ or ()), strict=True))
        read: dict[str, object] = {}
        if not _is_installed(x.__module__):
            names = set(_globals_of(x.__code__))
            read = {name: value for name, value in x.__globals__.items() if name in names}
            read["import"] = _imported(x.__code__, x.__globals__.get("__package__"))
        given = (x.__code__, x.__defaults__, x.__kwdefaults__, cells, read, vars(x))
        return f"{_name(x)} {self.of_all(given)}"

    def of_method(self, x: MethodType) -> str:
        """By what it is bound to, too."""
        return f"{self.of(x.__self__)}.{self.of(x.__func__)}"

    def of_builtin(self, x: BuiltinFunctionType) -> str:
        """By its name, and what it is bound to."""
        return f"{self.of(x.__self__)}.{x.__qualname__}"

    def of_partial(self, x: partial[Any]) -> str:
        """By what it calls, and with what."""
        return f"partial {self.of_all((x.func, x.args, x.keywords))}"

    def of_class(self, x: type) -> str:
        """By its name, and, where it is not of an installed package, by what is in it."""
        if _is_installed(x.__module__):
            return _name(x)
        inside = {name: value for name, value in vars(x).items() if _belongs(name, value)}
        return f"{_name(x)} {self.of_all((x.__bases__, inside))}"

    def of_source(self, x: ModuleType) -> str:
        """By its name, and, where it is not of an installed package, by what it defines."""
        if _is_installed(x.__name__):
            return f"module {x.__name__}"
        kinds = (*_NOTED, Tensor, ModuleType)
        inside = {n: v for n, v in vars(x).items() if n[:2] != "__" and isinstance(v, kinds)}
        return f"module {x.__name__} {self.of(inside)}"

    def of_object(self, x: object) -> str:
        """By its class and what pickle would keep of it."""
        try:
            copied = copyreg.dispatch_table.get(type(x))
            kept = copied(x) if copied else x.__reduce_ex__(4)
        except Exception:  # whatever a class raises that does not want to be copied
            return self.unknown(x)
        if isinstance(kept, str):  # a name
            return f"{kept} {self.of(getattr(x, '__wrapped__', None))}"
        parts = (list(part) if isinstance(part, Iterator) else part for part in kept)
        return self.of_all((type(x), *parts))

    def unknown(self, x: object) -> str:
        """Notes that ``x`` may not be told from others."""
        self.untold.append(_name(type(x)))
        return f"{_name(type(x))}, unknown"


#: Told by their ``repr``.
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(Ellipsis)}
#: Attributes of a module of torch, or of Python, that count.
_NOTED = (
    *(*_PLAIN, list, tuple, dict, set, frozenset, np.ndarray, np.generic),
    *(FunctionType, MethodType, partial, type),
)
_OF_TORCH = vars(nn.Module()).keys()
#: Characters of a description that is put in short.
LONG = 500
_KINDS: dict[type | tuple[type, ...], Callable[[_Description, Any], str]] = {
    TokenScores: _Description.of_token_scores,
    AttentionAttribution: _Description.of_measure,
    Tensor: _Description.of_tensor,
    nn.Module: _Description.of_module,
    (np.ndarray, np.generic): _Description.of_array,
    partial: _Description.of_partial,
    FunctionType: _Description.of_function,
    MethodType: _Description.of_method,
    BuiltinFunctionType: _Description.of_builtin,
    CodeType: _Description.of_code,
    type: _Description.of_class,
    ModuleType: _Description.of_source,
    Enum: lambda description, x: f"{_name(type(x))}.{x.name} {description.of(x.value)}",
    logging.Logger: lambda description, x: f"logger {x.name}",
    property: lambda description, x: description.of_all((x.fget, x.fset)),
    cached_property: lambda description, x: description.of(x.func),
    (staticmethod, classmethod): lambda description, x: description.of(x.__func__),
    torch.Generator: lambda description, x: description.of_all((x.device, x.get_state())),
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _name(x: Any) -> str:
    return f"{getattr(x, '__module__', None)}.{x.__qualname__}"


def _first(item: tuple[str, object]) -> str:
    return item[0]


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "nothing yet"


def _globals_of(code: CodeType) -> Iterator[str]:
    """The names that code reads as globals, that of functions within it included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _imported(code: CodeType, package: str | None) -> dict[str, object]:
    """The modules that code imports while it runs, that of functions within it included."""
    found: dict[str, object] = {}
    instructions = list(dis.get_instructions(code))
    for place, instruction in enumerate(instructions):
        if instruction.opname == "IMPORT_NAME":
            level = instructions[place - 2].argval  # it stands before the names, as a constant
            name = "." * (level if isinstance(level, int) else 0) + instruction.argval
            try:
                found[name] = importlib.import_module(name, package)
            except ImportError:
                found[name] = "missing"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(_imported(constant, package))
    return found


def _belongs(name: str, value: object) -> bool:
    """Whether what is in a class is of its own making: of what Python adds, functions alone."""
    if isinstance(value, (GetSetDescriptorType, MemberDescriptorType)) or name == "_abc_impl":
        return False
    return isinstance(value, FunctionType) or not (name.startswith("__") and name.endswith("__"))


def _is_installed(module: str | None) -> bool:
    """Whether a module is Python's, of an installed package, or this one: versions tell of it."""
    root = (module or "").partition(".")[0]
    if root in sys.stdlib_module_names or root in (__name__.partition(".")[0], "builtins"):
        return root != "__main__"
    found = sys.modules.get(root)
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None)
    return file is not None and any(Path(file).is_relative_to(place) for place in _PLACES)


#: Where packages are installed.
_PLACES = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
