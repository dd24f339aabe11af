"""Texts to evaluate on, from the hub or from files, and the batches of tokens made of them.

Everything is read by `datasets`; what a row says as one text depends only on its columns.
"""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captum_cw._utils.suggestions import suggestion_of_path
from captum_cw.functional import check_choice
from captum_cw.text.tokens import warn_of_two_begin_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_texts", "token_batches"]

Bos = Literal["auto", "always", "never"]


class _HubSet(NamedTuple):
    path: str
    config: str | None
    split: str
    streamed: bool = False
    """Too large to fetch in full."""
    by_line: bool = False
    """A row is a line of one long document."""


_HUB_SETS = {
    "boolq": _HubSet("google/boolq", None, "validation"),
    "fineweb-edu": _HubSet("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", streamed=True),
    "gsm8k": _HubSet("openai/gsm8k", "main", "test"),
    "lambada": _HubSet("EleutherAI/lambada_openai", None, "test"),
    "mmlu": _HubSet("cais/mmlu", "all", "test"),
    "wikitext": _HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test", by_line=True),
    "winogrande": _HubSet("allenai/winogrande", "winogrande_xl", "validation"),
}

_BUILDERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def load_texts(data: str | Path, *, samples: int | None = None) -> list[str]:
    r"""The texts of a data set, in its order.

    A row becomes a text by its columns, for example ``text``, or ``question`` and ``answer``; an
    error lists them all. A ``.txt`` file is split into articles where it has headings
    ``= Title =`` (WikiText), else into paragraphs at blank lines. Empty texts are left out.

    Args:
        data: ``"boolq"``, ``"fineweb-edu"``, ``"gsm8k"``, ``"lambada"``, ``"mmlu"``,
            ``"wikitext"`` or ``"winogrande"``, from the hub; or a file (``.txt``, ``.jsonl``,
            ``.json``, ``.csv``, ``.parquet``), or a folder of files of one of these kinds. A
            ``Path`` is never taken for a set's name.
        samples: The first so many texts; None for all.

    Returns:
        The texts.

    Raises:
        ImportError: If `datasets` is not installed.
        OSError: If the hub cannot be reached.
        ValueError: If there is no such set or file, or it cannot be read, has no text, or has a
            row that cannot be understood.

    Example:
        >>> path = getfixture("tmp_path") / "sums.jsonl"
        >>> _ = path.write_text('{"question": "1 + 1?", "answer": "2"}')
        >>> load_texts(path)
        ['Question: 1 + 1?\nAnswer: 2']
    """
    _check_samples(samples)
    if isinstance(data, str) and data in _HUB_SETS:
        if samples is None and _HUB_SETS[data].streamed:
            raise ValueError(f"{data!r} is too large to load in full: say how many samples.")
        rows = _hub_rows(data)
    else:
        rows = _file_rows(Path(data))
    texts = list(islice((text for row in rows if (text := _as_text(row)).strip()), samples))
    if not texts:
        raise ValueError(f"{str(data)!r} has no text: give a set or file that has some.")
    return texts


