"""Calls of torch functions, and what of their arguments depends on the inputs of a model."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from captum_cw.capture.dispatch import Proceed
from captum_cw.capture.linear_gradients import constant

__all__ = [
    "OPERATORS",
    "SHAPED",
    "FunctionCall",
    "creates",
    "fixed",
    "is_in_place",
    "name_of",
    "substitute",
    "tensors_among",
    "tensors_in",
    "varies",
]


def varies(x: object) -> TypeGuard[Tensor]:
    """Whether ``x`` is a floating tensor that depends on the inputs of the model."""
    return isinstance(x, Tensor) and x.grad_fn is not None


def tensors_in(x: Any) -> list[Tensor]:
    """Return the tensors among arguments or results, also in lists, tuples and dicts."""
    found: list[Tensor] = []
    _collect((x,), found)
    return found


def tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a function."""
    found: list[Tensor] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs.values(), found)
    return found


def _collect(x: Iterable[Any], found: list[Tensor]) -> None:
    for y in x:
        if isinstance(y, Tensor):
            found.append(y)
        elif isinstance(y, (list, tuple)):
            _collect(y, found)
        elif isinstance(y, dict):
            _collect(y.values(), found)


def substitute(x: Any, change: Callable[[Any], Any]) -> Any:
    """Apply ``change`` to everything in arguments that is not a list, tuple or dict."""
    kind = type(x)
    if kind is list or kind is tuple:
        return kind([substitute(y, change) for y in x])
    if kind is dict:
        return {name: substitute(y, change) for name, y in x.items()} if x else x
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return kind(*[substitute(y, change) for y in x])
    return change(x)


def fixed(x: Any) -> Any:
    """Return arguments in which nothing depends on the inputs of the model."""
    return substitute(x, lambda y: y.detach() if varies(y) else y)


@dataclass(eq=False, slots=True)
class FunctionCall:
    """One call of a torch function.

    Args:
        func: The function.
        name: Its name without underscores: ``"add"`` for ``add_``, ``__iadd__`` and ``__radd__``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        proceed: Runs a function.
        one: The scalar 1 whose gradient is the share of all constants.
        softmax_gradient: Whether attention weights keep the gradient of their softmax.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    proceed: Proceed
    one: Tensor
    softmax_gradient: bool
    _tensors: list[Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        if self._tensors is None:
            self._tensors = tensors_among(self.args, self.kwargs)
        return self._tensors

    def run(self) -> Any:
        """Run the function with its own gradient."""
        return self.proceed(self.func, self.args, self.kwargs)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionCall:
        """Return the call with these arguments."""
        return FunctionCall(
            self.func, self.name, args, kwargs, self.proceed, self.one, self.softmax_gradient
        )

    def changed(self, change: Callable[[Any], Any]) -> FunctionCall:
        """Return the call with other arguments."""
        return self.given(substitute(self.args, change), substitute(self.kwargs, change))

    def detached(self) -> FunctionCall:
        """Return the call with arguments that are held fixed."""
        return self.given(fixed(self.args), fixed(self.kwargs))

    def of(self, x: Tensor) -> Any:
        """Run the function on another first argument, without gradients."""
        _, *rest = self.args
        with torch.no_grad():
            return self.proceed(self.func, (x, *rest), self.kwargs)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def lifted(self, x: Any) -> Any:
        """Return a number or a fixed floating tensor as a constant with a share of its own."""
        if isinstance(x, Tensor):
            fixed = x.is_floating_point() and not varies(x)
            return constant(x, self.one) if fixed else x
        if not isinstance(x, (int, float)) or isinstance(x, bool) or not x:
            return x
        x = float(x)
        is_finite = math.isfinite(x)
        number = self.one * x if is_finite else constant(self.one.new_tensor(x), self.one)
        # A tensor without dimensions would take over the precision of the number.
        scalar = isinstance(self.first, Tensor) and not self.first.dim()
        return number.to(self.first.dtype) if scalar else number

    @property
    def first(self) -> Any:
        """The first argument, which is the input of most functions."""
        return self.args[0] if self.args else self.kwargs.get("tensors")


#: The operators that Python writes in other forms, such as ``__iadd__`` and ``__radd__``.
OPERATORS = {
    *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
}

#: Other names of functions.
_ALIASES = {
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "expit": "sigmoid",
    "fix": "trunc",
    "float_power": "pow",
    "log_sigmoid": "logsigmoid",
}


#: Functions that take a tensor only for its shape, and functions of its attributes.
_CREATES = re.compile(r".*_like$|new_.*|__get__$|grad$")

#: Functions whose second tensor gives only a shape, a dtype or a device.
SHAPED = {"type_as", "expand_as", "view_as", "reshape_as", "to", "resize_as"}


def creates(name: str) -> bool:
    """Whether the function of a name takes a tensor only for its shape.

    Example:
        >>> creates("zeros_like"), creates("new_full"), creates("add")
        (True, True, False)
    """
    return _CREATES.match(name) is not None


@functools.lru_cache(maxsize=4096)
def name_of(func: Any) -> str:
    """Return the name of a function without underscores, and of an operator with its side.

    Example:
        >>> [name_of(f) for f in (torch.add, torch.Tensor.add_, torch.Tensor.__iadd__)]
        ['add', 'add', 'add']
        >>> [name_of(f) for f in (torch.special.expit, torch.arctan)]
        ['sigmoid', 'atan']
        >>> name_of(torch.Tensor.__rsub__), name_of(torch.Tensor.T.__get__)
        ('rsub', 'T')
    """
    name = _python_name(func)
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    if not name.startswith("__"):
        name = (name.strip("_") or name).removeprefix("special_")
        return _ALIASES.get(name, name)
    name = name.strip("_")
    return name[1:] if name[:1] == "i" and name[1:] in OPERATORS else name


@functools.lru_cache(maxsize=4096)
def is_in_place(func: Any) -> bool:
    """Whether a function changes its first argument, by PyTorch's naming."""
    name = _python_name(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name[2] == "i" and name[3:-2] in OPERATORS)
    return name.endswith("_") and name != "requires_grad_"


def _python_name(func: Any) -> str:
    """Return the name of a function without its overload, such as that of ``aten.add.Tensor``.

    The name of an operator that does not belong to PyTorch begins with its namespace.
    """
    schema = getattr(func, "_schema", None)
    name: str = getattr(func, "_qualified_op_name", getattr(schema, "name", ""))
    if name and not name.startswith("aten::"):
        return name
    return getattr(func, "__name__", "").partition(".")[0]
