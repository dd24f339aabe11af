"""Activations that a model writes as several functions, such as ``x / (1 + exp(-x))``.

The parts of an activation do not say what the whole makes of its input: in a GELU written with a
tanh, a part of ``0.5 * x * (1 + tanh(...))`` is a constant times ``x``. So elementwise functions of
one and the same tensor are followed, and count as one function of it where they are zero at zero.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
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

#: The most functions in a row that are followed.
LONGEST = 32


@dataclass(frozen=True)
class _Chain:
    """A tensor as an elementwise function of another one.

    Args:
        source: Returns the other tensor; None if the model has done with it and its memory is free.
        version: The number of times that ``source`` was changed in place.
        run: The function.
        length: The number of functions in a row.
    """

    source: Callable[[], Tensor | None]
    version: int
    run: Callable[[Tensor], Any]
    length: int


class ActivationChains:
    """Knows which tensors of a pass are elementwise functions of which others."""

    def __init__(self) -> None:
        self._known: MutableMapping[Tensor, tuple[_Chain, int]] = WeakTensorKeyDictionary()

    def __contains__(self, x: Tensor) -> bool:
        """Whether ``x`` is a function of another tensor that is still as it was."""
        return bool(self._known) and self._of(x) is not None

    def copied(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor that is the same function of the same tensor."""
        copy = x.clone()
        self._know(copy, self._of(x) or _itself(x))
        return copy

    def run(self, call: FunctionCall, by_rule: Callable[[FunctionCall], Any]) -> Any:
        """Run a function as a part of an activation, or else by its own rule."""
        parts = self._parts(call) if call.name in _FOLLOWED else None
        if not parts:
            return by_rule(call)
        chain = _joined(call, parts)
        source = None if chain is None else chain.source()
        if chain is None or source is None:
            return by_rule(call)
        # The rule of a single function does what is right for one argument that depends on inputs.
        is_single = len(parts) == 1 and any(map(varies, tensors_in((call.args, call.kwargs))))
        if is_single or not _is_zero_at_zero(chain, source):
            result = by_rule(call)
        else:
            near = torch.finfo(source.dtype).eps ** 0.5

            def value(x: Tensor) -> Any:
                with torch.no_grad():
                    return call.detached().run() if x is source else chain.run(x)

            result = times_ratio(source, value, near=near)
        self._know(result, chain)
        return result

    def _of(self, x: Tensor) -> _Chain | None:
        chain, version = self._known.get(x) or (None, 0)
        source = None if chain is None else chain.source()
        if chain is None or source is None:
            return None
        is_same = (x._version, source._version) == (version, chain.version)
        return chain if is_same else None

    def _know(self, x: Any, chain: _Chain) -> None:
        source = chain.source()
        if not isinstance(x, Tensor) or source is None or x is source or x.shape != source.shape:
            return
        # Autograd keeps what varies until the backward pass, and should not keep its source too.
        kept = TensorWeakRef(source) if varies(x) else lambda: source
        self._known[x] = replace(chain, source=kept), x._version

    def _parts(self, call: FunctionCall) -> dict[int, _Chain]:
        """Return what is known of a function's arguments by their ids.

        It is nothing if the function is not one of a single tensor and of numbers.
        """
        parts: dict[int, _Chain] = {}
        sources = set()
        for x in tensors_in((call.args, call.kwargs)):
            chain = self._of(x) or (_itself(x) if varies(x) else None)
            if chain is not None:
                parts[id(x)] = chain
                sources.add(id(chain.source()))
            if len(sources) > 1 or (chain is None and x.numel() != 1):
                return {}
        return parts


def _joined(call: FunctionCall, parts: dict[int, _Chain]) -> _Chain | None:
    """Return a function of the parts as one of their source."""
    length = 1 + max(chain.length for chain in parts.values())
    if length > LONGEST:
        return None
    func, first = call.func, next(iter(parts.values()))
    given = substitute((call.args, call.kwargs), lambda x: parts.get(id(x), x))

    def run(x: Tensor) -> Any:
        args, kwargs = substitute(given, lambda y: y.run(x) if isinstance(y, _Chain) else y)
        return func(*args, **kwargs)

    return _Chain(first.source, first.version, run, length)


def _itself(x: Tensor) -> _Chain:
    return _Chain(TensorWeakRef(x), x._version, lambda y: y, 0)


def _is_zero_at_zero(chain: _Chain, source: Tensor) -> bool:
    """Whether a function is zero at zero, up to rounding, and does not jump there."""
    with torch.no_grad():
        y = chain.run(source.new_tensor([0.0, -NEAR_ZERO, NEAR_ZERO]))
    is_number = isinstance(y, Tensor) and y.is_floating_point()
    return is_number and bool((y[0].abs() < ROUNDING).all() and (y.abs() < JUMP).all())
