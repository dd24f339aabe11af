"""Texts for evaluations, and the batches of tokens that are made from them.

The `datasets` library reads the hub, and files of JSON and Parquet. This module turns each row into
one text, depending on the row's columns.
"""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captum_cw._utils.extras import imported
from captum_cw._utils.suggestions import suggestion
from captum_cw.functional import check_choice
from captum_cw.text.tokens import warn_of_two_begin_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_texts", "token_batches"]

Bos = Literal["auto", "always", "never"]


#: The sets on the hub: repository, configuration and split.
_HUB_SETS = {
    "boolq": ("google/boolq", None, "validation"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "lambada": ("EleutherAI/lambada_openai", None, "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
}
#: The sets that are too large to download in full.
STREAMED = {"fineweb-edu"}
#: The sets whose rows are the lines of one long document.
_BY_LINE = {"wikitext"}

_BUILDERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def load_texts(
    data: str | Path, *, samples: int | None = None, lines: bool | None = None
) -> list[str]:
    r"""Load the texts of a data set, in its order.

    A row's columns decide how it becomes a text, for example ``text``, or ``question`` and
    ``answer``. If a row's columns are unknown, the error lists the known ones. A ``.txt`` file is
    split into articles if it has headings ``= Title =`` (WikiText), and otherwise into paragraphs
    at blank lines. If it has several lines and no blank one, each line is a text, and a warning
    says so. Empty texts are skipped.

    Args:
        data: The name of a set on the hub (``"boolq"``, ``"fineweb-edu"``, ``"gsm8k"``,
            ``"lambada"``, ``"mmlu"``, ``"wikitext"`` or ``"winogrande"``), a file (``.txt``,
            ``.jsonl``, ``.json``, ``.csv``, ``.parquet``), or a folder of files of one kind. A
            ``Path`` always means a file or folder.
        samples: The number of texts to load; None for all.
        lines: Whether each line of a ``.txt`` file is a text; None to decide by its blank lines.

    Returns:
        The texts.

    Raises:
        ImportError: If `datasets` is not installed.
        OSError: If the hub cannot be reached.
        ValueError: If the set or file does not exist, cannot be parsed, does not contain a text, or
            has a row that cannot become a text.

    Example:
        >>> path = getfixture("tmp_path") / "sums.jsonl"
        >>> _ = path.write_text('{"question": "1 + 1?", "answer": "2"}')
        >>> load_texts(path)
        ['Question: 1 + 1?\nAnswer: 2']
    """
    return [text for _, text in numbered_texts(data, samples=samples, lines=lines)]


def numbered_texts(
    data: str | Path, *, samples: int | None = None, lines: bool | None = None
) -> list[tuple[int, str]]:
    r"""Load the texts of a data set, each with the number of its row.

    Arguments and errors are those of :func:`load_texts`.

    Returns:
        The texts in their order. Rows are counted from 0; rows with an empty text are left out.

    Example:
        >>> path = getfixture("tmp_path") / "sums.jsonl"
        >>> _ = path.write_text('{"text": "Ice is cold"}\n{"text": ""}\n{"text": "Ice"}')
        >>> numbered_texts(path)
        [(0, 'Ice is cold'), (2, 'Ice')]
    """
    _check_count("samples", samples)
    if isinstance(data, str) and data in _HUB_SETS:
        if samples is None and data in STREAMED:
            raise ValueError(f"{data!r} is too large to load in full: set samples.")
        rows = _hub_rows(data)
    else:
        rows = _file_rows(Path(data), lines)
    numbered = ((n, text) for n, row in enumerate(rows) if (text := _as_text(row)).strip())
    texts = list(islice(numbered, samples))
    if not texts:
        raise ValueError(f"{str(data)!r} does not contain a text: choose another set or file.")
    return texts


def token_batches(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    num_examples: int | None = None,
    batch_size: int = 8,
    pack: bool = False,
    bos: Bos = "auto",
) -> list[dict[str, Tensor]]:
    """Tokenize texts into batches for a causal language model, in the order of the texts.

    The only special tokens added are the beginning-of-sequence (BOS) token and, if texts are
    packed, the end-of-sequence (EOS) token between texts. A warning says if a text already starts
    with a BOS token, as a rendered chat does.

    Args:
        texts: The texts.
        tokenizer: The model's tokenizer.
        max_length: The maximum number of tokens in an example, including the BOS token. With
            ``pack``, the exact number.
        num_examples: The number of examples to make; None for all.
        batch_size: The number of examples in a batch. The last batch may have fewer.
        pack: Whether to join the texts and cut them into examples of equal length. An incomplete
            last example is dropped. Otherwise each text is an example, cut to ``max_length``. A
            text of fewer than two tokens is skipped, since it does not predict a token.
        bos: Whether an example starts with the BOS token: ``"always"``, ``"never"``, or
            ``"auto"`` (if the tokenizer adds it by default).

    Returns:
        Batches of ``input_ids`` ``(B, T)`` and ``attention_mask`` ``(B, T)``, padded on the right
        to the longest example. The mask is 0 at padding.

    Raises:
        ValueError: If the texts do not give an example, ``bos`` is ``"always"`` and the tokenizer
            does not have a BOS token, or an argument is out of range.

    Example:
        >>> batch, = token_batches(["The capital of France is Paris", "Ice is cold"], tokenizer)
        >>> batch["input_ids"].tolist()
        [[63, 64, 65, 66, 67, 68], [69, 67, 70, 0, 0, 0]]
        >>> batch["attention_mask"].tolist()
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
        >>> packed, = token_batches(["Ice is cold"] * 2, tokenizer, max_length=2, pack=True)
        >>> packed["input_ids"].tolist()
        [[69, 67], [70, 69], [67, 70]]
    """
    _check_count("num_examples", num_examples)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 to predict a token, got {max_length}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    begin = _begin(tokenizer, bos)
    encoded = (_encoded(tokenizer, text, begin) for text in texts)
    if pack:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        joined = chain.from_iterable(end * (n > 0) + ids for n, ids in enumerate(encoded))
        examples = (begin + piece for piece in _pieces(joined, max_length - len(begin)))
    else:
        cut = ((begin + ids)[:max_length] for ids in encoded)
        examples = (ids for ids in cut if len(ids) >= 2)
    rows = [
        torch.tensor(ids, dtype=torch.long, device="cpu") for ids in islice(examples, num_examples)
    ]
    if not rows:
        raise ValueError("All texts are shorter than two tokens: give longer texts.")
    return [
        padded_batch(rows[i : i + batch_size], tokenizer) for i in range(0, len(rows), batch_size)
    ]


def padded_batch(rows: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Make a batch as :func:`token_batches` does, from token ids, each ``(T,)``.

    Example:
        >>> padded_batch([torch.tensor([69, 67, 70]), torch.tensor([69])], tokenizer)["input_ids"]
        tensor([[69, 67, 70],
                [69,  0,  0]])
    """
    known_pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known_pads if token is not None)
    return {
        "input_ids": pad_sequence(list(rows), batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def groups_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group texts of similar lengths, so that their batches have little padding.

    Args:
        lengths: The number of tokens of each text.
        max_tokens: The maximum number of tokens in a batch, padding included. A longer text is a
            batch of its own.

    Returns:
        The places of the texts of each batch, the longest texts first.

    Example:
        >>> groups_by_length([3, 9, 2, 3], max_tokens=6)
        [[1], [0, 3], [2]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        # The first text of a group is its longest.
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _check_count(name: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1, or None for all, got {count}.")


# ---------------------------------------------------------------------------------------------
# Rows


def _hub_rows(name: str) -> Iterator[Mapping[str, Any]]:
    datasets = imported("datasets", "evaluate")
    path, config, split = _HUB_SETS[name]
    try:
        rows = datasets.load_dataset(path, config, split=split, streaming=name in STREAMED)
        if name in _BY_LINE:
            yield from _passages("\n".join(row["text"].rstrip("\n") for row in rows))
        else:
            yield from rows
    except (OSError, ValueError) as error:  # ValueError: offline, with another config in the cache
        raise OSError(
            f"Data set {name!r} ({path}) could not be loaded from the hub: connect to the "
            f"internet, or give a local file of the same set ({', '.join(_BUILDERS)}). {error}"
        ) from error


def _file_rows(path: Path, lines: bool | None) -> Iterator[Mapping[str, Any]]:
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in inside if file.is_file() and file.suffix.lower() in _BUILDERS]
    builders = {_BUILDERS[file.suffix.lower()] for file in files}
    if len(builders) != 1:
        raise ValueError(
            f"{str(path)!r} is not a known data set ({', '.join(_HUB_SETS)}), and not a file, or a "
            f"folder of files, of one kind ({', '.join(_BUILDERS)})."
            f"{suggestion(str(path), _HUB_SETS)}"
        )
    (builder,) = builders
    try:
        for file in files:
            # `datasets` refuses an empty JSON, CSV or Parquet file; here it has no texts.
            yield from _rows_of(file, builder, lines) if file.stat().st_size else ()
    except ValueError as error:
        raise ValueError(f"{str(file)!r} could not be parsed as {builder}. {error}") from error


def _rows_of(file: Path, builder: str, lines: bool | None) -> Any:
    """Return the rows of a file, as an iterable of mappings."""
    if builder == "csv":
        return _csv_rows(file)
    if builder == "text":
        document = file.read_text(encoding="utf-8")
        if lines is None and (lines := _has_lines_alone(document)):
            warnings.warn(
                f"{file.name} has no blank lines, so each line is a text. Give lines=False "
                "(--no-lines) if the file is one text.",
                stacklevel=2,
            )
        if lines:
            return [{"text": line} for line in map(str.strip, document.splitlines()) if line]
        return _passages(document)
    # Streamed, so that files on disk are not copied into the cache of `datasets`.
    options = {"data_files": glob.escape(str(file)), "split": "train", "streaming": True}
    return imported("datasets", "evaluate").load_dataset(builder, **options)


def _csv_rows(file: Path) -> Any:
    """Read cells as strings, as written: "0.50" stays "0.50", and "None" can be an answer."""
    cells = imported("pandas", "evaluate").read_csv(file, header=None, dtype=str, na_filter=False)
    first = list(cells.iloc[0])
    # The first release of MMLU has no header.
    if len(first) == 6 and first[-1] in list("ABCD") and "question" not in first:
        columns = ["question", "A", "B", "C", "D", "answer"]
    else:
        columns, cells = first, cells[1:]
    return cells.set_axis(columns, axis=1).to_dict("records")


# A heading of level one has a blank line before and after it, unlike the formulas of WikiText.
_TITLE = re.compile(r"(?:\A|^[ \t]*\n)(?=[ \t]*= [^=\s].* =[ \t]*\n[ \t]*(?:\n|\Z))", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*(?=\n)")


def _has_lines_alone(document: str) -> bool:
    """Whether a document has several lines and no blank one between them."""
    lines = document.strip().splitlines()
    return len(lines) > 1 and all(line.strip() for line in lines)


def _passages(document: str) -> list[dict[str, str]]:
    """Split a document into articles if it has titles, and into paragraphs otherwise."""
    split_at = _TITLE if _TITLE.search(document) else _BLANK
    passages = map(str.strip, split_at.split(document))
    return [{"text": passage} for passage in passages if passage]


# ---------------------------------------------------------------------------------------------
# From a row to its text


def _as_text(row: Mapping[str, Any]) -> str:
    fitting = [columns for columns in _FORMATS if row.keys() >= set(columns)]
    if not fitting:
        understood = "; ".join(", ".join(columns) for columns in _FORMATS)
        raise ValueError(
            f"The columns of a row are unknown: {', '.join(row)}. Rename them to one of these "
            f"sets: {understood}."
        )
    for columns in fitting:
        values = [row[column] for column in columns]
        # `datasets` puts rows with different columns into one table, and fills gaps with None.
        if None not in values:
            return _FORMATS[columns](*values)
    return ""


def _choose(answer: object, options: Mapping[str, str]) -> str:
    if str(answer) not in options:
        raise ValueError(
            f"The answer of a row must be one of {', '.join(options)}, got {answer!r}: remove rows "
            "without a known answer."
        )
    return options[str(answer)]


def _yes_no_question(passage: str, question: str, answer: object) -> str:
    word = _choose(str(answer).lower(), {"true": "yes", "false": "no", "yes": "yes", "no": "no"})
    return f"{passage}\nQuestion: {question.removesuffix('?')}?\nAnswer: {word}"


def _multiple_choice(question: str, answer: object, *choices: object) -> str:
    """Format a question whose ``answer`` is a letter, or a number that counts from 0."""
    letters = ascii_uppercase[: len(choices)]
    names = {**{letter: letter for letter in letters}, **_numbered(letters)}
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([f"Question: {question}", *lines, f"Answer: {_choose(answer, names)}"])


def _fill_blank(sentence: str, option1: str, option2: str, answer: object) -> str:
    return sentence.replace("_", _choose(answer, {"1": option1, "2": option2}))


def _choose_context(contexts: Iterable[str], continuation: str, gold: object) -> str:
    return f"{_choose(gold, _numbered(contexts))} {continuation}"


def _numbered(options: Iterable[str]) -> dict[str, str]:
    return {str(n): option for n, option in enumerate(options)}


# The columns of each kind of row, and the function of their values that makes the text. The first
# entry that fits a row is used.
_FORMATS: dict[tuple[str, ...], Callable[..., str]] = {
    ("text",): "{}".format,
    ("passage", "question", "answer"): _yes_no_question,
    ("question", "answer", "choices"): lambda q, a, choices: _multiple_choice(q, a, *choices),
    ("question", "answer", "choice0", "choice1", "choice2", "choice3"): _multiple_choice,
    ("question", "answer", "A", "B", "C", "D"): _multiple_choice,
    ("question", "answer"): "Question: {}\nAnswer: {}".format,
    ("sentence", "option1", "option2", "answer"): _fill_blank,
    ("context_options", "continuation", "gold"): _choose_context,
    ("context", "continuation"): "{} {}".format,
}


# ---------------------------------------------------------------------------------------------
# From texts to batches


def _begin(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    """Return the tokens that an example begins with: the BOS token, or an empty list."""
    check_choice("bos", bos, Bos)
    begin = [tokenizer.bos_token_id]
    if bos == "always" and begin == [None]:
        raise ValueError(
            'bos="always" needs a beginning-of-sequence (BOS) token, which the tokenizer does not '
            'have: use "auto".'
        )
    wanted = bos == "always" or (bos == "auto" and tokenizer("a").input_ids[:1] == begin)
    return begin if wanted else []


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, begin: list[int]) -> list[int]:
    """Tokenize a text that follows ``begin``, and warn if it repeats the BOS token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    warn_of_two_begin_tokens(tokenizer, begin + ids, stacklevel=5)
    return ids


def _pieces(tokens: Iterator[int], length: int) -> Iterator[list[int]]:
    piece = list(islice(tokens, length))
    if len(piece) < length:
        raise ValueError(
            f"All texts together have {len(piece)} tokens, but one example needs {length}: give "
            "more texts or a smaller length."
        )
    while len(piece) == length:
        yield piece
        piece = list(islice(tokens, length))
