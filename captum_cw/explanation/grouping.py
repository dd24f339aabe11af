"""Explanations by word, span of the text, or message of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from captum_cw import measures
from captum_cw.explanation.heads import HeadMaps
from captum_cw.functional import check_choice
from captum_cw.text.templates import owners
from captum_cw.text.tokens import (
    Grouping,
    Span,
    check_spans,
    group_scores,
    joined,
    words_of_texts,
)

if TYPE_CHECKING:
    from captum_cw.explanation.explanation import Explanation

__all__ = ["SpanUnit", "by_message", "by_span", "by_word", "part", "spans_of_words"]

SpanUnit = Literal["tokens", "characters"]


def by_word(explanation: Explanation, how: Grouping) -> Explanation:
    """Group tokens by word; see :meth:`captum_cw.Explanation.by_word`."""
    words = explanation.words
    if words is None:
        words = words_of_texts(explanation.tokens)
    if words is None:
        raise ValueError(
            "The words of the tokens are unknown, and no token begins with a space: give "
            "words=..., or spans to by_span."
        )
    outputs = None if explanation.query_words is None else spans_of_words(explanation.query_words)
    return _group(explanation, spans_of_words(words), how, "word", outputs)


def by_span(
    explanation: Explanation, spans: Sequence[Span | str], how: Grouping, unit: SpanUnit
) -> Explanation:
    """Group tokens by spans; see :meth:`captum_cw.Explanation.by_span`."""
    check_choice("unit", unit, SpanUnit)
    return _group(explanation, [_in_tokens(explanation, s, unit) for s in spans], how, "span")


def by_message(explanation: Explanation, how: Grouping) -> Explanation:
    """Group tokens by message of a chat; see :meth:`captum_cw.Explanation.by_message`."""
    if explanation.messages is None:
        raise ValueError(
            "The positions of messages are unknown: the text was not given as a chat, its template "
            "changes the messages, or a result of Captum does not tell its input. Give their "
            "positions to by_span."
        )
    spans = [(message.start, message.stop) for message in explanation.messages]
    grouped = _group(explanation, spans, how, "message")
    return replace(grouped, tokens=[message.role for message in explanation.messages])


def part(explanation: Explanation, start: int, stop: int) -> Explanation:
    """Return the explanation of a part; see :meth:`captum_cw.Explanation.part`."""
    check_spans([(start, stop)], len(explanation.tokens), "tokens")
    keys = slice(start, stop)
    same = explanation.queries is None
    queries = keys if same else slice(None)

    def of(values: Any, rows: slice) -> Any:
        return None if values is None else values[rows]

    settings = {**explanation.settings, "part of": f"tokens {start} to {stop - 1} of a text"}
    position = settings.pop("target position", None)
    if position is not None and start <= position < stop:
        settings["target position"] = position - start
    return replace(
        explanation,
        tokens=explanation.tokens[keys],
        scores={name: x[keys] for name, x in explanation.scores.items()},
        maps={name: x[queries, keys] for name, x in explanation.maps.items()},
        heads=[_part_of_layer(layer, queries, start, stop) for layer in explanation.heads],
        predicted=of(explanation.predicted, queries),
        probability=of(explanation.probability, queries),
        words=of(explanation.words, keys),
        offsets=of(explanation.offsets, keys),
        messages=None,
        settings=settings,
    )


def _part_of_layer(layer: HeadMaps, queries: slice, start: int, stop: int) -> HeadMaps:
    keys = layer.keys[:, queries] - start
    outside = (keys < 0) | (keys >= stop - start)
    return replace(
        layer,
        keys=keys.masked_fill(outside, 0),
        attention=layer.attention[:, queries].masked_fill(outside, 0),
        relative_norm=layer.relative_norm[:, queries].masked_fill(outside, 0),
        cosine=layer.cosine[:, queries].masked_fill(outside, 0),
        output_norm=layer.output_norm[queries],
        share=layer.share[:, queries],
    )


def _group(
    explanation: Explanation,
    spans: Sequence[Span],
    how: Grouping,
    by: str,
    output_spans: Sequence[Span] | None = None,
) -> Explanation:
    """Group keys by ``spans``, and queries by the same spans, or by ``output_spans``.

    Queries that are not the tokens themselves stay single if ``output_spans`` is None.
    """
    check_spans(spans, len(explanation.tokens), "tokens")
    maps = {name: group_scores(x, spans, how) for name, x in explanation.maps.items()}
    queries, predicted = explanation.queries, explanation.predicted
    probability = explanation.probability
    query_spans = spans if queries is None else output_spans
    if query_spans is not None:
        maps = {name: _group_queries(name, x, query_spans) for name, x in maps.items()}
        last = [stop - 1 for _, stop in query_spans]
        predicted = None if predicted is None else [predicted[n] for n in last]
        if queries is not None:
            queries = [joined(queries[start:stop]) for start, stop in query_spans]
        if probability is not None and queries is None:
            probability = probability[last]
        elif probability is not None:
            parts = [probability[start:stop].prod() for start, stop in query_spans]
            probability = torch.stack(parts)
    settings = {**explanation.settings, "by": by, "how": how}
    position = settings.pop("target position", None)
    for n, (start, stop) in enumerate(query_spans or ()):
        if position is not None and start <= position < stop:
            settings["target position"] = n
    return type(explanation)(
        tokens=[joined(explanation.tokens[start:stop]) for start, stop in spans],
        scores={name: group_scores(x, spans, how) for name, x in explanation.scores.items()},
        maps=maps,
        queries=queries,
        predicted=predicted,
        probability=probability,
        settings=settings,
    )


def _group_queries(name: str, x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Average the queries of a map; what they add to a target is summed."""
    entry = measures.find(name)
    is_sum = entry is not None and entry.explains_target
    return group_scores(x.T, spans, "sum" if is_sum else "mean").T


def spans_of_words(words: Sequence[int | None]) -> list[Span]:
    """Return the tokens of each word; a token without a word is a span of its own."""
    spans: list[Span] = []
    for place, word in enumerate(words):
        if place and word is not None and word == words[place - 1]:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def _in_tokens(explanation: Explanation, span: Span | str, unit: SpanUnit) -> Span:
    """Return the tokens of a span that is given in tokens, characters or as text."""
    if unit == "tokens" and not isinstance(span, str):
        start, stop = span
        return start, stop
    text, offsets = explanation.text, explanation.offsets
    if text is None or offsets is None:
        raise ValueError(
            f"Span {span!r} is given in characters, but the characters of the tokens are unknown: "
            "give it in tokens instead."
        )
    if isinstance(span, str):
        count = text.count(span) if span else 0
        if count != 1:
            raise ValueError(
                f"{span!r} occurs {count} times in the text: give its characters or tokens."
            )
        span = (text.index(span), text.index(span) + len(span))
    check_spans([span], len(text), "characters")
    inside = [n for n, owner in enumerate(owners(text, offsets, [span])) if owner is not None]
    if not inside:
        raise ValueError(
            f"Span {text[slice(*span)]!r} at {span} does not hold most of any token: "
            "take more of the text."
        )
    return inside[0], inside[-1] + 1
