"""Attention that a model computes by itself, observed in the functions that PyTorch runs.

A model either calls :func:`torch.nn.functional.scaled_dot_product_attention`, or takes a softmax
over keys and multiplies the result by values. The attention module is the innermost module that is
running. Its queries must be the tokens whose states it was given. Anything else, such as one token
that attends to its own states in all layers, is not attention between tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import AttentionCall, UnsupportedModelError, times
from captum_cw.capture.caches import is_cache
from captum_cw.capture.dispatch import Proceed
from captum_cw.capture.listeners import ValueChange, is_active, replaced, suspended
from captum_cw.capture.module_stack import innermost, running
from captum_cw.capture.positions import LOOKUPS, check_positions
from captum_cw.weights import expand_heads

__all__ = ["DirectAttention"]

#: A key is hidden if its logit is this far below the largest logit of the query. Models hide keys
#: by -1e4 or less. A position bias that grows with the distance (ALiBi) does not hide keys.
FAR_BELOW = 9e3

#: The number of innermost modules among which the attention module is searched, since the product
#: may be computed in a part of it.
DEPTH = 2

#: The functions that multiply weights by values, with the equation for operands of the same rank.
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}
EQUATIONS = {3: "bts,bsd->btd", 4: "bhts,bhsd->bhtd"}


#: The functions that take a softmax.
SOFTMAXES = {"softmax", "softmax_"}

#: Functions that compute attention, or look positions up.
_WATCHED = {
    torch.nn.functional.multi_head_attention_forward,
    torch.nn.functional.scaled_dot_product_attention,
    *LOOKUPS,
}


def _is_watched(func: Any) -> bool:
    """Whether a function may begin attention or look positions up."""
    return func in _WATCHED or getattr(func, "__name__", "") in SOFTMAXES


@dataclass
class _Softmax:
    """A softmax whose result may later be multiplied by values.

    Args:
        module: The innermost module that was running.
        logits: The input, ``(..., T, S)``.
        of_tokens: Whether the rows are the tokens that the module was given.
        results: The result, and what was computed from it, by id. It keeps the tensors, so that
            their ids are not used again.
    """

    module: nn.Module | None
    logits: Tensor
    of_tokens: bool
    results: dict[int, Tensor]


@dataclass(frozen=True)
class _Product:
    """The product of weights and values.

    Args:
        module: The attention module.
        weights: ``(B, H, T, S)``.
        value: ``(B, H|1, S, d_h)``.
        as_operand: Arranges values of that shape as the operand of the product.
        by_token: Arranges a tensor of the result's shape as ``(B, T, H, d_h)``.
    """

    module: nn.Module
    weights: Tensor
    value: Tensor
    as_operand: Callable[[Tensor], Tensor]
    by_token: Callable[[Tensor], Tensor]


class DirectAttention:
    """Observes, and changes, attention in this thread outside of registered kernels."""

    def __init__(self) -> None:
        self._softmax: _Softmax | None = None
        self._missed: dict[nn.Module, None] = {}
        # The module that last normalised queries or keys over another dimension, as linear
        # attention does.
        self._linear_attention: nn.Module | None = None

    def begin(self) -> None:
        """Forget what was missed before."""
        self._softmax, self._linear_attention = None, None
        self._missed.clear()

    def missed(self) -> list[nn.Module]:
        """Return the modules with something like attention that could not be observed.

        It may be attention within windows or chunks, or between other tokens than those that the
        module was given.
        """
        self._drop_softmax()
        return list(self._missed)

    def _miss(self, module: nn.Module | None) -> None:
        if module is not None:
            self._missed[module] = None

    def _drop_softmax(self) -> None:
        softmax, self._softmax = self._softmax, None
        if softmax is not None:
            *_, T, S = softmax.logits.shape
            if softmax.logits.dim() > 3 or (T == S and softmax.of_tokens):
                self._miss(softmax.module)

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Run a torch function, and observe it if it is a part of attention."""
        if self._softmax is None and not _is_watched(func):
            return proceed(func, args, kwargs)
        check_positions(func, args, kwargs)
        if not is_active():
            return proceed(func, args, kwargs)
        if func is torch.nn.functional.multi_head_attention_forward:
            self._miss(innermost())  # its attention cannot be observed
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._run_fused(proceed, *args, **kwargs)
        if getattr(func, "__name__", "") in SOFTMAXES:
            return self._run_softmax(func, args, kwargs, proceed)
        if self._softmax is not None and any(id(x) in self._softmax.results for x in _flat(args)):
            return self._follow_softmax(self._softmax, func, args, kwargs, proceed)
        return proceed(func, args, kwargs)

    def _run_fused(
        self,
        proceed: Proceed,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        """Run scaled_dot_product_attention."""
        func = torch.nn.functional.scaled_dot_product_attention
        found = _attention_module(query.shape[:-1]) if query.dim() == 4 else None
        if found is None:
            self._miss(innermost())
            return proceed(func, (query, key, value, attn_mask, dropout_p, is_causal), options)
        module, B, H = found[0], query.shape[0], max(query.shape[1], value.shape[1])
        if value.shape[0] != B:  # all examples share them
            key, value = (x.expand(B, -1, -1, -1) for x in (key, value))

        def arguments(value: Tensor) -> tuple[Any, ...]:
            repeated = key if key.shape[1] == value.shape[1] else expand_heads(key, H)
            return query, repeated, value, attn_mask, dropout_p, is_causal

        with suspended() as (listener, changes):
            value = _changed(changes, module, H, value)
            result = proceed(func, arguments(value), options)
        if listener is None:
            return result
        _check_fused(module, query.shape[2], key.shape[2], dropout_p, is_causal)
        mask = attn_mask
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        call = AttentionCall(
            module=module,
            query=query,
            key=key,
            value=value,
            mask=mask,
            causal=is_causal and query.shape[2] > 1,
            scaling=options.get("scale"),
            returned=result,
            by_token=lambda y: y.transpose(1, 2),
            scaled=lambda factors: func(
                *arguments(times(expand_heads(value, H), factors)), **options
            ),
        )
        listener(call)
        return result

    def _run_softmax(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        result = proceed(func, args, kwargs)
        logits = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(logits, Tensor) or logits.dim() < 3:
            return result
        module = innermost()
        if dim in (-1, logits.dim() - 1):
            self._drop_softmax()
            of_tokens = _attention_module(logits.shape[:-1]) is not None
            self._softmax = _Softmax(module, logits, of_tokens, {id(result): result})
        elif module is not None:
            self._linear_attention = module
        return result

    def _follow_softmax(
        self,
        softmax: _Softmax,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        proceed: Proceed,
    ) -> Any:
        multiplies = getattr(func, "__name__", "") in PRODUCTS
        product = _product(args, softmax) if multiplies else None
        if product is None or product.module is self._linear_attention:
            result = proceed(func, args, kwargs)
            if isinstance(result, Tensor) and result.numel() == softmax.logits.numel():
                softmax.results[id(result)] = result
            return result
        self._softmax = None
        module, H = product.module, product.weights.shape[1]

        def arguments(value: Tensor) -> tuple[Any, ...]:
            operand = product.as_operand(value)
            return tuple(
                operand if isinstance(x, Tensor) and id(x) not in softmax.results else x
                for x in _flat(args)
            )

        with suspended() as (listener, changes):
            value = _changed(changes, module, H, product.value)
            given = args if value is product.value else arguments(value)
            result = proceed(func, given, kwargs)
        if listener is None:
            return result
        call = AttentionCall(
            module=module,
            value=value,
            mask=_visible(softmax.logits.view_as(product.weights), product.weights),
            weights=product.weights,
            returned=result,
            by_token=product.by_token,
            scaled=lambda factors: func(
                *arguments(times(expand_heads(value, H), factors)), **kwargs
            ),
        )
        listener(call)
        return result


def _attention_module(queries: Sequence[int]) -> tuple[nn.Module, int] | None:
    """Return the attention module and ``B``; None if this is not attention between tokens.

    Args:
        queries: The shape ``(B, H, T)`` or ``(B * H, T)``.
    """
    if len(queries) not in (2, 3):
        return None
    T = queries[-1]
    for run in running()[: -1 - DEPTH : -1]:
        for x in run.tensors():
            if x.dim() not in (2, 3) or not x.is_floating_point():
                continue
            # Some modules take tokens before examples, or one example without a batch dimension.
            first, second = x.shape[:2] if x.dim() == 3 else (1, x.shape[0])
            for B, length in ((first, second), (second, first)):
                if length == T and (queries[0] == B if len(queries) == 3 else not queries[0] % B):
                    return run.module, B
    return None


def _are_tokens(S: int) -> bool:
    """Whether ``S`` is the number of tokens that a module was given, or may be that of a cache."""
    for run in running()[: -1 - DEPTH : -1]:
        if any(x.dim() in (2, 3) and S in x.shape[:2] for x in run.tensors()):
            return True
        if any(is_cache(x) for x in (*run.args, *run.kwargs.values())):
            return True
        # Older code passes each layer a pair of keys and values.
        if any("past" in name and x is not None for name, x in run.kwargs.items()):
            return True
    return False


def _flat(args: Sequence[Any]) -> list[Any]:
    return [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]


def _changed(
    changes: Sequence[ValueChange], module: nn.Module, heads: int, value: Tensor
) -> Tensor:
    """Apply changes to values; the result is ``value`` itself if nothing changes."""
    for change in changes:
        factors = change(module, heads, value)
        if factors is not None:
            value = replaced(times(expand_heads(value, heads), factors))
    return value


def _check_fused(module: nn.Module, T: int, S: int, dropout_p: float, is_causal: bool) -> None:
    """Check that the weights of scaled_dot_product_attention can be recomputed.

    Raises:
        UnsupportedModelError: If weights are dropped, or the visible keys are unknown.
    """
    if dropout_p:
        raise UnsupportedModelError(
            f"{type(module).__name__} drops attention weights in evaluation mode: set dropout_p of "
            "scaled_dot_product_attention to 0 if the module is not in training."
        )
    if is_causal and S != T:
        raise UnsupportedModelError(
            f"{type(module).__name__} has {S} keys for {T} queries and is_causal=True, so it is "
            "unknown which keys its queries see: run it without a cache."
        )


def _visible(logits: Tensor, weights: Tensor) -> Tensor | None:
    """Return which keys each query sees, by logits to which a mask was added; None if all."""
    logits = logits.detach()
    lowest = logits.amax(-1, keepdim=True) - FAR_BELOW
    visible = (weights != 0) | (logits > lowest)
    return None if visible.all() else visible


def _product(args: tuple[Any, ...], softmax: _Softmax) -> _Product | None:
    """Read operands as weights and values; None if they are not.

    Args:
        args: The arguments of a function in :data:`PRODUCTS`.
        softmax: The softmax that gave the weights.
    """
    found = _attention_module(softmax.logits.shape[:-1])
    equation = args[0] if args and isinstance(args[0], str) else None
    operands = _flat(args[1:] if equation else args)
    if found is None or len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    module, B = found
    weights, value = operands
    if equation is None:
        equation = EQUATIONS.get(value.dim(), "")
    inputs, _, out = equation.replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    if id(value) in softmax.results:
        weights, value, a, b = value, weights, b, a
    if id(weights) not in softmax.results or len(a) not in (3, 4) or not (a + b).isalpha():
        return None
    *batch, t, s = list(a)
    size = "".join(set(b) - set(a))
    ours, theirs = [*batch, s, size], [*batch, t, size]
    if len(size) != 1 or sorted(b) != sorted(ours) or sorted(out) != sorted(theirs):
        return None
    if weights.dim() != len(a) or not _are_tokens(weights.shape[-1]):
        return None
    arranged = value.permute([b.index(x) for x in ours])
    if arranged.shape[0] != weights.shape[0] or arranged.shape[-3] not in (1, weights.shape[-3]):
        return None  # the examples share them

    def unfolded(x: Tensor) -> Tensor:
        """Separate examples and heads."""
        return x if len(batch) == 2 else x.reshape(B, -1, *x.shape[1:])

    def as_operand(v: Tensor) -> Tensor:
        v = v if len(batch) == 2 else v.flatten(0, 1)
        return v.permute([ours.index(x) for x in b])

    return _Product(
        module,
        unfolded(weights),
        unfolded(arranged),
        as_operand,
        lambda y: unfolded(y.permute([out.index(x) for x in theirs])).transpose(1, 2),
    )
