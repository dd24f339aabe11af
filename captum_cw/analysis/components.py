"""The three factors of a contribution: attention, relative norm and cosine (Eq. 14).

What each explains of contributions (Tables 1 and 3 of arXiv 2606.07604), how they go together
(Table 2), how they are spread (Fig. 7), and what the cosine does to attention (section D.6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw.analysis.result import AnalysisResult, Picture
from captum_cw.analysis.streaming import Batches, Reservoir, SeenLayer, run_texts, texts_of
from captum_cw.functional import (
    AttentionLayer,
    Block,
    Measure,
    attention,
    contribution,
    cosine_with,
    geometry,
    map_blocks,
    relative_norm,
)

__all__ = [
    "ComponentCorrelations",
    "ComponentDispersion",
    "ComponentRegression",
    "Interference",
    "component_correlations",
    "component_dispersion",
    "component_regression",
    "interference",
]

FACTORS = ("attention", "relative norm", "cosine")
#: The factors that a row of Table 1 multiplies.
SUBSETS = tuple(subset for n in (1, 2) for subset in combinations(range(3), n))
GROUPS = ("all", "first", "others")
FOLDS = 5
#: Points of a scatter plot.
SHOWN = 4000

Array = np.ndarray[Any, Any]


def _blocks(seen: SeenLayer, *measures: Measure) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Blocks of maps ``(H, t, n)``, each after where queries see keys, ``(H, t, n)``."""
    for rows, found in map_blocks(seen.layer, *measures):
        shape = found[0].shape
        visible = seen.layer.mask.block(rows)
        if visible is None:
            visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=found[0].device)
        yield visible.expand(shape)[0], tuple(x[0] for x in found)


def _columns(where: Tensor, maps: tuple[Tensor, ...], sample: Reservoir) -> None:
    """Adds to a sample what maps hold at the cells ``where``."""
    cells = where.flatten().nonzero()[:, 0]
    if not len(cells):
        return
    cells = cells[torch.from_numpy(sample.draw(len(cells))).to(cells.device)]
    sample.add(torch.stack([x.flatten()[cells] for x in maps], 1).cpu().numpy())


