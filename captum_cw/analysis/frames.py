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
from itertools import pairwise

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
from captum_cw.analysis.frame_rule import Anchors, Frame, FrameEvidence, anchors_of, find_frame
from captum_cw.analysis.result import AnalysisResult, Array, settings_of
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of

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
    thresholds: Sequence[float] = THRESHOLDS,
    percentiles: Sequence[float] = PERCENTILES,
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
        thresholds: The attention thresholds for the edges of the graph.
        percentiles: The percentiles of received attention for the sinks.
        permutations: The number of permutations of the test, 1 or more.
        seed: Random seed of the permutations.
        show_progress: Show a progress bar over the texts after two seconds.

    Raises:
        ValueError: If a text is too short, a layer has different queries and keys, or an argument
            is out of range.

    Example:
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = reference_frames(model, inputs, permutations=99)
        >>> result.frame, result.numbers["with_anchor"]
        ('none', 0.0)
        >>> result.tables["graph"].columns[:4].tolist()
        ['layer', 'threshold', 'edges', 'fiedler']
    """
    _check_options(thresholds, percentiles, permutations)
    texts = texts_of(batches)
    sums = _FrameSums(thresholds, percentiles, max(map(len, texts)))
    layers = run_texts(
        model, texts, sums.add, causal=False, label="frames", show_progress=show_progress
    )
    evidence = find_frame(sums.anchors, permutations=permutations, seed=seed)
    main = evidence[int(np.argmin(percentiles))]
    settings = settings_of(
        texts,
        frame=main.frame,
        layers=layers,
        thresholds=list(thresholds),
        percentiles=list(percentiles),
        permutations=permutations,
        seed=seed,
    )
    numbers = {name: x for name, x in main._asdict().items() if name != "frame"}
    return ReferenceFrames(settings, numbers, sums.tables(evidence))


class _FrameSums:
    """Running sums over the maps of all texts, and the anchors of each map."""

    def __init__(
        self, thresholds: Sequence[float], percentiles: Sequence[float], longest: int
    ) -> None:
        self.thresholds, self.percentiles, self.longest = thresholds, percentiles, longest
        self.lowest = int(np.argmin(percentiles))
        self.anchors: list[Anchors] = []
        self.graph: list[dict[str, float]] = []
        self.sinks: list[dict[str, float]] = []
        self.positions: dict[int, Array] = {}

    def add(self, seen: SeenLayer) -> None:
        """Add one layer of one text."""
        if seen.layer.S != seen.T:
            raise ValueError(
                f"Attention layer {seen.name!r} has {seen.T} queries and {seen.layer.S} keys, but "
                "a graph of tokens needs the same number: run without a cache or a prefix."
            )
        average, visible = average_map(seen.layer)
        self.graph += [
            {"layer": seen.number, "threshold": t, **graph_numbers(average, t)._asdict()}
            for t in self.thresholds
        ]
        received = received_attention(average, visible)
        anchors = anchors_of(received, self.percentiles, seen.text)
        self.anchors.append(anchors)
        self._add_sinks(seen, average, received, anchors)
        self._add_positions(seen, received, anchors)

    def _add_sinks(
        self, seen: SeenLayer, average: Tensor, received: Received, anchors: Anchors
    ) -> None:
        """Add the sinks, anchors and head divergences by percentile."""
        sinks = np.stack([sinks_above(received, percentile) for percentile in self.percentiles])
        divergence = head_divergence(
            seen.layer, average, torch.from_numpy(sinks).to(average.device)
        ).numpy(force=True)
        on_key = average.sum(0).numpy(force=True)
        for p, percentile in enumerate(self.percentiles):
            places = anchors.places[: anchors.counts[p]]
            row = {
                "layer": seen.number,
                "percentile": percentile,
                "sinks": sinks[p].sum(),
                "anchors": len(places),
                "mass": on_key[sinks[p]].sum() / on_key.sum(),
                "first_share": 0 in places,
                "last_share": seen.T - 1 in places,
            }
            self.sinks.append(row | dict(zip(DIVERGENCES, divergence[:, p], strict=True)))

    def _add_positions(self, seen: SeenLayer, received: Received, anchors: Anchors) -> None:
        """Add texts, received attention and anchors by position: from 0 up, then from -1 down."""
        is_anchor = np.zeros(seen.T)
        is_anchor[anchors.places[: anchors.counts[self.lowest]]] = 1
        values = np.stack([received.queries > 0, received.mean, is_anchor])
        sums = self.positions.setdefault(
            seen.number, np.zeros((3, self.longest + min(FROM_END, self.longest)))
        )
        sums[:, : seen.T] += values
        ending = values[:, ::-1][:, :FROM_END]
        sums[:, self.longest : self.longest + ending.shape[1]] += ending

    def tables(self, evidence: Sequence[FrameEvidence]) -> dict[str, pd.DataFrame]:
        """Return the tables of the result."""
        graph = pd.DataFrame(self.graph).groupby(["layer", "threshold"], sort=False).mean()
        frames = pd.DataFrame(evidence)
        frames.insert(0, "percentile", list(self.percentiles))
        return {
            "graph": graph.reset_index(),
            "sinks": self._sink_table(),
            "frames": frames,
            "positions": self._position_table(),
        }

    def _sink_table(self) -> pd.DataFrame:
        """Return the sinks by layer and percentile: means over texts, divergences over rows."""
        by_percentile = pd.DataFrame(self.sinks).groupby(["layer", "percentile"], sort=False)
        sums = by_percentile[list(DIVERGENCES)].sum().astype({"rows": int, "empty_rows": int})
        for name in ("divergence", "divergence_without"):
            sums[name] /= sums["rows"]
        return by_percentile.mean().assign(**sums).reset_index()

    def _position_table(self) -> pd.DataFrame:
        """Return the received attention and the anchors by layer and position."""
        parts = []
        for layer, sums in self.positions.items():
            part = pd.DataFrame(sums.T, columns=["texts", "received", "anchor_share"])
            part = part.astype({"texts": int})
            for name in ("received", "anchor_share"):
                part[name] /= part["texts"]
            place = part.index
            part.insert(0, "layer", layer)
            part.insert(1, "position", place.where(place < self.longest, self.longest - 1 - place))
            parts.append(part[part["texts"] > 0])
        return pd.concat(parts, ignore_index=True)


def _check_options(
    thresholds: Sequence[float], percentiles: Sequence[float], permutations: int
) -> None:
    """Raise a ValueError if an argument is out of range."""
    if not thresholds or not all(0 <= t < 1 for t in thresholds):
        raise ValueError(f"thresholds={thresholds!r}: give one or more, each from 0 to below 1.")
    if not percentiles or not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles={percentiles!r}: give one or more between 0 and 100.")
    if permutations < 1:
        raise ValueError(f"permutations must be 1 or more, got {permutations}")


class FramesOverCheckpoints(AnalysisResult):
    """The reference frame of a model by our rule, at each checkpoint of its training.

    The plot shows the evidence over revisions.

    Attributes:
        settings: ``revisions``, the ``frame`` of the last one, and the settings of
            :class:`ReferenceFrames`.
        numbers: ``settled_at``: the number, from 0, of the first revision after which the frame
            stays that of the last one. ``settled_after``: the position of this revision between the
            first and the last, from 0 to 1, by steps if these were given.
        tables: ``checkpoints``: each revision with its step, frame and evidence at the lowest
            percentile, and ``star_likeness`` and ``fiedler``, averaged over layers and thresholds.
            ``frames``: the evidence at each percentile.
    """

    @property
    def frame(self) -> Frame:
        """The type of the frame at the last revision."""
        frame: Frame = self.settings["frame"]
        return frame


def frames_over_checkpoints(
    load: Callable[[str], nn.Module],
    revisions: Sequence[str],
    batches: Batches,
    *,
    steps: Sequence[float] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    percentiles: Sequence[float] = PERCENTILES,
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
        steps: The training step of each revision, ascending. By default, its number.
        thresholds: As for :func:`reference_frames`.
        percentiles: As for :func:`reference_frames`.
        permutations: As for :func:`reference_frames`.
        seed: As for :func:`reference_frames`.
        show_progress: Show a progress bar over the revisions after two seconds.

    Raises:
        ValueError: If there are fewer than two revisions, or not one ascending step for each, and
            in the cases of :func:`reference_frames`.

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
    steps = list(range(len(revisions))) if steps is None else list(steps)
    if len(steps) != len(revisions) or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(
            f"steps={steps!r} of {len(revisions)} revisions: give one for each, ascending."
        )
    texts = [text[None] for text in texts_of(batches)]
    rows, frames = [], []
    with progress_bar(len(revisions), "revisions", show=show_progress) as bar:
        for revision, step in zip(revisions, steps, strict=True):
            result = reference_frames(
                load(revision),
                texts,
                thresholds=thresholds,
                percentiles=percentiles,
                permutations=permutations,
                seed=seed,
            )
            gc.collect()  # frees models with reference cycles before the next one loads
            checkpoint = {"revision": revision, "step": step}
            overall = result.tables["graph"][["star_likeness", "fiedler"]].mean().to_dict()
            rows.append({**checkpoint, "frame": result.frame, **result.numbers, **overall})
            frames.append(result.tables["frames"].assign(**checkpoint))
            bar.update()
    settled = max((n + 1 for n, row in enumerate(rows) if row["frame"] != result.frame), default=0)
    numbers = {
        "settled_at": float(settled),
        "settled_after": (steps[settled] - steps[0]) / (steps[-1] - steps[0]),
    }
    settings = {**result.settings, "revisions": revisions, "steps": steps}
    tables = {"checkpoints": pd.DataFrame(rows), "frames": pd.concat(frames, ignore_index=True)}
    return FramesOverCheckpoints(settings, numbers, tables)
