"""Chats and other texts made of parts: where each part is in the text and in its tokens.

A template is a function of its values, and does not report where it puts them. So this module
renders the template a second time with private marks around each value, and finds the marks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_cw.text.tokens import Span

__all__ = ["Encoded", "Message", "encode", "owners", "places_of", "render_chat"]

Messages = Sequence[Mapping[str, Any]]

#: Arguments of the chat template that :func:`render_chat` sets itself.
_OWN_ARGUMENTS = ("tokenize", "return_dict", "return_tensors")

#: The first mark. Each value has two marks, from a private area of Unicode that texts do not use.
_MARKS = 0xF0000


class Message(NamedTuple):
    """The tokens of a message's content in a chat, without its role and its end token.

    Args:
        role: The role of the message, such as ``"user"``.
        start: The first token.
        stop: The token after the last.
    """

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """A text and its tokens.

    Args:
        text: The text; None if it is unknown.
        ids: ``(1, T)``.
        offsets: The characters of each of the ``T`` tokens, empty for special tokens that are not
            in the text; None if the tokenizer does not report them.
        extras: The model's other inputs, such as ``token_type_ids`` ``(1, T)``.
        messages: The tokens of each message of a chat. None for another text, and if they are
            unknown, because the template changes the content or the tokenizer does not report
            offsets.
    """

    text: str | None
    ids: Tensor
    offsets: list[Span] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    messages: list[Message] | None = None


def encode(
    tokenizer: Any, text: str, pair: str | None = None, *, add_special_tokens: bool = True
) -> Encoded:
    """Tokenize a text, with the characters of each token.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text.
        pair: A second text. Offsets are then unknown, since they would refer to two texts.
        add_special_tokens: Whether the tokenizer adds its special tokens.
    """
    known = pair is None and bool(getattr(tokenizer, "is_fast", False))
    texts = (text,) if pair is None else (text, pair)
    output = tokenizer(*texts, add_special_tokens=add_special_tokens, return_offsets_mapping=known)
    offsets = [(start, stop) for start, stop in output["offset_mapping"]] if known else None
    ids, extras = _split_output(output)
    return Encoded(text if pair is None else None, ids, offsets, extras)


def _split_output(output: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Split a tokenizer's output for one text into ids ``(1, T)`` and other entries per token."""
    extras = {
        name: torch.tensor([x], dtype=torch.long, device="cpu")
        for name, x in output.items()
        if name not in ("input_ids", "offset_mapping") and isinstance(x, (list, tuple))
    }
    return torch.tensor([output["input_ids"]], dtype=torch.long, device="cpu"), extras


