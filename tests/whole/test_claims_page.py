"""The page on claims, from reports made by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

HEADS = "claim,model,data,verdict,figures,statement,rule\n"


def test_verdicts_are_shown_by_report_and_data(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    claims = importlib.import_module("claims")
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text(
        HEADS
        + 'A,m,gsm8k_test,holds,"R2 0.9, of 2",A is so.,x\n'
        + "A,m,wikitext2_test,undecided,R2 0.5,A is so.,x\n"
        + "B,m,gsm8k_test,does not hold,r = 0,B is so.,x\n"
    )
    other.write_text(HEADS + "A,m,gsm8k_test,not run,,A is so.,x\n")
    reports = [f"One={one}", f"Other={other}"]
    assert claims.main([*reports, "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "claims.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line[:1] == "|"] == [
        "| claim | One, gsm8k | One, wikitext2 | Other, gsm8k |",
        "| --- | --- | --- | --- |",
        "| A is so. | **holds**: R2 0.9, of 2 | **undecided**: R2 0.5 | **not run** |",
        "| B is so. | **does not hold**: r = 0 |  |  |",
    ]
    assert (tmp_path / "claims.png").stat().st_size > 1000


@pytest.mark.parametrize("report", ["docs/results/reproduction-claims.csv"])
def test_the_page_shows_the_verdicts_of_the_report(report: str, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    claims = importlib.import_module("claims")
    page = (ROOT / "docs/results/claims.md").read_text(encoding="utf-8")
    for of_claim in claims.read([("SmolLM2", str(ROOT / report))]).values():
        for row in of_claim.values():
            (line,) = (x for x in page.splitlines() if x.startswith(f"| {row['statement']} |"))
            assert ": ".join(filter(None, (f"**{row['verdict']}**", row["figures"]))) in line
