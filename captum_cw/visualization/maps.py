"""Maps of heads (Figs. 1, 2 and 12 of arXiv 2606.07604) and strips of token scores.

Colours mean the same everywhere: magnitudes run from dark to bright, signed quantities from
blue over white at zero to red, and grey is where no attention went, such as the future.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from captum_cw.visualization._output import new_figure
from captum_cw.visualization.text import normalized_scores

Array = npt.NDArray[Any]

_SEQUENTIAL = "viridis"
_DIVERGING = "RdBu_r"
_BLANK = "0.85"
_COLUMNS = 4
# Beyond this many tokens at most half as many are named, evenly spaced.
_READABLE = 40
_LONGEST_LABEL = 14
# Tokens are text: a "$" in them does not open a formula.
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}


def plot_attention_and_contribution(
    attention: Tensor | Sequence[Tensor],
    contribution: Tensor | Sequence[Tensor],
    tokens: Sequence[str] | None = None,
    *,
    query_tokens: Sequence[str] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    count: int = 4,
    seed: int = 0,
    layer_names: Sequence[str] | None = None,
    batch: int = 0,
    paper_scale: bool = False,
    quantile: float = 1.0,
    use_pyplot: bool = True,
) -> tuple[Figure, Array]:
    """Attention maps above the contribution maps of the same heads (Figs. 1 and 12).

    All heads share two scales: attention from zero to its maximum, contributions symmetric
    about zero, so that white is no contribution. Cells that are zero in both maps, such as
    future keys, are left blank.

    Args:
        attention: ``(B, H, T, S)`` attention weights, or a list of them, one a layer.
        contribution: contribution weights of the same shapes, fractions of the output.
        tokens: ``S`` key tokens; positions where not given.
        query_tokens: ``T`` query tokens; ``tokens`` where ``T = S``, else positions.
        pairs: the (layer, head) pairs to show, layers counted within the list given.
        count: how many pairs to draw at random where ``pairs`` is None.
        seed: of that random choice.
        layer_names: names of the layers for the titles.
        batch: the sequence of the batch to show.
        paper_scale: use the fixed scales of Fig. 12, attention [0, 1] and contribution
            [-0.01, 0.15]; zero stays white, so the two arms of the scale differ in slope.
        quantile: let the scales end at this quantile of the magnitudes, so that a single cell
            does not pale all others. The colour bar ends in a point where cells lie beyond.
        use_pyplot: make a pyplot figure, which notebooks show; False gives a bare one, which
            need not be closed.

    Returns:
        The figure, and its ``(2, pairs)`` axes: attention, then contribution.

    Raises:
        ValueError: for maps that are not finite, not ``(B, H, T, S)`` or not alike in shape,
            tokens or layer names of another number, no pairs, or ``paper_scale`` together with
            ``quantile``.
        IndexError: for a pair or a sequence that does not exist.

    Example::

        >>> import torch
        >>> attention = torch.full((1, 2, 3, 3), 1 / 3).tril()
        >>> fig, axes = plot_attention_and_contribution(
        ...     attention, attention - 0.2 * torch.eye(3), ["<s>", "a", "b"],
        ...     pairs=[(0, 1)], use_pyplot=False)
        >>> [ax.get_title() for ax in axes[:, 0]]
        ['layer 0, head 1', '']
    """
    attention_layers = _layers("attention", attention)
    contribution_layers = _layers("contribution", contribution)
    if len(attention_layers) != len(contribution_layers):
        raise ValueError(
            f"attention has {len(attention_layers)} layers, contribution "
            f"{len(contribution_layers)}: give the same layers of both"
        )
    if layer_names is None:
        layer_names = [f"layer {n}" for n in range(len(attention_layers))]
    if len(layer_names) != len(attention_layers):
        raise ValueError(f"got {len(layer_names)} names for {len(attention_layers)} layers")
    if pairs is None:
        pairs = _random_pairs(attention_layers, count, seed)
    if not pairs:
        raise ValueError("there are no pairs to show: name at least one (layer, head)")
    weights = _heads("attention", attention_layers, pairs, batch)
    shares = _heads("contribution", contribution_layers, pairs, batch)
    if weights.shape != shares.shape:
        raise ValueError(
            f"attention has maps of shape {weights.shape[1:]}, contribution {shares.shape[1:]}: "
            "expected one (T, S) for both"
        )
    blank = (weights == 0) & (shares == 0)
    queries, keys = _labels(tokens, query_tokens, weights.shape[1:])
    weight_norm = _from_zero(weights[~blank], quantile)
    share_norm = _about_zero(shares[~blank], quantile)
    if paper_scale:
        if quantile != 1:
            raise ValueError(f"paper_scale=True fixes both scales: leave out quantile={quantile}")
        weight_norm, share_norm = Normalize(0, 1), TwoSlopeNorm(0, vmin=-0.01, vmax=0.15)

    blocks = math.ceil(len(pairs) / _COLUMNS)
    columns = math.ceil(len(pairs) / blocks)
    width, height = _panel_size(weights.shape[1:])
    size = (columns * width + 1.8, blocks * 2 * height + 1.2)
    fig, grid = new_figure(2 * blocks, columns, size, use_pyplot)
    axes = grid.reshape(blocks, 2, columns).swapaxes(0, 1).reshape(2, -1)
    for unused in axes[:, len(pairs) :].flat:
        unused.set_visible(False)
    for n, (layer, head) in enumerate(pairs):
        top, bottom = axes[:, n]
        top.set_title(f"{layer_names[layer]}, head {head}", fontsize=9, **_LITERAL)
        _draw_map(top, weights[n], blank[n], _SEQUENTIAL, weight_norm)
        _draw_map(bottom, shares[n], blank[n], _DIVERGING, share_norm)
        _name_ticks(top.xaxis, "key", None)
        _name_ticks(bottom.xaxis, "key", keys)
        for ax in (top, bottom):
            _name_ticks(ax.yaxis, "query", queries if n % columns == 0 else None)
    for attention_row, contribution_row in grid.reshape(blocks, 2, columns):
        _add_scale(fig, attention_row, "attention weight", weights[~blank])
        bar = _add_scale(fig, contribution_row, "contribution (fraction of output)", shares[~blank])
        if paper_scale:
            bar.set_ticks([-0.01, 0, 0.05, 0.1, 0.15])
    return fig, axes[:, : len(pairs)]


def plot_decomposition(
    decomposition: Sequence[Tensor],
    tokens: Sequence[str] | None = None,
    *,
    query_tokens: Sequence[str] | None = None,
    head: int = 0,
    batch: int = 0,
    quantile: float = 1.0,
    use_pyplot: bool = True,
) -> tuple[Figure, Array]:
    """The factors of one head's contributions and their product (Fig. 2, Eq. 14).

    Where neither attention nor contribution went, as to future keys, all four are blank, though
    norm and cosine have values there.

    Args:
        decomposition: attention, relative norm, cosine and contribution, in this order, each
            ``(B, H, T, S)``: what ``ContributionWeights.decompose`` gives for a layer.
        tokens: ``S`` key tokens; positions where not given.
        query_tokens: ``T`` query tokens; ``tokens`` where ``T = S``, else positions.
        head: the head to show.
        batch: the sequence of the batch to show.
        quantile: let the scales, but for the cosine's, end at this quantile of the magnitudes.
        use_pyplot: make a pyplot figure, which notebooks show; False gives a bare one, which
            need not be closed.

    Returns:
        The figure, and its four axes.

    Raises:
        ValueError: if there are not four maps, or they are not finite, not ``(B, H, T, S)``
            or not alike in shape, or for tokens of another number.
        IndexError: for a head or a sequence that does not exist.

    Example::

        >>> import torch
        >>> a, norm, cosine = torch.eye(3).expand(3, 1, 2, 3, 3)
        >>> fig, axes = plot_decomposition((a, norm, cosine, a * norm * cosine), use_pyplot=False)
        >>> [ax.get_title() for ax in axes]
        ['attention', 'relative norm', 'cosine', 'contribution']
    """
    names = ("attention", "relative norm", "cosine", "contribution")
    if len(decomposition) != len(names):
        raise ValueError(f"decomposition has {len(decomposition)} maps, expected {len(names)}")
    maps = [
        _heads(name, _layers(name, given), [(0, head)], batch)[0]
        for name, given in zip(names, decomposition, strict=True)
    ]
    shapes = [values.shape for values in maps]
    if len(set(shapes)) > 1:
        raise ValueError(f"the four maps have shapes {shapes}, expected one (T, S)")
    attention, relative_norm, _, contribution = maps
    blank = (attention == 0) & (contribution == 0)
    queries, keys = _labels(tokens, query_tokens, attention.shape)
    styles = (
        (_SEQUENTIAL, _from_zero(attention[~blank], quantile), "attention weight"),
        (_SEQUENTIAL, _from_zero(relative_norm[~blank], quantile), "value norm / output norm"),
        (_DIVERGING, Normalize(-1, 1), "cosine of value and output"),
        (_DIVERGING, _about_zero(contribution[~blank], quantile), "fraction of output"),
    )

    width, height = _panel_size(attention.shape)
    fig, grid = new_figure(1, 4, (4 * (width + 0.7) + 1, height + 1.2), use_pyplot)
    axes: Array = grid[0]
    for ax, name, values, (cmap, norm, unit) in zip(axes, names, maps, styles, strict=True):
        ax.set_title(name, fontsize=10)
        _draw_map(ax, values, blank, cmap, norm)
        _name_ticks(ax.xaxis, "key", keys)
        _name_ticks(ax.yaxis, "query", queries if ax is axes[0] else None)
        _add_scale(fig, [ax], unit, values[~blank])
    return fig, axes


def plot_token_scores(
    scores: Mapping[str, Tensor],
    tokens: Sequence[str],
    *,
    skip: Collection[int] = (),
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Scores of the same tokens by several methods, a row each.

    Every row is divided by its own largest absolute value: rows compare in pattern, not in
    size.

    Args:
        scores: ``(T,)`` scores a method, in any unit: token scores, Integrated Gradients.
        tokens: ``T`` tokens.
        skip: positions that do not set a row's scale, such as an attention sink; clipped to it.
        use_pyplot: make a pyplot figure, which notebooks show; False gives a bare one, which
            need not be closed.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: for scores of another shape than ``(T,)`` or not finite, or a wrong
            ``skip``.

    Example::

        >>> import torch
        >>> scores = {"contribution": torch.tensor([0.1, 0.2]), "ig": torch.tensor([-4.0, 1.0])}
        >>> fig, ax = plot_token_scores(scores, ["<s>", "a"], use_pyplot=False)
        >>> ax.images[0].get_array().tolist()
        [[0.5, 1.0], [-1.0, 0.25]]
    """
    rows = normalized_scores(scores, tokens, skip)
    values = np.stack([row.numpy() for row in rows.values()])
    width = min(2.5 + 0.3 * max(len(tokens), 8), 14)
    fig, grid = new_figure(1, 1, (width, 1.4 + 0.4 * len(rows)), use_pyplot)
    ax: Axes = grid[0, 0]
    _draw_map(ax, values, np.zeros_like(values, dtype=bool), _DIVERGING, Normalize(-1, 1))
    ax.set_aspect("auto")
    _name_ticks(ax.xaxis, "token", tokens)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=9, **_LITERAL)
    _add_scale(fig, [ax], "score / row's largest", values).set_ticks([-1, 0, 1])
    return fig, ax


