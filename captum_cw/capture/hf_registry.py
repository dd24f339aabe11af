"""Attention calls of Hugging Face models, observed in the model's own attention kernel.

A modeling file of transformers takes its attention kernel from a registry
(``ALL_ATTENTION_FUNCTIONS``) or, for the eager implementation, from its own functions
(``eager_attention_forward``). Both are wrapped in place during an observation, and restored
afterwards. The name of the implementation does not change, since masks, and in a few models the
attention pattern, depend on it. The model's own kernel computes the output, so the output is bit
for bit the same as without an observation.

All observations of a process share one wrapper per kernel. The caller's context decides which
observation a call is reported to, so threads do not see each other's calls.

Values can be changed per query head before the kernel reads them. Kernels repeat shared keys and
values as often as the module says (``num_key_value_groups``). So if heads share values, this module
repeats them first, and passes the kernel a stand-in for the attention module that says one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import (
    AttentionCall,
    UnsupportedModelError,
    times,
    visible_keys,
)
from captum_cw.capture.listeners import taken_over
from captum_cw.capture.module_stack import running
from captum_cw.capture.patching import wrapping
from captum_cw.capture.rounding import product_rounding
from captum_cw.functional import expand_heads

__all__ = ["registered_kernels"]

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"


@contextmanager
def registered_kernels(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Observe, and allow changes in, the kernels that ``modules`` take from the registry."""
    with ExitStack() as stack:
        for file in _modeling_files(modules):
            registry = getattr(file, REGISTRY)
            for name in list(registry):
                stack.enter_context(wrapping(_Entry(registry, name), _Kernel))
            for name in _eager_kernels(file):
                stack.enter_context(wrapping(_Global(vars(file), name), _EagerKernel))
        yield


def _modeling_files(modules: Iterable[nn.Module]) -> list[ModuleType]:
    """Return the Python modules that define ``modules`` and use the attention registry."""
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
    """The place of a kernel in a registry. Most modeling files share one registry."""

    holder: Any
    name: str

    @property
    def key(self) -> tuple[int, str]:
        return id(self.holder), self.name

    def get(self) -> Callable[..., Any]:
        kernel: Callable[..., Any] = self.holder[self.name]
        return kernel

    def put(self, kernel: Callable[..., Any]) -> None:
        self.holder[self.name] = kernel

    def restore(self, kernel: Callable[..., Any]) -> None:
        del self.holder[self.name]
        # The entry may have been local to this registry, and not a shared one.
        if self.holder.get(self.name) is not kernel:
            self.holder[self.name] = kernel


class _Global(_Entry):
    """The place of an eager kernel among the globals of a modeling file."""

    def restore(self, kernel: Callable[..., Any]) -> None:
        self.put(kernel)  # the name must exist at all times, for other threads


