"""Reference frames: which fixed points a model's attention takes its bearings from.

After *What are you sinking? A geometric approach on attention sink* (arXiv 2508.02546). By where
the sinks of its attention maps stand, a model's frame has a type: *centralised* (one fixed
position), *distributed* (several, or varying ones) or *bidirectional* (the first and the last).
Positions count, not token strings.

How exactly the paper decides is not known to us: the rule of :func:`find_frame` is ours, its
thresholds are the constants below, and its evidence is in the result. What is said of one map (its
graph, its sinks, its heads) is in :mod:`captum_cw.analysis.attention_graph`; the paper's
topological step is left out, since it degenerates on causal maps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.analysis.attention_graph import (
    FEWEST,
    OF_EVEN,
    GraphNumbers,
    Received,
    average_map,
    graph_numbers,
    head_divergence,
    received_attention,
    sinks_above,
)
from captum_cw.analysis.result import AnalysisResult, Picture
from captum_cw.analysis.streaming import Batches, SeenLayer, run_texts, texts_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    Array = npt.NDArray[Any]

__all__ = [
    "Anchors",
    "Frame",
    "FrameEvidence",
    "FramesOverCheckpoints",
    "ReferenceFrames",
    "anchors_of",
    "find_frame",
    "frames_over_checkpoints",
    "reference_frames",
]

Frame = Literal["centralised", "distributed", "bidirectional", "none"]

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PERCENTILES = (80, 90, 95)

#: An anchor receives this part of what the map's top one does, or more.
OF_TOP = 0.5
#: A statement about the maps of a model, or the queries of a map, holds for this share of them, or
#: more.
MOST = 0.5
#: In a bidirectional frame, the rarer of its two anchors is in this share of the maps, or more.
RARER = 0.25

#: How many positions are also counted from the end, since texts differ in length.
FROM_END = 16


class Anchors(NamedTuple):
    """The sinks of one map that stand out.

    Attributes:
        text: Of which text; maps of one text follow each other.
        T: Its tokens.
        places: Where the anchors stand, those that receive most first.
        counts: How many of these are left at each percentile.
        free: The positions where an anchor could stand: those of the keys that are compared.
    """

    text: int
    T: int
    places: Array
    counts: tuple[int, ...]
    free: Array


def anchors_of(received: Received, percentiles: Sequence[float], text: int = 0) -> Anchors:
    """The anchors of a map: sinks that receive half of what the top sink does, or more.

    At least half of the queries that see an anchor must follow it, too, which is to give it twice
    an even share. Without that, every causal map would have an anchor at its start, since the first
    queries have few keys to choose from, and one wherever neighbours look at each other.

    Args:
        received: What each key receives.
        percentiles: Of :func:`sinks_above`.
        text: Which text this is.

    Example:
        >>> import numpy as np
        >>> received = Received(np.array([0.6, 0.3, 0.1, 0.0]), np.ones(4), np.full(4, 3))
        >>> anchors = anchors_of(received, (40, 80))
        >>> anchors.places.tolist(), anchors.counts
        ([0, 1], (2, 1))
    """
    r, followed = received.mean, received.compared & (received.followers >= MOST)
    stands_out = followed & (r >= OF_TOP * r.max(where=followed, initial=0))
    sinks = [sinks_above(received, percentile) & stands_out for percentile in percentiles]
    by_size = np.argsort(-r, kind="stable")
    places = by_size[np.any(sinks, axis=0)[by_size]]
    counts = tuple(int(some.sum()) for some in sinks)
    return Anchors(text, len(r), places, counts, np.flatnonzero(received.compared))


# ---------------------------------------------------------------------------------------------
# The frame of many maps


class FrameEvidence(NamedTuple):
    """The frame of a model and what speaks for it. Shares are of the maps that have an anchor.

    They are zero where no map has one.

    Attributes:
        frame: Its type.
        p_value: Of the type's own statistic; 1 where there is no frame.
        with_anchor: The share of all maps that have an anchor.
        top_position: Where the top anchor stands most often, from 0; counted from the end, from -1,
            if negative; NaN without any.
        top_share: How often it stands there: the statistic of a centralised frame.
        alone_share: How often the top anchor is the only one.
        anchors: How many a map has on average.
        first_share: How often the first position is an anchor.
        last_share: How often the last position is an anchor.
        both_share: How often both are, in one map.
        either_share: How often one of them is.
        recurrence: How often an anchor of one layer is one in another layer of the same text,
            too: the statistic of a distributed frame. NaN where no text has two maps with anchors.
        rarer_share: The lesser of ``first_share`` and ``last_share``: the statistic of a
            bidirectional frame, whose layers may prefer either end.
        chance_top_share: The mean of ``top_share`` where places are exchanged.
        chance_recurrence: The same of ``recurrence``.
        chance_rarer_share: The same of ``rarer_share``.
        p_centralised: That of ``top_share``.
        p_distributed: That of ``recurrence``.
        p_bidirectional: That of ``rarer_share``.
    """

    frame: Frame
    p_value: float
    with_anchor: float
    top_position: float
    top_share: float
    alone_share: float
    anchors: float
    first_share: float
    last_share: float
    both_share: float
    either_share: float
    recurrence: float
    rarer_share: float
    chance_top_share: float
    chance_recurrence: float
    chance_rarer_share: float
    p_centralised: float
    p_distributed: float
    p_bidirectional: float


class _Places:
    """Counts of where anchors stand, for ``R`` ways to place those of the same maps."""

    def __init__(self, R: int, longest: int) -> None:
        self.rows = np.arange(R)
        self.from_start = np.zeros((R, longest), np.int32)
        self.from_end = np.zeros((R, longest), np.int32)
        self.first, self.last, self.both, self.repeats = (np.zeros(R) for _ in range(4))
        self.maps = self.alone = self.anchors = self.pairs = 0

    def add_text(self, T: int, maps: Sequence[Array]) -> None:
        """Counts the maps of one text, each ``(R, k)`` with ``k > 0``, the top anchor first."""
        visits = np.zeros((len(self.rows), T), np.int32)
        for places in maps:
            top = places[:, 0]
            self.from_start[self.rows, top] += 1
            self.from_end[self.rows, T - 1 - top] += 1
            first, last = (places == 0).any(1), (places == T - 1).any(1)
            self.first += first
            self.last += last
            self.both += first & last
            visits[self.rows[:, None], places] += 1
            k = places.shape[1]
            self.maps += 1
            self.alone += k == 1
            self.anchors += k
            self.pairs += k * (len(maps) - 1)
        self.repeats += (visits * (visits - 1)).sum(1)

    @property
    def statistics(self) -> tuple[Array, Array, Array]:
        """``top_share``, ``recurrence`` and ``rarer_share``, ``(R,)`` each."""
        top = np.maximum(self.from_start.max(1), self.from_end.max(1))
        repeats = self.repeats / self.pairs if self.pairs else np.full(len(self.rows), np.nan)
        maps = max(self.maps, 1)
        return top / maps, repeats, np.minimum(self.first, self.last) / maps

    @property
    def top_position(self) -> int:
        """Where the top anchor of the first way stands most often."""
        starts, ends = self.from_start[0], self.from_end[0]
        return int(starts.argmax()) if starts.max() >= ends.max() else -1 - int(ends.argmax())


def find_frame(
    maps: Sequence[Anchors], *, permutations: int = 1000, seed: int = 0
) -> list[FrameEvidence]:
    """The type of the frame that the anchors of a model's maps make, and a test of it.

    The rule, which is ours (shares are of the maps that have an anchor, unless said):

    * *none*: fewer than half of all maps have an anchor;
    * *bidirectional*: the first or the last position is an anchor in at least half, and each of
      them in at least a quarter;
    * *centralised*: the top anchor stands at the same position (counted from the start or from the
      end) in at least half, and at least half have no other anchor;
    * *distributed*: everything else, so several anchors, or varying ones.

    The test: in each map independently the positions are permuted, so that the values stay, but
    their places are exchanged; ``p = (1 + count) / (1 + permutations)``, with the count of those
    whose statistic is as large, or larger. That of a centralised frame is the share of the
    commonest top position, that of a bidirectional one the share of its rarer anchor. Places that
    vary are what the null itself makes, so a distributed frame is told from chance by whether the
    anchors of one layer recur in the other layers of the same text; with one layer it cannot be,
    and its ``p`` is 1.

    The type is chosen from the same maps that test it: hold ``p`` against a third of the usual
    level. The layers of a text depend on each other: a small ``p`` says that the places are no
    accident, and the shares say how strong the frame is. In a single text, a fixed position and
    one that varies from text to text are the same.

    Args:
        maps: Of texts and layers, those of one text following each other, all for the same
            percentiles.
        permutations: How many.
        seed: Of the permutations.

    Returns:
        The frame at each percentile.

    Raises:
        ValueError: If there is no map, or no permutation.

    Example:
        >>> import numpy as np
        >>> maps = [Anchors(text, 8, np.array([0]), (1,), np.arange(7)) for text in range(9)]
        >>> (found,) = find_frame(maps)
        >>> found.frame, found.top_share, round(found.p_value, 4)
        ('centralised', 1.0, 0.001)
    """
    _check_permutations(permutations)
    if not maps:
        raise ValueError("There is no map: give one or more.")
    longest, percentiles = max(m.T for m in maps), range(len(maps[0].counts))
    found = [_Places(1, longest) for _ in percentiles]
    drawn = [_Places(permutations, longest) for _ in percentiles]
    random = np.random.default_rng(seed)
    for _, group in groupby(maps, key=lambda m: m.text):
        text = [m for m in group if len(m.places)]
        shuffled = [_shuffled(m, permutations, random) for m in text]
        for p in percentiles:
            some = [number for number, m in enumerate(text) if m.counts[p]]
            if some:
                T = text[0].T
                found[p].add_text(T, [text[i].places[None, : text[i].counts[p]] for i in some])
                drawn[p].add_text(T, [shuffled[i][:, : text[i].counts[p]] for i in some])
    return [_evidence(found[p], drawn[p], len(maps)) for p in percentiles]


def _shuffled(anchors: Anchors, permutations: int, random: np.random.Generator) -> Array:
    """Where the anchors of a map stand after each permutation, ``(permutations, k)``."""
    orders = random.permuted(np.tile(anchors.free, (permutations, 1)), axis=1)
    return orders[:, : len(anchors.places)].copy()  # a view would keep all of them


def _evidence(found: _Places, drawn: _Places, maps: int) -> FrameEvidence:
    statistics = [float(x[0]) for x in found.statistics]
    chances = [float(x.mean()) for x in drawn.statistics]
    # Not "x >= s": where the statistic is not defined, every permutation is as good.
    p_values = [
        (1 + int((~(x < s - 1e-12)).sum())) / (1 + len(drawn.rows))
        for x, s in zip(drawn.statistics, statistics, strict=True)
    ]
    one = max(found.maps, 1)
    at_an_end = found.first + found.last - found.both
    first, last, both, either = (
        float(x[0]) / one for x in (found.first, found.last, found.both, at_an_end)
    )
    top_share, recurrence, rarer = statistics
    with_anchor, alone = found.maps / maps, found.alone / one
    frame: Frame = "distributed"
    p_value = p_values[1]
    if with_anchor < MOST:
        frame, p_value = "none", 1.0
    elif either >= MOST and rarer >= RARER:
        frame, p_value = "bidirectional", p_values[2]
    elif top_share >= MOST and alone >= MOST:
        frame, p_value = "centralised", p_values[0]
    return FrameEvidence(
        frame=frame,
        p_value=p_value,
        with_anchor=with_anchor,
        top_position=float(found.top_position) if found.maps else float("nan"),
        top_share=top_share,
        alone_share=alone,
        anchors=found.anchors / one,
        first_share=first,
        last_share=last,
        both_share=both,
        either_share=either,
        recurrence=recurrence,
        rarer_share=rarer,
        chance_top_share=chances[0],
        chance_recurrence=chances[1],
        chance_rarer_share=chances[2],
        p_centralised=p_values[0],
        p_distributed=p_values[1],
        p_bidirectional=p_values[2],
    )


# ---------------------------------------------------------------------------------------------
# A model


@dataclass(frozen=True)
class ReferenceFrames(AnalysisResult):
    """The graphs, sinks and frame of a model.

    Attributes:
        settings: ``frame`` (the type at the lowest percentile), the constants of its rule, and
            what was run.
        numbers: The evidence for ``frame``, as of :class:`FrameEvidence`, at the lowest percentile,
            which lets most positions be sinks.
        tables: ``graph``: :class:`GraphNumbers` by layer and threshold, averaged over the texts
            for which they are defined. ``sinks`` by layer and percentile: how many sinks and
            anchors a text has, the share of all attention that is on sinks (``mass``), the share of
            texts in which the first and the last position are anchors, the mean divergence of heads
            from their average in nats (``divergence``, and ``divergence_without`` sinks), over how
            many rows of heads (``rows``), and how many had nothing left (``empty_rows``).
            ``frames``: :class:`FrameEvidence` by percentile. ``positions`` by layer and position,
            counted from 0, and again from the end, from -1: the mean attention received
            from others, and the share of texts in which it is an anchor at the lowest percentile.
    """

    @property
    def frame(self) -> Frame:
        """The type of the frame."""
        frame: Frame = self.settings["frame"]
        return frame

    @property
    def p_value(self) -> float:
        """That of the test of the frame's type."""
        return self.numbers["p_value"]

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """Fiedler value, star-likeness, received attention and divergence, by layer."""
        from captum_cw.analysis.figures.frames import plot_reference_frames

        return plot_reference_frames(self, use_pyplot=use_pyplot)


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
    """Which reference frame a model has: the graphs of its attention, and where its sinks stand.

    Causal and bidirectional models alike. A claim such as "Llama is centralised, Qwen distributed"
    is checked by ``frame`` and ``p_value`` of each, over the same texts.

    Args:
        model: The model.
        batches: Token ids, or batches with masks; texts of two tokens or more. The rule speaks of
            positions that are the same in several texts: give eight or more.
        thresholds: Of attention, for the edges of the graph.
        percentiles: Of received attention, for the sinks.
        permutations: Of the test.
        seed: Of the permutations.
        show_progress: Shows a bar over the texts once it has taken two seconds.

    Raises:
        ValueError: If a text is too short, a layer's queries and keys are not the same tokens, or
            an argument is out of range.

    Example:
        >>> result = reference_frames(model, input_ids, permutations=99)
        >>> result.frame, result.numbers["with_anchor"]
        ('none', 0.0)
        >>> result.tables["graph"].columns[:4].tolist()
        ['layer', 'threshold', 'edges', 'fiedler']
    """
    _check(thresholds, percentiles, permutations)
    texts = texts_of(batches)
    sums = _Sums(thresholds, percentiles, max(map(len, texts)))
    layers = run_texts(
        model, texts, sums.add, causal=False, description="frames", show_progress=show_progress
    )
    evidence = find_frame(sums.anchors, permutations=permutations, seed=seed)
    main = evidence[int(np.argmin(percentiles))]
    settings = {
        "frame": main.frame,
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "layers": layers,
        "thresholds": list(thresholds),
        "percentiles": list(percentiles),
        "permutations": permutations,
        "seed": seed,
        "anchor_of_top": OF_TOP,
        "follower_of_even": OF_EVEN,
        "fewest_queries": FEWEST,
        "most": MOST,
        "rarer": RARER,
    }
    numbers = {name: x for name, x in main._asdict().items() if name != "frame"}
    return ReferenceFrames(settings, numbers, sums.tables(evidence))


