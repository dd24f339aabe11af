"""How the sink suppresses: the norms of head outputs, and where they point.

The norm of a head's output against the attention on the first token, with the model of Appendix E
of arXiv 2606.07604 (Figs. 5b and 11), and head outputs beside the cone of values (Fig. 6).

With ``a`` the attention of a query on the first token, whose projected value is ``v~_1``, a head's
output is ``o = a v~_1 + w``, where ``w`` holds the other tokens. If ``||w|| = k (1 - a)`` and
``<v~_1, w> = g (1 - a)``, then (Eq. 20)::

    ||o||^2 = a^2 ||v~_1||^2 + 2 a (1 - a) g + (1 - a)^2 k^2

which is least at ``a = (k^2 - g) / (k^2 - 2 g + ||v~_1||^2)`` (Eq. 31). Eq. 28 is printed with
``2 a (a - 1) g``, the other sign; Eq. 20, 29, 30 and 31 have this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw.analysis.components import r2
from captum_cw.analysis.geometry import inner_products, projected
from captum_cw.analysis.result import AnalysisResult, Picture
from captum_cw.analysis.streaming import Batches, Reservoir, SeenLayer, run_texts, texts_of
from captum_cw.functional import attention, map_blocks

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "OutputNorms",
    "SemanticCone",
    "output_norms",
    "predicted_norm",
    "semantic_cone",
    "sink_rate_of_least_norm",
]

#: Points of a picture.
SHOWN = 4000
#: Of the values that lie within the cone.
INSIDE = 0.9

Array = np.ndarray[Any, Any]


def predicted_norm(a: Array, v1: float, g: float, k: float) -> Array:
    """The norm of a head's output by Eq. 20, for sink rates ``a``.

    Example:
        >>> predicted_norm(np.array([0.0, 1.0]), v1=1.0, g=-0.5, k=2.0).tolist()
        [2.0, 1.0]
    """
    squares = (a * v1) ** 2 + 2 * a * (1 - a) * g + ((1 - a) * k) ** 2
    norm: Array = np.sqrt(np.clip(squares, 0, None))
    return norm


def sink_rate_of_least_norm(v1: float, g: float, k: float) -> float:
    """The sink rate at which Eq. 20 is least over [0, 1] (Eq. 31).

    NaN where it is constant, or bends down between two ends of the same height.

    Example:
        >>> sink_rate_of_least_norm(v1=1.0, g=0.0, k=1.0), sink_rate_of_least_norm(1.0, 4.0, 2.0)
        (0.5, 1.0)
    """
    curvature = k**2 - 2 * g + v1**2
    if curvature <= 0:  # a line, or no norms at all: at the end where it is lower
        return float("nan") if v1 == k else float(v1 < k)
    return float(np.clip((k**2 - g) / curvature, 0, 1))


class OutputNorms(AnalysisResult):
    """Norms of head outputs against the sink rate, with the model of them (Figs. 5b, 11).

    Attributes:
        settings: With the ``"layer"`` and ``"head"`` of the picture.
        numbers: ``"heads"``, and how many of them have their ``"least below 1"``; likewise for the
            counterfactual ``g = 0``; ``"heads opposed"`` (``g < 0``); median R2 of the fits.
        tables: ``"heads"``: ``layer``, ``head``, slopes ``k`` and ``g`` with their centred R2, the
            norm ``v1`` of the first value, ``mean_norm`` of the others, the sink rate of the least
            norm ``least`` by Eq. 31, with ``g = 0`` and with the sign of Eq. 28 as printed, and
            centred R2 of Eq. 20 for the norms themselves. ``"points"``: of one head, for a sample
            of tokens, ``position`` (0 to 1), ``sink_rate``, ``norm``, ``rest`` (``||w||``) and
            ``along`` (``<v~_1, w>``).
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """One head's norms with the curve, R2 by layer, and that head's two fits."""
        from captum_cw.analysis.figures.geometry import plot_output_norms

        place, heads = (self.settings["layer"], self.settings["head"]), self.tables["heads"]
        of = heads[(heads["layer"] == place[0]) & (heads["head"] == place[1])].iloc[0]
        rates: Array = np.linspace(0, 1, 201)
        curves = {
            "model (Eq. 20)": predicted_norm(rates, of.v1, of.g, of.k),
            "the same, g = 0": predicted_norm(rates, of.v1, 0.0, of.k),
            "sign as printed in Eq. 28": predicted_norm(rates, of.v1, -of.g, of.k),
        }
        return plot_output_norms(
            heads, self.tables["points"], place, rates, curves, use_pyplot=use_pyplot
        )


