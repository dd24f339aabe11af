"""Attention calls, however a model makes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from captum_cw.capture.adapters import adapted
from captum_cw.capture.direct import DirectAttention
from captum_cw.capture.huggingface import registered_kernels
from captum_cw.capture.listening import Listener, ValueChange, changing, listening
from captum_cw.capture.running import watching

__all__ = ["attention_calls", "changed_values"]


@contextmanager
def attention_calls(
    modules: Collection[nn.Module], listener: Listener
) -> Iterator[Callable[[], list[nn.Module]]]:
    """Tells ``listener`` of every attention call that ``modules`` make in this context.

    An observation within an observation hears its own calls only, and so does the outer one. Gives
    what tells which modules seem to have attention that could not be seen.
    """
    with _seen(modules) as direct, listening(listener):
        yield direct.missed


@contextmanager
def changed_values(modules: Collection[nn.Module], change: ValueChange) -> Iterator[None]:
    """Changes the values that the attention of ``modules`` reads in this context.

    Changes within changes add up, and an observation hears of what is left.
    """
    known = set(modules)

    def of_known(module: nn.Module, heads: int, value: Tensor) -> Tensor | None:
        return change(module, heads, value) if module in known else None

    with _seen(known), changing(of_known):
        yield


@contextmanager
def _seen(modules: Collection[nn.Module]) -> Iterator[DirectAttention]:
    with (
        watching(modules),
        adapted(modules),
        registered_kernels(modules),
        DirectAttention() as direct,
    ):
        yield direct
