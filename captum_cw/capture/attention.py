"""Observe attention calls in all the ways that are known, and change their values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from captum_cw.capture.adapters import adapted
from captum_cw.capture.dispatch import following
from captum_cw.capture.functions import DirectAttention
from captum_cw.capture.hf_registry import registered_kernels
from captum_cw.capture.listeners import Listener, ValueChange, changing, listening
from captum_cw.capture.module_stack import watching
from captum_cw.capture.tensor_parallel import head_group

__all__ = ["attention_calls", "changed_values"]


#: What sees attention that a model computes by itself, with its thread: it must not be seen twice.
_direct: ContextVar[tuple[int, DirectAttention] | None] = ContextVar(
    "captum_cw_direct", default=None
)


@contextmanager
def attention_calls(
    modules: Collection[nn.Module], listener: Listener
) -> Iterator[Callable[[], list[nn.Module]]]:
    """Tells ``listener`` of every attention call that ``modules`` make in this context.

    An observation within an observation hears its own calls only, and so does the outer one. Gives
    what tells which modules seem to have attention that could not be seen.
    """
    with _seen(modules) as direct, listening(listener):
        direct.begin()
        yield direct.missed


@contextmanager
def changed_values(modules: Collection[nn.Module], change: ValueChange) -> Iterator[None]:
    """Changes the values that the attention of ``modules`` reads in this context.

    Changes within changes add up, and an observation hears of what is left.
    """
    known = set(modules)

    def of_known(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
        if module not in known:
            return None
        spread = head_group(module, heads, value.shape[3])
        if spread is None:
            return change(module, heads, value)
        factors = change(module, spread.H, value)
        return None if factors is None else spread.part(factors)

    with _seen(known), changing(of_known):
        yield


@contextmanager
def _seen(modules: Collection[nn.Module]) -> Iterator[DirectAttention]:
    with watching(modules), adapted(modules), registered_kernels(modules):
        thread, active = threading.get_ident(), _direct.get()
        if active is not None and active[0] == thread:
            yield active[1]
            return
        direct = DirectAttention()
        with following(direct):
            token = _direct.set((thread, direct))
            try:
                yield direct
            finally:
                _direct.reset(token)