class _Sums:
    """What is kept of the maps that go by: sums over texts, and where anchors stand."""

    def __init__(
        self, thresholds: Sequence[float], percentiles: Sequence[float], longest: int
    ) -> None:
        self.thresholds, self.percentiles, self.longest = thresholds, percentiles, longest
        self.lowest = int(np.argmin(percentiles))
        self.anchors: list[Anchors] = []
        # By layer, then threshold or percentile.
        self.graph: dict[tuple[int, float], list[GraphNumbers]] = {}
        self.sinks: dict[tuple[int, float], Array] = {}
        self.positions: dict[int, Array] = {}

    def add(self, seen: SeenLayer) -> None:
        if seen.layer.S != seen.T:
            raise ValueError(
                f"Attention layer {seen.name!r} has {seen.T} queries and {seen.layer.S} keys, but "
                "a graph of tokens needs both to be the same: leave out a cache or a prefix."
            )
        average, visible = average_map(seen.layer)
        for threshold in self.thresholds:
            numbers = graph_numbers(average, threshold)
            self.graph.setdefault((seen.number, threshold), []).append(numbers)
        received = received_attention(average, visible)
        anchors = anchors_of(received, self.percentiles, seen.text)
        self.anchors.append(anchors)
        self._add_sinks(seen, average, received, anchors)
        self._add_positions(seen, received, anchors)

    def _add_sinks(
        self, seen: SeenLayer, average: Tensor, received: Received, anchors: Anchors
    ) -> None:
        sinks = np.stack([sinks_above(received, percentile) for percentile in self.percentiles])
        divergence = head_divergence(
            seen.layer, average, torch.from_numpy(sinks).to(average.device)
        ).numpy(force=True)
        on_key = average.sum(0).numpy(force=True)
        for p, percentile in enumerate(self.percentiles):
            places = anchors.places[: anchors.counts[p]]
            row = [
                1,
                sinks[p].sum(),
                len(places),
                on_key[sinks[p]].sum() / on_key.sum(),
                0 in places,
                seen.T - 1 in places,
                *divergence[:, p],
            ]
            key = seen.number, percentile
            self.sinks[key] = self.sinks.get(key, 0) + np.array(row, np.float64)

    def _add_positions(self, seen: SeenLayer, received: Received, anchors: Anchors) -> None:
        """By position, from 0 on, and then from -1 on: texts, received attention, anchors."""
        stands = np.zeros(seen.T)
        stands[anchors.places[: anchors.counts[self.lowest]]] = 1
        values = np.stack([received.queries > 0, received.mean, stands])
        sums = self.positions.setdefault(
            seen.number, np.zeros((3, self.longest + min(FROM_END, self.longest)))
        )
        sums[:, : seen.T] += values
        ending = values[:, ::-1][:, :FROM_END]
        sums[:, self.longest : self.longest + ending.shape[1]] += ending

    def tables(self, evidence: Sequence[FrameEvidence]) -> dict[str, pd.DataFrame]:
        import pandas as pd

        graph = pd.DataFrame(
            [
                {"layer": layer, "threshold": threshold} | numbers._asdict()
                for (layer, threshold), texts in self.graph.items()
                for numbers in texts
            ]
        )
        frames = pd.DataFrame([found._asdict() for found in evidence])
        frames.insert(0, "percentile", list(self.percentiles))
        return {
            "graph": graph.groupby(["layer", "threshold"], sort=False).mean().reset_index(),
            "sinks": pd.DataFrame(list(self._sink_rows())),
            "frames": frames,
            "positions": pd.DataFrame(list(self._position_rows())),
        }

    def _sink_rows(self) -> Iterator[dict[str, float]]:
        means = ("sinks", "anchors", "mass", "first_share", "last_share")
        for (layer, percentile), (texts, *sums, whole, without, rows, empty) in self.sinks.items():
            yield {
                "layer": layer,
                "percentile": percentile,
                **{name: float(x / texts) for name, x in zip(means, sums, strict=True)},
                "divergence": float(whole / rows) if rows else float("nan"),
                "divergence_without": float(without / rows) if rows else float("nan"),
                "rows": int(rows),
                "empty_rows": int(empty),
            }

    def _position_rows(self) -> Iterator[dict[str, float]]:
        for layer, sums in self.positions.items():
            for place, (texts, received, anchors) in enumerate(sums.T):
                if texts:
                    yield {
                        "layer": layer,
                        "position": place if place < self.longest else self.longest - 1 - place,
                        "texts": int(texts),
                        "received": float(received / texts),
                        "anchor_share": float(anchors / texts),
                    }


