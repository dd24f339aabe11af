"""Readable text of tokens, the words that they form, and the scores of words."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from captum_cw._utils.suggestions import kind
from captum_cw.capture.model import text_config
from captum_cw.functional import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Grouping",
    "Span",
    "check_tokenizer",
    "group_scores",
    "readable_tokens",
    "sink",
    "word_numbers",
    "word_spans",
]

Span = tuple[int, int]
"""Start and stop, like a slice."""
Grouping = Literal["sum", "mean", "max"]

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_LINE_MARKS = {"\n": "⏎", "\t": "⇥"}
# They shape the letters around them (Persian, emoji families), so they stay inside a word.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
# Scripts without spaces between words, by the first word of their characters' Unicode names.
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a TypeError if something else is given in the place of a tokenizer.

    Example:
        >>> check_tokenizer(tokenizer)
    """
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            f"tokenizer is {kind(tokenizer)}: give the model's tokenizer, such as "
            "AutoTokenizer.from_pretrained(name)."
        )


def readable_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: Tensor | Sequence[int]
) -> list[str]:
    r"""Return the readable text of each token of one sequence.

    Words keep their leading space and continuations do not have one, whichever marks the vocabulary
    uses (``Ġ``, ``▁``, ``##``). Special tokens are not changed. White space alone is shown as
    ``␣``, ``⏎`` or ``⇥``. Bytes that are only part of a character are shown as ``⟨f0⟩``.

    Args:
        tokenizer: A Hugging Face tokenizer.
        input_ids: The ids of one sequence, ``(T,)``.

    Returns:
        ``T`` strings.

    Raises:
        ValueError: If ``input_ids`` is not one sequence, or holds an id that the tokenizer does not
            have.

    Example::

        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        >>> model = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        >>> model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        >>> model.decoder = decoders.ByteLevel()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
        >>> readable_tokens(tokenizer, tokenizer("a é\n")["input_ids"])
        ['a', '␣', '⟨c3⟩', '⟨a9⟩', '⏎']
    """
    ids = _one_sequence(input_ids)
    special_ids = set(tokenizer.all_special_ids)
    readable = {i: _readable(tokenizer, i, i in special_ids) for i in set(ids)}
    return [readable[i] for i in ids]


def readable_ids(tokenizer: PreTrainedTokenizerBase, ids: Tensor | Sequence[int]) -> list[str]:
    """Return the readable text of ids, some of which only the model may have.

    The vocabulary of many models is larger than that of their tokenizer. An id that the tokenizer
    does not have is shown as its number.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: ``(T,)``.

    Returns:
        ``T`` strings.

    Example:
        >>> readable_ids(tokenizer, [*tokenizer("France is cold").input_ids, 99])
        [' France', ' is', ' cold', '⟨#99⟩']
    """
    ids = _one_sequence(ids)
    known = [i for i in set(ids) if _entry(tokenizer, i) is not None]
    readable = dict(zip(known, readable_tokens(tokenizer, known), strict=True))
    return [readable.get(i, f"⟨#{i}⟩") for i in ids]


