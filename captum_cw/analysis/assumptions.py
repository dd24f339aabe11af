"""What a theory of token selection takes for granted, measured.

The bounds of arXiv 2602.01893 rest on three assumptions: values have stable norms, with the first
token's compressed; their similarity decays exponentially with distance; and the profile of
attention weights is piecewise. The paper's constants and the bounds themselves are not in our
sources. What is measured here is how far each assumption holds, in forms that are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult, Picture
from captum_cw.analysis.selection_geometry import check_count, draw_queries, terms_of
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    Array = npt.NDArray[np.float64]

__all__ = ["SelectionAssumptions", "selection_assumptions"]

#: Ranks that a two-piece fit needs: twice the numbers that it has.
FEWEST_RANKS = 8
FORMS = ("exponential", "exponential + constant")


class SelectionAssumptions(AnalysisResult):
    """What :func:`captum_cw.analysis.selection_assumptions` found.

    ``numbers``: the medians over layers and heads of ``value_norm_cv`` and ``first_over_mean``, and
    the share of heads with a ``compressed_first`` value; of the similarity by distance, its
    ``similarity_length`` in tokens, ``similarity_r2`` and ``similarity_r2_constant`` (the
    exponential alone, and with a constant added to it); of the profile of attention,
    ``one_piece_r2``, ``two_piece_r2`` and the ``break_rank``, with ``two_piece_gain``, the median
    over heads of the difference of their two R2.

    ``tables``, of which the first is the main one:

    * ``value_norms``: by ``layer`` and key-value ``head``, over the values of all tokens but the
      first: their ``mean`` norm and its coefficient of variation ``cv``; and ``first_over_mean``,
      the first token's norm over that mean.
    * ``similarity``: by ``distance`` in tokens, the mean ``cosine`` of two values, over layers,
      heads and texts, from how many ``pairs`` a head, and what each fit says.
    * ``similarity_fits``: for the mean over layers (``layer`` -1) and each layer, and for each
      ``form``: ``amplitude * exp(-distance / length) + constant`` and its ``r2``.
    * ``profile``: by ``rank``, the mean ``weight`` of the key of that rank, over layers, heads and
      queries, and what each fit says.
    * ``profile_fits``: for that mean (``layer`` and ``head`` -1) and each head: ``one_piece_r2``,
      ``two_piece_r2``, ``break_rank`` and the slopes ``slope``, ``slope_before``, ``slope_after``.

    A fit that cannot be made is NaN.
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """Value norms by layer, similarity by distance, attention by rank; with their fits."""
        from captum_cw.analysis.figures.selection import plot_selection_assumptions

        return plot_selection_assumptions(self.tables, self.numbers, use_pyplot=use_pyplot)