class _Kernel:
    """An attention kernel that reports its calls to the listener."""

    eager = False
    """Whether a call without a mask sees every key, even if the module says it is causal."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        functools.update_wrapper(self, kernel)
        self.kernel = kernel

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        acting: Any = module
        if query.dim() != 4:
            raise ValueError(
                f"{type(module).__name__} has queries of shape {tuple(query.shape)}, but they must "
                "have shape (B, H, T, d_h): give the model token ids (B, T)."
            )
        with taken_over() as (listener, changes):
            for change in changes:
                factors = change(module, query.shape[1], value)
                if factors is not None:
                    acting, key, value = self._scale_values(
                        acting, query, key, value, attention_mask, kwargs, factors
                    )
            result = self.kernel(acting, query, key, value, attention_mask, **kwargs)
        if listener is not None:
            output, weights = result[0], result[1] if len(result) > 1 else None
            listener(
                self._describe_call(
                    module, acting, query, key, value, attention_mask, output, weights, kwargs
                )
            )
        return result

    def _describe_call(
        self,
        module: nn.Module,
        acting: Any,
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
                f"The attention implementation of {type(module).__name__} uses a mask of type "
                f"{type(mask).__name__}, which is not supported: call "
                "model.set_attn_implementation('sdpa') or ('eager') first."
            )
        given = key, value, mask

        def scaled(factors: Tensor) -> Tensor:
            key, value, mask = given
            standing, key, value = self._scale_values(
                acting, query, key, value, mask, kwargs, factors
            )
            result: Tensor = self.kernel(standing, query, key, value, mask, **kwargs)[0]
            return result

        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and not self.eager and mask is None and T > 1
        call = AttentionCall(
            module=module,
            running=running(),
            query=query,
            key=key,
            value=value,
            mask=mask,
            causal=causal,
            scaling=kwargs.get("scaling"),
            returned=output,
            by_token=lambda y: y,
            weights=weights,
            dense_kernel=self._dense_kernel(module, acting, T, kwargs),
            scaled=scaled,
        )
        used = _used_keys(call) if call.kind == "self" else call.S
        if mask is not None and mask.shape[-1] > used:
            mask = mask[..., :used]  # else the same object, which layers share
        call = replace(call, key=key[:, :, :used], value=value[:, :, :used], mask=mask)
        fits = weights is not None and weights.shape == (call.B, call.H, call.T, call.S)
        return call if fits else replace(call, weights=None)

    def _scale_values(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
        factors: Tensor,
    ) -> tuple[Any, Tensor, Tensor]:
        """Return the arguments of the kernel for values times factors per query head."""
        H = query.shape[1]
        if value.shape[1] != H:
            repeated = _Ungrouped(module), expand_heads(key, H), expand_heads(value, H)
            if _checked.get(module) is not self.kernel:
                plain = self.kernel(module, query, key, value, mask, **kwargs)[0]
                again = self.kernel(repeated[0], query, *repeated[1:], mask, **kwargs)[0]
                if not _close(plain, again):
                    raise UnsupportedModelError(
                        f"The attention kernel of {type(module).__name__} returns other head "
                        "outputs if shared keys and values are repeated for each head, so values "
                        "cannot be changed per head."
                    )
                _checked[module] = self.kernel
            module, key, value = repeated
        return module, key, times(value, factors)

    def _dense_kernel(
        self, module: nn.Module, acting: Any, T: int, kwargs: dict[str, Any]
    ) -> Callable[[slice, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
        kernel = _find_eager(module)
        if kernel is None:
            return None

        def weights(rows: slice, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            def block(x: Any) -> Any:
                """Select the rows of an argument by query, such as a position bias."""
                by_query = isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == T
                return x[:, :, rows] if by_query else x

            given = {name: block(x) for name, x in kwargs.items()}
            if "output_attentions" in given:  # some kernels return weights only if it is True
                given["output_attentions"] = True
            result: Tensor = kernel(acting, q, k, v, mask, **given)[1]
            return result

        return weights


def _used_keys(call: AttentionCall) -> int:
    """Return the number of keys, without the empty places of a static cache."""
    if call.causal:
        # Without a mask the first query sees only the first key, also with a cache.
        return min(call.S, call.T)
    if call.mask is None or min(call.S, call.mask.shape[-1]) <= call.T:
        return call.S
    seen = visible_keys(call.mask).flatten(0, -2).any(0).nonzero()
    return min(call.S, max(call.T, int(seen.max()) + 1 if len(seen) else 0))


class _EagerKernel(_Kernel):
    """The eager kernel of a modeling file."""

    eager = True


#: The kernels that were checked to accept repeated keys and values, by module.
_checked: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


class _Ungrouped:
    """A stand-in for an attention module whose keys and values have been repeated."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two head outputs are equal up to rounding. Padded queries may have NaN."""
    scale = float(a.detach().nan_to_num().abs().max())
    tolerance = max(1e-5, 4 * product_rounding(a)) * scale
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


def _find_eager(module: nn.Module) -> Callable[..., Any] | None:
    for cls in type(module).__mro__:
        kernel = getattr(sys.modules.get(cls.__module__), EAGER, None)
        if kernel is not None:
            return kernel.kernel if isinstance(kernel, _Kernel) else kernel
    return None
