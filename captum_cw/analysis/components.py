"""The three factors of a contribution: attention, relative norm and cosine (Eq. 14).

These analyses measure how much of contributions each factor explains (Tables 1 and 3 of arXiv
2606.07604), how the factors correlate (Table 2), how they are distributed (Fig. 7), and how the
cosine changes attention (section D.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import KFold
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult, Array, settings_of
from captum_cw.analysis.streaming import (
    Batches,
    Reservoir,
    SeenLayer,
    run_texts,
    texts_of,
    visible_blocks,
)
from captum_cw.functional import (
    AttentionLayer,
    attention,
    contribution,
    cosine_with,
    geometry,
    relative_norm,
)
from captum_cw.products import Block

FACTORS = ("attention", "relative norm", "cosine")
#: The products of factors in Table 1, one for each row, and their factors.
PRODUCTS = {
    " x ".join(FACTORS[n] for n in subset): subset
    for size in (1, 2)
    for subset in combinations(range(3), size)
}
GROUPS = ("all", "first", "others")
FOLDS = 5
#: The number of points in a scatter plot.
SHOWN = 4000


def _sample_cells(where: Tensor, maps: Sequence[Tensor], sample: Reservoir) -> None:
    """Add the values of the maps at the cells ``where`` to a sample."""
    cells = where.flatten().nonzero()[:, 0]
    cells = cells[torch.from_numpy(sample.draw(len(cells))).to(cells.device)]
    sample.add(torch.stack([x.flatten()[cells] for x in maps], 1).cpu().numpy())


class ComponentRegression(AnalysisResult):
    """The R2 of each product of factors as a predictor of contributions (Tables 1 and 3).

    The plot shows the R2 of each product of factors, with a panel for each group of tokens.

    Attributes:
        numbers: R2 for each group and product of factors, as ``"others: attention x cosine"``. For
            logarithms, ``"dropped"`` is the number of points of all tokens that have a factor or a
            contribution of zero.
        tables: ``"regression"``: a row for each product (``components``) and ``group``, with the
            ``slope``, ``r2`` (centred), ``r2_uncentred``, ``r2_held_out`` (mean over folds) and
            number of ``points``. ``"folds"``: the held-out ``r2`` of each ``fold``.
    """


def component_regression(
    model: nn.Module,
    batches: Batches,
    *,
    points: int = 1_000_000,
    log: bool = False,
    seed: int = 0,
    show_progress: bool = False,
) -> ComponentRegression:
    """Regress contributions on products of their factors (Eq. 18; Tables 1 and 3).

    For each subset ``S`` of attention, relative norm and cosine, the fit of inter-head
    contributions is ``c = b0 * product of S``, without an intercept. The paper uses 5 million
    points of 32 texts of up to 512 tokens.

    Args:
        model: A causal model.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
        points: The size of the uniform sample of each group of keys: all keys, the first key, and
            the other keys.
        log: Fit ``log|c|`` by the sum of the logarithms of the factors' magnitudes, as the caption
            of Table 3 says (although its columns equal those of Table 1). Points with a factor of
            zero are dropped and counted.
        seed: Random seed of the sample and the folds.
        show_progress: Show a progress bar over the texts after two seconds.

    Returns:
        R2 relative to the mean (centred) and to zero (uncentred), and held-out R2 in five folds.

    Raises:
        ValueError: If a text has fewer than two tokens, or the model is not causal.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = component_regression(model, inputs)
        >>> len(result.to_dataframe())
        18
    """
    texts = texts_of(batches)
    samples = {group: Reservoir(points, seed + n) for n, group in enumerate(GROUPS)}

    def on_layer(seen: SeenLayer) -> None:
        measures = attention, relative_norm, cosine_with("inter"), contribution()
        for _, visible, maps in visible_blocks(seen.layer, *measures):
            visible = visible.expand_as(maps[0])
            key = torch.arange(visible.shape[-1], device=visible.device)
            cells = {"all": visible, "first": visible & (key == 0), "others": visible & (key > 0)}
            for group, where in cells.items():
                _sample_cells(where, maps, samples[group])

    run_texts(model, texts, on_layer, show_progress=show_progress)
    settings = settings_of(texts, points=points, log=log, seed=seed)
    return regression_of({group: s.rows for group, s in samples.items()}, settings, log, seed)


def regression_of(
    samples: Mapping[str, Array], settings: Mapping[str, Any], log: bool, seed: int
) -> ComponentRegression:
    """Fit samples of attention, relative norm, cosine and contribution, ``(points, 4)`` each."""
    rows, folds = [], []
    dropped = 0
    for group, sample in samples.items():
        sample = sample.astype(np.float64)
        if log:
            whole = (sample != 0).all(1)
            dropped += int((~whole).sum()) if group == "all" else 0
            sample = np.log(np.abs(sample[whole]))
        factors, y = sample[:, :3], sample[:, 3]
        for product, subset in PRODUCTS.items():
            chosen = factors[:, subset]
            x = chosen.sum(1) if log else chosen.prod(1)
            place = {"components": product, "group": group}
            fit, held_out = _fit(x, y, seed)
            rows.append({**place, **fit, "points": len(y)})
            folds += [{**place, "fold": n, "r2": r2} for n, r2 in enumerate(held_out)]
    table = pd.DataFrame(rows)
    numbers = {f"{row.group}: {row.components}": row.r2 for row in table.itertuples()}
    if log:
        numbers["dropped"] = dropped
    tables = {"regression": table, "folds": pd.DataFrame(folds)}
    return ComponentRegression(settings, numbers, tables)


def _fit(x: Array, y: Array, seed: int) -> tuple[dict[str, float], list[float]]:
    """Fit a line through the origin, and compute its R2 on each held-out fold."""
    if len(y) < FOLDS:
        missing = dict.fromkeys(("slope", "r2", "r2_uncentred", "r2_held_out"), float("nan"))
        return missing, [float("nan")] * FOLDS
    slope = slope_through_origin(x, y)
    held_out = [
        r2(y[test], slope_through_origin(x[train], y[train]) * x[test])
        for train, test in KFold(FOLDS, shuffle=True, random_state=seed).split(x)
    ]
    fit = {
        "slope": slope,
        "r2": r2(y, slope * x),
        "r2_uncentred": r2(y, slope * x, centred=False),
        "r2_held_out": float(np.mean(held_out)),
    }
    return fit, held_out


def slope_through_origin(x: Array, y: Array) -> float:
    """Return the least-squares slope of a line through the origin; 0 if ``x`` is all zero."""
    return float(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])


def r2(y: Array, fitted: Array, *, centred: bool = True) -> float:
    """Return the fraction of the variance of ``y`` (or of its squares) that a fit explains.

    Args:
        y: The data.
        fitted: The values of the fit.
        centred: Compare with the mean; otherwise with zero.

    Returns:
        R2; NaN if the variance is zero.
    """
    if centred and np.ptp(y) == 0:  # rounding of the mean would leave a tiny variance
        return float("nan")
    total = float(((y - (y.mean() if centred else 0)) ** 2).sum())
    return 1 - float(((y - fitted) ** 2).sum()) / total if total > 0 else float("nan")


class ComponentCorrelations(AnalysisResult):
    """The correlations of the logarithms of the factors (Table 2).

    The plot shows the matrix.

    Attributes:
        numbers: Pearson's r of each pair, as ``"attention, cosine"``; the number of ``"points"``;
            and ``"dropped"``, the number of points with a factor of zero.
        tables: ``"correlations"``: the matrix, with a row for each ``component``.
    """


def component_correlations(
    model: nn.Module, batches: Batches, *, show_progress: bool = False
) -> ComponentCorrelations:
    """Correlate the logarithms of attention, relative norm and ``|cosine|`` (Eq. 21; Table 2).

    The correlations are over all queries, keys, heads and layers. The paper uses 32 texts of 128
    tokens.

    Args:
        model: A causal model.
        batches: Token ids, as for :func:`component_regression`.
        show_progress: Show a progress bar over the texts after two seconds.

    Returns:
        Pearson's correlations, exact, from running sums.

    Raises:
        ValueError: As :func:`component_regression`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> component_correlations(model, inputs).to_dataframe().shape
        (3, 4)
    """
    texts = texts_of(batches)
    moments = Moments(3)
    dropped = 0

    def on_layer(seen: SeenLayer) -> None:
        nonlocal dropped
        measures = attention, relative_norm, cosine_with("inter")
        for _, visible, maps in visible_blocks(seen.layer, *measures):
            visible = visible.expand_as(maps[0])
            columns = torch.stack([x[visible] for x in maps]).double()
            whole = (columns != 0).all(0)
            dropped += int((~whole).sum())
            moments.add(columns[:, whole].abs().log())

    run_texts(model, texts, on_layer, show_progress=show_progress)
    matrix = moments.correlations()
    table = pd.DataFrame(matrix, columns=list(FACTORS))
    table.insert(0, "component", FACTORS)
    numbers = {**_pairwise(FACTORS, matrix), "points": moments.count, "dropped": dropped}
    return ComponentCorrelations(settings_of(texts), numbers, {"correlations": table})


def _pairwise(names: Sequence[str], matrix: Array) -> dict[str, float]:
    """Return the correlation of each pair of variables, by their names."""
    pairs = combinations(range(len(names)), 2)
    return {f"{names[a]}, {names[b]}": float(matrix[a, b]) for a, b in pairs}


class Moments:
    """Running sums of variables, for their means and correlations.

    Args:
        n: The number of variables.

    Example:
        >>> moments = Moments(2)
        >>> moments.add(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        >>> moments.means().tolist(), float(moments.correlations()[0, 1].round(6))
        ([1.5, 3.0], 1.0)
    """

    def __init__(self, n: int) -> None:
        self.count = 0
        # Sums of differences from the first point: sums of large numbers would lose precision.
        self._origin: Tensor | None = None
        self._sum = torch.zeros(n, dtype=torch.float64, device="cpu")
        self._products = torch.zeros(n, n, dtype=torch.float64, device="cpu")

    def add(self, values: Tensor) -> None:
        """Add values, ``(n, points)``."""
        if not values.shape[1]:
            return
        values = values.double()
        if self._origin is None:
            self._origin = values[:, 0].cpu()
        values = values - self._origin.to(values.device)[:, None]
        self.count += values.shape[1]
        self._sum += values.sum(1).cpu()
        self._products += (values @ values.T).cpu()

    def means(self) -> Tensor:
        """Return the means, ``(n,)``; NaN before any values are added."""
        return self._sum / self.count + (0 if self._origin is None else self._origin)

    def correlations(self) -> Array:
        """Return Pearson's correlations, ``(n, n)``; NaN if a variable is constant."""
        means = self._sum / self.count
        covariance = self._products / self.count - means[:, None] * means
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        return (covariance / (deviation[:, None] * deviation)).numpy()


class ComponentDispersion(AnalysisResult):
    """The distribution of attention, value norms and cosines (Fig. 7).

    The plot shows the three pairs.

    Attributes:
        numbers: ``"mean cosine"`` over all queries, keys, heads and layers (the paper: 0.012), and
            Pearson's r of each pair, without logarithms.
        tables: ``"sample"``: ``attention``, ``value norm`` (in the unit of the hidden states) and
            ``cosine`` of a uniform sample.
    """


def component_dispersion(
    model: nn.Module,
    batches: Batches,
    *,
    points: int = SHOWN,
    seed: int = 0,
    show_progress: bool = False,
) -> ComponentDispersion:
    """Sample attention, norms of projected values and cosines with the output (Fig. 7).

    Args:
        model: A causal model.
        batches: Token ids, as for :func:`component_regression`.
        points: The size of the sample.
        seed: Random seed of the sample.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        ValueError: As :func:`component_regression`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = component_dispersion(model, inputs, points=50)
        >>> list(result.to_dataframe()), len(result.to_dataframe())
        (['attention', 'value norm', 'cosine'], 50)
    """
    texts, sample, moments = texts_of(batches), Reservoir(points, seed), Moments(3)

    def on_layer(seen: SeenLayer) -> None:
        measures = attention, _projected_norms, cosine_with("inter")
        for _, visible, maps in visible_blocks(seen.layer, *measures):
            visible = visible.expand_as(maps[0])
            moments.add(torch.stack([x[visible] for x in maps]))
            _sample_cells(visible, maps, sample)

    run_texts(model, texts, on_layer, show_progress=show_progress)
    names = ["attention", "value norm", "cosine"]
    matrix = moments.correlations()
    numbers = {"mean cosine": float(moments.means()[2]), **_pairwise(names, matrix)}
    settings = settings_of(texts, points=points, seed=seed)
    table = pd.DataFrame(sample.rows.astype(np.float64), columns=names)
    return ComponentDispersion(settings, numbers, {"sample": table})


def _projected_norms(layer: AttentionLayer) -> Block:
    """Compute the norms of projected values ``||v~_j||``, as a measure."""

    def block(a: Tensor, rows: slice) -> Tensor:
        return a.copy_(layer.norms(rows, a.shape[-1]))

    return block


class Interference(AnalysisResult):
    """How the alignment of values changes attention within a head (section D.6).

    The plot shows the ratio ``c / a`` against the cosine.

    Attributes:
        numbers: ``"r"``, Pearson's correlation of ``c / a`` with the cosine (the paper: 0.949); the
            number of ``"points"``; and ``"dropped"``, the number of points whose value or output
            has norm zero.
        tables: ``"sample"``: ``ratio`` and ``cosine`` of a uniform sample.
    """


def interference(
    model: nn.Module,
    batches: Batches,
    *,
    points: int = SHOWN,
    seed: int = 0,
    show_progress: bool = False,
) -> Interference:
    """Correlate the intra-head ratio of contribution to attention with the cosine (Eq. 24).

    The ratio is ``c / a = ||v~_j|| / ||o_i^h|| cos(o_i^h, v~_j)``. If it is negative, the value
    opposes the head's output. Queries that see a single key are left out, because their ratio is
    always one.

    Args:
        model: A causal model.
        batches: Token ids, as for :func:`component_regression`.
        points: The size of the sample for the plot. The correlation is over all points.
        seed: Random seed of the sample.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        ValueError: As :func:`component_regression`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> -1 <= interference(model, inputs).numbers["r"] <= 1
        True
    """
    texts, sample, moments = texts_of(batches), Reservoir(points, seed), Moments(2)
    dropped = 0

    def on_layer(seen: SeenLayer) -> None:
        nonlocal dropped
        measures = geometry("intra"), cosine_with("intra")
        for _, visible, maps in visible_blocks(seen.layer, *measures):
            compared = (visible & (visible.sum(-1, keepdim=True) > 1)).expand_as(maps[0])
            known = compared & (maps[1] != 0)
            dropped += int(compared.sum() - known.sum())
            moments.add(torch.stack([x[known] for x in maps]))
            _sample_cells(known, maps, sample)

    run_texts(model, texts, on_layer, show_progress=show_progress)
    table = pd.DataFrame(sample.rows.astype(np.float64), columns=["ratio", "cosine"])
    r = float(moments.correlations()[0, 1])
    numbers = {"r": r, "points": moments.count, "dropped": dropped}
    settings = settings_of(texts, points=points, seed=seed)
    return Interference(settings, numbers, {"sample": table})
