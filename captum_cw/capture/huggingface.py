"""Attention calls of Hugging Face models, seen under the model's own implementation.

A modeling file of transformers takes its attention kernel from a registry
(``ALL_ATTENTION_FUNCTIONS``) or, for the eager implementation, from functions of its own
(``eager_attention_forward``). While an observation lasts, both are wrapped in place and put
back afterwards. The name of the implementation does not change, since masks and, in a few
models, the attention pattern itself depend on it; the model's own kernel computes the output, so
what it computes is bit for bit what it computes unobserved.

Wrapping is shared by all observations of a process and counted; which observation hears of a call
is decided by the caller's context, so threads do not hear each other.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from captum_cw.capture.calls import AttentionCall, UnsupportedModelError

__all__ = ["attention_calls", "is_listening"]

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"

Listener = Callable[[AttentionCall], None]

_listener: ContextVar[Listener | None] = ContextVar("captum_cw_listener", default=None)
_lock = threading.Lock()
_wrapped: dict[tuple[int, str], _Wrapping] = {}


@contextmanager
def attention_calls(modules: Iterable[nn.Module], listener: Listener) -> Iterator[None]:
    """Tells ``listener`` of every attention call that ``modules`` make in this context.

    An observation within an observation hears its own calls only, and so does the outer one.
    """
    with ExitStack() as stack:
        for file in _modeling_files(modules):
            registry = getattr(file, REGISTRY)
            for name in list(registry):
                stack.enter_context(_wrapping(_Entry(registry, name)))
            for name in _eager_kernels(file):
                stack.enter_context(_wrapping(_Global(file, name)))
        token = _listener.set(listener)
        try:
            yield
        finally:
            _listener.reset(token)


def is_listening(listener: Listener) -> bool:
    """Whether attention calls made now, in this context, are told to ``listener``."""
    return _listener.get() == listener


def _modeling_files(modules: Iterable[nn.Module]) -> list[ModuleType]:
    """The Python modules that define ``modules`` and use the attention registry."""
    names = {cls.__module__ for module in modules for cls in type(module).__mro__}
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules.get(n), REGISTRY)]


def _eager_kernels(file: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(file).items()
        if name.endswith(EAGER) and callable(value) and not isinstance(value, type)
    ]


@dataclass(frozen=True)
class _Entry:
    """Where a registry keeps a kernel. Modeling files share one registry, as a rule."""

    holder: Any
    name: str
    eager = False

    def get(self) -> Callable[..., Any]:
        kernel: Callable[..., Any] = self.holder[self.name]
        return kernel

    def put(self, kernel: Callable[..., Any]) -> None:
        self.holder[self.name] = kernel

    def restore(self, kernel: Callable[..., Any]) -> None:
        del self.holder[self.name]
        # The entry may have been an override of this registry rather than a shared one.
        if self.holder.get(self.name) is not kernel:
            self.holder[self.name] = kernel


@dataclass(frozen=True)
class _Global:
    """Where a modeling file keeps its own eager kernel."""

    holder: ModuleType
    name: str
    eager = True

    def get(self) -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(self.holder, self.name)
        return kernel

    def put(self, kernel: Callable[..., Any]) -> None:
        setattr(self.holder, self.name, kernel)

    restore = put


@dataclass
class _Wrapping:
    """A kernel that is wrapped, and by how many observations."""

    kernel: Callable[..., Any]
    observations: int = 0


@contextmanager
def _wrapping(place: _Entry | _Global) -> Iterator[None]:
    """Keeps the kernel at a place wrapped; the last observation to leave puts it back."""
    key = id(place.holder), place.name
    with _lock:
        if key not in _wrapped:
            _wrapped[key] = _Wrapping(place.get())
            place.put(_Kernel(_wrapped[key].kernel, eager=place.eager))
        _wrapped[key].observations += 1
    try:
        yield
    finally:
        with _lock:
            _wrapped[key].observations -= 1
            if not _wrapped[key].observations:
                place.restore(_wrapped.pop(key).kernel)


class _Kernel:
    """An attention kernel that tells the listener what it was called with."""

    def __init__(self, kernel: Callable[..., Any], *, eager: bool = False) -> None:
        functools.update_wrapper(self, kernel)
        self.kernel, self.eager = kernel, eager

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        listener = _listener.get()
        # A kernel may hand over to another one: that is still one attention call.
        token = _listener.set(None)
        try:
            result = self.kernel(module, query, key, value, attention_mask, **kwargs)
        finally:
            _listener.reset(token)
        if listener is not None:
            output, weights = result[0], result[1] if len(result) > 1 else None
            listener(self._call(module, query, key, value, attention_mask, output, weights, kwargs))
        return result

    def _call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        output: Tensor,
        weights: Tensor | None,
        kwargs: dict[str, Any],
    ) -> AttentionCall:
        T = query.shape[2]
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise UnsupportedModelError(
                f"The attention implementation of {type(module).__name__} takes a mask of its own "
                f"kind ({type(mask).__name__}): call model.set_attn_implementation('sdpa') or "
                "('eager') first."
            )
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and not self.eager and mask is None and T > 1
        if causal and key.shape[2] > T:
            # Without a mask the first query sees the first key, whatever a static cache holds.
            key, value = key[:, :, :T], value[:, :, :T]
        if mask is not None and mask.shape[-1] > key.shape[2]:  # of a static cache
            mask = mask[..., : key.shape[2]]
        if weights is not None and weights.shape != (*query.shape[:3], key.shape[2]):
            weights = None
        return AttentionCall(
            module, query, key, value, mask, causal, kwargs.get("scaling"), output, weights,
            self._dense_kernel(module, T, kwargs),
        )  # fmt: skip

    def _dense_kernel(
        self, module: nn.Module, T: int, kwargs: dict[str, Any]
    ) -> Callable[[slice, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
        kernel = _find_eager(module)
        if kernel is None:
            return None

        def weights(rows: slice, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            def block(x: Any) -> Any:
                """Rows of what is given by query, such as a position bias."""
                by_query = isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == T
                return x[:, :, rows] if by_query else x

            given = {name: block(x) for name, x in kwargs.items()}
            result: Tensor = kernel(module, q, k, v, mask, **given)[1]
            return result

        return weights


def _find_eager(module: nn.Module) -> Callable[..., Any] | None:
    for cls in type(module).__mro__:
        kernel = getattr(sys.modules.get(cls.__module__), EAGER, None)
        if kernel is not None:
            return kernel.kernel if isinstance(kernel, _Kernel) else kernel
    return None
