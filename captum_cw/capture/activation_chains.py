"""Activations that a model writes as several functions, such as ``x / (1 + exp(-x))``.

The parts of an activation do not say what the whole makes of its input: in a GELU written with a
tanh, a part of ``0.5 * x * (1 + tanh(...))`` is a constant times ``x``. So elementwise functions of
one and the same tensor are followed, and count as one function of it where they are zero at zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdRef

from captum_cw.capture.function_call import FunctionCall, substitute, varies
from captum_cw.capture.linear_gradients import NEAR_ZERO, times_ratio

__all__ = ["ELEMENTWISE", "FOLLOWED", "HELD_FIXED", "ActivationChains"]

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

#: All elementwise functions.
FOLLOWED = ELEMENTWISE | HELD_FIXED | _LINEAR

#: What counts as zero: some activations are clamped just below it.
ROUNDING = 1e-5

#: What a function without a jump stays below near zero.
JUMP = 0.1

#: The most functions in a row that are followed, and the most sources of one tensor.
LONGEST, MOST = 32, 4


class _State:
    """A tensor as it was when others were computed from it, and how it was computed itself.

    Args:
        ref: Returns the tensor; None if the model has done with it and its memory is free.
        x: The tensor.

    Attributes:
        version: The number of times that the tensor was changed in place.
        recipe: How it was computed elementwise from other tensors; None if it was not.
        sources: The tensors of which it is a function, the nearest first, and how many functions
            in a row lie between.
        kept: The sources of a tensor that does not vary, which autograd does not keep.
        is_used: Whether other tensors were computed from it.
    """

    __slots__ = ("is_used", "kept", "recipe", "ref", "shape", "sources", "version")

    def __init__(self, ref: Callable[[], Tensor | None], x: Tensor) -> None:
        self.ref, self.version, self.shape = ref, x._version, x.shape
        self.recipe: _Recipe | None = None
        self.sources: dict[_State, int] = {}
        self.kept: list[Tensor] = []
        self.is_used = False

    def get(self) -> Tensor | None:
        """Return the tensor; None if it is no longer there, or no longer as it was."""
        x = self.ref()
        return x if x is not None and x._version == self.version else None


class _Recipe:
    """An elementwise function of tensors, whose states stand among its arguments."""

    __slots__ = ("args", "func", "kwargs")

    def __init__(self, call: FunctionCall, states: dict[int, _State]) -> None:
        self.func = call.func
        self.args = substitute(call.args, lambda x: states.get(id(x), x))
        self.kwargs = substitute(call.kwargs, lambda x: states.get(id(x), x))

    def of(self, source: _State, x: Tensor, found: dict[_State, Any] | None = None) -> Any:
        """Run the function for another value ``x`` of a source."""
        found = {source: x} if found is None else found

        def value(y: Any) -> Any:
            if not isinstance(y, _State):
                return y
            if y not in found:
                assert y.recipe is not None
                found[y] = y.recipe.of(source, x, found)
            return found[y]

        return self.func(*substitute(self.args, value), **substitute(self.kwargs, value))

    def has_numbers(self, source: _State) -> bool:
        """Return True if each constant on the way from ``source`` is a single number."""
        return all(
            y is source or y.recipe is None or y.recipe.has_numbers(source)
            if isinstance(y, _State)
            else not isinstance(y, Tensor) or y.numel() == 1
            for y in pytree.tree_leaves((self.args, self.kwargs))
        )


class ActivationChains:
    """Knows which tensors of a pass are elementwise functions of which others."""

    def __init__(self) -> None:
        self._states: dict[int, _State] = {}

    def __contains__(self, x: Tensor) -> bool:
        """Whether ``x`` is a function of other tensors that are still as they were."""
        state = self._find(x)
        return state is not None and any(source.get() is not None for source in state.sources)

    def is_source(self, x: Tensor) -> bool:
        """Whether other tensors are functions of ``x``."""
        state = self._find(x)
        return state is not None and state.is_used

    def before_writing(self, x: Tensor) -> None:
        """Keep a tensor as it is for the functions of it, before it is overwritten."""
        if varies(x) and self.is_source(x):
            self.copied(x)

    def copied(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor that stands for it when it is overwritten."""
        copy = x.clone()
        state = self._find(x)
        if state is not None:
            del self._states[id(x)]
            state.ref, state.version = lambda: copy, copy._version
            self._states[id(copy)] = state
        return copy

    def moved(self, x: Any, to: Tensor) -> None:
        """Note that the content of ``x`` is in another tensor now."""
        state = self._find(x) if isinstance(x, Tensor) and x.shape == to.shape else None
        if state is not None and state.recipe is not None:
            self._know(to, state.recipe, state.sources)

    def run(self, call: FunctionCall, by_rule: Callable[[FunctionCall], Any]) -> Any:
        """Run a function as a part of an activation, or else by its own rule."""
        if call.name not in FOLLOWED:
            return by_rule(call)
        parts, are_varying = self._parts(call)
        if not parts:
            return by_rule(call)
        sources = _common(parts, are_varying)
        if not sources:
            return by_rule(call)
        recipe = _Recipe(call, parts)
        # The rule of a single function does what is right for one argument that depends on inputs.
        is_single = len(parts) == 1 and are_varying[0]
        result = None if is_single else _activation(call, recipe, sources)
        if result is None:
            result = by_rule(call)
        # A function may return its argument itself.
        if isinstance(result, Tensor) and all(result is not x for x in call.tensors):
            self._know(result, recipe, sources)
        return result

    def _find(self, x: Tensor) -> _State | None:
        state = self._states.get(id(x))  # the state of another tensor is forgotten with it
        return state if state is not None and state.version == x._version else None

    def _add(self, x: Tensor) -> _State:
        state = self._states[id(x)] = _State(WeakIdRef(x, self._forget), x)
        return state

    def _forget(self, ref: WeakIdRef) -> None:
        self._states.pop(ref._id, None)

    def _know(self, x: Tensor, recipe: _Recipe, sources: dict[_State, int]) -> None:
        """Note how a tensor was computed."""
        shape = x.shape
        same = {s: n for s, n in sources.items() if s.shape == shape}
        if len(same) > MOST:
            there = [s for s in same if s.get() is not None]
            same = {s: same[s] for s in there[:MOST]}
        if same:
            state = self._add(x)
            state.recipe, state.sources = recipe, same
            # Autograd keeps what varies until the backward pass, and should not keep its source.
            if not varies(x):
                state.kept = [y for y in map(_State.get, state.sources) if y is not None]

    def _parts(self, call: FunctionCall) -> tuple[dict[int, _State], list[bool]]:
        """Return what is known of the tensors among a function's arguments, by their ids.

        Returns:
            The states, and whether each tensor depends on the inputs of the model.
        """
        parts: dict[int, _State] = {}
        are_varying: list[bool] = []
        for x in call.tensors:
            state = self._find(x)
            may_vary = varies(x)
            if state is None and may_vary:
                state = self._add(x)
            if state is not None and id(x) not in parts:
                state.is_used = True
                parts[id(x)] = state
                are_varying.append(may_vary)
        return parts, are_varying


