"""The layers of one pass over some texts, each reduced as soon as it has run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from captum_cw import functional, measures
from captum_cw.capture import Execution
from captum_cw.capture.model import check_fits
from captum_cw.capture.run import expected_layers
from captum_cw.explanation.heads import FACTORS, HeadMaps, most_important
from captum_cw.functional import AttentionLayer, Measure, map_blocks
from captum_cw.measures import Entry
from captum_cw.text.prompts import leading

__all__ = ["Layers", "TextSums"]

CONTRIBUTION = functional.contribution("inter")


class TextSums:
    """What is kept of the layers for one text of ``T`` tokens.

    Args:
        measures: The functions of the explained measures.
        T: The number of tokens.
        K: The number of keys to keep for each query of each head.

    Attributes:
        scores: For each measure, one ``(T,)`` per layer: the mean over heads, or the sum if the
            measure is signed.
        maps: For each measure, the sum of the ``(T, T)`` maps of the layers.
        heads: The heads of each layer.
    """

    def __init__(self, measures: Mapping[Entry, Measure], T: int, K: int) -> None:
        self._measures, self.T, self.K = measures, T, K
        self.scores: dict[str, list[Tensor]] = {entry.name: [] for entry in measures}
        self.maps: dict[str, Tensor] = {}
        self.heads: list[HeadMaps] = []

    def begin(self, H: int, device: torch.device) -> None:
        """Begin a layer of ``H`` heads."""
        T, K = self.T, self.K
        if not self.maps:
            self.maps = {entry.name: _zeros(T, T) for entry in self._measures}
        totals = torch.zeros(len(self._measures), H, T, dtype=torch.float32, device=device)
        self._totals = {e.name: x for e, x in zip(self._measures, totals, strict=True)}
        self._keys, self._share = _zeros(H, T, K, dtype=torch.int32), _zeros(H, T)
        self._kept = {factor: _zeros(H, T, K) for factor in FACTORS}

    def add(
        self, blocks: Mapping[Hashable, Tensor], rows: slice, skipped: int, hidden: int
    ) -> None:
        """Add a block of queries of the layer.

        Args:
            blocks: By function, ``(H, t, n)``.
            rows: The queries, as the layer counts them.
            skipped: The number of queries before those of the text.
            hidden: The number of keys before those of the text.
        """
        first, stop = max(rows.start, skipped), min(rows.stop, skipped + self.T)
        if first >= stop:
            return
        queries = slice(first - skipped, stop - skipped)
        block = {key: x[:, first - rows.start : stop - rows.start] for key, x in blocks.items()}
        self._share[:, queries] = block[_key(CONTRIBUTION)].sum(-1).cpu().float()
        block = {key: x[..., hidden : hidden + self.T] for key, x in block.items()}
        for entry, function in self._measures.items():
            x = block[_key(function)]
            x = x if entry.signed else x.abs()
            self._totals[entry.name][:, : x.shape[-1]] += x.sum(1)
            self.maps[entry.name][queries, : x.shape[-1]] += _over_heads(entry, x)
        attention = block[_key(functional.attention)]
        best = most_important(attention, block[_key(CONTRIBUTION)], self.K)
        self._keys[:, queries, : best.shape[-1]] = best.cpu().int()
        for factor, function in FACTORS.items():
            x = block[_key(function)].gather(-1, best).cpu().float()
            self._kept[factor][:, queries, : best.shape[-1]] = x

    def end(self, name: str, counts: Tensor, norm: Tensor) -> None:
        """End a layer.

        Args:
            name: The name of the layer.
            counts: How many of the queries see each key, ``(H|1, T)``.
            norm: The norms of the layer's outputs, ``(T,)``.
        """
        for entry in self._measures:
            mean = self._totals[entry.name] / counts.clamp(min=1)
            self.scores[entry.name].append(_over_heads(entry, mean))
        norm = norm.cpu().float()
        kept = HeadMaps(name, self._keys, **self._kept, output_norm=norm, share=self._share)
        self.heads.append(kept)

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scores ``(T,)`` and the maps ``(T, T)``, averaged over layers."""
        scores = {name: torch.stack(x).mean(0) for name, x in self.scores.items()}
        return scores, {name: x / len(self.heads) for name, x in self.maps.items()}


class Layers:
    """Reduces the layers of a pass over texts that are padded on the right.

    Args:
        model: The model.
        lengths: The number of tokens of each text.
        top_k: The number of keys to keep for each query of each head.

    Attributes:
        texts: What is kept of each text.
        causal: Whether no layer lets the first query attend to later tokens.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int], top_k: int) -> None:
        self.model, self.T = model, max(lengths)
        self.measures = {e: e.function() for e in measures.explained() if e.scores_pairs}
        self.texts = [TextSums(self.measures, T, min(top_k, T)) for T in lengths]
        self.causal = True
        # A function that is asked for more than once is computed once.
        asked = [*FACTORS.values(), CONTRIBUTION, *self.measures.values()]
        self.functions = {_key(function): function for function in asked}

    def add(self, execution: Execution, layer: AttentionLayer) -> None:
        """Reduce a layer that has just run."""
        skipped, hidden = leading(execution, layer, self.T, None)
        device = layer.value.device
        if not self.texts[0].maps:
            self._check_memory(layer.H, expected_layers([self.model], [execution]))
        self.causal &= self.T == 1 or not layer.mask.sees(skipped, hidden + 1, device)
        for text in self.texts:
            text.begin(layer.H, device)
        chosen = None
        if skipped:
            chosen = torch.arange(layer.T, device=device).ge(skipped).expand(len(self.texts), -1)
        for rows, found in map_blocks(layer, *self.functions.values(), chosen=chosen):
            for b, text in enumerate(self.texts):
                blocks = {key: x[b] for key, x in zip(self.functions, found, strict=True)}
                text.add(blocks, rows, skipped, hidden)
        counts = layer.mask.counts(chosen, device)[..., hidden:]
        norm = layer.direction("inter")[1][:, 0].sqrt()
        if layer.scale is not None:
            norm = norm * layer.scale.abs()
        for b, text in enumerate(self.texts):
            of_text = counts[b if len(counts) > 1 else 0, :, : text.T]
            text.end(execution.name, of_text, norm[b, skipped : skipped + text.T])

    def _check_memory(self, H: int, layers: int) -> None:
        count = len(self.measures)
        # The mean over layers needs one more map.
        numbers = sum(
            (count + 1) * x.T**2 + layers * H * x.T * (x.K * (len(FACTORS) + 1) + 1)
            for x in self.texts
        )
        T, K = self.T, max(x.K for x in self.texts)
        check_fits(
            4 * numbers,
            torch.device("cpu"),
            f"{count} maps of {T} x {T}, and {K} keys for {T} queries in {layers} x {H} heads",
            "Keep fewer keys (top_k=0 keeps no heads), or use TokenScores, which never holds a "
            "map.",
        )


def _zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype, device="cpu")


def _key(function: Measure) -> Hashable:
    """Return the same key for functions of a layer that compute the same."""
    if isinstance(function, partial) and function.func.__module__ == functional.__name__:
        return function.func, function.args
    return function


def _over_heads(entry: Entry, x: Tensor) -> Tensor:
    """Sum a signed measure over heads, and average any other."""
    return (x.sum(0) if entry.signed else x.mean(0)).cpu().float()
