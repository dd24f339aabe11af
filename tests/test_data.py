"""Texts come from named sets and files alike, and become batches of tokens."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from captum_cw.data import load_texts, token_batches
from support.paths import shared_data

MMLU_TEXT = "Question: 1 + 1?\nA. 0.50\nB. None\nC. 2\nD. 3\nAnswer: C"
BOOLQ = {"passage": "Ice is cold.", "question": "is ice cold"}
BOOLQ_TEXT = "Ice is cold.\nQuestion: is ice cold?\nAnswer: "
WINOGRANDE = {"sentence": "Ann paid Bo so _ left.", "option1": "Ann", "option2": "Bo"}
CONTEXTS = {"context_options": ["so Ann", "so Bo"], "continuation": "left."}

ROWS = {
    "text": ({"text": "a b", "url": "x"}, "a b"),
    "braces": ({"text": "{a}"}, "{a}"),
    "question": ({"question": "1 + 1?", "answer": "2"}, "Question: 1 + 1?\nAnswer: 2"),
    "boolq yes": ({**BOOLQ, "answer": True}, BOOLQ_TEXT + "yes"),
    "boolq no": ({**BOOLQ, "answer": False}, BOOLQ_TEXT + "no"),
    "boolq mark": ({**BOOLQ, "question": "is ice cold?", "answer": True}, BOOLQ_TEXT + "yes"),
    "winogrande 1": ({**WINOGRANDE, "answer": "1"}, "Ann paid Bo so Ann left."),
    "winogrande 2": ({**WINOGRANDE, "answer": "2"}, "Ann paid Bo so Bo left."),
    "contexts": ({**CONTEXTS, "gold": 1}, "so Bo left."),
    "context": ({"context": "so Ann", "continuation": "left"}, "so Ann left"),
    "mmlu": ({"question": "1 + 1?", "choices": ["0.50", "None", "2", "3"], "answer": 2}, MMLU_TEXT),
}

LINES = """\

 = Ann =

 Ann is a name .
 It is short .

 = = Use = =

 Let
 = 1 + k =
 be a formula .

 = Bo ( name ) =

 Bo is another .