class ComponentRegression(AnalysisResult):
    """How much of contributions each product of their factors explains (Tables 1 and 3).

    Attributes:
        numbers: For each group and product of factors R2, as ``"others: attention x cosine"``; for
            logarithms ``"dropped"``, points of the samples with a factor of zero.
        tables: ``"regression"``: a row for each ``components`` and ``group`` with the ``slope``,
            ``r2`` (centred), ``r2_uncentred``, ``r2_held_out`` (mean over folds) and ``points``;
            ``"folds"``: the held-out ``r2`` of each ``fold``.
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """R2 of each product of factors, a panel for each group."""
        from captum_cw.analysis.figures.geometry import plot_regression

        return plot_regression(self.to_dataframe(), use_pyplot=use_pyplot)


def component_regression(
    model: nn.Module,
    batches: Batches,
    *,
    points: int = 1_000_000,
    log: bool = False,
    seed: int = 0,
    show_progress: bool = False,
) -> ComponentRegression:
    """Regresses contributions on products of their factors (Eq. 18; Tables 1 and 3).

    For each subset ``S`` of attention, relative norm and cosine, inter-head contributions are
    fitted by ``c = b0 * product of S``, without an intercept. The paper takes 5 million points of
    32 texts of up to 512 tokens.

    Args:
        model: A causal model.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
        points: Of the uniform sample of each group of keys: all, the first, the others.
        log: Fits ``log|c|`` by the sum of the logarithms of the factors' magnitudes, as the caption
            of Table 3 says (its columns equal those of Table 1 nevertheless); points with a factor
            of zero are dropped and counted.
        seed: Of the sample and the folds.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Returns:
        R2 against the mean (centred) and against zero (uncentred), and held out in five folds.

    Raises:
        ValueError: If a text has less than two tokens, or the model is not causal.

    Example:
        >>> result = component_regression(model, input_ids)
        >>> len(result.to_dataframe())
        18
    """
    texts = texts_of(batches)
    samples = {group: Reservoir(points, seed + n) for n, group in enumerate(GROUPS)}

    def on_layer(seen: SeenLayer) -> None:
        measures = attention, relative_norm, cosine_with("inter"), contribution()
        for visible, maps in _blocks(seen, *measures):
            first = torch.zeros_like(visible)
            first[..., 0] = True
            cells = {"all": visible, "first": visible & first, "others": visible & ~first}
            for group, where in cells.items():
                _columns(where, maps, samples[group])

    run_texts(model, texts, on_layer, description="regression", show_progress=show_progress)
    settings = {
        "texts": len(texts), "tokens": sum(map(len, texts)), "points": points, "log": log,
        "seed": seed,
    }  # fmt: skip
    return regression_of({group: s.rows for group, s in samples.items()}, settings, log, seed)


def regression_of(
    samples: Mapping[str, Array], settings: Mapping[str, Any], log: bool, seed: int
) -> ComponentRegression:
    """The fits to samples ``(points, 4)`` of attention, relative norm, cosine and contribution."""
    import pandas as pd

    rows, folds = [], []
    dropped = 0
    for group, sample in samples.items():
        sample = sample.astype(np.float64)
        if log:
            whole = (sample != 0).all(1)
            dropped += int((~whole).sum())
            sample = np.log(np.abs(sample[whole]))
        factors, y = sample[:, :3], sample[:, 3]
        for subset in SUBSETS:
            chosen = factors[:, subset]
            x = chosen.sum(1) if log else chosen.prod(1)
            name = " x ".join(FACTORS[n] for n in subset)
            fit, held_out = _fit(x, y, seed)
            rows.append({"components": name, "group": group, **fit, "points": len(y)})
            folds += [
                {"components": name, "group": group, "fold": n, "r2": r2}
                for n, r2 in enumerate(held_out)
            ]
    table = pd.DataFrame(rows)
    numbers = {f"{row.group}: {row.components}": row.r2 for row in table.itertuples()}
    if log:
        numbers["dropped"] = dropped
    return ComponentRegression(
        settings, numbers, {"regression": table, "folds": pd.DataFrame(folds)}
    )


def _fit(x: Array, y: Array, seed: int) -> tuple[dict[str, float], list[float]]:
    """A line through the origin, and its R2 on each fold that it has not seen."""
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import KFold

    if len(y) < FOLDS:
        nothing = dict.fromkeys(("slope", "r2", "r2_uncentred", "r2_held_out"), float("nan"))
        return nothing, [float("nan")] * FOLDS
    line = LinearRegression(fit_intercept=False)
    line.fit(x[:, None], y)
    found = line.predict(x[:, None])
    held_out = []
    for known, unknown in KFold(FOLDS, shuffle=True, random_state=seed).split(x):
        other = LinearRegression(fit_intercept=False).fit(x[known, None], y[known])
        held_out.append(r2(y[unknown], other.predict(x[unknown, None])))
    fit = {
        "slope": float(line.coef_[0]),
        "r2": r2(y, found),
        "r2_uncentred": r2(y, found, centred=False),
        "r2_held_out": float(np.mean(held_out)),
    }
    return fit, held_out


def r2(y: Array, found: Array, *, centred: bool = True) -> float:
    """The share of the variance of ``y`` (of its squares, if not ``centred``) that was found.

    NaN where there is nothing to explain.
    """
    if centred and np.ptp(y) == 0:  # its mean may be another number in the last place
        return float("nan")
    total = float(((y - (y.mean() if centred else 0)) ** 2).sum())
    return 1 - float(((y - found) ** 2).sum()) / total if total > 0 else float("nan")


class ComponentCorrelations(AnalysisResult):
    """How the logarithms of the factors go together (Table 2).

    Attributes:
        numbers: Pearson's r of each pair, as ``"attention, cosine"``; ``"points"`` and
            ``"dropped"``, those with a factor of zero.
        tables: ``"correlations"``: the matrix, a row for each ``component``.
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """The matrix."""
        from captum_cw.analysis.figures.geometry import plot_correlations

        return plot_correlations(self.to_dataframe(), use_pyplot=use_pyplot)