def selection_assumptions(
    model: nn.Module,
    batches: Batches,
    *,
    ranks: int | None = None,
    queries: int | None = 32,
    seed: int = 0,
    show_progress: bool = False,
) -> SelectionAssumptions:
    """How stable value norms are, how similarity decays, and what shape attention has by rank.

    * Values are ``v_j``, before ``W_O``, of each key-value head. The first token is left out of
      norms and similarities, and set beside the others.
    * Fits to similarity weigh each distance by its number of pairs; their R2, against a constant,
      which has 0, is so weighted too.
    * The profile is the mean of a row's weights by rank, over queries that see at least ``ranks``
      keys, so that all ranks have the same queries. Fits are to its logarithm by the logarithm of
      the rank: one straight line, or two that meet at the rank that fits best. The second cannot
      fit worse; it says something by how much it fits better. All ranks weigh the same, so that
      the many late ones count most.

    Args:
        model: A causal language model.
        batches: Token ids, or an iterable of batches; texts of 16 tokens or more.
        ranks: How many ranks the profile has; None for half the tokens of the shortest text.
        queries: How many random queries of each text make the profile; None for all.
        seed: Of the queries.
        show_progress: Shows a bar over the texts.

    Returns:
        A :class:`SelectionAssumptions`.

    Raises:
        ValueError: If a text is too short, ``ranks`` is below 8, ``queries`` cannot be, the window
            of every layer has fewer than ``ranks`` keys, or the model is not causal.

    Example:
        >>> found = selection_assumptions(model, torch.arange(24)[None], queries=None)
        >>> found.to_dataframe().columns.tolist()
        ['layer', 'head', 'mean', 'cv', 'first_over_mean']
        >>> found.tables["profile"]["rank"].tolist()
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    """
    if queries is not None:
        check_count("queries", queries)
    if ranks is not None:
        check_count("ranks", ranks)
    texts = texts_of(batches, shortest=max(2 * FEWEST_RANKS, ranks or 0))
    ranks = min(map(len, texts)) // 2 if ranks is None else ranks
    if ranks < FEWEST_RANKS:
        raise ValueError(f"ranks={ranks}: two lines need {FEWEST_RANKS} or more.")
    drawn = [
        draw_queries(len(ids), ranks - 1, queries, seed, text) for text, ids in enumerate(texts)
    ]
    lags = max(map(len, texts)) - 2
    sums: dict[int, _Sums] = {}

    def on_layer(seen: SeenLayer) -> None:
        value = seen.layer.value[0].double()
        similar = similarity_sums(value[:, 1:], lags)
        profile = torch.zeros(seen.layer.H, ranks + 1, dtype=torch.float64, device="cpu")
        for _, terms in terms_of(seen.layer, drawn[seen.text]):
            profile += profile_sums(terms.attention, terms.seen, ranks)
        found = _Sums(norm_sums(value), similar, profile)
        if seen.number in sums:
            found = _Sums(*(x + y for x, y in zip(sums[seen.number], found, strict=True)))
        sums[seen.number] = found

    layers = run_texts(
        model, texts, on_layer, description="selection assumptions", show_progress=show_progress
    )
    if not any(found.profile[:, -1].any() for found in sums.values()):
        raise ValueError(f"No query sees {ranks} keys: give fewer ranks.")
    pairs = np.array([sum(max(len(ids) - 1 - lag, 0) for ids in texts) for lag in _lags(lags)])
    tables = {
        "value_norms": _norms_table(sums),
        **_similarity_tables(sums, pairs),
        **_profile_tables(sums, ranks),
    }
    settings = {
        "ranks": ranks, "queries": queries, "seed": seed, "texts": len(texts),
        "tokens": sum(map(len, texts)), "layers": layers,
    }  # fmt: skip
    return SelectionAssumptions(settings, _numbers(tables), tables)


class _Sums(NamedTuple):
    """Of one layer: ``(H_kv, 5)``, ``(H_kv, lags)`` and ``(H, ranks + 1)``."""

    norms: Tensor
    similarity: Tensor
    profile: Tensor


def _lags(count: int) -> range:
    return range(1, count + 1)


def norm_sums(value: Tensor) -> Tensor:
    """Of values ``(H_kv, T, d_h)``: their number, norms and squared norms, but for the first; it.

    Returns:
        ``(H_kv, 5)``: the number, the two sums, the norm of the first, and a one.

    Example:
        >>> norm_sums(torch.tensor([[[1.0], [2.0], [4.0]]])).tolist()
        [[2.0, 6.0, 20.0, 1.0, 1.0]]
    """
    norms = value.norm(dim=-1)
    later, ones = norms[:, 1:], torch.ones_like(norms)
    parts = [ones[:, 1:].sum(1), later.sum(1), later.square().sum(1), norms[:, 0], ones[:, 0]]
    return torch.stack(parts, dim=1).cpu()


def similarity_sums(value: Tensor, lags: int) -> Tensor:
    """``sum_i cos(v_i, v_(i + lag))`` for the lags ``1, ..., lags``.

    It is the autocorrelation of the unit vectors, hence the inverse Fourier transform of their
    power: no map of all pairs.

    Args:
        value: ``(H_kv, T, d_h)``; a value that is zero has the cosine zero with all.
        lags: How many; those beyond the text are zero.

    Returns:
        ``(H_kv, lags)``.

    Example:
        >>> value = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
        >>> similarity_sums(value, 2).abs().round(decimals=6).tolist()
        [[1.0, 0.0]]
    """
    T = value.shape[1]
    unit = torch.nn.functional.normalize(value, dim=-1)
    # Padded to twice the length, so that the end does not meet the start.
    power = torch.fft.rfft(unit, 2 * T, dim=1).abs().square().sum(-1)
    found = torch.fft.irfft(power, 2 * T, dim=1)[:, 1 : min(T, lags + 1)]
    return torch.nn.functional.pad(found, (0, lags - found.shape[1])).cpu()


