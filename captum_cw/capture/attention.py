"""Observe attention calls, and change their values, in every way in which models compute them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from captum_cw.capture.adapters import adapted
from captum_cw.capture.dispatch import following
from captum_cw.capture.functions import DirectAttention
from captum_cw.capture.hf_registry import registered_kernels
from captum_cw.capture.listeners import Listener, ValueChange, changing, listening
from captum_cw.capture.module_stack import tracking
from captum_cw.capture.tensor_parallel import head_group

__all__ = ["attention_calls", "changed_values"]


class _Local(threading.local):
    direct: DirectAttention | None = None


#: The observer of this thread. A second one would report the same calls again.
_local = _Local()


@contextmanager
def attention_calls(
    modules: Collection[nn.Module], listener: Listener, *, layers: bool = False
) -> Iterator[Callable[[], list[nn.Module]]]:
    """Report every attention call that ``modules`` make in this context to ``listener``.

    If observations are nested, each call is reported to the inner one only. The context yields a
    function that lists the modules whose attention could not be observed.

    Args:
        modules: The modules.
        listener: Receives the calls.
        layers: Whether the running modules include single layers of PyTorch.
    """
    with _observed(modules, layers) as direct, listening(listener):
        direct.begin()
        yield direct.missed


@contextmanager
def changed_values(
    modules: Collection[nn.Module], change: ValueChange, *, registered_only: bool = False
) -> Iterator[None]:
    """Change the values that the attention of ``modules`` reads in this context.

    The factors of nested changes are multiplied. An observation sees the changed values.

    Args:
        modules: The modules.
        change: Returns the factors.
        registered_only: Whether all attention is known to run in kernels of transformers'
            registry. Then functions and modules are not followed, which saves time.
    """
    known = set(modules)

    def change_known(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
        if module not in known:
            return None
        group = head_group(module, heads, value.shape[3])
        if group is None:
            return change(module, heads, value)
        factors = change(module, group.H, value)
        return None if factors is None else group.part(factors)

    with registered_kernels(known) if registered_only else _observed(known), changing(change_known):
        yield


@contextmanager
def _observed(modules: Collection[nn.Module], layers: bool = False) -> Iterator[DirectAttention]:
    with tracking(modules, layers=layers), adapted(modules), registered_kernels(modules):
        if _local.direct is not None:
            yield _local.direct
            return
        direct = DirectAttention()
        with following(direct):
            _local.direct = direct
            try:
                yield direct
            finally:
                _local.direct = None