def _layers(name: str, given: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The maps of all layers, each ``(B, H, T, S)``."""
    layers = [given] if isinstance(given, Tensor) else given
    for n, layer in enumerate(layers):
        if layer.ndim != 4:
            raise ValueError(
                f"{name} of layer {n} has shape {tuple(layer.shape)}, expected (B, H, T, S)"
            )
    return layers


def _random_pairs(layers: Sequence[Tensor], count: int, seed: int) -> list[tuple[int, int]]:
    heads = [(n, head) for n, layer in enumerate(layers) for head in range(layer.shape[1])]
    return sorted(random.Random(seed).sample(heads, min(count, len(heads))))


def _heads(
    name: str, layers: Sequence[Tensor], pairs: Sequence[tuple[int, int]], batch: int
) -> Array:
    """The ``(pairs, T, S)`` maps of some heads of one sequence."""
    maps: list[Array] = []
    for layer, head in pairs:
        if not 0 <= layer < len(layers):
            raise IndexError(f"no layer {layer} in {name}, which has {len(layers)}")
        sequences, heads = layers[layer].shape[:2]
        if not 0 <= batch < sequences:
            raise IndexError(f"no sequence {batch} in {name}, which has {sequences}")
        if not 0 <= head < heads:
            raise IndexError(f"no head {head} in {name} of layer {layer}, which has {heads}")
        chosen = layers[layer][batch, head].detach().float().cpu().numpy()
        if not np.isfinite(chosen).all():
            raise ValueError(
                f"{name} of layer {layer}, head {head} is not finite: replace such cells, for "
                "instance by nan_to_num()"
            )
        maps.append(chosen)
    shapes = {chosen.shape for chosen in maps}
    if len(shapes) > 1:
        raise ValueError(
            f"{name} has maps of shapes {sorted(shapes)} among the pairs: choose pairs of one "
            "(T, S), such as only self-attention"
        )
    return np.stack(maps)


def _labels(
    tokens: Sequence[str] | None, query_tokens: Sequence[str] | None, shape: tuple[int, ...]
) -> tuple[Sequence[str], Sequence[str]]:
    """The names of the ``T`` queries and ``S`` keys."""
    n_queries, n_keys = shape
    if query_tokens is None and n_queries == n_keys:
        query_tokens = tokens
    queries = [str(i) for i in range(n_queries)] if query_tokens is None else query_tokens
    keys = [str(j) for j in range(n_keys)] if tokens is None else tokens
    if len(keys) != n_keys:
        raise ValueError(f"got {len(keys)} tokens for {n_keys} keys")
    if len(queries) != n_queries:
        raise ValueError(f"got {len(queries)} query tokens for {n_queries} queries")
    return queries, keys


def _from_zero(values: Array, quantile: float) -> Normalize:
    return Normalize(0, _limit(values, quantile))


def _about_zero(values: Array, quantile: float) -> Normalize:
    limit = _limit(values, quantile)
    return Normalize(-limit, limit)


def _limit(values: Array, quantile: float) -> float:
    """The magnitude at which a scale ends: never zero, which would be no scale."""
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile}, expected a number above 0 and up to 1")
    return float(np.quantile(np.abs(values), quantile)) if values.any() else 1.0


def _panel_size(shape: tuple[int, ...]) -> tuple[float, float]:
    """Width and height in inches, with room for the label of every token that gets one."""
    height, width = (max(0.17 * n, 2.4) if n <= _READABLE else 4.0 for n in shape)
    return width, height


def _draw_map(ax: Axes, values: Array, blank: Array, cmap: str, norm: Normalize) -> AxesImage:
    square = values.shape[0] == values.shape[1]
    ax.set_facecolor(_BLANK)
    return ax.imshow(
        np.ma.masked_where(blank, values),
        cmap=cmap,
        norm=norm,
        interpolation="nearest",
        aspect="equal" if square else "auto",
    )


def _name_ticks(axis: XAxis | YAxis, title: str, tokens: Sequence[str] | None) -> None:
    """Name an axis and its tokens; with None nothing, since a neighbour's names hold for it."""
    if tokens is None:
        axis.set_ticks([])
        return
    step = 1 if len(tokens) <= _READABLE else math.ceil(2 * len(tokens) / _READABLE)
    ticks = range(0, len(tokens), step)
    rotation = 90 if isinstance(axis, XAxis) else 0
    labels = [_shortened(tokens[tick]) for tick in ticks]
    axis.set_label_text(title, fontsize=9)
    axis.set_ticks(ticks, labels, fontsize=7, rotation=rotation, **_LITERAL)


def _shortened(token: str) -> str:
    return token if len(token) <= _LONGEST_LABEL else token[: _LONGEST_LABEL - 1] + "…"


def _add_scale(fig: Figure, axes: Sequence[Axes] | Array, unit: str, values: Array) -> Colorbar:
    """One colour bar for axes of one scale, pointed at the ends that ``values`` pass."""
    image = axes[0].images[0]
    low, high = image.get_clim()
    passed = (bool((values < low).any()), bool((values > high).any()))
    extend = {
        (False, False): "neither",
        (True, False): "min",
        (False, True): "max",
        (True, True): "both",
    }[passed]
    bar = fig.colorbar(image, ax=axes, extend=extend)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return bar
