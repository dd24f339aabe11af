"""Identify models, data and methods, so that records of different runs do not mix."""

from __future__ import annotations

import copyreg
import hashlib
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from inspect import signature
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw import measures
from captum_cw.attr import InputContributions, TokenScores
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
            try:
                parts = list(self._parts(x))
            except Exception:  # classes raise any exception if they cannot be pickled
                self.unidentified.append(_name(type(x)))
                parts = [UNIDENTIFIED]
            text = f"{_name(x)}({', '.join(map(self.of, parts))})"
            self._open.pop()
            if len(text) > LONG and not isinstance(x, _MEASURES):
                text = f"{_name(x)} {_digest(text)}"
            self._done[id(x)] = text, x
        return self._done[id(x)][0]

    def _parts(self, x: Any) -> Iterable[object]:
        """Return the objects that identify ``x``, with its class or name.

        Raises:
            Exception: If ``x`` cannot be identified.
        """
        if type(x) in (list, tuple):
            return list(x)
        if type(x) in (set, frozenset):
            return sorted(map(self.of, x))
        if type(x) is dict:
            return chain.from_iterable(x.items())
        if isinstance(x, Tensor):
            return [checksum(x)]
        if isinstance(x, np.ndarray) and not x.dtype.hasobject:
            return x.dtype.str, x.shape, zlib.crc32(x.tobytes())
        if isinstance(x, nn.Module):
            modules = () if self.model is None else self.model.named_modules()
            names = [f"module {name!r} of the model" for name, module in modules if module is x]
            return names or [fingerprint(x)]
        if isinstance(x, _MEASURES):
            model = getattr(x, "model", None)
            model = getattr(x, "forward_func", None) if model is None else model
            return *_own_class(x), *chain.from_iterable(_options(x).items()), model
        if isinstance(x, FunctionType):
            closure = map(_content, x.__closure__ or ())
            return x.__code__, x.__defaults__, x.__kwdefaults__, *closure, vars(x), _globals(x)
        if isinstance(x, CodeType):
            counts = (x.co_argcount, x.co_posonlyargcount, x.co_kwonlyargcount, x.co_flags)
            variables = (x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars)
            return x.co_code, *counts, *variables, x.co_consts
        if isinstance(x, type):
            return () if _is_installed(x.__module__) else (x.__bases__, _content_of_class(x))
        if isinstance(x, ModuleType):
            own = {} if _is_installed(x.__name__) else vars(x)
            return x.__name__, {name: own[name] for name in own if not name.startswith("__")}
        if isinstance(x, (property, cached_property, staticmethod, classmethod)):
            return [getattr(x, name, None) for name in ("fget", "fset", "func", "__func__")]
        reduce = copyreg.dispatch_table.get(type(x))
        state = reduce(x) if reduce else x.__reduce_ex__(4)  # what pickle would keep
        if isinstance(state, str):  # a global name
            return getattr(x, "__module__", None), state, getattr(x, "__wrapped__", None)
        return [list(part) if isinstance(part, Iterator) else part for part in state]

    def of_attributes(self, x: nn.Module) -> str:
        """Describe the class of a module, and what it holds besides its weights."""
        # Models of libraries store tensors of their last pass as attributes.
        kinds = _NOTED if _is_installed(type(x).__module__) else (*_NOTED, Tensor)
        own = {n: v for n, v in vars(x).items() if n not in _OF_TORCH and isinstance(v, kinds)}
        buffers = {n: v for n, v in x._buffers.items() if n in x._non_persistent_buffers_set}
        return self.of((type(x), own, buffers))


#: The classes whose ``repr`` describes an object.
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(Ellipsis)}
#: The classes of the attributes of a module that count.
_NOTED = (
    *(*_PLAIN, list, tuple, dict, set, frozenset, np.ndarray, np.generic),
    *(FunctionType, MethodType, partial, type),
)
_OF_TORCH = vars(nn.Module()).keys()
#: The classes that are described by their options.
_MEASURES = (AttentionAttribution, InputContributions, TokenScores)
#: The number of characters from which a description is replaced by its digest.
LONG = 300


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _name(x: Any) -> str:
    named = x if hasattr(x, "__qualname__") else type(x)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def _options(x: object) -> dict[str, object]:
    """Return what the author of a measure lets its user choose, and its other plain attributes.

    Runners are left out: they keep what they found in earlier passes.
    """
    own = {name for name, value in vars(x).items() if type(value) in _PLAIN}
    names = (own | signature(type(x)).parameters.keys()) - {"forward_func", "device_ids"}
    return {name: getattr(x, name) for name in sorted(names) if hasattr(x, name)}


def _own_class(x: object) -> list[type]:
    """Return the class of an object if its code counts, and not only its name."""
    return [] if _is_installed(type(x).__module__) else [type(x)]


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _globals(function: FunctionType) -> dict[str, object]:
    """Return the globals that a function reads, unless it belongs to an installed package."""
    if _is_installed(function.__module__):
        return {}
    names = sorted(_names_in(function.__code__) & function.__globals__.keys())
    return {name: function.__globals__[name] for name in names}


def _names_in(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in code, and in the functions inside it."""
    inside = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inside)


def _content_of_class(x: type) -> dict[str, object]:
    """Return the entries of a class that its author wrote, without those that Python adds."""
    return {
        name: value
        for name, value in vars(x).items()
        if isinstance(value, FunctionType) or not name.startswith(("__", "_abc_impl"))
    }


def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python, an installed package or captum_cw, by its version."""
    root = (module or "").partition(".")[0]
    if root in sys.stdlib_module_names or root == "captum_cw":
        return True
    package = sys.modules.get(root)
    file = getattr(package, "__file__", None) or next(iter(getattr(package, "__path__", ())), None)
    return file is not None and any(Path(file).is_relative_to(place) for place in _PLACES)


#: The folders of installed packages.
_PLACES = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
