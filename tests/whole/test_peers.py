"""The comparison with other libraries counts passes, and names missing libraries."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT


def test_passes_are_counted_and_missing_libraries_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("inseq", "lxt", "lxt.efficient", "bertviz"):
        monkeypatch.setitem(sys.modules, name, None)
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    peers = importlib.import_module("peers")
    assert peers.main(["--model", str(tmp_path), "--repeats", "1"]) == 0
    rows = {
        cells[2]: cells
        for line in capsys.readouterr().out.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) > 4
    }
    assert rows["TokenScores"][3:5] == ["1", "0"]
    assert rows["explain"][3:5] == ["3", "1"]
    assert rows["LayerIntegratedGradients"][3:5] == ["52", "50"]
    assert "inseq" in rows["saliency"][3]
    assert "lxt" in rows["AttnLRP"][3]
