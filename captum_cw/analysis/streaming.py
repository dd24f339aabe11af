"""Texts through a model, layer by layer, with bounded memory.

Texts run one by one and without their padding, so that no analysis has to think of it, and what is
held at once depends on the longest text alone. What an analysis keeps are running sums, or a
uniform sample of what went by.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.capture import Execution
from captum_cw.capture.forward_call import device_of
from captum_cw.capture.model import unwrapped
from captum_cw.capture.run import Runner, ignore_layer
from captum_cw.functional import AttentionLayer, widest

__all__ = ["Batches", "Reservoir", "SeenLayer", "check_causal", "run_texts", "texts_of"]

Batches = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids ``(B, T)``, a dict of ``input_ids`` and ``attention_mask``, or an iterable of these."""


@dataclass(frozen=True)
class SeenLayer:
    """One attention layer, running over one text without padding.

    Args:
        text: Which text, from 0.
        number: Which layer, in execution order, from 0.
        name: Its name in the model.
        layer: What is known of it; one example, of real tokens.
        ids: The token ids of the text, ``(T,)``.
    """

    text: int
    number: int
    name: str
    layer: AttentionLayer
    ids: Tensor

    @property
    def T(self) -> int:
        """Tokens of the text."""
        return self.layer.T


def texts_of(batches: Batches, shortest: int = 2) -> list[Tensor]:
    """The token ids of each text, ``(T,)``, without padding.

    Args:
        batches: As the analyses take them.
        shortest: A text with fewer tokens is refused.

    Raises:
        TypeError: If ``batches`` is none of these.
        ValueError: If there is no text, one is too short, or a mask has another shape.

    Example:
        >>> ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
        >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> [text.tolist() for text in texts_of({"input_ids": ids, "attention_mask": mask})]
        [[5, 6], [7, 8, 9]]
    """
    several = [batches] if isinstance(batches, (Tensor, Mapping)) else batches
    texts: list[Tensor] = []
    for batch in several:
        ids, mask = batch, None
        if isinstance(batch, Mapping):
            ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise TypeError(
                f"A batch is of type {type(batch).__name__}: give token ids (B, T), or a dict of "
                "input_ids and attention_mask, or an iterable of these."
            )
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but input_ids {tuple(ids.shape)}."
            )
        texts += [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    if not texts:
        raise ValueError("There is no text: give at least one.")
    for number, text in enumerate(texts):
        if len(text) < shortest:
            raise ValueError(
                f"Text {number} has {len(text)} tokens, but this analysis needs {shortest} or more."
            )
    return texts


def run_texts(
    model: nn.Module,
    texts: Iterable[Tensor],
    on_layer: Callable[[SeenLayer], None],
    *,
    after_text: Callable[[Tensor], None] | None = None,
    causal: bool = True,
    description: str = "texts",
    show_progress: bool = False,
) -> list[str]:
    """Runs each text through the model and hands over its attention layers in order.

    Args:
        model: The model.
        texts: Token ids ``(T,)`` each, as of :func:`texts_of`.
        on_layer: Takes each layer of each text; what it is given is not kept.
        after_text: Takes the token ids of each text once its layers have run.
        causal: Whether a layer whose queries see later keys is refused.
        description: Of the progress bar.
        show_progress: Shows a bar once it has taken two seconds.

    Returns:
        The names of the layers.

    Raises:
        ValueError: If the model has to be causal, and is not.

    Warns:
        UserWarning: If outputs of layers vanish: what is relative to them counts as zero.
    """
    vanishing = 0
    model = unwrapped(model)
    runner = Runner(model)
    device = device_of(model)
    texts = list(texts)
    if texts:
        # Before anything is counted: a model that leaves queries out runs its first layers twice.
        runner.observe(texts[0][None, :2].to(device), ignore_layer)
    with progress_bar(len(texts), description, show=show_progress) as bar:
        for text, ids in enumerate(texts):
            number = 0

            def seen(execution: Execution, layer: AttentionLayer) -> None:
                nonlocal number, vanishing
                if causal:
                    check_causal(execution.name, layer)
                vanishing += layer.vanishing("inter")
                if widest(layer.value.device) != torch.float64:
                    layer = layer.on_cpu()  # analyses sum in float64
                on_layer(SeenLayer(text, number, execution.name, layer, ids))  # noqa: B023
                number += 1

            runner.observe(ids[None].to(device), seen)
            if after_text is not None:
                after_text(ids)
            bar.update()
    if vanishing:
        warnings.warn(
            f"{vanishing} attention outputs vanish: what is relative to them counts as zero.",
            stacklevel=3,
        )
    return runner.names


def check_causal(name: str, layer: AttentionLayer) -> None:
    """Raises a ValueError where the first query of a layer sees later keys."""
    first = layer.mask.block(slice(0, 1))
    if layer.T > 1 and (first is None or bool(first[..., 1:].any())):
        raise ValueError(
            f"Attention layer {name!r} is bidirectional, but this analysis speaks of causal "
            "models, whose first token every query sees, and which sees itself alone."
        )


class Reservoir:
    """A uniform sample, without replacement, of rows of numbers that go by.

    Each row has a random key, and those with the lowest keys are kept. Once there are enough, how
    many of the next rows have lower keys than all that are kept is drawn instead of the keys.

    Args:
        size: How many rows are kept at most.
        seed: The same seed and rows give the same sample.

    Example:
        >>> sample = Reservoir(3, seed=0)
        >>> for start in range(0, 100, 10):
        ...     rows = np.arange(start, start + 10.0)
        ...     sample.add(rows[sample.draw(10)])
        >>> sample.rows.shape, sample.seen
        ((3,), 100)
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size={size} keeps nothing: give 1 or more.")
        self.size, self.seen = size, 0
        self._random = np.random.default_rng(seed)
        self._limit = 1.0  # keys above it are not among the lowest
        self._keys: list[np.ndarray[Any, Any]] = []
        self._rows: list[np.ndarray[Any, Any]] = []
        self._held = 0

    def draw(self, count: int) -> np.ndarray[Any, Any]:
        """Which of the next ``count`` rows are to be added, ascending."""
        self.seen += count
        taken = self._random.binomial(count, self._limit) if self._limit < 1 else count
        self._keys.append(self._random.uniform(0, self._limit, taken))
        if taken == count:
            return np.arange(count)
        return np.sort(self._random.choice(count, taken, replace=False, shuffle=False))

    def add(self, rows: np.ndarray[Any, Any]) -> None:
        """Adds the rows that were drawn, ``(n, ...)``."""
        assert len(rows) == len(self._keys[-1])
        self._rows.append(np.array(rows))
        self._held += len(rows)
        if self._held > 2 * self.size:
            self._prune()

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        """The sample, in the order in which its rows went by."""
        self._prune()
        return self._rows[0] if self._rows else np.zeros(0)

    def _prune(self) -> None:
        if not self._rows:
            return
        keys, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        if len(keys) > self.size:
            lowest = np.sort(np.argpartition(keys, self.size - 1)[: self.size])
            keys, rows = keys[lowest], rows[lowest]
            self._limit = float(keys.max())
        self._keys, self._rows, self._held = [keys], [rows], len(keys)
