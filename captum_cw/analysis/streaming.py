"""Run texts through a model, layer by layer, with bounded memory.

Texts run one by one and without their padding, so analyses need not handle it, and the memory
needed depends only on the longest text. Analyses keep running sums, or a uniform sample of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.analysis.result import Array
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.model import device_of, unwrapped
from captum_cw.capture.run import Runner, ignore_layer
from captum_cw.functional import AttentionLayer, Measure, map_blocks, widest

Batches = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids ``(B, T)``, a dict of ``input_ids`` and ``attention_mask``, or an iterable of these."""


@dataclass(frozen=True)
class SeenLayer:
    """One attention layer that has run over one text without padding.

    Args:
        text: The number of the text, from 0.
        number: The number of the layer in execution order, from 0.
        name: The name of the layer in the model.
        layer: The captured tensors of the layer, for one example.
    """

    text: int
    number: int
    name: str
    layer: AttentionLayer

    @property
    def T(self) -> int:
        """The number of tokens of the text."""
        return self.layer.T


def texts_of(batches: Batches, shortest: int = 2) -> list[Tensor]:
    """Return the token ids of each text, ``(T,)``, without padding.

    Args:
        batches: Token ids ``(B, T)``, a dict of ``input_ids`` and ``attention_mask``, or an
            iterable of these.
        shortest: The minimum number of tokens of a text.

    Raises:
        TypeError: If ``batches`` has another type.
        ValueError: If ``batches`` is empty, a text is too short, or a mask has the wrong
            shape.

    Example:
        >>> tokenizer.pad_token = "?"
        >>> sentences = ["The capital of France is Paris", "Ice is cold"]
        >>> batch = tokenizer(sentences, padding=True, return_tensors="pt")
        >>> [len(text) for text in texts_of(batch)]
        [6, 3]
    """
    texts: list[Tensor] = []
    if isinstance(batches, tuple):
        raise TypeError(
            f"The batches are a tuple of {len(batches)}: give a dict of input_ids and "
            "attention_mask, or a list of batches."
        )
    for batch in [batches] if isinstance(batches, (Tensor, Mapping)) else batches:
        ids, mask = batch, None
        if isinstance(batch, Mapping):
            ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise TypeError(
                f"A batch has type {type(batch).__name__}: give token ids (B, T), a dict of "
                "input_ids and attention_mask, or an iterable of these."
            )
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but input_ids has shape "
                f"{tuple(ids.shape)}."
            )
        texts += [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    if not texts:
        raise ValueError("batches is empty: give at least one text.")
    for number, text in enumerate(texts):
        if len(text) < shortest:
            raise ValueError(
                f"Text {number} has {len(text)} tokens, but this analysis needs {shortest} or more."
            )
    return texts


def run_texts(
    model: nn.Module,
    texts: Sequence[Tensor],
    on_layer: Callable[[SeenLayer], None],
    *,
    causal: bool = True,
    show_progress: bool = False,
) -> list[str]:
    """Run each text through the model and pass each attention layer to a function, in order.

    Args:
        model: The model.
        texts: Token ids of each text, ``(T,)``, as :func:`texts_of` returns them.
        on_layer: A function that takes each layer of each text. The layer is not kept.
        causal: Raise an error if a query of a layer can see later keys.
        show_progress: Show a progress bar after two seconds.

    Returns:
        The names of the layers.

    Raises:
        ValueError: If ``causal`` is set and the model is not causal.

    Warns:
        UserWarning: If outputs of layers are zero: measures relative to them are set to zero.
    """
    zero_outputs = 0
    model = unwrapped(model)
    runner = Runner(model)
    device = device_of(model)

    def collect(
        text: int, numbers: Iterator[int], execution: Execution, layer: AttentionLayer
    ) -> None:
        nonlocal zero_outputs
        if (len(texts[text]),) * 2 != (layer.T, layer.S):  # such as learned virtual tokens
            raise UnsupportedModelError(
                f"Layer {execution.name!r} attends from {layer.T} queries to {layer.S} keys, but "
                f"the text has {len(texts[text])} tokens: analyses need a model that reads the "
                "text alone."
            )
        if causal:
            check_causal(execution.name, layer)
        zero_outputs += int(layer.vanishing("inter"))
        if widest(layer.value.device) != torch.float64:
            layer = layer.on_cpu()  # analyses sum in float64
        on_layer(SeenLayer(text, next(numbers), execution.name, layer))

    # A model that skips queries runs its first layers twice in its first call. This call comes
    # before the counting, so that no layer is counted twice.
    runner.observe(texts[0][None, :2].to(device), ignore_layer)
    with progress_bar(len(texts), "texts", show=show_progress) as bar:
        for text, ids in enumerate(texts):
            runner.observe(ids[None].to(device), partial(collect, text, count()))
            bar.update()
    if zero_outputs:
        warnings.warn(
            f"{zero_outputs} attention outputs are zero; weights relative to them are set to zero.",
            stacklevel=3,
        )
    return runner.names


def visible_blocks(
    layer: AttentionLayer, *measures: Measure, chosen: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Yield the maps of measures in blocks of queries, with the keys that the queries see.

    Args:
        layer: A layer with one example.
        measures: The measures.
        chosen: Boolean ``(1, T)``, the queries to use, as in
            :func:`~captum_cw.functional.map_blocks`.

    Yields:
        The rows of the block, which keys are visible ``(H or 1, t, n)``, and for each measure
        ``(H, t, n)``.
    """
    for rows, maps in map_blocks(layer, *measures, chosen=chosen):
        yield rows, layer.mask.block(rows, maps[0].device)[0], [x[0] for x in maps]


def check_causal(name: str, layer: AttentionLayer) -> None:
    """Raise a ValueError if the first query of a layer can see later keys."""
    if layer.T > 1 and layer.mask.sees(0, 1, layer.value.device):
        raise ValueError(
            f"Attention layer {name!r} is bidirectional, but this analysis needs a causal model: "
            "every query sees the first token, and the first token sees only itself."
        )


class Reservoir:
    """A uniform sample, without replacement, of a stream of rows.

    Each row has a random key, and the rows with the lowest keys are kept. Once the sample is full,
    the number of later rows with a low enough key is drawn, instead of a key for every row.

    Args:
        size: The maximum number of rows to keep.
        seed: Random seed. The same seed and rows give the same sample.

    Example:
        >>> sample = Reservoir(3, seed=0)
        >>> for start in range(0, 100, 10):
        ...     rows = np.arange(start, start + 10.0)
        ...     sample.add(rows[sample.draw(10)])
        >>> sample.rows.shape
        (3,)
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or more, got {size}")
        self.size = size
        self._random = np.random.default_rng(seed)
        self._limit = 1.0  # the sample needs no keys above this
        self._keys: list[Array] = []
        self._rows: list[Array] = []
        self._held = 0

    def draw(self, count: int) -> Array:
        """Return which of the next ``count`` rows to add, in ascending order."""
        drawn = self._random.binomial(count, self._limit) if self._limit < 1 else count
        self._keys.append(self._random.uniform(0, self._limit, drawn))
        if drawn == count:
            return np.arange(count)
        return np.sort(self._random.choice(count, drawn, replace=False, shuffle=False))

    def add(self, rows: Array) -> None:
        """Add the rows that :meth:`draw` selected, ``(n, ...)``."""
        assert len(rows) == len(self._keys[-1])
        self._rows.append(np.array(rows))
        self._held += len(rows)
        if self._held > 2 * self.size:
            self._prune()

    @property
    def rows(self) -> Array:
        """The sample, in the order of the stream."""
        if not self._rows:
            return np.zeros(0)
        self._prune()
        return self._rows[0]

    def _prune(self) -> None:
        """Keep the rows with the lowest keys."""
        keys, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        if len(keys) > self.size:
            lowest = np.sort(np.argpartition(keys, self.size - 1)[: self.size])
            keys, rows = keys[lowest], rows[lowest]
            self._limit = float(keys.max())
        self._keys, self._rows, self._held = [keys], [rows], len(keys)
