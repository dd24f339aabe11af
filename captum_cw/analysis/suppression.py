"""Measure how the sink suppresses head outputs, by their norms and their directions.

These analyses fit the norm of a head's output by the attention on the first token, with the model
of Appendix E of arXiv 2606.07604 (Figs. 5b and 11), and compare head outputs with the cone of
values (Fig. 6).

Let ``a`` be the attention of a query on the first token, whose projected value is ``v~_1``. The
head's output is ``o = a v~_1 + w``, where ``w`` comes from the other tokens. If ``||w|| = k (1 -
a)`` and ``<v~_1, w> = g (1 - a)``, then (Eq. 20)::

    ||o||^2 = a^2 ||v~_1||^2 + 2 a (1 - a) g + (1 - a)^2 k^2

The minimum is at ``a = (k^2 - g) / (k^2 - 2 g + ||v~_1||^2)`` (Eq. 31). Eq. 28 is printed with
``2 a (a - 1) g``, with the opposite sign. Eq. 20, 29, 30 and 31 have the sign above.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_cw.analysis.components import SHOWN, r2, slope_through_origin
from captum_cw.analysis.geometry import inner_products, norms, values_and_gram
from captum_cw.analysis.result import AnalysisResult, Array, settings_of
from captum_cw.analysis.streaming import (
    Batches,
    Reservoir,
    SeenLayer,
    run_texts,
    texts_of,
    visible_blocks,
)
from captum_cw.functional import attention

#: The fraction of values inside the cone.
INSIDE = 0.9
#: The columns of :attr:`Cone.shares`, and the names of their means.
SHARES = {
    "with_sink": "inside with sink",
    "without": "inside without",
    "others_with_sink": "others inside with sink",
    "others_without": "others inside without",
}


def predicted_norm(a: Array, v1: float, g: float, k: float) -> Array:
    """Compute the norm of a head's output by Eq. 20, for sink rates ``a``.

    Example:
        >>> predicted_norm(np.array([0.0, 1.0]), v1=1.0, g=-0.5, k=2.0).tolist()
        [2.0, 1.0]
    """
    squares = (a * v1) ** 2 + 2 * a * (1 - a) * g + ((1 - a) * k) ** 2
    norm: Array = np.sqrt(np.clip(squares, 0, None))
    return norm


def sink_rate_of_least_norm(v1: float, g: float, k: float) -> float:
    """Return the sink rate in [0, 1] at which the norm by Eq. 20 is smallest (Eq. 31).

    NaN if both ends are minima: the norm is constant, or concave with ends of the same height.

    Example:
        >>> sink_rate_of_least_norm(v1=1.0, g=0.0, k=1.0), sink_rate_of_least_norm(1.0, 4.0, 2.0)
        (0.5, 1.0)
    """
    curvature = k**2 - 2 * g + v1**2
    if curvature <= 0:  # linear or concave: the minimum is at the lower end
        return float("nan") if v1 == k else float(v1 < k)
    return float(np.clip((k**2 - g) / curvature, 0, 1))


class OutputNorms(AnalysisResult):
    """The norms of head outputs against the sink rate, with their model (Figs. 5b, 11).

    The plot shows one head's norms with the model, R2 by layer, and that head's two fits.

    Attributes:
        settings: Include the ``"layer"`` and ``"head"`` of the plot.
        numbers: ``"heads"`` is the number of heads, and ``"least below 1"`` is how many of them
            have their smallest norm below a sink rate of 1. ``"least below 1 without g"`` is the
            same number for the counterfactual ``g = 0``. ``"heads opposed"`` is how many have ``g <
            0``. The others are the median R2 of the fits.
        tables: ``"heads"``: ``layer``, ``head``, the slopes ``k`` and ``g`` with their centred R2,
            the norm ``v1`` of the first value, the ``mean_norm`` of the other values, the sink rate
            of the smallest norm by Eq. 31 (``least``), with ``g = 0`` and with the sign of Eq. 28
            as printed, and the centred R2 of Eq. 20 for the norms. ``"points"``, of one head for a
            sample of tokens: ``position`` (0 to 1), ``sink_rate``, ``norm``, ``rest`` (``||w||``)
            and ``along`` (``<v~_1, w>``).
    """


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
    """Fit the norm of each head's output by the attention on the first token (Appendix E).

    ``k`` and ``g`` are slopes of lines through the origin, of ``||w||`` and ``<v~_1, w>`` on ``1 -
    a``. So ``k`` is the typical norm of the mean of the other values, weighted by attention. The
    paper's text calls it their mean norm, which the result also has.

    Args:
        model: A causal model.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
        tokens: The size of the uniform sample of queries for the fits. The first query of each text
            is left out. The paper uses all queries of 32 batches.
        layer: The layer of the head to plot. By default, the head whose sink rate varies most.
        head: The head to plot, in that layer. Give both or neither.
        seed: Random seed of the sample.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        IndexError: If the layer or head does not exist.
        UnsupportedModelError: If a gate makes projected values differ from query to query.
        ValueError: If a text has fewer than three tokens, the model is not causal, or not a single
            query sees the first token.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = output_norms(model, inputs)
        >>> result.numbers["heads"], len(result.tables["heads"])
        (8.0, 8)
    """
    if (layer is None) != (head is None):
        raise ValueError(f"layer={layer}, head={head}: give both or neither.")
    texts = texts_of(batches, shortest=3)
    sampled = _sample_queries(texts, tokens, seed)
    measured: dict[int, list[HeadNorms]] = {}

    def on_layer(seen: SeenLayer) -> None:
        of_text = head_norms(seen)
        queries = of_text.queries[:, sampled[seen.text]].float()
        measured.setdefault(seen.number, []).append(of_text._replace(queries=queries))

    run_texts(model, texts, on_layer, show_progress=show_progress)
    rows, points = [], {}
    for number, by_text in measured.items():
        queries = torch.cat([x.queries for x in by_text], 1).cpu().numpy()
        v1 = torch.stack([x.first for x in by_text]).square().mean(0).sqrt().tolist()
        mean_norm = torch.stack([x.others for x in by_text]).mean(0).tolist()
        for n, of_head in enumerate(queries):
            points[number, n] = of_head
            rows.append({"layer": number, "head": n, **fit_norms(of_head, v1[n], mean_norm[n])})
    heads = pd.DataFrame(rows)
    if layer is None or head is None:
        layer, head = map(int, heads.loc[heads.spread.idxmax(), ["layer", "head"]])
    if (layer, head) not in points:
        raise IndexError(f"layer={layer}, head={head}: this head does not exist.")
    columns = ["sink_rate", "norm", "rest", "along"]
    sample = pd.DataFrame(points[layer, head].astype(np.float64), columns=columns)
    position = [q.float() / (len(ids) - 1) for q, ids in zip(sampled, texts, strict=True)]
    sample.insert(0, "position", torch.cat(position).double().numpy())
    shown = np.random.default_rng(seed).choice(len(sample), min(SHOWN, len(sample)), replace=False)
    sample = sample.iloc[np.sort(shown)].dropna(ignore_index=True)
    numbers = {
        "heads": float(len(heads)),
        "least below 1": float((heads.least < 1).sum()),
        "least below 1 without g": float((heads.least_without_g < 1).sum()),
        "heads opposed": float((heads.g < 0).sum()),
        "median r2 of k": float(heads.r2_k.median()),
        "median r2 of g": float(heads.r2_g.median()),
        "median r2 of norms": float(heads.r2_norm.median()),
    }
    settings = settings_of(texts, sampled=tokens, seed=seed, layer=int(layer), head=int(head))
    return OutputNorms(settings, numbers, {"heads": heads, "points": sample})


def _sample_queries(texts: list[Tensor], size: int, seed: int) -> list[Tensor]:
    """Draw a uniform sample of the queries of all texts, without the first query of each.

    Returns:
        The sampled queries of each text, ascending.
    """
    sample = Reservoir(size, seed)
    for text, ids in enumerate(texts):
        queries = 1 + sample.draw(len(ids) - 1)
        sample.add(np.stack([np.full_like(queries, text), queries], 1))
    text, query = torch.from_numpy(sample.rows).T
    return [query[text == n] for n in range(len(texts))]


class HeadNorms(NamedTuple):
    """The norms of the head outputs of a layer over one text.

    Args:
        queries: The sink rate ``a`` (NaN if the query does not see the first token), ``||o||``,
            ``||w||`` and ``<v~_1, w>``, ``(H, T, 4)``.
        first: ``||v~_1||``, ``(H,)``.
        others: The mean of ``||v~_j||`` over ``j > 1``, ``(H,)``.
    """

    queries: Tensor
    first: Tensor
    others: Tensor


def head_norms(seen: SeenLayer) -> HeadNorms:
    """Compute the norms of head outputs and of their parts, in float64."""
    value, gram = values_and_gram(seen)
    a, w, sees = _split_outputs(seen, value)
    first = value[:, :1]
    y = a[..., None] * first + w
    along = inner_products(w, gram, first)
    a = a.masked_fill(~sees, torch.nan)
    queries = torch.stack([a, norms(y, gram), norms(w, gram), along], -1)
    lengths = norms(value, gram)
    return HeadNorms(queries, lengths[:, 0], lengths[:, 1:].mean(1))


def _split_outputs(seen: SeenLayer, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split head outputs into the parts of the first token and of the others, before projection.

    The part of the others is summed directly. The difference of the head output and the first
    token's part would be only rounding error where nearly all attention is on the first token.

    Args:
        seen: The layer.
        value: ``(H, S, d_h)``, float64.

    Returns:
        The attention on the first token ``(H, T)``, the part of the others ``(H, T, d_h)``, both in
        float64, and whether a query sees the first token, ``(H, T)``.
    """
    parts = []
    for _, visible, (weights,) in visible_blocks(seen.layer, attention):
        a = weights.double()
        rest = a[..., 1:] @ value[:, 1 : a.shape[-1]]
        parts.append((a[..., 0], rest, visible[..., 0].expand(a.shape[:2])))
    first, others, sees = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return first, others, sees


