"""The rules by which functions are made linear: values, gradients, and sums that close.

A share is a part of the function's value: what the function, made linear at the input, makes of one
number of the input alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from captum_cw import InputContributions
from captum_cw.capture import UnsupportedModelError
from support.linearised import Linearised, Parts, number, scores, split

Function = Callable[..., Any]

GENERATOR = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


X, C = numbers(2, 3, 6), numbers(2, 3, 6)
X[0, 0, 0] = 0
A, B = numbers(6, 6), numbers(6, 6)
W, BIAS = numbers(4, 6), numbers(4)
MASK = torch.rand(2, 3, 6, generator=GENERATOR) < 0.5
PARAMETER = nn.Parameter(numbers(2, 3, 6))
PLACES = torch.tensor([0, 2])
FIRST = torch.zeros(2, 3, 2, dtype=torch.long)


def shares_of(f: Function, x: Tensor = X) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shares of a weighted sum of ``f(x)``, of constants, and the weighted values."""
    with torch.no_grad():
        y = f(x.clone())
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def target(output: Tensor) -> Tensor:
        return (output * weights).flatten(1).sum(1)

    f = f.eval() if isinstance(f, nn.Module) else f
    found = InputContributions(f).target_runner.run(x, target=target, by_example=True)
    assert torch.allclose(found.output, y, 1e-12, 1e-12), "the value is that of the function"
    assert found.constants is not None
    assert torch.allclose(found.delta, torch.zeros(2), atol=1e-5)
    return next(iter(found.shares.values())).double(), found.constants, weights * y


def check_parts(f: Function, linear: Callable[[Tensor, Tensor], Tensor], x: Tensor = X) -> None:
    """Check shares against ``linear(p, x)``, what the function at ``x`` makes of a part ``p``."""
    shares, constants, whole = shares_of(f, x)
    with torch.no_grad():
        weights = torch.randn(
            whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        expected = torch.zeros_like(x).flatten(1)
        for n in range(expected.shape[1]):
            part = torch.zeros_like(x).flatten(1)
            part[:, n] = x.flatten(1)[:, n]
            expected[:, n] = (linear(part.view_as(x), x) * weights).flatten(1).sum(1)
    scale = max(1.0, float(expected.abs().max()))
    assert torch.allclose(shares.flatten(1), expected, 0, 1e-6 * scale)
    rest = whole.flatten(1).sum(1) - expected.sum(1)
    assert torch.allclose(constants, rest, 0, 1e-6 * scale)


def check_affine(f: Function) -> None:
    """Check a function that is a sum of a linear one and constants."""
    zero = f(torch.zeros_like(X))
    check_parts(f, lambda part, x: f(part) - zero)


def in_place(name: str, *args: Any) -> Function:
    def run(x: Tensor) -> Tensor:
        y = x * 1
        getattr(y, name)(*args)
        return y

    return run


def of_module(module: nn.Module) -> nn.Module:
    """A module in float64 with random numbers."""
    module = module.double().eval()
    for x in [*module.parameters(), *module.buffers()]:
        if x.is_floating_point():
            x.data.copy_(numbers(*x.shape).abs() + 0.1)
    return module


# ---------------------------------------------------------------------------------------------
# Elementwise functions

ZERO_AT_ZERO: dict[str, Function] = {
    **{f"F.{f.__name__}": f for f in (F.silu, F.gelu, F.relu, F.relu6, F.elu, F.selu, F.celu)},
    **{f"F.{f.__name__}": f for f in (F.leaky_relu, F.mish, F.hardswish, F.hardtanh, F.softsign)},
    **{f"F.{f.__name__}": f for f in (F.tanhshrink, F.softshrink, F.hardshrink, F.rrelu, F.tanh)},
    **{f.__name__: f for f in (torch.tanh, torch.sin, torch.sinh, torch.tan, torch.atan)},
    **{f.__name__: f for f in (torch.asinh, torch.erf, torch.expm1, torch.square, torch.round)},
    **{f.__name__: f for f in (torch.floor, torch.ceil, torch.trunc, torch.fix, torch.abs)},
    **{f.__name__: f for f in (torch.neg, torch.arctan, torch.arcsinh, torch.nan_to_num)},
    **{f.__name__: f for f in (torch.special.erf, torch.special.expm1, torch.special.round)},
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "asin": lambda x: torch.asin(x / 9),
    "atanh": lambda x: (x / 9).atanh(),
    "log1p": lambda x: x.abs().log1p(),
    "sqrt": lambda x: x.abs().sqrt(),
    "**": lambda x: x**3,
    "pow": lambda x: torch.pow(x, 2),
    "float_power": lambda x: torch.float_power(x, 2),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp of a tensor": lambda x: x.clamp(min=torch.tensor(-1.0)),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, max=0.5),
    "threshold": lambda x: F.threshold(x, 0.5, 0.0),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)),
    "keyword": lambda x: torch.tanh(input=x),
    "operator of aten": lambda x: torch.ops.aten.silu.default(x),
    "into another tensor": lambda x: torch.tanh(x, out=torch.empty_like(x)),
    "keyword of F": lambda x: F.silu(input=x),
    "operators": lambda x: -abs(x),
    "method": lambda x: x.tanh(),
    "soft-cap": lambda x: 5 * torch.tanh(x / 5),
    "gate": lambda x: x * torch.sigmoid(1.702 * x),
    "ratio": lambda x: x / (1 + torch.exp(-x)),
    "squared relu": lambda x: F.relu(x) ** 2,
    "product": lambda x: x * x * x,
    "mask": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(1, dtype=x.dtype)),
    "max": lambda x: torch.max(x, torch.zeros_like(x)),
    "sign and root": lambda x: x.sign() * x.abs().sqrt(),
    **{name: in_place(name) for name in ("relu_", "tanh_", "square_", "sin_", "abs_", "neg_")},
    "pow_": in_place("pow_", 3),
    "**=": in_place("__ipow__", 2),
    "clamp_": in_place("clamp_", -1, 1),
    "elu_": lambda x: F.elu_(x * 1),
    "leaky_relu_": lambda x: F.leaky_relu_(x * 1, 0.2),
    "mul_ of itself": lambda x: (y := x * 1).mul_(y),
    "relu_ of the input": lambda x: x.relu_(),
    "inplace=True": lambda x: F.relu(x * 1, inplace=True),
    "inplace by place": lambda x: F.silu(x * 1, True),
    "inplace, result unused": lambda x: (y := x * 1, F.relu(y, inplace=True))[0],
    "inplace of a module": nn.Sequential(nn.SiLU(inplace=True)),
    "parameter of a module": nn.Sequential(nn.PReLU().double()),
}


