"""The type of a reference frame, from where the sinks of many attention maps are.

The types are those of *What are you sinking? A geometric approach on attention sink* (arXiv
2508.02546). The paper does not say exactly how it decides. The rule of :func:`find_frame` and the
constants below are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from captum_cw.analysis.attention_graph import Received, sinks_above
from captum_cw.analysis.result import Array

Frame = Literal["centralised", "distributed", "bidirectional", "none"]

#: An anchor receives at least this fraction of what the strongest sink of its map receives.
ANCHOR_OF_TOP = 0.5
#: A statement about many maps, or about many queries of one map, must hold for this fraction.
MAJORITY = 0.5
#: In a bidirectional frame, each end is an anchor in at least this fraction of the maps.
RARER_END = 0.25


class Anchors(NamedTuple):
    """The anchors of one map: by our rule, the sinks that stand out.

    Attributes:
        text: The number of the text. The maps of one text follow each other.
        T: The number of tokens of the text.
        places: The positions of the anchors, by falling received attention.
        counts: How many anchors are left at each percentile.
        free: The positions where an anchor could be: those of the keys that are compared.
    """

    text: int
    T: int
    places: Array
    counts: tuple[int, ...]
    free: Array


def anchors_of(received: Received, percentiles: Sequence[float], text: int = 0) -> Anchors:
    """Select the anchors: by our rule, sinks with at least half of the top sink's attention.

    At least half of the queries that see an anchor must also follow it: they give it at least twice
    the attention of a uniform row. Otherwise every causal map would have an anchor at its start,
    because the first queries see few keys, and many would have anchors where tokens attend to their
    neighbours.

    Args:
        received: The attention that each key receives.
        percentiles: The percentiles for :func:`sinks_above`.
        text: The number of the text.

    Example:
        >>> import numpy as np
        >>> received = Received(np.array([0.6, 0.3, 0.1, 0.0]), np.ones(4), np.full(4, 3))
        >>> anchors = anchors_of(received, (40, 80))
        >>> anchors.places.tolist(), anchors.counts
        ([0, 1], (2, 1))
    """
    r, followed = received.mean, received.compared & (received.followers >= MAJORITY)
    stands_out = followed & (r >= ANCHOR_OF_TOP * r.max(where=followed, initial=0))
    sinks = [sinks_above(received, percentile) & stands_out for percentile in percentiles]
    by_size = np.argsort(-r, kind="stable")
    places = by_size[np.any(sinks, axis=0)[by_size]]
    counts = tuple(int(at_percentile.sum()) for at_percentile in sinks)
    return Anchors(text, len(r), places, counts, np.flatnonzero(received.compared))


class FrameEvidence(NamedTuple):
    """The frame of a model by our rule, and the evidence for it.

    Shares are fractions of the maps that have an anchor, and 0 if not a single map has one.

    Attributes:
        frame: The type of the frame.
        p_value: The p-value of the statistic of this type; 1 without a frame.
        with_anchor: The share of all maps that have an anchor.
        top_position: The most common position of the top anchor, counted from 0, or from the end
            (-1) if negative; NaN without anchors.
        top_share: How often the top anchor is there: the statistic of a centralised frame.
        alone_share: How often the top anchor is the only anchor.
        anchors: The mean number of anchors of a map.
        first_share: How often the first position is an anchor.
        last_share: How often the last position is an anchor.
        both_share: How often both ends are anchors of the same map.
        either_share: How often at least one end is an anchor.
        recurrence: How often an anchor of one layer is also an anchor of another layer of the same
            text: the statistic of a distributed frame. NaN if every text has at most one map with
            anchors.
        rarer_share: The smaller of ``first_share`` and ``last_share``: the statistic of a
            bidirectional frame. Layers may prefer either end.
        chance_top_share: The mean of ``top_share`` over permutations of the positions.
        chance_recurrence: The mean of ``recurrence`` over permutations.
        chance_rarer_share: The mean of ``rarer_share`` over permutations.
        p_centralised: The p-value of ``top_share``.
        p_distributed: The p-value of ``recurrence``.
        p_bidirectional: The p-value of ``rarer_share``.
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


