"""What a model makes of an attention output before it adds it to the residual stream.

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


@dataclass
class _Path:
    """An output on its way.

    Args:
        name: Of the attention layer.
        output: What its projection gave.
        found: Is told.
        now: The output as it is now.
        steps: What has been done to it.
        inside: The modules that were given it and have not returned, the innermost last.
        norm: The one that uses it.
        given: What the modules of its layer were given; None if the stream is not asked for.
        gain_and_bias: Of a norm that it went through, where it is followed further.
        update: What it is when it joins others.
        added: The output when it does so, ``(B, T, d)``.
        sum: Once it has joined the stream, and is followed further: ``now`` is the sum then.
        normed: The sum with the norm that it went through; None if through none.
    """

    name: str
    output: Tensor
    found: Found
    now: Tensor
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    inside: list[nn.Module] = field(default_factory=list)
    norm: nn.Module | None = None
    given: GivenStates | None = None
    gain_and_bias: tuple[Tensor, Tensor] | None = None
    update: FrozenUpdate | None = None
    added: Tensor | None = None
    sum: ResidualSum | None = None
    normed: ResidualSum | None = None

    def taken(self, output: Tensor) -> Tensor:
        """Another output, taken as far as this one is."""
        for step in self.steps:
            output = step(output)
        return output


class ResidualUpdates:
    """Follows attention outputs in this thread, while :meth:`watching` lasts.

    Args:
        roots: The model, or the modules of it that are known.
    """

    def __init__(self, roots: Collection[nn.Module]) -> None:
        self._modules = {module for root in roots for module in root.modules()}
        self._path: _Path | None = None

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
        self._path = _Path(name, output, found, output, given=given)

    def check_arrived(self) -> None:
        """Raises an UnsupportedModelError if an output that was followed went nowhere."""
        path = self._path
        if path is None:
            return
        if path.sum is not None:
            self._finish(path, path.normed or path.sum)
        elif path.added is not None:
            raise UnsupportedModelError(
                f"The output of attention layer {path.name!r} is added to something that no module "
                "of its layer was given, so the residual stream is not known: use another choice "
                "of layers, such as 'mean', or roll out AttentionWeights, which do not need it."
            )
        else:
            raise _unknown(path, "nothing that could be seen")

    def _finish(self, path: _Path, residual: ResidualSum) -> None:
        self._path = None
        path.found(path.update, residual)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        path = self._path
        if _following.get() is self and path is not None and path.norm is None:
            given = (*args, *(kwargs or {}).values())
            if any(same_place(x, path.now) for x in given):
                path.inside.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        path = self._path
        if _following.get() is not self or path is None or module not in path.inside:
            return None
        while path.inside.pop() is not module:
            pass
        if path.norm is not module:
            return None
        if path.sum is not None:
            self._left_by_sum(path, path.sum, module, result)
            return None
        what = type(module).__name__
        if not isinstance(result, Tensor) or result.shape != path.now.shape:
            raise _unknown(path, what)
        with torch.no_grad():
            gain, bias = _gain_and_bias(module, path.now)
            update = _frozen(path.output, result.view_as(path.output), gain, bias)
        if update is None:
            raise _unknown(path, f"{what}, which is no norm")
        if path.given is not None:  # and on to the sum
            path.now, path.norm, path.gain_and_bias = result, None, (gain, bias)
            return None
        self._path = None
        other = path.found(update, None)
        return None if other is None else module.forward(path.taken(other))

    def _left_by_sum(
        self, path: _Path, residual: ResidualSum, module: nn.Module, result: Any
    ) -> None:
        """A module has read the sum: a norm, or what shows that the sum itself goes on."""
        if path.normed is None:
            path.normed = _normed(residual, path, module, result)
            if path.normed is None:
                self._finish(path, residual)
                return
        path.norm = None  # now, since what was computed here is none of the model's

    def __call__(
        self, func: Any, args: tuple[Any, ...], given: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Looks at a function of torch that runs."""
        path = self._path
        if path is None or path.norm is not None or _following.get() is not self:
            return proceed(func, args, given)
        if not any(same_place(x, path.now) for x in (*args, *given.values())):
            return proceed(func, args, given)
        name = getattr(func, "__name__", str(func))
        if path.given is not None and name in SUMS and not path.inside and path.added is None:
            path.update = _update(path)
            path.added = path.given.by_example(path.now).clone()
        if path.added is not None:
            return self._with_others(path, name, partial(proceed, func, args, given), args, given)
        changes = in_place(func) or "out" in given
        if not changes:
            result = proceed(func, args, given)
            if not isinstance(result, Tensor):  # a shape, or the like
                return result
            if same_place(result, path.now) or (not path.inside and _follows(name, args, given)):
                before = path.now
                path.steps.append(lambda x: _with(func, args, given, before, x))
                path.now = result
                return result
        if path.inside:
            path.norm = path.inside[-1]
            return proceed(func, args, given) if changes else result
        if name not in SUMS:
            raise _unknown(path, f"{name!r}")
        update = _update(path)
        self._path = None
        other = path.found(update, None)
        if other is None:
            return proceed(func, args, given) if changes else result
        return proceed(func, *_replaced(args, given, path.now, path.taken(other)))

    def _with_others(
        self,
        path: _Path,
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
            path.norm = path.inside[-1]
            return result
        given, added = path.given, path.added
        assert given is not None
        assert added is not None
        # What is changed in place is not what it was.
        stream = others[0].clone() if joins and given.holds(others[0]) else None
        result = run()
        if not joins and (not isinstance(result, Tensor) or same_place(result, path.now)):
            return result
        if not joins or path.inside:
            raise _unknown(path, f"{name!r} after it was added to something else")
        path.now = result
        if stream is not None:
            x = given.by_example(stream)
            path.sum = ResidualSum(x, x + added)
            if not same_numbers(stream, given.own):
                self._finish(path, path.sum)
        return result


def _update(path: _Path) -> FrozenUpdate | None:
    """What an output has become on its way to a sum; None if it is as it was."""
    if same_place(path.now, path.output):
        return None
    ones = torch.ones_like(path.output[0, 0])
    gain, bias = path.gain_and_bias or (ones, 0 * ones)
    update = _frozen(path.output, path.now.view_as(path.output), gain, bias)
    if update is None:
        raise _unknown(path, "more than one factor")
    return update


def _normed(
    residual: ResidualSum, path: _Path, module: nn.Module, result: Any
) -> ResidualSum | None:
    """The sum with the module that has read it as its norm; None if that is none."""
    assert path.given is not None
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
