"""The hidden states that go into attention layers, in the spaces where sinks are looked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_cw.capture.calls import AttentionCall, UnsupportedModelError

__all__ = ["HiddenStates", "StateSpace"]

StateSpace = Literal["normed", "residual", "key", "value"]

_watching: ContextVar[HiddenStates | None] = ContextVar("captum_cw_hidden_states", default=None)


class HiddenStates:
    """Watches what modules are given, in this thread, while :meth:`watching` lasts.

    Args:
        roots: The model, or the modules of it that are known.
        space: Which states are asked for: the ``"normed"`` input of an attention layer, the
            ``"residual"`` stream that was normalised to it, or its ``"key"`` or ``"value"``
            vectors.
    """

    def __init__(self, roots: Collection[nn.Module], space: StateSpace) -> None:
        self.space = space
        self._inputs: dict[nn.Module, Tensor] = {}
        self._above = {
            child: parent
            for root in roots
            for parent in root.modules()
            for child in parent.children()
        }
        # No attention layer is a leaf: it has projections.
        self._watched = {*self._above.values()} if space in ("normed", "residual") else set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the inputs of modules, where the space needs them."""
        with ExitStack() as stack:
            for module in self._watched:
                handle = module.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(handle.remove)
            token = _watching.set(self)
            try:
                yield
            finally:
                _watching.reset(token)
                self._inputs.clear()

    def _note(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # Another thread may run a hook that has been registered but not yet marked as one
        # that takes keyword arguments; it is not the one that watches.
        if _watching.get() is self:
            for x in (*args, *(kwargs or {}).values()):
                if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3:
                    self._inputs[module] = x.detach()
                    break

    def of(self, call: AttentionCall) -> Tensor:
        """The states of the tokens of a call, ``(B, S, n)``; heads are put side by side.

        Raises:
            UnsupportedModelError: If the attention module is not given hidden states.
        """
        if self.space == "key":
            return call.key.transpose(1, 2).flatten(2)
        if self.space == "value":
            return call.value.transpose(1, 2).flatten(2)
        normed = self._inputs.get(call.module)
        if normed is None:
            raise UnsupportedModelError(
                f"{type(call.module).__name__} is given no hidden states (B, T, d), so sinks "
                "cannot be found by them: choose the space 'key' or 'value'."
            )
        states = normed if self.space == "normed" else self._before_norm(call.module, normed)
        self._inputs.clear()  # what is kept here is kept in memory
        return states

    def _before_norm(self, module: nn.Module, normed: Tensor) -> Tensor:
        """The input of the innermost module around that was given something else."""
        while module in self._above:
            module = self._above[module]
            states = self._inputs.get(module)
            if states is not None and not _same(states, normed):
                return states
        return normed


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))
