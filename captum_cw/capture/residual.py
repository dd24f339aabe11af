"""Follow an attention output to the residual stream.

Found by the data: the output is followed, through functions that leave its numbers alone or
multiply them by one number, to where it is used. If that is in a module which was given it, that
module is the norm that comes after attention (Gemma 2 and 3, OLMo 2), or a learned scale of each
feature (DINOv2); if it is a sum, there is none.

Where the residual stream is asked for, it is what the output is added to, and a module of the
layer must have been given it: else it is something else, such as the output of an MLP that runs
beside attention, and the sum is followed to the next one. In models that read the stream without a
norm before attention, the sum is followed further: where it goes through a norm and is not used
again (BERT), what goes on is the norm of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import UnsupportedModelError, same_numbers
from captum_cw.capture.dispatch import Proceed, following
from captum_cw.capture.hidden_states import GivenStates
from captum_cw.capture.output_projection import in_place, same_place
from captum_cw.capture.rounding import rounding
from captum_cw.functional import FrozenUpdate, ResidualSum

__all__ = ["ResidualUpdates"]

Found = Callable[[FrozenUpdate | None, ResidualSum | None], Tensor | None]
"""Is told what becomes of an output, and what it is added to, where that is asked for; may give
another output for the model to go on with, where it is not."""

#: Functions by which an output joins the residual stream.
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
#: Functions that change the type of numbers, or where they lie, alone.
COPIES = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}
PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__"}

_following: ContextVar[ResidualUpdates | None] = ContextVar("captum_cw_updates", default=None)


@dataclass(kw_only=True)
class _Path:
    """A tensor on its way through functions and modules.

    Args:
        name: The name of the attention layer.
        found: Takes what was found out.
        now: The tensor as it is now.
        given: What the modules of the layer were given; None if the stream is not asked for.
        inside: The modules that were given the tensor and have not returned, the innermost last.
        reader: The module that uses it, until that module returns.
    """

    name: str
    found: Found
    now: Tensor
    given: GivenStates | None
    inside: list[nn.Module] = field(default_factory=list)
    reader: nn.Module | None = None


@dataclass(kw_only=True)
class _UpdatePath(_Path):
    """The output of an attention layer on its way to the residual stream.

    Args:
        output: What the output projection gave.
        steps: What has been done to it.
        gain_and_bias: Those of a norm that it went through.
    """

    output: Tensor
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    gain_and_bias: tuple[Tensor, Tensor] | None = None

    def taken(self, output: Tensor) -> Tensor:
        """Takes another output as far as this one has come."""
        for step in self.steps:
            output = step(output)
        return output

    def update(self) -> FrozenUpdate | None:
        """What the output has become on its way to a sum; None if it is as it was."""
        if same_place(self.now, self.output):
            return None
        ones = torch.ones_like(self.output[0, 0])
        gain, bias = self.gain_and_bias or (ones, 0 * ones)
        update = _frozen(self.output, self.now.view_as(self.output), gain, bias)
        if update is None:
            raise _unknown(self, "more than one factor")
        return update

    def joined(self, given: GivenStates) -> _SumPath:
        """The path from the sum on that the output is about to join."""
        return _SumPath(
            name=self.name,
            found=self.found,
            now=self.now,
            given=given,
            update=self.update(),
            added=given.by_example(self.now).clone(),
        )


@dataclass(kw_only=True)
class _SumPath(_Path):
    """The sum that an output has joined, until it is known whether a norm reads it.

    Args:
        given: What the modules of the layer were given.
        update: What the output was when it joined the sum.
        added: The output itself then, ``(B, T, d)``.
        sum: The sum with the residual stream, once the stream has joined.
        normed: The sum with the norm that it went through; None if it went through none.
    """

    given: GivenStates
    update: FrozenUpdate | None
    added: Tensor
    sum: ResidualSum | None = None
    normed: ResidualSum | None = None


class ResidualUpdates:
    """Follows attention outputs in this thread, while :meth:`watching` lasts.

    Args:
        roots: The model, or the modules of it that are known.
    """

    def __init__(self, roots: Collection[nn.Module]) -> None:
        self._modules = {module for root in roots for module in root.modules()}
        self._path: _UpdatePath | _SumPath | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees functions and modules at work."""
        with ExitStack() as stack:
            for module in self._modules:
                for handle in (
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave),
                ):
                    stack.callback(handle.remove)
            token = _following.set(self)
            try:
                with following(self):
                    yield
            finally:
                _following.reset(token)
                self._path = None

    def follow(
        self, name: str, output: Tensor, found: Found, given: GivenStates | None = None
    ) -> None:
        """Tells ``found`` what becomes of the output of the attention layer ``name``.

        With the states that the modules of the layer were given, also of the residual stream.
        """
        self.check_arrived()
        self._path = _UpdatePath(name=name, found=found, now=output, given=given, output=output)

    def check_arrived(self) -> None:
        """Raises an UnsupportedModelError if an output that was followed went nowhere."""
        path = self._path
        if path is None:
            return
        if isinstance(path, _UpdatePath):
            raise _unknown(path, "nothing that could be seen")
        if path.sum is None:
            raise UnsupportedModelError(
                f"The output of attention layer {path.name!r} is added to something that no module "
                "of its layer was given, so the residual stream is not known: use another choice "
                "of layers, such as 'mean', or roll out AttentionWeights, which do not need it."
            )
        self._finish(path, path.normed or path.sum)

    def _finish(self, path: _SumPath, residual: ResidualSum) -> None:
        self._path = None
        path.found(path.update, residual)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        path = self._path
        if _following.get() is self and path is not None and path.reader is None:
            given = (*args, *(kwargs or {}).values())
            if any(same_place(x, path.now) for x in given):
                path.inside.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        path = self._path
        if _following.get() is not self or path is None or module not in path.inside:
            return None
        while path.inside.pop() is not module:
            pass
        if path.reader is not module:
            return None
        if isinstance(path, _SumPath):
            self._leave_with_sum(path, module, result)
            return None
        return self._leave_with_update(path, module, result)

    def _leave_with_update(self, path: _UpdatePath, module: nn.Module, result: Any) -> Any:
        """Takes the module that has read an output for its norm, or refuses the model."""
        what = type(module).__name__
        if not isinstance(result, Tensor) or result.shape != path.now.shape:
            raise _unknown(path, what)
        with torch.no_grad():
            gain, bias = _gain_and_bias(module, path.now)
            update = _frozen(path.output, result.view_as(path.output), gain, bias)
        if update is None:
            raise _unknown(path, f"{what}, which is no norm")
        if path.given is not None:  # and on to the sum
            path.now, path.reader, path.gain_and_bias = result, None, (gain, bias)
            return None
        self._path = None
        other = path.found(update, None)
        return None if other is None else module.forward(path.taken(other))

    def _leave_with_sum(self, path: _SumPath, module: nn.Module, result: Any) -> None:
        """Notes the norm that has read the sum, or ends the path if the module is not a norm."""
        assert path.sum is not None
        if path.normed is None:
            path.normed = _normed(path.sum, path, module, result)
            if path.normed is None:
                self._finish(path, path.sum)
                return
        path.reader = None  # only now: the calls of the module above are not the model's

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Looks at a function of torch that runs."""
        path = self._path
        if path is None or path.reader is not None or _following.get() is not self:
            return proceed(func, args, kwargs)
        if not any(same_place(x, path.now) for x in (*args, *kwargs.values())):
            return proceed(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        if isinstance(path, _UpdatePath):
            if path.given is None or name not in SUMS or path.inside:
                return self._follow_update(path, name, func, args, kwargs, proceed)
            path = self._path = path.joined(path.given)
        return self._follow_sum(path, name, partial(proceed, func, args, kwargs), args, kwargs)

    def _follow_update(
        self,
        path: _UpdatePath,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        proceed: Proceed,
    ) -> Any:
        """Runs a function on an output that is on its way to a sum or a norm."""
        changes = in_place(func) or "out" in kwargs
        if not changes:
            result = proceed(func, args, kwargs)
            if not isinstance(result, Tensor):  # a shape, or the like
                return result
            if same_place(result, path.now) or (not path.inside and _follows(name, args, kwargs)):
                before = path.now
                path.steps.append(lambda x: _with(func, args, kwargs, before, x))
                path.now = result
                return result
        if path.inside:
            path.reader = path.inside[-1]
            return proceed(func, args, kwargs) if changes else result
        if name not in SUMS:
            raise _unknown(path, f"{name!r}")
        update = path.update()
        self._path = None
        other = path.found(update, None)
        if other is None:
            return proceed(func, args, kwargs) if changes else result
        return proceed(func, *_replaced(args, kwargs, path.now, path.taken(other)))

    def _follow_sum(
        self,
        path: _SumPath,
        name: str,
        run: Callable[[], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a function on an output that has joined others, the stream among them or not."""
        others = [
            x
            for x in (*args, *kwargs.values())
            if isinstance(x, Tensor)
            and x.numel() == path.now.numel()
            and not same_place(x, path.now)
        ]
        joins = name in SUMS and len(others) == 1 and "alpha" not in kwargs  # a factor
        if path.sum is not None:
            if joins:  # the sum itself goes on
                self._finish(path, path.sum)
                return run()
            result = run()
            if not _made_of(result, path.now):
                return result
            if not path.inside:
                raise _unknown(path, f"{name!r} after it was added to the stream")
            path.reader = path.inside[-1]
            return result
        # What is changed in place is not what it was.
        stream = others[0].clone() if joins and path.given.holds(others[0]) else None
        result = run()
        if not joins and (not isinstance(result, Tensor) or same_place(result, path.now)):
            return result
        if not joins or path.inside:
            raise _unknown(path, f"{name!r} after it was added to something else")
        path.now = result
        if stream is not None:
            x = path.given.by_example(stream)
            path.sum = ResidualSum(x, x + path.added)
            if not same_numbers(stream, path.given.own):
                self._finish(path, path.sum)
        return result