def component_correlations(
    model: nn.Module, batches: Batches, *, show_progress: bool = False
) -> ComponentCorrelations:
    """Correlates the logarithms of attention, relative norm and ``|cosine|`` (Eq. 21; Table 2).

    Over all queries, keys, heads and layers. The paper takes 32 texts of 128 tokens.

    Args:
        model: A causal model.
        batches: As :func:`component_regression`.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Returns:
        Pearson's correlations; exact, by running sums.

    Raises:
        ValueError: As :func:`component_regression`.

    Example:
        >>> component_correlations(model, input_ids).to_dataframe().shape
        (3, 4)
    """
    import pandas as pd

    texts = texts_of(batches)
    moments = Moments(3)
    dropped = 0

    def on_layer(seen: SeenLayer) -> None:
        nonlocal dropped
        for visible, maps in _blocks(seen, attention, relative_norm, cosine_with("inter")):
            columns = torch.stack([x[visible] for x in maps]).double()
            whole = (columns != 0).all(0)
            dropped += int((~whole).sum())
            moments.add(columns[:, whole].abs().log())

    run_texts(model, texts, on_layer, description="correlations", show_progress=show_progress)
    matrix = moments.correlations()
    table = pd.DataFrame(matrix, columns=list(FACTORS))
    table.insert(0, "component", FACTORS)
    pairs = {
        f"{FACTORS[a]}, {FACTORS[b]}": float(matrix[a, b]) for a, b in combinations(range(3), 2)
    }
    settings = {"texts": len(texts), "tokens": sum(map(len, texts))}
    numbers = {**pairs, "points": moments.count, "dropped": dropped}
    return ComponentCorrelations(settings, numbers, {"correlations": table})


class Moments:
    """Running sums of several variables, for their means and correlations.

    Args:
        n: How many variables.

    Example:
        >>> moments = Moments(2)
        >>> moments.add(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        >>> moments.means().tolist(), float(moments.correlations()[0, 1].round(6))
        ([1.5, 3.0], 1.0)
    """

    def __init__(self, n: int) -> None:
        self.count = 0
        # Sums are of differences to the first point: those of large numbers drown what varies.
        self._origin: Tensor | None = None
        self._sum = torch.zeros(n, dtype=torch.float64, device="cpu")
        self._products = torch.zeros(n, n, dtype=torch.float64, device="cpu")

    def add(self, values: Tensor) -> None:
        """Counts ``(n, points)``."""
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
        """``(n,)``; NaN where nothing was counted."""
        return self._sum / self.count + (0 if self._origin is None else self._origin)

    def correlations(self) -> Array:
        """``(n, n)``, Pearson's; NaN where a variable is constant."""
        means = self._sum / self.count
        covariance = self._products / self.count - means[:, None] * means
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        found: Array = (covariance / (deviation[:, None] * deviation)).numpy()
        return found


