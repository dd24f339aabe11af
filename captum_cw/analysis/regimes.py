"""The regime of each head, by how it selects keys: Retriever, Mixer or Reset.

Heads differ in how well their ``N`` keys with the most attention are separated from the others, and
in the attention they give to the first token (arXiv 2602.01893;
:mod:`~captum_cw.analysis.selection_geometry` has the equations). The names are the paper's. How
the paper assigns heads to them is not known to us, so the rule here is ours.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult, Array, settings_of
from captum_cw.analysis.selection_geometry import (
    attention_ranks,
    check_count,
    draw_queries,
    separation,
    terms_of,
)
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of
from captum_cw.functional import AttentionLayer

REGIMES = ("Retriever", "Mixer", "Reset")
MEASURED = ["precision", "recall", "f", "sink_similarity", "first_weight", "top_weight"]
CLUSTERED = ["precision", "recall", "sink_similarity", "first_weight"]
#: A head has a dominant sink if its mean weight on the first token is above this.
DOMINANT = 0.5


class HeadRegimes(AnalysisResult):
    """The regime of each head, by our rule.

    The plot shows the regime of each head by layer, and the heads by first-token weight and F.

    ``numbers``: the fraction of heads in each regime (``retriever``, ``mixer``, ``reset``), the
    number of regimes that have their full signature (``signatures``), and the ``silhouette`` of
    three clusters.

    ``tables``, with the main table first:

    * ``heads``, by ``layer`` and ``head``: the means over queries of ``precision``, ``recall``,
      ``f``, ``sink_similarity`` (``cos(v_1, s_N)``), ``first_weight`` (``a_1``) and ``top_weight``
      (the total weight of the ``N`` keys), ``output_norm`` (``||o_i^h||``, divided by the median of
      the layer's heads) and the ``regime``.
    * ``regimes``, for each regime: the number of ``heads``, the means of the same columns, and
      whether the cluster ``has_signature``.
    * ``clusters``: the mean ``silhouette`` (1 for distant clusters, 0 for touching clusters) of
      ``k`` clusters, ``k`` from 2 to 6.
    """


def head_regimes(
    model: nn.Module,
    batches: Batches,
    *,
    size: int = 8,
    queries: int | None = 32,
    seed: int = 0,
    show_progress: bool = False,
) -> HeadRegimes:
    """Assign each head to the regime Retriever, Mixer or Reset, by our rule.

    K-means finds three clusters by precision, recall, sink similarity and the weight of the first
    token, each standardised over all heads. The clusters are then named together so that the sum of
    their scores is largest. A score is the mean of standardised numbers (with ``-``, of their
    negatives):

    * Retriever: ``f``, ``-first_weight``;
    * Mixer: ``-precision``, ``-recall``, ``-top_weight``;
    * Reset: ``first_weight``, ``-output_norm``, where the norm ``x`` is taken as ``x / (1 + x)``.

    Three clusters always get three names, even if the model does not have three kinds of heads. So
    each cluster is checked for its signature, by its means: a Retriever has ``f`` above the mean of
    all heads and ``first_weight`` below 0.5; a Mixer has ``precision``, ``recall`` and
    ``top_weight`` below the means of all heads; a Reset has ``first_weight`` above 0.5 and
    ``output_norm`` below 1.

    Args:
        model: A causal language model.
        batches: Token ids, or an iterable of batches.
        size: The size ``N`` of the sets. Queries that see at most ``N`` keys are left out.
        queries: How many random queries of each text to use, the same in all layers; None uses all.
        seed: Random seed of the queries and of k-means.
        show_progress: Show a progress bar over the texts after two seconds.

    Returns:
        A :class:`HeadRegimes`.

    Raises:
        ValueError: If ``size`` or ``queries`` is invalid, a text or the window of a layer has at
            most ``size`` tokens, fewer than three heads differ, or the model is not causal.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = head_regimes(model, inputs, size=2)
        >>> result.to_dataframe()[["layer", "head"]].shape
        (8, 2)
        >>> result.tables["regimes"]["regime"].tolist()
        ['Retriever', 'Mixer', 'Reset']
    """
    check_count("size", size)
    texts = texts_of(batches, shortest=size + 1)
    drawn = draw_queries(texts, size, queries, seed)
    sums: dict[int, Any] = defaultdict(float)

    def on_layer(seen: SeenLayer) -> None:
        sums[seen.number] += head_sums(seen.layer, drawn[seen.text], size)

    layers = run_texts(model, texts, on_layer, show_progress=show_progress)
    tables = label_regimes(_heads_table(sums, layers, size), seed)
    regimes, clusters = tables["regimes"], tables["clusters"]
    shares = regimes.set_index("regime")["heads"] / len(tables["heads"])
    numbers = {name.lower(): float(share) for name, share in shares.items()}
    numbers["signatures"] = float(regimes["has_signature"].sum())
    numbers["silhouette"] = float(clusters.set_index("k")["silhouette"].get(3, float("nan")))
    settings = settings_of(texts, size=size, queries=queries, seed=seed, layers=layers)
    return HeadRegimes(settings, numbers, tables)


def head_sums(layer: AttentionLayer, queries: Tensor, size: int) -> Tensor:
    """Sum over some queries of a layer: the columns ``MEASURED``, the output norm, and the count.

    Returns:
        ``(H, 8)``, float64.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> head_sums(layer, torch.arange(3), 2).shape
        torch.Size([2, 8])
    """
    norms = layer.direction("intra")[1][0].double().sqrt()
    out = torch.zeros(layer.H, len(MEASURED) + 2, dtype=torch.float64, device=norms.device)
    for places, terms in terms_of(layer, queries):
        top, a = attention_ranks(terms) < size, terms.attention
        weights = [a[..., 0], (a * top).sum(-1)]
        columns = [*separation(terms, top), *weights, norms[:, places]]
        rows = torch.stack([*columns, torch.ones_like(columns[0])], dim=-1)
        out += rows.masked_fill((terms.seen <= size)[..., None], 0).sum(1)
    return out.cpu()


def _heads_table(sums: dict[int, Tensor], layers: list[str], size: int) -> pd.DataFrame:
    """Return a row for each head, with the means over queries."""
    parts = []
    for layer, total in sums.items():
        if not total[:, -1].all():
            raise ValueError(
                f"In layer {layers[layer]!r}, no query sees more than {size} keys: give a smaller "
                "size."
            )
        means = (total[:, :-1] / total[:, -1:]).numpy()
        part = pd.DataFrame(means, columns=[*MEASURED, "output_norm"])
        part.insert(0, "layer", layer)
        part.insert(1, "head", part.index)
        # If most heads of a layer have zero outputs, the median is zero.
        part["output_norm"] = (part["output_norm"] / part["output_norm"].median()).fillna(0)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def label_regimes(heads: pd.DataFrame, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Label the regime of each head, by our rule.

    :func:`captum_cw.analysis.head_regimes` states the rule.

    Args:
        heads: A row for each head, with the columns of the table ``heads`` except ``regime``.
        seed: Random seed of k-means.

    Returns:
        The tables of :class:`HeadRegimes`.

    Raises:
        ValueError: If fewer than three heads differ.
    """
    distinct = len(heads[CLUSTERED].drop_duplicates())
    if distinct < len(REGIMES):
        raise ValueError(
            f"Only {distinct} of {len(heads)} heads differ in what they select, but three regimes "
            "need at least three: give a model with more heads."
        )
    points = StandardScaler().fit_transform(heads[CLUSTERED])

    def clusters_of(k: int) -> Array:
        labels: Array = KMeans(k, n_init=10, random_state=seed).fit_predict(points)
        return labels

    names = _name_clusters(heads, clusters_of(len(REGIMES)))
    heads = heads.assign(regime=names)
    by_regime = heads.groupby("regime")
    regimes = by_regime[[*MEASURED, "output_norm"]].mean().loc[list(REGIMES)]
    every = heads[MEASURED].mean()
    retriever, mixer, reset = (regimes.loc[name] for name in REGIMES)
    regimes["has_signature"] = [
        retriever["f"] > every["f"] and retriever["first_weight"] < DOMINANT,
        all(mixer[name] < every[name] for name in ("precision", "recall", "top_weight")),
        reset["first_weight"] > DOMINANT and reset["output_norm"] < 1,
    ]
    regimes.insert(0, "heads", by_regime.size())
    ks = [k for k in range(2, 7) if k <= distinct and k < len(heads)]
    silhouettes = [float(silhouette_score(points, clusters_of(k))) for k in ks]
    clusters = pd.DataFrame({"k": ks, "silhouette": silhouettes})
    return {"heads": heads, "regimes": regimes.reset_index(), "clusters": clusters}


def _name_clusters(heads: pd.DataFrame, cluster: Array) -> list[str]:
    """Return the regime of each head: names the clusters so that the sum of our scores is largest.

    Args:
        heads: A row for each head.
        cluster: The cluster of each head, from 0 to 2.
    """
    measured = heads[[*MEASURED, "output_norm"]].copy()
    measured["output_norm"] = 1 - 1 / (1 + measured["output_norm"])
    standard = pd.DataFrame(StandardScaler().fit_transform(measured), columns=measured.columns)
    z = standard.groupby(cluster).mean()
    scores = [
        (z["f"] - z["first_weight"]) / 2,
        -(z["precision"] + z["recall"] + z["top_weight"]) / 3,
        (z["first_weight"] - z["output_norm"]) / 2,
    ]
    _, named = linear_sum_assignment(scores, maximize=True)
    names = dict(zip(named, REGIMES, strict=True))
    return [names[c] for c in cluster]
