"""Less memory for long texts: repeated blocks are computed again in the backward pass.

A pass with gradients keeps activations of every layer. Where these would take a large part of the
free memory, the blocks of a model (the entries of its module lists) keep only their inputs, and run
once more when their gradients are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_cw._utils.memory import free_bytes
from captum_cw.capture.caches import find_cache
from captum_cw.capture.function_call import substitute, varies
from captum_cw.capture.patching import set_to, wrapped_method
from captum_cw.capture.saved_tensors import address_of, counting

__all__ = ["recomputing"]

#: The part of the free memory that the activations of all blocks may take.
SHARE = 0.25


@dataclass
class _Pass:
    """One pass with gradients.

    Args:
        again: Returns the context in which a block runs again.
        roots: The model, or the modules of it that are known.
        decided: Whether the blocks of a list run again.
    """

    again: Callable[[], AbstractContextManager[Any]]
    roots: Collection[nn.Module]
    decided: dict[nn.ModuleList, bool] = field(default_factory=dict)


_pass: ContextVar[_Pass | None] = ContextVar("captum_cw_recomputing", default=None)


@contextmanager
def recomputing(
    roots: Collection[nn.Module], again: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Let the blocks of modules run again in the backward pass, where memory is short.

    Args:
        roots: The model, or the modules of it that are known.
        again: Returns the context in which a block runs again.
    """
    with ExitStack() as stack, set_to(_pass, _Pass(again, roots)):
        for blocks in _lists_of_blocks(roots):
            for block in blocks:
                wrap = functools.partial(_Block, blocks)
                stack.enter_context(wrapped_method(block, "forward", "block", wrap))
        yield


def _own(x: Any) -> Any:
    """Return a copy of an activation, since a block that adds to its input runs on it twice."""
    return x.clone() if varies(x) else x


def _lists_of_blocks(roots: Collection[nn.Module]) -> Iterator[nn.ModuleList]:
    """Iterate over the lists of several modules that are not inside of such a list."""
    for root in roots:
        if isinstance(root, nn.ModuleList) and len(root) > 1:
            yield root
        else:
            yield from _lists_of_blocks(list(root.children()))


class _Block:
    """The ``forward`` of a block, which may run again in the backward pass."""

    def __init__(self, blocks: nn.ModuleList, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._blocks, self._forward = blocks, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = _pass.get()
        if now is None or now.decided.get(self._blocks) is False:
            return self._forward(*args, **kwargs)
        if find_cache((*args, *kwargs.values())) is not None:  # it would be written into twice
            return self._forward(*args, **kwargs)
        if self._blocks not in now.decided:
            return self._decide(now, *args, **kwargs)

        def run(*args: Any) -> Any:
            own_args, own_kwargs = substitute((args, kwargs), _own)
            return self._forward(*own_args, **own_kwargs)

        return checkpoint(
            run,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _Repeated(now.again)),
        )

    def _decide(self, now: _Pass, *args: Any, **kwargs: Any) -> Any:
        """Run the first block of a list, and decide by what it keeps whether the others do."""
        kept: dict[int | None, int] = {}
        device = None

        def count(x: Tensor) -> None:
            nonlocal device
            address = address_of(x)
            if address is not None:
                kept[address], device = x.untyped_storage().nbytes(), x.device

        with counting(count) as has_copied:
            result = self._forward(*args, **kwargs)

        def is_large() -> bool:
            allowed = 0.0 if device is None else SHARE * free_bytes(device)
            return sum(kept.values()) * len(self._blocks) > allowed

        # What a block overwrites while it runs again would not be copied.
        if has_copied() or not is_large():
            now.decided[self._blocks] = False
        else:
            for x in (x for root in now.roots for x in (*root.parameters(), *root.buffers())):
                kept.pop(address_of(x), None)  # the model's own tensors take no further memory
            now.decided[self._blocks] = is_large()
        return result


class _Repeated:
    """A context that can be entered again, for a second backward pass."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._context = context
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(self._context())

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)
