"""The attention layers over the text, in a model of images, sounds and text.

They are recognised by the inputs of modules. The layers of a vision tower run inside a module that
receives the images and not the text. The layers of the language model run inside modules that
receive the token ids, or embeddings of at least as many tokens, since a model may put its own
tokens before the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.model import LOGITS
from captum_cw.capture.module_stack import Run

__all__ = ["TextLayers"]

#: Floating-point arguments whose names end like this belong to the text.
OF_TEXT = ("inputs_embeds", "mask", "labels")


@dataclass(frozen=True, eq=False)
class TextLayers:
    """Distinguishes the layers over the tokens of a call from those over its other inputs.

    Args:
        tokens: Token ids ``(B, T)`` or embeddings ``(B, T, d)``.
        others: The other inputs, such as the pixels of images.
        kept: The number of last tokens whose logits are requested; None for all. Some models
            compute only these queries in their last layers.
    """

    tokens: Tensor
    others: Sequence[Tensor]
    kept: int | None = None

    @classmethod
    def of(cls, tokens: Tensor | None, named: Mapping[str, Any]) -> TextLayers | None:
        """Create it from the arguments of a call; None if all or none of them belong to a text.

        Args:
            tokens: The tokens of the call; None without tokens.
            named: The arguments of the call by name.
        """
        others = [
            x
            for name, value in named.items()
            if not name.endswith(OF_TEXT)
            for x in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        ]
        if tokens is None or not others:
            return None
        kept = named.get(LOGITS)
        return cls(tokens, others, kept if isinstance(kept, int) and kept > 0 else None)

    def holds(self, runs: Iterable[Run], B: int, T: int | None = None) -> bool:
        """Whether a layer is over the text.

        Args:
            runs: The running modules, including the layer's own.
            B: The layer's number of examples.
            T: The layer's number of queries; None to decide by the modules around it alone.
        """
        T = self.tokens.shape[1] if T is None else T
        return self._fit(B, T) and not any(self.is_foreign(run) for run in runs)

    def is_foreign(self, run: Run) -> bool:
        """Whether a module receives hidden states, but not the text."""
        given = [x for x in run.tensors() if x.dim() > 1]
        states = any(x.is_floating_point() for x in given)
        return states and not any(self._is_text(x) for x in given)

    def _is_text(self, x: Tensor) -> bool:
        if not x.is_floating_point():
            return _same(x, self.tokens)
        first, second = x.shape[:2]  # in some modules the first dimension is the tokens
        fits = x.dim() == 3 and (self._fit(first, second) or self._fit(second, first))
        return fits and not any(_same(x, other) for other in self.others)

    def _fit(self, B: int, T: int) -> bool:
        examples, length = self.tokens.shape[:2]
        return examples == B and (length <= T or self.kept == T)


def _same(x: Tensor, given: Tensor) -> bool:
    """Whether a tensor equals an input of the model after a move to its device and dtype."""
    return x.shape == given.shape and torch.equal(x, given.to(x))