def _normed(
    residual: ResidualSum, path: _SumPath, module: nn.Module, result: Any
) -> ResidualSum | None:
    """The sum with the module that has read it as its norm; None if that is none."""
    if not isinstance(result, Tensor) or result.shape != path.now.shape:
        return None
    if any(weight.dim() > 1 for weight in module.parameters()):
        return None  # not asked, since it may take more than states
    with torch.no_grad():
        gain, bias = _gain_and_bias(module, path.now)
        x, y = (path.given.by_example(z) for z in (path.now, result))
        norm = _frozen(x, y, gain, bias)
    return None if norm is None else replace(residual, result=y.clone(), norm=norm)


def _made_of(result: Any, x: Tensor) -> bool:
    """Whether a result is new states, rather than a view or a property of old ones."""
    return (
        isinstance(result, Tensor)
        and result.is_floating_point()
        and result.numel() == x.numel()
        and not same_place(result, x)
    )


def _follows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function leaves the numbers alone, or multiplies all of them by one."""
    if name in COPIES:
        return True
    others = [x for x in (*args, *kwargs.values()) if isinstance(x, Number)]
    return name in PRODUCTS and len(others) == 1


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with another tensor in the place of one."""

    def changed(x: Any) -> Any:
        return new.view(x.shape) if same_place(x, old) else x

    return tuple(map(changed, args)), {name: changed(x) for name, x in kwargs.items()}