def profile_sums(attention: Tensor, seen: Tensor, ranks: int) -> Tensor:
    """Sums of the weights by rank, over queries that see at least ``ranks`` keys.

    Args:
        attention: ``(H, Q, S)``.
        seen: How many keys each query sees, ``(H or 1, Q)``.
        ranks: How many ranks.

    Returns:
        ``(H, ranks + 1)``, the number of queries last.

    Example:
        >>> profile_sums(torch.tensor([[[0.2, 0.5, 0.3]]]), torch.tensor([[3]]), 2).tolist()
        [[0.5, 0.30..., 1.0]]
    """
    counts = (seen >= ranks)[..., None].expand(*attention.shape[:2], 1)
    if attention.shape[-1] < ranks:  # then no query counts
        return torch.zeros(len(attention), ranks + 1, dtype=torch.float64, device="cpu")
    top = attention.topk(ranks, dim=-1).values
    return (torch.cat([top, torch.ones_like(top[..., :1])], -1) * counts).sum(1).cpu()


def fit_decay(distance: Array, cosine: Array, pairs: Array, *, constant: bool) -> Array:
    """Least squares of ``amplitude * exp(-distance / length) + constant``, weighted by pairs.

    Args:
        distance: ``(n,)``.
        cosine: ``(n,)``, the mean at each.
        pairs: ``(n,)``, their numbers.
        constant: Whether there is one.

    Returns:
        Amplitude, length, constant and R2; NaN where there is no more to fit than numbers, or
        the cosine does not vary.
    """
    from scipy.optimize import curve_fit

    parameters = 3 if constant else 2
    spread = np.average((cosine - np.average(cosine, weights=pairs)) ** 2, weights=pairs)
    best = np.full(4, np.nan)
    if len(distance) <= parameters or not spread > 1e-24:
        return best

    def decay(x: Array, amplitude: float, length: float, level: float = 0.0) -> Array:
        return amplitude * np.exp(-x / length) + level

    far = float(distance.max())
    low, high = [-2.0, 1e-2, -1.0], [2.0, 1e3 * far, 1.0]
    for length in (1.0, far**0.5, far):  # the best length depends on where one starts
        start = [cosine[0] - (cosine[-1] if constant else 0), length, cosine[-1]]
        try:
            found, _ = curve_fit(
                decay, distance, cosine, np.clip(start, low, high)[:parameters],
                sigma=pairs**-0.5, bounds=(low[:parameters], high[:parameters]), max_nfev=2000,
            )  # fmt: skip
        except RuntimeError:  # no convergence from here
            continue
        missed = np.average((cosine - decay(distance, *found)) ** 2, weights=pairs)
        r2 = 1 - missed / spread
        if not r2 <= best[3]:
            best = np.array([*found[:2], found[2] if constant else 0.0, r2])
    return best


class LogLogFits(NamedTuple):
    """One line and two through the logarithms; ``fitted`` are weights, ``(2, n)``."""

    one_piece_r2: float
    two_piece_r2: float
    break_rank: float
    slope: float
    slope_before: float
    slope_after: float
    fitted: Array


def fit_profile(weights: Array) -> LogLogFits:
    """Fits one line, and two that meet, to ``log weight`` by ``log rank``.

    Args:
        weights: ``(n,)`` by rank. Ranks from the first weight that is zero on are left out; with
            fewer than 8 left, or all alike, the fits are NaN.

    Example:
        >>> rank = np.arange(1.0, 33)
        >>> fits = fit_profile(np.where(rank < 8, 1 / rank, 8 / rank**2))
        >>> round(fits.break_rank), round(fits.slope_before, 3), round(fits.slope_after, 3)
        (8, -1.0, -2.0)
    """
    positive = int((weights > 0).cumprod().sum())
    fitted = np.full((2, len(weights)), np.nan)
    x, y = np.log(np.arange(1, positive + 1)), np.log(weights[:positive])
    spread = float(((y - y.mean()) ** 2).sum()) if positive else 0.0
    if positive < FEWEST_RANKS or spread <= 1e-20:
        nan = float("nan")
        return LogLogFits(nan, nan, nan, nan, nan, nan, fitted)

    def fit(*columns: Array) -> tuple[float, Array, Array]:
        design = np.stack([np.ones(positive), *columns], axis=1)
        found = np.linalg.lstsq(design, y, rcond=None)[0]
        line = design @ found
        return 1 - float(((y - line) ** 2).sum()) / spread, found, line

    one_r2, one, one_line = fit(x)
    two_r2, two, two_line, place = max(
        ((*fit(x, np.maximum(x - x[k], 0)), k) for k in range(1, positive - 1)),
        key=lambda found: found[0],
    )
    fitted[:, :positive] = np.exp([one_line, two_line])
    return LogLogFits(
        one_r2, two_r2, place + 1.0, float(one[1]), float(two[1]), float(two[1] + two[2]), fitted
    )


