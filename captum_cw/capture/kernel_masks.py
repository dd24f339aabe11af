"""What the masks of attention kernels show.

Kernels take masks of several forms. A mask of four dimensions shows keys to queries itself, and so
does a ``BlockMask`` of flex attention, by a function of places. Flash attention takes at most the
padding of a text, ``(B, S)``. Other arguments then say whether it hides later keys, keys outside of
a window, or other texts that are packed into the same sequence, and some kernels ignore some of
them. So a mask can have several readings. The head outputs show which one is right.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from captum_cw.functional import BLOCK_ELEMENTS, blocks

__all__ = ["KernelMask", "Reading", "evaluated", "is_block_mask", "reads_pages"]

Reading = tuple[Tensor | None, bool]
"""A mask, broadcastable to ``(B, H, T, S)``, or None; and whether a query sees no later key if the
mask is None."""

#: The masks that were made, by what they were made of: the layers of a pass share them.
_made: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()

#: The arguments of kernels that read keys and values from pages of a cache.
_PAGES = ("cache", "block_table", "k_cache", "v_cache")


def is_block_mask(mask: object) -> bool:
    """Whether a mask is a ``BlockMask`` of flex attention."""
    # It can only be one if somebody has imported the module, whose import is slow.
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return module is not None and isinstance(mask, module.BlockMask)


def reads_pages(options: Mapping[str, Any]) -> bool:
    """Whether a kernel reads keys and values from pages of a cache, beside those it is given.

    Example:
        >>> reads_pages({"block_table": torch.zeros(1, 1)}), reads_pages({"scaling": 1.0})
        (True, False)
    """
    return any(options.get(name) is not None for name in _PAGES)


@dataclass(frozen=True)
class KernelMask:
    """The arguments of a kernel that say which keys a query sees.

    Args:
        mask: The attention mask: ``(B, H, T, S)``, the padding ``(B, S)`` where zero is padding, a
            ``BlockMask``, or None.
        causal: Whether the kernel hides later keys, if ``mask`` does not say it.
        B: The number of examples.
        T: The number of queries.
        S: The number of keys.
        device: The device of the queries.
        options: The other arguments of the kernel, by their names in transformers.

    Example:
        >>> padding = torch.tensor([[0, 1, 1]])  # of the sentence "Paris shines"
        >>> mask = KernelMask(padding, True, 1, 3, 3, padding.device, {})
        >>> [seen.int().tolist() for seen, _ in mask.readings()]
        [[[[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]]]
    """

    mask: Any
    causal: bool
    B: int
    T: int
    S: int
    device: torch.device
    options: Mapping[str, Any]

    @property
    def is_known(self) -> bool:
        """Whether the mask has one of the forms above."""
        is_tensor = isinstance(self.mask, Tensor) and self.mask.dim() in (2, 4)
        return self.mask is None or is_tensor or is_block_mask(self.mask)

    def readings(self) -> Iterator[Reading]:
        """Yield what the mask can mean, the likeliest first."""
        if is_block_mask(self.mask):
            yield _of_blocks(self.mask, self.T, self.S)
        elif self.mask is not None and self.mask.dim() == 4:
            yield self.mask, False
        else:
            causal = self.causal and self.T > 1
            are_last: tuple[bool, ...] = (True,)
            if causal and self.T < self.S:
                # The queries are the last tokens in flash attention, the first ones in others.
                are_last = (False, True) if self.mask is None else (True, False)
            for texts, window, last in itertools.product(self._texts(), self._windows(), are_last):
                yield self._of_arguments(causal, texts, window, last)

    def _windows(self) -> tuple[int | None, ...]:
        window = self.options.get("sliding_window")
        return (window, None) if isinstance(window, int) and 0 < window < self.S else (None,)

    def _texts(self) -> tuple[Tensor | None, ...]:
        """Return the argument that says where packed texts begin, or None for one text."""
        ends, places = self.options.get("cu_seq_lens_q"), self.options.get("position_ids")
        if self.S == self.T and self.mask is None:
            if isinstance(ends, Tensor) and ends.numel() > 2:
                return ends, None
            if isinstance(places, Tensor) and places.shape == (self.B, self.T) == (1, self.T):
                return (places, None) if bool((places.diff() != 1).any()) else (None,)
        return (None,)

    def _of_arguments(
        self, causal: bool, texts: Tensor | None, window: int | None, last: bool
    ) -> Reading:
        padding = None if self.mask is None else self.mask[:, -self.S :] != 0
        if padding is not None and padding.shape[1] == self.S and bool(padding.all()):
            padding = None
        hides_nothing = padding is None and texts is None and window is None
        if hides_nothing and not (causal and last and self.T < self.S):
            return None, causal
        sources = [WeakIdRef(x) for x in (self.mask, texts) if x is not None]
        key = (*sources, causal, window, last, self.B, self.T, self.S)

        def make() -> Tensor:
            return self._visible(padding, causal, texts, window, last)

        return _shared(key, make), False

    def _visible(
        self,
        padding: Tensor | None,
        causal: bool,
        texts: Tensor | None,
        window: int | None,
        last: bool,
    ) -> Tensor:
        T, S = self.T, self.S
        real = torch.ones(1, S, dtype=torch.bool, device=self.device)
        known = S
        if padding is not None:  # the places after it are empty places of a static cache
            known = padding.shape[1]
            real = torch.nn.functional.pad(padding.to(self.device), (0, S - known))
        first = known - T if last else 0
        place = real.long().cumsum(-1)  # padding takes no place in a text
        distance = place[:, first : first + T, None] - place[:, None]
        seen = real[:, None].expand(-1, T, -1)
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance.abs() < window)
        if texts is not None:
            number = self._numbers(texts).to(self.device)
            seen = seen & (number[:, :, None] == number[:, None])
        return seen[:, None]

    def _numbers(self, texts: Tensor) -> Tensor:
        """Return the number of the text that each token belongs to, ``(B, T)``."""
        if texts.dim() == 1:  # the places where texts begin and end
            tokens = torch.arange(self.B * self.T, device=texts.device)
            return torch.bucketize(tokens, texts, right=True).view(self.B, self.T)
        return torch.nn.functional.pad((texts.diff() != 1).cumsum(-1), (1, 0))


def evaluated(function: Callable[..., Tensor], *places: Tensor) -> Tensor:
    """Evaluate the ``mask_mod`` of a ``BlockMask``, which is written for single places, at many.

    Args:
        function: The function.
        places: The places of examples ``(B,)``, heads ``(H,)``, queries ``(t,)`` and keys ``(S,)``.

    Returns:
        ``(B, H, t, S)``.

    Example:
        >>> one, few = torch.arange(1), torch.arange(2)
        >>> evaluated(lambda b, h, q, k: q >= k, one, one, few, few).tolist()
        [[[[True, False], [True, True]]]]
    """
    for n in reversed(range(len(places))):
        function = torch.vmap(function, in_dims=tuple(0 if m == n else None for m in range(4)))
    return function(*places)


def _of_blocks(mask: Any, T: int, S: int) -> Reading:
    """Return what a ``BlockMask`` shows: a tensor only if it hides other keys than later ones."""
    B, H = mask.kv_num_blocks.shape[:2]
    size = max(1, BLOCK_ELEMENTS // (B * H * S))
    keys = torch.arange(S, device=mask.kv_num_blocks.device)
    shows_all, hides_later = True, T == S
    for rows in blocks(T, size):
        seen = _block_rows(mask, rows, keys)
        shows_all &= bool(seen.all())
        hides_later &= bool((seen == (keys <= keys[rows, None])).all())
        if not (shows_all or hides_later):
            break
    if shows_all or hides_later:
        return None, not shows_all

    def make() -> Tensor:
        seen = keys.new_empty(B, H, T, S, dtype=torch.bool)
        for rows in blocks(T, size):
            seen[:, :, rows] = _block_rows(mask, rows, keys)
        return seen[:1] if B > 1 and bool((seen == seen[:1]).all()) else seen

    return _shared((WeakIdRef(mask), T, S), make), False


def _block_rows(mask: Any, rows: slice, keys: Tensor) -> Tensor:
    """Return which keys some queries see, ``(B, H, t, S)``."""
    examples, heads = (keys.new_tensor(range(n)) for n in mask.kv_num_blocks.shape[:2])
    queries = torch.arange(rows.start, rows.stop, device=keys.device)
    of_queries, of_keys = (x // n for x, n in zip((queries, keys), mask.BLOCK_SIZE, strict=True))
    seen: Tensor = evaluated(mask.mask_mod, examples, heads, queries, keys)
    seen = seen & _listed(mask.kv_num_blocks, mask.kv_indices)[:, :, of_queries][..., of_keys]
    if mask.full_kv_num_blocks is not None:  # of which no key is hidden
        full = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        seen = seen | full[:, :, of_queries][..., of_keys]
    return seen


def _listed(number: Tensor, indices: Tensor) -> Tensor:
    """Return which blocks of keys are listed for each block of queries, ``(B, H, n, m)``."""
    m = indices.shape[-1]
    is_entry = torch.arange(m, device=indices.device) < number[..., None]
    places = torch.where(is_entry, indices, m).long()  # the entries after the last count nothing
    listed = torch.zeros(*indices.shape[:-1], m + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter(-1, places, True)[..., :m]


def _shared(key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
    made = _made.get(key)
    if made is None:
        made = _made[key] = make()
    return made
