"""Token scores as coloured text: readable tokens, and Captum's text records made from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from math import isnan, nan
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from captum.attr import visualization as captum_text
from torch import Tensor

from captum_cw.visualization._output import html_page

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


def normalized_scores(
    scores: Mapping[str, Tensor], tokens: Sequence[str], skip: Collection[int]
) -> dict[str, Tensor]:
    """Each method's ``(T,)`` scores over its own largest absolute value, so within [-1, 1].

    Positions in ``skip`` do not set the scale, and are clipped to it.
    """
    length = len(tokens)
    for position in skip:
        if not -length <= position < length:
            raise ValueError(f"skip holds {position}, outside the {length} tokens")
    if not scores:
        raise ValueError("scores are empty, expected {method's name: (T,) tensor}")
    counted = torch.ones(length, dtype=torch.bool)
    counted[list(skip)] = False
    if not counted.any():
        raise ValueError(f"skip={skip!r} leaves none of the {length} tokens to set the scale")
    normalized = {}
    for method, given in scores.items():
        values = torch.as_tensor(given).detach().double().cpu()
        if values.shape != (length,):
            raise ValueError(
                f"the scores of {method!r} have shape {tuple(values.shape)}, expected "
                f"({length},), one a token: of a batch, give one row with its own tokens"
            )
        if not values.isfinite().all():
            position = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"the scores of {method!r} hold {values[position].item()} at position "
                f"{position} ({tokens[position]!r}): replace it, for instance by nan_to_num()"
            )
        peak = values[counted].abs().max()
        scaled = (values / peak).clamp(-1, 1) if peak > 0 else values.sign()
        normalized[method] = scaled.float()
    return normalized


def text_records(
    scores: Mapping[str, Tensor],
    tokens: Sequence[str],
    *,
    target: str = "",
    predicted: str = "",
    probability: float = nan,
    skip: Collection[int] = (),
) -> list[captum_text.VisualizationDataRecord]:
    """Captum text records, one a method, that compare scores of the same tokens.

    Captum clips scores to [-1, 1] and writes tokens into the page as they are; so each row is
    divided by its own largest absolute value first, and every text is escaped.

    Args:
        scores: ``(T,)`` scores a method, in any unit: token scores, Integrated Gradients.
        tokens: ``T`` strings, such as :func:`readable_tokens` gives.
        target: what is explained, for Captum's column "True Label".
        predicted: what the model predicted, for "Predicted Label".
        probability: the model's probability of ``predicted``; NaN where it is not known.
        skip: positions that do not set a row's scale, such as an attention sink that would
            leave all others pale. They are shown, clipped to the scale.

    Returns:
        One record a method, in order, for :func:`text_html` or Captum's ``visualize_text``:
        the method's name as attribution label, the sum of its raw scores as attribution score.

    Raises:
        ValueError: for scores of another shape than ``(T,)`` or not finite, or a wrong
            ``skip``.

    Example::

        >>> record, = text_records({"contribution": torch.tensor([0.5, -2.0])}, ["<s>", " no"])
        >>> record.word_attributions, record.raw_input_ids, record.attr_class
        (tensor([ 0.2500, -1.0000]), ['&lt;s&gt;', ' no'], 'contribution')
    """
    normalized = normalized_scores(scores, tokens, skip)
    # Escaping also keeps Captum from taking "<|im_start|>" for markup and cutting its brackets.
    escaped = [escape(token) for token in tokens]
    return [
        captum_text.VisualizationDataRecord(
            word_attributions=row,
            pred_prob=float(probability),
            pred_class=escape(predicted),
            true_class=escape(target),
            attr_class=escape(method),
            attr_score=torch.as_tensor(scores[method]).double().sum().item(),
            raw_input_ids=escaped,
            convergence_score=nan,
        )
        for method, row in normalized.items()
    ]


def text_html(
    records: Sequence[captum_text.VisualizationDataRecord], title: str = "Token scores"
) -> str:
    """One self-contained HTML page of text records, coloured by Captum.

    The page has the columns of Captum's ``visualize_text``, without those that no record
    fills, and needs no notebook.

    Args:
        records: records of :func:`text_records`; their texts are HTML already.
        title: the page's title, plain text.

    Returns:
        The page.

    Example::

        >>> page = text_html(text_records({"ig": torch.tensor([1.0, 0.0])}, ["<b>", "x"]))
        >>> "&lt;b&gt;" in page, "Predicted Label" in page
        (True, False)
    """
    columns = {
        "True Label": [str(record.true_class) for record in records],
        "Predicted Label": [_prediction(record) for record in records],
        "Attribution Label": [str(record.attr_class) for record in records],
        "Attribution Score": [f"{record.attr_score:.3g}" for record in records],
    }
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    head = "".join(f"<th>{heading}</th>" for heading in [*filled, "Word Importance"])
    rows = [
        "".join(f"<td>{cells[n]}</td>" for cells in filled.values())
        + captum_text.format_word_importances(record.raw_input_ids, record.word_attributions)
        for n, record in enumerate(records)
    ]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    legend = captum_text.format_word_importances(["negative", "neutral", "positive"], [-1, 0, 1])
    return html_page(
        title,
        f"<table><tr>{legend}</tr></table>\n"
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>",
    )


def _prediction(record: captum_text.VisualizationDataRecord) -> str:
    known = "" if isnan(record.pred_prob) else f"({record.pred_prob:.2f})"
    return f"{record.pred_class} {known}".strip()


def save_text(
    records: Sequence[captum_text.VisualizationDataRecord],
    path: str | PathLike[str],
    title: str = "Token scores",
) -> None:
    """Save the page of :func:`text_html` to ``path``.

    Args:
        records: records of :func:`text_records`.
        path: the file, usually ending in ``.html``.
        title: the page's title, plain text.

    Example::

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.html"
        >>> save_text(text_records({"ig": torch.tensor([1.0])}, ["x"]), path, title="One token")
        >>> "<h1>One token</h1>" in path.read_text(encoding="utf-8")
        True
    """
    Path(path).write_text(text_html(records, title), encoding="utf-8")
