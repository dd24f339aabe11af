"""Attention that a model computes by itself, seen in the functions that PyTorch runs.

Either it calls :func:`torch.nn.functional.scaled_dot_product_attention`, or it takes a softmax
over keys and multiplies values by what becomes of it. The attention module is the innermost one
that is running, and its queries are the tokens whose states it was given: what attends to anything
else, such as the states of one token in all layers, is no attention between tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.capture.attention_call import AttentionCall, UnsupportedModelError, times
from captum_cw.capture.caches import is_cache
from captum_cw.capture.dispatch import Proceed
from captum_cw.capture.listeners import ValueChange, alter, is_heard, taken_over
from captum_cw.capture.module_stack import running
from captum_cw.capture.positions import check_positions
from captum_cw.functional import expand_heads

__all__ = ["DirectAttention"]

#: A logit this far below the largest of its query is that of a hidden key: models write -1e4 and
#: less, and a position bias, which hides nothing, falls with the distance (ALiBi).
FAR_BELOW = 9e3

#: How deep in an attention module the product may stand.
PARTS = 2

#: Products of weights and values.
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """The arguments of scaled_dot_product_attention, by name."""
    return locals()


@dataclass
class _Probabilities:
    """A softmax on its way to the values.

    Args:
        module: What was running.
        logits: What it was taken of, ``(..., T, S)``.
        of_tokens: Whether its rows are the tokens that the module was given.
        known: What became of it so far, by id, so that the ids stay their own.
    """

    module: nn.Module | None
    logits: Tensor
    of_tokens: bool
    known: dict[int, Tensor]


@dataclass(frozen=True)
class _Product:
    """``weights @ value``, with the operands and the result in our order.

    Args:
        module: What computes it.
        weights: ``(B, H, T, S)``.
        value: ``(B, H|1, S, d_h)``.
        given: Puts values in our order back into that of the operand.
        by_token: Puts the result, or something of its shape, into ``(B, T, H, d_h)``.
    """

    module: nn.Module
    weights: Tensor
    value: Tensor
    given: Callable[[Tensor], Tensor]
    by_token: Callable[[Tensor], Tensor]


class DirectAttention:
    """Sees the attention that runs in this thread outside of registered kernels, and changes it."""

    def __init__(self) -> None:
        self._softmax: _Probabilities | None = None
        self._missed: dict[nn.Module, None] = {}
        # Where queries or keys are normalised over another dimension: that is linear attention.
        self._sideways: nn.Module | None = None

    def begin(self) -> None:
        """Forgets what was missed before."""
        self._softmax, self._sideways = None, None
        self._missed.clear()

    def missed(self) -> list[nn.Module]:
        """The modules that seem to have computed attention which could not be seen.

        That may be attention within windows or chunks, or between tokens that are not those which
        the module was given.
        """
        self._lost()
        return list(self._missed)

    def _lost(self) -> None:
        softmax, self._softmax = self._softmax, None
        if softmax is None or softmax.module is None:
            return
        *_, T, S = softmax.logits.shape
        if softmax.logits.dim() > 3 or (T == S and softmax.of_tokens):
            self._missed[softmax.module] = None

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        """Looks at a function of torch that runs."""
        check_positions(func, args, kwargs)
        if not is_heard():
            return proceed(func, args, kwargs)
        if func is torch.nn.functional.multi_head_attention_forward and running():
            self._missed[running()[-1].module] = None  # what is in it cannot be seen
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._fused(func, _arguments(*args, **kwargs), proceed)
        if getattr(func, "__name__", "") in ("softmax", "softmax_"):
            return self._started(func, args, kwargs, proceed)
        if self._softmax is not None and any(id(x) in self._softmax.known for x in _flat(args)):
            return self._followed(func, args, kwargs, proceed)
        return proceed(func, args, kwargs)

    # -- fused

    def _fused(self, func: Any, given: dict[str, Any], proceed: Proceed) -> Tensor:
        query, key, value, mask = (given[n] for n in ("query", "key", "value", "attn_mask"))
        found = _attention_module(query.shape[:-1]) if query.dim() == 4 else None
        if found is None:
            if running():
                self._missed[running()[-1].module] = None
            result: Tensor = proceed(func, (), given)
            return result
        module, H, T = found[0], query.shape[1], query.shape[2]
        if value.shape[0] != query.shape[0]:  # all examples share them
            key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
        with taken_over() as (listener, changes):
            value = _changed(changes, module, H, value)
            if value.shape[1] != key.shape[1]:  # heads no longer share values
                key = expand_heads(key, H)
            given = {**given, "key": key, "value": value}
            result = proceed(func, (), given)
        if listener is None:
            return result
        if given["dropout_p"]:
            raise UnsupportedModelError(
                f"{type(module).__name__} drops attention weights though it is not in training: "
                "set the dropout of scaled_dot_product_attention to 0 in evaluation."
            )
        if given["is_causal"] and key.shape[2] != T:
            raise UnsupportedModelError(
                f"{type(module).__name__} has {key.shape[2]} keys for {T} queries and "
                "is_causal=True: what its queries see is not known. Run it without a cache."
            )

        def scaled(factors: Tensor) -> Tensor:
            H_kv = max(value.shape[1], H)
            again: Tensor = func(
                **{
                    **given,
                    "key": expand_heads(key, H_kv),
                    "value": times(expand_heads(value, H_kv), factors),
                }
            )
            return again

        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        call = AttentionCall(
            module=module,
            running=running(),
            query=query,
            key=key,
            value=value,
            mask=mask,
            causal=bool(given["is_causal"]) and T > 1,
            scaling=given["scale"],
            returned=result,
            by_token=_heads_second,
            weights=None,
            dense_kernel=None,
            scaled=scaled,
        )
        listener(call)
        return result

    # -- a softmax, and the product with values

    def _started(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        result = proceed(func, args, kwargs)
        logits = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(logits, Tensor) and logits.dim() > 2 and dim in (-1, logits.dim() - 1):
            self._lost()
            module = running()[-1].module if running() else None
            of_tokens = _attention_module(logits.shape[:-1]) is not None
            self._softmax = _Probabilities(module, logits, of_tokens, {id(result): result})
        elif isinstance(logits, Tensor) and logits.dim() > 2 and running():
            self._sideways = running()[-1].module
        return result

    def _followed(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Proceed
    ) -> Any:
        softmax = self._softmax
        assert softmax is not None
        product = None
        if getattr(func, "__name__", "") in PRODUCTS:
            product = _product(args, softmax)
        if product is not None and product.module is self._sideways:
            product = None
        if product is None:
            result = proceed(func, args, kwargs)
            if isinstance(result, Tensor) and result.numel() == softmax.logits.numel():
                softmax.known[id(result)] = result
            return result
        self._softmax = None
        module, H = product.module, product.weights.shape[1]

        def operands(value: Tensor) -> tuple[Any, ...]:
            return tuple(
                x if id(x) in softmax.known or not isinstance(x, Tensor) else product.given(value)
                for x in _flat(args)
            )

        def scaled(factors: Tensor) -> Tensor:
            again: Tensor = func(*operands(times(expand_heads(value, H), factors)), **kwargs)
            return again

        with taken_over() as (listener, changes):
            value = _changed(changes, module, H, product.value)
            given = args if value is product.value else operands(value)
            result = proceed(func, given, kwargs)
        if listener is not None:
            visible = _visible(softmax.logits.view_as(product.weights), product.weights)
            call = AttentionCall(
                module=module,
                running=running(),
                query=None,
                key=None,
                value=value,
                mask=visible,
                causal=False,
                scaling=None,
                returned=result,
                by_token=product.by_token,
                weights=product.weights,
                dense_kernel=None,
                scaled=scaled,
            )
            listener(call)
        return result


def _attention_module(queries: Sequence[int]) -> tuple[nn.Module, int] | None:
    """The module that computes attention, and ``B``; None if this is no attention between tokens.

    Args:
        queries: ``(B, H, T)`` or ``(B * H, T)``.
    """
    if len(queries) not in (2, 3):
        return None
    T = queries[-1]
    # The product may stand in a part of the module, which is given queries, keys and values.
    for run in running()[: -1 - PARTS : -1]:
        for x in run.tensors():
            if x.dim() not in (2, 3) or not x.is_floating_point():
                continue
            # Some modules take tokens before examples, or one example alone.
            first, second = x.shape[:2] if x.dim() == 3 else (1, x.shape[0])
            for B, length in ((first, second), (second, first)):
                if length == T and (queries[0] == B if len(queries) == 3 else not queries[0] % B):
                    return run.module, B
    return None


def _are_tokens(S: int) -> bool:
    """Whether as many keys are tokens that a module was given, or of a cache that it was."""
    for run in running()[: -1 - PARTS : -1]:
        for x in run.tensors():
            if x.dim() in (2, 3) and S in x.shape[:2]:
                return True
        if any(is_cache(x) for x in (*run.args, *run.kwargs.values())):
            return True
        # Older code gives a layer its own keys and values, as a pair.
        if any("past" in name and x is not None for name, x in run.kwargs.items()):
            return True
    return False


def _flat(args: Sequence[Any]) -> list[Any]:
    return [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]


def _heads_second(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _changed(
    changes: Sequence[ValueChange], module: nn.Module, heads: int, value: Tensor
) -> Tensor:
    for change in changes:
        factors = change(module, heads, value)
        if factors is not None:
            value = alter(times(expand_heads(value, heads), factors))
    return value


def _visible(logits: Tensor, weights: Tensor) -> Tensor | None:
    """Which keys queries see, by the logits, which a mask has been added to; None for all."""
    lowest = logits.amax(-1, keepdim=True) - FAR_BELOW
    visible = (weights != 0) | (logits > lowest)
    return None if visible.all() else visible


def _product(args: tuple[Any, ...], softmax: _Probabilities) -> _Product | None:
    """How an attention output is made of these operands; None if it is none."""
    equation = args[0] if args and isinstance(args[0], str) else None
    operands = _flat(args[1:] if equation else args)
    if len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    weights, value = operands
    found = _attention_module(softmax.logits.shape[:-1])
    if found is None:
        return None
    module, B = found
    if equation is not None:
        return _by_equation(module, B, equation, weights, value, softmax)
    if id(weights) not in softmax.known or id(value) in softmax.known:
        return None
    if weights.dim() != value.dim() or weights.shape[-1] != value.shape[-2]:
        return None
    *batch, T, S = weights.shape
    if not _are_tokens(S):
        return None
    H = math.prod(batch) // B
    d_h = value.shape[-1]
    if value.dim() == 3:
        return _Product(
            module,
            weights.view(B, H, T, S),
            value.reshape(B, H, S, d_h),
            lambda v: v.reshape(B * H, S, d_h),
            lambda y: y.view(B, H, T, d_h).transpose(1, 2),
        )
    if value.dim() != 4 or value.shape[0] != B or value.shape[1] not in (1, H):
        return None
    return _Product(module, weights, value, lambda v: v, _heads_second)


def _by_equation(
    module: nn.Module,
    B: int,
    equation: str,
    weights: Tensor,
    value: Tensor,
    softmax: _Probabilities,
) -> _Product | None:
    equation = equation.replace(" ", "")
    if id(value) in softmax.known:
        left, _, out = equation.partition("->")
        a, _, b = left.partition(",")
        weights, value, equation = value, weights, f"{b},{a}->{out}"
    left, _, out = equation.partition("->")
    a, _, b = left.partition(",")
    if id(weights) not in softmax.known or len(a) not in (3, 4) or not (a + b).isalpha():
        return None
    *batch, t, s = list(a)
    size = "".join(set(b) - set(a))
    ours, theirs = [*batch, s, size], [*batch, t, size]
    if len(size) != 1 or sorted(b) != sorted(ours) or sorted(out) != sorted(theirs):
        return None
    if not _are_tokens(weights.shape[-1]):
        return None

    def unfolded(x: Tensor) -> Tensor:
        """With examples and heads apart."""
        return x if len(batch) == 2 else x.reshape(B, -1, *x.shape[1:])

    def given(v: Tensor) -> Tensor:
        v = v if len(batch) == 2 else v.flatten(0, 1)
        return v.permute([ours.index(x) for x in b])

    return _Product(
        module,
        unfolded(weights),
        unfolded(value.permute([b.index(x) for x in ours])),
        given,
        lambda y: unfolded(y.permute([out.index(x) for x in theirs])).transpose(1, 2),
    )
