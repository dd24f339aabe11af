"""Tokens as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Tokenizer", "readable_tokens"]

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_LINE_MARKS = {"\n": "⏎", "\t": "⇥"}
# They shape the letters around them (Persian, emoji families), so inside a word they stay.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that reading tokens needs."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of tokens such as the end of a text."""

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """The vocabulary's entry, with its marks."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any:
        """The text."""


def readable_tokens(tokenizer: Tokenizer, input_ids: Tensor | Sequence[int]) -> list[str]:
    r"""The tokens of one sequence as a person reads them, exactly one string an id.

    Words keep their leading space, continuations have none, whatever marks the vocabulary
    uses (``Ġ``, ``▁``, ``##``). Special tokens stay as they are. White space that stands alone
    is shown (``␣``, ``⏎``, ``⇥``), and bytes that are only part of a character are shown as
    bytes (``⟨f0⟩``).

    Args:
        tokenizer: a Hugging Face tokenizer.
        input_ids: ``(T,)`` ids of one sequence.

    Returns:
        ``T`` strings.

    Raises:
        ValueError: if ``input_ids`` is not one sequence, or holds an id the tokenizer lacks.

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
    ids = torch.as_tensor(input_ids)
    if ids.ndim != 1:
        raise ValueError(
            f"input_ids have shape {tuple(ids.shape)}, expected (T,): give one sequence of a "
            "batch, input_ids[0]"
        )
    special_ids = set(tokenizer.all_special_ids)
    readable = {i: _readable(tokenizer, i, i in special_ids) for i in set(ids.tolist())}
    return [readable[i] for i in ids.tolist()]


def _readable(tokenizer: Tokenizer, token_id: int, special: bool) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
    if token is None:
        raise ValueError(
            f"input_ids hold {token_id}, which the tokenizer does not know: put its "
            "pad_token_id where labels or masks left such a filler"
        )
    if special:
        return str(token)
    # A token reads as what it adds to a text: only behind another token does a decoder keep a
    # word's leading space and drop a continuation's mark, and the token itself always fits.
    alone: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    twice: str = tokenizer.decode([token_id, token_id], clean_up_tokenization_spaces=False)
    text = twice.removeprefix(alone) or alone
    if text and _UNDECODABLE not in text:
        return _visible(text)
    raw = _token_bytes(token)
    if raw is None:
        return f"⟨#{token_id}⟩"
    return _visible(re.sub(r"\\x(..)", r"⟨\1⟩", raw.decode("utf-8", "backslashreplace")))


def _visible(text: str) -> str:
    """The text with everything that would print as nothing made visible."""

    def mark(character: str) -> str:
        if character == " " and text.isspace():
            return "␣"
        if character.isprintable() or (character in _JOINERS and len(text) > 1):
            return character
        return _LINE_MARKS.get(character, f"⟨{ord(character):02x}⟩")

    return "".join(map(mark, text))


def _byte_of_glyph() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 is itself, other bytes follow from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(moved)
    }


_BYTE_OF_GLYPH = _byte_of_glyph()


def _token_bytes(token: str) -> bytes | None:
    """The bytes that a token of a byte-level or byte-fallback vocabulary stands for."""
    if fallback := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(fallback[1])
    if set(token) <= _BYTE_OF_GLYPH.keys():
        return bytes(_BYTE_OF_GLYPH[glyph] for glyph in token)
    return None
