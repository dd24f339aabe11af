"""``captum-cw evaluate``: its files, resumption after a kill, and runs in several processes."""

from __future__ import annotations

import json
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_cw import ComprehensivenessSufficiency
from captum_cw._utils.processes import Processes
from captum_cw.cli import main
from captum_cw.data import load_texts, token_batches
from captum_cw.metrics import FaithfulnessResult
from captum_cw.models.loading import load_model
from support.running import process_environment

EXAMPLES, BATCH = 10, 2


@pytest.fixture
def command(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    """Arguments that evaluate a saved model on a file of texts, without ``--out``."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(string.ascii_letters, k=9))} for _ in range(EXAMPLES)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "evaluate",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(data),
        "--methods",
        "contribution,attention,random",
        "--rates",
        "0.25,0.5",
        "--batch-size",
        str(BATCH),
        "--samples",
        str(EXAMPLES),
    ]


def started(arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    many = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    program = [sys.executable, *(many if processes > 1 else []), "-m", "captum_cw"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*program, *arguments], env=process_environment(), stdout=pipe, stderr=pipe, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def test_a_run_leaves_numbers_tables_and_figures(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main([*command, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "Top removed (higher is better)" in printed
    assert all(name in printed for name in ("contribution", "attention", "random", "25%"))
    assert "~ is undecided" in printed
    assert {file.name for file in folder.iterdir()} == {
        "run.records",
        "result.json",
        "result.csv",
        "result.md",
        "curves.png",
        "curves_corpus.png",
        "curves_nll.png",
    }
    result = FaithfulnessResult.load(folder / "result.json")
    model, tokenizer = load_model(tmp_path / "model")
    batches = token_batches(load_texts(tmp_path / "texts.jsonl"), tokenizer, batch_size=BATCH)
    methods = {name: name for name in ("contribution", "attention", "random")}
    expected = ComprehensivenessSufficiency(model, [0.25, 0.5]).evaluate(methods, batches)
    assert list(result.records) == json.loads(json.dumps(expected.records))
    assert len((folder / "result.csv").read_text().splitlines()) == 1 + 3 * 2 * 2


def test_options_reach_the_metric(command: list[str], tmp_path: Path) -> None:
    options = {
        "scoring": "clean",
        "ranking": "global",
        "reduction": "sum",
        "quantity": "kl",
        "rate_of": "all",
        "sink_space": "value",
        "granularity": "token",
        "seed": "3",
    }
    flags = [x for n, v in options.items() for x in (f"--{n.replace('_', '-')}", v)]
    folder = tmp_path / "out"
    assert main([*command, *flags, "--allow-sinks", "--out", str(folder)]) == 0
    settings = FaithfulnessResult.load(folder / "result.json").settings
    assert {name: str(settings[name]) for name in options} == options
    assert settings["protect_sinks"] is False
    assert not (folder / "curves_corpus.png").exists()


def test_packed_texts_have_exactly_the_length(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main([*command, "--pack", "--length", "16", "--out", str(folder)]) == 0
    counts = {record["count"] for record in FaithfulnessResult.load(folder / "result.json").records}
    assert counts == {15}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "gradient"], "argument --methods"),
        (["--rates", "a"], "argument --rates"),
        (["--scoring", "late"], "argument --scoring"),
        (["--pack", "--data", "fineweb-edu"], "leave --pack out"),
    ],
)
def test_wrong_usage_differs_from_failure(
    command: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main([*command, *options, "--out", "x"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "0.5,0.2"], "ascending order"),
        (["--data", "no/such/file.txt"], "no/such/file.txt"),
        (["--ranking", "global"], "scoring='clean'"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_failures_are_reported_in_one_line(
    command: list[str],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, *options, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_folder_of_another_run_is_left_alone(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main([*command, "--out", str(folder)]) == 0
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert main([*command, "--seed", "1", "--out", str(folder)]) == 1
    assert "seed: 0 there, 1 here" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(command: list[str], tmp_path: Path) -> None:
    finished(started([*command, "--out", str(tmp_path / "whole")]))
    records = tmp_path / "killed" / "run.records"
    running = started([*command, "--out", str(tmp_path / "killed")])
    while not records.exists() or records.read_bytes().count(b"\n") < 1 + BATCH:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    whole = (tmp_path / "whole" / "run.records").read_bytes()
    assert whole.startswith(records.read_bytes().rpartition(b"\n")[0])
    finished(started([*command, "--out", str(tmp_path / "killed")]))
    assert records.read_bytes() == whole
    for name in ("result.json", "result.csv", "curves.png"):
        one, other = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(command: list[str], tmp_path: Path) -> None:
    finished(started([*command, "--out", str(tmp_path / "one")]))
    printed = finished(started([*command, "--out", str(tmp_path / "two")], processes=2))
    assert printed.count("Top removed") == 1  # only one process prints
    one, two = (tmp_path / folder for folder in ("one", "two"))
    assert FaithfulnessResult.load(two / "result.json").settings["processes"] == 2
    assert (one / "run.records").read_bytes() == (two / "run.records").read_bytes()
    assert (one / "result.csv").read_bytes() == (two / "result.csv").read_bytes()


@pytest.mark.slow
def test_a_process_that_fails_ends_all(command: list[str], tmp_path: Path) -> None:
    long = tmp_path / "texts.jsonl"
    rows = long.read_text().splitlines()
    rows[3] = json.dumps({"text": "a a a a"})  # equal tokens all count as sinks
    long.write_text("\n".join(rows))
    running = started([*command, "--out", str(tmp_path / "out")], processes=2)
    _, err = running.communicate(timeout=240)
    assert running.returncode != 0
    assert "All tokens of an example are protected, so none can be removed" in err


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes()
    assert (alone.count, alone.index, alone.is_main) == (1, 0, True)
    assert alone.gathered(lambda: "x") == ["x"]
    assert alone.from_main(lambda: "x") == "x"
    assert isinstance(alone.device, torch.device)
