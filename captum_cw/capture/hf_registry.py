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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import (
    AttentionCall,
    DenseKernel,
    UnsupportedModelError,
    find_weights,
    query_mask,
    times,
    visible_keys,
)
from captum_cw.capture.dispatch import Proceed, following
from captum_cw.capture.function_call import fixed, name_of
from captum_cw.capture.kernel_masks import KernelMask, Reading, is_block_mask, reads_pages
from captum_cw.capture.listeners import suspended
from captum_cw.capture.patching import set_to, shared
from captum_cw.capture.rounding import are_near
from captum_cw.functional import expand_heads

__all__ = ["kernels_in_functions", "registered_kernels"]

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"

#: The functions that compute attention, whose gradients are understood.
ATTENTION = {"softmax", "scaled_dot_product_attention"}

_in_functions: ContextVar[bool] = ContextVar("captum_cw_in_functions", default=False)


@contextmanager
def registered_kernels(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Observe, and allow changes in, the kernels that ``modules`` take from the registry."""
    with ExitStack() as stack:
        for file in _modeling_files(modules):
            registry = getattr(file, REGISTRY)
            for name in list(registry):
                stack.enter_context(shared((id(registry), name), _wrapped_entry(registry, name)))
            for name, kernel in list(vars(file).items()):
                if name.endswith(EAGER) and callable(kernel) and not isinstance(kernel, type):
                    stack.enter_context(shared((id(file), name), _wrapped_eager_kernel(file, name)))
        yield


def _modeling_files(modules: Iterable[nn.Module]) -> list[ModuleType]:
    """Return the Python modules that define ``modules`` and use the attention registry."""
    names = {cls.__module__ for module in modules for cls in type(module).__mro__}
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules.get(n), REGISTRY)]


@contextmanager
def _wrapped_entry(registry: Any, name: str) -> Iterator[None]:
    """Wrap a kernel in a registry. Most modeling files share one registry."""
    kernel = registry[name]
    registry[name] = _Kernel(kernel)
    yield
    del registry[name]
    # The entry may have been local to this registry, and not a shared one.
    if registry.get(name) is not kernel:
        registry[name] = kernel


@contextmanager
def _wrapped_eager_kernel(file: ModuleType, name: str) -> Iterator[None]:
    """Wrap an eager kernel among the globals of a modeling file."""
    kernel = getattr(file, name)
    setattr(file, name, _Kernel(kernel, eager=True))
    yield
    setattr(file, name, kernel)  # never deleted, since other threads may call it


@dataclass(frozen=True)
class _Arguments:
    """The arguments of an attention kernel.

    Args:
        module: The attention module, or a stand-in for it.
        query, key, value: ``(B, H, T, d_k)``, ``(B, H_kv, S, d_k)`` and ``(B, H_kv, S, d_h)``.
        mask: The attention mask.
        options: The other arguments.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


class _Kernel:
    """An attention kernel that reports its calls to the listener.

    Args:
        kernel: The kernel.
        eager: Whether it is an eager kernel of a modeling file. Without a mask, such a kernel shows
            every key, even if the module is causal.
    """

    def __init__(self, kernel: Callable[..., Any], eager: bool = False) -> None:
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
        if query.dim() != 4:
            raise ValueError(
                f"{type(module).__name__} has queries of shape {tuple(query.shape)}, but they must "
                "have shape (B, H, T, d_h): give the model token ids (B, T)."
            )
        given = _Arguments(module, query, key, value, attention_mask, kwargs)
        with suspended() as (listener, changes):
            if (changes or listener is not None) and reads_pages(kwargs):
                raise UnsupportedModelError(
                    f"The attention kernel of {type(module).__name__} reads keys and values from "
                    "pages of a cache, so it cannot be observed: call the model or its generate "
                    "without continuous batching."
                )
            for change in changes:
                factors = change(module, query.shape[1], given.value)
                if factors is not None:
                    given = self._scale_values(given, factors)
            if listener is None:
                return self._run(given)
            if _in_functions.get():
                result, call = self._run_in_functions(module, given)
            else:
                result = self._run(given)
                call = self._describe_call(module, given, result)
        listener(call)
        return result

    def _run(self, given: _Arguments) -> Any:
        return self.kernel(
            given.module, given.query, given.key, given.value, given.mask, **given.options
        )

    def _run_followed(self, given: _Arguments) -> Any:
        """Run the kernel; None if it does not compute attention by torch functions."""
        names: set[str] = set()

        def follow(func: Any, args: Any, kwargs: Any, proceed: Proceed) -> Any:
            names.add(name_of(func))
            return proceed(func, args, kwargs)

        try:
            with following(follow):
                result = self._run(given)
        except NotImplementedError:  # it does not have a gradient on this device
            return None
        return result if names & ATTENTION else None

    def _run_in_functions(self, module: nn.Module, given: _Arguments) -> tuple[Any, AttentionCall]:
        """Run the kernel if it computes attention by torch functions, else the eager kernel.

        Raises:
            UnsupportedModelError: If the two kernels return other head outputs.
        """
        eager = _find_eager(module)
        result = None
        if eager is None:
            result = self._run(given)
        elif not is_block_mask(given.mask):
            result = self._run_followed(given)
        if result is not None or eager is None:
            return result, self._describe_call(module, given, result)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            without = replace(
                given, query=fixed(given.query), key=fixed(given.key), value=fixed(given.value)
            )
            own = self._run(without)
            call = self._describe_call(module, without, own)
            mask = query_mask(call, None)
            seen = mask.block(slice(0, mask.T), call.value.device)
            bias = _additive(call.mask, seen, given.query.dtype)
        key, value = given.key[:, :, : call.S], given.value[:, :, : call.S]
        heads, weights = eager(given.module, given.query, key, value, bias, **given.options)
        if mask.real is not None:  # kernels return different numbers for padding
            heads = torch.where(mask.real[:, :, None, None], heads, call.head_output)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            if not are_near(heads, call.head_output):
                raise UnsupportedModelError(
                    f"The attention kernel of {type(module).__name__} hides its functions from "
                    "autograd, and the model's eager kernel returns other head outputs: call "
                    "model.set_attn_implementation('sdpa') or ('eager') first."
                )
        call = replace(
            call, query=given.query, key=key, value=value, returned=heads, weights=weights
        )
        return (heads, weights), call

    def _describe_call(self, module: nn.Module, given: _Arguments, result: Any) -> AttentionCall:
        B, T, S = given.query.shape[0], given.query.shape[2], given.value.shape[2]
        causal = given.options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and not self.eager
        mask = KernelMask(given.mask, causal, B, T, S, given.query.device, given.options)
        if not mask.is_known:
            raise UnsupportedModelError(
                f"The attention implementation of {type(module).__name__} uses a mask of type "
                f"{type(given.mask).__name__}, which is not supported: call "
                "model.set_attn_implementation('sdpa') or ('eager') first."
            )
        calls = (self._read(module, given, result, reading) for reading in mask.readings())
        call = next(calls)
        others = list(calls)
        return next(filter(_is_reproduced, (call, *others)), call) if others else call

    def _read(
        self, module: nn.Module, given: _Arguments, result: Any, reading: Reading
    ) -> AttentionCall:
        """Describe a call whose mask has been read."""
        H = given.query.shape[1]
        mask, causal = reading
        call = AttentionCall(
            module=module,
            query=given.query,
            key=given.key,
            value=given.value,
            mask=mask,
            causal=causal,
            scaling=given.options.get("scaling"),
            returned=result[0],
            by_token=lambda y: y if y.dim() == 4 else y.reshape(*y.shape[:2], H, -1),
            dense_kernel=_dense_kernel(module, given),
            registered=True,
            scaled=lambda factors: self._run(self._scale_values(given, factors))[0],
        )
        used = _used_keys(call) if call.kind == "self" else call.S
        if mask is not None and mask.shape[-1] > used:
            mask = mask[..., :used]  # otherwise it stays the same object, which layers share
        weights = result[1] if len(result) > 1 else None
        if weights is not None and weights.shape != (call.B, call.H, call.T, used):
            weights = None
        if used == call.S and mask is call.mask and weights is None:
            return call
        key, value = given.key[:, :, :used], given.value[:, :, :used]
        return replace(call, key=key, value=value, mask=mask, weights=weights)

    def _scale_values(self, given: _Arguments, factors: Tensor) -> _Arguments:
        """Multiply values by the factors of each query head."""
        module, H = given.module, given.query.shape[1]
        if given.value.shape[1] != H:
            key, value = expand_heads(given.key, H), expand_heads(given.value, H)
            repeated = replace(given, module=_Ungrouped(module), key=key, value=value)
            if _checked.get(module) is not self.kernel:
                if not are_near(self._run(given)[0], self._run(repeated)[0]):
                    raise UnsupportedModelError(
                        f"The attention kernel of {type(module).__name__} returns other head "
                        "outputs if shared keys and values are repeated for each head, so values "
                        "cannot be changed per head."
                    )
                _checked[module] = self.kernel
            given = repeated
        return replace(given, value=times(given.value, factors))


def kernels_in_functions() -> AbstractContextManager[None]:
    """Compute the observed attention of this context by torch functions, whose gradients are known.

    If a kernel hides them, such as one that is compiled, the model's eager kernel runs instead.
    """
    return set_to(_in_functions, True)


def _is_reproduced(call: AttentionCall) -> bool:
    """Whether weights that obey the mask of a call give its head outputs."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        parts = {"value", "returned", "query", "key", "mask", "weights"}
        call = replace(call, **{name: fixed(getattr(call, name)) for name in parts})
        try:
            find_weights(call, query_mask(call, None), type(call.module).__name__)
        except UnsupportedModelError:
            return False
    return True


def _additive(mask: Tensor | None, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to logits, from the mask of a call or what its queries see."""
    if mask is not None and mask.dtype != torch.bool:
        return mask
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)


def _dense_kernel(module: nn.Module, given: _Arguments) -> DenseKernel | None:
    """Return the eager kernel of a module's file, with the options of a call."""
    kernel = _find_eager(module)
    if kernel is None:
        return None
    T = given.query.shape[2]

    def weights(rows: slice, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        def block(x: Any) -> Any:
            """Select the rows of an argument by query, such as a position bias."""
            by_query = isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == T
            return x[:, :, rows] if by_query else x

        options = {name: block(x) for name, x in given.options.items()}
        if "output_attentions" in options:  # some kernels return weights only if it is True
            options["output_attentions"] = True
        result: Tensor = kernel(given.module, q, k, v, mask, **options)[1]
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


#: The kernels that were checked to accept repeated keys and values, by module.
_checked: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


class _Ungrouped:
    """A stand-in for an attention module whose keys and values have been repeated."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _find_eager(module: nn.Module) -> Callable[..., Any] | None:
    for cls in type(module).__mro__:
        kernel = getattr(sys.modules.get(cls.__module__), EAGER, None)
        if kernel is not None:
            return kernel.kernel if isinstance(kernel, _Kernel) else kernel
    return None