def _norms_table(sums: Mapping[int, _Sums]) -> pd.DataFrame:
    import pandas as pd

    parts = []
    for layer, found in sorted(sums.items()):
        count, total, squares, first, texts = found.norms.numpy().T
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0)
        size = np.where(mean > 0, mean, np.nan)  # a head without values has neither figure
        columns = {
            "mean": mean,
            "cv": variance**0.5 / size,
            "first_over_mean": first / texts / size,
        }
        parts.append(pd.DataFrame({"layer": layer, "head": range(len(mean)), **columns}))
    return pd.concat(parts, ignore_index=True)


def _similarity_tables(sums: Mapping[int, _Sums], pairs: Array) -> dict[str, pd.DataFrame]:
    import pandas as pd

    distance = np.arange(1.0, len(pairs) + 1)
    by_layer = {layer: found.similarity.mean(0).numpy() / pairs for layer, found in sums.items()}
    heads = torch.cat([found.similarity for found in sums.values()])
    curves = {-1: heads.mean(0).numpy() / pairs, **dict(sorted(by_layer.items()))}
    curve = {"distance": distance.astype(int), "cosine": curves[-1], "pairs": pairs}
    rows = []
    for (layer, cosine), form in product(curves.items(), FORMS):
        found = fit_decay(distance, cosine, pairs, constant=form != FORMS[0])
        amplitude, length, level, r2 = found
        rows.append((layer, form, amplitude, length, level, r2))
        if layer == -1:
            curve[form] = amplitude * np.exp(-distance / length) + level
    columns = ["layer", "form", "amplitude", "length", "constant", "r2"]
    return {
        "similarity": pd.DataFrame(curve),
        "similarity_fits": pd.DataFrame(rows, columns=columns),
    }


def _profile_tables(sums: Mapping[int, _Sums], ranks: int) -> dict[str, pd.DataFrame]:
    import pandas as pd

    profiles = {
        (layer, head): (row[:-1] / row[-1]).numpy()
        for layer, found in sorted(sums.items())
        for head, row in enumerate(found.profile)
        if row[-1] > 0
    }
    profiles = {(-1, -1): np.mean(list(profiles.values()), axis=0), **profiles}
    fits = {place: fit_profile(weights) for place, weights in profiles.items()}
    one, two = fits[-1, -1].fitted
    profile = pd.DataFrame(
        {"rank": list(_lags(ranks)), "weight": profiles[-1, -1], "one_piece": one, "two_piece": two}
    )
    rows = [(*place, *fit[:-1]) for place, fit in fits.items()]
    columns = ["layer", "head", *LogLogFits._fields[:-1]]
    return {"profile": profile, "profile_fits": pd.DataFrame(rows, columns=columns)}


def _numbers(tables: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    norms, profile = tables["value_norms"], tables["profile_fits"]
    similarity = tables["similarity_fits"]
    alone, raised = (
        similarity[(similarity["layer"] == -1) & (similarity["form"] == form)].iloc[0]
        for form in FORMS
    )
    first, heads = profile.iloc[0], profile.iloc[1:]
    return {
        "value_norm_cv": float(norms["cv"].median()),
        "first_over_mean": float(norms["first_over_mean"].median()),
        "compressed_first": float((norms["first_over_mean"].dropna() < 1).mean()),
        "similarity_length": float(alone["length"]),
        "similarity_r2": float(alone["r2"]),
        "similarity_r2_constant": float(raised["r2"]),
        "one_piece_r2": float(first["one_piece_r2"]),
        "two_piece_r2": float(first["two_piece_r2"]),
        "break_rank": float(first["break_rank"]),
        "two_piece_gain": float((heads["two_piece_r2"] - heads["one_piece_r2"]).median()),
    }