def _with(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> Any:
    """Runs the function with another tensor in the place of one."""
    args, kwargs = _replaced(args, kwargs, old, new)
    return func(*args, **kwargs)


def _gain_and_bias(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm multiplies each feature by, up to one factor, and adds to it.

    Asked of the module itself, with numbers of mean zero and nearly one size: it may be
    offloaded, and nothing needs to be known of its attributes.
    """
    d = x.shape[-1]
    probe = torch.ones(1, 1, d, dtype=x.dtype, device=x.device)
    probe[..., ::2] = -1
    probe -= probe.mean()
    plus, minus = (module.forward(sign * probe).float()[0, 0] for sign in (1, -1))
    return (plus - minus) / (2 * probe[0, 0].float()), (plus + minus) / 2


def _frozen(x: Tensor, y: Tensor, gain: Tensor, bias: Tensor) -> FrozenUpdate | None:
    """How ``y`` comes from ``x`` once the scale of each query is fixed; None if not so."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    tolerance = max(1e-4, 8 * rounding(x, y))
    x, y, gain = x.to(dtype), y.to(dtype) - bias.to(dtype), gain.to(dtype)
    for centred in (False, True):
        update = FrozenUpdate(gain, x.new_ones(x.shape[:-1]), centred)
        z = update.without_scale(x)
        scale = (y * z).sum(-1) / z.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
        wrong = (y - scale[..., None] * z).norm(dim=-1) > tolerance * y.norm(dim=-1)
        if not wrong.any():
            return FrozenUpdate(gain, scale, centred)
    return None


def _unknown(path: _Path, what: str) -> UnsupportedModelError:
    way_out = "use space='attention'"
    if path.given is not None:
        way_out = "use another choice of layers, such as 'mean', or roll out AttentionWeights"
    return UnsupportedModelError(
        f"The output of attention layer {path.name!r} goes into {what}, so what is added to the "
        f"residual stream is not known: {way_out}."
    )
