"""Texts that are made of parts, such as chats: where the parts stand, by characters and by tokens.

A template is a function of its values, and says nothing of where it puts them. So it is run once
more with values between marks that no text has, and where they are found is where the values stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_cw.text.tokens import Span

__all__ = ["Encoded", "Message", "RenderedChat", "encode", "owners", "places_of", "render_chat"]

Messages = Sequence[Mapping[str, Any]]

#: What :func:`render_chat` decides itself.
_OWN_ARGUMENTS = ("tokenize", "return_dict", "return_tensors")

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
        text: The text; None where it is not known.
        ids: ``(1, T)``.
        offsets: ``T`` ranges of characters, empty for special tokens that are not in the text; None
            where the tokenizer does not tell.
        extras: What the model is given beside the ids, such as ``token_type_ids`` ``(1, T)``.
    """

    text: str | None
    ids: Tensor
    offsets: list[Span] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RenderedChat(Encoded):
    """A chat as a model reads it.

    Args:
        messages: Where they stand; None where that is not known, since the template rewrites them
            or the tokenizer has no offsets.
    """

    messages: list[Message] | None = None


def encode(
    tokenizer: Any, text: str, pair: str | None = None, *, add_special_tokens: bool = True
) -> Encoded:
    """The tokens of a text, and where they stand in it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text.
        pair: A second text after it. Offsets are not known then, since they are of two texts.
        add_special_tokens: As of the tokenizer.
    """
    known = pair is None and bool(getattr(tokenizer, "is_fast", False))
    texts = (text,) if pair is None else (text, pair)
    found = tokenizer(*texts, add_special_tokens=add_special_tokens, return_offsets_mapping=known)
    offsets = [(start, stop) for start, stop in found["offset_mapping"]] if known else None
    ids, extras = _read(found)
    return Encoded(text if pair is None else None, ids, offsets, extras)


def _read(found: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a tokenizer gave of one text: ids ``(1, T)``, and what else it says of each token."""
    extras = {
        name: torch.tensor([x], dtype=torch.long, device="cpu")
        for name, x in found.items()
        if name not in ("input_ids", "offset_mapping") and isinstance(x, (list, tuple))
    }
    return torch.tensor([found["input_ids"]], dtype=torch.long, device="cpu"), extras


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


def render_chat(
    tokenizer: Any,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """A chat by the tokenizer's template, and where its messages stand.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: Each with a ``"role"``, and a ``"content"`` that is a text, a list of parts such
            as ``{"type": "text", "text": "..."}``, or None, as where a tool is called.
        add_generation_prompt: Whether the model is to speak next. ``chat_template_kwargs`` can say
            otherwise.
        chat_template_kwargs: Further arguments for ``tokenizer.apply_chat_template``, such as
            ``{"enable_thinking": False}`` or ``{"tools": [...]}``.

    Raises:
        TypeError: If a message is not a mapping with a role, or its content is of another kind.
        ValueError: If there is no message, the tokenizer has no chat template, or
            ``chat_template_kwargs`` say how to tokenize.

    Example:
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'y' if think else 'n' }}"
        ... )
        >>> chat = [{"role": "user", "content": "a b"}]
        >>> options = {"think": True}
        >>> render_chat(
        ...     tokenizer, chat, add_generation_prompt=True, chat_template_kwargs=options
        ... ).text
        'a b y'
    """
    options = dict(chat_template_kwargs or {})
    _check(tokenizer, messages, options)
    # A message that is continued is not followed by another one.
    continued = bool(options.get("continue_final_message", False))
    options = {"add_generation_prompt": add_generation_prompt and not continued, **options}

    def render(texts: list[str]) -> str:
        filled = _with_texts(messages, texts)
        text: str = tokenizer.apply_chat_template(filled, tokenize=False, **options)
        return text

    texts = [text for message in messages for text in _texts(message)]
    numbers = [n for n, message in enumerate(messages) for _ in _texts(message)]
    rendered = render(texts)
    encoded = _encoded(tokenizer, messages, options, rendered)
    places = None if encoded.offsets is None else places_of(render, texts)
    spans = None if places is None else _message_spans(encoded, messages, numbers, places)
    return RenderedChat(rendered, encoded.ids, encoded.offsets, encoded.extras, spans)


def _encoded(
    tokenizer: Any, messages: Messages, options: Mapping[str, Any], rendered: str
) -> Encoded:
    """The tokens as the tokenizer itself makes them of a chat."""
    found = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, **options
    )
    ids, extras = _read(found)
    encoded = encode(tokenizer, rendered, add_special_tokens=False)
    if torch.equal(encoded.ids, ids):
        return replace(encoded, extras=extras)
    return Encoded(rendered, ids, None, extras)


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The texts that a message's content is made of."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if _is_text(part)]


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _with_texts(messages: Messages, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The messages with other texts in the places of theirs."""
    remaining = iter(texts)
    filled = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = next(remaining)
        elif content is not None:
            content = [
                {**part, "text": next(remaining)} if _is_text(part) else part for part in content
            ]
        filled.append({**message, "content": content} if "content" in message else {**message})
    return filled


def _message_spans(
    encoded: Encoded, messages: Messages, numbers: Sequence[int], places: list[list[Span]]
) -> list[Message] | None:
    """Where messages stand; ``numbers`` are those of the messages that texts belong to."""
    if encoded.offsets is None or any(len(ranges) != 1 for ranges in places):
        return None
    assert encoded.text is not None
    found = owners(encoded.text, encoded.offsets, [ranges[0] for ranges in places])
    spans = []
    for number, message in enumerate(messages):
        tokens = [
            n for n, owner in enumerate(found) if owner is not None and numbers[owner] == number
        ]
        if tokens:
            spans.append(Message(str(message["role"]), tokens[0], tokens[-1] + 1))
    return spans


def _check(tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> None:
    if not messages:
        raise ValueError("The chat has no message: give at least one.")
    for message in messages:
        if not isinstance(message, Mapping) or not _is_content(message.get("content")):
            raise TypeError(
                f"{message!r} is not a message: give {{'role': 'user', 'content': 'a text'}} (a "
                "list is one chat; explain several texts one by one). Content is a text, None, or "
                "a list of parts such as {'type': 'text', 'text': 'a text'}; for others, apply the "
                "chat template yourself and give its text or ids."
            )
        if "role" not in message:
            raise TypeError(f"{message!r} has no role: give {{'role': 'user', 'content': ...}}.")
    for name in _OWN_ARGUMENTS:
        if name in options:
            raise ValueError(
                f"chat_template_kwargs holds {name!r}, which is decided here: leave it out, and "
                "give arguments of the template, such as {'enable_thinking': False}."
            )
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        raise ValueError(
            "The tokenizer has no chat template: use that of the model's version for chats, set "
            "tokenizer.chat_template, or give the text as the model expects it."
        )


def _is_content(content: object) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and (part.get("type") != "text" or _is_text(part))
        for part in content
    )
