"""The benchmark measures every call, resumes, and writes one page."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.paths import ROOT
from support.running import process_environment


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("run")


@pytest.fixture
def command(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    sizes = ["--lengths", "16", "--ratio-lengths", "16", "--memory-lengths", "16,32"]
    options = ["--model", str(tmp_path / "model"), "--threads", "1", "--gradient-steps", "2"]
    options += ["--repeats", "2"]
    return [
        *(sys.executable, "benchmarks/run.py"),
        *(*sizes, *options),
        *("--out", str(tmp_path / "page.md")),
    ]


def started(command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=process_environment(), stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.slow
def test_one_command_writes_all_tables_and_goes_on_after_a_kill(
    command: list[str], tmp_path: Path
) -> None:
    unfinished = tmp_path / "page.records"
    killed = started(command)
    while not unfinished.exists() or unfinished.read_bytes().count(b"\n") < 3:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    before = [line for line in unfinished.read_bytes().splitlines(keepends=True) if b"\n" in line]

    other = started([*command, "--repeats", "3"])
    assert "repeats: 2 there, 3 here" in other.communicate()[1]
    assert other.returncode == 1

    ran = started(command)
    while unfinished.read_bytes().count(b"\n") <= len(before):
        assert ran.poll() is None, ran.communicate()[1]
        time.sleep(0.05)
    assert unfinished.read_bytes().startswith(b"".join(before))
    out, err = ran.communicate()
    assert ran.returncode == 0, err
    assert not unfinished.exists()
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.strip() == out.strip()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [3] * 11 + [4] * 3 + [5] * 3 + [3] * 3 + [6] * 4
    assert "extrapolated" in text
    assert "failed" not in text


@pytest.mark.slow
def test_a_process_that_dies_is_reported(benchmark: ModuleType) -> None:
    assert benchmark.in_own_process(os._exit, 3) == "failed: exit code 3"


@pytest.fixture
def gpu(benchmark: ModuleType) -> ModuleType:
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
def test_without_a_gpu_its_benchmark_ends_with_a_sentence(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "This benchmark needs a CUDA device, and torch finds none.\n")


def test_the_table_of_a_gpu_has_each_call_and_says_what_is_missing(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model, on the CPU."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, **heads}
    monkeypatch.setitem(gpu.MODELS, "small", small)
    table = gpu.table(["small"], [8, 16], "cpu", gpu.Budget(60))
    rows = [line.split(" | ") for line in table.splitlines()]
    assert [len(row) for row in rows] == [5] * (2 + len(gpu.MEASUREMENTS))
    assert all(float(row[1]) > 0 for row in rows[2:])
    late = gpu.table(["small"], [8], "cpu", gpu.Budget(-1))
    assert late.count("out of time") == len(gpu.MEASUREMENTS)

    def full() -> object:
        raise torch.cuda.OutOfMemoryError

    assert gpu.measured(full, "cpu", gpu.Budget(60)) == ("out of memory", "")


def test_a_wrong_kernel_is_found_before_anything_is_measured(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "error_of", lambda case, made, reduction, signed: float("nan"))
    cases = iter(list(gpu.core_cases("cpu"))[:2])
    monkeypatch.setattr(gpu, "core_cases", lambda device: cases)
    assert len(list(gpu.failed_checks("cpu", gpu.Budget(60)))) == 2


@pytest.mark.parametrize("options", [["--lengths", "0"], ["--gradient-steps", "1"]])
def test_senseless_options_are_refused(
    benchmark: ModuleType, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert options[0] in capsys.readouterr().err
