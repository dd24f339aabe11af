"""The weight of the first token, and the distribution of the weights of the others.

These analyses compute its mean weight (Table 4 of arXiv 2606.07604), the entropy of weights
(Table 5), the alignment of its value with the others (Fig. 5a), and the effect of scaling this
value down (Fig. 5c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.analysis.geometry import inner_products, norms, values_and_gram
from captum_cw.analysis.result import AnalysisResult, settings_of
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of
from captum_cw.capture.model import device_of, evaluation_mode, unwrapped
from captum_cw.capture.outputs import logits_of
from captum_cw.functional import attention, contribution, map_blocks, vw
from captum_cw.metrics.quantities import mean_nll
from captum_cw.removal.interventions import scale_values

#: A token is a sink if its mean attention is above this (Gu et al. 2024).
EPSILON = 0.3


class FirstTokenWeight(AnalysisResult):
    """The mean weight on the first token (Table 4).

    The plot shows the weight by layer, with a curve for each measure that is a share.

    Attributes:
        numbers: The mean over layers and texts by measure: ``"attention"``, ``"vw"`` as the paper
            prints it, ``"vw, rows normalised"`` and ``"contribution"``.
        tables: ``"texts"``: ``text``, ``measure`` and ``weight``, a mean over layers. ``"layers"``:
            ``layer``, ``measure`` and ``weight``, a mean over texts.
    """


def first_token_weight(
    model: nn.Module, batches: Batches, *, show_progress: bool = False
) -> FirstTokenWeight:
    """Compute the mean weight that queries put on the first token (Eq. 22; Table 4).

    Inter-head contributions are summed over heads, with their signs. Attention and value-weighted
    attention are averaged over heads. Value-weighted attention is not a share. It is returned in
    the unit of the hidden states, as the paper prints it, and with its rows normalised.

    Args:
        model: A causal model.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        ValueError: If a text has fewer than two tokens, or the model is not causal.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> sorted(first_token_weight(model, inputs).numbers)
        ['attention', 'contribution', 'vw', 'vw, rows normalised']
    """
    texts, rows = texts_of(batches), list[tuple[Any, ...]]()

    def on_layer(seen: SeenLayer) -> None:
        total = dict.fromkeys(("attention", "vw", "vw, rows normalised", "contribution"), 0.0)
        for _, (a, weighted, c) in map_blocks(seen.layer, attention, vw, contribution()):
            total["attention"] += float(a[..., 0].double().sum()) / seen.layer.H
            total["vw"] += float(weighted[..., 0].double().sum()) / seen.layer.H
            shares = weighted[..., 0].double() / weighted.double().sum(-1)
            total["vw, rows normalised"] += float(shares.nan_to_num().sum()) / seen.layer.H
            total["contribution"] += float(c[..., 0].double().sum())
        rows.extend((seen.text, seen.number, name, x / seen.T) for name, x in total.items())

    run_texts(model, texts, on_layer, show_progress=show_progress)
    tables = _tables_of_means(rows, ["measure"], "weight")
    numbers = tables["texts"].groupby("measure").weight.mean().to_dict()
    return FirstTokenWeight(settings_of(texts), numbers, tables)


def _tables_of_means(
    rows: Sequence[tuple[Any, ...]], by: list[str], value: str
) -> dict[str, pd.DataFrame]:
    """Return the means by text and by layer, of rows of text, layer, ``by`` and ``value``."""
    table = pd.DataFrame(rows, columns=["text", "layer", *by, value])
    return {
        f"{kind}s": table.groupby([kind, *by], sort=False)[value].mean().reset_index()
        for kind in ("text", "layer")
    }


class WeightEntropy(AnalysisResult):
    """The entropy of rows of weights, in nats (Table 5).

    The plot shows the entropy by layer, with and without the first token.

    Attributes:
        numbers: The mean over queries, heads, layers and texts by measure, with the first token, as
            ``"contribution"``, and without it, as ``"contribution, without first"``. ``"empty
            rows"`` is the number of rows that are all zero, which are left out.
        tables: ``"texts"``: ``text``, ``measure``, ``first`` (whether the first token is included)
            and ``entropy``, a mean over layers. ``"layers"``: the same by ``layer``.
    """


def weight_entropy(
    model: nn.Module, batches: Batches, *, show_progress: bool = False
) -> WeightEntropy:
    """Compute the entropy of the normalised rows of ``|g|`` (Eq. 23; Table 5).

    The measures ``g`` are attention, value-weighted attention, and inter-head and intra-head
    contributions. Without the first token, rows are normalised over the other tokens, and the first
    query is left out. A lower entropy is more concentrated.

    Arguments and errors are those of :func:`first_token_weight`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> weight_entropy(model, inputs).numbers["attention"] > 0
        True
    """
    texts, rows, empty = texts_of(batches), list[tuple[Any, ...]](), 0
    names = ("attention", "vw", "contribution", "contribution, intra")
    measures = attention, vw, contribution("inter"), contribution("intra")

    def on_layer(seen: SeenLayer) -> None:
        nonlocal empty
        sums = {(name, first): [0.0, 0] for name in names for first in (True, False)}
        for block, maps in map_blocks(seen.layer, *measures):
            for (name, first), total in sums.items():
                g = maps[names.index(name)]
                # The first query sees only the first token.
                entropy = row_entropy(g if first else g[:, :, max(0, 1 - block.start) :, 1:])
                count = int((~entropy.isnan()).sum())
                empty += entropy.numel() - count
                total[0] += float(entropy.nansum())
                total[1] += count
        rows.extend(
            (seen.text, seen.number, *place, total / count if count else float("nan"))
            for place, (total, count) in sums.items()
        )

    run_texts(model, texts, on_layer, show_progress=show_progress)
    tables = _tables_of_means(rows, ["measure", "first"], "entropy")
    means = tables["texts"].groupby(["measure", "first"]).entropy.mean()
    numbers = {
        name + ("" if first else ", without first"): float(x) for (name, first), x in means.items()
    }
    return WeightEntropy(settings_of(texts), {**numbers, "empty rows": empty}, tables)


def row_entropy(g: Tensor) -> Tensor:
    """Compute the entropy in nats of the magnitudes along the last dimension; NaN if all are zero.

    Example:
        >>> row_entropy(torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])).exp()
        tensor([2., nan], dtype=torch.float64)
    """
    g = g.double().abs()
    shares = g / g.sum(-1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(-1)


class ValueAlignment(AnalysisResult):
    """The alignment of the first token's value with the others, and among the others (Fig. 5a).

    The plot shows both cosines against relative depth, with the middle half of the heads.

    Attributes:
        numbers: ``"first to others"`` and ``"among others"``, mean cosines over layers, heads and
            texts (the paper: about -0.2 and 0.2); ``"layers opposed"``, the fraction of layers in
            which the former is negative.
        tables: ``"layers"``: ``layer``, relative ``depth`` from 0 to 1, and for both cosines the
            mean over heads and texts, and quartiles over heads. ``"texts"``: both cosines by
            ``text``.
    """


def value_alignment(
    model: nn.Module, batches: Batches, *, show_progress: bool = False
) -> ValueAlignment:
    """Compute mean cosines of projected values: first with others, and among others.

    Cosines are within a head. Arguments and errors are those of :func:`first_token_weight`, but a
    text needs three tokens. An UnsupportedModelError is raised if a gate makes projected values
    differ from query to query.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> value_alignment(model, inputs).tables["layers"].shape
        (2, 8)
    """
    texts, parts = texts_of(batches, shortest=3), list[pd.DataFrame]()

    def on_layer(seen: SeenLayer) -> None:
        first, among = (x.cpu().numpy() for x in alignment(*values_and_gram(seen)))
        place = {"text": seen.text, "layer": seen.number, "head": range(len(first))}
        parts.append(pd.DataFrame({**place, "first": first, "among": among}))

    run_texts(model, texts, on_layer, show_progress=show_progress)
    table, both = pd.concat(parts), ["first", "among"]
    by_text = table.groupby(["text", "layer"])[both].mean().groupby("text").mean().reset_index()
    heads = table.groupby(["layer", "head"])[both].mean().groupby("layer")
    columns = {}
    for name in both:
        columns[name] = heads[name].mean()
        columns |= {f"{name}_{q}": heads[name].quantile(q / 100) for q in (25, 75)}
    by_layer = pd.DataFrame(columns).reset_index()
    by_layer.insert(1, "depth", by_layer["layer"] / max(1, len(by_layer) - 1))
    numbers = {
        "first to others": float(by_layer["first"].mean()),
        "among others": float(by_layer["among"].mean()),
        "layers opposed": float((by_layer["first"] < 0).mean()),
    }
    return ValueAlignment(settings_of(texts), numbers, {"layers": by_layer, "texts": by_text})


def alignment(value: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean cosines of projected values: first with others, and among others.

    Args:
        value: ``(H, S, d_h)``.
        gram: Gram matrices ``(H, d_h, d_h)``, so that ``<v~_i, v~_j> = v_i gram v_j``.

    Returns:
        Both means, ``(H,)`` each. The cosine with a zero vector is zero.

    Example:
        >>> value = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> first, among = alignment(value, torch.eye(2)[None])
        >>> first.tolist(), among.tolist()
        ([-0.5], [0.0])
    """
    length = norms(value, gram)[..., None]
    units = torch.where(length > 0, value / length, 0)
    total = units[:, 1:].sum(1, keepdim=True)
    n = value.shape[1] - 1
    first = inner_products(units[:, :1], gram, total)[:, 0] / n
    # The squared norm of a sum has each pair twice, and each vector with itself once.
    own = (length[:, 1:, 0] > 0).sum(1)
    among = (inner_products(total, gram, total)[:, 0] - own) / (n * (n - 1))
    return first, among