def _check_permutations(permutations: int) -> None:
    if permutations < 1:
        raise ValueError(f"permutations={permutations} tests nothing: give 1 or more.")


def _check(thresholds: Sequence[float], percentiles: Sequence[float], permutations: int) -> None:
    if not thresholds or not all(0 <= t < 1 for t in thresholds):
        raise ValueError(f"thresholds={thresholds!r}: give one or more, each from 0 to below 1.")
    if not percentiles or not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles={percentiles!r}: give one or more between 0 and 100.")
    _check_permutations(permutations)


# ---------------------------------------------------------------------------------------------
# Over training


@dataclass(frozen=True)
class FramesOverCheckpoints(AnalysisResult):
    """The frame of a model at several moments of its training.

    Attributes:
        settings: ``revisions``, the ``frame`` of the last one, and those of
            :class:`ReferenceFrames`.
        numbers: ``settled_at``: the number, from 0, of the first revision from which on the frame
            is that of the last; ``settled_after``: how much of the way from the first to the last
            revision that is, 0 to 1, by steps where these were given.
        tables: ``checkpoints``: the revision, its step, its frame and the evidence at the lowest
            percentile, and ``star_likeness`` and ``fiedler``, averaged over layers and thresholds.
            ``frames``: the evidence at each percentile.
    """

    @property
    def frame(self) -> Frame:
        """The type of the frame at the last revision."""
        frame: Frame = self.settings["frame"]
        return frame

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """The evidence over revisions."""
        from captum_cw.analysis.figures.frames import plot_checkpoints

        return plot_checkpoints(self, use_pyplot=use_pyplot)


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
    """Whether frames emerge early: the frame of a model at each of its revisions.

    One model is in memory at a time, if ``load`` keeps none. Models on the hub that publish their
    training have a revision for each checkpoint: ``load`` then is ``lambda revision:
    AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-160m", revision=revision)``, with
    revisions such as ``["step0", "step512", "step4000", "step143000"]``.

    Args:
        load: Gives the model of a revision.
        revisions: Two or more, in the order of training.
        batches: As for :func:`reference_frames`; all revisions see the same texts.
        steps: The training step of each revision, ascending; by default, its number.
        thresholds: As for :func:`reference_frames`.
        percentiles: As there.
        permutations: As there.
        seed: As there.
        show_progress: Shows a bar over the revisions once it has taken two seconds.

    Raises:
        ValueError: If there are fewer than two revisions, or not one step for each; else as
            :func:`reference_frames`.

    Example:
        >>> result = frames_over_checkpoints(
        ...     lambda revision: model, ["step0", "step1000"], input_ids, permutations=99)
        >>> result.to_dataframe()[["revision", "frame"]].values.tolist()
        [['step0', 'none'], ['step1000', 'none']]
    """
    import pandas as pd

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
            found = reference_frames(
                load(revision),
                texts,
                thresholds=thresholds,
                percentiles=percentiles,
                permutations=permutations,
                seed=seed,
            )
            gc.collect()  # a model may hold itself, and would stay beside the next one
            moment = {"revision": revision, "step": step}
            overall = found.tables["graph"][["star_likeness", "fiedler"]].mean().to_dict()
            rows.append({**moment, "frame": found.frame, **found.numbers, **overall})
            frames.append(found.tables["frames"].assign(**moment))
            bar.update()
    last = found.frame
    settled = max((n + 1 for n, row in enumerate(rows) if row["frame"] != last), default=0)
    numbers = {
        "settled_at": float(settled),
        "settled_after": (steps[settled] - steps[0]) / (steps[-1] - steps[0]),
    }
    settings = {**found.settings, "revisions": revisions, "steps": steps}
    tables = {"checkpoints": pd.DataFrame(rows), "frames": pd.concat(frames, ignore_index=True)}
    return FramesOverCheckpoints(settings, numbers, tables)
