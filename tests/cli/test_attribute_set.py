"""``captum-cw attribute --data``: its rows, resumption after a kill, and several processes."""

from __future__ import annotations

import json
import random
import signal
import string
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
import pytest
import torch
import transformers
from datasets import load_dataset

from captum_cw import measures
from captum_cw._utils.records import Records
from captum_cw._utils.shards import Shards
from captum_cw.cli import attribute_set, main
from captum_cw.explanation.batches import BatchScorer
from support.models import SIZES, build, gpt2
from support.running import process_environment

#: The numbers of tokens of the texts. The fifth row is empty.
LENGTHS = [3, 1, 60, 8, 0, 9, 2, 33, 8, 5, 21, 4]
NUMBERS = [n for n, length in enumerate(LENGTHS) if length]
SHARD = 4
#: Texts that share a batch with shorter or longer ones, and the shortest and longest.
COMPARED = (1, 2, 5)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The texts of the file ``texts.jsonl``."""
    chance = random.Random(0)
    rows = [" ".join(chance.choices(string.ascii_letters, k=length)) for length in LENGTHS]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "texts.jsonl").write_text(lines)
    return rows


@pytest.fixture
def command(tiny_model: Any, tiny_tokenizer: Any, texts: list[str], tmp_path: Path) -> list[str]:
    """Arguments that score the texts by a saved model, without ``--out``."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    model, data = str(tmp_path / "model"), str(tmp_path / "texts.jsonl")
    size = ["--shard-size", str(SHARD), "--batch-tokens", "70"]
    return ["attribute", "--model", model, "--data", data, *size]


def scored(arguments: list[str], out: Path) -> list[dict[str, Any]]:
    assert main([*arguments, "--out", str(out)]) == 0
    return rows_of(out)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def alone(
    arguments: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> dict[int, dict[str, Any]]:
    """What ``attribute`` prints of some texts alone, by their numbers."""
    capsys.readouterr()
    found = {}
    at = arguments.index("--data")
    rest = [*arguments[:at], *arguments[at + 6 :]]
    for number in COMPARED:
        assert main([*rest, "--text", texts[number], "--json"]) == 0
        found[number] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("option", "count"), [("--lines", 3), ("--no-lines", 1)])
def test_a_file_of_lines_is_read_as_asked(
    command: list[str], tmp_path: Path, option: str, count: int
) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a b c\nd e\nf g h\n")
    command[command.index("--data") + 1] = str(file)
    assert len(scored([*command, option], tmp_path / "out")) == count


