"""What autograd keeps for the backward pass, although the model overwrites it.

Code for inference writes into tensors that a backward pass still needs. So a tensor that is kept is
copied just before it is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from captum_cw.capture.patching import set_to

__all__ = ["address_of", "before_writing", "counting", "keeping"]


class _Kept:
    """A tensor that autograd keeps, and the number of times that it was changed in place."""

    __slots__ = ("__weakref__", "version", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, _version(x)

    def copy(self) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self.x = self.x.detach().clone()
        self.version = _version(self.x)

    def get(self) -> Tensor:
        if _version(self.x) != self.version:
            raise RuntimeError(
                f"A tensor of shape {tuple(self.x.shape)} that the backward pass needs was "
                "overwritten by a function that is no torch function."
            )
        return self.x


class _Keeper:
    """All tensors that autograd keeps of a pass."""

    def __init__(self) -> None:
        self.copies = 0
        self.count: Callable[[Tensor], object] = lambda x: None
        # Most models write into few tensors, so addresses are read when one does.
        self._new: list[ref[_Kept]] = []
        self._by_address: dict[int | None, list[ref[_Kept]]] = {}

    def pack(self, x: Tensor) -> _Kept:
        self.count(x)
        kept = _Kept(x)
        self._new.append(ref(kept))
        return kept

    def at(self, address: int | None) -> list[ref[_Kept]]:
        """Return, and forget, what is kept of the numbers that lie at an address."""
        new, self._new = self._new, []
        for reference in new:
            kept = reference()
            if kept is not None:
                self._by_address.setdefault(address_of(kept.x), []).append(reference)
        return self._by_address.pop(address, [])


_keeper: ContextVar[_Keeper | None] = ContextVar("captum_cw_keeper", default=None)


@contextmanager
def keeping() -> Iterator[None]:
    """Keep what autograd needs of the functions that run in this context."""
    keeper = _Keeper()
    with set_to(_keeper, keeper), saved_tensors_hooks(keeper.pack, _Kept.get):
        yield


@contextmanager
def counting(count: Callable[[Tensor], object]) -> Iterator[Callable[[], bool]]:
    """Call ``count`` with each tensor that autograd keeps, inside of :func:`keeping`.

    Returns:
        Whether any tensor had to be copied in this context.
    """
    keeper = _keeper.get()
    assert keeper is not None
    before, keeper.count = keeper.copies, count
    try:
        yield lambda: keeper.copies > before
    finally:
        keeper.count = lambda x: None


def before_writing(x: Tensor) -> None:
    """Copy what is kept of a tensor that is now overwritten."""
    keeper = _keeper.get()
    if keeper is not None:
        for kept in [reference() for reference in keeper.at(address_of(x))]:
            if kept is not None:
                kept.copy()
                keeper.copies += 1


def address_of(x: Tensor) -> int | None:
    """Return where the numbers of a tensor lie; None if it holds none, as quantised weights do."""
    try:
        return x.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