def owners(text: str, offsets: Sequence[Span], ranges: Sequence[Span]) -> list[int | None]:
    """Assign each token to the range of characters that holds most of it.

    White space does not count, since many vocabularies include a word's space in its token. In a
    tie the first range wins. A token that is mostly outside of all ranges is not assigned.

    Args:
        text: The text.
        offsets: The characters of each of the ``T`` tokens.
        ranges: The ranges of characters. They must not overlap.

    Returns:
        For each token the number of its range, or None.
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
    """Find where each value is in the text that is rendered from all values.

    Args:
        render: Renders the text from the values.
        values: The values.

    Returns:
        For each value its ranges of characters, an empty list if the text leaves it out. None if
        the places are unknown, because the template changes the text depending on a value.
    """
    text = render(list(values))
    # A template may strip its values, so the second try puts the marks inside the white space.
    for mark in (_mark_whole, _mark_stripped):
        try:
            marked = render([mark(number, value) for number, value in enumerate(values)])
        except Exception:  # a template may raise any error for a value that it does not expect
            continue
        unmarked = _find_marks(marked, len(values))
        if unmarked is not None and unmarked[0] == text:
            return unmarked[1]
    return None


def _mark_whole(number: int, value: str) -> str:
    start = _MARKS + 2 * number
    return f"{chr(start)}{value}{chr(start + 1)}"


def _mark_stripped(number: int, value: str) -> str:
    stripped = value.strip()
    before, _, after = value.partition(stripped) if stripped else (value, "", "")
    return f"{before}{_mark_whole(number, stripped)}{after}"


def _find_marks(marked: str, count: int) -> tuple[str, list[list[Span]]] | None:
    """Remove the marks, and return the ranges between each pair; None if a mark has no partner."""
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
) -> Encoded:
    """Render a chat with the tokenizer's template, and find the tokens of each message.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: The messages. Each has a ``"role"``, and a ``"content"`` that is a text, a list of
            parts such as ``{"type": "text", "text": "..."}``, or None, for example in a tool call.
        add_generation_prompt: Whether the prompt ends with the start of the model's answer.
            ``chat_template_kwargs`` can override it.
        chat_template_kwargs: Further arguments for ``tokenizer.apply_chat_template``, such as
            ``{"enable_thinking": False}`` or ``{"tools": [...]}``.

    Raises:
        TypeError: If a message is not a mapping with a role, or its content is of another type.
        ValueError: If the chat is empty, the tokenizer does not have a chat template, or
            ``chat_template_kwargs`` include an argument of the tokenization.

    Example:
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'y' if think else 'n' }}"
        ... )
        >>> chat = [{"role": "user", "content": "Name the capital of France"}]
        >>> render_chat(
        ...     tokenizer, chat, add_generation_prompt=True, chat_template_kwargs={"think": True}
        ... ).text
        'Name the capital of France y'
    """
    options = dict(chat_template_kwargs or {})
    _check_chat(tokenizer, messages, options)
    # A message that the model continues must not be followed by the start of another one.
    continued = bool(options.get("continue_final_message", False))
    options = {"add_generation_prompt": add_generation_prompt and not continued, **options}

    def render(texts: list[str]) -> str:
        filled = _replace_texts(messages, texts)
        text: str = tokenizer.apply_chat_template(filled, tokenize=False, **options)
        return text

    texts = [text for message in messages for text in _texts(message)]
    numbers = [n for n, message in enumerate(messages) for _ in _texts(message)]
    rendered = render(texts)
    encoded = _tokenize(tokenizer, messages, options, rendered)
    places = None if encoded.offsets is None else places_of(render, texts)
    spans = None if places is None else _find_messages(encoded, messages, numbers, places)
    return replace(encoded, messages=spans)


def _tokenize(
    tokenizer: Any, messages: Messages, options: Mapping[str, Any], rendered: str
) -> Encoded:
    """Tokenize a chat with its template. Offsets are known if the rendered text gives the same."""
    output = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, **options
    )
    ids, extras = _split_output(output)
    encoded = encode(tokenizer, rendered, add_special_tokens=False)
    if torch.equal(encoded.ids, ids):
        return replace(encoded, extras=extras)
    return Encoded(rendered, ids, None, extras)


def _texts(message: Mapping[str, Any]) -> list[str]:
    """Return the texts in a message's content."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if _is_text(part)]


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _replace_texts(messages: Messages, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Replace the texts in the content of all messages, in order."""
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


def _find_messages(
    encoded: Encoded, messages: Messages, numbers: Sequence[int], places: list[list[Span]]
) -> list[Message] | None:
    """Find the tokens of each message. ``numbers`` are the messages that own the texts."""
    if encoded.offsets is None or any(len(ranges) != 1 for ranges in places):
        return None
    assert encoded.text is not None
    text_of_token = owners(encoded.text, encoded.offsets, [ranges[0] for ranges in places])
    spans = []
    for number, message in enumerate(messages):
        tokens = [
            n
            for n, text in enumerate(text_of_token)
            if text is not None and numbers[text] == number
        ]
        if tokens:
            spans.append(Message(str(message["role"]), tokens[0], tokens[-1] + 1))
    return spans


def _check_chat(tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> None:
    if not messages:
        raise ValueError("The chat is empty: give at least one message.")
    for message in messages:
        is_message = isinstance(message, Mapping) and "role" in message
        if not is_message or not _is_content(message.get("content")):
            raise TypeError(
                f"{message!r} is not a message: give {{'role': 'user', 'content': 'a text'}}. A "
                "list is one chat here; 'explain' takes several texts. The content must be a text, "
                "None, or a list of parts such as {'type': 'text', 'text': 'a text'}. For other "
                "content, apply the chat template yourself and give its text or ids."
            )
    for name in _OWN_ARGUMENTS:
        if name in options:
            raise ValueError(
                f"chat_template_kwargs must not set {name!r}: leave it out, and give arguments of "
                "the template, such as {'enable_thinking': False}."
            )
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        raise ValueError(
            "The tokenizer has no chat template: use the chat version of the model, set "
            "tokenizer.chat_template, or give the text in the format that the model expects."
        )


def _is_content(content: object) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and (part.get("type") != "text" or _is_text(part))
        for part in content
    )
