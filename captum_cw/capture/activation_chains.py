"""Activations that a model writes as several functions, such as ``x / (1 + exp(-x))``.

The parts of an activation do not say what the whole makes of its input: in a GELU written with a
tanh, a part of ``0.5 * x * (1 + tanh(...))`` is a constant times ``x``. So elementwise functions of
one and the same tensor are followed, and count as one function of it where they are zero at zero.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from captum_cw.capture.function_call import FunctionCall, substitute, tensors_in, varies
from captum_cw.capture.linear_gradients import NEAR_ZERO, times_ratio

__all__ = ["ELEMENTWISE", "HELD_FIXED", "ActivationChains"]

#: Elementwise functions that are zero at zero, all or for some of their arguments.
ELEMENTWISE = {
    *("silu", "gelu", "relu", "relu6", "elu", "selu", "celu", "leaky_relu", "rrelu", "prelu"),
    *("mish", "hardswish", "hardtanh", "softsign", "tanhshrink", "softshrink", "hardshrink"),
    *("tanh", "sin", "sinh", "tan", "asin", "atan", "asinh", "atanh", "erf", "expm1", "log1p"),
    *("square", "sqrt", "nan_to_num", "round", "trunc", "floor", "ceil", "threshold"),
    *("pow", "clamp", "clip", "clamp_min", "clamp_max"),
}

#: Elementwise functions that are gates, rates and positions.
HELD_FIXED = {
    *("sigmoid", "hardsigmoid", "exp", "exp2", "softplus", "logsigmoid", "log", "log2", "log10"),
    *("cos", "cosh", "acos", "rsqrt", "reciprocal", "erfc", "rpow"),
    *("sign", "sgn", "heaviside", "floor_divide", "floordiv", "remainder", "mod", "fmod"),
}

#: Elementwise functions that are linear in one argument.
_LINEAR = {
    *("add", "radd", "sub", "rsub", "subtract", "mul", "multiply", "rmul", "neg", "negative"),
    *("div", "truediv", "true_divide", "divide", "rtruediv", "rdiv", "abs", "absolute", "positive"),
    *("where", "masked_fill", "maximum", "minimum", "max", "min", "fmax", "fmin", "lerp"),
    *("addcmul", "addcdiv", "to", "float", "double", "half", "bfloat16", "clone", "contiguous"),
    *("gt", "greater", "ge", "greater_equal", "lt", "less", "le", "less_equal", "eq", "ne"),
    *("logical_and", "logical_or", "logical_not", "and", "or", "invert"),
}
_FOLLOWED = ELEMENTWISE | HELD_FIXED | _LINEAR

#: What counts as zero: some activations are clamped just below it.
ROUNDING = 1e-5

#: What a function without a jump stays below near zero.
JUMP = 0.1

#: The most functions in a row that are followed, and the most sources of one tensor.
LONGEST, MOST = 32, 4


@dataclass(eq=False)
class _Source:
    """A tensor of which others are functions, as it was when they were computed.

    Args:
        tensor: Returns the tensor; None if the model has done with it and its memory is free.
        version: The number of times that it was changed in place.
    """

    tensor: Callable[[], Tensor | None]
    version: int

    def get(self) -> Tensor | None:
        """Return the tensor; None if it is no longer there, or no longer as it was."""
        x = self.tensor()
        return x if x is not None and x._version == self.version else None


@dataclass(frozen=True)
class _Chain:
    """A tensor as an elementwise function of a source.

    Args:
        source: The source.
        run: The function.
        length: The number of functions in a row.
        has_numbers: Whether all constants in it are single numbers.
    """

    source: _Source
    run: Callable[[Tensor], Any]
    length: int = 0
    has_numbers: bool = True


@dataclass(frozen=True)
class _Known:
    """What is known of a tensor.

    Args:
        version: The number of times that it was changed in place.
        chains: The tensor as a function of others, the nearest first.
        kept: The sources of a tensor that does not vary, which autograd does not keep.
    """

    version: int
    chains: list[_Chain]
    kept: list[Tensor | None] = field(default_factory=list)


class ActivationChains:
    """Knows which tensors of a pass are elementwise functions of which others."""

    def __init__(self) -> None:
        self._known: MutableMapping[Tensor, _Known] = WeakTensorKeyDictionary()
        self._sources: MutableMapping[Tensor, _Source] = WeakTensorKeyDictionary()

    def __contains__(self, x: Tensor) -> bool:
        """Whether ``x`` is a function of other tensors that are still as they were."""
        return bool(self._known) and bool(self._of(x))

    def is_source(self, x: Tensor) -> bool:
        """Whether other tensors are functions of ``x``."""
        source = self._sources.get(x)
        return source is not None and source.version == x._version

    def before_writing(self, x: Tensor) -> None:
        """Keep a tensor as it is for the functions of it, before it is overwritten."""
        if varies(x) and self.is_source(x):
            self.copied(x)

    def copied(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor that stands for it when it is overwritten."""
        copy = x.clone()
        if self.is_source(x):
            source = self._sources.pop(x)
            source.tensor, source.version = lambda: copy, copy._version
            self._sources[copy] = source
        self.moved(x, copy)
        return copy

    def moved(self, x: Any, to: Tensor) -> None:
        """Note that the content of ``x`` is in another tensor now."""
        if isinstance(x, Tensor) and x.shape == to.shape:
            self._know(to, self._of(x))

    def run(self, call: FunctionCall, by_rule: Callable[[FunctionCall], Any]) -> Any:
        """Run a function as a part of an activation, or else by its own rule."""
        parts = self._parts(call) if call.name in _FOLLOWED else None
        if not parts:
            return by_rule(call)
        chains = _joined(call, parts)
        # The rule of a single function does what is right for one argument that depends on inputs.
        is_single = len(parts) == 1 and any(map(varies, tensors_in((call.args, call.kwargs))))
        result = None if is_single else _activation(call, chains)
        if result is None:
            result = by_rule(call)
        if isinstance(result, Tensor):
            self._know(result, chains)
        return result

    def _of(self, x: Tensor) -> list[_Chain]:
        known = self._known.get(x)
        if known is None or known.version != x._version:
            return []
        return [chain for chain in known.chains if chain.source.get() is not None]

    def _know(self, x: Tensor, chains: list[_Chain]) -> None:
        sources = [chain.source.get() for chain in chains]
        pairs = zip(chains, sources, strict=True)
        chains = [c for c, y in pairs if y is not None and y is not x and y.shape == x.shape]
        if not chains:
            return
        # Autograd keeps what varies until the backward pass, and should not keep its source too.
        kept = [] if varies(x) else [chain.source.get() for chain in chains]
        self._known[x] = _Known(x._version, chains[:MOST], kept)

    def _parts(self, call: FunctionCall) -> dict[int, list[_Chain]]:
        """Return what is known of the tensors among a function's arguments, by their ids."""
        parts: dict[int, list[_Chain]] = {}
        for x in tensors_in((call.args, call.kwargs)):
            chains = self._of(x)
            if varies(x):
                chains = [_Chain(self._source(x), _same), *chains]
            if chains:
                parts[id(x)] = chains
        return parts

    def _source(self, x: Tensor) -> _Source:
        source = self._sources.get(x)
        if source is None or source.version != x._version:
            source = _Source(TensorWeakRef(x), x._version)
            self._sources[x] = source
        return source