"""
ANN, BO = (f"= {article.strip()}" for article in re.split(r"^ = (?=Ann|Bo)", LINES, flags=re.M)[1:])


@pytest.fixture(autouse=True)
def _nothing_written_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    return folder


@pytest.fixture
def bos_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tiny tokenizer, with ends; it begins with "<" (63) by itself, and pads with "_" (65)."""
    tiny_tokenizer.add_special_tokens({"bos_token": "<", "eos_token": ">", "pad_token": "_"})
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="< $A", special_tokens=[("<", 63)]
    )
    return tiny_tokenizer


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def ids(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


# ---------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize(("row", "text"), ROWS.values(), ids=ROWS)
def test_a_row_becomes_the_text_its_columns_say(
    folder: Path, row: dict[str, Any], text: str
) -> None:
    assert load_texts(written(folder / "a.jsonl", [row])) == [text]


def test_every_kind_of_table_gives_the_same_texts(folder: Path) -> None:
    rows = [{"question": "a,\nb", "answer": "0.50"}, {"question": "é", "answer": "None"}]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(folder / "a.csv", index=False)
    table.to_parquet(folder / "a.parquet")
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    expected = ["Question: a,\nb\nAnswer: 0.50", "Question: é\nAnswer: None"]
    assert load_texts(written(folder / "a.jsonl", rows)) == expected
    for kind in ("csv", "parquet", "json"):
        assert load_texts(folder / f"a.{kind}") == expected


@pytest.mark.parametrize(
    "lines",
    [
        "1 + 1?,0.50,None,2,3,C",
        "question,A,B,C,D,answer\n1 + 1?,0.50,None,2,3,C",
        "question,answer,A,B,C,D\n1 + 1?,C,0.50,None,2,3",
        "question,choice0,choice1,choice2,choice3,answer\n1 + 1?,0.50,None,2,3,2",
        "\ufeff,question,A,B,C,D,answer\n0,1 + 1?,0.50,None,2,3,C",
    ],
    ids=["no header", "letters", "answer first", "numbers", "byte order mark and index"],
)
def test_choices_in_a_csv_file_are_read_as_written(folder: Path, lines: str) -> None:
    path = folder / "mmlu.csv"
    path.write_text(f"{lines}\n", encoding="utf-8")
    assert load_texts(path) == [MMLU_TEXT]


def test_a_text_file_with_titles_is_split_into_articles(folder: Path) -> None:
    path = folder / "a.txt"
    path.write_text(LINES)
    assert load_texts(path) == [ANN, BO]
    path.write_text(LINES.lstrip())
    assert load_texts(path) == [ANN, BO]
    path.write_text(f"Names.\n{LINES}")
    assert load_texts(path) == ["Names.", ANN, BO]


def test_a_text_file_without_titles_is_split_at_blank_lines(folder: Path) -> None:
    path = folder / "a.txt"
    path.write_bytes(b"a\r\nb\r\n\r\n \r\n\r\nc\r\n")
    assert load_texts(path) == ["a\nb", "c"]


def test_lines_without_blank_ones_are_texts(folder: Path) -> None:
    path = folder / "a.txt"
    path.write_text("a\nb c\nd\n")
    with pytest.warns(UserWarning, match=r"a\.txt has no blank lines, so each line is a text"):
        assert load_texts(path) == ["a", "b c", "d"]
    assert load_texts(path, lines=True) == ["a", "b c", "d"]
    assert load_texts(path, lines=False) == ["a\nb c\nd"]
    path.write_text("a\nb\n\nc\n")
    assert load_texts(path) == ["a\nb", "c"]
    assert load_texts(path, lines=True) == ["a", "b", "c"]
    path.write_text("a line alone\n")
    assert load_texts(path) == ["a line alone"]


def test_a_folder_is_its_files_in_the_order_of_their_names(folder: Path) -> None:
    (folder / "b.txt").write_text("c")
    (folder / "a.txt").write_text("a\n\nb")
    (folder / "empty.txt").touch()
    (folder / "README.md").write_text("no text")
    assert load_texts(folder) == ["a", "b", "c"]
    assert load_texts(str(folder)) == ["a", "b", "c"]


def test_json_and_jsonl_files_are_of_one_kind(folder: Path) -> None:
    written(folder / "a.json", [{"text": "a"}])
    written(folder / "b.jsonl", [{"text": "b"}])
    assert load_texts(folder) == ["a", "b"]


def test_a_file_may_have_rows_of_different_columns_and_rows_without_text(folder: Path) -> None:
    rows = [
        {"text": "a"},
        {"question": "q", "answer": "r"},
        {"text": " \n"},
        {"text": None},
        {"text": "b"},
    ]
    texts = load_texts(written(folder / "a.jsonl", rows))
    assert texts == ["a", "Question: q\nAnswer: r", "b"]


def test_samples_are_the_first_texts_that_are_not_empty(folder: Path) -> None:
    path = written(folder / "a.jsonl", [{"text": text} for text in ("", "a", "", "b", "c")])
    assert load_texts(path, samples=2) == ["a", "b"]
    assert load_texts(path, samples=9) == ["a", "b", "c"]


def test_a_name_may_hold_what_a_pattern_would_be_made_of(folder: Path) -> None:
    hidden = folder / ".hidden [1]*"
    hidden.mkdir()
    assert load_texts(written(hidden / "a?.jsonl", [{"text": "a"}])) == ["a"]


@pytest.mark.parametrize(
    ("name", "place", "rows", "texts"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "test", False), *ROWS["question"]),
        ("lambada", ("EleutherAI/lambada_openai", None, "test", False), *ROWS["text"]),
        (
            "winogrande",
            ("allenai/winogrande", "winogrande_xl", "validation", False),
            *ROWS["winogrande 2"],
        ),
        ("boolq", ("google/boolq", None, "validation", False), *ROWS["boolq yes"]),
        ("mmlu", ("cais/mmlu", "all", "test", False), *ROWS["mmlu"]),
    ],
)
def test_a_name_stands_for_a_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: tuple[str, str | None, str, bool],
    rows: dict[str, Any],
    texts: str,
) -> None:
    asked = answer_for_hub(monkeypatch, datasets.Dataset.from_list([rows]))
    assert load_texts(name) == [texts]
    assert asked == [place]


def test_lines_of_wikitext_are_joined_into_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line if line.strip() else "" for line in LINES.splitlines(keepends=True)]
    asked = answer_for_hub(monkeypatch, datasets.Dataset.from_dict({"text": lines}))
    assert load_texts("wikitext") == [ANN, BO]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)]


