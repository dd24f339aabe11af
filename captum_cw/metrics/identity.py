"""Identify models, data and methods, so that records of different runs do not mix."""

from __future__ import annotations

import copyreg
import dis
import hashlib
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from types import (
    CodeType,
    FunctionType,
    GetSetDescriptorType,
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

__all__ = ["UNIDENTIFIED", "check_identified", "checksum", "described", "fingerprint"]

#: Marks the description of a callable that cannot be identified.
UNIDENTIFIED = "not identified"


def checksum(*tensors: Tensor) -> str:
    """Return a checksum of the bytes, shapes and dtypes of tensors, as eight hexadecimal digits.

    Example:
        >>> checksum(torch.zeros(2)) == checksum(torch.zeros(2)) != checksum(torch.zeros(3))
        True
    """
    crc = 0
    for x in tensors:
        x = x.detach().cpu().contiguous()
        crc = zlib.crc32(repr((x.dtype, tuple(x.shape))).encode(), crc)
        crc = zlib.crc32(bytes(x.flatten().view(torch.uint8).numpy()) if x.numel() else b"", crc)
    return f"{crc:08x}"


def fingerprint(model: nn.Module) -> str:
    """Return a checksum of a model's configuration, weights and code, as eight hexadecimal digits.

    Of each weight in memory it takes the sum of its bytes, which any changed number changes, and a
    thousand of its numbers, because a sum does not depend on their positions. Weights that are
    offloaded to disk are not read. The plain attributes of each module count too, and so does the
    code of classes that do not belong to an installed package. Hooks do not count.

    Example:
        >>> fingerprint(model) == fingerprint(model)
        True
    """
    config = getattr(model, "config", None)
    settings: dict[str, Any] = getattr(config, "to_diff_dict", dict)()
    crc = zlib.crc32(repr(sorted(settings.items(), key=str)).encode())
    for name, x in model.state_dict().items():
        crc = zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), crc)
        if not x.is_meta and x.numel():
            flat = x.detach().contiguous().flatten()
            # Sums of integers do not depend on the order of addition.
            total = int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
            sample = checksum(flat[:: max(1, len(flat) // 1000)])
            crc = zlib.crc32(f"{total} {sample}".encode(), crc)
    description = _Description(model)
    for module in model.modules():
        crc = zlib.crc32(description.of_attributes(module).encode(), crc)
    return f"{crc:08x}"


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def described(method: object, model: nn.Module | None = None) -> str:
    """Return a description of a method or callable that is the same in every process.

    A function is described by its code, defaults and closure. If it does not belong to an
    installed package, the globals and modules that it reads count too. An object is described by
    its class and state, a tensor by a checksum and a model by a fingerprint.

    Args:
        method: the method or callable.
        model: the evaluated model. Measures of other models are described with their model.

    Returns:
        The description. It contains :data:`UNIDENTIFIED` if ``method`` holds an object, such as an
        open file or a lock, that cannot be identified.

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
    if description.unidentified:
        text += f" ({UNIDENTIFIED}: {', '.join(dict.fromkeys(description.unidentified))})"
    return text


def check_identified(descriptions: Mapping[str, str]) -> None:
    """Check that all methods of a resumed run can be identified.

    Args:
        descriptions: by name, the results of :func:`described`.

    Raises:
        ValueError: If one of them cannot be identified.

    Example:
        >>> check_identified({"mine": described(iter([1]).__next__)})
        >>> check_identified({"mine": described(lambda batch, file=open(__file__): None)})
        Traceback (most recent call last):
        ...
        ValueError: 'mine' holds a _io.TextIOWrapper, ...
    """
    for name, text in descriptions.items():
        if UNIDENTIFIED in text:
            held = text.rpartition(f"({UNIDENTIFIED}: ")[2].removesuffix(")")
            raise ValueError(
                f"{name!r} holds a {held}, which cannot be identified in another run, so the "
                "records of different runs could mix: leave resume_from out, or use a callable "
                "object whose class has a __getstate__ that returns what its scores depend on."
            )


class _Description:
    """Describes objects, without memory addresses and without the order of hashes.

    Args:
        model: the evaluated model.

    Attributes:
        unidentified: the classes of objects that could not be identified.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.unidentified: list[str] = []
        # Objects may hold themselves, so these are the ids of those that are being described.
        self._open: list[int] = []
        # By id. The objects are kept, so that no other object gets their ids.
        self._done: dict[int, tuple[str, object]] = {}

    def of(self, x: object) -> str:
        """Return the description of ``x``."""
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
        if type(x) is dict:
            items = sorted(((self.of(key), value) for key, value in x.items()), key=itemgetter(0))
            return self.of_all(part for item in items for part in item)
        describe = next((how for kind, how in _KINDS.items() if isinstance(x, kind)), None)
        return self.of_object(x) if describe is None else describe(self, x)

    def of_all(self, parts: Iterable[object]) -> str:
        """Return the descriptions of objects in their order."""
        return f"[{', '.join(map(self.of, parts))}]"

    def of_tensor(self, x: Tensor) -> str:
        try:
            return f"scores {checksum(x)}"
        except (NotImplementedError, RuntimeError, TypeError):  # a sparse tensor, or a meta tensor
            return self.of_unidentified(x)

    def of_array(self, x: Any) -> str:
        content = x.tolist() if x.dtype.hasobject else zlib.crc32(x.tobytes())
        return f"array {x.dtype.str} {x.shape} {self.of(content)}"

    def of_module(self, x: nn.Module) -> str:
        """Describe a module by its name in the evaluated model, or by its weights and settings."""
        if self.model is not None:
            name = next((name for name, m in self.model.named_modules() if m is x), None)
            if name is not None:
                return f"module {name!r} of the model" if name else "the model"
        looks = re.sub("0x[0-9a-f]+", "", repr(x))
        return f"{_name(type(x))} {fingerprint(x)} {_digest(looks)}"

    def of_attributes(self, x: nn.Module) -> str:
        """Describe what a module holds besides its weights."""
        # Models of libraries store tensors of their last pass as attributes.
        kinds = _NOTED if _is_installed(type(x).__module__) else (*_NOTED, Tensor)
        own = {n: v for n, v in vars(x).items() if n not in _OF_TORCH and isinstance(v, kinds)}
        buffers = {n: v for n, v in x._buffers.items() if n in x._non_persistent_buffers_set}
        return self.of_all((type(x), own, buffers))

    def of_token_scores(self, x: TokenScores) -> str:
        choices = [x.reduction, x.layers, x.heads, x.queries]
        return f"{self.of(x.method)}, {choices}, signed={x.signed}"

    def of_measure(self, x: AttentionAttribution) -> str:
        """Describe a measure by its name and settings, and by its model if that is another."""
        name = f"{x.get_name()} {getattr(x, 'scope', '')}".strip()
        name += "" if x.space == "attention" else f" in the {x.space}'s space"
        name += "" if x.kind == "self" else f", kind={x.kind!r}"
        name += "" if x.layer is None else f", layer={self.of(x.layer)}"
        name += "" if _is_installed(type(x).__module__) else f", {self.of(type(x))}"
        if x.model is None:
            return f"{name} of {self.of(x.forward_func)}"
        return name if x.model is self.model else f"{name} of {fingerprint(x.model)}"

    def of_code(self, x: CodeType) -> str:
        """Describe code by what it does, not by its position in a file."""
        counts = (x.co_argcount, x.co_posonlyargcount, x.co_kwonlyargcount, x.co_flags)
        names = (x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars)
        return self.of_all((x.co_code, *counts, *names, *x.co_consts))

    def of_function(self, x: FunctionType) -> str:
        cells = dict(zip(x.__code__.co_freevars, map(_content, x.__closure__ or ()), strict=True))
        read: dict[str, object] = {}
        if not _is_installed(x.__module__):
            names = set(_globals_of(x.__code__))
            read = {name: value for name, value in x.__globals__.items() if name in names}
        given = (x.__code__, x.__defaults__, x.__kwdefaults__, cells, read, vars(x))
        return f"{_name(x)} {self.of_all(given)}"

    def of_class(self, x: type) -> str:
        """Describe a class by its name, and outside installed packages by its content."""
        if _is_installed(x.__module__):
            return _name(x)
        content = {name: value for name, value in vars(x).items() if _is_own(name, value)}
        return f"{_name(x)} {self.of_all((x.__bases__, content))}"

    def of_source(self, x: ModuleType) -> str:
        """Describe a Python module by its name, and outside installed packages by its content."""
        if _is_installed(x.__name__):
            return f"module {x.__name__}"
        kinds = (*_NOTED, Tensor, ModuleType)
        content = {n: v for n, v in vars(x).items() if n[:2] != "__" and isinstance(v, kinds)}
        return f"module {x.__name__} {self.of(content)}"

    def of_object(self, x: object) -> str:
        """Describe an object by its class and by the state that pickle would keep."""
        try:
            reduce = copyreg.dispatch_table.get(type(x))
            state = reduce(x) if reduce else x.__reduce_ex__(4)
        except Exception:  # classes raise any exception if they cannot be pickled
            return self.of_unidentified(x)
        if isinstance(state, str):  # a global name
            wrapped = getattr(x, "__wrapped__", None)
            return f"{getattr(x, '__module__', None)}.{state} {self.of(wrapped)}"
        parts = (list(part) if isinstance(part, Iterator) else part for part in state)
        return self.of_all((type(x), *parts))

    def of_unidentified(self, x: object) -> str:
        """Note that ``x`` cannot be identified."""
        self.unidentified.append(_name(type(x)))
        return f"{_name(type(x))}, unknown"


#: The classes whose ``repr`` describes an object.
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(Ellipsis)}
#: The classes of the attributes of a module that count.
_NOTED = (
    *(*_PLAIN, list, tuple, dict, set, frozenset, np.ndarray, np.generic),
    *(FunctionType, MethodType, partial, type),
)
_OF_TORCH = vars(nn.Module()).keys()
#: The number of characters from which a description is replaced by its digest.
LONG = 500
_KINDS: dict[type | tuple[type, ...], Callable[[_Description, Any], str]] = {
    TokenScores: _Description.of_token_scores,
    AttentionAttribution: _Description.of_measure,
    Tensor: _Description.of_tensor,
    nn.Module: _Description.of_module,
    (np.ndarray, np.generic): _Description.of_array,
    FunctionType: _Description.of_function,
    CodeType: _Description.of_code,
    type: _Description.of_class,
    ModuleType: _Description.of_source,
    property: lambda description, x: description.of_all((x.fget, x.fset)),
    cached_property: lambda description, x: description.of(x.func),
    (staticmethod, classmethod): lambda description, x: description.of(x.__func__),
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _name(x: Any) -> str:
    return f"{getattr(x, '__module__', None)}.{x.__qualname__}"


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _globals_of(code: CodeType) -> Iterator[str]:
    """Yield the names that code, and the functions inside it, read as globals."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _is_own(name: str, value: object) -> bool:
    """Whether an entry of a class was written by its author, and not added by Python."""
    if isinstance(value, (GetSetDescriptorType, MemberDescriptorType)) or name == "_abc_impl":
        return False
    return isinstance(value, FunctionType) or not (name.startswith("__") and name.endswith("__"))


def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python, an installed package or captum_cw, by its version."""
    root = (module or "").partition(".")[0]
    if root in sys.stdlib_module_names or root in (__name__.partition(".")[0], "builtins"):
        return root != "__main__"
    package = sys.modules.get(root)
    file = getattr(package, "__file__", None) or next(iter(getattr(package, "__path__", ())), None)
    return file is not None and any(Path(file).is_relative_to(place) for place in _PLACES)


#: The folders of installed packages.
_PLACES = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
