"""Attention as a selection of ``N`` keys: how far these keys are separated from the others.

For each layer, head and query, the ``N`` keys with the largest weights are compared with the rest
by precision, recall and F in value space (arXiv 2602.01893;
:mod:`~captum_cw.analysis.selection_geometry` has the equations), for several ``N``. A single key
always has an F of one around itself. So results are only meaningful next to those of random sets
of the same size, around their own sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult, Array, settings_of
from captum_cw.analysis.selection_geometry import (
    Distance,
    Separation,
    Terms,
    attention_ranks,
    check_count,
    draw_queries,
    random_ranks,
    separation,
    terms_of,
)
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of
from captum_cw.functional import check_choice

SETS = ("top", "random")
MEANS = ["precision", "recall", "f", "sink_similarity"]
PRODUCTS = ["similarity_squared", "recall_squared", "similarity_recall"]
#: Contexts of ``2^k + 1`` to ``2^(k + 1)`` keys form a bin, for ``k`` below this.
CONTEXT_BINS = 32


class TokenSelection(AnalysisResult):
    """The separation of the keys with the most attention from other keys, by number of keys.

    The plot shows separation by size, the excess, the best size, and sinks against recall.

    ``numbers``: ``best_size`` is the size above one with the largest excess, ``F - F of random
    sets`` (the smaller size if two are equal), with its ``best_excess``, ``best_f`` and
    ``best_f_random``. At this size, ``sink_recall_r`` and ``sink_recall_r_random`` are the Pearson
    correlation of sink similarity and recall over all sets, and ``sink_recall_r_heads`` is that
    over the means of heads. ``largest_f_size`` is the size above one with the largest F. The paper
    does not say which of the two sizes it calls best. The excess is our rule, because F also falls
    with the size for random sets. If the best size is the largest one measured, larger sizes may be
    better.

    ``tables``, with the main table first:

    * ``sizes``, by ``size`` and ``set`` (``"top"`` or ``"random"``): the number of ``sets``, the
      means ``precision``, ``recall``, ``f`` and ``sink_similarity``, and the correlations
      ``sink_recall_r`` and ``sink_recall_r_heads``. Larger sizes have fewer queries.
    * ``heads``: the same means by ``layer``, ``head``, ``size`` and ``set``.
    * ``contexts``, by the number of keys that a query sees (more than ``above``, at most ``up_to``)
      and ``size``: the number of ``queries`` (over layers and heads), ``f``, ``f_random`` and
      ``excess``. All sizes of a context have the same queries.
    * ``best``, for each context: the best ``size`` and its ``excess``, and ``largest_f_size`` and
      its ``f``.

    Correlations are NaN if one variable is constant.
    """


def token_selection(
    model: nn.Module,
    batches: Batches,
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    distance: Distance = "euclidean",
    queries: int | None = 32,
    random_sets: int = 16,
    seed: int = 0,
    show_progress: bool = False,
) -> TokenSelection:
    """Compute how well the ``N`` keys with the most attention are separated from the other keys.

    A query counts for all sizes below the number of keys that it sees. Sizes without queries are
    left out. In a causal model, a query that sees ``T`` keys is the last query of the prefix of
    ``T`` tokens, so the best size by ``T`` needs no extra runs. Sink similarity is ``cos(v_1,
    s_N)`` by our definition: the paper's formula and its bounds are not known to us.

    Args:
        model: A causal language model.
        batches: Token ids, or an iterable of batches.
        sizes: The sizes ``N`` of the sets. At least one is above 1.
        distance: ``"euclidean"`` or ``"cosine"``.
        queries: How many random queries of each text to use, the same in all layers; None uses all.
        random_sets: How many random sets to draw for each query and size, from the keys that the
            query sees. The heads of a layer share them.
        seed: Random seed of the queries and the random sets.
        show_progress: Show a progress bar over the texts after two seconds.

    Returns:
        A :class:`TokenSelection`.

    Raises:
        ValueError: If ``sizes``, ``queries``, ``random_sets`` or ``distance`` is invalid, a text or
            the window of every layer has no more tokens than the smallest size above 1, or the
            model is not causal.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = token_selection(model, inputs, sizes=(1, 2), queries=None)
        >>> result.to_dataframe()[["size", "set", "sets"]].values.tolist()
        [[1, 'random', 640], [1, 'top', 40], [2, 'random', 512], [2, 'top', 32]]
        >>> result.tables["best"].columns.tolist()
        ['above', 'up_to', 'size', 'excess', 'largest_f_size', 'f']
    """
    sizes = _validate_sizes(sizes)
    check_choice("distance", distance, Distance)
    check_count("random_sets", random_sets)
    least = next(size for size in sizes if size > 1)
    texts = texts_of(batches, shortest=least + 1)
    drawn = draw_queries(texts, sizes[0], queries, seed)
    totals: dict[int, Any] = defaultdict(float)

    def on_layer(seen: SeenLayer) -> None:
        state = np.random.SeedSequence([seed, seen.text, seen.number]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        for _, terms in terms_of(seen.layer, drawn[seen.text]):
            totals[seen.number] += selection_sums(terms, sizes, distance, random_sets, generator)

    layers = run_texts(model, texts, on_layer, show_progress=show_progress)
    table = _sums_table(totals, sizes)
    if not (table["size"] > 1).any():
        raise ValueError(
            f"No query sees more than {least} keys: give smaller sizes than {list(sizes)}."
        )
    tables = _tables(table)
    settings = settings_of(
        texts,
        sizes=list(sizes),
        distance=distance,
        queries=queries,
        seed=seed,
        random_sets=random_sets,
        layers=layers,
    )
    return TokenSelection(settings, _numbers(tables["sizes"]), tables)


def selection_sums(
    terms: Terms,
    sizes: Sequence[int],
    distance: Distance,
    random_sets: int,
    generator: torch.Generator,
) -> Tensor:
    """Sum the separation of the sets of some queries, by context, for means and correlations.

    Args:
        terms: The terms of the queries.
        sizes: The sizes of the sets.
        distance: ``"euclidean"`` or ``"cosine"``.
        random_sets: How many random sets to draw for each query and size.
        generator: The random generator for these sets.

    Returns:
        ``(2, sizes, H, contexts, 8)``, for the sets with the most attention and the random sets.
        The last dimension holds the sums of precision, recall, F, sink similarity, the squares of
        similarity and recall and their product, and the number of sets.
    """
    H, Q, _ = terms.attention.shape
    # frexp is exact for powers of two; a logarithm might round to the wrong bin.
    context = torch.frexp((terms.seen - 1).double().clamp(min=1))[1] - 1
    context = torch.nn.functional.one_hot(context.long(), CONTEXT_BINS).double().expand(H, Q, -1)
    out = context.new_zeros(2, len(sizes), H, CONTEXT_BINS, len(MEANS) + len(PRODUCTS) + 1)
    top = attention_ranks(terms)
    orders = [random_ranks(terms.visible, generator) for _ in range(random_sets)]
    for n, size in enumerate(sizes):
        counts = terms.seen > size
        if not counts.any():
            continue
        for kind, ranks in enumerate(([top], orders)):
            sets = [_summands(separation(terms, order < size, distance)) for order in ranks]
            total = torch.stack(sets).sum(0).masked_fill(~counts[..., None], 0)
            out[kind, n] = context.transpose(-1, -2) @ total
    return out.cpu()


def _summands(apart: Separation) -> Tensor:
    """Return the terms of the means and the correlation, and a one: ``(H, Q, 8)``."""
    _, recall, _, similarity = apart
    products = (similarity.square(), recall.square(), similarity * recall)
    return torch.stack([*apart, *products, torch.ones_like(recall)], dim=-1)


def _validate_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Validate the sizes and sort them."""
    for size in sizes:
        check_count("a size", size)
    if max(sizes, default=1) == 1:
        raise ValueError(
            f"sizes={list(sizes)}: a single key always has an F of one; give larger sizes too."
        )
    return tuple(sorted(set(sizes)))