def warn_of_two_begin_tokens(
    tokenizer: Any, ids: Sequence[int], model: Any = None, *, stacklevel: int = 3
) -> None:
    """Warn if a text starts with two beginning-of-sequence (BOS) tokens.

    This happens if a chat is rendered to text, which includes a BOS token, and the tokenizer adds
    another one.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: The text's token ids.
        model: The model that reads the ids. If its config names this BOS token, the check of the
            forward call warns already, and this function does not.
        stacklevel: The argument of :func:`warnings.warn`.

    Example:
        >>> warn_of_two_begin_tokens(tokenizer, [1, 2])
    """
    begin = {getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")} - {None}
    if len(ids) < 2 or ids[0] != ids[1] or ids[0] not in begin:
        return
    if ids[0] == getattr(text_config(model), "bos_token_id", None):
        return
    warnings.warn(
        "The text starts with two beginning-of-sequence (BOS) tokens "
        f"{tokenizer.convert_ids_to_tokens(ids[0])!r}. A chat template probably added the first "
        "one, and the tokenizer the second. Pass the messages, or tokenize the rendered text with "
        "add_special_tokens=False.",
        stacklevel=stacklevel,
    )


def word_spans(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor | Sequence[int]) -> list[Span]:
    """Group tokens into words.

    A word starts at a space, and where letters or digits meet punctuation. Each token of
    punctuation is a word. Special tokens and tokens of white space do not belong to a word. In
    scripts without spaces between words (Chinese, Japanese, Thai), each token is a word, except
    that the tokens of one character stay together.

    The result depends only on the text of the tokens. A tokenizer's own ``word_ids`` would treat a
    Japanese sentence, and with many SentencePiece vocabularies the whole text, as one word.

    Args:
        tokenizer: A Hugging Face tokenizer.
        input_ids: The ids of one sequence, ``(T,)``.

    Returns:
        For each word its first token and the token after its last, in order.

    Raises:
        ValueError: If ``input_ids`` is not one sequence, or holds an id that the tokenizer does not
            have.

    Example::

        >>> word_spans(tokenizer, tokenizer("The capital of France is").input_ids)
        [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    """
    return _spans_of_texts(_token_texts(tokenizer, _one_sequence(input_ids)))


def _spans_of_texts(texts: Sequence[str | None]) -> list[Span]:
    """Group the texts of tokens into words; None stands for a special token."""
    spans: list[Span] = []
    before = " "
    for place, text in enumerate(texts):
        if text is None or text.isspace():
            before = " "
            continue
        if not before.isspace() and (not text or _continues_word(before, text[0])):
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
        before = text.rstrip(_JOINERS)[-1:] or before
    return spans


def word_numbers(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[int | None]:
    """Return the number of each token's word (see :func:`word_spans`); None without a word.

    Example::

        >>> word_numbers(tokenizer, tokenizer("Ice is cold", return_tensors="pt").input_ids[0])
        [0, 1, 2]
    """
    return _numbers_of_spans(word_spans(tokenizer, ids), len(ids))


def words_of_texts(tokens: Sequence[str]) -> list[int | None] | None:
    """Return the number of each readable token's word; None if the tokens do not tell.

    They tell if one of them begins with a space. White space alone has no word.

    Example:
        >>> words_of_texts(["The", " cap", "ital", "␣", "⏎"])
        [0, 1, 1, None, None]
    """
    if not any(token[:1].isspace() for token in tokens):
        return None
    marks = {"␣", *_LINE_MARKS.values()}
    texts = [" " if set(token) <= marks else token for token in tokens]
    return _numbers_of_spans(_spans_of_texts(texts), len(tokens))


def _numbers_of_spans(spans: Sequence[Span], length: int) -> list[int | None]:
    numbers: list[int | None] = [None] * length
    for number, (start, stop) in enumerate(spans):
        numbers[start:stop] = [number] * (stop - start)
    return numbers


def sink(tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the positions that a colour scale should ignore: the first, unless it is alone.

    Many heads attend mostly to the first token. On a scale that includes it, all other tokens would
    be pale.

    Args:
        tokens: The tokens of a text.

    Example:
        >>> sink(["The", " end"]), sink(["End"])
        ((0,), ())
    """
    return (0,) if len(tokens) > 1 else ()


def group_scores(scores: Tensor, spans: Sequence[Span], how: Grouping = "sum") -> Tensor:
    """Aggregate the scores of tokens over spans of tokens.

    Args:
        scores: ``(..., S)``.
        spans: The start and stop of each span. Spans must not overlap. Tokens outside of all spans
            do not count.
        how: ``"sum"``, ``"mean"`` or ``"max"`` over the tokens of a span.

    Returns:
        ``(..., len(spans))``.

    Raises:
        ValueError: If a span is empty, overlaps another span or is outside of the tokens, or
            ``how`` is unknown.

    Example::

        >>> group_scores(torch.tensor([1.0, 2.0, 4.0]), [(0, 1), (1, 3)])
        tensor([1., 6.])
    """
    check_choice("how", how, Grouping)
    check_spans(spans, scores.shape[-1], "tokens")
    if not spans:
        return scores[..., :0]
    parts = [scores[..., start:stop] for start, stop in spans]
    if how == "max":
        return torch.stack([part.amax(-1) for part in parts], -1)
    return torch.stack([part.sum(-1) if how == "sum" else part.mean(-1) for part in parts], -1)


def joined(tokens: Sequence[str]) -> str:
    """Join readable tokens into one text, and decode the characters that tokens had shared."""

    def character(match: re.Match[str]) -> str:
        try:
            return bytes.fromhex(re.sub("[⟨⟩]", "", match[0])).decode("utf-8")
        except UnicodeDecodeError:
            return match[0]

    return re.sub("(?:⟨[89a-f][0-9a-f]⟩)+", character, "".join(tokens))


def check_spans(spans: Sequence[Span], length: int, of: str) -> None:
    """Raise a ValueError if a span is empty, out of range or overlaps another."""
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"Span {(start, stop)} is empty or not within the {length} {of}: give "
                f"0 <= start < stop <= {length}."
            )
    for one, other in pairwise(sorted(spans)):
        if other[0] < one[1]:
            raise ValueError(
                f"Spans {tuple(one)} and {tuple(other)} overlap: give spans that do not overlap."
            )


def _one_sequence(input_ids: Tensor | Sequence[int]) -> list[int]:
    ids = torch.as_tensor(input_ids, dtype=torch.long, device="cpu")
    if ids.ndim != 1:
        raise ValueError(
            f"input_ids have shape {tuple(ids.shape)}, expected (T,): give one sequence of a "
            "batch, input_ids[0]."
        )
    return list(ids.tolist())


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str | None]:
    """Return the text of each token: None for a special token, "" for the end of a character."""
    special = set(tokenizer.all_special_ids)
    known = {i: None if i in special else _text_or_bytes(tokenizer, i) for i in set(ids)}
    parts = [known[i] for i in ids]
    texts: list[str | None] = []
    for place, part in enumerate(parts):
        if not isinstance(part, bytes):
            texts.append(part)
            continue
        if _ends_character(part):
            texts.append("")
            continue
        for following in parts[place + 1 :]:
            if not isinstance(following, bytes) or not _ends_character(following):
                break
            part += following
        texts.append(part.decode("utf-8", "replace"))
    return texts


def _ends_character(part: bytes) -> bool:
    return 0x80 <= part[0] < 0xC0


def _continues_word(before: str, first: str) -> bool:
    """Whether a token that starts with ``first`` continues the word that ends with ``before``."""
    if unicodedata.category(first) in ("Mn", "Mc", "Me", "Lm", "Cf"):  # accents, joiners
        return True
    return _in_spaced_word(before) and _in_spaced_word(first)


def _in_spaced_word(character: str) -> bool:
    if character == "_":
        return True
    script = unicodedata.name(character, "").partition(" ")[0]
    return unicodedata.category(character)[0] in "LMN" and script not in _UNSPACED


def _readable(tokenizer: PreTrainedTokenizerBase, token_id: int, special: bool) -> str:
    text = _text_or_bytes(tokenizer, token_id)
    if special:
        entry = _entry(tokenizer, token_id)
        return entry.decode("utf-8", "replace") if isinstance(entry, bytes) else str(entry)
    if isinstance(text, str):
        return _visible(text)
    return _visible(re.sub(r"\\x(..)", r"⟨\1⟩", text.decode("utf-8", "backslashreplace")))


def _entry(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str | bytes | None:
    """Return an id's entry in the vocabulary (bytes in some); None if the id is unknown."""
    if token_id < 0:
        return None
    try:
        entry: str | bytes | None = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError):  # tokenizers written in Python raise these
        return None
    return entry


def _text_or_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str | bytes:
    """Return the text of a token, or its bytes if they are only part of a character."""
    token = _entry(tokenizer, token_id)
    if token is None:
        raise ValueError(
            f"input_ids hold {token_id}, which the tokenizer does not know: replace filler values, "
            "such as -100 in labels, with its pad_token_id."
        )
    # Decoders keep a word's leading space, and drop a continuation's mark, only after another
    # token. So the token is decoded after itself.
    alone: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    twice: str = tokenizer.decode([token_id, token_id], clean_up_tokenization_spaces=False)
    text = twice.removeprefix(alone) or alone
    if text and _UNDECODABLE not in text:
        return text
    return _token_bytes(token) or f"⟨#{token_id}⟩"


def _visible(text: str) -> str:
    """Replace characters that would print as nothing with visible marks."""

    def mark(character: str) -> str:
        if character == " " and text.isspace():
            return "␣"
        if character.isprintable() or (character in _JOINERS and len(text) > 1):
            return character
        return _LINE_MARKS.get(character, f"⟨{ord(character):02x}⟩")

    return "".join(map(mark, text))


@cache
def _byte_of_glyph() -> dict[str, int]:
    """Return the alphabet of byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {glyph: byte for byte, glyph in bytes_to_unicode().items()}


def _token_bytes(token: str | bytes) -> bytes | None:
    """Return the bytes of a token in a byte-level or byte-fallback vocabulary; else None."""
    if isinstance(token, bytes):
        return token
    if fallback := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(fallback[1])
    byte_of_glyph = _byte_of_glyph()
    if set(token) <= byte_of_glyph.keys():
        return bytes(byte_of_glyph[glyph] for glyph in token)
    return None
