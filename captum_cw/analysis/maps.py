"""Attention maps, contribution maps and their factors, for a few heads (Figs. 1, 2, 12-14)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult, Picture
from captum_cw.analysis.streaming import Batches, texts_of
from captum_cw.attr import ContributionWeights
from captum_cw.capture.model import device_of

__all__ = ["WeightMaps", "weight_maps"]

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

        maps = self._maps_by_pair()
        pairs = self.settings["pairs"]
        return plot_attention_and_contribution(
            [x["attention"] for x in maps],
            [x["contribution"] for x in maps],
            self.settings["tokens"],
            pairs=[(n, head) for n, (_, head) in enumerate(pairs)],
            layer_names=[f"layer {layer}" for layer, _ in pairs],
            paper_scale=paper_scale,
            quantile=1.0 if paper_scale else 0.99,
            use_pyplot=use_pyplot,
        )

    def plot_factors(self, *, use_pyplot: bool = True) -> Picture:
        """Plot the factors and the contribution of the first head, in four panels."""
        from captum_cw.visualization import plot_decomposition

        maps = self._maps_by_pair()[0]
        return plot_decomposition(
            [maps[part] for part in PARTS],
            self.settings["tokens"],
            head=self.settings["pairs"][0][1],
            quantile=0.99,
            use_pyplot=use_pyplot,
        )

    def _maps_by_pair(self) -> list[dict[str, Tensor]]:
        """Return the maps of each pair by name.

        Each map has shape ``(1, head + 1, T, T)``, and only its last head is filled.
        """
        T = len(self.settings["tokens"])
        table = self.to_dataframe()
        found = []
        for layer, head in self.settings["pairs"]:
            rows = table[(table["layer"] == layer) & (table["head"] == head)]
            maps = {
                part: torch.zeros(1, head + 1, T, T, dtype=torch.float64, device="cpu")
                for part in PARTS
            }
            for part, x in maps.items():
                x[0, head] = x.new_tensor(rows[part].to_numpy()).view(T, T)
            found.append(maps)
        return found


def weight_maps(
    model: nn.Module,
    batches: Batches,
    *,
    tokens: Sequence[str] | None = None,
    length: int = 48,
    count: int = 4,
    pairs: Sequence[tuple[int, int]] | None = None,
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
        pairs: Pairs of layer and head to show instead, both counted from 0.
        seed: Random seed.

    Raises:
        IndexError: If a layer or head does not exist.
        ValueError: If a text has fewer than two tokens, ``tokens`` are fewer than the tokens
            shown, ``length`` is below 2, ``count`` is below 1, or ``pairs`` is empty.

    Example:
        >>> weight_maps(model, input_ids, pairs=[(0, 1)]).to_dataframe().shape
        (25, 8)
    """
    import pandas as pd

    if length < 2 or count < 1 or (pairs is not None and not len(pairs)):
        raise ValueError(
            f"length={length}, count={count}, pairs={pairs}: give at least two tokens and one head."
        )
    ids = texts_of(batches)[0][:length]
    if tokens is not None and len(tokens) < len(ids):
        raise ValueError(f"tokens has {len(tokens)} names, but {len(ids)} tokens are shown.")
    device = device_of(model)
    layers = ContributionWeights(model).decompose(ids[None].to(device))
    heads = [x.attention.shape[1] for x in layers]
    if pairs is None:
        chosen = _draw_heads(heads, count, seed)
    else:
        chosen = list(dict.fromkeys((int(n), int(head)) for n, head in pairs))
    for layer, head in chosen:
        if not 0 <= layer < len(layers) or not 0 <= head < heads[layer]:
            raise IndexError(
                f"pair {(layer, head)}: the model has {len(layers)} layers of {max(heads)} heads."
            )
    T = len(ids)
    query, key = np.divmod(np.arange(T * T), T)
    parts = []
    for layer, head in chosen:
        maps = {
            name: x[0, head].flatten().cpu().double().numpy()
            for name, x in zip(PARTS, layers[layer], strict=True)
        }
        parts.append(
            pd.DataFrame({"layer": layer, "head": head, "query": query, "key": key, **maps})
        )
    table = pd.concat(parts, ignore_index=True)
    first = table[table.key == 0]
    by_head = {name: float(first[name].mean()) for name in ("attention", "contribution")}
    names = [str(n) for n in range(T)] if tokens is None else [str(x) for x in tokens[:T]]
    settings = {"tokens": names, "pairs": [list(pair) for pair in chosen], "seed": seed}
    return WeightMaps(settings, {f"first: {n}": x for n, x in by_head.items()}, {"maps": table})


def _draw_heads(heads: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Draw different heads, from every layer once before any layer twice; sorted by layer."""
    random = np.random.default_rng(seed)
    rounds = [
        (turn, random.random(), layer, int(head))
        for layer, several in enumerate(heads)
        for turn, head in enumerate(random.permutation(several))
    ]
    return sorted((layer, head) for _, _, layer, head in sorted(rounds)[:count])
