"""Follow an attention output to the residual stream.

The output is recognised by its memory. It is followed through functions that copy it or multiply it
by one number, to where it is used:

* a sum: the output is added to the residual stream as it is;
* a module that receives it: the module is a norm after attention (Gemma 2 and 3, OLMo 2), or a
  learned scale for each feature (DINOv2).

On request, the residual stream is found too. It is what the output is added to, if a module of the
layer received the same numbers. Otherwise the output was added to something else, such as the
output of an MLP that runs beside attention, and the sum is followed to the next sum. Some models do
not apply a norm before attention. There, the sum is followed further: if it goes through a norm and
is not used again (BERT), the norm of the sum is what continues.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import UnsupportedModelError, same_numbers
from captum_cw.capture.dispatch import Proceed, following
from captum_cw.capture.function_call import is_in_place
from captum_cw.capture.hidden_states import GivenStates
from captum_cw.capture.module_stack import Run, running
from captum_cw.capture.output_projection import same_place
from captum_cw.capture.patching import set_to
from captum_cw.capture.rounding import rounding
from captum_cw.functional import FrozenUpdate, ResidualSum

__all__ = ["ResidualUpdates"]

OnUpdate = Callable[[FrozenUpdate | None, ResidualSum | None], Tensor | None]
"""Receives how an output is changed on its way (None if it is not), and the sum with the stream
(None if it was not requested). Without a sum, it may return another output for the model."""

#: Functions that add an output to the residual stream.
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
#: Functions that change only the dtype or the memory of a tensor.
COPIES = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}
PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__"}

_following: ContextVar[ResidualUpdates | None] = ContextVar("captum_cw_updates", default=None)


@dataclass(frozen=True)
class _Function:
    """A call of a torch function.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        proceed: Runs a function for the observers that began earlier.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    proceed: Proceed

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", str(self.func))

    @property
    def given(self) -> tuple[Any, ...]:
        """All arguments."""
        return *self.args, *self.kwargs.values()

    def keeps_direction(self) -> bool:
        """Whether the result is a copy of a tensor, or the tensor times one number."""
        numbers = [x for x in self.given if isinstance(x, Number)]
        return self.name in COPIES or (self.name in PRODUCTS and len(numbers) == 1)

    def run(self) -> Any:
        """Run the function."""
        return self.proceed(self.func, self.args, self.kwargs)

    def substitute(self, old: Tensor, new: Tensor) -> _Function:
        """Return the call with another tensor in place of ``old``."""

        def changed(x: Any) -> Any:
            return new.view(x.shape) if same_place(x, old) else x

        kwargs = {name: changed(x) for name, x in self.kwargs.items()}
        return replace(self, args=tuple(map(changed, self.args)), kwargs=kwargs)


@dataclass(kw_only=True)
class _Path:
    """The way of an attention output to the residual stream, and of their sum to its norm.

    Args:
        name: The name of the attention layer.
        on_update: The function that receives what is found.
        output: The output of the projection.
        given: The inputs of the layer's modules; None if the stream was not requested.
        before: The modules that were already running when the path began.
        now: The output in its current form, or the sum that contains it.
        reader: The module that uses ``now``, while it runs.
        steps: The functions that have been applied to the output, each with the tensor that it
            received.
        gain_and_bias: The gain and bias of the norm that has been applied to the output.
        added: The output when it was added, ``(B, T, d)``; None before.
        update: How the output was changed before it was added.
        sum: The sum with the residual stream; None until the stream is added.
        normed: The sum with its norm; None without a norm.
    """

    name: str
    on_update: OnUpdate
    output: Tensor
    given: GivenStates | None
    before: tuple[Run, ...]
    now: Tensor
    reader: nn.Module | None = None
    steps: list[tuple[_Function, Tensor]] = field(default_factory=list)
    gain_and_bias: tuple[Tensor, Tensor] | None = None
    added: Tensor | None = None
    update: FrozenUpdate | None = None
    sum: ResidualSum | None = None
    normed: ResidualSum | None = None

    def inside(self) -> nn.Module | None:
        """Return the innermost running module that received the tensor; None if none did."""
        for run in reversed(running()):
            if run not in self.before and any(same_place(x, self.now) for x in run.tensors()):
                return run.module
        return None

    def apply_steps(self, output: Tensor) -> Tensor:
        """Apply the same functions to another output."""
        for function, received in self.steps:
            step = function.substitute(received, output)
            output = step.func(*step.args, **step.kwargs)
        return output

    def find_update(self) -> FrozenUpdate | None:
        """Return how the output has been changed; None if it has not."""
        if same_place(self.now, self.output):
            return None
        ones = torch.ones_like(self.output[0, 0])
        gain, bias = self.gain_and_bias or (ones, 0 * ones)
        update = _frozen(self.output, self.now.view_as(self.output), gain, bias)
        if update is None:
            raise _unknown(self, "more than one factor")
        return update


