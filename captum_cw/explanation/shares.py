"""Scores as shares of all scores, by word, and the sentence that they make.

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
    "question",
    "quoted",
    "sentence",
    "shares_of",
    "summary",
]

#: A sentence names the words with the largest shares, up to this number.
NAMED = 3
#: A word with a smaller share than this is not named.
SMALL = 0.01
#: If the largest share is a smaller part of all shares but those of sinks, no word leads.
FLAT = 0.2
#: The number of words that have a bar, besides sinks. The sentence names no others.
BARS = 10
#: The length of the longest name of a word, as on the page.
LONGEST = 40
#: The length of the longest bar of a summary.
BAR = 24
#: What the marks of readable tokens stand for.
MARKS = {"␣": "a space", "⏎": "a line break", "⇥": "a tab"}


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
        word = _name(self.text)
        return f"{word} ({_ordinal(self.occurrence)})" if self.occurrence else word

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


def _scored(explanation: Explanation, method: str | None) -> str:
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
    method = _scored(explanation, method)
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
    """Return which occurrence of its text each word is, counted from 1; 0 without another."""
    same = [text.strip() or text for text in words]
    total, seen = Counter(same), Counter[str]()
    found = []
    for text in same:
        seen[text] += 1
        found.append(seen[text] if total[text] > 1 else 0)
    return found


def question(explanation: Explanation) -> str | None:
    """Return the question that an explanation answers, such as ``Why "Paris"?``; None without."""
    settings = explanation.settings
    if "target" not in settings:
        return None
    rather = f", and not {quoted(settings['contrast'])}" if "contrast" in settings else ""
    return f"Why {quoted(settings['target'])}{rather}?"


def sentence(
    explanation: Explanation,
    method: str | None = None,
    sinks: Collection[int] | None = None,
) -> str:
    """Say which words made the prediction, or have the largest scores.

    Args:
        explanation: The explanation.
        method: The method of the scores; None for the one that answers the question.
        sinks: The positions of attention sinks; None for those of the explanation.

    Example:
        >>> scores = {"target": torch.tensor([5.0, 1.0, 3.0, -1.0])}
        >>> words, settings = [" The", " capital", " France", " is"], {"target": " Paris"}
        >>> print(sentence(Explanation(words, scores, settings=settings)))
        “Paris” comes from “France” (30%) and “capital” (10%). “is” (10%) worked against it. 50%
        came by way of the first token “The”, an attention sink, and says little about that word.
    """
    method = _scored(explanation, method)
    found = shares_of(explanation, method, sinks)
    entry = measures.find(method)
    others = sorted((x for x in found if not x.is_sink), key=lambda x: -abs(x.share))
    shown = [x for x in others[:BARS] if abs(x.share) >= SMALL]
    target, contrast = (explanation.settings.get(role) for role in ("target", "contrast"))
    answers = {_name(answer) for answer in (target, contrast) if answer is not None}
    towards = _listed([x for x in shown if x.share > 0], answers)
    against = _listed([x for x in shown if x.share < 0], answers)
    if target is None or entry is None or not entry.explains_target:
        label = method if entry is None else entry.label
        said = [f"By “{label}”, the largest shares are those of {towards or 'no word'}."]
        contrast = None
    else:
        rather = "" if contrast is None else f" rather than {_with_meaning(contrast)}"
        many = others and abs(others[0].share) < FLAT * sum(abs(x.share) for x in others)
        of = "comes from many words, most from" if many else "comes from"
        said = [f"{_with_meaning(target)}{rather} {of} {towards}."]
        if not towards:
            said = [f"{_with_meaning(target)}{rather} comes from no single word."]
        preferred = explanation.settings.get("model's prediction")
        if preferred:
            said.insert(0, f"The model itself predicts {preferred}.")
    if against:
        verb = "worked against it" if contrast is None else f"worked for {quoted(contrast)}"
        said.append(f"{against[0].upper()}{against[1:]} {verb}.")
    for x in found:
        if x.is_sink:
            which = "the first token" if x.place == 0 else "token"
            way = "came by way of" if x.share >= 0 else "was taken away by"
            said.append(
                f"{_size(x)} {way} {which} {quoted(x.text)}, an attention sink, and says little "
                "about that word."
            )
    return " ".join(said)


def summary(
    explanation: Explanation, count: int = BARS, *, method: str | None = None, raw: bool = False
) -> str:
    """Return a text of the question, its answer, and the words with the largest shares.

    Args:
        explanation: The explanation.
        count: The number of words, besides sinks.
        method: The method of the scores; None for the one that answers the question.
        raw: Whether to show scores in the unit of the method instead of percent.
    """
    method = first_method(explanation) if method is None else method
    asked = question(explanation)
    lines = [] if asked is None else [f"{asked}{_probabilities(explanation)}"]
    if method is None or method not in explanation.scores:
        return "\n".join([*lines, repr(explanation)])
    found = shares_of(explanation, method)
    top = largest(found, count)
    others = explanation.settings.get("other predictions")
    if asked is not None and others:
        lines.append(f"Other predictions: {others}.")
    lines += [sentence(explanation, method), ""]
    numbers = [f"{x.score:.3g}" if raw else x.percent for x in top]
    width = max((len(x.label) for x in top), default=0)
    longest = max((abs(x.share) for x in top), default=0) or 1.0
    for x, number in zip(top, numbers, strict=True):
        bar = "█" * max(1, round(BAR * abs(x.share) / longest)) if x.share else ""
        note = "  (attention sink)" if x.is_sink else ""
        lines.append(f"{x.label:<{width}} {number:>7} {bar}{note}")
    rest = len(found) - len(top)
    if rest:
        left = 1 - sum(abs(x.share) for x in top)
        words = "word" if rest == 1 else "words"
        lines.append(f"{rest} more {words}: {100 * abs(left):.0f}% together")
    entry = measures.find(method)
    label = method if entry is None else entry.label
    unit = f", in the {entry.unit}" if raw and entry is not None and entry.unit else ""
    lines.append(f"Scores: {label}{unit}.")
    hint = explanation.settings.get("hint")
    return "\n".join(lines if hint is None else [*lines, hint])


def largest(shares: Sequence[Share], count: int) -> list[Share]:
    """Return the sinks, and then the largest other shares, up to a number."""
    others = sorted((x for x in shares if not x.is_sink), key=lambda x: -abs(x.share))
    return [*(x for x in shares if x.is_sink), *others[:count]]


def quoted(text: str) -> str:
    """Return a token in quotation marks, without the space before it, and shortened."""
    return f"“{_name(text)}”"


def _name(text: str) -> str:
    """Return a word without the spaces around it, shortened to ``LONGEST`` characters."""
    word = text.strip() or text
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def _with_meaning(text: str) -> str:
    """Return a token in quotation marks, and what it stands for if it is a mark."""
    meaning = MARKS.get(text.strip())
    return quoted(text) if meaning is None else f"{quoted(text)} ({meaning})"


def _probabilities(explanation: Explanation) -> str:
    """Return the probabilities of the target and its contrast, as the end of a line."""
    settings = explanation.settings
    found = [settings.get(f"{role} probability") for role in ("target", "contrast")]
    known = [f"{100 * float(x):.2g}%" for x in found if x is not None]
    return f" (probability {' against '.join(known)})" if known else ""


def _ordinal(n: int) -> str:
    """Return "1st", "2nd" and so on."""
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _size(x: Share) -> str:
    return x.percent.removeprefix("-")


def _listed(shares: Sequence[Share], answers: Collection[str]) -> str:
    """Name the first few words with their sizes, and tell them from the target and contrast."""
    named = []
    for x in shares[:NAMED]:
        which = f"the {_ordinal(x.occurrence)} " if x.occurrence else ""
        same = _name(x.text) in answers and not which
        named.append(f"{which}{quoted(x.text)}{' in the text' * same} ({_size(x)})")
    return " and ".join(filter(None, [", ".join(named[:-1]), *named[-1:]]))