def token_batches(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 512,
    samples: int | None = None,
    batch_size: int = 8,
    pack: bool = False,
    bos: Bos = "auto",
) -> list[dict[str, Tensor]]:
    """Batches of tokens for a causal language model, in the order of the texts.

    Of special tokens, only the begin token and, when texts are packed, the end token between
    them are added. Where a text has a begin token already, as a rendered chat has, there is a
    warning.

    Args:
        texts: The texts.
        tokenizer: The model's.
        length: The most tokens of an example, its begin token included; when ``pack``, the exact
            number.
        samples: The first so many examples; None for all.
        batch_size: Examples in a batch; the last batch may have fewer.
        pack: Whether texts are joined and cut into pieces of the same length, of which an
            incomplete last one is dropped. Otherwise a text is an example, cut to ``length``;
            one of fewer than two tokens predicts nothing, and is skipped.
        bos: Whether an example starts with the begin token: ``"always"``, ``"never"``, or
            ``"auto"``: where the tokenizer adds it by itself.

    Returns:
        Batches of ``input_ids (B,T)`` and ``attention_mask (B,T)``, padded on the right to the
        longest example; the mask is 0 there.

    Raises:
        ValueError: If the texts make no example, the tokenizer has no begin token and is to
            ``"always"`` add it, or an argument is out of range.

    Example:
        >>> batch, = token_batches(["a b c", "a b"], tokenizer)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[1, 2, 3], [1, 2, 0]], [[1, 1, 1], [1, 1, 0]])
        >>> token_batches(["a b c", "a b"], tokenizer, length=2, pack=True)[0]["input_ids"].tolist()
        [[1, 2], [3, 1]]
    """
    _check_samples(samples)
    if length < 2:
        raise ValueError(f"length={length} leaves nothing to predict: give 2 or more.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} makes no batch: give 1 or more.")
    begin = _begin(tokenizer, bos)
    encoded = (_encoded(tokenizer, text, begin) for text in texts)
    if pack:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pieces = _pieces(_joined(encoded, end), length - len(begin))
        examples = (begin + piece for piece in pieces)
    else:
        cut = ((begin + ids)[:length] for ids in encoded)
        examples = (ids for ids in cut if len(ids) >= 2)
    rows = [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in islice(examples, samples)]
    if not rows:
        raise ValueError("No text has two tokens or more: give texts that are longer.")
    known_pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known_pads if token is not None)
    return [_padded(rows[i : i + batch_size], pad) for i in range(0, len(rows), batch_size)]


def _check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples} leaves nothing: give 1 or more, or None for all.")


# ---------------------------------------------------------------------------------------------
# Rows


def _hub_rows(name: str) -> Iterator[Mapping[str, Any]]:
    datasets = _import_datasets()
    hub = _HUB_SETS[name]
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=hub.streamed)
        if hub.by_line:
            yield from _passages("\n".join(row["text"].rstrip("\n") for row in rows))
        else:
            yield from rows
    except (OSError, ValueError) as error:  # ValueError: offline, with another config in the cache
        raise OSError(
            f"Data set {name!r} ({hub.path}) cannot be loaded from the hub: go online, or give a "
            f"local file of the same set ({', '.join(_BUILDERS)}). {error}"
        ) from error


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    files, builder = _files(path)
    datasets = _import_datasets()
    try:
        options: dict[str, Any] = {}
        if builder == "csv":
            options = _csv_options(files[0], datasets)
        elif builder == "text":
            options = {"sample_by": "document"}
        # Streamed, since a copy in the cache of what is on disk already would serve nobody.
        rows = datasets.load_dataset(
            builder,
            data_files=[glob.escape(str(file)) for file in files],
            split="train",
            streaming=True,
            **options,
        )
        for row in rows:
            if builder == "text":
                yield from _passages(row["text"])
            else:
                yield row
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read as {builder}: mend it. {error}") from error


def _import_datasets() -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "Texts are read by `datasets`, which is missing: pip install 'captum-cw[evaluate]'"
        ) from error


def _files(path: Path) -> tuple[list[Path], str]:
    """The files that ``path`` stands for, and the name of the builder that reads them."""
    suffixes = ", ".join(_BUILDERS)
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is neither a known data set ({', '.join(_HUB_SETS)}) nor a file or "
            f"folder that exists ({suffixes}).{suggestion_of_path(path, _HUB_SETS)}"
        )
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in inside if file.suffix.lower() in _BUILDERS]
    builders = sorted({_BUILDERS[file.suffix.lower()] for file in files})
    if len(builders) != 1:
        raise ValueError(
            f"{str(path)!r} holds files of {len(builders)} known kinds "
            f"({', '.join(builders) or 'none'}): give a file, or a folder of files, of one kind "
            f"({suffixes})."
        )
    # An empty file is no JSON, CSV or Parquet to `datasets`, but to us only one without text.
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise ValueError(f"{str(path)!r} has no text: give a set or file that has some.")
    return files, builders[0]