def _common(parts: dict[int, _State], are_varying: list[bool]) -> dict[_State, int]:
    """Return the sources that all parts of a function have, the nearest first."""
    common: dict[_State, int] | None = None
    for state, may_vary in zip(parts.values(), are_varying, strict=True):
        own = {state: 1} if may_vary else {}
        for source, n in state.sources.items():
            if n < LONGEST:
                own[source] = n + 1
        if common is not None:
            both = [(s, max(n, own[s])) for s, n in common.items() if s in own]
            own = dict(sorted(both, key=lambda item: item[1]))
        common = own
    return common or {}


def _activation(call: FunctionCall, recipe: _Recipe, sources: dict[_State, int]) -> Tensor | None:
    """Return an activation as one function of its nearest source; None if it is none."""
    for state in sources:
        source = state.get()
        if source is None or not _fits(call, source):
            continue
        run = functools.partial(recipe.of, state)
        if not _is_zero_at_zero(run, source, recipe.has_numbers(state)):
            continue
        with torch.no_grad():
            value = call.detached().run()
        if isinstance(value, Tensor) and value.shape == source.shape:
            return times_ratio(source, _First(source, value, run), is_rounded=True)
    return None


def _fits(call: FunctionCall, x: Tensor) -> bool:
    """Whether all arguments can be broadcast to the shape of ``x``."""
    return all(
        y.dim() <= x.dim()
        and all(n in (1, m) for n, m in zip(reversed(y.shape), reversed(x.shape), strict=False))
        for y in call.tensors
    )


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


def _is_zero_at_zero(run: Callable[[Tensor], Any], source: Tensor, has_numbers: bool) -> bool:
    """Whether a function is zero at zero up to rounding, and has no jump there.

    Args:
        run: The function.
        source: What it is a function of.
        has_numbers: Whether it is the same function of all numbers.
    """
    for at, bound in ((0.0, ROUNDING), (-NEAR_ZERO, JUMP), (NEAR_ZERO, JUMP)):
        x = source.new_full(() if has_numbers else source.shape, at)
        with torch.no_grad():
            y = run(x)
        if not isinstance(y, Tensor) or not y.is_floating_point() or not (y.abs() < bound).all():
            return False
    return True