def _same(x: Tensor) -> Tensor:
    return x


def _joined(call: FunctionCall, parts: dict[int, list[_Chain]]) -> list[_Chain]:
    """Return a function of the parts as one of each source that all of them have."""
    first, *others = ({id(c.source): c for c in chains} for chains in parts.values())
    common = [key for key in first if all(key in other for other in others)]
    if not common:
        return []
    constants = [x for x in tensors_in((call.args, call.kwargs)) if id(x) not in parts]
    found = []
    for key in common:
        of_part = {
            part: next(c for c in chains if id(c.source) == key) for part, chains in parts.items()
        }
        chain = _composed(call, of_part, constants)
        if chain is not None:
            found.append(chain)
    return sorted(found, key=lambda chain: chain.length)


def _composed(
    call: FunctionCall, parts: dict[int, _Chain], constants: list[Tensor]
) -> _Chain | None:
    """Return a function of parts as one of their common source."""
    source = next(iter(parts.values())).source
    tensor = source.get()
    length = 1 + max(chain.length for chain in parts.values())
    if tensor is None or length > LONGEST or not all(_fits(x, tensor) for x in constants):
        return None
    func, given = call.func, substitute((call.args, call.kwargs), lambda x: parts.get(id(x), x))

    def run(x: Tensor) -> Any:
        args, kwargs = substitute(given, lambda y: y.run(x) if isinstance(y, _Chain) else y)
        return func(*args, **kwargs)

    has_numbers = all(chain.has_numbers for chain in parts.values())
    return _Chain(source, run, length, has_numbers and all(x.numel() == 1 for x in constants))


def _fits(constant: Tensor, x: Tensor) -> bool:
    """Whether a constant is combined with each number of ``x``, without adding dimensions."""
    sizes = zip(reversed(constant.shape), reversed(x.shape), strict=False)
    return constant.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)


def _activation(call: FunctionCall, chains: list[_Chain]) -> Tensor | None:
    """Return an activation as one function of its nearest source; None if it is none."""
    for chain in chains:
        source = chain.source.get()
        if source is None or not _is_zero_at_zero(chain, source):
            continue
        with torch.no_grad():
            value = call.detached().run()
        if isinstance(value, Tensor) and value.shape == source.shape:
            return times_ratio(source, _First(source, value, chain.run), is_rounded=True)
    return None


@dataclass(frozen=True)
class _First:
    """A function whose value at one tensor is known."""

    source: Tensor
    value: Tensor
    run: Callable[[Tensor], Any]

    def __call__(self, x: Tensor) -> Any:
        if x is self.source:
            return self.value
        with torch.no_grad():
            return self.run(x)


def _is_zero_at_zero(chain: _Chain, source: Tensor) -> bool:
    """Whether a function is zero at zero, up to rounding, and does not jump there."""
    for at, bound in ((0.0, ROUNDING), (-NEAR_ZERO, JUMP), (NEAR_ZERO, JUMP)):
        x = source.new_full(() if chain.has_numbers else source.shape, at)
        with torch.no_grad():
            y = chain.run(x)
        if not isinstance(y, Tensor) or not y.is_floating_point() or not (y.abs() < bound).all():
            return False
    return True