def fit_norms(points: Array, v1: float, mean_norm: float) -> dict[str, float]:
    """Fit the model of Appendix E to one head.

    Args:
        points: ``(tokens, 4)``, with the columns of :class:`HeadNorms`.
        v1: ``||v~_1||``.
        mean_norm: The mean norm of the other values.
    """
    points = points[~np.isnan(points[:, 0])].astype(np.float64)
    if not len(points):
        raise ValueError(
            "No sampled query sees the first token: give texts that are shorter than the "
            "attention windows of the model."
        )
    a, norm, rest, along = points.T
    x = 1 - a
    # If all attention is on the first token, any slope fits.
    k, g = (slope_through_origin(x, y) if x.any() else float("nan") for y in (rest, along))
    return {
        "k": k,
        "g": g,
        "r2_k": r2(rest, k * x),
        "r2_g": r2(along, g * x),
        "v1": v1,
        "mean_norm": mean_norm,
        "least": sink_rate_of_least_norm(v1, g, k),
        "least_without_g": sink_rate_of_least_norm(v1, 0.0, k),
        "least_as_printed": sink_rate_of_least_norm(v1, -g, k),
        "r2_norm": r2(norm, predicted_norm(a, v1, g, k)),
        "mean_sink_rate": float(a.mean()),
        "spread": float(a.std()),
    }