@pytest.mark.parametrize("name", ZERO_AT_ZERO)
def test_a_function_that_is_zero_at_zero_keeps_its_ratio(name: str) -> None:
    shares, constants, whole = shares_of(ZERO_AT_ZERO[name])
    assert torch.allclose(shares, whole, 0, 1e-5)
    assert not constants.any()


#: The limits of ``f(x) / x`` at zero.
LIMITS: list[tuple[Function, float]] = [
    (F.silu, 0.5),
    (F.gelu, 0.5),
    (torch.tanh, 1.0),
    (torch.square, 0.0),
    (F.mish, 0.6),
]


@pytest.mark.parametrize(("f", "limit"), LIMITS)
def test_the_ratio_at_zero_is_its_limit(f: Function, limit: float) -> None:
    shares, _, _ = shares_of(lambda x: f(x[:, :1] - x[:, 1:]), torch.ones(2, 2).double())
    weights = torch.randn(2, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(shares, limit * weights * torch.tensor([1.0, -1.0]), 0, 1e-3)


FIXED: dict[str, Function] = {
    **{f.__name__: f for f in (torch.sigmoid, torch.exp, torch.exp2, torch.cos, torch.cosh)},
    **{f.__name__: f for f in (torch.erfc, torch.sign, torch.special.expit)},
    **{f"F.{f.__name__}": f for f in (F.softplus, F.logsigmoid, F.hardsigmoid, F.sigmoid)},
    "keyword": lambda x: torch.sigmoid(input=x),
    "method": lambda x: x.exp(),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "reciprocal": lambda x: (x + 9).reciprocal(),
    "1 / x": lambda x: 1 / (x + 9),
    "tensor / x": lambda x: torch.tensor(2.0) / (x + 9),
    "x ** -1": lambda x: (x + 9) ** -1,
    "2 ** x": lambda x: 2**x,
    "log": lambda x: (x.abs() + 2).log(),
    "acos": lambda x: torch.acos(x / 9),
    "arccos": lambda x: torch.arccos(x / 9),
    "clamp": lambda x: x.clamp(min=0.5),
    "threshold": lambda x: F.threshold(x, 0.5, 1.0),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "special.softmax": lambda x: torch.special.softmax(x, -1),
    "softmin": lambda x: F.softmin(x, -1),
    "top-k": lambda x: x.topk(6).values.softmax(-1),
    "mask": lambda x: (x > 0).double(),
    "integers": lambda x: x.long(),
    "argmax": lambda x: x.argmax(-1, keepdim=True),
    "number": lambda x: x[0, 0, 1].item(),
    "exp_": in_place("exp_"),
    "sigmoid_": in_place("sigmoid_"),
}


@pytest.mark.filterwarnings("error:Converting a tensor")
@pytest.mark.parametrize("name", FIXED)
def test_a_gate_is_held_fixed(name: str) -> None:
    gate = FIXED[name]
    check_parts(lambda x: x * gate(x), lambda part, x: part * gate(x))


@pytest.mark.parametrize("name", FIXED)
def test_a_gate_that_is_added_is_a_constant(name: str) -> None:
    check_parts(lambda x: x + FIXED[name](x), lambda part, x: part)


def test_a_gated_linear_unit_gives_all_to_what_is_gated() -> None:
    for f in (nn.Sequential(nn.GLU()), lambda x: F.glu(x, dim=2)):
        check_parts(f, lambda part, x: part[..., :3] * x[..., 3:].sigmoid())


def test_float_power_changes_the_dtype() -> None:
    linear = nn.Linear(3, 2, bias=False).double()

    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.float_power(x, 2))
            return y

    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    found = InputContributions(Power().eval()).attribute(x, target=0)
    torch.testing.assert_close(found, (linear.weight[:1] * x.double() ** 2).detach().float())