class SinkScaling(AnalysisResult):
    """The perplexity as the first token's value is scaled down (Fig. 5c).

    The plot shows the mean increase against the factor, with the middle half of the texts.

    Attributes:
        settings: Include the scaled ``"layers"``.
        numbers: ``"clean"``, the mean perplexity of the unchanged model, and the mean increase at
            each factor, as ``"delta at 0.5"``.
        tables: ``"texts"``: ``text``, ``factor``, ``perplexity``, ``delta``, and the ``clean``
            perplexity of the text.
    """


def sink_scaling(
    model: nn.Module,
    batches: Batches,
    *,
    factors: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    epsilon: float = EPSILON,
    show_progress: bool = False,
) -> SinkScaling:
    """Scale the first token's value in the layers where it is a sink (section 6.2; Fig. 5c).

    The attention of the scaled layer stays the same. Later layers compute on the changed output.

    Args:
        model: A causal language model.
        batches: Token ids, as for :func:`first_token_weight`.
        factors: Factors of the value, from 0 (removed) to 1 (unchanged).
        epsilon: A layer is scaled if the mean attention on the first token, over queries, heads and
            texts, is above this.
        show_progress: Show a progress bar after two seconds.

    Raises:
        TypeError: If the model returns no logits.
        ValueError: If the first token is not a sink in any layer, ``factors`` is empty, a factor
            is not finite, and as :func:`first_token_weight`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> sink_scaling(model, inputs, epsilon=0.1, factors=[0, 1]).numbers["delta at 1"]
        0.0
    """
    if not len(factors):
        raise ValueError("factors is empty: give at least one, such as 0.")
    factors = [float(factor) for factor in factors]
    texts = texts_of(batches)
    weights = first_token_weight(model, [x[None] for x in texts], show_progress=show_progress)
    table = weights.tables["layers"]
    mass = table[table.measure == "attention"].set_index("layer").weight
    layers = [int(n) for n in mass.index[mass > epsilon]]
    if not layers:
        raise ValueError(
            f"epsilon={epsilon}: the first token is not a sink in any layer; its largest mean "
            f"attention is {mass.max():.3f}."
        )
    rows = []
    model = unwrapped(model)
    device = device_of(model)
    with progress_bar(len(texts), "sink scaling", show=show_progress) as bar, torch.no_grad():
        for text, ids in enumerate(texts):
            ids = ids.to(device)
            clean = _perplexity(model, ids)
            for factor in factors:
                with scale_values(model, factor, positions=[0], layers=layers):
                    changed = _perplexity(model, ids)
                rows.append((text, factor, changed, changed - clean, clean))
            bar.update()
    by_text = pd.DataFrame(rows, columns=["text", "factor", "perplexity", "delta", "clean"])
    deltas = by_text.groupby("factor").delta.mean()
    numbers = {
        "clean": float(by_text.groupby("text").clean.first().mean()),
        **{f"delta at {factor:g}": float(delta) for factor, delta in deltas.items()},
    }
    settings = settings_of(texts, epsilon=epsilon, layers=layers, factors=factors)
    return SinkScaling(settings, numbers, {"texts": by_text})


def _perplexity(model: nn.Module, ids: Tensor) -> float:
    """Compute the perplexity of a text ``(T,)``."""
    with evaluation_mode([model], model):
        logits = logits_of(model(ids[None].clone()))
    counted = torch.ones(1, len(ids) - 1, dtype=torch.bool, device=ids.device)
    nll, _ = mean_nll(logits[:, :-1], ids[None, 1:], counted)
    return float(np.exp(float(nll)))
