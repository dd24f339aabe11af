"""Which attention layers of a model of images, sounds and text read its text.

Found by the data of a call. The layers of a vision tower run inside a module that is given the
images and not the text; the layers of the language model run inside modules that are given the
token ids, or embeddings of as many tokens or more, since a model may put tokens of its own before
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_cw.capture.module_stack import Run

__all__ = ["LOGITS", "TextLayers"]

#: By which models are asked for the logits of the last tokens alone.
LOGITS = "logits_to_keep"

#: How the names of floating-point arguments end that belong to the text.
OF_TEXT = ("inputs_embeds", "mask", "labels")


@dataclass(frozen=True, eq=False)
class TextLayers:
    """Tells the layers over the tokens of a call from those over its other inputs.

    Args:
        tokens: Token ids ``(B, T)`` or embeddings ``(B, T, d)``.
        others: The other inputs, such as the pixels of images.
        kept: The last tokens of which logits are asked for: some models compute no other queries
            in their last layers. None where all are.
    """

    tokens: Tensor
    others: Sequence[Tensor]
    kept: int | None = None

    @classmethod
    def of(cls, tokens: Tensor | None, named: Mapping[str, Any]) -> TextLayers | None:
        """Reads a call; None where it has no text, or nothing beside it.

        Args:
            tokens: The tokens of the call; None where there are none.
            named: The arguments of the call by their names.
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
        """Whether a layer reads the text.

        Args:
            runs: The modules that are running, its own among them.
            B: The number of its examples.
            T: The number of its queries; None where only the modules around it are to tell.
        """
        T = self.tokens.shape[1] if T is None else T
        return self._fit(B, T) and not any(self.is_foreign(run) for run in runs)

    def is_foreign(self, run: Run) -> bool:
        """Whether a module is given other inputs, or what was made of them, without the text."""
        given = [x for x in run.tensors() if x.dim() > 1]
        states = any(x.is_floating_point() for x in given)
        return states and not any(self._is_text(x) for x in given)

    def _is_text(self, x: Tensor) -> bool:
        if not x.is_floating_point():
            return _same(x, self.tokens)
        first, second = x.shape[:2]  # some modules take tokens before examples
        fits = x.dim() == 3 and (self._fit(first, second) or self._fit(second, first))
        return fits and not any(_same(x, other) for other in self.others)

    def _fit(self, B: int, T: int) -> bool:
        examples, length = self.tokens.shape[:2]
        return examples == B and (length <= T or self.kept == T)


def _same(x: Tensor, given: Tensor) -> bool:
    """Whether a tensor is one that the model was given, moved or cast perhaps."""
    return x.shape == given.shape and torch.equal(x, given.to(x))