class ComponentDispersion(AnalysisResult):
    """How attention, value norms and cosines are spread (Fig. 7).

    Attributes:
        numbers: ``"mean cosine"`` over all queries, keys, heads and layers (the paper: 0.012), and
            Pearson's r of each pair, as they are, without logarithms.
        tables: ``"sample"``: ``attention``, ``value norm`` (in the unit of the hidden states) and
            ``cosine`` of a uniform sample.
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """The three pairs."""
        from captum_cw.analysis.figures.geometry import plot_dispersion

        return plot_dispersion(self.to_dataframe(), use_pyplot=use_pyplot)


def component_dispersion(
    model: nn.Module,
    batches: Batches,
    *,
    points: int = SHOWN,
    seed: int = 0,
    show_progress: bool = False,
) -> ComponentDispersion:
    """Samples attention, norms of projected values and cosines with the output (Fig. 7).

    Args:
        model: A causal model.
        batches: As :func:`component_regression`.
        points: Of the sample.
        seed: Of the sample.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Raises:
        ValueError: As :func:`component_regression`.

    Example:
        >>> result = component_dispersion(model, input_ids, points=50)
        >>> list(result.to_dataframe()), len(result.to_dataframe())
        (['attention', 'value norm', 'cosine'], 50)
    """
    import pandas as pd

    texts, sample, moments = texts_of(batches), Reservoir(points, seed), Moments(3)

    def on_layer(seen: SeenLayer) -> None:
        for visible, maps in _blocks(seen, attention, _norms, cosine_with("inter")):
            moments.add(torch.stack([x[visible] for x in maps]))
            _columns(visible, maps, sample)

    run_texts(model, texts, on_layer, description="dispersion", show_progress=show_progress)
    names = ("attention", "value norm", "cosine")
    matrix = moments.correlations()
    numbers = {"mean cosine": float(moments.means()[2])}
    numbers |= {
        f"{names[a]}, {names[b]}": float(matrix[a, b]) for a, b in combinations(range(3), 2)
    }
    settings = {"texts": len(texts), "tokens": sum(map(len, texts)), "points": points, "seed": seed}
    table = pd.DataFrame(sample.rows.astype(np.float64), columns=list(names))
    return ComponentDispersion(settings, numbers, {"sample": table})


def _norms(layer: AttentionLayer) -> Block:
    """``||v~_j||``."""
    scale = None if layer.scale is None else layer.scale.abs()[:, None, :, None]

    def block(a: Tensor, rows: slice) -> Tensor:
        a.copy_(layer.norms(rows, a.shape[-1]))
        return a if scale is None else a.mul_(scale[:, :, rows])

    return block


class Interference(AnalysisResult):
    """What the alignment of values does to attention within a head (section D.6).

    Attributes:
        numbers: ``"r"``, Pearson's correlation of ``c / a`` with the cosine (the paper: 0.949);
            ``"points"`` and ``"dropped"``, those of a value or an output of norm zero.
        tables: ``"sample"``: ``ratio`` and ``cosine`` of a uniform sample.
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """The ratio against the cosine."""
        from captum_cw.analysis.figures.geometry import plot_interference

        return plot_interference(self.to_dataframe(), self.numbers["r"], use_pyplot=use_pyplot)


def interference(
    model: nn.Module,
    batches: Batches,
    *,
    points: int = SHOWN,
    seed: int = 0,
    show_progress: bool = False,
) -> Interference:
    """The intra-head ratio of contribution to attention against the cosine (Eq. 24).

    ``c / a = ||v~_j|| / ||o_i^h|| cos(o_i^h, v~_j)``: above zero values boost what attention gave
    a token, below it they oppose it. Queries that see one key alone are left out: there the
    ratio is one by construction.

    Args:
        model: A causal model.
        batches: As :func:`component_regression`.
        points: Of the sample that is shown; the correlation is over all.
        seed: Of the sample.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Raises:
        ValueError: As :func:`component_regression`.

    Example:
        >>> -1 <= interference(model, input_ids).numbers["r"] <= 1
        True
    """
    import pandas as pd

    texts, sample, moments = texts_of(batches), Reservoir(points, seed), Moments(2)
    dropped = 0

    def on_layer(seen: SeenLayer) -> None:
        nonlocal dropped
        for visible, maps in _blocks(seen, geometry("intra"), cosine_with("intra")):
            several = visible & (visible.sum(-1, keepdim=True) > 1)
            known = several & (maps[1] != 0)
            dropped += int(several.sum() - known.sum())
            moments.add(torch.stack([x[known] for x in maps]))
            _columns(known, maps, sample)

    run_texts(model, texts, on_layer, description="interference", show_progress=show_progress)
    rows = sample.rows.astype(np.float64).reshape(-1, 2)
    table = pd.DataFrame(rows, columns=["ratio", "cosine"])
    r = float(moments.correlations()[0, 1])
    numbers = {"r": r, "points": moments.count, "dropped": dropped}
    settings = {"texts": len(texts), "tokens": sum(map(len, texts)), "points": points, "seed": seed}
    return Interference(settings, numbers, {"sample": table})
