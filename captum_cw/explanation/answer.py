"""The answer of an explanation in words: the question, how sure the model is, and why.

The page, the command line and ``print(explanation)`` say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from captum_cw import measures
from captum_cw.explanation.shares import (
    Share,
    first_method,
    in_percent,
    largest,
    ordinal,
    quoted,
    scored,
    shares_of,
    trimmed,
    with_meaning,
)

if TYPE_CHECKING:
    from captum_cw.explanation.explanation import Explanation

__all__ = ["BARS", "question", "sentence", "summary", "verdict"]

#: A sentence names the words with the largest shares, up to this number.
NAMED = 3
#: A word with a smaller share than this is not named.
SMALL = 0.01
#: A sink with a smaller share than this is not told of.
SMALL_SINK = 0.05
#: If sinks have at least this share, they are told of first: words have less.
LEADS = 0.5
#: If the largest share is a smaller part of all shares but those of sinks, no word leads.
FLAT = 0.2
#: A model is not sure of an answer that is less probable than this.
UNSURE = 0.2
#: Nor is it if another answer has at least this part of the probability.
CLOSE = 0.75
#: The number of words that have a bar, besides sinks. The sentence names no others.
BARS = 10
#: The length of the longest bar of a summary.
BAR = 24


def question(explanation: Explanation) -> str | None:
    """Return the question that an explanation answers, such as ``Why "Paris"?``; None without."""
    settings = explanation.settings
    if "target" not in settings:
        return None
    rather = f", and not {quoted(settings['contrast'])}" if "contrast" in settings else ""
    return f"Why {quoted(settings['target'])}{rather}?"


def verdict(explanation: Explanation) -> str | None:
    """Say how probable the answer is, or which one the model prefers; None without a question.

    The target is compared with its contrast, or else with the best other answer. The model is not
    sure if the lesser of the two has at least ``CLOSE`` of the other's probability. Without a
    contrast, it is also not sure if both have less than ``UNSURE``. Without probabilities, as in a
    regression, the value is told.

    Example:
        >>> settings = {"target": " Rome", "target probability": "0.0087"}
        >>> settings |= {"model's prediction": "“Paris” (26%)", "best other probability": "0.26"}
        >>> print(verdict(Explanation(["Here"], {}, settings=settings)))
        The model prefers “Paris” (26%) to “Rome” (0.87%).
    """
    settings = explanation.settings
    roles = [role for role in ("target", "contrast") if role in settings]
    chances = [float(settings[x]) for x in (f"{x} probability" for x in roles) if x in settings]
    names = [with_meaning(settings[role]) for role in roles]
    if not chances:
        return _value(names, settings.get("target value"))
    preferred = settings.get("model's prediction")
    asks_between_two = len(chances) > 1 and not preferred
    other = chances[1] if asks_between_two else float(settings.get("best other probability", 0))
    less, most = sorted((chances[0], other))
    unsure = less >= CLOSE * most or (most < UNSURE and not asks_between_two)
    doubt = "The model is not sure: " if unsure else ""
    named = list(zip(names, map(in_percent, chances), strict=True))
    if preferred:
        lesser = [f"{name} ({chance})" for name, chance in named]
        to = " and ".join(x for x in lesser if x != preferred)
        said = f"{doubt}{'it' if doubt else 'The model'} prefers {preferred} to {to}."
    else:
        only = "only " if chances[0] < UNSURE else ""
        of = [f"{name} has a probability of {only}{chance}" for name, chance in named[:1]]
        of += [f"{name} of {chance}" for name, chance in named[1:]]
        said = f"{doubt}{', and '.join(of)}."
    others = settings.get("other predictions")
    return f"{said} Other predictions: {others}." if others else said


def _value(names: Sequence[str], value: str | None) -> str | None:
    """Say what the logit of a target is, or by how much those of two differ."""
    if not names or value is None:
        return None
    if len(names) > 1:
        return f"The logits of {' and '.join(names)} differ by {value}."
    return f"The logit of {names[0]} is {value}."


def sentence(
    explanation: Explanation,
    method: str | None = None,
    sinks: Collection[int] | None = None,
) -> str:
    """Say which words made the prediction, or have the largest scores.

    What came by way of a sink is told first if it is more than what came from all words, and is
    left out if it is little.

    Args:
        explanation: The explanation.
        method: The method of the scores; None for the one that answers the question.
        sinks: The positions of attention sinks; None for those of the explanation.

    Example:
        >>> scores = {"target": torch.tensor([4.0, 2.0, 3.0, -1.0])}
        >>> words, settings = [" The", " capital", " France", " is"], {"target": " Paris"}
        >>> print(sentence(Explanation(words, scores, settings=settings)))
        “Paris” comes from “France” (30%) and “capital” (20%). “is” (10%) worked against it. 40%
        came by way of the first token “The”. It is an attention sink, so this part says little
        about the word.
    """
    method = scored(explanation, method)
    found = shares_of(explanation, method, sinks)
    entry = measures.find(method)
    target, contrast = (explanation.settings.get(role) for role in ("target", "contrast"))
    if target is None or entry is None or not entry.explains_target:
        target = contrast = None
    others = largest([x for x in found if not x.is_sink], BARS)
    shown = [x for x in others if abs(x.share) >= SMALL]
    answers = {trimmed(answer) for answer in (target, contrast) if answer is not None}
    opposed = "worked against it" if contrast is None else f"worked for {quoted(contrast)}"
    held = [x for x in found if x.is_sink]
    leads = target is not None and sum(abs(x.share) for x in held) >= LEADS
    of = " of the answer" if leads else ""
    of_sinks = [_of_sink(x, of, opposed) for x in held if abs(x.share) >= SMALL_SINK]
    towards = _listed([x for x in shown if x.share > 0], answers)
    against = _listed([x for x in shown if x.share < 0], answers)
    if target is None:
        label = method if entry is None else entry.label
        of_words = f"By “{label}”, the largest shares are those of {towards or 'no word'}."
    else:
        rather = "" if contrast is None else f" rather than {with_meaning(contrast)}"
        subject = f"{with_meaning(target)}{rather}"
        flat = others and abs(others[0].share) < FLAT * (1 - sum(abs(x.share) for x in held))
        if not towards:
            of_words = f"{subject} comes from no single word."
        elif leads:
            of_words = f"Among the words, {towards} did most for {subject}."
        else:
            of_words = f"{subject} comes from {'many words, most from ' * bool(flat)}{towards}."
    said = [*of_sinks, of_words] if leads else [of_words]
    if against:
        said.append(f"{against[0].upper()}{against[1:]} {opposed}.")
    return " ".join(said if leads else [*said, *of_sinks])


def _of_sink(x: Share, of: str, opposed: str) -> str:
    """Say what came by way of a sink; ``opposed`` is what words against an answer did."""
    which = "the first token" if x.place == 0 else "token"
    way = "came" if x.share >= 0 else opposed
    return (
        f"{_size(x)}{of} {way} by way of {which} {quoted(x.text)}. It is an attention sink, so "
        "this part says little about the word."
    )


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
    lines = [line for line in (question(explanation), verdict(explanation)) if line is not None]
    if method is None or method not in explanation.scores:
        return "\n".join([*lines, repr(explanation)])
    found = shares_of(explanation, method)
    top = largest(found, count)
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


def _size(x: Share) -> str:
    return x.percent.removeprefix("-")


def _listed(shares: Sequence[Share], answers: Collection[str]) -> str:
    """Name the first few words with their sizes, and tell them from the target and contrast."""
    named = []
    for x in shares[:NAMED]:
        which = f"the {ordinal(x.occurrence)} " if x.occurrence else ""
        same = trimmed(x.text) in answers and not which
        named.append(f"{which}{quoted(x.text)}{' in the text' * same} ({_size(x)})")
    return " and ".join(filter(None, [", ".join(named[:-1]), *named[-1:]]))
