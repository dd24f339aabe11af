"""The command line prints, saves and refuses as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import captum_cw
from captum_cw import cli, loading
from captum_cw.cli import main


@pytest.fixture(autouse=True)
def _offline_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> str:
    """A saved model, one of whose tokens looks like markup of rich."""
    tiny_tokenizer.add_tokens(["[bold]"])
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("method", cli.METHODS)
@pytest.mark.parametrize("target", [[], ["--target", "d e"]])
def test_attribute_prints_each_token_with_its_score(
    folder: str, method: str, target: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", folder, "--text", "a [bold] c", "--method", method]
    assert main([*arguments, *target]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert all(token in printed for token in ("a", "[bold]", "c"))


def test_attribute_colours_the_text_where_colours_are_shown(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert main(["attribute", "--model", folder, "--text", "a [bold] c"]) == 0
    strongest = "48;2;{};{};{}m".format(*cli.POSITIVE)
    assert strongest in capsys.readouterr().out


def test_json_holds_the_scores_of_the_library(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a b c d")
    assert main(["attribute", "--model", folder, "--file", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = loading.load_model(folder)
    ids = tokenizer("a b c d", return_tensors="pt").input_ids
    expected = captum_cw.TokenScores(captum_cw.ContributionWeights(model)).attribute(ids)
    torch.testing.assert_close(torch.tensor([printed.pop("scores")]), expected)
    assert [token.strip() for token in printed.pop("tokens")] == ["a", "b", "c", "d"]
    settings = {"method": "contribution", "reduction": "mean", "target": None}
    assert printed == {"model": folder, **settings}


def test_json_with_a_target_holds_the_scores_of_the_prompt(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", folder, "--text", "a b c", "--target", "d", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = loading.load_model(folder)
    method = captum_cw.ContributionWeights(model)
    expected = captum_cw.LLMTokenAttribution(method, tokenizer).attribute("a b c", target="d")
    torch.testing.assert_close(torch.tensor(printed["scores"]), expected.seq_attr)


def test_the_page_shows_every_token(folder: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["attribute", "--model", folder, "--text", "x [bold] z", "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert all(token in html for token in ("x", "[bold]", "z", "contribution"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", ""], "the text is empty"),
        (["--text", "a", "--file", "b"], "not allowed with argument"),
        ([], "one of the arguments --text --file is required"),
        (["--text", "a", "--target", "b", "--reduction", "sum"], "give one of them"),
        (["--text", "a", "--out", "no/such/page.html"], "there is no folder no/such"),
        (["--text", "a", "--method", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["attribute", "--model", "unused", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_is_a_failure_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attribute", "--model", "no/such-model", "--text", "a"]
    assert main(arguments) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("captum-cw attribute: error: Model 'no/such-model' cannot be loaded")
    with pytest.raises(OSError, match="no/such-model"):
        main([*arguments, "--debug"])


def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (binary, tmp_path / "missing"):
        assert main(["attribute", "--model", "unused", "--file", str(file)]) == 1
        assert str(file) in capsys.readouterr().err


def test_the_demo_explains_a_prediction_and_saves_what_it_lists(
    smollm2: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "load_demo_model", lambda: smollm2)
    assert main(["demo", "--text", "The capital of France is", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "' Paris'" in printed
    assert all(
        method in printed for method in ("contribution", "attention", "integrated gradients")
    )
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == ["decomposition.png", "demo.html", "maps.png", "scores.png"]
    assert all(name in printed.replace("\n", "") for name in saved)
    page = (tmp_path / "out" / "demo.html").read_text(encoding="utf-8")
    assert "France" in page
    assert "integrated gradients" in page


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "captum_cw", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == captum_cw.__version__