def test_of_fineweb_edu_only_the_samples_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        yield {"text": "b"}
        pytest.fail("a row too many was fetched")

    asked = answer_for_hub(monkeypatch, datasets.IterableDataset.from_generator(rows))
    assert load_texts("fineweb-edu", samples=1) == ["a"]
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)]
    with pytest.raises(ValueError, match="'fineweb-edu' is too large"):
        load_texts("fineweb-edu")


def answer_for_hub(monkeypatch: pytest.MonkeyPatch, rows: object) -> list[tuple[object, ...]]:
    """Puts ``rows`` in the place of any set of the hub; returns a list of what is asked for."""
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> object:
        asked.append((path, name, split, streaming))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("not in the cache")])
def test_a_hub_out_of_reach_is_said_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=f"'gsm8k' .*give a local file of the same set.*{error}"):
        load_texts("gsm8k")


def test_a_path_is_never_a_sets_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("gsm8k").mkdir()
    written(Path("gsm8k") / "a.jsonl", [{"text": "a"}])
    assert load_texts(Path("gsm8k")) == ["a"]


def test_an_unknown_name_is_refused_with_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"'gsm9k' is not a known .*gsm8k.*wikitext.*\.jsonl"):
        load_texts("gsm9k")


def test_files_of_no_or_several_kinds_are_refused(folder: Path) -> None:
    (folder / "a.md").write_text("a")
    for path in (folder, folder / "a.md"):
        with pytest.raises(ValueError, match=r"a folder of files, of one kind .*\.parquet"):
            load_texts(path)
    (folder / "a.txt").write_text("a")
    (folder / "a.csv").write_text("a")
    with pytest.raises(ValueError, match="a folder of files, of one kind"):
        load_texts(folder)