def check_equal(
    arguments: list[str], texts: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """Check that a set gives what its texts give one by one, and return its rows."""
    rows = scored(arguments, out)
    expected = alone(arguments, texts, capsys)
    assert [row["number"] for row in rows] == NUMBERS
    by_number = {row["number"]: row for row in rows}
    for number, one in expected.items():
        row = by_number[number]
        assert row["tokens"] == one["tokens"]
        torch.testing.assert_close(torch.tensor(row["scores"]), torch.tensor(one["scores"]))
        if one["probability"] is not None:
            assert row["target"].strip() == one["target"].strip()
            assert row["probability"] == pytest.approx(one["probability"], rel=1e-3)
        if one["contrast_probability"] is not None:
            given = one["contrast_probability"]
            assert row["contrast_probability"] == pytest.approx(given, rel=1e-3)
    return rows


# ---------------------------------------------------------------------------------------------
# Rows


QUICK = ("input", "sensitivity", "contribution")
METHODS = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in measures.names(targets=True)
]


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_set_gives_what_its_texts_give_one_by_one(
    command: list[str],
    method: str | None,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [] if method is None else ["--method", method]
    check_equal([*command, *given], texts, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "given",
    [
        ["--target", "d"],
        ["--target", "d", "--contrast", "e"],
        ["--target", "d", "--contrast", "e", "--method", "input"],
        ["--target", "d", "--contrast", "e", "--method", "joint"],
        ["--reduction", "sum"],
        ["--method", "attention", "--reduction", "max"],
    ],
    ids=" ".join,
)
def test_options_reach_each_text(
    command: list[str],
    given: list[str],
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_equal([*command, *given], texts, tmp_path / "out", capsys)


def test_learned_positions_are_those_of_each_text(
    command: list[str],
    tiny_tokenizer: Any,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpt2().save_pretrained(tmp_path / "model")  # type: ignore[operator]  # it is a model of transformers
    check_equal(command, texts, tmp_path / "out", capsys)


def test_a_chat_is_rendered(
    command: list[str],
    tiny_tokenizer: Any,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_tokenizer.chat_template = "{% for m in messages %}U {{ m.content }} A{% endfor %}"
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = check_equal([*command, "--chat"], texts, tmp_path / "out", capsys)
    assert {row["tokens"][-1].strip() for row in rows} == {"A"}
    assert main([*command, "--chat", "--length", "50", "--out", str(tmp_path / "cut")]) == 1
    assert "Text 2 has 62 tokens as a chat" in capsys.readouterr().err


def test_classes_are_explained(
    command: list[str],
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = transformers.BertConfig(**SIZES, num_labels=3)
    model = build(transformers.BertForSequenceClassification, config)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]  # it is a model of transformers
    asked = ["--target", "LABEL_1", "--contrast", "LABEL_0"]
    for number, given in enumerate(([], asked, ["--method", "vw"])):
        check_equal([*command, *given], texts, tmp_path / str(number), capsys)


def test_masked_tokens_are_explained(
    command: list[str],
    tiny_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = transformers.BertConfig(**SIZES)
    model = build(transformers.BertForMaskedLM, config)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]  # it is a model of transformers
    tiny_tokenizer.add_special_tokens({"mask_token": "M"})
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"{' '.join('abc'[: n % 3])} M {' '.join('defghi'[:n])}" for n in range(len(LENGTHS))]
    texts[4] = ""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    for number, given in enumerate(([], ["--target", "d", "--method", "input"])):
        check_equal([*command, *given], texts, tmp_path / str(number), capsys)
    (tmp_path / "texts.jsonl").write_text(lines + json.dumps({"text": "a b"}))
    assert main([*command, "--out", str(tmp_path / "none")]) == 1
    assert "text 12 does not have exactly one 'M'" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_identify_their_texts(
    command: list[str], texts: list[str], tiny_tokenizer: Any, tmp_path: Path, side: str
) -> None:
    tiny_tokenizer.truncation_side = side  # a text is cut at its end in any case
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = scored([*command, "--length", "20"], tmp_path / "out")
    assert [row["number"] for row in rows] == NUMBERS
    for row in rows:
        text = texts[row["number"]]
        words = text.split()
        assert row["sha256"] == sha256(text.encode()).hexdigest()
        assert [token.strip() for token in row["tokens"]] == words[:20]
        assert row["cut"] == (len(words) > 20)
        assert len(row["tokens"]) == len(row["ids"]) == len(row["scores"])


def test_a_cut_text_keeps_its_last_special_token(
    command: list[str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    ends = TemplateProcessing(
        single="$A 9", special_tokens=[("9", tiny_tokenizer("9").input_ids[0])]
    )
    tiny_tokenizer.backend_tokenizer.post_processor = ends
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = scored([*command, "--length", "20"], tmp_path / "out")
    assert {row["tokens"][-1].strip() for row in rows} == {"9"}
    assert max(len(row["ids"]) for row in rows) == 20


def test_texts_without_tokens_are_left_out(
    command: list[str], tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers.normalizers import Replace

    tiny_tokenizer.backend_tokenizer.normalizer = Replace("_", "")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text('{"text": "_"}\n{"text": "a b"}\n')
    rows = scored(command, tmp_path / "out")
    assert [row["number"] for row in rows] == [1]
    assert "left out, without tokens: 1\n" in capsys.readouterr().out
    (tmp_path / "texts.jsonl").write_text('{"text": "_"}\n')
    assert main([*command, "--out", str(tmp_path / "none")]) == 1
    assert "No text of the set has a token" in capsys.readouterr().err


def test_libraries_read_the_rows_back(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = scored(command, out)
    loaded = load_dataset(
        "parquet", data_files=str(out / "*.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert loaded.to_list() == rows
    frame = pandas.read_parquet(out)
    assert frame["number"].tolist() == NUMBERS
    assert [list(x) for x in frame["scores"]] == [row["scores"] for row in rows]
    settings = json.loads((out / attribute_set.SETTINGS).read_text())
    file = sorted(out.glob("*.parquet"))[0]
    assert json.loads(pyarrow.parquet.read_metadata(file).metadata[b"captum_cw"]) == settings
    assert (settings["method"], settings["batch_tokens"]) == ("target", 70)


def test_batches_hold_no_more_tokens_than_asked(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    score = BatchScorer.score

    def seen(self: BatchScorer, batch: Any) -> Any:
        shapes.append(batch["input_ids"].shape)
        return score(self, batch)

    monkeypatch.setattr(BatchScorer, "score", seen)
    scored([*command, "--shard-size", "100", "--batch-tokens", "30"], tmp_path / "out")
    assert [(B, T) for B, T in shapes if B > 1 and B * T > 30] == []
    assert [tuple(shape) for shape in shapes] == [(1, 60), (1, 33), (1, 21), (3, 9), (5, 5)]


# ---------------------------------------------------------------------------------------------
# Resumption


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("moment", ["scoring", "writing", "unfinished"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    command: list[str], moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(command, tmp_path / "whole")
    owner: Any = {"scoring": BatchScorer, "writing": Shards, "unfinished": Shards}[moment]
    name = {"scoring": "score", "writing": "write", "unfinished": "unfinished"}[moment]
    calls, run = [], getattr(owner, name)

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == (1 if moment == "unfinished" else 2):
            raise KeyboardInterrupt
        return run(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main([*command, "--out", str(out)]) == 130
    assert len(list(out.glob("*.parquet"))) == (moment == "writing")
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    scored(command, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())


OTHERS = {
    "--method vw": "method: 'target' there, 'vw' here",
    "--target d": "target: None there, 'd' here",
    "--batch-tokens 71": "batch_tokens: 70 there, 71 here",
    "--shard-size 5": "shard_size: 4 there, 5 here",
    "--length 20": "length: 512 there, 20 here",
    "--dtype bfloat16": "dtype: 'float32' there, 'bfloat16' here",
    "--samples 5": "texts: 11 there, 5 here",
}


def test_another_run_does_not_mix_with_the_rows_of_a_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    scored(command, out)
    before = contents(out)
    for given, message in OTHERS.items():
        assert main([*command, *given.split(), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
        assert contents(out) == before


def test_a_run_that_fails_at_once_leaves_the_folder_to_others(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: BatchScorer, batch: Any) -> None:
        raise torch.OutOfMemoryError("There is not enough memory.")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(BatchScorer, "score", fail)
        assert main([*command, "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "A batch of 1 texts of up to 60 tokens could not be scored; the first is text 2" in told
    assert "There is not enough memory. Choose a smaller --batch-tokens." in told
    scored([*command, "--batch-tokens", "40"], out)
    assert json.loads((out / attribute_set.SETTINGS).read_text())["batch_tokens"] == 40


def test_a_text_that_cannot_be_scored_stops_the_run_unless_it_may_go_on(
    command: list[str],
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["a b c", "d e f", "g h", "i j k l", "m Q n", "o p q r s t", "Q", "u v w"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in given)
    (tmp_path / "texts.jsonl").write_text(lines)
    expected = scored(command, tmp_path / "whole")
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[tiny_tokenizer("Q").input_ids[0]] = torch.nan
    tiny_model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "Text 4 could not be scored. The target of example 0 is nan" in told
    assert "Give --keep-going to go on" in told
    assert len(list(out.glob("*.parquet"))) == 1
    rows = scored([*command, "--keep-going"], out)
    assert "not scored, see the column 'error': 2\n" in capsys.readouterr().out
    for row, whole in zip(rows, expected, strict=True):
        assert (row["ids"], row["tokens"]) == (whole["ids"], whole["tokens"])
        if "Q" in given[row["number"]]:
            assert (row["scores"], row["target"], row["probability"]) == (None, None, None)
            assert row["error"].startswith("The target of example 0 is nan")
        else:
            torch.testing.assert_close(torch.tensor(row["scores"]), torch.tensor(whole["scores"]))
            assert row["error"] is None


def test_two_runs_do_not_write_to_one_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with Records(out / attribute_set.RECORDS, {}):
        assert main([*command, "--out", str(out)]) == 1
    assert "is being written by another run" in capsys.readouterr().err


def test_another_model_or_other_data_are_refused(
    command: list[str],
    tiny_model: Any,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    scored(command, out)
    data = tmp_path / "texts.jsonl"
    before = data.read_text()
    data.write_text(before.replace(json.dumps(texts[0]), json.dumps(texts[0][::-1])))
    assert main([*command, "--out", str(out)]) == 1
    assert "(checksum of the tokens: '" in capsys.readouterr().err
    data.write_text(before)
    with torch.no_grad():
        tiny_model.lm_head.weight[3, 5] += 1
    tiny_model.save_pretrained(tmp_path / "model")
    assert main([*command, "--out", str(out)]) == 1
    assert "(checksum of the model: '" in capsys.readouterr().err


def test_files_of_other_runs_and_damaged_files_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    scored(command, one)
    scored([*command, "--method", "vw"], other)
    file = sorted(one.glob("*.parquet"))[1]
    whole = file.read_bytes()
    for content, message in (
        ((other / file.name).read_bytes(), "is of another run (method: 'vw' there"),
        (whole[:-9], "is damaged, or was not written by this command"),
        (b"", "is damaged, or was not written by this command"),
    ):
        file.write_bytes(content)
        assert main([*command, "--out", str(one)]) == 1
        told = capsys.readouterr().err
        assert file.name in told
        assert message in told
    file.unlink()
    # The settings are the same, but the file is not one of those of the run.
    (one / "texts-00000-of-00009.parquet").write_bytes(whole)
    assert main([*command, "--out", str(one)]) == 1
    assert "texts-00000-of-00009.parquet does not belong to this run" in capsys.readouterr().err
    (one / "texts-00000-of-00009.parquet").unlink()
    scored(command, one)
    assert file.read_bytes() == whole


def started(
    arguments: list[str], processes: int = 1, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    many = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    program = ["-m", "captum_cw"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *(many if processes > 1 else []), *program, *arguments],
        env=process_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet
from captum_cw._utils.shards import Shards
from captum_cw.cli import attribute_set, main
from captum_cw.explanation.batches import BatchScorer

def dies(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_later(owner, name, calls, after=False):
    run, left = getattr(owner, name), [calls]
    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and not after:
            dies()
        found = run(*arguments, **options)
        if left[0] == 0:
            dies()
        return found
    setattr(owner, name, counted)

def half(table, where):
    Path(where).write_bytes(b"PAR1" * 9)
    dies()

def rename(path, to):
    if path.name.startswith(".texts"):
        dies()
    os.rename(path, to)

moment, *arguments = sys.argv[1:]
if moment == "claimed":
    dies_later(Shards, "unfinished", 1)
if moment == "settings":
    attribute_set.write_json = dies
if moment == "scoring":
    dies_later(BatchScorer, "score", 2)
if moment == "torn":
    pyarrow.parquet.write_table = half
if moment == "renaming":
    Path.replace = rename
if moment == "written":
    dies_later(Shards, "write", 1, after=True)
main(arguments)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_run_that_is_killed_again_and_again_loses_and_doubles_no_row(
    command: list[str], tmp_path: Path
) -> None:
    finished = started([*command, "--out", str(tmp_path / "whole")])
    assert finished.returncode == 0, finished.stderr
    out = tmp_path / "killed"
    counts = []
    for moment in ("claimed", "settings", "scoring", "torn", "renaming", "written", "torn"):
        killed = started([moment, *command, "--out", str(out)], code=KILLED)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        counts.append(len(rows_of(out)))
    assert counts == [0, 0, 0, 0, 0, SHARD, SHARD]
    assert any(name.startswith(".texts") for name in contents(out))
    finished = started([*command, "--out", str(out), "--json"])
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["finished_before"] == SHARD
    assert contents(out) == contents(tmp_path / "whole")
    assert [row["number"] for row in rows_of(out)] == NUMBERS


# ---------------------------------------------------------------------------------------------
# Processes


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(command: list[str], tmp_path: Path) -> None:
    for count, name in ((1, "one"), (2, "two")):
        finished = started([*command, "--out", str(tmp_path / name), "--json"], processes=count)
        assert finished.returncode == 0, finished.stderr
        document = json.loads(finished.stdout)  # only one process prints
        assert (document["processes"], document["texts"]) == (count, len(NUMBERS))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for file in sorted((tmp_path / "two").glob("*.parquet"))[:2]:
        file.unlink()
    finished = started([*command, "--out", str(tmp_path / "two")], processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "finished by an earlier run: 3\n" in finished.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_reads_other_texts_is_refused(command: list[str], tmp_path: Path) -> None:
    code = """
import os, sys
from captum_cw.cli import attribute_set, main
load = attribute_set.numbered_texts
attribute_set.numbered_texts = lambda *a, **k: load(*a, **k)[int(os.environ["RANK"]) :]
sys.exit(main(sys.argv[1:]))
"""
    file = tmp_path / "program.py"
    file.write_text(code)
    many = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(file)]
    run = subprocess.run(
        [sys.executable, *many, *command, "--out", str(tmp_path / "out")],
        env=process_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.returncode != 0
    assert "reads another model or other texts" in run.stderr
    assert "texts: 10 there, 11 here" in run.stderr
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "D"], "give --out DIR"),
        (["--data", "D", "--out", "page.html"], "has the name of a file"),
        (["--data", "D", "--out", "page.pdf"], "has the name of a file"),
        (["--data", "D", "--text", "Ice is cold"], "not allowed with argument"),
        (
            ["--data", "D", "--out", "x", "--method", "vw", "--target", "a"],
            "has no target in a set",
        ),
        (["--data", "D", "--out", "x", "--contrast", "b"], "give --target too"),
        (["--data", "D", "--out", "x", "--shard-size", "0"], "give 1 or more"),
        (["--data", "D", "--out", __file__], "is a file: give a folder"),
        (["--text", "Ice is cold", "--samples", "5"], "--samples applies to a set of texts"),
        (["--text", "Ice", "--batch-tokens", "5"], "--batch-tokens applies to a set of texts"),
    ],
)
def test_wrong_usage_says_what_to_do(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["attribute", "--model", "unused", *given])
    assert message in capsys.readouterr().err


def test_a_missing_library_is_reported_before_anything_is_loaded(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "pyarrow.parquet is not installed" in told
    assert "pip install 'captum-cw[evaluate]'" in told
    assert "Loading" not in told
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_loaded(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    assert main([*command, "--out", str(tmp_path / "file" / "out")]) == 1
    told = capsys.readouterr().err
    assert "cannot be written (Not a directory): choose a folder" in told
    assert "Loading" not in told

    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(attribute_set.tempfile, "TemporaryFile", refuse)
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "cannot be written (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target", "d e"], "'d e' has 2 tokens"),
        (["--target", "d", "--contrast", "e f g"], "'e f g' has 3 tokens"),
        (["--target", "d", "--contrast", "d"], "The target 'd' and the contrast 'd' are the same"),
        (["--data", "no/such/file.txt"], "no/such/file.txt"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_failures_are_reported_in_one_line(
    command: list[str],
    given: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, *given, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_text_that_is_too_long_is_reported_before_the_run(
    command: list[str], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2().save_pretrained(tmp_path / "model")  # type: ignore[operator]  # its table has 64 positions
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": x}) + "\n" for x in ("a", "b " * 70))
    )
    out = tmp_path / "out"
    assert main([*command, "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "The longest text has 70 tokens" in told
    assert "Use --length to cut texts" in told
    assert not list(out.iterdir())
    assert main([*command, "--length", "64", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "texts: 2\ncut at --length: 1\ntokens: 65\n" in printed
    assert f"folder: {out} (1 Parquet files)" in printed


def test_a_model_that_predicts_nothing_is_scored_by_its_layers(
    command: list[str], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(transformers.BertModel, transformers.BertConfig(**SIZES))
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]  # it is a model of transformers
    rows = check_equal(command, texts, tmp_path / "out", capsys)
    assert {row["target"] for row in rows} == {None}
    assert main([*command, "--target", "d", "--out", str(tmp_path / "other")]) == 1
    assert "use --method contribution" in capsys.readouterr().err