def _sums_table(totals: Mapping[int, Tensor], sizes: Sequence[int]) -> pd.DataFrame:
    """Return a row for each set, size, layer, head and context that has queries."""
    parts = []
    for layer, total in totals.items():
        kind, size, head, context = place = np.nonzero(total[..., -1].numpy())
        part = pd.DataFrame(total.numpy()[place], columns=[*MEANS, *PRODUCTS, "sets"])
        sets, of_size = np.array(SETS)[kind], np.array(sizes)[size]
        parts.append(part.assign(set=sets, size=of_size, layer=layer, head=head, above=2**context))
    return pd.concat(parts, ignore_index=True)


def _group_means(sums: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Return the means of each group, and ``sink_recall_r`` over its sets."""
    means = sums.groupby(list(by))[[*MEANS, *PRODUCTS, "sets"]].sum().reset_index()
    means[MEANS + PRODUCTS] = means[MEANS + PRODUCTS].div(means["sets"], axis=0)
    means["sets"] = means["sets"].astype(int)
    x, y = means["sink_similarity"], means["recall"]
    variances = (means["similarity_squared"] - x**2), (means["recall_squared"] - y**2)
    # A smaller variance is rounding error.
    x_variance, y_variance = (v.where(v > 1e-12) for v in variances)
    covariance = means["similarity_recall"] - x * y
    means["sink_recall_r"] = (covariance / (x_variance * y_variance) ** 0.5).clip(-1, 1)
    return means[[*by, "sets", *MEANS, "sink_recall_r"]]


def _tables(sums: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of the result."""
    heads = _group_means(sums, "layer", "head", "size", "set").drop(columns="sink_recall_r")
    by_size = _group_means(sums, "size", "set")
    by_size["sink_recall_r_heads"] = [
        _pearson(rows["sink_similarity"].to_numpy(), rows["recall"].to_numpy())
        for _, rows in heads.groupby(["size", "set"])
    ]
    # Only sizes for which all queries of a context count.
    inside = _group_means(sums[sums["size"] <= sums["above"]], "above", "size", "set")
    contexts = _compare_with_random(inside, "above", "size").reset_index()
    contexts.insert(1, "up_to", 2 * contexts["above"])
    return {"sizes": by_size, "heads": heads, "contexts": contexts, "best": _best_sizes(contexts)}


def _best_sizes(contexts: pd.DataFrame) -> pd.DataFrame:
    """Return the best size of each context, by the excess (our rule) and by F."""
    above_one = contexts[contexts["size"] > 1]
    by_context = above_one.groupby("above")
    best = above_one.loc[by_context["excess"].idxmax()]
    by_f = above_one.loc[by_context["f"].idxmax(), ["above", "size", "f"]]
    by_f = by_f.rename(columns={"size": "largest_f_size"})
    return best[["above", "up_to", "size", "excess"]].merge(by_f, on="above")


def _compare_with_random(means: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Return ``queries``, ``f``, ``f_random`` and ``excess`` of each group."""
    top, random = (means[means["set"] == kind].set_index(list(by)) for kind in SETS)
    compared = top[["sets", "f"]].rename(columns={"sets": "queries"})
    return compared.assign(f_random=random["f"], excess=top["f"] - random["f"])


def _pearson(x: Array, y: Array) -> float:
    """Compute Pearson's r; NaN if a variable is constant or there are fewer than two values."""
    if len(x) < 2 or np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return float("nan")
    return float(pearsonr(x, y).statistic)


def _numbers(by_size: pd.DataFrame) -> dict[str, float]:
    """Return the headline numbers."""
    compared = _compare_with_random(by_size[by_size["size"] > 1], "size")
    size = compared["excess"].idxmax()
    best = compared.loc[size]
    top, random = (by_size[by_size["size"] == size].set_index("set").loc[kind] for kind in SETS)
    return {
        "best_size": float(size),
        "best_excess": float(best["excess"]),
        "best_f": float(best["f"]),
        "best_f_random": float(best["f_random"]),
        "largest_f_size": float(compared["f"].idxmax()),
        "sink_recall_r": float(top["sink_recall_r"]),
        "sink_recall_r_random": float(random["sink_recall_r"]),
        "sink_recall_r_heads": float(top["sink_recall_r_heads"]),
    }