# ---------------------------------------------------------------------------------------------
# Products and divisions

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "*": lambda a, b: a * b,
    "mul": torch.mul,
    "multiply": lambda a, b: a.multiply(b),
    "mul of keywords": lambda a, b: torch.mul(input=a, other=b),
    "mul_": lambda a, b: (a * 1).mul_(b),
    "*=": lambda a, b: (a * 1).__imul__(b),
    "mul_ into ones": lambda a, b: torch.ones_like(a).mul_(a).mul_(b),
    "*, overwritten": lambda a, b: (a * b).add_(C).mul_(2),
    "*, overwritten in part": lambda a, b: (y := a * b, y[..., 1].mul_(3), y[:, 0].fill_(2))[0],
    "@, its view overwritten": lambda a, b: (y := a @ b.mT, y.view(-1).mul_(3))[0],
    "@": lambda a, b: a @ b.mT,
    "matmul": lambda a, b: torch.matmul(a, b.mT),
    "linalg.matmul": lambda a, b: torch.linalg.matmul(a, b.mT),
    "vecdot": lambda a, b: torch.linalg.vecdot(a, b),
    "bmm": lambda a, b: torch.bmm(a, b.mT),
    "bmm of keywords": lambda a, b: torch.bmm(input=a, mat2=b.mT),
    "einsum": lambda a, b: torch.einsum("bij,bkj->bik", a, b),
    "einsum, overwritten": lambda a, b: torch.einsum("bij,bkj->bki", a, b).mul_(2).add_(1),
    "einsum, overwritten in part": lambda a, b: (
        y := torch.einsum("bij,bkj->bki", a, b),
        y[:, 1].mul_(3),
    )[0],
    "einsum of a list": lambda a, b: torch.einsum("bij,bkj->bik", [a, b]),
    "addcmul": lambda a, b: torch.addcmul(C, a, b, value=0.5),
    "addcmul of keywords": lambda a, b: torch.addcmul(input=C, tensor1=a, tensor2=b),
    "addcmul_": lambda a, b: torch.zeros_like(a).addcmul_(a, b),
    "baddbmm": lambda a, b: torch.baddbmm(C[..., :3], a, b.mT, alpha=2, beta=0.5),
    "baddbmm of keywords": lambda a, b: torch.baddbmm(input=C[..., :3], batch1=a, batch2=b.mT),
    "baddbmm_": lambda a, b: C[..., :3].clone().baddbmm_(a, b.mT),
    "addmm": lambda a, b: torch.stack(
        [torch.addmm(BIAS[:3], y, z.T) for y, z in zip(a, b, strict=True)]
    ),
    "linear": lambda a, b: torch.stack([F.linear(y, z) for y, z in zip(a, b, strict=True)]),
    "convolution": lambda a, b: torch.cat(
        [F.conv1d(y[None], z[:, :, None], groups=3) for y, z in zip(a, b[..., :1], strict=True)]
    ),
    "bilinear": lambda a, b: F.bilinear(a, b, torch.ones(4, 6, 6).double(), BIAS),
    "cross": lambda a, b: torch.cross(a[..., :3], b[..., :3], dim=-1),
    "outer": lambda a, b: a[..., None] * b[..., None, :],
    "sum": lambda a, b: (a * b).sum(-1),
    "lerp": lambda a, b: torch.lerp(torch.zeros_like(a), a, b),
    "prod": lambda a, b: torch.stack([a, b]).prod(0),
    "complex": lambda a, b: torch.view_as_real(
        torch.view_as_complex(a.reshape(2, 3, 3, 2)) * torch.view_as_complex(b.reshape(2, 3, 3, 2))
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_factor_of_a_product_gets_half(name: str) -> None:
    f = PRODUCTS[name]

    def half(part: Tensor, x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        constant = f(zero, zero)
        return (f(part @ A, x @ B) + f(x @ A, part @ B)) / 2 - constant

    check_parts(lambda x: f(x @ A, x @ B), half)


def test_each_of_three_factors_gets_a_third() -> None:
    def thirds(p: Tensor, x: Tensor) -> Tensor:
        return ((p @ A) * (x @ B) * x + (x @ A) * (p @ B) * x + (x @ A) * (x @ B) * p) / 3

    check_parts(lambda x: torch.einsum("bij,bij,bij->bij", x @ A, x @ B, x), thirds)


def test_the_lengths_of_a_cosine_are_held_fixed() -> None:
    def cosine(p: Tensor, x: Tensor) -> Tensor:
        a, b = x @ A, x @ B
        product = ((p @ A) * b + a * (p @ B)).sum(-1) / 2
        return product / (a.norm(dim=-1) * b.norm(dim=-1))

    check_parts(lambda x: F.cosine_similarity(x @ A, x @ B, -1), cosine)


def test_a_summand_of_a_product_keeps_its_own_share() -> None:
    check_parts(
        lambda x: torch.addcmul(x, x @ A, x @ B),
        lambda p, x: p + ((p @ A) * (x @ B) + (x @ A) * (p @ B)) / 2,
    )


DIVISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "/": lambda a, b: a / b,
    "div": torch.div,
    "div of keywords": lambda a, b: torch.div(input=a, other=b),
    "true_divide": lambda a, b: a.true_divide(other=b),
    "div_": lambda a, b: (a * 1).div_(b),
    "/=": lambda a, b: (a * 1).__itruediv__(b),
    "rtruediv": lambda a, b: b.__rtruediv__(a),
    "reciprocal": lambda a, b: a * b.reciprocal(),
    "1 /": lambda a, b: a * (1 / b),
    "** -1": lambda a, b: a * b**-1,
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_a_divisor_is_held_fixed(name: str) -> None:
    f = DIVISIONS[name]
    check_parts(
        lambda x: f(x @ A, (x @ B).abs() + 1), lambda part, x: (part @ A) / ((x @ B).abs() + 1)
    )


def test_a_number_divided_by_itself_is_all_of_the_dividend() -> None:
    check_parts(lambda x: (y := x + 9) / y, lambda part, x: part / (x + 9))


# ---------------------------------------------------------------------------------------------
# Norms


def rms(p: Tensor, x: Tensor, eps: float = 0.1) -> Tensor:
    return p * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def centred(p: Tensor, x: Tensor, eps: float = 1e-5, dims: tuple[int, ...] = (-1,)) -> Tensor:
    scale = (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
    return (p - p.mean(dims, keepdim=True)) * scale


def running(p: Tensor, norm: Any) -> Tensor:
    scale = (norm.running_var + norm.eps).rsqrt()
    return p * (scale if norm.weight is None else scale * norm.weight)[:, None]


LAYER, ROOT = of_module(nn.LayerNorm(6)), of_module(nn.RMSNorm(6, eps=0.1))
LAYERS, GROUP = of_module(nn.LayerNorm((3, 6))), of_module(nn.GroupNorm(1, 3))
INSTANCE = of_module(nn.InstanceNorm1d(3, affine=True))
TRACKED = of_module(nn.InstanceNorm1d(3, affine=True, track_running_stats=True))
BATCH, BARE = of_module(nn.BatchNorm1d(3)), of_module(nn.BatchNorm1d(3, affine=False))


def gain(norm: nn.Module) -> Any:
    return norm.weight


NORMS: dict[str, tuple[Function, Callable[[Tensor, Tensor], Tensor]]] = {
    "layer": (LAYER, lambda p, x: centred(p, x) * gain(LAYER)),
    "layer of two dimensions": (LAYERS, lambda p, x: centred(p, x, dims=(-2, -1)) * gain(LAYERS)),
    "layer without gain": (nn.LayerNorm(6, elementwise_affine=False), centred),
    "F.layer_norm": (
        lambda x: F.layer_norm(x, normalized_shape=(6,), weight=gain(LAYER), eps=0.1),
        lambda p, x: centred(p, x, 0.1) * gain(LAYER),
    ),
    "torch.layer_norm": (
        lambda x: torch.layer_norm(x, (6,), gain(LAYER), BIAS.new_ones(6), 0.1),
        lambda p, x: centred(p, x, 0.1) * gain(LAYER),
    ),
    "layer written out": (
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt(),
        centred,
    ),
    "rms": (ROOT, lambda p, x: rms(p, x) * gain(ROOT)),
    "rms of the smallest eps": (
        nn.RMSNorm(6).double(),
        lambda p, x: rms(p, x, torch.finfo(torch.float64).eps),
    ),
    "F.rms_norm": (lambda x: F.rms_norm(x, (6,), eps=0.1), rms),
    "rms by rsqrt": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1), rms),
    "rms by sqrt": (lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.1), rms),
    "rms by a power": (lambda x: x * ((x**2).mean(-1, keepdim=True) + 0.1) ** -0.5, rms),
    "rms by norm": (
        lambda x: x / x.norm(2, -1, keepdim=True) * 6**0.5,
        lambda p, x: rms(p, x, 0),
    ),
    "group": (GROUP, lambda p, x: centred(p, x, dims=(1, 2)) * gain(GROUP)[:, None]),
    "group without gain": (nn.GroupNorm(3, 3, affine=False), centred),
    "instance": (INSTANCE, lambda p, x: centred(p, x) * gain(INSTANCE)[:, None]),
    "instance without gain": (nn.InstanceNorm1d(3), centred),
    "instance of running statistics": (TRACKED, lambda p, x: running(p, TRACKED)),
    "batch": (BATCH, lambda p, x: running(p, BATCH)),
    "batch without gain": (BARE, lambda p, x: running(p, BARE)),
    "l2": (lambda x: F.normalize(x, dim=-1), lambda p, x: p / x.norm(2, -1, keepdim=True)),
    "l1": (lambda x: F.normalize(x, p=1, dim=2), lambda p, x: p / x.abs().sum(-1, keepdim=True)),
    "l2 of dimension 1": (F.normalize, lambda p, x: p / x.norm(2, 1, keepdim=True)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_keeps_its_scale(name: str) -> None:
    f, linear = NORMS[name]
    check_parts(f, linear)


# ---------------------------------------------------------------------------------------------
# Constants


def writing(content: float | None, write: Callable[[Tensor, Tensor], object]) -> Function:
    """Write into a copy of the input, or into a tensor of a number."""

    def run(x: Tensor) -> Tensor:
        y = x * 1 if content is None else torch.full_like(x, content)
        write(y, x)
        return y

    return run


def put(y: Tensor, index: Any, value: Any) -> None:
    y[index] = value


AFFINE: dict[str, Function] = {
    "x + c": lambda x: x + C,
    "c + x": lambda x: C + x,
    "x + 2": lambda x: x + 2.0,
    "2 + x": lambda x: 2 + x,
    "x - c": lambda x: x - C,
    "c - x": lambda x: C - x,
    "3 - x": lambda x: 3 - x,
    "rsub": lambda x: torch.rsub(x, other=2.0),
    "sub": lambda x: torch.sub(x, C, alpha=2),
    "add": lambda x: torch.add(C, x, alpha=3),
    "add of keywords": lambda x: torch.add(input=x, other=C),
    "add of a number": lambda x: torch.add(x, other=2.0, alpha=3),
    "sum": lambda x: sum([x, C, 1.0]),
    "integers": lambda x: x + torch.arange(6),
    "an integer": lambda x: x + torch.tensor(3),
    "booleans": lambda x: x + MASK,
    "single precision": lambda x: x + torch.ones(6),
    "a parameter": lambda x: x + PARAMETER,
    "add_": lambda x: (x * 1).add_(C, alpha=2),
    "add_ of itself": lambda x: (y := x * 1).add_(y),
    "+=": in_place("__iadd__", 1),
    "-=": in_place("__isub__", C),
    "add_ into c": lambda x: C.clone().add_(x),
    "sub_ into c": lambda x: C.clone().sub_(x),
    "mul_ into c": lambda x: C.clone().mul_(x),
    "cat": lambda x: torch.cat([x, C], 1),
    "cat of keywords": lambda x: torch.cat(tensors=[x, C], dim=1),
    "concat": lambda x: torch.concat((C, x), -1),
    "stack": lambda x: torch.stack([x, C], 1),
    "hstack": lambda x: torch.hstack([x, C]),
    "dstack": lambda x: torch.dstack([x, C]),
    "lerp": lambda x: torch.lerp(x, C, 0.3),
    "lerp to x": lambda x: C.lerp(x, C),
    "lerp between constants": lambda x: torch.lerp(C, C * 2, x),
    "addcdiv": lambda x: torch.addcdiv(x, C, A.new_full((), 2.0), value=0.5),
    "addcdiv to a constant": lambda x: torch.addcdiv(C, x, C + 9),
    "where": lambda x: torch.where(MASK, x, C),
    "where of a number": lambda x: torch.where(MASK, 2.0, x),
    "where of keywords": lambda x: torch.where(condition=MASK, input=x, other=C),
    "where of a method": lambda x: x.where(MASK, C),
    "masked_fill": lambda x: x.masked_fill(MASK, 2.0),
    "masked_fill of keywords": lambda x: x.masked_fill(mask=MASK, value=2.0),
    "masked_fill_": lambda x: (x * 1).masked_fill_(MASK, torch.tensor(2.0)),
    "masked_scatter": lambda x: x.masked_scatter(MASK, C),
    "a number is set": writing(None, lambda y, x: put(y, (slice(None), 0), 2.0)),
    "a constant is set": writing(None, lambda y, x: put(y, (slice(None), 0), C[:, 0])),
    "a mask is set": writing(None, lambda y, x: put(y, MASK, 1.5)),
    "a view is set": writing(None, lambda y, x: put(y[:, 0], slice(None), 1.0)),
    "set into zeros": writing(0.0, lambda y, x: put(y, slice(None), x)),
    "set into ones": writing(1.0, lambda y, x: put(y, (..., 0), x[..., 0])),
    "set into places of ones": writing(
        1.0, lambda y, x: put(y, (slice(None), PLACES), x[:, PLACES])
    ),
    "set into a view of ones": writing(1.0, lambda y, x: put(y[:, 0], (..., 0), x[:, 0, 0])),
    "index_put": lambda x: x.index_put((torch.tensor([0]),), C[:1]),
    "index_put_": lambda x: (x * 1).index_put_((torch.tensor([0]),), C[0]),
    "index_add": lambda x: x.index_add(1, PLACES, C[:, :2], alpha=2),
    "index_add_ into ones": lambda x: torch.ones_like(x).index_add_(1, PLACES, x[:, :2]),
    "index_fill": lambda x: x.index_fill(1, PLACES, 2.0),
    "index_fill_": lambda x: (x * 1).index_fill_(1, PLACES, torch.tensor(2.0).double()),
    "index_copy_ into ones": lambda x: torch.ones_like(x).index_copy_(1, PLACES, x[:, :2]),
    "scatter": lambda x: x.scatter(2, FIRST[..., :1], C[..., :1]),
    "scatter of a number": lambda x: x.scatter(2, FIRST[..., :1], 3.0),
    "scatter of a keyword": lambda x: x.scatter(dim=2, index=FIRST[..., :1], value=3.0),
    "scatter_ into ones": lambda x: torch.ones_like(x).scatter_(2, FIRST[..., :1], x[..., :1]),
    "scatter_add_ into ones": lambda x: torch.ones_like(x).scatter_add_(2, FIRST, x[..., :2]),
    "scatter_reduce": lambda x: C.scatter_reduce(2, FIRST, x[..., :2], "sum"),
    "slice_scatter": lambda x: x.slice_scatter(C[:, :2], 1, 0, 2),
    "select_scatter": lambda x: C.select_scatter(x[:, 0], 1, 0),
    "copy_": lambda x: torch.ones_like(x).copy_(x),
    "copy_ of a constant": lambda x: x + (x * 1).copy_(C),
    "copy_ into a view": writing(1.0, lambda y, x: y[:, :2].copy_(x[:, :2])),
    "copy_ into a transposed view": writing(1.0, lambda y, x: y.mT.copy_(x.mT)),
    "add_ into a view": writing(1.0, lambda y, x: y[:, 0].add_(x[:, 0])),
    "fill_ of a view": writing(None, lambda y, x: y[:, 0].fill_(3.0)),
    "zero_ of a view": writing(None, lambda y, x: y[:, 0].zero_()),
    "cat of integers": lambda x: torch.cat([x, torch.arange(6).expand(2, 1, 6)], 1),
    "where of integers": lambda x: torch.where(MASK, x, torch.arange(6)),
    "where of a method and integers": lambda x: x.where(MASK, torch.arange(6)),
    "into another tensor": lambda x: torch.add(x, C, out=torch.empty_like(x)),
    "operator of aten": lambda x: torch.ops.aten.add.Tensor(x, C, alpha=2),
    "a part is changed": lambda x: torch.cat([y.mul_(2).add_(1) for y in (x * 1).chunk(3, 2)], 2),
    "parts of other sizes": lambda x: torch.cat([y.add_(1) for y in (x * 1).split([1, 2], 1)], 1),
    "parts by keyword": lambda x: torch.cat(torch.chunk(input=x, chunks=3, dim=2)[::-1], 2) + 1,
    "a part of a split by keyword": lambda x: (
        torch.split(tensor=x, split_size_or_sections=2)[0] + 1
    ),
    "each row is changed": lambda x: torch.stack([y.add_(1) for y in (x * 1).unbind(1)], 1),
    "addcmul of constants": lambda x: torch.addcmul(x, C, C),
    "addcmul": lambda x: torch.addcmul(C, x, C, value=0.5),
    "addcmul_": lambda x: C.clone().addcmul_(x, C),
    "addmm": lambda x: torch.addmm(BIAS, x[:, 0], W.T, beta=0.5, alpha=2),
    "addmm of keywords": lambda x: torch.addmm(input=BIAS, mat1=x[:, 0], mat2=W.T),
    "addmm of constants": lambda x: torch.addmm(x[:, 0, :4], C[:, 0], W.T),
    "baddbmm without its input": lambda x: torch.baddbmm(
        torch.full((2, 3, 4), math.nan).double(), x, W.T.expand(2, 6, 4), beta=0
    ),
    "linear": lambda x: F.linear(x, W, BIAS),
    "linear of keywords": lambda x: F.linear(input=x, weight=W, bias=BIAS),
    "bilinear of a constant": lambda x: F.bilinear(x, C, torch.ones(4, 6, 6).double(), bias=BIAS),
    "pad": lambda x: F.pad(x, (1, 1), value=1.0),
    "pad of zeros": lambda x: F.pad(x, (1, 1)),
    "reflected pad": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "pad of a module": nn.Sequential(nn.ConstantPad1d(1, 2.0)),
    "conv1d": of_module(nn.Conv1d(3, 4, 3, padding=1)),
    "circular conv1d": of_module(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")),
    "grouped conv1d": of_module(nn.Conv1d(3, 3, 3, padding="same", groups=3)),
    "conv_transpose1d": of_module(nn.ConvTranspose1d(3, 4, 3)),
    "conv2d": of_module(nn.Sequential(nn.Unflatten(0, (2, 1)), nn.Conv2d(1, 2, 2))),
    "conv3d": of_module(nn.Sequential(nn.Unflatten(0, (2, 1, 1)), nn.Conv3d(1, 2, 2, padding=1))),
    "pooled": lambda x: F.avg_pool1d(x, 2) + x.mean(-1, keepdim=True),
    "moved": lambda x: torch.cat([-x[..., 3:], x.roll(1, 2).flip(1)[..., :3]], -1).mT + 1,
    "cumsum": lambda x: x.cumsum(1) + 1,
    "fourier": lambda x: torch.fft.fft(x).real + 1,
    "detach": lambda x: x.detach() + 1,
    "data": lambda x: x.data + 1,
    "detach_": lambda x: (x * 1).detach_() + 1,
    "no_grad": torch.no_grad()(lambda x: x * 2 + 1),
    "inference_mode": torch.inference_mode()(lambda x: x * 2 + 1),
}


@pytest.mark.parametrize("name", AFFINE)
def test_constants_are_terms_of_their_own(name: str) -> None:
    check_affine(AFFINE[name])


#: Functions that select numbers of the input, and the places that they select.
SELECTED: dict[str, tuple[Function, Callable[[Tensor], Tensor]]] = {
    "topk": (lambda x: x.topk(2, 1).values, lambda x: x.topk(2, 1).indices),
    "sort": (lambda x: x.sort(1).values, lambda x: x.argsort(1)),
    "msort": (
        lambda x: x.transpose(0, 1).msort().transpose(0, 1),
        lambda x: x.argsort(1),
    ),
    "kthvalue": (
        lambda x: x.kthvalue(2, 1, keepdim=True).values,
        lambda x: x.argsort(1)[:, 1:2],
    ),
    "median": (lambda x: x.median(1, keepdim=True).values, lambda x: x.argsort(1)[:, 1:2]),
    "max": (lambda x: x.max(1, keepdim=True).values, lambda x: x.argmax(1, keepdim=True)),
    "amax": (lambda x: x.amax(1, keepdim=True), lambda x: x.argmax(1, keepdim=True)),
    "pooled": (lambda x: F.max_pool1d(x.mT, 3).mT, lambda x: x.argmax(1, keepdim=True)),
}


@pytest.mark.parametrize("name", SELECTED)
def test_selected_numbers_keep_their_shares(name: str) -> None:
    f, places = SELECTED[name]
    check_parts(f, lambda part, x: part.gather(1, places(x)), numbers(2, 3, 6))


def test_minus_infinity_of_a_mask_that_softmax_removes_is_no_share() -> None:
    hidden = torch.ones(3, 3).triu(1).bool()

    def attention(x: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(hidden, -torch.inf).softmax(-1)

    check_parts(lambda x: attention(x) @ x, lambda part, x: attention(x) @ part)


def scan(x: Tensor) -> Tensor:
    """A recurrence that writes into a buffer, from which it also reads."""
    y = torch.ones_like(x)
    for t in range(1, x.shape[1]):
        y[:, t] = x[:, t] * 2 + y[:, t - 1]
    return y


def gated_in_place(x: Tensor) -> Tensor:
    """Overwrites the output of a function that its backward pass needs."""
    y = torch.softmax(x @ A, -1) @ torch.eye(6).double() * (x @ B)
    z = y * x
    y *= x.sigmoid()
    y += 1
    return y + z


def test_what_the_backward_pass_needs_may_be_overwritten() -> None:
    check_affine(scan)
    check_parts(
        gated_in_place,
        lambda p, x: (
            (x @ A).softmax(-1) * (p @ B) * x.sigmoid()
            + (x @ A).softmax(-1) * ((p @ B) * x + (x @ B) * p) / 2
        ),
    )


def test_a_buffer_is_as_it_was_after_inputs_were_written_into_it() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = nn.Buffer(C.clone())

        def forward(self, x: Tensor) -> Tensor:
            self.state[:, 0] = x[:, 0]
            return self.state + x

    module = Memory().eval()
    for _ in range(2):
        found = InputContributions(module).attribute(X, target=lambda y: y.sum((1, 2)))
        assert torch.allclose(found.double(), X * torch.tensor([2.0, 1.0, 1.0])[:, None])
    assert torch.equal(module.state, C)
    assert not module.state.requires_grad


# ---------------------------------------------------------------------------------------------
# Activations of several functions


class WrittenGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_of_powers(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def gelu_factored(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_in_place(x: Tensor) -> Tensor:
    y = x * 0.5
    y *= 1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))
    return y


def in_steps(x: Tensor) -> Tensor:
    y = torch.erf(x / math.sqrt(2.0)).add_(1)
    y *= x
    return y.mul_(0.5)


def source_overwritten(x: Tensor) -> Tensor:
    y = x * 1
    half, gate = 0.5 * y, 1 + torch.erf(y / math.sqrt(2.0))
    y.zero_()
    return half * gate


def tanh_of_exponentials(x: Tensor) -> Tensor:
    up, down = torch.exp(x), torch.exp(-x)
    return (up - down) / (up + down)


class OwnSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grads[0] * s * (1 + x * (1 - s))


#: Activations that are functions, and no modules.
WRITTEN_OUT: dict[str, Function] = {
    "gelu of pow": WrittenGelu().forward,
    "gelu of powers": gelu_of_powers,
    "gelu, factored": gelu_factored,
    "gelu, in place": gelu_in_place,
    "gelu in steps": in_steps,
    "gelu of a tensor that is overwritten": source_overwritten,
    "gelu of a constant of ones": lambda x: (
        0.5 * x * (torch.ones_like(x) + torch.erf(x / torch.full((6,), math.sqrt(2.0)).double()))
    ),
    "gelu of a learned number": lambda x: (
        0.5 * x * (torch.ones(1, 1, 1).double() + torch.erf(x / math.sqrt(2.0)))
    ),
    "gelu of lerp": lambda x: torch.lerp(
        torch.zeros_like(x), x, 0.5 * (1 + torch.erf(x / math.sqrt(2.0)))
    ),
    "relu of max": lambda x: torch.max(x, torch.zeros_like(x)),
    "relu of an absolute value": lambda x: (x + x.abs()) / 2,
    "clamped from just above zero": lambda x: x.clamp(min=1e-6),
    "gelu of erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu in single precision": lambda x: gelu_of_powers(x.float()).to(x.dtype),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "mish of a logarithm": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    "elu": lambda x: torch.where(x > 0, x, torch.exp(x) - 1),
    "elu of a mask": lambda x: (x > 0) * x + (x <= 0) * (x.exp() - 1),
    "celu of extremes": lambda x: (
        x.clamp_min(0) + torch.minimum(torch.zeros(()).double(), torch.exp(x) - 1)
    ),
    "tanh": tanh_of_exponentials,
    "tanh of a sigmoid": lambda x: 2 * torch.sigmoid(2 * x) - 1,
    "expm1": lambda x: torch.exp(x) - 1,
    "softsign": lambda x: x / (1 + x.abs()),
    "shifted softplus": lambda x: F.softplus(x) - F.softplus(torch.zeros(()).double()),
    "hard swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "squared relu": lambda x: F.relu(x) * F.relu(x),
    "gate of a parameter": lambda x: x * (1 + torch.tanh(nn.Parameter(torch.ones(1)) * x)),
    "lerp": lambda x: torch.lerp(x, x * 0.1, torch.sigmoid(x)),
    "a backward pass of its own": lambda x: OwnSwish.apply(x),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_an_activation_of_several_functions_is_one_function(name: str) -> None:
    shares, constants, whole = shares_of(WRITTEN_OUT[name])
    tolerance = 1e-4 if "single" in name else 1e-6
    assert torch.allclose(shares, whole, 0, tolerance)
    assert float(constants.abs().max()) < tolerance


def test_an_activation_is_one_function_near_zero() -> None:
    """Rounding errors of its parts do not become shares of a number that is nearly zero."""
    near = torch.tensor([[1e-9, -1e-12, 3e-17, 0.0], [1e-8, 1e-5, 1e-3, -1e-10]]).double()
    x = torch.stack([near + 1, torch.full_like(near, -1.0)], 1)
    shares, _, _ = shares_of(lambda x: torch.exp(x.sum(1)) - 1, x)
    assert float(shares.abs().max()) < 20


def test_an_activation_is_a_function_of_its_nearest_source() -> None:
    """Here it is not zero where the farther one is zero."""
    check_parts(
        lambda x: gelu_of_powers(x + 0.3),
        lambda p, x: p * (gelu_of_powers(x + 0.3) / (x + 0.3)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_negative_numbers_keep_the_ratio_of_their_side(dtype: torch.dtype) -> None:
    x = torch.tensor([[-0.05, 0.05, -1e-4, 1e-4, -1.0, 0.0]], dtype=dtype)
    for f in (lambda x: torch.where(x > 0, x, 0.0), lambda x: x * (x > 0)):
        model = nn.Linear(6, 6, bias=False).to(dtype)
        model.weight.data = torch.eye(6, dtype=dtype)
        found = InputContributions(lambda y: f(model(y))).attribute(  # noqa: B023
            x, lambda y: y.float().sum(1)
        )
        assert torch.allclose(found, x.float().clamp(min=0), 0.02, 1e-5)


def test_a_bound_that_depends_on_the_inputs_holds_only_where_it_binds() -> None:
    def clipped(x: Tensor) -> Tensor:
        bound = (x @ A).abs()
        return x.clamp(-bound, bound) + x

    def parts(p: Tensor, x: Tensor) -> Tensor:
        y, part = x @ A, p @ A
        sign = torch.where(x > 0, y.sign(), -y.sign())
        return torch.where(x.abs() > y.abs(), sign * part, p) + p

    check_parts(clipped, parts, numbers(2, 3, 6))


def test_operators_of_others_have_no_rules() -> None:
    with torch.library._scoped_library("captum_cw_test", "FRAGMENT") as library:
        library.define("softmax(Tensor x) -> Tensor")
        library.impl("softmax", lambda x: 2 * x, "CompositeImplicitAutograd")
        check_affine(lambda x: torch.ops.captum_cw_test.softmax(x))


def test_writing_into_an_alias_is_seen() -> None:
    class Cache(nn.Module):
        def __init__(self, alias: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.kept, self.alias = nn.Buffer(torch.zeros(2, 2, 3, 6).double()), alias

        def forward(self, x: Tensor) -> Tensor:
            keys, values = self.alias(self.kept).unbind(0)
            keys[:, :2], values[:, :2] = x[:, :2], x[:, 1:]
            return x + self.kept.sum(0)

    def parts(p: Tensor, x: Tensor) -> Tensor:
        return torch.cat([2 * p[:, :1] + p[:, 1:2], 2 * p[:, 1:2] + p[:, 2:], p[:, 2:]], 1)

    for alias in (lambda y: y, lambda y: y.data, lambda y: y.detach()):
        check_parts(Cache(alias).eval(), parts)


def test_a_function_of_two_tensors_is_no_activation() -> None:
    check_parts(
        lambda x: (x @ A) * (1 + torch.tanh(x @ B)),
        lambda p, x: (
            (p @ A) * (1 + torch.tanh(x @ B)) / 2
            + (x @ A) * (p @ B) * torch.tanh(x @ B) / (x @ B) / 2
        ),
    )


def test_a_tensor_that_was_overwritten_is_another_one() -> None:
    def overwritten(x: Tensor) -> Tensor:
        y = x * 1
        gate = torch.tanh(y)
        y.copy_(x @ A)
        return y * (1 + gate)

    check_parts(
        overwritten,
        lambda p, x: (p @ A) * (1 + torch.tanh(x)) / 2 + (x @ A) * p * (torch.tanh(x) / x) / 2,
        X + 3,
    )


class InPlaceGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(x.sigmoid())
        return x


class InferenceGate(nn.Module):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class EachAlone(nn.Module):
    """Gives an activation module vectors, or single numbers."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.activation, self.dims = WrittenGelu(), dims

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1) if self.dims else x.flatten()
        return torch.stack([self.activation(y) for y in rows]).view_as(x)


def hooked(double: str) -> nn.Module:
    module = WrittenGelu()
    if double == "input":
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    else:
        module.register_forward_hook(lambda m, args, output: output * 2)
    return nn.Sequential(module)


ACTIVATIONS: dict[str, nn.Module] = {
    **{
        name: nn.Sequential(ACT2FN[name].double())
        for name in ("gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "quick_gelu")
    },
    **{
        name: nn.Sequential(ACT2FN[name].double())
        for name in ("gelu_10", "gelu_pytorch_tanh", "relu2", "mish", "xielu", "linear")
        if name in ACT2FN
    },
    "written out": nn.Sequential(WrittenGelu()),
    "in place": nn.Sequential(InPlaceGate()),
    "inference mode": nn.Sequential(InferenceGate()),
    "hook on the input": hooked("input"),
    "hook on the output": hooked("output"),
    "vectors": EachAlone(1),
    "numbers": EachAlone(0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_module_is_one_function(name: str) -> None:
    shares, constants, whole = shares_of(ACTIVATIONS[name])
    assert torch.allclose(shares, whole, 0, 1e-5)
    assert not constants.any()


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, :1]], 1)


class Running(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


@pytest.mark.parametrize("kind", [Centre, Shift, Running])
def test_a_module_that_mixes_tokens_is_not_an_activation(kind: type[nn.Module]) -> None:
    check_affine(nn.Sequential(kind()))


def test_an_activation_that_is_not_zero_at_zero_is_taken_apart() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x + 1

    check_parts(nn.Sequential(Shifted()), lambda part, x: part * x)


# ---------------------------------------------------------------------------------------------
# Attention


def plain_logits(x: Tensor) -> Tensor:
    return (x @ A) @ (x @ B).mT / 6**0.5


def attend(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x @ A, x @ B, x, **options)


HIDDEN = torch.ones(3, 3).triu(1).bool()
ATTENTION: dict[str, tuple[Function, Function]] = {
    "plain": (attend, lambda x: plain_logits(x).softmax(-1)),
    "causal": (
        lambda x: attend(x, is_causal=True),
        lambda x: plain_logits(x).masked_fill(HIDDEN, -torch.inf).softmax(-1),
    ),
    "keywords": (
        lambda x: F.scaled_dot_product_attention(query=x @ A, key=x @ B, value=x, scale=1.0),
        lambda x: ((x @ A) @ (x @ B).mT).softmax(-1),
    ),
    "a mask of the input": (
        lambda x: attend(x, attn_mask=x @ x.mT),
        lambda x: (plain_logits(x) + x @ x.mT).softmax(-1),
    ),
    "the same tensor": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: (x @ x.mT / 6**0.5).softmax(-1),
    ),
    "written out": (
        lambda x: torch.bmm(F.softmax(plain_logits(x), dim=-1), x),
        lambda x: plain_logits(x).softmax(-1),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_weights_are_held_fixed(name: str) -> None:
    f, weights = ATTENTION[name]
    check_parts(f, lambda part, x: weights(x) @ part)


@pytest.mark.parametrize("name", ["plain", "written out"])
def test_attnlrp_gives_a_quarter_to_queries_and_to_keys(name: str) -> None:
    f, _ = ATTENTION[name]
    query, key, value = (y.requires_grad_() for y in (X @ A, X @ B, X.clone()))
    with torch.enable_grad():
        y = (query @ key.mT / 6**0.5).softmax(-1) @ value
        grads = torch.autograd.grad(y.sum(), (query, key, value))
    pulled = grads[0] @ A.T / 4 + grads[1] @ B.T / 4 + grads[2] / 2
    ours = InputContributions(f, attention="attnlrp").attribute(X, lambda y: y.sum((1, 2)))
    assert torch.allclose(ours.double(), X * pulled, 0, 1e-6)


def multihead(module: nn.MultiheadAttention, x: Parts, run: Linearised, real: Tensor) -> Parts:
    """What the weights of a MultiheadAttention say, by hand."""
    assert module.in_proj_bias is not None
    weights = zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    q, k, v = (x.linear(w, b) for w, b in weights)
    logits = scores(split(q.value, 2), split(k.value, 2), module.head_dim**-0.5)
    y = run.attend(logits, real[:, None, None], v, module.out_proj.weight)
    return y + number(module.out_proj.bias)


REAL = torch.tensor([[True, True, True], [True, True, False]])


def test_multihead_attention_is_linear_in_its_values() -> None:
    module = of_module(nn.MultiheadAttention(6, 2, batch_first=True))
    run = Linearised({"x": 3})
    expected = multihead(module, run.embedded("x", X), run, REAL)  # type: ignore[arg-type]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, x, x, key_padding_mask=~REAL)[0]

    found = InputContributions(Attention().eval()).attribute(X, lambda y: y.sum((1, 2)))
    shares = expected.parts[:3].sum((-1, -2)).T
    assert torch.allclose(found.double().sum(-1), shares, 0, 1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_of_pytorch_is_linearised(norm_first: bool) -> None:
    """In evaluation it has a fast path of its own."""
    module: Any = of_module(
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=norm_first)
    )
    run = Linearised({"x": 3})

    def normed(x: Parts, norm: nn.LayerNorm) -> Parts:
        return x.normed(norm.weight, norm.eps, bias=norm.bias)

    def mlp(x: Parts) -> Parts:
        return x.through(module.linear1).activated(torch.relu).through(module.linear2)

    x = run.embedded("x", X)
    if norm_first:
        x = x + multihead(module.self_attn, normed(x, module.norm1), run, REAL)
        x = x + mlp(normed(x, module.norm2))
    else:
        x = normed(x + multihead(module.self_attn, x, run, REAL), module.norm1)
        x = normed(x + mlp(x), module.norm2)
    weights = torch.arange(1, 7).double()
    found, delta = InputContributions(module).attribute(
        X, lambda y: (y[:, 0] * weights).sum(1), (None, ~REAL), return_convergence_delta=True
    )
    expected = (x.parts[:3, :, 0] * weights).sum(-1).T
    scale = float(expected.abs().max())
    assert torch.allclose(found.double().sum(-1), expected, 0, 1e-6 * scale)
    assert float(delta.abs().max()) < 1e-6 * scale


def test_multihead_attention_of_an_unknown_model_is_refused() -> None:
    module = of_module(nn.MultiheadAttention(6, 2, batch_first=True))
    with pytest.raises(UnsupportedModelError, match="'multi_head_attention_forward'"):
        InputContributions(lambda x: module(x, x, x)[0]).attribute(X, lambda y: y.sum((1, 2)))


# ---------------------------------------------------------------------------------------------
# Models that are linear already, and models that are refused


LINEAR: dict[str, nn.Module] = {
    "linear": nn.Sequential(nn.Linear(6, 6, bias=False), nn.Dropout(), nn.Linear(6, 4)),
    "convolution": nn.Sequential(nn.Conv1d(3, 4, 2), nn.AvgPool1d(2), nn.Flatten()),
    "batch norm": nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Upsample(scale_factor=2)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_shares_of_a_linear_model_are_gradients_times_inputs(name: str) -> None:
    module = of_module(LINEAR[name])
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)

    def target(y: Tensor) -> Tensor:
        return y.square().flatten(1).sum(1)

    found = InputContributions(module).attribute(X, target)
    scale = float((X * gradient).abs().max())
    assert torch.allclose(found.double(), X * gradient, 0, 1e-6 * scale)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_does_not_hide_what_is_not_understood(how: str) -> None:
    """Its rounding errors are larger than what is missing."""
    for f in (lambda x: x.logcumsumexp(1), Recurrent()):
        torch.manual_seed(5)
        model = Outer(f).eval().float()
        if how == "bfloat16":
            model.bfloat16()
        x = X.to(next(model.parameters()).dtype)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
            pytest.raises(UnsupportedModelError, match=r"'(logcumsumexp|lstm)', in module 'second"),
        ):
            InputContributions(model).attribute(x, lambda y: y.flatten(1).sum(1))


def numpy_sine(x: Tensor) -> Tensor:
    return x + torch.from_numpy(np.sin(x.detach().numpy()))


class Unknown(nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6).double()
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return x + self.f(self.inner(x))


class Outer(nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6).double(), Unknown(f)

    def forward(self, x: Tensor) -> Any:
        return self.second(F.silu(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6).double()

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)[0]


NOT_UNDERSTOOD: dict[str, tuple[Function, str]] = {
    "numpy": (numpy_sine, "NumPy"),
    "array": (lambda x: x + torch.tensor(np.asarray(x)), "NumPy"),
    "new tensor": (lambda x: x.new_tensor(x), "'new_tensor' has no gradient"),
    "no gradient": (lambda x: torch.histc(x, 6), "'histc' has no gradient"),
    "derivative not implemented": (lambda x: torch.special.zeta(x.abs() + 2, 2.0), "zeta"),
    "not homogeneous": (torch.special.i0, r"'i0', in module 'second' \(Unknown\)"),
    "logsumexp": (lambda x: x.logsumexp(-1, keepdim=True), r"'logsumexp', in module 'second'"),
    "variance": (lambda x: x.var(-1, keepdim=True), r"'var', in module 'second'"),
    "operator of aten": (
        lambda x: torch.ops.aten.logcumsumexp.default(x, 1),
        r"'logcumsumexp', in module 'second'",
    ),
    "batch statistics": (
        nn.BatchNorm1d(3, track_running_stats=False).double(),
        r"'batch_norm', in module 'second.f' \(BatchNorm1d\)",
    ),
    "recurrent": (Recurrent(), r"'lstm', in module 'second.f.lstm' \(LSTM\)"),
    "in place, without another form": (
        lambda x: x[0, :, :3].clone().fill_diagonal_(1.0).sum(),
        "'fill_diagonal_' works in place",
    ),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_a_function_that_is_not_understood_is_named(name: str) -> None:
    f, message = NOT_UNDERSTOOD[name]
    torch.manual_seed(0)
    model = Outer(f).eval()
    with pytest.raises(UnsupportedModelError, match=message):
        InputContributions(model).attribute(X, lambda y: y.flatten(1).sum(1))


class OwnMean(torch.autograd.Function):
    """The mean of the tokens seen so far, which is one token's own number for the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1).tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_runs_outside_of_the_pass_is_refused(reentrant: bool) -> None:
    """A model that recomputes itself in evaluation mode, and a function of its own gradient."""

    def recomputed(x: Tensor) -> Any:
        return checkpoint(lambda y: F.softplus(y) * y, x, use_reentrant=reentrant)

    for f in (recomputed, OwnMean.apply):
        torch.manual_seed(0)
        with pytest.raises(UnsupportedModelError, match=r"backward pass|do not sum"):
            InputContributions(Outer(f).eval()).attribute(X, lambda y: y.flatten(1).sum(1))


def test_checkpointing_of_transformers_is_for_training_alone() -> None:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([[3, 4, 5]])
    expected = InputContributions(model).attribute(ids, 1)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert torch.equal(InputContributions(model).attribute(ids, 1), expected)
