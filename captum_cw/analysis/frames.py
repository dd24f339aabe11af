"""Reference frames: the fixed positions that a model's attention refers to.

After *What are you sinking? A geometric approach on attention sink* (arXiv 2508.02546). The
positions of the sinks in a model's attention maps determine the type of its frame: *centralised*
(one fixed position), *distributed* (several or varying positions) or *bidirectional* (the first
and the last position). Only positions matter, not the tokens there.

The type is decided by our rule (:func:`captum_cw.analysis.frame_rule.find_frame`), and results
include the evidence. :mod:`captum_cw.analysis.attention_graph` measures single maps: their graph,
their sinks and their heads.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.analysis.attention_graph import (
    Received,
    average_map,
    graph_numbers,
    head_divergence,
    received_attention,
    sinks_above,
)
from captum_cw.analysis.frame_rule import Anchors, Frame, anchors_of, find_frame
from captum_cw.analysis.result import AnalysisResult, settings_of
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of

#: The attention thresholds of the graphs, and the percentiles of received attention of the sinks.
THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PERCENTILES = (80, 90, 95)
#: The columns of the table ``sinks`` that :func:`head_divergence` sums.
DIVERGENCES = ("divergence", "divergence_without", "rows", "empty_rows")
#: The number of positions that are also counted from the end, because texts differ in length.
FROM_END = 16


class ReferenceFrames(AnalysisResult):
    """The attention graphs and sinks of a model, and its reference frame by our rule.

    The plot shows the Fiedler value, star-likeness, received attention and divergence by layer.

    Attributes:
        settings: ``frame`` (the type at the lowest percentile), and the options of the run.
        numbers: The evidence for ``frame``, as in ``FrameEvidence``, at the lowest percentile. This
            percentile allows the most sinks.
        tables: ``graph``: the ``GraphNumbers`` by layer and threshold, averaged over the texts for
            which they are defined. ``sinks``, by layer and percentile: the mean number of sinks and
            anchors of a text, the fraction of all attention that is on sinks (``mass``), the
            fraction of texts in which the first and the last position are anchors, the mean
            divergence of heads from their mean in nats (``divergence``, and ``divergence_without``
            sinks), the number of rows of heads that it is over (``rows``), and the number of rows
            with nothing left (``empty_rows``). ``frames``: the evidence by percentile.
            ``positions``, by layer and position, counted from 0 and again from the end (-1): the
            mean attention received from other tokens, and the fraction of texts in which the
            position is an anchor at the lowest percentile.
    """

    @property
    def frame(self) -> Frame:
        """The type of the frame."""
        frame: Frame = self.settings["frame"]
        return frame

    @property
    def p_value(self) -> float:
        """The p-value of the test of the frame."""
        return self.numbers["p_value"]


def reference_frames(
    model: nn.Module,
    batches: Batches,
    *,
    permutations: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> ReferenceFrames:
    """Find the reference frame of a model by our rule, from its attention graphs and sinks.

    Models may be causal or bidirectional. To check a claim such as "Llama is centralised, Qwen is
    distributed", compare ``frame`` and ``p_value`` of both models over the same texts.

    Args:
        model: The model.
        batches: Token ids ``(B, T)``, a dict with ``attention_mask``, or an iterable of these.
            Texts need two or more tokens. Give at least eight texts, because the rule is about
            positions that are the same in several texts.
        permutations: The number of permutations of the test, 1 or more.
        seed: Random seed of the permutations.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        ValueError: If a text is too short, a layer has different queries and keys, or
            ``permutations`` is below 1.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = reference_frames(model, inputs, permutations=99)
        >>> result.frame, result.numbers["with_anchor"]
        ('none', 0.0)
        >>> result.tables["graph"].columns[:4].tolist()
        ['layer', 'threshold', 'edges', 'fiedler']
    """
    if permutations < 1:
        raise ValueError(f"permutations must be 1 or more, got {permutations}")
    texts, anchors = texts_of(batches), list[Anchors]()
    graph, sinks, positions = (list[pd.DataFrame]() for _ in range(3))

    def on_layer(seen: SeenLayer) -> None:
        check_square(seen)
        average, visible = average_map(seen.layer)
        received = received_attention(average, visible)
        anchors.append(anchors_of(received, PERCENTILES, seen.text))
        numbers = pd.DataFrame(graph_numbers(average, threshold) for threshold in THRESHOLDS)
        numbers.insert(0, "layer", seen.number)
        numbers.insert(1, "threshold", THRESHOLDS)
        graph.append(numbers)
        sinks.append(_sinks_of_map(seen, average, received, anchors[-1]))
        positions.append(_positions_of_map(seen, received, anchors[-1]))

    layers = run_texts(model, texts, on_layer, causal=False, show_progress=show_progress)
    frames = find_frame(anchors, permutations=permutations, seed=seed)
    evidence = pd.DataFrame(frames)
    evidence.insert(0, "percentile", PERCENTILES)
    settings = settings_of(
        texts, frame=frames[0].frame, layers=layers, permutations=permutations, seed=seed
    )
    by_threshold = pd.concat(graph).groupby(["layer", "threshold"], sort=False)
    tables = {
        "graph": by_threshold.mean().reset_index(),
        "sinks": _sink_table(pd.concat(sinks)),
        "frames": evidence,
        "positions": _position_table(pd.concat(positions)),
    }
    numbers = {name: x for name, x in frames[0]._asdict().items() if name != "frame"}
    return ReferenceFrames(settings, numbers, tables)


def check_square(seen: SeenLayer) -> None:
    """Raise a ValueError if a layer has different numbers of queries and keys."""
    if seen.layer.S != seen.T:
        raise ValueError(
            f"Attention layer {seen.name!r} has {seen.T} queries and {seen.layer.S} keys, but "
            "a graph of tokens needs the same number: run without a cache or a prefix."
        )


def _sinks_of_map(
    seen: SeenLayer, average: Tensor, received: Received, anchors: Anchors
) -> pd.DataFrame:
    """Return the sinks, anchors and head divergences of one map, with a row per percentile."""
    sinks = np.stack([sinks_above(received, percentile) for percentile in PERCENTILES])
    columns = torch.from_numpy(sinks).to(average.device)
    divergences = head_divergence(seen.layer, average, columns).numpy(force=True)
    on_key = average.sum(0).numpy(force=True)
    places = [anchors.places[:count] for count in anchors.counts]
    part = {
        "layer": seen.number,
        "percentile": PERCENTILES,
        "sinks": sinks.sum(1),
        "anchors": anchors.counts,
        "mass": [on_key[chosen].sum() / on_key.sum() for chosen in sinks],
        "first_share": [0 in chosen for chosen in places],
        "last_share": [seen.T - 1 in chosen for chosen in places],
    }
    return pd.DataFrame(part | dict(zip(DIVERGENCES, divergences, strict=True)))


def _sink_table(sinks: pd.DataFrame) -> pd.DataFrame:
    """Return the sinks by layer and percentile: means over texts, divergences over rows."""
    by_percentile = sinks.groupby(["layer", "percentile"], sort=False)
    sums = by_percentile[list(DIVERGENCES)].sum().astype({"rows": int, "empty_rows": int})
    for name in ("divergence", "divergence_without"):
        sums[name] /= sums["rows"]
    return by_percentile.mean().assign(**sums).reset_index()


def _positions_of_map(seen: SeenLayer, received: Received, anchors: Anchors) -> pd.DataFrame:
    """Return the received attention of one map, with a row per position that other queries see.

    The last positions have a second row, in which they are counted from the end.
    """
    rows = pd.DataFrame({"layer": seen.number, "position": range(seen.T)})
    rows["received"] = received.mean
    rows["anchor_share"] = rows["position"].isin(anchors.places[: anchors.counts[0]])
    rows = rows[received.queries > 0]
    end = rows[rows["position"] >= seen.T - FROM_END]
    return pd.concat([rows, end.assign(position=end["position"] - seen.T)])


def _position_table(positions: pd.DataFrame) -> pd.DataFrame:
    """Return the received attention and the anchors by layer and position: means over texts."""
    by_position = positions.groupby(["layer", "position"])
    table = by_position.mean()
    table.insert(0, "texts", by_position.size())
    return table.reset_index()


class FramesOverCheckpoints(AnalysisResult):
    """The reference frame of a model by our rule, at each checkpoint of its training.

    The plot shows the evidence over revisions.

    Attributes:
        settings: ``revisions``, the ``frame`` of the last one, and the settings of
            :class:`ReferenceFrames`.
        numbers: ``settled_at``: the number, from 0, of the first revision after which the frame
            stays that of the last one.
        tables: ``checkpoints``: each revision with its frame and evidence at the lowest percentile,
            and ``star_likeness`` and ``fiedler``, averaged over layers and thresholds.
    """


def frames_over_checkpoints(
    load: Callable[[str], nn.Module],
    revisions: Sequence[str],
    batches: Batches,
    *,
    permutations: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> FramesOverCheckpoints:
    """Find the reference frame at each revision of a model by our rule, to see when it emerges.

    One model is in memory at a time, unless ``load`` keeps models. Models on the hub that publish
    their training have a revision for each checkpoint. For them, ``load`` is ``lambda revision:
    AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-160m", revision=revision)``, with
    revisions such as ``["step0", "step512", "step4000", "step143000"]``.

    Args:
        load: A function that returns the model of a revision.
        revisions: Two or more revisions, in the order of training.
        batches: Token ids, as for :func:`reference_frames`. All revisions see the same texts.
        permutations: As for :func:`reference_frames`.
        seed: As for :func:`reference_frames`.
        show_progress: Show a progress bar over the revisions after two seconds.

    Raises:
        ValueError: If there are fewer than two revisions, and in the cases of
            :func:`reference_frames`.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = frames_over_checkpoints(
        ...     lambda revision: model, ["step0", "step1000"], inputs, permutations=99)
        >>> result.to_dataframe()[["revision", "frame"]].values.tolist()
        [['step0', 'none'], ['step1000', 'none']]
    """
    revisions = list(revisions)
    if len(revisions) < 2:
        raise ValueError(f"revisions={revisions!r}: give two or more, in the order of training.")
    texts = [text[None] for text in texts_of(batches)]
    rows = []
    with progress_bar(len(revisions), "revisions", show=show_progress) as bar:
        for revision in revisions:
            result = reference_frames(load(revision), texts, permutations=permutations, seed=seed)
            gc.collect()  # frees models with reference cycles before the next one loads
            overall = result.tables["graph"][["star_likeness", "fiedler"]].mean()
            found = {"revision": revision, "frame": result.frame, **result.numbers}
            rows.append({**found, **overall.to_dict()})
            bar.update()
    settled = max((n + 1 for n, row in enumerate(rows) if row["frame"] != result.frame), default=0)
    settings = {**result.settings, "revisions": revisions}
    tables = {"checkpoints": pd.DataFrame(rows)}
    return FramesOverCheckpoints(settings, {"settled_at": float(settled)}, tables)
