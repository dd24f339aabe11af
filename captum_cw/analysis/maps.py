"""Attention maps, contribution maps and their factors, for a few heads (Figs. 1, 2, 12-14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult
from captum_cw.analysis.streaming import Batches, texts_of
from captum_cw.attr import ContributionWeights
from captum_cw.capture.model import device_of

if TYPE_CHECKING:
    from captum_cw.visualization._output import Picture

PARTS = ("attention", "relative norm", "cosine", "contribution")


class WeightMaps(AnalysisResult):
    """The maps of some heads over the start of a text.

    Attributes:
        settings: Include the ``"tokens"`` of the text and the ``"pairs"`` of layer and head.
        numbers: ``"first: attention"`` and ``"first: contribution"``, the mean weight of these
            heads on the first token.
        tables: ``"maps"``: the factors and the ``contribution``, by ``layer``, ``head``, ``query``
            and ``key``.
    """

    def plot(self, *, paper_scale: bool = False, use_pyplot: bool = True) -> Picture:
        """Plot attention above contribution, with a column for each head (Figs. 1, 12-14).

        Args:
            paper_scale: Use the colour scales of the paper, [0, 1] and [-0.01, 0.15].
            use_pyplot: Make a pyplot figure, which notebooks show.
        """
        from captum_cw.visualization import plot_attention_and_contribution

        return plot_attention_and_contribution(
            self._layers("attention"),
            self._layers("contribution"),
            self.settings["tokens"],
            pairs=self.settings["pairs"],
            paper_scale=paper_scale,
            quantile=1.0 if paper_scale else 0.99,
            use_pyplot=use_pyplot,
        )

    def plot_factors(self, *, use_pyplot: bool = True) -> Picture:
        """Plot the factors and the contribution of the first head, in four panels."""
        from captum_cw.visualization import plot_decomposition

        layer, head = self.settings["pairs"][0]
        return plot_decomposition(
            [self._layers(part)[layer] for part in PARTS],
            self.settings["tokens"],
            head=head,
            quantile=0.99,
            use_pyplot=use_pyplot,
        )

    def _layers(self, part: str) -> list[Tensor]:
        """Return the maps by layer, ``(1, H, T, T)`` each, with zeros for heads without a map."""
        table, T = self.to_dataframe(), len(self.settings["tokens"])
        maps = np.zeros((table["layer"].max() + 1, 1, table["head"].max() + 1, T, T))
        maps[table["layer"], 0, table["head"], table["query"], table["key"]] = table[part]
        return list(torch.from_numpy(maps))


def weight_maps(
    model: nn.Module,
    batches: Batches,
    *,
    tokens: Sequence[str] | None = None,
    length: int = 48,
    count: int = 4,
    seed: int = 0,
) -> WeightMaps:
    """Compute the attention and contribution maps of some heads, over the start of the first text.

    Args:
        model: A model whose layers all have the same sequence length.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
        tokens: Readable tokens of the first text. By default, tokens are named by position.
        length: The maximum number of tokens to show.
        count: How many heads to draw at random. They are from different layers where possible;
            if the model has fewer heads, all are shown.
        seed: Random seed.

    Raises:
        ValueError: If a text has fewer than two tokens, ``tokens`` are fewer than the tokens
            shown, ``length`` is below 2, or ``count`` is below 1.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> weight_maps(model, inputs, count=1).to_dataframe().shape
        (36, 8)
    """
    if length < 2 or count < 1:
        raise ValueError(f"length={length}, count={count}: give two or more tokens, and a head.")
    ids = texts_of(batches)[0][:length]
    T = len(ids)
    if tokens is not None and len(tokens) < T:
        raise ValueError(f"tokens has {len(tokens)} names, but {T} tokens are shown.")
    layers = ContributionWeights(model).decompose(ids[None].to(device_of(model)))
    pairs = _draw_heads([x.attention.shape[1] for x in layers], count, seed)
    query, key = np.divmod(np.arange(T * T), T)
    maps = []
    for layer, head in pairs:
        columns = {"layer": layer, "head": head, "query": query, "key": key}
        for part, x in zip(PARTS, layers[layer], strict=True):
            columns[part] = x[0, head].flatten().cpu().double().numpy()
        maps.append(pd.DataFrame(columns))
    table = pd.concat(maps, ignore_index=True)
    first = table[table.key == 0].mean()
    numbers = {f"first: {part}": float(first[part]) for part in ("attention", "contribution")}
    names = [str(x) for x in (range(T) if tokens is None else tokens[:T])]
    settings = {"tokens": names, "pairs": [list(pair) for pair in pairs], "seed": seed}
    return WeightMaps(settings, numbers, {"maps": table})


def _draw_heads(heads: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Draw different heads, from every layer once before any layer twice; sorted by layer.

    Args:
        heads: The number of heads of each layer.
        count: How many heads to draw.
        seed: Random seed.
    """
    random = np.random.default_rng(seed)
    rounds = [
        (turn, random.random(), layer, int(head))
        for layer, H in enumerate(heads)
        for turn, head in enumerate(random.permutation(H))
    ]
    return sorted((layer, head) for _, _, layer, head in sorted(rounds)[:count])
