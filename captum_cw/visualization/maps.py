"""Maps of heads (Figs. 1, 2 and 12 of arXiv 2606.07604), and rows of token scores.

Colours have the same meaning in all maps. Magnitudes go from dark to bright. Signed values go from
orange (negative) through white (zero) to blue (positive). Grey cells have no attention, such as
future keys.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from captum_cw.visualization._output import new_figure, signed_colours
from captum_cw.visualization.text import normalized_scores

Array = npt.NDArray[Any]

_SEQUENTIAL = "viridis"
_DIVERGING = signed_colours()
_BLANK = "0.85"
_COLUMNS = 4
# With more tokens than this, at most half as many get labels, evenly spaced.
_MAX_LABELS = 40
_MAX_LABEL_LENGTH = 14
# Tokens are literal text: a "$" must not start a formula.
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}


def plot_attention_and_contribution(
    attention: Tensor | Sequence[Tensor],
    contribution: Tensor | Sequence[Tensor],
    tokens: Sequence[str] | None = None,
    *,
    pairs: Sequence[tuple[int, int]],
    query_tokens: Sequence[str] | None = None,
    paper_scale: bool = False,
    quantile: float = 1.0,
    use_pyplot: bool = True,
) -> tuple[Figure, Array]:
    """Plot the attention maps of heads above their contribution maps (Figs. 1 and 12).

    All heads share two scales: attention goes from zero to its maximum, and contributions are
    symmetric about zero, so that white is a contribution of zero. Cells that are zero in both maps,
    such as future keys, are blank.

    Args:
        attention: Attention weights of one text, ``(1, H, T, S)``, or a list with one per layer.
        contribution: Contribution weights of the same shapes, as fractions of the output.
        tokens: ``S`` key tokens; by default, positions.
        pairs: The pairs of layer and head to show. Layers count within the given list.
        query_tokens: ``T`` query tokens; by default, ``tokens`` if ``T = S``, otherwise positions.
        paper_scale: Use the fixed scales of Fig. 12: attention [0, 1] and contribution [-0.01,
            0.15]. Zero is white, so the two sides of the contribution scale have different slopes.
        quantile: End the scales at this quantile of the magnitudes, so that a single cell does not
            make all others pale. A pointed colour bar shows that cells exceed it.
        use_pyplot: Make a pyplot figure, which notebooks show. False makes a plain figure, which
            need not be closed.

    Returns:
        The figure, and its axes ``(2, pairs)``: attention, then contribution.

    Raises:
        ValueError: If maps are not finite, do not have shape ``(1, H, T, S)`` or differ in shape;
            tokens have the wrong number; ``pairs`` is empty; or ``paper_scale`` and ``quantile``
            are used together.
        IndexError: If a pair does not exist.

    Example::

        >>> import torch
        >>> attention = torch.full((1, 2, 3, 3), 1 / 3).tril()
        >>> fig, axes = plot_attention_and_contribution(
        ...     attention, attention - 0.2 * torch.eye(3), ["<s>", "a", "b"],
        ...     pairs=[(0, 1)], use_pyplot=False)
        >>> [ax.get_title() for ax in axes[:, 0]]
        ['layer 0, head 1', '']
    """
    attention, contribution = _as_layers(attention), _as_layers(contribution)
    if len(attention) != len(contribution):
        raise ValueError(
            f"attention has {len(attention)} layers, contribution {len(contribution)}: give the "
            "same layers of both"
        )
    if not pairs:
        raise ValueError("pairs is empty: give at least one (layer, head)")
    weights = _select_heads("attention", attention, pairs)
    shares = _select_heads("contribution", contribution, pairs)
    if weights.shape != shares.shape:
        raise ValueError(
            f"attention has maps of shape {weights.shape[1:]}, contribution {shares.shape[1:]}: "
            "expected the same (T, S) for both"
        )
    blank = (weights == 0) & (shares == 0)
    queries, keys = _labels(tokens, query_tokens, weights.shape[1:])
    weight_norm, share_norm = _map_norms(weights[~blank], shares[~blank], quantile, paper_scale)
    fig, grid = _new_blocks(len(pairs), weights.shape[1:], use_pyplot)
    axes = grid.swapaxes(0, 1).reshape(2, -1)
    for n, (layer, head) in enumerate(pairs):
        top, bottom = axes[:, n]
        top.set_title(f"layer {layer}, head {head}", fontsize=9)
        _draw_map(top, weights[n], blank[n], _SEQUENTIAL, weight_norm)
        _draw_map(bottom, shares[n], blank[n], _DIVERGING, share_norm)
        _label_axis(top.xaxis, "key", None)
        _label_axis(bottom.xaxis, "key", keys)
        for ax in (top, bottom):
            _label_axis(ax.yaxis, "query", queries if n % grid.shape[-1] == 0 else None)
    for attention_row, contribution_row in grid:
        _add_colorbar(fig, attention_row, "attention weight", weights[~blank])
        unit = "contribution (fraction of output)"
        bar = _add_colorbar(fig, contribution_row, unit, shares[~blank])
        if paper_scale:
            bar.set_ticks([-0.01, 0, 0.05, 0.1, 0.15])
    return fig, axes[:, : len(pairs)]


def _map_norms(
    weights: Array, shares: Array, quantile: float, paper_scale: bool
) -> tuple[Normalize, Normalize]:
    """Return the scales of attention and contribution."""
    if not paper_scale:
        return _norm(weights, quantile), _norm(shares, quantile, signed=True)
    if quantile != 1:
        raise ValueError(f"paper_scale=True fixes both scales: leave out quantile={quantile}")
    return Normalize(0, 1), TwoSlopeNorm(0, vmin=-0.01, vmax=0.15)


def _new_blocks(count: int, shape: tuple[int, ...], use_pyplot: bool) -> tuple[Figure, Array]:
    """Make a figure for ``count`` pairs of maps, with axes ``(blocks, 2, columns)``."""
    blocks = math.ceil(count / _COLUMNS)
    columns = math.ceil(count / blocks)
    width, height = _panel_size(shape)
    size = (columns * width + 1.8, blocks * 2 * height + 1.2)
    fig, grid = new_figure(2 * blocks, columns, size, use_pyplot)
    grid = grid.reshape(blocks, 2, columns)
    for unused in grid.swapaxes(0, 1).reshape(2, -1)[:, count:].flat:
        unused.set_visible(False)
    return fig, grid


def plot_decomposition(
    decomposition: Sequence[Tensor],
    tokens: Sequence[str] | None = None,
    *,
    query_tokens: Sequence[str] | None = None,
    head: int = 0,
    quantile: float = 1.0,
    use_pyplot: bool = True,
) -> tuple[Figure, Array]:
    """Plot the factors of one head's contributions, and their product (Fig. 2, Eq. 14).

    Cells in which attention and contribution are zero, such as future keys, are blank in all four
    maps, although the norm and the cosine have values there.

    Args:
        decomposition: Attention, relative norm, cosine and contribution, in this order, each ``(1,
            H, T, S)``, as ``ContributionWeights.decompose`` returns them for a layer and one text.
        tokens: ``S`` key tokens; by default, positions.
        query_tokens: ``T`` query tokens; by default, ``tokens`` if ``T = S``, otherwise positions.
        head: The head to show.
        quantile: End the scales, except that of the cosine, at this quantile of the magnitudes.
        use_pyplot: Make a pyplot figure, which notebooks show. False makes a plain figure, which
            need not be closed.

    Returns:
        The figure, and its four axes.

    Raises:
        ValueError: If there are not four maps; they are not finite, do not have shape ``(1, H, T,
            S)`` or differ in shape; or tokens have the wrong number.
        IndexError: If the head does not exist.

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
        _select_heads(name, [given], [(0, head)])[0]
        for name, given in zip(names, decomposition, strict=True)
    ]
    shapes = [values.shape for values in maps]
    if len(set(shapes)) > 1:
        raise ValueError(f"the four maps have shapes {shapes}, expected the same (T, S)")
    attention, contribution = maps[0], maps[3]
    blank = (attention == 0) & (contribution == 0)
    queries, keys = _labels(tokens, query_tokens, attention.shape)
    shown = [values[~blank] for values in maps]
    styles: tuple[tuple[str | Colormap, Normalize, str], ...] = (
        (_SEQUENTIAL, _norm(shown[0], quantile), "attention weight"),
        (_SEQUENTIAL, _norm(shown[1], quantile), "value norm / output norm"),
        (_DIVERGING, Normalize(-1, 1), "cosine of value and output"),
        (_DIVERGING, _norm(shown[3], quantile, signed=True), "fraction of output"),
    )

    width, height = _panel_size(attention.shape)
    fig, grid = new_figure(1, 4, (4 * (width + 0.7) + 1, height + 1.2), use_pyplot)
    axes: Array = grid[0]
    for ax, name, values, (cmap, norm, unit) in zip(axes, names, maps, styles, strict=True):
        ax.set_title(name, fontsize=10)
        _draw_map(ax, values, blank, cmap, norm)
        _label_axis(ax.xaxis, "key", keys)
        _label_axis(ax.yaxis, "query", queries if ax is axes[0] else None)
        _add_colorbar(fig, [ax], unit, values[~blank])
    return fig, axes