def _csv_options(file: Path, datasets: ModuleType) -> dict[str, Any]:
    """Cells are read as they are written: "0.50" stays so, and "None" may be an answer."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        first = next(csv.reader(lines), [])
    options: dict[str, Any] = {"na_filter": False}
    if len(first) == 6 and first[-1] in list("ABCD"):  # MMLU as first published, without a header
        columns = ["question", "A", "B", "C", "D", "answer"]
        options["column_names"] = columns
    else:
        columns = [name or f"Unnamed: {n}" for n, name in enumerate(first)]  # pandas' names
    string = datasets.Value("string")
    return {**options, "features": datasets.Features(dict.fromkeys(columns, string))}


# A heading of level one stands alone between blank lines; in WikiText, some formulas look alike.
_TITLE = re.compile(r"(?:\A|^[ \t]*\n)(?=[ \t]*= [^=\s].* =[ \t]*\n[ \t]*(?:\n|\Z))", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*(?=\n)")


def _passages(document: str) -> list[dict[str, str]]:
    """A row for each article, or, where there are no titles, for each paragraph."""
    split_at = _TITLE if _TITLE.search(document) else _BLANK
    return [{"text": passage.strip()} for passage in split_at.split(document)]


# ---------------------------------------------------------------------------------------------
# From a row to its text


def _as_text(row: Mapping[str, Any]) -> str:
    fitting = [columns for columns in _FORMATS if row.keys() >= set(columns)]
    if not fitting:
        understood = "; ".join(", ".join(columns) for columns in _FORMATS)
        raise ValueError(
            f"A row has the columns {', '.join(row)}: rename some, so that there are those of one "
            f"of these: {understood}."
        )
    for columns in fitting:
        values = [row[column] for column in columns]
        # Rows of different columns share one table in `datasets`, with None where one has none.
        if None not in values:
            return _FORMATS[columns](*values)
    return ""


def _choose(answer: object, options: Mapping[str, str]) -> str:
    if str(answer) not in options:
        raise ValueError(
            f"The answer {answer!r} of a row is none of {', '.join(options)}: "
            "leave out rows without a known answer."
        )
    return options[str(answer)]


def _yes_no_question(passage: str, question: str, answer: object) -> str:
    word = _choose(str(answer).lower(), {"true": "yes", "false": "no", "yes": "yes", "no": "no"})
    return f"{passage}\nQuestion: {question.removesuffix('?')}?\nAnswer: {word}"


def _multiple_choice(question: str, answer: object, *choices: object) -> str:
    """``answer`` is a letter, or a number that counts from 0."""
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


# The first whose columns a row has; their values are the arguments, in this order.
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
    """What an example begins with: the begin token, or nothing."""
    check_choice("bos", bos, Bos)
    begin = [tokenizer.bos_token_id]
    if bos == "always" and begin == [None]:
        raise ValueError('bos="always", but the tokenizer has no begin token: use "auto".')
    wanted = bos == "always" or (bos == "auto" and tokenizer("a").input_ids[:1] == begin)
    return begin if wanted else []


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, begin: list[int]) -> list[int]:
    """The tokens of a text that is to come after the begin token, if there is one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    warn_of_two_begin_tokens(tokenizer, begin + ids, stacklevel=5)
    return ids


def _joined(encoded: Iterable[list[int]], end: list[int]) -> Iterator[int]:
    for n, ids in enumerate(encoded):
        if n:
            yield from end
        yield from ids


def _pieces(tokens: Iterator[int], length: int) -> Iterator[list[int]]:
    piece = list(islice(tokens, length))
    if len(piece) < length:
        raise ValueError(
            f"The texts have {len(piece)} tokens together, but one piece takes {length}: give "
            "more text, or a smaller length."
        )
    while len(piece) == length:
        yield piece
        piece = list(islice(tokens, length))


def _padded(rows: list[Tensor], pad: int) -> dict[str, Tensor]:
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
