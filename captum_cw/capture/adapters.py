"""Adapters: equivalent implementations of modules whose own attention cannot be observed.

An adapter computes the same as a module's ``forward``, but with
:func:`torch.nn.functional.scaled_dot_product_attention` and a linear layer whose input is the head
outputs. During an observation it runs in addition to ``forward``. If values are changed, it
replaces ``forward``. If the outputs of the two differ, an error is raised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_cw.capture.attention_call import UnsupportedModelError
from captum_cw.capture.function_call import fixed, varies
from captum_cw.capture.linear_gradients import with_gradient_of
from captum_cw.capture.listeners import count_replacements, is_active, suspended
from captum_cw.capture.patching import wrapped_method
from captum_cw.capture.rounding import are_near

__all__ = ["adapted", "register_adapter"]

Adapter = TypeVar("Adapter", bound=Callable[..., Any])

_adapters: dict[type[nn.Module], Callable[..., Any]] = {}


def register_adapter(kind: type[nn.Module]) -> Callable[[Adapter], Adapter]:
    """Register an adapter: a function that replaces ``forward`` in the modules of a class.

    An adapter is needed for attention in a custom kernel, or in an order of operations that is not
    recognised. It is called as ``adapter(module, *args, **kwargs)`` with the arguments of
    ``module.forward``, and must return the same output. Both run, and their outputs are compared.
    The model continues with the output of its own ``forward``, unless values are changed. The last
    entries of a tuple may be None if they do not depend on the values, as attention weights.

    Args:
        kind: The class of the attention module. The adapter does not apply to subclasses that
            define their own ``forward``.

    Example:
        >>> import torch.nn.functional as F
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        ...     def forward(self, x):  # a loop over heads is not recognised
        ...         q, k, v = (z.split(4, -1) for z in self.qkv(x).chunk(3, -1))
        ...         heads = [((a @ b.mT / 2).softmax(-1) @ c) for a, b, c in zip(q, k, v)]
        ...         return self.out(torch.cat(heads, -1))
        >>> @register_adapter(Attention)
        ... def adapter(module, x):
        ...     qkv = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        ...     heads = F.scaled_dot_product_attention(*qkv)
        ...     return module.out(heads.transpose(1, 2).flatten(2))
        >>> from captum_cw import ContributionWeights
        >>> ContributionWeights(Attention()).attribute(torch.randn(1, 5, 8))[0].shape
        torch.Size([1, 2, 5, 5])
    """

    def register(adapter: Adapter) -> Adapter:
        _adapters[kind] = adapter
        return adapter

    return register


@contextmanager
def adapted(modules: Collection[nn.Module]) -> Iterator[None]:
    """Wrap the modules that have an adapter, so that it runs while attention is observed."""
    with ExitStack() as stack:
        for module in modules:
            adapter = _find_adapter(type(module))
            if adapter is not None:
                wrap = functools.partial(_adapted_forward, module, adapter)
                stack.enter_context(wrapped_method(module, "forward", "adapter", wrap))
        yield


def _find_adapter(kind: type[nn.Module]) -> Callable[..., Any] | None:
    known = next((k for k in kind.__mro__ if k in _adapters), None)
    return _adapters[known] if known is not None and known.forward is kind.forward else None


def _adapted_forward(
    module: nn.Module, adapter: Callable[..., Any], forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a ``forward`` method that also runs its adapter while attention is observed."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_active():
            return forward(*args, **kwargs)
        before = count_replacements()
        adapted = adapter(module, *args, **kwargs)
        with suspended():
            # Only the functions of the adapter are known to a pass that takes gradients.
            own = forward(*fixed(args), **fixed(kwargs))
            if count_replacements() == before:
                # The model continues with its own output, which is bit for bit unchanged.
                _check_same(module, own, adapted)
                return _with_gradients_of(adapted, own)
            _check_same(module, own, adapter(module, *args, **kwargs))
        if not isinstance(adapted, tuple):
            return adapted
        return tuple(b if a is None else a for a, b in zip(adapted, own, strict=True))

    return run


def _check_same(module: nn.Module, own: Any, adapted: Any) -> None:
    """Check that an adapter returns what the module's own ``forward`` returns."""
    for a, b in zip(_tensors(own), _tensors(adapted), strict=False):
        if not are_near(a, b):
            raise UnsupportedModelError(
                f"The adapter for {type(module).__name__} does not return what the module's "
                "forward returns, so results would be wrong: correct the function that was "
                "registered with register_adapter."
            )


def _with_gradients_of(adapted: Any, own: Any) -> Any:
    if isinstance(own, tuple):
        return tuple(_with_gradients_of(x, y) for x, y in zip(adapted, own, strict=True))
    if varies(adapted):
        return with_gradient_of(adapted, own.detach)
    return own


def _tensors(result: Any) -> list[Tensor]:
    items = result if isinstance(result, (list, tuple)) else (result,)
    return [x for x in items if isinstance(x, Tensor) and x.is_floating_point()]


@register_adapter(nn.MultiheadAttention)
def _run_multi_head_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,  # the weights do not depend on the values
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # only a hint: the mask says the same
) -> tuple[Tensor, None]:
    """Run ``torch.nn.MultiheadAttention``, whose fused kernel does not expose its attention."""
    if module.bias_k is not None or module.add_zero_attn:
        raise UnsupportedModelError(
            "MultiheadAttention with add_bias_kv or add_zero_attn is not supported: it has a key "
            "that is not a token."
        )
    batched, H = query.dim() == 3, module.num_heads
    if not batched:
        query, key, value = (x[None] for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))

    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).view(*x.shape[:2], H, -1).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = None
    if attn_mask is not None:
        mask = _to_additive(attn_mask, q)
        mask = mask[None, None] if mask.dim() == 2 else mask.view(-1, H, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _to_additive(key_padding_mask, q)[:, None, None]
        mask = padding if mask is None else mask + padding
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=module.dropout if module.training else 0.0
    )
    out = F.linear(y.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)

    if not batched:
        return out[0], None
    return out if module.batch_first else out.transpose(0, 1), None


def _to_additive(mask: Tensor, like: Tensor) -> Tensor:
    """Convert a mask of MultiheadAttention (True hides a key) to an additive mask."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
