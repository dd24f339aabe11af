"""The rules by which the functions of a model are replaced by linear ones.

A rule takes a call of a torch function, and runs it so that the result has the function's own
value, and the gradient of the linear function that stands for it. Functions without a rule keep
their own gradient, which is right for every function that is linear in its inputs together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.activation_chains import (
    ELEMENTWISE,
    FOLLOWED,
    HELD_FIXED,
    ROUNDING,
    ActivationChains,
)
from captum_cw.capture.attention_call import UnsupportedModelError
from captum_cw.capture.frozen_attention import run_frozen
from captum_cw.capture.function_call import (
    SHAPED,
    FunctionCall,
    creates,
    fixed,
    is_in_place,
    name_of,
    substitute,
    tensors_among,
    tensors_in,
    varies,
)
from captum_cw.capture.linear_gradients import (
    constant,
    scale_gradient,
    scaled_gradient,
    times_ratio,
    with_gradient_of,
)
from captum_cw.capture.saved_tensors import before_writing

__all__ = ["SPLITS", "checked", "in_parts", "is_linear", "run_linearised"]

#: Functions that return several views.
SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind")

#: Sums, whose summands may be numbers, also of integers.
_SUMS = {"add", "radd", "sub", "rsub", "subtract"}

#: Functions that join tensors, which may be integers.
_JOINS = {"where", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}

#: Functions that keep numbers between bounds.
_CLAMPS = ("clamp", "clip", "clamp_min", "clamp_max")

#: Functions with constants that may be numbers.
_WITH_NUMBERS = {*_SUMS, "where", "masked_fill", "maximum", "minimum"}

#: Functions that raise to a power.
_POWERS = {torch.pow, torch.Tensor.pow, torch.Tensor.__pow__}

Rule = Callable[[FunctionCall], Any]
_rules: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _rules.update(dict.fromkeys(names, rule))
        return rule

    return register


def run_linearised(call: FunctionCall, chains: ActivationChains) -> Any:
    """Run a function of something that depends on the model's inputs.

    Args:
        call: The call.
        chains: What is known of activations that are written as several functions.
    """
    if not call.args and "input" in call.kwargs and "condition" not in call.kwargs:
        kwargs = dict(call.kwargs)
        call = call.given((kwargs.pop("input"),), kwargs)
    if is_in_place(call.func):
        return _run_in_place(call, chains)
    place = _place_of_inplace(call.func)
    written, args, kwargs = call.kwargs.get("out"), call.args, call.kwargs
    if place is not None and call.argument(place, "inplace", False):
        # The model may go on with the argument instead of the result.
        written, args = call.first, tuple(False if n == place else x for n, x in enumerate(args))
    if not isinstance(written, Tensor):
        return chains.run(call, _by_rule)
    kwargs = {name: x for name, x in kwargs.items() if name not in ("inplace", "out")}
    value = chains.run(call.given(args, kwargs), _by_rule)
    before_writing(written)
    return call.proceed(torch.Tensor.copy_, (written, value), {})


@functools.lru_cache(maxsize=4096)
def is_linear(func: Any) -> bool:
    """Whether a function needs no rule: its own gradient is right, and it works out of place."""
    has_rule = name_of(func) in _rules or name_of(func) in FOLLOWED
    return not (has_rule or is_in_place(func) or _place_of_inplace(func) is not None)


def _by_rule(call: FunctionCall) -> Any:
    if call.name in _rules:
        return _rules[call.name](call)
    return checked(call, call.run())


def checked(call: FunctionCall, result: Any) -> Any:
    """Return the result of a function without a rule, which must have a gradient."""
    if varies(result):
        return result
    floating = [x for x in tensors_in(result) if x.is_floating_point()]
    if not floating or any(map(varies, floating)):
        return result
    if not creates(call.name) or any(map(varies, tensors_among(call.args[1:], call.kwargs))):
        raise UnsupportedModelError(
            f"The function {call.name!r} has no gradient, so what it makes of its input is unknown."
        )
    return result


# ---------------------------------------------------------------------------------------------
# Functions that are held fixed


@_rule(
    *HELD_FIXED,
    *("softmax", "log_softmax", "softmin", "gumbel_softmax", "linalg_inv", "inverse"),
    *("multinomial", "bernoulli", "item", "tolist"),
)
def _held_fixed(call: FunctionCall) -> Any:
    """Gates, rates, positions and routers."""
    if call.softmax_gradient and call.name == "softmax":
        return call.run()
    with torch.no_grad():
        return call.detached().run()


@_rule("numpy", "array")
def _outside(call: FunctionCall) -> Any:
    """Refuse NumPy, because its functions cannot be followed."""
    raise UnsupportedModelError(
        "The model computes with activations outside of PyTorch (by NumPy), so it is unknown what "
        "becomes of them: write this part with torch functions."
    )


@_rule("div", "truediv", "true_divide", "divide", "rtruediv", "rdiv")
def _divided(call: FunctionCall) -> Any:
    """A divisor is a scale, and is held fixed."""
    first, second = call.first, call.argument(1, "other")
    options = {name: x for name, x in call.kwargs.items() if name != "other"}
    if call.name[0] == "r":
        first = fixed(first)
    else:
        second = fixed(second)
    return call.given((first, second, *call.args[2:]), options).run()


@_rule(*SPLITS)
def in_parts(call: FunctionCall) -> Any:
    """Return each part as a view of its own, since a model may write into it."""
    (x, *_) = call.tensors
    dim = call.argument(1 if call.name == "unbind" else 2, "dim", 0)
    parts = call.detached().run()
    if call.name == "unbind":
        return tuple(x.select(dim, n) for n in range(len(parts)))
    found, start = [], 0
    for part in parts:
        found.append(x.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]
    return tuple(found)


@_rule(*SHAPED)
def _shaped(call: FunctionCall) -> Any:
    """Another argument gives only a shape or a dtype."""
    return call.run() if varies(call.first) else _held_fixed(call)


@_rule("linalg_solve_triangular", "linalg_solve", "solve_triangular")
def _solved(call: FunctionCall) -> Any:
    """The inverse of a matrix is a gate."""
    matrix, x = call.args[:2]
    if not varies(x):
        return _held_fixed(call)
    return call.given((matrix.detach(), *call.args[1:]), call.kwargs).run()


@_rule("normalize")
def _normalised(call: FunctionCall) -> Any:
    x, p = call.first, call.argument(1, "p", 2.0)
    dim, eps = call.argument(2, "dim", 1), call.argument(3, "eps", 1e-12)
    size = torch.linalg.vector_norm(x.detach(), p, dim, keepdim=True).clamp_min(eps)
    return with_gradient_of(x / size, call.detached().run)


# ---------------------------------------------------------------------------------------------
# Elementwise functions


@_rule(*ELEMENTWISE)
def _elementwise(call: FunctionCall) -> Any:
    """``x * (f(x) / x)`` if ``f(0) = 0``; otherwise the result is held fixed."""
    x, others = call.first, tensors_among(call.args[1:], call.kwargs)
    if call.name in _CLAMPS and any(map(varies, others)):
        return _between(call)
    if not varies(x) or any(map(varies, others)):
        return _held_fixed(call)
    if call.name in ("pow", "threshold", *_CLAMPS):
        if others:
            at_zero = bool((call.of(x.new_zeros(())).abs() < ROUNDING).all())
        else:
            at_zero = _is_zero_at_zero(call.func, call.args[1:], tuple(call.kwargs.items()))
        if not at_zero:
            return _held_fixed(call)
    if _is_square(call) and not torch.is_autocast_enabled(x.device.type):
        return call.proceed(torch.mul, (x, x.detach()), {})
    return times_ratio(x, call.of)


def _is_square(call: FunctionCall) -> bool:
    if call.func not in _POWERS:  # float_power also changes the dtype
        return call.name == "square"
    exponent = call.argument(1, "exponent")
    return isinstance(exponent, (int, float)) and exponent == 2


@functools.lru_cache(maxsize=256)
def _is_zero_at_zero(func: Any, numbers: tuple[Any, ...], options: tuple[Any, ...]) -> bool:
    """Whether a function of a tensor and of fixed numbers maps zero to zero."""
    zero = torch.zeros((), dtype=torch.float32, device="cpu")
    return bool(func(zero, *numbers, **dict(options)).abs() < ROUNDING)


def _between(call: FunctionCall) -> Any:
    """Bounds that depend on the inputs are selected where they bind."""
    low, high = call.argument(1, "min"), call.argument(2, "max")
    if call.name == "clamp_max":
        low, high = None, call.argument(1, "max")
    y = call.lifted(call.first)
    for bound, extreme in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            bound = bound if isinstance(bound, Tensor) else y.new_full((), bound)
            y = extreme(y, call.lifted(bound))
    return with_gradient_of(y, call.detached().run)


@_rule("glu")
def _gated(call: FunctionCall) -> Any:
    x, dim = call.first, call.argument(1, "dim", -1)
    a, b = x.chunk(2, dim)
    gate = b.detach().sigmoid()
    return with_gradient_of(a * gate, lambda: call.of(x.detach()))


# ---------------------------------------------------------------------------------------------
# Products


@_rule(
    *("mul", "multiply", "rmul", "matmul", "rmatmul", "mm", "bmm", "mv", "dot", "vdot", "inner"),
    *("outer", "ger", "einsum", "tensordot", "kron", "cross"),
    *("linalg_matmul", "linalg_multi_dot", "linalg_vecdot", "linalg_cross"),
)
def _product(call: FunctionCall) -> Any:
    """Each factor that depends on the inputs gets an equal part of the gradient."""
    factors = sum(map(varies, call.tensors))
    result = call.run()
    if factors > 1 and varies(result):
        scale_gradient(result, 1 / factors)
    return result


@_rule("addmm", "addmv", "addr", "baddbmm", "addbmm", "addcmul")
def _added_product(call: FunctionCall) -> Any:
    names = [name for name in call.kwargs if name not in ("alpha", "beta", "value", "out_dtype")]
    summand, *factors = [*call.args, *(call.kwargs[name] for name in sorted(names))]
    if not any(map(varies, factors)):  # their product is a constant
        factors[0] = call.lifted(factors[0])
    options = {name: x for name, x in call.kwargs.items() if name not in names}
    return call.given((call.lifted(summand), *_halved(factors)), options).run()


@_rule(
    *("linear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
def _affine(call: FunctionCall) -> Any:
    """A product with a weight, and a bias."""
    x, weight, bias = call.first, call.argument(1, "weight"), call.argument(2, "bias")
    if bias is None and not (varies(x) and varies(weight)):
        return call.run()
    halved = dict(zip((id(x), id(weight)), _halved([x, weight]), strict=True))
    if bias is not None:
        halved[id(bias)] = call.lifted(bias)
    return call.changed(lambda y: halved.get(id(y), y)).run()


@_rule("lerp")
def _interpolated(call: FunctionCall) -> Any:
    """A product of a weight and a difference, and a sum."""
    start, (end, weight) = call.first, (call.argument(1, "end"), call.argument(2, "weight"))
    may_vary = varies(start) or varies(end)
    difference = call.lifted(end) - call.lifted(start)
    if not may_vary:
        difference = difference.detach()
    elif varies(weight):
        difference, weight = scaled_gradient(difference, 0.5), scaled_gradient(weight, 0.5)
    return with_gradient_of(call.lifted(start) + weight * difference, call.detached().run)


@_rule("addcdiv")
def _added_ratio(call: FunctionCall) -> Any:
    first, a, b = call.first, call.argument(1, "tensor1"), call.argument(2, "tensor2")
    ratio = call.argument(3, "value", 1) * call.lifted(a) / fixed(b)
    return with_gradient_of(call.lifted(first) + ratio, call.detached().run)


@_rule("cosine_similarity")
def _similarity(call: FunctionCall) -> Any:
    """A product of two vectors whose lengths are held fixed."""
    dim, eps = call.argument(2, "dim", 1), call.argument(3, "eps", 1e-8)
    pair = [call.first, call.argument(1, "x2")]
    a, b = (
        x / torch.linalg.vector_norm(fixed(x), dim=dim, keepdim=True).clamp_min(eps)
        for x in _halved(pair)
    )
    return with_gradient_of((a * b).sum(dim), call.detached().run)


@_rule("prod")
def _product_of_numbers(call: FunctionCall) -> Any:
    """Each factor gets an equal part."""
    x, dim = call.first, call.argument(1, "dim")
    factors = x.numel() if dim is None else x.shape[dim]
    args = (scaled_gradient(x, 1 / factors), *call.args[1:])
    return call.given(args, call.kwargs).run()


@_rule("bilinear")
def _bilinear(call: FunctionCall) -> Any:
    x, y, weight, *rest = call.args
    bias = rest[0] if rest else call.kwargs.get("bias")
    return call.given((*_halved([x, y]), weight, call.lifted(bias)), {}).run()


def _halved(factors: list[Any]) -> list[Any]:
    if sum(varies(x) for x in factors[:2]) < 2:
        return factors
    return [scaled_gradient(x, 0.5) if varies(x) else x for x in factors]


# ---------------------------------------------------------------------------------------------
# Sums, and other functions to which constants are a part


@_rule(
    *("add", "radd", "sub", "rsub", "subtract", "cat", "concat", "concatenate", "stack"),
    *("hstack", "vstack", "dstack", "column_stack", "row_stack", "where", "masked_fill"),
    *("maximum", "minimum", "fmax", "fmin"),
    *("index_add", "index_put", "index_copy", "scatter_add"),
    *("scatter_reduce", "masked_scatter", "slice_scatter", "select_scatter", "fill", "copy"),
)
def _with_constants(call: FunctionCall) -> Any:
    """Fixed summands are terms of their own, so that all shares sum to the whole."""
    if call.name in _SUMS or call.name in _JOINS:
        found = call.tensors
        if len(found) > 1 and not call.kwargs and all(map(varies, found)):
            return call.run()
        like = next(x for x in found if varies(x))
        kept = () if call.name in _SUMS else (torch.bool,)  # the condition of a choice
        found = [x for x in found if not x.dtype.is_floating_point and x.dtype not in kept]
        whole = {id(x): x.to(like) for x in found}
        call = call.changed(lambda y: whole.get(id(y), y) if like.is_floating_point() else y)
    if call.name in _WITH_NUMBERS:
        options = {n: y if n == "alpha" else call.lifted(y) for n, y in call.kwargs.items()}
        return call.given(substitute(call.args, call.lifted), options).run()
    return call.changed(lambda y: call.lifted(y) if isinstance(y, Tensor) else y).run()


@_rule("max", "min")
def _extreme(call: FunctionCall) -> Any:
    """The extreme of a dimension, or of two tensors."""
    return _with_constants(call) if isinstance(call.argument(1, "other"), Tensor) else call.run()


@_rule("index_fill", "scatter")
def _with_a_number(call: FunctionCall) -> Any:
    """What is written into some places may be a number."""
    if not varies(call.first) or any(map(varies, tensors_among(call.args[1:], call.kwargs))):
        return _with_constants(call)
    written = constant(call.of(torch.zeros_like(call.first)), call.one)
    return with_gradient_of(call.run() + written, call.detached().run)


@_rule("pad")
def _padded(call: FunctionCall) -> Any:
    """Padding with a number is padding with zeros, and a constant."""
    x, sizes = call.first, call.argument(1, "pad")
    value = call.argument(3, "value") or 0.0
    if call.argument(2, "mode", "constant") != "constant" or not value:
        return call.run()
    zeros = call.given((x, sizes), {}).run()
    return zeros + constant(call.of(torch.zeros_like(x)), call.one)


# ---------------------------------------------------------------------------------------------
# Norms: the scale is held fixed


@_rule("layer_norm", "rms_norm")
def _norm_of_features(call: FunctionCall) -> Any:
    x = call.first
    dims = tuple(range(-len(call.argument(1, "normalized_shape")), 0))
    weight, bias = call.argument(2, "weight"), None
    if call.name == "layer_norm":
        bias, eps = call.argument(3, "bias"), call.argument(4, "eps", 1e-5)
    else:
        eps = call.argument(3, "eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _norm(call, x, dims, eps, weight, bias, centred=call.name == "layer_norm")


@_rule("group_norm")
def _norm_of_groups(call: FunctionCall) -> Any:
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    groups, eps = call.argument(1, "num_groups"), call.argument(4, "eps", 1e-5)
    return _norm_of_channels(call, call.first, groups, weight, bias, eps)


@_rule("instance_norm")
def _norm_of_instances(call: FunctionCall) -> Any:
    if not call.argument(5, "use_input_stats", True):
        return _batch_norm(call)  # which has the same arguments in the same places
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    eps, x = call.argument(7, "eps", 1e-5), call.first
    return _norm_of_channels(call, x, x.shape[1], weight, bias, eps)


def _norm_of_channels(
    call: FunctionCall, x: Tensor, groups: int, weight: Any, bias: Any, eps: float
) -> Any:
    shape = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = (None if y is None else y.view(shape) for y in (weight, bias))
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:])
    dims = tuple(range(2, grouped.dim()))
    return _norm(call, grouped, dims, eps, weight, bias, centred=True, shape=x.shape)


def _norm(
    call: FunctionCall,
    x: Tensor,
    dims: tuple[int, ...],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centred: bool,
    shape: torch.Size | None = None,
) -> Any:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if centred:
        y = y - y.mean(dims, keepdim=True)
    y = y * y.detach().square().mean(dims, keepdim=True).add(eps).rsqrt()
    if shape is not None:
        y = y.view(shape)
    if weight is not None:
        y = y * weight.detach()
    if bias is not None:
        y = y + call.lifted(bias.detach().to(wide))
    given = call.detached()
    return with_gradient_of(y, given.run)


@_rule("batch_norm")
def _batch_norm(call: FunctionCall) -> Any:
    """With its running statistics, a batch norm is linear but for its constants."""
    x, mean, variance = (
        call.first,
        call.argument(1, "running_mean"),
        call.argument(2, "running_var"),
    )
    if call.argument(5, "training", False) or mean is None:
        return call.run()
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    scale = (variance + call.argument(7, "eps", 1e-5)).rsqrt()
    scale = scale if weight is None else scale * weight
    offset = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    linear = x * scale.view(shape) + call.lifted(offset.detach()).view(shape)
    return with_gradient_of(linear, call.detached().run)


# ---------------------------------------------------------------------------------------------
# Attention


@_rule("scaled_dot_product_attention")
def _attention(call: FunctionCall) -> Any:
    """Attention weights are held fixed, or share the gradient with the values."""
    names = ("query", "key", "value")
    query, key, value = (call.argument(place, name) for place, name in enumerate(names))
    if call.softmax_gradient and varies(value) and (varies(query) or varies(key)):
        shares = (query, 0.25), (key, 0.25), (value, 0.5)
        query, key, value = (scaled_gradient(x, by) if varies(x) else x for x, by in shares)
    else:
        query, key = fixed((query, key))
    options = {name: x for name, x in call.kwargs.items() if name not in names}
    args = (query, key, value, *fixed(call.args[3:]))
    frozen = call.given(args, fixed(options))
    is_frozen = varies(value) and not varies(query) and not varies(key)
    return run_frozen(frozen) if is_frozen else frozen.run()


# ---------------------------------------------------------------------------------------------
# In-place functions


def _run_in_place(call: FunctionCall, chains: ActivationChains) -> Any:
    """Run an in-place function by its rule, and write the result into its first argument."""
    target = call.first
    if not isinstance(target, Tensor):
        raise _unknown_in_place(call)
    if call.name in ("setitem", "copy", "fill", "zero"):
        chains.before_writing(target)
    if call.name == "setitem":
        return _set_item(call)
    if call.name in ("detach", "squeeze", "unsqueeze", "transpose", "t", "swapaxes"):
        return call.run()  # only the shape changes
    _lift_content(call, target._base)
    if call.name in ("copy", "fill", "zero"):
        value = call.lifted(0.0 if call.name == "zero" else [*call.args, *call.kwargs.values()][1])
        write = torch.Tensor.copy_ if isinstance(value, Tensor) else torch.Tensor.fill_
        return call.proceed(write, (target, value), {})
    # What is kept for the backward pass must not be overwritten.
    overwritten = _rules.get(call.name) in (_with_constants, _held_fixed)
    needs_copy = not overwritten or not varies(target) or chains.is_source(target)
    kept = chains.copied(target) if needs_copy else target
    args = tuple(kept if x is target else x for x in call.args)
    value = chains.run(replace(call, func=_not_in_place(call), args=args), _by_rule)
    if not varies(value) and not target._is_view():
        call.proceed(torch.Tensor.detach_, (target,), {})
    written = value if varies(value) or not target._is_view() else call.lifted(value)
    result = call.proceed(torch.Tensor.copy_, (target, written), {})
    chains.moved(value, target)
    return result


def _not_in_place(call: FunctionCall) -> Any:
    """Return the function that returns what an in-place function writes."""
    for place in (torch.Tensor, torch, torch.nn.functional):
        if hasattr(place, call.name):
            return getattr(place, call.name)
    raise _unknown_in_place(call)


def _unknown_in_place(call: FunctionCall) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The function {call.func.__name__!r} works in place, and what it makes of its input is "
        "unknown: write it with a function that returns its result."
    )


def _set_item(call: FunctionCall) -> None:
    target, index, value = call.args
    _lift_content(call, target if target._base is None else target._base)
    call.proceed(call.func, (target, index, call.lifted(value)), call.kwargs)


def _lift_content(call: FunctionCall, x: Tensor | None) -> None:
    """Make the content of a fixed tensor a constant: a part of it may stay."""
    if x is not None and x.is_floating_point() and not varies(x):
        call.proceed(torch.Tensor.copy_, (x, constant(x.clone(), call.one)), {})
        varies(call.first)  # a view notices that its base has changed when it is asked


@functools.cache
def _place_of_inplace(func: Any) -> int | None:
    """Return the place of the argument ``inplace`` of a function; None if it has none."""
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