class SemanticCone(AnalysisResult):
    """The directions of head outputs and the cone of values, with and without the sink (Fig. 6).

    The plot shows one head's outputs in the plane of the mean value and the sink, both ways.

    Attributes:
        settings: Include the ``"layer"`` and ``"head"`` of the plot.
        numbers: Means over heads and texts of the fraction of outputs inside the cone. ``"inside
            with sink"`` and ``"inside without"`` are for the quarter of outputs with the lowest
            norm, and ``"others inside ..."`` for all others.
        tables: ``"heads"``: these fractions by ``layer`` and ``head``, with the cone's ``angle``
            and the ``sink_angle`` in degrees. ``"texts"``: by ``text``. ``"points"``, of one head
            and text: the coordinates ``along`` the mean value and ``across`` it (along the
            orthogonal part of the sink's value) and the ``norm``, for ``outputs`` ``with`` and
            ``without`` the sink. ``"sink"``: the sink's coordinates, and the ``angle`` of the cone.
    """


def semantic_cone(
    model: nn.Module,
    batches: Batches,
    *,
    show_progress: bool = False,
) -> SemanticCone:
    """Compute where head outputs point, with and without the first token's value (Fig. 6).

    For each head and text, ``m`` is the mean of the projected values except the first. The cone
    around ``m`` holds 90% of these values, by their angles in the full space. The result is the
    fraction of outputs inside the cone, for the quarter with the lowest norm: as they are, and with
    the first token's value set to zero. Without it, nearly all lie inside almost by construction:
    the output is then a mean of the values that define the cone.

    The plot shows the head with the most outputs that enter the cone without the sink, on the first
    text.

    Args:
        model: A causal model.
        batches: Token ids, as for :func:`output_norms`.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        UnsupportedModelError, ValueError: As :func:`output_norms`. A text needs five tokens, so
            that a quarter of its queries is at least one.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> 0 <= semantic_cone(model, inputs).numbers["inside with sink"] <= 1
        True
    """
    texts = texts_of(batches, shortest=5)
    parts: list[pd.DataFrame] = []
    cones: list[Cone] = []  # of the first text, by layer

    def on_layer(seen: SeenLayer) -> None:
        value, gram = values_and_gram(seen)
        a, rest, _ = _split_outputs(seen, value)
        layer_cone = cone(value, gram, a, rest)
        if seen.text == 0:
            cones.append(layer_cone)
        shares, angle, sink_angle = (x.cpu().numpy() for x in layer_cone[:3])
        part = pd.DataFrame(shares, columns=list(SHARES))
        place = {"text": seen.text, "layer": seen.number, "head": part.index}
        parts.append(part.assign(**place, angle=angle, sink_angle=sink_angle))

    run_texts(model, texts, on_layer, show_progress=show_progress)
    table, columns = pd.concat(parts), [*SHARES, "angle", "sink_angle"]
    heads = table.groupby(["layer", "head"])[columns].mean().reset_index()
    by_text = table.groupby("text")[columns].mean().reset_index()
    most = (heads.without - heads.with_sink).idxmax()
    layer, head = map(int, heads.loc[most, ["layer", "head"]])
    shown = cones[layer]
    plane = shown.plane[:, head].cpu().numpy()
    points = pd.DataFrame(plane.reshape(-1, 3), columns=["along", "across", "norm"])
    points["outputs"] = np.repeat(["with", "without"], plane.shape[1])
    arrow = [*shown.sink[head].tolist(), float(shown.angle[head])]
    sink = pd.DataFrame([arrow], columns=["along", "across", "angle"])
    numbers = {label: float(heads[column].mean()) for column, label in SHARES.items()}
    settings = settings_of(texts, layer=layer, head=head)
    tables = {"heads": heads, "texts": by_text, "points": points, "sink": sink}
    return SemanticCone(settings, numbers, tables)