def find_frame(
    maps: Sequence[Anchors], *, permutations: int = 1000, seed: int = 0
) -> list[FrameEvidence]:
    """Find the type of frame that the anchors of a model's maps form by our rule, and test it.

    Shares are of the maps that have an anchor, unless stated:

    * *none*: fewer than half of all maps have an anchor.
    * *bidirectional*: the first or the last position is an anchor in at least half of the maps, and
      each of them in at least a quarter.
    * *centralised*: the top anchor is at the same position (counted from the start or from the end)
      in at least half of the maps, and at least half of the maps have only one anchor.
    * *distributed*: all other cases, with several anchors or varying positions.

    The test permutes the positions of each map independently: received attention keeps its values,
    but moves to other positions. Then ``p = (1 + count) / (1 + permutations)``, where ``count`` is
    the number of permutations with a statistic at least as large. The statistic of a centralised
    frame is the share of the most common top position. That of a bidirectional frame is the share
    of its rarer anchor. Varying positions are what permutations themselves produce, so the
    statistic of a distributed frame is how often the anchors of one layer recur in other layers of
    the same text. With one layer it cannot be tested, and its ``p`` is 1.

    The type is chosen from the same maps that test it, so compare ``p`` with a third of the usual
    level. The layers of a text depend on each other: a small ``p`` says that the positions are not
    random, and the shares say how strong the frame is. A single text cannot distinguish a fixed
    position from one that varies between texts.

    Args:
        maps: The anchors of the maps of all texts and layers, for the same percentiles. The maps of
            one text follow each other.
        permutations: The number of permutations.
        seed: Random seed.

    Returns:
        The frame at each percentile.

    Raises:
        ValueError: If ``maps`` is empty.

    Example:
        >>> import numpy as np
        >>> maps = [Anchors(text, 8, np.array([0]), (1,), np.arange(7)) for text in range(9)]
        >>> (evidence,) = find_frame(maps)
        >>> evidence.frame, evidence.top_share, round(evidence.p_value, 4)
        ('centralised', 1.0, 0.001)
    """
    if not maps:
        raise ValueError("maps is empty: give at least one map.")
    random = np.random.default_rng(seed)
    placed = [(m, _place_anchors(m, permutations, random)) for m in maps]
    return [
        _evidence([(m, x[:, : m.counts[p]]) for m, x in placed if m.counts[p]], len(maps))
        for p in range(len(maps[0].counts))
    ]


def _place_anchors(anchors: Anchors, permutations: int, random: np.random.Generator) -> Array:
    """Return the positions of a map's anchors as observed, and after each permutation.

    Returns:
        ``(1 + permutations, k)``.
    """
    if not len(anchors.places):
        return np.zeros((1 + permutations, 0), int)
    orders = random.permuted(np.tile(anchors.free, (permutations, 1)), axis=1)
    return np.vstack([anchors.places, orders[:, : len(anchors.places)]])


def _evidence(placed: Sequence[tuple[Anchors, Array]], maps: int) -> FrameEvidence:
    """Decide the type of the frame by our rule, and test it.

    Args:
        placed: Each map that has anchors, and their positions, ``(1 + permutations, k)``. The top
            anchor is first, and the first row is observed.
        maps: The number of all maps.
    """
    if not placed:
        nothing = [0.0] * 7 + [np.nan, 0.0] + [0.0, np.nan, 0.0]  # shares, and their chances
        return FrameEvidence._make(["none", 1.0, 0.0, np.nan, *nothing, 1.0, 1.0, 1.0])
    n = len(placed)
    # For each map and placement.
    top = np.array([x[:, 0] for _, x in placed])
    first = np.array([(x == 0).any(1) for _, x in placed])
    last = np.array([(x == m.T - 1).any(1) for m, x in placed])
    # How often the top anchor is at each position, counted from the start and from the end.
    lengths = np.array([[m.T] for m, _ in placed])
    starts, ends = (_counts_by_position(x, lengths.max()) for x in (top, lengths - 1 - top))
    statistics = (
        np.maximum(starts.max(1), ends.max(1)) / n,
        _recurrence(placed),
        np.minimum(first.sum(0), last.sum(0)) / n,
    )
    top_share, recurrence, rarer = (float(x[0]) for x in statistics)
    chances = [float(x[1:].mean()) for x in statistics]
    # Not "x >= x[0]": if the statistic is NaN, every permutation must count.
    p_values = [float((~(x < x[0] - 1e-12)).mean()) for x in statistics]
    sizes = np.array([x.shape[1] for _, x in placed])
    with_anchor, alone = n / maps, float((sizes == 1).mean())
    f, z = first[:, 0], last[:, 0]
    shares = [float(x.sum()) / n for x in (f, z, f & z, f | z)]
    frame: Frame = "distributed"
    p_value = p_values[1]
    if with_anchor < MAJORITY:
        frame, p_value = "none", 1.0
    elif shares[-1] >= MAJORITY and rarer >= RARER_END:
        frame, p_value = "bidirectional", p_values[2]
    elif top_share >= MAJORITY and alone >= MAJORITY:
        frame, p_value = "centralised", p_values[0]
    from_start, from_end = starts[0], ends[0]
    at_start = from_start.max() >= from_end.max()
    position = from_start.argmax() if at_start else -1 - from_end.argmax()
    top_anchor = (with_anchor, float(position), top_share, alone, float(sizes.sum()) / n)
    # In the order of the fields.
    values = (frame, p_value, *top_anchor, *shares, recurrence, rarer, *chances, *p_values)
    return FrameEvidence._make(values)


def _counts_by_position(places: Array, longest: int) -> Array:
    """Count the positions ``(maps, R)`` of each placement, ``(R, longest)``."""
    return np.array([np.bincount(column, minlength=longest) for column in places.T])


def _recurrence(placed: Sequence[tuple[Anchors, Array]]) -> Array:
    """Compute how often an anchor of one layer is one of another layer of the same text, ``(R,)``.

    NaN if no text has two maps.
    """
    repeats: Any = 0
    pairs = 0
    for _, group in groupby(placed, key=lambda map_and_places: map_and_places[0].text):
        maps = [places for _, places in group]
        together = np.hstack(maps)
        visits = _counts_by_position(together.T, together.max() + 1)
        repeats += (visits * (visits - 1)).sum(1)
        pairs += together.shape[1] * (len(maps) - 1)
    return repeats / pairs if pairs else np.full(len(together), np.nan)