@pytest.mark.parametrize("content", ["", "\n", '{"text": " "}\n'])
def test_a_set_without_text_is_refused(folder: Path, content: str) -> None:
    path = folder / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="does not contain a text"):
        load_texts(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_a_broken_file_is_refused_by_name(folder: Path, kind: str) -> None:
    path = folder / f"a.{kind}"
    path.write_bytes(b'{"\xff')
    with pytest.raises(ValueError, match=f"a.{kind}' could not be parsed as"):
        load_texts(path)


def test_columns_that_make_no_text_are_refused_with_those_that_would(folder: Path) -> None:
    path = written(folder / "a.jsonl", [{"question": "q", "reply": "r"}])
    with pytest.raises(ValueError, match="unknown: question, reply.*; question, answer; "):
        load_texts(path)


@pytest.mark.parametrize(
    "row",
    [
        {**CONTEXTS, "gold": -1},
        {**WINOGRANDE, "answer": ""},
        {**BOOLQ, "answer": "perhaps"},
        {"question": "q", "choices": ["a", "b"], "answer": 2},
        {"question": "q", "choices": ["a", "b"], "answer": ""},
    ],
)
def test_an_answer_that_is_no_option_is_refused(folder: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of .*: remove rows"):
        load_texts(written(folder / "a.jsonl", [row]))


def test_no_samples_are_refused(folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="got 0"):
        load_texts(folder, samples=0)
    with pytest.raises(ValueError, match="got -1"):
        token_batches(["a b"], tiny_tokenizer, num_examples=-1)


def test_without_datasets_the_install_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-cw\[evaluate\]'"):
        load_texts(written(folder / "a.jsonl", [{"text": "a"}]))


@pytest.mark.parametrize(
    ("name", "count", "part"),
    [
        ("gsm8k_test.jsonl", 1319, "ducks lay 16 eggs per day."),
        ("wikitext2_test.txt", 60, "= Robert Boulter ="),
        ("lambada_test.jsonl", 5153, "I don't care about signs"),
        ("winogrande_validation.jsonl", 1267, "so Maria always got the easier cases."),
        (
            "mmlu/test",
            4421,
            "Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer: B",
        ),
        ("mmlu/dev", 110, "\nAnswer: "),
    ],
)
def test_real_sets_are_read_in_full(name: str, count: int, part: str) -> None:
    texts = load_texts(shared_data(name))
    assert len(texts) == count
    assert part in texts[0]


# ---------------------------------------------------------------------------------------------
# Batches


def test_batches_are_padded_on_the_right_to_their_own_longest(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    batches = token_batches(["a b", "a b c d", "c d e"], tiny_tokenizer, batch_size=2)
    assert [batch["input_ids"].tolist() for batch in batches] == [
        [[1, 2, 0, 0], [1, 2, 3, 4]],
        [[3, 4, 5]],
    ]
    assert [batch["attention_mask"].tolist() for batch in batches] == [
        [[1, 1, 0, 0], [1, 1, 1, 1]],
        [[1, 1, 1]],
    ]
    for batch in batches:
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_padding_is_the_pad_token_else_the_end_token(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = ["a b", "a b c"]
    tiny_tokenizer.add_special_tokens({"eos_token": ">"})
    assert ids(token_batches(texts, tiny_tokenizer))[0] == [1, 2, 63]
    tiny_tokenizer.pad_token = "?"  # token 0 counts as one
    assert ids(token_batches(texts, tiny_tokenizer))[0] == [1, 2, 0]


def test_texts_are_cut_to_the_length_with_their_begin_token(
    bos_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert ids(token_batches(["a b c d"], bos_tokenizer, max_length=3)) == [[63, 1, 2]]
    assert ids(token_batches(["a b c d"], bos_tokenizer, max_length=3, bos="never")) == [[1, 2, 3]]


def test_texts_that_predict_nothing_are_skipped(bos_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["", "a", "a b", "b c"]
    assert ids(token_batches(texts, bos_tokenizer, bos="never", num_examples=1)) == [[1, 2]]
    assert ids(token_batches(texts, bos_tokenizer, num_examples=1)) == [[63, 1]]


def test_the_begin_token_is_added_where_the_tokenizer_does_or_it_is_asked_for(
    bos_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert ids(token_batches(["a b"], bos_tokenizer)) == [[63, 1, 2]]
    assert ids(token_batches(["a b"], bos_tokenizer, bos="always")) == [[63, 1, 2]]
    bos_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    assert ids(token_batches(["a b"], bos_tokenizer)) == [[1, 2]]
    assert ids(token_batches(["a b"], bos_tokenizer, bos="always")) == [[63, 1, 2]]


def test_a_tokenizer_without_a_bos_token_does_not_add_one(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert ids(token_batches(["a b"], tiny_tokenizer)) == [[1, 2]]
    with pytest.raises(ValueError, match='bos="always" needs a beginning-of-sequence'):
        token_batches(["a b"], tiny_tokenizer, bos="always")


def test_packed_texts_are_cut_into_whole_pieces(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a b c d e", "f", "g h"]
    (batch,) = token_batches(texts, tiny_tokenizer, max_length=3, pack=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_packed_texts_have_an_end_token_between_and_each_piece_its_begin_token(
    bos_tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = ["a b c", "d e", "f"]  # a b c > d e > f
    pieces = ids(token_batches(texts, bos_tokenizer, max_length=3, pack=True, batch_size=1))
    assert pieces == [[63, 1, 2], [63, 3, 64], [63, 4, 5], [63, 64, 6]]
    pieces = ids(token_batches(texts, bos_tokenizer, max_length=4, pack=True, bos="never"))
    assert pieces == [[1, 2, 3, 64], [4, 5, 64, 6]]


def test_samples_limit_texts_and_pieces(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    def texts() -> Iterator[str]:
        yield "a b c d"
        yield "e f g h"
        pytest.fail("a text too many was read")

    assert ids(token_batches(texts(), tiny_tokenizer, num_examples=1)) == [[1, 2, 3, 4]]
    pieces = ids(token_batches(texts(), tiny_tokenizer, max_length=2, num_examples=3, pack=True))
    assert pieces == [[1, 2], [3, 4], [5, 6]]


def test_less_than_a_piece_is_refused_with_the_count(
    bos_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(ValueError, match="have 5 tokens, but one example needs 7"):
        token_batches(["a b", "c d"], bos_tokenizer, max_length=8, pack=True)


def test_texts_without_an_example_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for texts in ([], ["", "a"]):
        with pytest.raises(ValueError, match="shorter than two tokens"):
            token_batches(texts, tiny_tokenizer)
    with pytest.raises(ValueError, match="have 0 tokens"):
        token_batches([], tiny_tokenizer, pack=True)


def test_arguments_out_of_range_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="length must be .* got 1"):
        token_batches(["a b"], tiny_tokenizer, max_length=1)
    with pytest.raises(ValueError, match="batch_size must be .* got 0"):
        token_batches(["a b"], tiny_tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="bos='maybe'"):
        token_batches(["a b"], tiny_tokenizer, bos="maybe")  # type: ignore[arg-type]  # on purpose