def plot_token_scores(
    scores: Mapping[str, Tensor] | Tensor,
    tokens: Sequence[str] | None = None,
    *,
    skip: Collection[int] = (),
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Plot scores of the same tokens by several methods, one row per method.

    Each row is divided by its largest absolute value, so rows can be compared in pattern, but not
    in size.

    Args:
        scores: Scores by method, ``(T,)`` each, in any unit: token scores, Integrated Gradients.
            Scores of one method can be given alone.
        tokens: ``T`` tokens; by default, positions.
        skip: Positions that do not set the scale of a row, such as an attention sink. They are
            clipped to the scale.
        use_pyplot: Make a pyplot figure, which notebooks show. False makes a plain figure, which
            need not be closed.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If scores are not finite or do not have shape ``(T,)``, or ``skip`` is invalid.

    Example::

        >>> import torch
        >>> scores = {"contribution": torch.tensor([0.1, 0.2]), "ig": torch.tensor([-4.0, 1.0])}
        >>> fig, ax = plot_token_scores(scores, ["<s>", "a"], use_pyplot=False)
        >>> ax.images[0].get_array().tolist()
        [[0.5, 1.0], [-1.0, 0.25]]
    """
    if isinstance(scores, Tensor):
        scores = {"score": scores}
    if tokens is None:
        tokens = [str(n) for n in range(max(map(len, scores.values()), default=0))]
    rows = normalized_scores(scores, tokens, skip)
    values = np.stack([row.numpy() for row in rows.values()])
    width = min(2.5 + 0.3 * max(len(tokens), 8), 14)
    fig, grid = new_figure(1, 1, (width, 1.4 + 0.4 * len(rows)), use_pyplot)
    ax: Axes = grid[0, 0]
    _draw_map(ax, values, np.zeros_like(values, dtype=bool), _DIVERGING, Normalize(-1, 1))
    ax.set_aspect("auto")
    _label_axis(ax.xaxis, "token", tokens)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=9, **_LITERAL)
    _add_colorbar(fig, [ax], "score / largest of the row", values).set_ticks([-1, 0, 1])
    return fig, ax


def _as_layers(given: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the maps of all layers."""
    return [given] if isinstance(given, Tensor) else given


def _select_heads(name: str, layers: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Array:
    """Return the maps of some heads, ``(pairs, T, S)``."""
    maps: list[Array] = []
    for layer, head in pairs:
        if not 0 <= layer < len(layers):
            raise IndexError(f"layer {layer} does not exist: {name} has {len(layers)} layers")
        shape = tuple(layers[layer].shape)
        if len(shape) != 4 or shape[0] != 1:
            raise ValueError(
                f"{name} of layer {layer} has shape {shape}, expected (1, H, T, S): give one text "
                "of a batch, x[:1]"
            )
        if not 0 <= head < shape[1]:
            raise IndexError(f"head {head} does not exist: {name} has {shape[1]} in layer {layer}")
        chosen = layers[layer][0, head].detach().float().cpu().numpy()
        if not np.isfinite(chosen).all():
            raise ValueError(
                f"{name} of layer {layer}, head {head} is not finite: replace such cells, for "
                "example with nan_to_num()"
            )
        maps.append(chosen)
    shapes = {chosen.shape for chosen in maps}
    if len(shapes) > 1:
        raise ValueError(
            f"{name} of these pairs has maps of shapes {sorted(shapes)}: choose pairs with the "
            "same (T, S), such as only self-attention"
        )
    return np.stack(maps)


def _labels(
    tokens: Sequence[str] | None, query_tokens: Sequence[str] | None, shape: tuple[int, ...]
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the names of the ``T`` queries and ``S`` keys."""
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


def _norm(values: Array, quantile: float, *, signed: bool = False) -> Normalize:
    """Return a scale from zero, or symmetric about zero, to a quantile of the magnitudes."""
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile}, expected a number above 0 and up to 1")
    # A scale must not be empty.
    limit = float(np.quantile(np.abs(values), quantile)) if values.any() else 1.0
    return Normalize(-limit if signed else 0, limit)


def _panel_size(shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the width and height in inches, with room for the labels of the tokens."""
    height, width = (max(0.17 * n, 2.4) if n <= _MAX_LABELS else 4.0 for n in shape)
    return width, height


def _draw_map(
    ax: Axes, values: Array, blank: Array, cmap: str | Colormap, norm: Normalize
) -> AxesImage:
    """Draw a map with blank cells in grey."""
    square = values.shape[0] == values.shape[1]
    ax.set_facecolor(_BLANK)
    return ax.imshow(
        np.ma.masked_where(blank, values),
        cmap=cmap,
        norm=norm,
        interpolation="nearest",
        aspect="equal" if square else "auto",
    )


def _label_axis(axis: XAxis | YAxis, title: str, tokens: Sequence[str] | None) -> None:
    """Label an axis and its tokens.

    With None, the axis has no labels, because a neighbouring panel has them.
    """
    if tokens is None:
        axis.set_ticks([])
        return
    step = 1 if len(tokens) <= _MAX_LABELS else math.ceil(2 * len(tokens) / _MAX_LABELS)
    ticks = range(0, len(tokens), step)
    rotation = 90 if isinstance(axis, XAxis) else 0
    names = [tokens[tick] for tick in ticks]
    labels = [x if len(x) <= _MAX_LABEL_LENGTH else x[: _MAX_LABEL_LENGTH - 1] + "…" for x in names]
    axis.set_label_text(title, fontsize=9)
    axis.set_ticks(ticks, labels, fontsize=7, rotation=rotation, **_LITERAL)


def _add_colorbar(fig: Figure, axes: Sequence[Axes] | Array, unit: str, values: Array) -> Colorbar:
    """Add a colour bar, pointed at the ends that ``values`` exceed."""
    image = axes[0].images[0]
    low, high = image.get_clim()
    below, above = (values < low).any(), (values > high).any()
    extend = ("both" if above else "min") if below else ("max" if above else "neither")
    bar = fig.colorbar(image, ax=axes, extend=extend)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return bar
