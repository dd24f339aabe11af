"""What a model makes of an attention output before it adds it to the residual stream.

Found by the data: the output is followed, through functions that leave its numbers alone or
multiply them by one number, to where it is used. If that is in a module which was given it, that
module is the norm that comes after attention (Gemma 2 and 3, OLMo 2), or a learned scale of each
feature (DINOv2); if it is a sum, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_cw.capture.calls import UnsupportedModelError
from captum_cw.capture.projections import in_place, same_place
from captum_cw.functional import FrozenUpdate

__all__ = ["ResidualUpdates"]

Found = Callable[[FrozenUpdate | None], Tensor | None]
"""Is told what becomes of an output; may give another output for the model to go on with."""

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
    """

    name: str
    output: Tensor
    found: Found
    now: Tensor
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    inside: list[nn.Module] = field(default_factory=list)
    norm: nn.Module | None = None

    def taken(self, output: Tensor) -> Tensor:
        """Another output, taken as far as this one is."""
        for step in self.steps:
            output = step(output)
        return output


class ResidualUpdates(TorchFunctionMode):
    """Follows attention outputs in this thread, while :meth:`watching` lasts.

    Args:
        roots: The model, or the modules of it that are known.
    """

    def __init__(self, roots: Collection[nn.Module]) -> None:
        super().__init__()
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
                with self:
                    yield
            finally:
                _following.reset(token)
                self._path = None

    def follow(self, name: str, output: Tensor, found: Found) -> None:
        """Tells ``found`` what becomes of the output of the attention layer ``name``."""
        self.check_arrived()
        self._path = _Path(name, output, found, output)

    def check_arrived(self) -> None:
        """Raises an UnsupportedModelError if an output that was followed went nowhere."""
        if self._path is not None:
            raise _unknown(self._path.name, "nothing that could be seen")

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
        self._path = None
        what = type(module).__name__
        if not isinstance(result, Tensor) or result.shape != path.now.shape:
            raise _unknown(path.name, what)
        with torch.no_grad():
            gain, bias = _gain_and_bias(module, path.now)
            update = _frozen(path.output, result.view_as(path.output), gain, bias)
        if update is None:
            raise _unknown(path.name, f"{what}, which is no norm")
        other = path.found(update)
        return None if other is None else module.forward(path.taken(other))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        path = self._path
        if path is None or path.norm is not None or _following.get() is not self:
            return func(*args, **given)
        if not any(same_place(x, path.now) for x in (*args, *given.values())):
            return func(*args, **given)
        name = getattr(func, "__name__", str(func))
        changes = in_place(func) or "out" in given
        if not changes:
            result = func(*args, **given)
            if not isinstance(result, Tensor):  # a shape, or the like
                return result
            if same_place(result, path.now) or (not path.inside and _follows(name, args, given)):
                before = path.now
                path.steps.append(lambda x: _with(func, args, given, before, x))
                path.now = result
                return result
        if path.inside:
            path.norm = path.inside[-1]
            return func(*args, **given) if changes else result
        if name not in SUMS:
            raise _unknown(path.name, f"{name!r}")
        self._path = None
        update = None
        if not same_place(path.now, path.output):
            ones = torch.ones_like(path.output[0, 0])
            update = _frozen(path.output, path.now.view_as(path.output), ones, 0 * ones)
            if update is None:
                raise _unknown(path.name, "more than one factor")
        other = path.found(update)
        if other is None:
            return func(*args, **given) if changes else result
        return _with(func, args, given, path.now, path.taken(other))


def _follows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function leaves the numbers alone, or multiplies all of them by one."""
    if name in COPIES:
        return True
    others = [x for x in (*args, *kwargs.values()) if isinstance(x, Number)]
    return name in PRODUCTS and len(others) == 1


def _with(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> Any:
    """The function with another tensor in the place of one."""

    def changed(x: Any) -> Any:
        return new.view(x.shape) if same_place(x, old) else x

    return func(*map(changed, args), **{name: changed(x) for name, x in kwargs.items()})


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
    tolerance = max(1e-4, 8 * torch.finfo(x.dtype).eps, 8 * torch.finfo(y.dtype).eps)
    x, y, gain = x.to(dtype), y.to(dtype) - bias.to(dtype), gain.to(dtype)
    for centred in (False, True):
        update = FrozenUpdate(gain, x.new_ones(x.shape[:-1]), centred)
        z = update.without_scale(x)
        scale = (y * z).sum(-1) / z.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
        wrong = (y - scale[..., None] * z).norm(dim=-1) > tolerance * y.norm(dim=-1)
        if not wrong.any():
            return FrozenUpdate(gain, scale, centred)
    return None


def _unknown(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The output of attention layer {name!r} goes into {what}, so what is added to the "
        "residual stream is not known: use space='attention'."
    )
