"""Measurements of what a theory of token selection assumes.

The bounds of arXiv 2602.01893 rest on three assumptions: values have stable norms, except for a
smaller first one; their similarity decays exponentially with distance; and attention by rank is
piecewise. The paper's constants and bounds are not known to us. How far each assumption holds is
measured here by our rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import curve_fit
from sklearn.metrics import r2_score
from torch import Tensor, nn

from captum_cw.analysis.components import r2
from captum_cw.analysis.result import AnalysisResult, Array, settings_of
from captum_cw.analysis.selection_geometry import draw_queries, terms_of
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of

#: The ranks that a two-piece fit needs: twice its four parameters.
MIN_RANKS = 8
FORMS = ("exponential", "exponential + constant")


class SelectionAssumptions(AnalysisResult):
    """A check of the assumptions of the theory, by rules of our own.

    The plot shows value norms by layer, similarity by distance and attention by rank, with fits.

    ``numbers``: the medians over layers and heads of ``value_norm_cv`` and ``first_over_mean``, and
    the fraction of heads with a ``compressed_first`` value (smaller than the mean). For the
    similarity by distance: ``similarity_length`` in tokens, ``similarity_r2`` (exponential) and
    ``similarity_r2_constant`` (exponential plus a constant). For the attention profile:
    ``one_piece_r2``, ``two_piece_r2``, ``break_rank``, and ``two_piece_gain``, the median over
    heads of the difference of the two R2.

    ``tables``, with the main table first:

    * ``value_norms``, by ``layer`` and key-value ``head``, over the values of all tokens but the
      first: the ``mean`` norm and its coefficient of variation ``cv``; and ``first_over_mean``, the
      first token's norm divided by that mean.
    * ``similarity``, by ``distance`` in tokens: the mean ``cosine`` of two values over layers,
      heads and texts, the number of ``pairs`` per head, and the value of each fit.
    * ``similarity_fits``, for the mean over layers (``layer`` -1), each layer and each ``form``:
      ``amplitude * exp(-distance / length) + constant`` and its ``r2``.
    * ``profile``, by ``rank``: the mean ``weight`` of the key of that rank over layers, heads and
      queries, and the value of each fit.
    * ``profile_fits``, for that mean (``layer`` and ``head`` -1) and each head: ``one_piece_r2``,
      ``two_piece_r2``, ``break_rank`` and the slopes ``slope``, ``slope_before``, ``slope_after``.

    A fit is NaN if it is not possible.
    """


def selection_assumptions(
    model: nn.Module,
    batches: Batches,
    *,
    queries: int | None = 32,
    seed: int = 0,
    show_progress: bool = False,
) -> SelectionAssumptions:
    """Measure value norms, similarity by distance and attention by rank, by our rules.

    The rules:

    * Values are ``v_j``, before ``W_O``, of each key-value head. The first token is left out of
      norms and similarities, and compared with the others.
    * The fits to similarity weight each distance by its number of pairs, and so does their R2. A
      constant has an R2 of 0.
    * The profile is the mean of a row's weights by rank. It has half as many ranks as the shortest
      text has tokens, and is over queries that see at least as many keys, so that all ranks have
      the same queries. The fits are to its logarithm by the logarithm
      of the rank: one straight line, or two lines that meet at the rank that fits best. Two lines
      can never fit worse than one, so only the difference is meaningful. All ranks have the same
      weight, so the many late ranks count most.

    Args:
        model: A causal language model.
        batches: Token ids, or an iterable of batches. Texts need 16 or more tokens.
        queries: How many random queries of each text to use for the profile; None uses all.
        seed: Random seed of the queries.
        show_progress: Show a progress bar over the texts after two seconds.

    Returns:
        A :class:`SelectionAssumptions`.

    Raises:
        ValueError: If a text is too short, ``queries`` is invalid, the window of every layer has
            fewer keys than the profile has ranks, or the model is not causal.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris " * 4, return_tensors="pt")
        >>> result = selection_assumptions(model, inputs, queries=None)
        >>> result.to_dataframe().columns.tolist()
        ['layer', 'head', 'mean', 'cv', 'first_over_mean']
        >>> result.tables["profile"]["rank"].tolist()
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    """
    texts = texts_of(batches, shortest=2 * MIN_RANKS)
    ranks = min(map(len, texts)) // 2
    drawn = draw_queries(texts, ranks - 1, queries, seed)
    lags = max(map(len, texts)) - 2
    norms, similarity, profiles = (defaultdict[int, Any](float) for _ in range(3))

    def on_layer(seen: SeenLayer) -> None:
        value = seen.layer.value[0].double()
        norms[seen.number] += norm_sums(value)
        similarity[seen.number] += similarity_sums(value[:, 1:], lags)
        for _, terms in terms_of(seen.layer, drawn[seen.text]):
            profiles[seen.number] += profile_sums(terms.attention, terms.seen, ranks)

    layers = run_texts(model, texts, on_layer, show_progress=show_progress)
    if not any(profile[:, -1].any() for profile in profiles.values()):
        raise ValueError(f"No query sees {ranks} keys, half of the shortest text: cut the texts.")
    pairs = np.array(
        [sum(max(len(ids) - 1 - lag, 0) for ids in texts) for lag in range(1, lags + 1)]
    )
    tables = {
        "value_norms": _norms_table(norms),
        **_similarity_tables(similarity, pairs),
        **_profile_tables(profiles),
    }
    settings = settings_of(texts, ranks=ranks, queries=queries, seed=seed, layers=layers)
    return SelectionAssumptions(settings, _numbers(tables), tables)


def norm_sums(value: Tensor) -> Tensor:
    """Sum the norms of values ``(H_kv, T, d_h)``, with the first token apart.

    Returns:
        ``(H_kv, 5)``: the number of later tokens, the sum of their norms and of their squared
        norms, the norm of the first token, and a one.

    Example:
        >>> norm_sums(torch.tensor([[[1.0], [2.0], [4.0]]])).tolist()
        [[2.0, 6.0, 20.0, 1.0, 1.0]]
    """
    norms = value.norm(dim=-1)
    later, ones = norms[:, 1:], torch.ones_like(norms)
    parts = [ones[:, 1:].sum(1), later.sum(1), later.square().sum(1), norms[:, 0], ones[:, 0]]
    return torch.stack(parts, dim=1).cpu()


def similarity_sums(value: Tensor, lags: int) -> Tensor:
    """Compute ``sum_i cos(v_i, v_(i + lag))`` for the lags ``1, ..., lags``.

    This is the autocorrelation of the unit vectors: the inverse Fourier transform of their power
    spectrum. It needs no map of all pairs.

    Args:
        value: ``(H_kv, T, d_h)``. The cosine with a zero value is zero.
        lags: The number of lags. Lags beyond the text are zero.

    Returns:
        ``(H_kv, lags)``.

    Example:
        >>> value = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
        >>> similarity_sums(value, 2).abs().round(decimals=6).tolist()
        [[1.0, 0.0]]
    """
    T = value.shape[1]
    unit = torch.nn.functional.normalize(value, dim=-1)
    # Padding to twice the length keeps the end from wrapping around to the start.
    power = torch.fft.rfft(unit, 2 * T, dim=1).abs().square().sum(-1)
    products = torch.fft.irfft(power, 2 * T, dim=1)[:, 1 : min(T, lags + 1)]
    return torch.nn.functional.pad(products, (0, lags - products.shape[1])).cpu()


def profile_sums(attention: Tensor, seen: Tensor, ranks: int) -> Tensor:
    """Sum the attention weights by rank, over queries that see at least ``ranks`` keys.

    Args:
        attention: ``(H, Q, S)``.
        seen: The number of keys that each query sees, ``(H or 1, Q)``.
        ranks: The number of ranks.

    Returns:
        ``(H, ranks + 1)``; the last column is the number of queries.

    Example:
        >>> profile_sums(torch.tensor([[[0.2, 0.5, 0.3]]]), torch.tensor([[3]]), 2).tolist()
        [[0.5, 0.30..., 1.0]]
    """
    counts = (seen >= ranks)[..., None].expand(*attention.shape[:2], 1)
    if attention.shape[-1] < ranks:  # then every query sees too few keys
        return torch.zeros(len(attention), ranks + 1, dtype=torch.float64, device="cpu")
    top = attention.topk(ranks, dim=-1).values
    return (torch.cat([top, torch.ones_like(top[..., :1])], -1) * counts).sum(1).cpu()


def fit_decay(distance: Array, cosine: Array, pairs: Array, *, constant: bool) -> Array:
    """Fit ``amplitude * exp(-distance / length) + constant`` by least squares, weighted by pairs.

    Args:
        distance: ``(n,)``.
        cosine: The mean cosine at each distance, ``(n,)``.
        pairs: The number of pairs at each distance, ``(n,)``.
        constant: Fit a constant too.

    Returns:
        Amplitude, length, constant and R2. They are NaN if there are too few distances, or the
        cosine is constant.
    """
    parameters = 3 if constant else 2
    best = np.full(4, np.nan)
    if len(distance) <= parameters or not np.ptp(cosine) > 1e-12:
        return best

    def decay(x: Array, amplitude: float, length: float, level: float = 0.0) -> Array:
        return amplitude * np.exp(-x / length) + level

    far = float(distance.max())
    low, high = [-2.0, 1e-2, -1.0], [2.0, 1e3 * far, 1.0]
    for length in (1.0, far**0.5, far):  # local minima: the result depends on the start
        start = [cosine[0] - (cosine[-1] if constant else 0), length, cosine[-1]]
        try:
            fit, _ = curve_fit(
                decay,
                distance,
                cosine,
                np.clip(start, low, high)[:parameters],
                sigma=pairs**-0.5,
                bounds=(low[:parameters], high[:parameters]),
                max_nfev=2000,
            )
        except RuntimeError:  # did not converge from this start
            continue
        score = r2_score(cosine, decay(distance, *fit), sample_weight=pairs)
        if not score <= best[3]:
            best = np.array([*fit[:2], fit[2] if constant else 0.0, score])
    return best


class LogLogFits(NamedTuple):
    """The fits of one and of two lines to logarithms; ``fitted`` has the weights, ``(2, n)``."""

    one_piece_r2: float
    two_piece_r2: float
    break_rank: float
    slope: float
    slope_before: float
    slope_after: float
    fitted: Array


def fit_profile(weights: Array) -> LogLogFits:
    """Fit one line, and two lines that meet, to ``log weight`` by ``log rank``.

    Args:
        weights: The weights by rank, ``(n,)``. The fit uses the ranks before the first zero weight.
            The fits are NaN if fewer than 8 ranks are left, or all weights are equal.

    Example:
        >>> rank = np.arange(1.0, 33)
        >>> fits = fit_profile(np.where(rank < 8, 1 / rank, 8 / rank**2))
        >>> round(fits.break_rank), round(fits.slope_before, 3), round(fits.slope_after, 3)
        (8, -1.0, -2.0)
    """
    positive = int((weights > 0).cumprod().sum())
    fitted = np.full((2, len(weights)), np.nan)
    x, y = np.log(np.arange(1, positive + 1)), np.log(weights[:positive])
    if positive < MIN_RANKS or np.ptp(y) < 1e-10:
        return LogLogFits._make([*[float("nan")] * 6, fitted])

    def fit(*columns: Array) -> tuple[float, Array, Array]:
        design = np.stack([np.ones(positive), *columns], axis=1)
        coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
        line = design @ coefficients
        return r2(y, line), coefficients, line

    one_r2, (_, slope), one_line = fit(x)
    two_r2, (_, before, change), two_line, place = max(
        ((*fit(x, np.maximum(x - x[k], 0)), k) for k in range(1, positive - 1)),
        key=lambda fitted: fitted[0],
    )
    fitted[:, :positive] = np.exp([one_line, two_line])
    slopes = float(slope), float(before), float(before + change)
    return LogLogFits(one_r2, two_r2, place + 1.0, *slopes, fitted)


def _norms_table(norms: Mapping[int, Tensor]) -> pd.DataFrame:
    """Return a row for each layer and key-value head, from the :func:`norm_sums` of each layer."""
    parts = []
    for layer, sums in norms.items():
        count, total, squares, first, texts = sums.numpy().T
        part = pd.DataFrame({"layer": layer, "head": range(len(count)), "mean": total / count})
        size = part["mean"].where(part["mean"] > 0)  # NaN for a head whose values are all zero
        variance = np.maximum(squares / count - part["mean"] ** 2, 0)
        parts.append(part.assign(cv=variance**0.5 / size, first_over_mean=first / texts / size))
    return pd.concat(parts, ignore_index=True)


def _similarity_tables(similarity: Mapping[int, Tensor], pairs: Array) -> dict[str, pd.DataFrame]:
    """Return the mean cosine by distance, and the fits by layer.

    Args:
        similarity: The :func:`similarity_sums` of each layer.
        pairs: The number of pairs of each head, by distance.
    """
    distance = np.arange(1.0, len(pairs) + 1)
    sums = {-1: torch.cat([*similarity.values()]), **similarity}
    means = {layer: heads.mean(0).numpy() / pairs for layer, heads in sums.items()}
    curve = {"distance": distance.astype(int), "cosine": means[-1], "pairs": pairs}
    rows = []
    for (layer, cosine), form in product(means.items(), FORMS):
        fit = fit_decay(distance, cosine, pairs, constant=form != FORMS[0])
        rows.append((layer, form, *fit))
        if layer == -1:
            curve[form] = fit[0] * np.exp(-distance / fit[1]) + fit[2]
    columns = ["layer", "form", "amplitude", "length", "constant", "r2"]
    fits = pd.DataFrame(rows, columns=columns)
    return {"similarity": pd.DataFrame(curve), "similarity_fits": fits}


def _profile_tables(sums: Mapping[int, Tensor]) -> dict[str, pd.DataFrame]:
    """Return the mean weight by rank, and the fits by head, from :func:`profile_sums` by layer."""
    profiles = {
        (layer, head): (row[:-1] / row[-1]).numpy()
        for layer, rows in sums.items()
        for head, row in enumerate(rows)
        if row[-1] > 0
    }
    mean = np.mean(list(profiles.values()), axis=0)
    fits = {place: fit_profile(weights) for place, weights in {(-1, -1): mean, **profiles}.items()}
    one, two = fits[-1, -1].fitted
    columns = {"rank": range(1, len(mean) + 1), "weight": mean, "one_piece": one, "two_piece": two}
    rows = [(*place, *fit[:-1]) for place, fit in fits.items()]
    names = ["layer", "head", *LogLogFits._fields[:-1]]
    return {"profile": pd.DataFrame(columns), "profile_fits": pd.DataFrame(rows, columns=names)}


def _numbers(tables: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """Return the headline numbers."""
    norms, profile = tables["value_norms"], tables["profile_fits"]
    exponential, with_constant = tables["similarity_fits"].iloc[: len(FORMS)].itertuples()
    heads = profile.iloc[1:]
    return {
        "value_norm_cv": float(norms["cv"].median()),
        "first_over_mean": float(norms["first_over_mean"].median()),
        "compressed_first": float((norms["first_over_mean"].dropna() < 1).mean()),
        "similarity_length": exponential.length,
        "similarity_r2": exponential.r2,
        "similarity_r2_constant": with_constant.r2,
        **profile.iloc[0][["one_piece_r2", "two_piece_r2", "break_rank"]].astype(float).to_dict(),
        "two_piece_gain": float((heads["two_piece_r2"] - heads["one_piece_r2"]).median()),
    }
