"""A forward pass of a model that autograd sees as linear.

While :class:`Linearised` follows the functions of a thread, each function that is not linear keeps
its value, and gets the gradient of a linear function with the same value at this input: norms keep
their scale, activations their ratio of output to input, attention its weights; products give a part
of the gradient to each factor. So a gradient times its input is a share of the output, and all
shares sum to the output. Constants, such as biases, have their shares too, in the gradient of one
scalar that they are multiplied by.

It knows functions, and never models. Whether the sum closes tells whether every function was
understood.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.activation_chains import ActivationChains
from captum_cw.capture.dispatch import Proceed
from captum_cw.capture.embedded_tokens import EmbeddedTokens, Leaf
from captum_cw.capture.function_call import (
    FunctionCall,
    is_in_place,
    name_of,
    substitute,
    tensors_among,
    tensors_in,
    varies,
)
from captum_cw.capture.linear_rules import (
    SPLITS,
    checked,
    in_parts,
    is_linear,
    run_linearised,
)
from captum_cw.capture.module_stack import innermost
from captum_cw.capture.rounding import in_widest, rounding
from captum_cw.capture.saved_tensors import before_writing
from captum_cw.functional import widest

__all__ = ["Linearised"]

#: The relative error with which the shares of one function sum to its value.
TOLERANCE = 1e-3

#: The number of random sums by which a function is checked.
SUMS = 3

#: Functions that pass an activation on, but would hide it from autograd.
_PASSED_ON = {"detach", "data"}


class Linearised:
    """Follows the functions of a forward pass, and makes their gradients linear.

    Args:
        ids: Token ids by the name of their argument.
        floating: Inputs of floating numbers by the name of their argument.
        device: The device of the model's inputs.
        softmax_gradient: Whether attention weights keep the gradient of their softmax.
        is_plain: Whether functions keep their own gradients.
        examines: Whether each function is checked by itself, which is slow.

    Attributes:
        one: The scalar whose gradient is the share of all constants.
        given: The floating inputs as the model must be given them.
        dtypes: The dtypes of all activations.
        unequal: The first function whose shares do not sum to its value, and the module that was
            running; None if all functions are understood, or were not examined.
    """

    def __init__(
        self,
        ids: Mapping[str | int, Tensor],
        floating: Mapping[str | int, Tensor],
        device: torch.device,
        *,
        softmax_gradient: bool = False,
        is_plain: bool = False,
        examines: bool = False,
    ) -> None:
        self.one = torch.ones((), dtype=widest(device), device=device, requires_grad=True)
        self._tokens = EmbeddedTokens(ids, self.one)
        leaves = {name: x.detach().requires_grad_() for name, x in floating.items()}
        self._inputs = [Leaf(name, x) for name, x in leaves.items()]
        with torch.enable_grad():
            self.given = {name: x.clone() for name, x in leaves.items()}
        self._chains = ActivationChains()
        self.dtypes: set[torch.dtype] = set()
        self._last_fixed: tuple[FunctionCall, Tensor, tuple[int, ...]] | None = None
        self._softmax_gradient, self._is_plain = softmax_gradient, is_plain
        self._examines = examines
        self.unequal: tuple[str, torch.nn.Module | None] | None = None

    @property
    def leaves(self) -> list[Leaf]:
        """The embeddings and floating inputs, from which gradients are taken."""
        return [*self._tokens.leaves, *self._inputs]

    def again(self) -> Linearised:
        """Return a follower for a part of the pass that runs once more: it finds no new leaves."""
        again = copy.copy(self)
        again._tokens = self._tokens.again()
        return again

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Run a torch function with a linear gradient."""
        if func is torch._C._set_grad_enabled:
            return None  # a part of the model would compute without gradients
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._run(func, args, kwargs, proceed)
        with torch.inference_mode(False), torch.enable_grad():
            return self._run(func, args, kwargs, proceed)

    def _run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        found = tensors_among(args, kwargs)
        may_vary = has_parameter = False
        for x in found:
            if x.grad_fn is not None:
                may_vary = True
            elif x.requires_grad or x.is_inference():
                has_parameter = True
        if has_parameter:
            args, kwargs = substitute((args, kwargs), _without_parameter)
            found = tensors_among(args, kwargs)
        if found and is_in_place(func):
            before_writing(found[0])
        name = name_of(func)
        if name in _PASSED_ON and found:
            # An alias would hide from autograd what the model writes into it.
            return args[0] if is_in_place(func) else args[0].view_as(args[0])
        if may_vary:
            if self._is_plain:
                return proceed(func, args, kwargs)
            return self._linear(func, args, kwargs, proceed)
        if name in SPLITS and found and found[0].is_floating_point():
            return in_parts(self._call(func, args, kwargs, proceed))
        if not is_in_place(func) and any(x in self._chains for x in found):
            call = self._call(func, args, kwargs, proceed)
            return self._chains.run(call, FunctionCall.run)
        return self._tokens.run(func, args, kwargs, proceed)

    def _call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> FunctionCall:
        name, one = name_of(func), self.one
        return FunctionCall(func, name, args, kwargs, proceed, one, self._softmax_gradient)

    def _linear(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Run a function of something that depends on the inputs."""
        is_short = not self._examines and "out" not in kwargs and is_linear(func)
        result = proceed(func, args, kwargs) if is_short else None
        if varies(result):
            self.dtypes.add(result.dtype)
            return result
        call = self._call(func, args, kwargs, proceed)
        if is_short:
            result = checked(call, result)
        elif self._examines and self.unequal is None and not is_in_place(func):
            result = self._examined(call)
        else:
            result = run_linearised(call, self._chains)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        self.dtypes.add(result.dtype)
        if not varies(result):
            versions = tuple(y._version for y in (call.first, result) if isinstance(y, Tensor))
            self._last_fixed = call, result, versions
        return result

    def last_function(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """Return what a fixed result was computed from, and how; None for any but the last one.

        It is the softmax or sigmoid at the end of a classifier.
        """
        if self._last_fixed is None:
            return None
        call, result, versions = self._last_fixed
        source = call.first
        if not varies(source) or (source._version, result._version) != versions:
            return None
        # The model may have squeezed a dimension.
        is_same = x.data_ptr() == result.data_ptr() and x.numel() == result.numel()
        if not is_same or not x.is_contiguous():
            return None
        return source, lambda y: call.func(y, *call.args[1:], **call.kwargs).reshape(x.shape)

    def _examined(self, call: FunctionCall) -> Any:
        """Run a function, and check that its shares sum to its value."""
        with torch.autocast(self.one.device.type, enabled=False):
            if not self._is_equal(call):
                self.unequal = call.name, innermost()
        return run_linearised(call, self._chains)

    def _is_equal(self, call: FunctionCall) -> bool:
        """Whether the shares of a function sum to its value, in single precision at least."""
        # The tensors may depend on each other, so the function runs on copies.
        copies: dict[int, Tensor] = {}

        def copy_of(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            if not varies(x):
                return wide
            return copies.setdefault(id(x), wide.requires_grad_().clone())

        result = run_linearised(call.changed(copy_of), self._chains)
        results = [x for x in tensors_in(result) if varies(x)]
        if not results:
            return True
        inputs = [*copies.values(), self.one]
        generator = torch.Generator().manual_seed(0)
        return all(_sums(results, inputs, generator) for _ in range(SUMS))


def _sums(results: list[Tensor], inputs: list[Tensor], generator: torch.Generator) -> bool:
    """Whether the shares of inputs sum to a random sum of results."""
    seeds = [torch.empty_like(x, device="cpu").normal_(generator=generator) for x in results]
    seeds = [seed.to(x) for seed, x in zip(seeds, results, strict=True)]
    grads = torch.autograd.grad(results, inputs, seeds, retain_graph=True, allow_unused=True)
    terms = [_product(g, x) for g, x in zip(grads, inputs, strict=True) if g is not None]
    parts = [_product(s, x) for s, x in zip(seeds, results, strict=True)]
    whole, found = (sum(float(x.sum()) for x in y) for y in (parts, terms))
    size = sum(float(x.square().sum()) for x in parts) ** 0.5
    return bool(abs(found - whole) <= max(TOLERANCE, 4 * rounding(*results)) * size)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return an elementwise product without a gradient, in the widest dtype."""
    return in_widest(a) * in_widest(b)


def _without_parameter(x: Any) -> Any:
    """Detach the parameters of the model, which never get a gradient."""
    if not isinstance(x, Tensor):
        return x
    if x.is_inference():  # autograd cannot keep it
        return x.detach().clone()
    return x.detach() if x.is_leaf and x.requires_grad else x