def output_norms(
    model: nn.Module,
    batches: Batches,
    *,
    tokens: int = 20_000,
    layer: int | None = None,
    head: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> OutputNorms:
    """Fits the norm of each head's output by the attention on the first token (Appendix E).

    ``k`` and ``g`` are slopes of lines through the origin, of ``||w||`` and ``<v~_1, w>`` on ``1 -
    a``: ``k`` is the typical norm of the mean of the other values, weighted by attention, which the
    text calls their mean norm (given beside it).

    Args:
        model: A causal model.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
        tokens: Of a uniform sample of queries that the fits are made to, the first of each text
            left out; the paper takes all of 32 batches.
        layer: Of the head that is shown; None for the head whose sink rate varies most.
        head: In that layer; both or none are to be given.
        seed: Of the sample.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Raises:
        IndexError: If there is no such head.
        UnsupportedModelError: If a gate makes projected values differ from query to query.
        ValueError: If a text has less than three tokens, the model is not causal, or no query
            sees the first token.

    Example:
        >>> result = output_norms(model, input_ids)
        >>> result.numbers["heads"], len(result.tables["heads"])
        (8.0, 8)
    """
    if (layer is None) != (head is None):
        raise ValueError(f"layer={layer}, head={head}: give both, or none.")
    texts, sample = texts_of(batches, shortest=3), Reservoir(tokens, seed)
    queries: Array = np.zeros(0, dtype=np.int64)
    # What this text adds to the sample, a part for each layer.
    parts: list[Array] = []
    values: dict[int, list[tuple[Array, Array]]] = {}

    def on_layer(seen: SeenLayer) -> None:
        nonlocal queries
        if seen.number == 0:
            queries = 1 + sample.draw(seen.T - 1)
        found = head_norms(seen)
        parts.append(found.queries[:, torch.from_numpy(queries)].cpu().numpy())
        values.setdefault(seen.number, []).append(
            (found.first.cpu().numpy(), found.others.cpu().numpy())
        )

    def after_text(ids: Tensor) -> None:
        # A row for each query: its place from 0 to 1, and the numbers of all heads.
        heads = sum(len(part) for part in parts)
        numbers = np.concatenate(parts).transpose(1, 0, 2).reshape(len(queries), 4 * heads)
        rows = np.concatenate([queries[:, None] / (len(ids) - 1), numbers], 1)
        sample.add(rows.astype(np.float32))
        parts.clear()

    run_texts(
        model, texts, on_layer, after_text=after_text, description="output norms",
        show_progress=show_progress,
    )  # fmt: skip
    settings = {
        "texts": len(texts), "tokens": sum(map(len, texts)), "sampled": tokens, "seed": seed,
    }  # fmt: skip
    rows = sample.rows
    position: Array = rows[:, 0]
    rest: Array = rows[:, 1:].reshape(len(rows), -1, 4)
    heads: list[dict[str, Any]] = []
    for number, pairs in values.items():
        for n in range(len(pairs[0][0])):
            first = float(np.sqrt(np.mean([v1[n] ** 2 for v1, _ in pairs])))
            mean_norm = float(np.mean([others[n] for _, others in pairs]))
            of = rest[:, len(heads)]
            heads.append({"layer": number, "head": n, **fit_norms(of, first, mean_norm)})
    return _output_norms(settings, heads, rest, position, layer, head, seed)


class HeadNorms:
    """What a layer's heads make of a text.

    Args:
        queries: ``(H, T, 4)``: the sink rate ``a`` (NaN where the query does not see the first
            token), ``||o||``, ``||w||`` and ``<v~_1, w>``.
        first: ``(H,)``, ``||v~_1||``.
        others: ``(H,)``, the mean of ``||v~_j||``, ``j > 1``.
    """

    def __init__(self, queries: Tensor, first: Tensor, others: Tensor) -> None:
        self.queries, self.first, self.others = queries, first, others


def head_norms(seen: SeenLayer) -> HeadNorms:
    """The norms of head outputs and of their parts, in float64."""
    value, gram = projected(seen)
    a, w, sees = _parts(seen, value)
    first = value[:, :1]
    y = a[..., None] * first + w
    norms = [inner_products(x, gram, x).clamp(min=0).sqrt() for x in (y, w, value)]
    along = inner_products(w, gram, first)
    a = a.masked_fill(~sees, torch.nan)
    queries = torch.stack([a, norms[0], norms[1], along], -1)
    return HeadNorms(queries, norms[2][:, 0], norms[2][:, 1:].mean(1))


def _parts(seen: SeenLayer, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What head outputs are made of, before they are projected.

    What others than the first token give is summed anew, as a difference to the head output would
    be nothing but its rounding where nearly all attention is on the first, and in half precision.

    Args:
        seen: The layer.
        value: ``(H, S, d_h)``, float64.

    Returns:
        The attention on the first token ``(H, T)``, what the others give ``(H, T, d_h)``, float64,
        and whether a query sees the first, ``(H, T)``.
    """
    columns, rest, visible = [], [], []
    for rows, (weights,) in map_blocks(seen.layer, attention):
        a = weights[0].double()
        columns.append(a[..., 0])
        rest.append(a[..., 1:] @ value[:, 1 : a.shape[-1]])
        block = seen.layer.mask.block(rows)
        shape = columns[-1].shape
        whole = torch.ones(shape, dtype=torch.bool, device=a.device)
        visible.append(whole if block is None else block[0, ..., 0].expand(shape))
    return torch.cat(columns, 1), torch.cat(rest, 1), torch.cat(visible, 1)


def fit_norms(points: Array, v1: float, mean_norm: float) -> dict[str, float]:
    """The model of Appendix E for one head.

    Args:
        points: ``(tokens, 4)``, as :class:`HeadNorms` has them.
        v1: ``||v~_1||``.
        mean_norm: Of the other values.
    """
    from sklearn.linear_model import LinearRegression

    points = points[~np.isnan(points[:, 0])].astype(np.float64)
    if not len(points):
        raise ValueError(
            "No sampled query sees the first token: give texts that are shorter than the windows "
            "of the model's attention."
        )
    a, norm, rest, along = points.T
    x = (1 - a)[:, None]
    slopes, fits = [], []
    for y in (rest, along):
        if not x.any():  # all attention is on the first token: no line is better than another
            slopes.append(float("nan"))
            fits.append(float("nan"))
            continue
        line = LinearRegression(fit_intercept=False).fit(x, y)
        slopes.append(float(line.coef_[0]))
        fits.append(r2(y, line.predict(x)))
    k, g = slopes
    return {
        "k": k,
        "g": g,
        "r2_k": fits[0],
        "r2_g": fits[1],
        "v1": v1,
        "mean_norm": mean_norm,
        "least": sink_rate_of_least_norm(v1, g, k),
        "least_without_g": sink_rate_of_least_norm(v1, 0.0, k),
        "least_as_printed": sink_rate_of_least_norm(v1, -g, k),
        "r2_norm": r2(norm, predicted_norm(a, v1, g, k)),
        "mean_sink_rate": float(a.mean()),
        "spread": float(a.std()),
    }


def _output_norms(
    settings: Mapping[str, Any],
    heads: list[dict[str, Any]],
    rest: Array,
    position: Array,
    layer: int | None,
    head: int | None,
    seed: int,
) -> OutputNorms:
    import pandas as pd

    table = pd.DataFrame(heads)
    if layer is None:
        shown = int(table.spread.idxmax())
    else:
        of = table.index[(table["layer"] == layer) & (table["head"] == head)]
        if not len(of):
            raise IndexError(f"layer={layer}, head={head}: there is no such head.")
        shown = int(of[0])
    # Of all texts: the sample is in the order of texts.
    few = np.random.default_rng(seed).choice(len(rest), min(SHOWN, len(rest)), replace=False)
    few.sort()
    names = ("sink_rate", "norm", "rest", "along")
    sample = pd.DataFrame(rest[few, shown].astype(np.float64), columns=list(names))
    sample.insert(0, "position", position[few].astype(np.float64))
    numbers = {
        "heads": float(len(table)),
        "least below 1": float((table.least < 1).sum()),
        "least below 1 without g": float((table.least_without_g < 1).sum()),
        "heads opposed": float((table.g < 0).sum()),
        "median r2 of k": float(table.r2_k.median()),
        "median r2 of g": float(table.r2_g.median()),
        "median r2 of norms": float(table.r2_norm.median()),
    }
    place = {"layer": int(table["layer"][shown]), "head": int(table["head"][shown])}
    return OutputNorms(
        {**settings, **place}, numbers, {"heads": table, "points": sample.dropna(ignore_index=True)}
    )


class SemanticCone(AnalysisResult):
    """Head outputs beside the cone of non-sink values, with the sink's value and without (Fig. 6).

    Attributes:
        settings: With the ``"layer"`` and ``"head"`` of the picture.
        numbers: Means over heads and texts: the share of outputs ``"inside with sink"`` and
            ``"inside without"``, of the quarter with the lowest norm; and of all the others, as
            ``"others inside ..."``.
        tables: ``"heads"``: these by ``layer`` and ``head`` with the cone's ``angle`` in degrees
            and the ``sink_angle``; ``"texts"``: by ``text``; ``"points"``: of one head and text,
            coordinates ``along`` the mean value and ``across`` it (the sink's orthogonal part),
            with the ``norm``, for ``outputs`` ``with`` the sink and ``without``; ``"sink"``: its
            coordinates, and the ``angle`` of the cone there.
    """

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """One head's outputs in the plane of the mean value and the sink, both ways."""
        from captum_cw.analysis.figures.geometry import plot_cone

        place = self.settings["layer"], self.settings["head"]
        return plot_cone(self.tables["points"], self.tables["sink"], place, use_pyplot=use_pyplot)


def semantic_cone(
    model: nn.Module,
    batches: Batches,
    *,
    layer: int | None = None,
    head: int | None = None,
    show_progress: bool = False,
) -> SemanticCone:
    """Where head outputs point, with the first token's value and without it (Fig. 6).

    For each head and text, ``m`` is the mean of the projected values but the first, and the cone
    around it holds 90% of them (angles in the full space). Of the quarter of head outputs with the
    lowest norm, how many lie inside: as they are, and as the first token's value is set to zero?
    That the second is nearly all follows nearly by construction: what is left then is a mean of the
    values that made the cone.

    Args:
        model: A causal model.
        batches: As :func:`output_norms`.
        layer: Of the head that is shown, on the first text; None for the head with the most
            outputs that enter the cone once the sink is gone.
        head: In that layer; both or none are to be given.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Raises:
        IndexError, UnsupportedModelError, ValueError: As :func:`output_norms`; a text needs five
            tokens, for a quarter of its queries to be one.

    Example:
        >>> ids = torch.arange(1, 9)[None]
        >>> 0 <= semantic_cone(model, ids).numbers["inside with sink"] <= 1
        True
    """
    import pandas as pd

    if (layer is None) != (head is None):
        raise ValueError(f"layer={layer}, head={head}: give both, or none.")
    texts = texts_of(batches, shortest=5)
    rows = []
    pictures: dict[tuple[int, int], tuple[Tensor, list[float]]] = {}

    def on_layer(seen: SeenLayer) -> None:
        value, gram = projected(seen)
        a, rest, _ = _parts(seen, value)
        found = cone(value, gram, a, rest)
        for n, shares in enumerate(found.shares.tolist()):
            names = ("with_sink", "without", "others_with_sink", "others_without")
            rows.append(
                {"text": seen.text, "layer": seen.number, "head": n,
                 **dict(zip(names, shares, strict=True)),
                 "angle": float(found.angle[n]), "sink_angle": float(found.sink_angle[n])}
            )  # fmt: skip
            if seen.text == 0:
                arrow = [*found.sink[n].tolist(), float(found.angle[n])]
                pictures[seen.number, n] = found.plane[:, n].cpu(), arrow

    run_texts(model, texts, on_layer, description="cone", show_progress=show_progress)
    table = pd.DataFrame(rows)
    heads = table.drop(columns="text").groupby(["layer", "head"]).mean().reset_index()
    by_text = table.drop(columns=["layer", "head"]).groupby("text").mean().reset_index()
    place = _shown(heads, layer, head)
    plane, arrow = pictures[place]
    points = pd.concat(
        [
            pd.DataFrame(part.numpy(), columns=["along", "across", "norm"]).assign(outputs=name)
            for name, part in zip(("with", "without"), plane, strict=True)
        ],
        ignore_index=True,
    )
    sink = pd.DataFrame([arrow], columns=["along", "across", "angle"])
    numbers = {
        "inside with sink": float(heads.with_sink.mean()),
        "inside without": float(heads.without.mean()),
        "others inside with sink": float(heads.others_with_sink.mean()),
        "others inside without": float(heads.others_without.mean()),
    }
    settings = {
        "texts": len(texts), "tokens": sum(map(len, texts)), "layer": place[0], "head": place[1],
    }  # fmt: skip
    tables = {"heads": heads, "texts": by_text, "points": points, "sink": sink}
    return SemanticCone(settings, numbers, tables)


def _shown(heads: pd.DataFrame, layer: int | None, head: int | None) -> tuple[int, int]:
    if layer is None or head is None:
        row = heads.loc[(heads.without - heads.with_sink).idxmax()]
        return int(row["layer"]), int(row["head"])
    if not ((heads["layer"] == layer) & (heads["head"] == head)).any():
        raise IndexError(f"layer={layer}, head={head}: there is no such head.")
    return int(layer), int(head)


class Cone:
    """The cone of a layer's heads over one text.

    Args:
        shares: ``(H, 4)``: of the quarter of outputs with the lowest norm, how many lie inside,
            with the sink and without; then of the others.
        angle: ``(H,)``, of the cone, in degrees.
        sink_angle: ``(H,)``, of the first token's value to the mean value, in degrees.
        plane: ``(2, H, T - 1, 3)``: with the sink and without, coordinates along and across the
            mean value, and the norm of the output as it is.
        sink: ``(H, 2)``, the coordinates of the first token's value.
    """

    def __init__(
        self, shares: Tensor, angle: Tensor, sink_angle: Tensor, plane: Tensor, sink: Tensor
    ) -> None:
        self.shares, self.angle, self.sink_angle = shares, angle, sink_angle
        self.plane, self.sink = plane, sink


def cone(value: Tensor, gram: Tensor, a: Tensor, rest: Tensor) -> Cone:
    """Where head outputs lie beside the cone of the values but the first.

    The first query, whose output is the sink itself, is left out.

    Args:
        value: ``(H, S, d_h)``.
        gram: ``(H, d_h, d_h)``.
        a: ``(H, T)``, the attention on the first token.
        rest: ``(H, T, d_h)``, what the others give to head outputs.
    """
    first, others = value[:, :1], value[:, 1:]
    mean = others.mean(1, keepdim=True)
    size = _norm(mean, gram)
    w = rest[:, 1:]
    y = a[:, 1:, None] * first + w

    def angles(x: Tensor) -> Tensor:
        cosines = inner_products(x, gram, mean) / (_norm(x, gram) * size)
        # What is nothing points nowhere: at a right angle.
        return torch.rad2deg(cosines.nan_to_num().clamp(-1, 1).arccos())

    angle = torch.quantile(angles(others), INSIDE, dim=1)
    norms = _norm(y, gram)
    quarter = norms.argsort(dim=1, stable=True)[:, : norms.shape[1] // 4]
    lowest = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, quarter, True)
    shares = []
    for which in (lowest, ~lowest):
        for x in (y, w):
            inside = angles(x) <= angle[:, None]
            shares.append((inside & which).sum(1) / which.sum(1).to(norms.dtype))
    # The sink's part that is orthogonal to the mean value spans the plane with it.
    along = inner_products(first, gram, mean) / size**2
    across = first - along[..., None] * mean
    width = _norm(across, gram)

    def coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (inner_products(x, gram, mean) / size).nan_to_num(),
            (inner_products(x, gram, across) / width).nan_to_num(),
        )

    plane = torch.stack([torch.stack([*coordinates(x), norms], -1) for x in (y, w)])
    sink = torch.stack(coordinates(first), -1)[:, 0]
    return Cone(torch.stack(shares, 1), angle, angles(first)[:, 0], plane, sink)


def _norm(x: Tensor, gram: Tensor) -> Tensor:
    return inner_products(x, gram, x).clamp(min=0).sqrt()
