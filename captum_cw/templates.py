"""Texts that are made of parts, such as chats: where the parts stand, by characters and by tokens.

A template is a function of its values, and says nothing of where it puts them. So it is run once
more with values between marks that no text has, and where they are found is where the values stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_cw.tokens import Span

__all__ = ["Encoded", "Message", "RenderedChat", "encode", "owners", "places_of", "render_chat"]

Messages = Sequence[Mapping[str, Any]]

#: Two characters for each value, from here on: private, of no meaning in any text.
_MARKS = 0xF0000


class Message(NamedTuple):
    """Which tokens hold what a message of a chat says, without its role and its end.

    Args:
        role: Who speaks.
        start: The first token.
        stop: The one after the last.
    """

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """A text and its tokens.

    Args:
        text: The text.
        ids: ``(1, T)``.
        offsets: ``T`` ranges of characters, empty for special tokens that are not in the text; None
            where the tokenizer does not tell.
    """

    text: str
    ids: Tensor
    offsets: list[Span] | None


@dataclass(frozen=True)
class RenderedChat(Encoded):
    """A chat as a model reads it.

    Args:
        messages: Where they stand; None where that is not known, since the template rewrites them
            or the tokenizer has no offsets.
    """

    messages: list[Message] | None


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Encoded:
    """The tokens of a text, and where they stand in it."""
    known = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=known)
    ids = torch.tensor([found["input_ids"]], dtype=torch.long, device="cpu")
    offsets = [(start, stop) for start, stop in found["offset_mapping"]] if known else None
    return Encoded(text, ids, offsets)


def owners(text: str, offsets: Sequence[Span], ranges: Sequence[Span]) -> list[int | None]:
    """Which range of characters each token belongs to: the one that holds most of it.

    White space does not count, since many vocabularies put a word's space into its token; where two
    hold as much, it is the first. A token that is outside of all for the greater part has none.

    Args:
        text: The text.
        offsets: Where its ``T`` tokens stand.
        ranges: Of characters; none overlap.

    Returns:
        ``T`` numbers of ranges, or None.
    """
    of_character: list[int | None] = [None] * len(text)
    for number, (start, stop) in enumerate(ranges):
        of_character[start:stop] = [number] * (stop - start)

    def owner(start: int, stop: int) -> int | None:
        places = range(start, stop)
        solid = [place for place in places if not text[place].isspace()] or places
        votes = Counter(of_character[place] for place in solid)
        return votes.most_common(1)[0][0] if votes else None

    return [owner(*place) for place in offsets]


def places_of(render: Callable[[list[str]], str], values: Sequence[str]) -> list[list[Span]] | None:
    """Where values stand in the text that is made of them.

    Args:
        render: Makes the text.
        values: What it is made of.

    Returns:
        For each value the ranges of characters where it stands, none where it is left out; None
        where that cannot be told, since what is made of a value depends on it.
    """
    text = render(list(values))
    # Templates that strip a value would leave the white space of one that is marked as a whole.
    for mark in (_mark_whole, _mark_stripped):
        try:
            marked = render([mark(number, value) for number, value in enumerate(values)])
        except Exception:  # a template may do anything, and refuse what it does not expect
            continue
        found = _find_marks(marked, len(values))
        if found is not None and found[0] == text:
            return found[1]
    return None


def _mark_whole(number: int, value: str) -> str:
    start = _MARKS + 2 * number
    return f"{chr(start)}{value}{chr(start + 1)}"


def _mark_stripped(number: int, value: str) -> str:
    stripped = value.strip()
    before, _, after = value.partition(stripped) if stripped else (value, "", "")
    return f"{before}{_mark_whole(number, stripped)}{after}"


def _find_marks(marked: str, count: int) -> tuple[str, list[list[Span]]] | None:
    """The text without its marks, and what stood between each pair; None where one is alone."""
    text: list[str] = []
    ranges: list[list[Span]] = [[] for _ in range(count)]
    opened: dict[int, int] = {}
    for character in marked:
        number, closes = divmod(ord(character) - _MARKS, 2)
        if not 0 <= number < count:
            text.append(character)
        elif not closes and number not in opened:
            opened[number] = len(text)
        elif closes and number in opened:
            ranges[number].append((opened.pop(number), len(text)))
        else:
            return None
    return None if opened else ("".join(text), ranges)


def render_chat(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> RenderedChat:
    """A chat by the tokenizer's template, and where its messages stand.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: Each with a ``"role"`` and a ``"content"``.
        add_generation_prompt: Whether the model is to speak next.

    Raises:
        TypeError: If a message is no mapping with a role and a text.
        ValueError: If there is no message, or the tokenizer has no chat template.
    """
    _check(tokenizer, messages)

    def render(contents: list[str]) -> str:
        filled = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        text: str = tokenizer.apply_chat_template(
            filled, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    contents = [message["content"] for message in messages]
    encoded = encode(tokenizer, render(contents), add_special_tokens=False)
    places = places_of(render, contents)
    spans = None if places is None else _message_spans(encoded, messages, places)
    return RenderedChat(encoded.text, encoded.ids, encoded.offsets, spans)


def _message_spans(
    encoded: Encoded, messages: Messages, places: list[list[Span]]
) -> list[Message] | None:
    if encoded.offsets is None or any(len(ranges) != 1 for ranges in places):
        return None
    found = owners(encoded.text, encoded.offsets, [ranges[0] for ranges in places])
    spans = []
    for number, message in enumerate(messages):
        tokens = [place for place, owner in enumerate(found) if owner == number]
        if tokens:
            spans.append(Message(str(message["role"]), tokens[0], tokens[-1] + 1))
    return spans


def _check(tokenizer: Any, messages: Messages) -> None:
    if not messages:
        raise ValueError("The chat has no message: give at least one.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise TypeError(
                f"{message!r} is no message: give {{'role': 'user', 'content': 'a text'}} (a list "
                "is one chat; explain several texts one by one); for others, apply the chat "
                "template yourself and give its text or ids."
            )
        if "role" not in message:
            raise TypeError(f"{message!r} has no role: give {{'role': 'user', 'content': ...}}.")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The tokenizer has no chat template: use that of the model's version for chats, set "
            "tokenizer.chat_template, or give the text as the model expects it."
        )
