"""Scores as shares of all scores, by word.

The page, the command line and ``print(explanation)`` show these shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captum_cw import measures
from captum_cw.explanation.grouping import spans_of_words

if TYPE_CHECKING:
    from captum_cw.explanation.explanation import Explanation

__all__ = [
    "Share",
    "first_method",
    "in_percent",
    "largest",
    "ordinal",
    "quoted",
    "scored",
    "shares_of",
    "trimmed",
    "with_meaning",
]

#: The length of the longest name of a word, as on the page.
LONGEST = 40
#: What tokens stand for that are hard to read as such.
MARKS = {"␣": "a space", "⏎": "a line break", "⇥": "a tab", '"': "a quotation mark"}


@dataclass(frozen=True)
class Share:
    """The part of a word, or of a token without a word, in all scores of a text.

    Args:
        text: The word.
        place: The position of its first token.
        score: Its score, in the unit of the method.
        share: Its score divided by the sum of the sizes of all scores. The sizes of all shares sum
            to one.
        is_sink: Whether it holds an attention sink.
        occurrence: Which occurrence of the word it is, counted from 1; 0 if there is no other.
    """

    text: str
    place: int
    score: float
    share: float
    is_sink: bool
    occurrence: int = 0

    @property
    def label(self) -> str:
        """The word, with its occurrence if the text has it several times: ``"the (2nd)"``."""
        word = trimmed(self.text)
        return f"{word} ({ordinal(self.occurrence)})" if self.occurrence else word

    def to_dict(self) -> dict[str, Any]:
        """Return the word, its place, its share, and whether it holds a sink, for JSON."""
        return {
            "word": self.text,
            "place": self.place,
            "share": self.share,
            "sink": self.is_sink,
        }

    @property
    def percent(self) -> str:
        """The share in percent, such as ``"12%"`` or ``"-0.4%"``."""
        return in_percent(self.share)


def in_percent(share: float) -> str:
    """Return a share in percent, with two digits."""
    percent = 100 * share
    return f"{percent:.0f}%" if abs(percent) >= 9.5 else f"{percent:.2g}%"


def first_method(explanation: Explanation) -> str | None:
    """Return the method that answers the question: of a target if there is one.

    It has scores if any method has; else it has a map. None if there is neither.
    """
    known = explanation.scores or explanation.maps
    useful = [*measures.names(targets=True), *known]
    return next((name for name in useful if name in known), None)


def scored(explanation: Explanation, method: str | None) -> str:
    """Return a method that has scores."""
    method = first_method(explanation) if method is None else method
    if method is None or method not in explanation.scores:
        known = ", ".join(map(repr, explanation.scores)) or "none"
        raise ValueError(f"method={method!r} has no scores here; the known ones: {known}.")
    return method


def shares_of(
    explanation: Explanation, method: str | None = None, sinks: Collection[int] | None = None
) -> list[Share]:
    """Return the shares of all words, in the order of the text.

    Args:
        explanation: The explanation.
        method: The method of the scores; None for the one that answers the question.
        sinks: The positions of attention sinks; None for those of the explanation.

    Raises:
        ValueError: If the explanation does not have scores of the method.
    """
    method = scored(explanation, method)
    sinks = explanation.sinks if sinks is None else sinks
    words, spans = explanation, [(n, n + 1) for n in range(len(explanation.tokens))]
    if explanation.words is not None:
        words, spans = explanation.by_word(), spans_of_words(explanation.words)
    scores = words.scores[method].detach().cpu().double()
    total = float(scores.abs().sum()) or 1.0
    parts = zip(words.tokens, scores.tolist(), spans, _occurrences(words.tokens), strict=True)
    return [
        Share(text, start, score, score / total, any(start <= n < stop for n in sinks), occurrence)
        for text, score, (start, stop), occurrence in parts
    ]


def _occurrences(words: Sequence[str]) -> list[int]:
    """Return which occurrence of its text each word is, counted from 1; 0 without another.

    Capital letters make no difference.
    """
    same = [(text.strip() or text).casefold() for text in words]
    total, seen = Counter(same), Counter[str]()
    found = []
    for text in same:
        seen[text] += 1
        found.append(seen[text] if total[text] > 1 else 0)
    return found


def largest(shares: Sequence[Share], count: int) -> list[Share]:
    """Return the sinks, and then the largest other shares, up to a number."""
    others = sorted((x for x in shares if not x.is_sink), key=lambda x: -abs(x.share))
    return [*(x for x in shares if x.is_sink), *others[:count]]


def quoted(text: str) -> str:
    """Return a token in quotation marks, without the space before it, and shortened."""
    return f"“{trimmed(text)}”"


def with_meaning(text: str) -> str:
    """Return a token in quotation marks, and what it stands for if it is a mark."""
    meaning = MARKS.get(text.strip())
    return quoted(text) if meaning is None else f"{quoted(text)} ({meaning})"


def trimmed(text: str) -> str:
    """Return a word without the spaces around it, shortened to ``LONGEST`` characters."""
    word = text.strip() or text
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def ordinal(n: int) -> str:
    """Return "1st", "2nd" and so on."""
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