class ResidualUpdates:
    """Follows attention outputs in this thread, inside :meth:`watching`.

    Args:
        roots: The model, or its known modules.
    """

    def __init__(self, roots: Collection[nn.Module]) -> None:
        self._modules = {module for root in roots for module in root.modules()}
        self._path: _Path | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe functions and modules while this context is active."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_hook(self._leave).remove)
            with set_to(_following, self), following(self):
                yield
        self._path = None

    def follow(
        self, name: str, output: Tensor, on_update: OnUpdate, given: GivenStates | None = None
    ) -> None:
        """Follow the output of an attention layer.

        Args:
            name: The name of the layer.
            output: The output of its projection, ``(B, T, d)``.
            on_update: The function that receives what is found.
            given: The inputs of the layer's modules, to find the residual stream; None to stop at
                the first sum.
        """
        self.check_arrived()
        self._path = _Path(
            name=name,
            on_update=on_update,
            output=output,
            given=given,
            before=running(),
            now=output,
        )

    def check_arrived(self) -> None:
        """Raise an UnsupportedModelError if the output that is followed was not used."""
        path = self._path
        if path is None:
            return
        if path.added is None:
            raise _unknown(path, "nothing that could be seen")
        if path.sum is None:
            raise UnsupportedModelError(
                f"The output of attention layer {path.name!r} is added to something that no module "
                "of its layer was given, so the residual stream is not known: use another choice "
                "of layers, such as 'mean', or roll out AttentionWeights, which do not need it."
            )
        self._finish(path, path.normed or path.sum)

    def _finish(self, path: _Path, residual: ResidualSum) -> None:
        self._path = None
        path.on_update(path.update, residual)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        path = self._path
        if _following.get() is not self or path is None or path.reader is not module:
            return None
        if path.added is None:
            return self._leave_with_update(path, module, result)
        return self._leave_with_sum(path, module, result)

    def _leave_with_update(self, path: _Path, module: nn.Module, result: Any) -> Any:
        """Treat the module that used an output as its norm, or refuse the model."""
        what = type(module).__name__
        if not isinstance(result, Tensor) or result.shape != path.now.shape:
            raise _unknown(path, what)
        with torch.no_grad():
            gain, bias = _gain_and_bias(module, path.now)
            update = _frozen(path.output, result.view_as(path.output), gain, bias)
        if update is None:
            raise _unknown(path, f"{what}, which is not a norm")
        if path.given is not None:  # the stream was requested
            path.now, path.reader, path.gain_and_bias = result, None, (gain, bias)
            return None
        self._path = None
        other = path.on_update(update, None)
        return None if other is None else module.forward(path.apply_steps(other))

    def _leave_with_sum(self, path: _Path, module: nn.Module, result: Any) -> None:
        """Record the norm that used the sum, or finish if the module is not a norm."""
        assert path.sum is not None
        if path.normed is None:
            path.normed = _normed(path.sum, path, module, result)
            if path.normed is None:
                self._finish(path, path.sum)
                return
        path.reader = None  # only now, since _normed itself calls the module

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Observe a torch function that runs."""
        path, function = self._path, _Function(func, args, kwargs, proceed)
        if path is None or path.reader is not None or _following.get() is not self:
            return function.run()
        if not any(same_place(x, path.now) for x in function.given):
            return function.run()
        if path.added is None:
            if path.given is None or function.name not in SUMS or path.inside():
                return self._follow_update(path, function)
            path.update = path.find_update()
            path.added = path.given.by_example(path.now).clone()
        if path.sum is None:
            return self._follow_to_stream(path, function)
        return self._follow_beyond_stream(path, path.sum, function)

    def _follow_update(self, path: _Path, function: _Function) -> Any:
        """Run a function on an output that is on its way to a sum or a norm."""
        inside = path.inside()
        changes = is_in_place(function.func) or "out" in function.kwargs
        if not changes:
            result = function.run()
            if not isinstance(result, Tensor):  # for example a shape
                return result
            if same_place(result, path.now) or (inside is None and function.keeps_direction()):
                path.steps.append((function, path.now))
                path.now = result
                return result
        if inside is not None:
            path.reader = inside
            return function.run() if changes else result
        if function.name not in SUMS:
            raise _unknown(path, f"{function.name!r}")
        update = path.find_update()
        self._path = None
        other = path.on_update(update, None)
        if other is None:
            return function.run() if changes else result
        return function.substitute(path.now, path.apply_steps(other)).run()

    def _follow_to_stream(self, path: _Path, function: _Function) -> Any:
        """Run a function on a sum that the stream has not joined yet."""
        assert path.given is not None
        assert path.added is not None
        other = _other_summand(path, function)
        # A copy, since the sum may overwrite it.
        stream = other.clone() if other is not None and path.given.holds(other) else None
        result = function.run()
        if other is None and (not isinstance(result, Tensor) or same_place(result, path.now)):
            return result
        if other is None or path.inside():
            raise _unknown(path, f"{function.name!r} after it was added to something else")
        path.now = result
        if stream is not None:
            x = path.given.by_example(stream)
            path.sum = ResidualSum(x, x + path.added)
            if not same_numbers(stream, path.given.own):  # a norm is applied before attention
                self._finish(path, path.sum)
        return result

    def _follow_beyond_stream(self, path: _Path, residual: ResidualSum, function: _Function) -> Any:
        """Run a function on the sum with the stream, to find a norm that is applied to it."""
        if _other_summand(path, function) is not None:  # the sum continues without a norm
            self._finish(path, residual)
            return function.run()
        result = function.run()
        if _is_new_state(result, path.now):
            path.reader = path.inside()
            if path.reader is None:
                raise _unknown(path, f"{function.name!r} after it was added to the stream")
        return result


def _other_summand(path: _Path, function: _Function) -> Tensor | None:
    """Return what a function adds to a tensor; None if it does not add one other tensor."""
    others = [
        x
        for x in function.given
        if isinstance(x, Tensor) and x.numel() == path.now.numel() and not same_place(x, path.now)
    ]
    is_sum = function.name in SUMS and "alpha" not in function.kwargs  # alpha is a factor
    return others[0] if is_sum and len(others) == 1 else None


def _is_new_state(result: Any, x: Tensor) -> bool:
    """Whether a result is a new state, rather than a view or a property of ``x``."""
    return (
        isinstance(result, Tensor)
        and result.is_floating_point()
        and result.numel() == x.numel()
        and not same_place(result, x)
    )


def _normed(
    residual: ResidualSum, path: _Path, module: nn.Module, result: Any
) -> ResidualSum | None:
    """Return the sum with the module that used it as its norm; None if it is not a norm."""
    if not isinstance(result, Tensor) or result.shape != path.now.shape:
        return None
    if any(weight.dim() > 1 for weight in module.parameters()):
        return None  # the module may need other arguments, so it is not called
    with torch.no_grad():
        assert path.given is not None
        gain, bias = _gain_and_bias(module, path.now)
        x, y = (path.given.by_example(z) for z in (path.now, result))
        norm = _frozen(x, y, gain, bias)
    return None if norm is None else replace(residual, result=y.clone(), norm=norm)


def _gain_and_bias(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a norm's gain ``(d,)``, up to one common factor, and its bias ``(d,)``.

    The module is called on numbers with mean zero and almost the same absolute value. So its
    attributes need not be known, and it may be offloaded.
    """
    d = x.shape[-1]
    probe = torch.ones(1, 1, d, dtype=x.dtype, device=x.device)
    probe[..., ::2] = -1
    probe -= probe.mean()
    plus, minus = (module.forward(sign * probe).float()[0, 0] for sign in (1, -1))
    return (plus - minus) / (2 * probe[0, 0].float()), (plus + minus) / 2


def _frozen(x: Tensor, y: Tensor, gain: Tensor, bias: Tensor) -> FrozenUpdate | None:
    """Return the update from ``x`` to ``y`` with one scale for each query; None if none exists."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    tolerance = max(1e-4, 8 * rounding(x, y))
    x, y, gain = x.to(dtype), y.to(dtype) - bias.to(dtype), gain.to(dtype)
    for centred in (False, True):
        z = FrozenUpdate(gain, x.new_ones(x.shape[:-1]), centred).without_scale(x)
        scale = (y * z).sum(-1) / z.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
        wrong = (y - scale[..., None] * z).norm(dim=-1) > tolerance * y.norm(dim=-1)
        if not wrong.any():
            return FrozenUpdate(gain, scale, centred)
    return None


def _unknown(path: _Path, what: str) -> UnsupportedModelError:
    hint = "use space='attention'"
    if path.given is not None:
        hint = "use another choice of layers, such as 'mean', or roll out AttentionWeights"
    return UnsupportedModelError(
        f"The output of attention layer {path.name!r} goes into {what}, so what is added to the "
        f"residual stream is not known: {hint}."
    )
