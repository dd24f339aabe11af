"""The benchmark measures what it says, and writes one page."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("run")


@pytest.mark.slow
def test_one_command_writes_all_tables(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    page = tmp_path / "page.md"
    sizes = ["--lengths", "16", "--memory-lengths", "16,32", "--repeats", "2"]
    options = ["--model", str(tmp_path / "model"), "--threads", "1", "--gradient-steps", "2"]
    command = [sys.executable, "benchmarks/run.py", *sizes, *options, "--out", str(page)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    text = page.read_text(encoding="utf-8")
    assert text.strip() == ran.stdout.strip()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [3] * 8 + [3] * 3 + [5] * 4
    assert "extrapolated" in text
    assert "failed" not in text


@pytest.mark.slow
def test_a_process_that_dies_is_reported(benchmark: ModuleType) -> None:
    assert benchmark.in_own_process(os._exit, 3) == "failed: exit code 3"


@pytest.mark.parametrize("options", [["--lengths", "0"], ["--gradient-steps", "1"]])
def test_senseless_options_are_refused(
    benchmark: ModuleType, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert options[0] in capsys.readouterr().err