class Cone(NamedTuple):
    """The cones of a layer's heads over one text.

    Args:
        shares: ``(H, 4)``: the fraction inside the cone, with and without the sink, of the quarter
            of outputs with the lowest norm; then the same of the other outputs.
        angle: The angle of the cone in degrees, ``(H,)``.
        sink_angle: The angle of the first token's value to the mean value in degrees, ``(H,)``.
        plane: ``(2, H, T - 1, 3)``: with and without the sink, the coordinates along and across the
            mean value, and the norm of the unchanged output.
        sink: The coordinates of the first token's value, ``(H, 2)``.
    """

    shares: Tensor
    angle: Tensor
    sink_angle: Tensor
    plane: Tensor
    sink: Tensor


def cone(value: Tensor, gram: Tensor, a: Tensor, rest: Tensor) -> Cone:
    """Compare head outputs with the cone of the values except the first.

    The first query is left out: its output is the sink itself.

    Args:
        value: ``(H, S, d_h)``.
        gram: ``(H, d_h, d_h)``.
        a: The attention on the first token, ``(H, T)``.
        rest: The part of head outputs from the other tokens, ``(H, T, d_h)``.
    """
    first, others = value[:, :1], value[:, 1:]
    mean = others.mean(1, keepdim=True)
    size = norms(mean, gram)
    w = rest[:, 1:]
    y = a[:, 1:, None] * first + w

    def angles(x: Tensor) -> Tensor:
        cosines = inner_products(x, gram, mean) / (norms(x, gram) * size)
        # A zero vector counts as orthogonal.
        return torch.rad2deg(cosines.nan_to_num().clamp(-1, 1).arccos())

    angle = torch.quantile(angles(others), INSIDE, dim=1)
    lengths = norms(y, gram)
    quarter = lengths.argsort(dim=1, stable=True)[:, : lengths.shape[1] // 4]
    lowest = torch.zeros_like(lengths, dtype=torch.bool).scatter_(1, quarter, True)
    inside = torch.stack([angles(x) <= angle[:, None] for x in (y, w)])
    shares = [(inside & which).double().sum(-1) / which.sum(-1) for which in (lowest, ~lowest)]
    # The plane is spanned by the mean value and the part of the sink's value orthogonal to it.
    along = inner_products(first, gram, mean) / size**2
    across = first - along[..., None] * mean
    width = norms(across, gram)

    def coordinates(x: Tensor) -> Tensor:
        on_mean = inner_products(x, gram, mean) / size
        return torch.stack([on_mean, inner_products(x, gram, across) / width], -1).nan_to_num()

    plane = torch.stack([torch.cat([coordinates(x), lengths[..., None]], -1) for x in (y, w)])
    sink = coordinates(first)[:, 0]
    return Cone(torch.cat(shares).T, angle, angles(first)[:, 0], plane, sink)
