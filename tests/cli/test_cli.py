"""The command line: output, files, messages, completion and exit codes."""

from __future__ import annotations

import json
import re
import shlex
import string
import subprocess
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformers

import captum_cw
from captum_cw import measures
from captum_cw._utils import colours
from captum_cw.capture import StateSpace
from captum_cw.cli import attribute, choices, main, models, output, parser
from captum_cw.cli import demo as demo_command
from captum_cw.cli import reproduce as reproduce_command
from captum_cw.data import _HUB_SETS, Bos
from captum_cw.explanation import page as page_module
from captum_cw.explanation import target
from captum_cw.functional import Reduction
from captum_cw.metrics.quantities import QuantityName
from captum_cw.models import inspection, loading
from captum_cw.models.architectures import ModelTypes
from captum_cw.removal.options import Granularity, Scoring
from captum_cw.removal.ranking import RankingScope, RateOf
from captum_cw.reproduce import ITEMS, PLANS
from support.models import SIZES, build, gpt2
from support.paths import ROOT
from support.running import process_environment


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


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file of texts."""
    file = tmp_path / "letters.jsonl"
    rows = ("a b c d e f g h i j", "k l m n o p q r s t", "u v w x y z A B C D")
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


def started(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "captum_cw", *arguments],
        env=process_environment(),
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


def commands() -> dict[str, ArgumentParser]:
    """The parser of each command."""
    (action,) = (a for a in parser()._actions if a.metavar == "COMMAND")
    assert action.choices is not None
    return dict(action.choices)  # type: ignore[call-overload]  # it is a mapping for commands


def documented(command: str) -> set[str]:
    """Return the documented keys of a command's JSON."""
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    section = page.partition(f"\n### {command}\n")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


def printed_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document.pop("version") == 1
    return document


@pytest.mark.parametrize("method", measures.names())
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
    printed = capsys.readouterr().out
    explanation = captum_cw.explain(*loading.load_model(folder), "a [bold] c").by_word()
    strongest = float(explanation.scores["target"][1:].abs().max())
    colour = colours.TOWARDS if strongest in explanation.scores["target"] else colours.AGAINST
    assert "48;2;{};{};{}m".format(*colour) in printed


def test_json_holds_the_scores_of_the_library(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a b c d")
    arguments = ["attribute", "--model", folder, "--file", str(file), "--json"]
    assert main([*arguments, "--method", "contribution"]) == 0
    printed = printed_json(capsys)
    assert printed.keys() == documented("attribute")
    model, tokenizer = loading.load_model(folder)
    ids = tokenizer("a b c d", return_tensors="pt").input_ids
    expected = captum_cw.TokenScores(captum_cw.ContributionWeights(model)).attribute(ids)
    torch.testing.assert_close(torch.tensor([printed.pop("scores")]), expected)
    assert [token.strip() for token in printed.pop("tokens")] == ["a", "b", "c", "d"]
    settings = {"method": "contribution", "reduction": "mean"}
    asked = ("target", "contrast", "probability", "contrast_probability")
    shares = printed.pop("shares")
    assert [x["word"].strip() for x in shares] == ["a", "b", "c", "d"]
    torch.testing.assert_close(
        torch.tensor([x["share"] for x in shares]), expected[0] / expected.sum()
    )
    assert [x["sink"] for x in shares] == [True, False, False, False]
    assert printed == {"model": folder, **settings, **dict.fromkeys(asked), "files": []}


@pytest.mark.parametrize("ending", ["html", "json", "safetensors"])
def test_the_ending_of_the_file_names_its_kind(folder: str, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    assert main(["attribute", "--model", folder, "--text", "a b c", "--out", str(path)]) == 0
    if ending == "safetensors":
        loaded = captum_cw.Explanation.load(path)
        assert (loaded.tokens, loaded.text) == ([" a", " b", " c"], "a b c")
    elif ending == "json":
        assert json.loads(path.read_text("utf-8"))["tokens"] == [" a", " b", " c"]
    else:
        assert path.read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "page.pdf"], "the file must end in .html, .json, .safetensors"),
        (["--target", ""], "--target is empty: give a word or a class, or leave it out"),
        (["--target", "a", "--contrast", ""], "--contrast is empty"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["attribute", "--model", "no/such/model", "--text", "a b c", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device where there is none")
def test_a_device_that_is_missing_is_named(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "--model", folder, "--text", "a b", "--device", "cuda:1"]) == 1
    assert "--device cuda:1: PyTorch finds no such device here" in capsys.readouterr().err


def test_raw_scores_are_in_the_unit_of_the_measure(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", folder, "--text", "a b c"]
    assert main(arguments) == 0
    assert "%" in capsys.readouterr().out.splitlines()[-3]
    assert main([*arguments, "--raw"]) == 0
    printed = capsys.readouterr().out
    assert "in the unit of the target." in printed
    score = captum_cw.explain(*loading.load_model(folder), "a b c").scores["target"][0]
    assert f" {score:.3g} " in printed


def test_json_holds_the_prediction_and_what_it_is_made_of(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", folder, "--text", "a b c d", "--json"]
    model, tokenizer = loading.load_model(folder)
    ids = tokenizer("a b c d", return_tensors="pt").input_ids
    with torch.no_grad():
        chances = model(ids).logits[0, -1].softmax(-1)
    of = {word: tokenizer.encode(word, add_special_tokens=False)[0] for word in ("e", "f")}
    inputs = captum_cw.InputContributions(model)
    values = captum_cw.TokenScores(
        captum_cw.TargetContributions(model), "sum", layers="sum", heads="sum", signed=True
    )
    for form in ("joint", "effect", "sensitivity"):
        effects = captum_cw.EffectContributions(model, form=form)
        asked = ["--target", "e", "--contrast", "f", "--method", form]
        assert main([*arguments, *asked]) == 0
        printed = printed_json(capsys)
        result = captum_cw.LLMTokenAttribution(effects, tokenizer).attribute(
            "a b c d", target="e", contrast="f"
        )
        torch.testing.assert_close(torch.tensor(printed["scores"]), result.seq_attr)
        assert main([*arguments, "--method", form]) == 0
        summed = captum_cw.TokenScores(effects, "sum").attribute(ids)[0]
        torch.testing.assert_close(torch.tensor(printed_json(capsys)["scores"]), summed)
    for method, measure in (("target", values), ("input", inputs)):
        asked = ["--target", "e", "--contrast", "f", "--method", method]
        assert main([*arguments, *asked]) == 0
        printed = printed_json(capsys)
        assert printed.keys() == documented("attribute")
        expected = measure.attribute(ids, target=of["e"], contrast=of["f"])[0]
        torch.testing.assert_close(torch.tensor(printed["scores"]), expected)
        assert printed["probability"] == pytest.approx(float(chances[of["e"]]), rel=1e-3)
        assert printed["contrast_probability"] == pytest.approx(float(chances[of["f"]]), rel=1e-3)
        assert (printed["target"].strip(), printed["contrast"].strip()) == ("e", "f")
    # Two outputs of several tokens: the first token in which they differ.
    for this, that in (("e a b", "e f"), ("e a", "f a")):
        assert main([*arguments, "--target", this, "--contrast", that]) == 0
        printed = printed_json(capsys)
        result = captum_cw.LLMTokenAttribution(
            captum_cw.TargetContributions(model), tokenizer
        ).attribute("a b c d", target=this, contrast=that)
        torch.testing.assert_close(torch.tensor(printed["scores"]), result.seq_attr)
    assert printed["target"].strip() == "e"  # whose probability it is
    assert main(arguments) == 0
    printed = printed_json(capsys)
    torch.testing.assert_close(torch.tensor([printed["scores"]]), values.attribute(ids))
    assert printed["probability"] == pytest.approx(float(chances.max()), rel=1e-3)


def test_json_with_a_target_holds_the_scores_of_the_prompt(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", folder, "--text", "a b c", "--target", "d", "--json"]
    assert main([*arguments, "--method", "contribution"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = loading.load_model(folder)
    method = captum_cw.ContributionWeights(model)
    expected = captum_cw.LLMTokenAttribution(method, tokenizer).attribute("a b c", target="d")
    torch.testing.assert_close(torch.tensor(printed["scores"]), expected.seq_attr)


def test_the_page_shows_every_token(folder: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["attribute", "--model", folder, "--text", "x [bold] z", "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    of_layers = ["attention", "vw", "vwon", "contribution", "contribution-signed"]
    assert data["maps"] == ["target", *of_layers]
    assert [*data["scores"]] == ["target", "input", *of_layers]
    assert len(data["layers"]) == 2
    out = ["--out", str(page), "--method", "vw"]
    assert main(["attribute", "--model", folder, "--text", "x z", "--reduction", "sum", *out]) == 0
    assert '"vw, sum":[' in page.read_text(encoding="utf-8")
    assert main(["attribute", "--model", folder, "--text", "x z", "--target", "a b c", *out]) == 0
    html = page.read_text(encoding="utf-8")
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert (len(data["tokens"]), len(data["queries"]), data["maps"]) == (2, 3, ["vw"])


def test_the_page_of_a_long_text_holds_scores_alone(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attribute, page_module):
        monkeypatch.setattr(module, "MAPPED", 2)
    page = tmp_path / "page.html"
    for text, maps in (("a b", 6), ("a b c", 0)):
        assert main(["attribute", "--model", folder, "--text", text, "--out", str(page)]) == 0
        html = page.read_text(encoding="utf-8")
        data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
        assert len(data["maps"]) == maps
        note = "The text has 3 tokens, so the page shows scores alone."
        assert (data["note"] or "").startswith(note) == (maps == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", ""], "the text is empty"),
        (["--text", "Ice is cold", "--file", "b"], "not allowed with argument"),
        ([], "one of the arguments --text --file --data is required"),
        (["--text", "Ice is cold", "--target", "b", "--reduction", "sum"], "give one of them"),
        (["--text", "Ice is cold", "--contrast", "b"], "give --target too"),
        (
            ["--text", "Ice", "--target", "a", "--contrast", "b", "--method", "vw"],
            "--contrast needs --method target, input, joint",
        ),
        (["--text", "Ice", "--method", "input", "--reduction", "sum"], "leave it out"),
        (["--text", "Ice is cold", "--out", "no/such/page.html"], "there is no folder no/such"),
        (["--text", "Ice is cold", "--method", "magic"], "invalid choice: 'magic'"),
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
    arguments = ["attribute", "--model", "no/such-model", "--text", "Ice is cold"]
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
    monkeypatch.setattr(demo_command, "load_demo_model", lambda: smollm2)
    assert main(["demo", "--text", "The capital of France is", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "' Paris'" in printed
    assert all(
        method in printed for method in ("contribution", "attention", "integrated gradients")
    )
    rows = [
        line.strip("│ ").split("│") for line in printed.splitlines() if "%" in line and "│" in line
    ]
    assert [cells[1].strip() for cells in rows][::3] == ["The (sink)", "France"]
    for column in zip(*(cells[2:] for cells in rows), strict=True):
        assert sum(abs(float(x.strip(" %"))) for x in column) == pytest.approx(100, abs=1.5)
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == ["explanation.html", "maps.png", "scores.png"]
    assert all(name in printed.replace("\n", "") for name in saved)
    assert "France" in (tmp_path / "out" / "explanation.html").read_text(encoding="utf-8")


def test_the_demo_as_json_has_the_keys_that_are_documented(
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_tokenizer.eos_token = "a"
    monkeypatch.setattr(demo_command, "load_demo_model", lambda: (tiny_model, tiny_tokenizer))
    assert main(["demo", "--text", "b c d", "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = printed_json(capsys)
    assert printed.keys() == documented("demo")
    assert {len(scores) for scores in printed["scores"].values()} == {len(printed["tokens"])}
    assert all(Path(file).exists() for file in printed["files"])


def test_evaluate_as_json_holds_what_it_measured(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--model", folder, "--data", data, "--methods", "contribution,random"]
    arguments += ["--rates", "0.25,0.5", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    printed = printed_json(capsys)
    assert printed.keys() == documented("evaluate")
    texts, saved = printed["texts"], tmp_path / "out" / "result.json"
    assert str(saved) in printed["files"]
    result = captum_cw.metrics.FaithfulnessResult.load(saved)
    for side in ("comprehensiveness", "sufficiency"):
        assert texts[side]["rates"] == [0.25, 0.5]
        assert (
            texts[side]["delta"]["contribution"] == getattr(result, side)["contribution"].tolist()
        )
        assert texts[side]["better"].keys() == {"random"}
    for key in texts:  # the keys of the parts are documented too
        assert f"`{key}`" in (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")


def test_a_set_as_json_holds_what_was_scored(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", folder, "--data", data, "--out", str(tmp_path / "out")]
    for finished_before in (0, 3):
        assert main([*arguments, "--json"]) == 0
        printed = printed_json(capsys)
        assert printed.keys() == documented("attribute --data")
        assert (printed["texts"], printed["tokens"], printed["cut"]) == (3, 30, 0)
        assert printed["finished_before"] == finished_before
        assert all(Path(file).exists() for file in printed["files"])


def test_reproduce_as_json_holds_the_verdicts(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reproduce", "--model", folder, "--data", data, "--quick", "--length", "10"]
    arguments += ["--only", "T2,F4", "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    printed = printed_json(capsys)
    assert printed.keys() == documented("reproduce")
    (study,) = printed["studies"]
    assert (study["model"], study["data"]) == ("model", "letters")
    assert [item["name"] for item in study["items"]] == ["T2", "F4"]
    assert study["items"][0]["refused"] is None
    assert "no tasks were given" in study["items"][1]["refused"]
    verdicts = {claim["verdict"] for claim in study["claims"]}
    assert "not run" in verdicts
    assert verdicts & {"holds", "does not hold", "undecided"}


def test_the_name_of_a_hub_model_is_whole() -> None:
    assert reproduce_command._short_name("owner/model-1.5") == "owner/model-1.5"


def test_packed_samples_are_of_all_texts(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--model", folder, "--data", data, "--methods", "attention,random"]
    arguments += [
        "--rates",
        "0.5",
        "--pack",
        "--length",
        "15",
        "--samples",
        "1",
    ]  # texts have 10 tokens
    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert printed_json(capsys)["texts"]["examples"] == 1


# ---------------------------------------------------------------------------------------------
# Models


def test_the_demo_model_has_a_source_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "load_demo_model", lambda **place: ("model", "tokenizer"))
    options = SimpleNamespace(dtype="float32", device="cpu")
    assert output.load(options, loading.DEMO_MODEL) == ("model", "tokenizer")  # type: ignore[arg-type]  # as good as parsed ones
    assert output.load_any(options, loading.DEMO_MODEL) == "model"  # type: ignore[arg-type]  # the same


def test_models_counts_what_was_tested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    tested = ModelTypes.load()
    assert str(tested.counts("causal")["works"]) in printed
    assert "deepseek_v4" in printed
    assert main(["models", "--json"]) == 0
    document = printed_json(capsys)
    assert document.keys() == documented("models")
    assert document["groups"]["causal"]["llama"] == {
        "status": "works",
        "way": "registry",
        "reason": None,
    }
    assert {x["way"] for types in document["groups"].values() for x in types.values()} <= {
        None,
        *document["ways"],
    }


def test_models_shows_the_layers_of_a_model(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", folder]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.[0-1].self_attn  " in printed
    assert all(word in printed for word in ("LlamaAttention", "4/2", "causal", "o_proj", "8.4 MB"))
    assert main(["models", folder, "--json", "--length", "64"]) == 0
    document = printed_json(capsys)
    assert document.keys() == documented("models M")
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in document["layers"][0])
    assert document["maps_bytes"] == 2 * 4 * 64**2 * 4


def test_layers_that_are_alike_share_a_line(folder: str) -> None:
    layers = inspection.attention_layers(loading.load_model(folder)[0])
    first = layers[0]

    def named(*names: str, **changes: Any) -> list[inspection.LayerOverview]:
        return [replace(first, name=name, projection=f"{name}.o", **changes) for name in names]

    sliding = named("h.0.attn", "h.1.attn", window=16)
    full = named("h.2.attn")
    nested = named("b.0.1.attn", "b.1.1.attn", "b.1.2.attn", "a.attn", "a.attn")
    names = [name for name, _ in models._alike([*sliding, *full, *nested])]
    assert names == [
        *("h.[0-1].attn", "h.2.attn", "b.[0-1].1.attn", "b.1.2.attn", "a.attn", "a.attn"),
    ]


def test_names_are_not_wrapped_on_a_narrow_terminal(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (layer, _) = inspection.attention_layers(loading.load_model(folder)[0])
    name = "decoder.with.a.very.long.name.of.its.own.that.fills.more.than.half.a.terminal.attn"
    monkeypatch.setattr(inspection, "attention_layers", lambda model: [replace(layer, name=name)])
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["models", folder]) == 0
    printed = capsys.readouterr().out
    assert name in printed
    assert "LlamaAttention" in printed


def test_models_tells_gates_rows_windows_and_notes(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (layer, _) = inspection.attention_layers(loading.load_model(folder)[0])

    def told(model: object) -> list[inspection.LayerOverview]:
        warnings.warn("A part is left out.", stacklevel=1)
        below = replace(layer, rows_below_one=True, causal=False)
        return [replace(layer, gate=True, window=16), below]

    monkeypatch.setattr(inspection, "attention_layers", told)
    assert main(["models", folder]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"causal 16 +o_proj +gate *\n", printed)
    assert re.search(r"all +o_proj +rows < 1 *\n", printed)
    assert "Note: A part is left out." in printed
    assert main(["models", folder, "--json"]) == 0
    assert printed_json(capsys)["notes"] == ["A part is left out."]


def test_models_of_other_kinds_need_no_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert main(["models", str(tmp_path), "--json"]) == 0
    layers = printed_json(capsys)["layers"]
    assert [(layer["kind"], layer["causal"]) for layer in layers] == [
        ("self", False),
        ("self", True),
        ("cross", False),
    ]


def test_a_refused_model_is_reported_with_the_reason(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: object) -> None:
        raise captum_cw.capture.UnsupportedModelError("Its heads are spread.")

    monkeypatch.setattr(inspection, "attention_layers", refuse)
    assert main(["models", folder, "--json"]) == 1
    assert printed_json(capsys) == {
        "error": "Its heads are spread.",
        "type": "UnsupportedModelError",
    }


# ---------------------------------------------------------------------------------------------
# Models that do not predict the next token


def saved_bert(kind: str, tokenizer: Any, to: Path) -> str:
    config = transformers.BertConfig(**SIZES, num_labels=3)
    build(getattr(transformers, kind), config).save_pretrained(to)  # type: ignore[operator]
    tokenizer.save_pretrained(to)
    return str(to)


@pytest.fixture
def classifier(tiny_tokenizer: Any, tmp_path: Path) -> str:
    return saved_bert("BertForSequenceClassification", tiny_tokenizer, tmp_path / "classifier")


def test_the_layers_of_a_classifier_are_attributed(
    classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", classifier, "--text", "a b c"]
    arguments += ["--method", "contribution"]
    assert main([*arguments, "--json"]) == 0
    scores = printed_json(capsys)["scores"]
    model, tokenizer = loading.load_model(classifier)
    assert type(model).__name__ == "BertForSequenceClassification"
    ids = tokenizer("a b c", return_tensors="pt").input_ids
    expected = captum_cw.TokenScores(captum_cw.ContributionWeights(model)).attribute(ids)
    torch.testing.assert_close(torch.tensor([scores]), expected)
    assert main([*arguments, "--target", "d"]) == 1
    told = capsys.readouterr().err
    assert "BertForSequenceClassification does not generate text" in told
    assert "leave --target out" in told


def test_the_class_of_a_classifier_is_explained(
    classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "--model", classifier, "--text", "a b c"]
    assert main([*arguments, "--target", "LABEL_1", "--contrast", "LABEL_0", "--json"]) == 0
    scores = printed_json(capsys)["scores"]
    model, tokenizer = loading.load_model(classifier)
    ids = tokenizer("a b c", return_tensors="pt").input_ids
    method = captum_cw.TokenScores(
        captum_cw.TargetContributions(model), "sum", layers="sum", heads="sum", signed=True
    )
    expected = method.attribute(ids, target=1, contrast=0)
    torch.testing.assert_close(torch.tensor([scores]), expected)
    assert main([*arguments, "--target", "d"]) == 1
    assert "'d' is not a class of the model" in capsys.readouterr().err


def test_a_masked_model_needs_a_masked_token(
    tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_bert("BertForMaskedLM", tiny_tokenizer, tmp_path)
    assert main(["attribute", "--model", model, "--text", "a b", "--target", "d"]) == 1
    assert "put it where the target belongs" in capsys.readouterr().err


def test_a_space_before_the_target_is_suggested(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "' e', with a space before the word, has probability 0.5: did you mean ' e'?"
    monkeypatch.setattr(target.Names, "hint", lambda *_: hint)
    assert main(["attribute", "--model", folder, "--text", "a b", "--target", "e"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("with a space before the word") == 1
    assert "it prefers" in printed


def test_a_classifier_is_evaluated_by_its_classes(
    classifier: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--model", classifier, "--data", data, "--methods", "vw,random"]
    arguments += ["--rates", "0.5"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "predicts classes, not tokens (its logits are (3, 3))" in capsys.readouterr().err
    out = tmp_path / "classes"
    assert main([*arguments, "--quantity", "log_prob", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "log_prob with nothing removed" in printed
    assert "texts: 3" in printed
    assert "corpus" not in printed
    header = (out / "result.csv").read_text().splitlines()[0]
    assert header == "method,side,rate,delta"
    assert main([*arguments, "--quantity", "log_prob", "--out", str(out), "--json"]) == 0
    assert printed_json(capsys)["texts"]["clean_corpus"] is None


@pytest.mark.parametrize(("option", "count"), [("--lines", 3), ("--no-lines", 1)])
def test_lines_are_evaluated_as_asked(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, count: int
) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a b c\nd e f\ng h i\n")
    arguments = ["evaluate", "--model", folder, "--data", str(file), "--methods", "vw"]
    arguments += ["--rates", "0.5", "--out", str(tmp_path / "out"), option, "--json"]
    assert main(arguments) == 0
    assert printed_json(capsys)["texts"]["examples"] == count


@pytest.mark.parametrize("command", ["evaluate", "reproduce", "demo"])
def test_a_folder_does_not_have_the_name_of_a_file(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main([command, "--out", "page.pdf"])
    assert refused.value.code == 2
    assert "'page.pdf' has the name of a file: give a folder" in capsys.readouterr().err


def test_a_masked_language_model_is_evaluated_by_its_masks(
    tiny_tokenizer: Any, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer.mask_token = "A"
    model = saved_bert("BertForMaskedLM", tiny_tokenizer, tmp_path / "masked")
    arguments = ["evaluate", "--model", model, "--data", data, "--methods", "vw,random"]
    out = tmp_path / "out"
    assert main([*arguments, "--rates", "0.5", "--quantity", "nll", "--out", str(out)]) == 0
    settings = captum_cw.metrics.FaithfulnessResult.load(out / "result.json").settings
    assert settings["mask_token_id"] == tiny_tokenizer.mask_token_id


def test_tasks_are_refused_of_a_classifier_before_the_texts_are_run(
    classifier: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--model", classifier, "--data", data, "--quantity", "kl"]
    assert main([*arguments, "--tasks", "quiz", "--out", str(tmp_path / "out")]) == 1
    assert "causal language model of transformers, got BertFor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_is_of_a_language_model(
    classifier: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["reproduce", "--model", classifier, "--data", data, "--quick", *out]) == 1
    assert "so give causal language models" in capsys.readouterr().err


def test_missing_weights_fail_every_command(
    classifier: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(classifier) / "config.json"
    config.write_text(config.read_text().replace("SequenceClassification", "MaskedLM"))
    out = ["--data", data, "--out", str(tmp_path / "out")]
    for arguments in (
        ["attribute", "--model", classifier, "--text", "a b", "--target", "c"],
        ["evaluate", "--model", classifier, *out],
        ["reproduce", "--model", classifier, "--quick", *out],
        ["models", classifier],
    ):
        assert main(arguments) == 1
        assert "lacks weights of BertForMaskedLM: cls.predictions." in capsys.readouterr().err


def test_one_text_decides_nothing(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a b c d e f")
    arguments = ["evaluate", "--model", folder, "--data", str(file), "--methods", "vw,random"]
    arguments += ["--rates", "0.5", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "One text does not give an interval" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert printed_json(capsys)["texts"]["sufficiency"]["better"] == {"random": [None]}


# ---------------------------------------------------------------------------------------------
# Chats

TEMPLATE = (
    "{% for m in messages %}U {{ m.content }} {% endfor %}{% if add_generation_prompt %}A"
    "{% if enable_thinking is defined and not enable_thinking %} T{% endif %}{% endif %}"
)


@pytest.mark.parametrize("target", [[], ["--target", "d e"]])
def test_a_chat_is_rendered_with_the_arguments_of_its_template(
    folder: str, tiny_tokenizer: Any, target: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    tiny_tokenizer.save_pretrained(folder)
    arguments = ["attribute", "--model", folder, "--text", "a b", *target, "--json", "--chat"]
    assert main(arguments) == 0
    assert [token.strip() for token in printed_json(capsys)["tokens"]] == ["U", "a", "b", "A"]
    assert main([*arguments, "--chat-template-kwargs", '{"enable_thinking": false}']) == 0
    printed = printed_json(capsys)
    assert [token.strip() for token in printed["tokens"]] == ["U", "a", "b", "A", "T"]
    assert len(printed["scores"]) == 5


@pytest.mark.parametrize("method", ["target", "contribution"])
def test_a_saved_chat_is_grouped_by_message(
    folder: str, tiny_tokenizer: Any, method: str, tmp_path: Path
) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    tiny_tokenizer.save_pretrained(folder)
    file = str(tmp_path / "chat.safetensors")
    arguments = ["attribute", "--model", folder, "--text", "a b", "--chat", "--method", method]
    template = ["--chat-template-kwargs", '{"enable_thinking": false}']
    assert main([*arguments, *template, "--out", file]) == 0
    loaded = captum_cw.Explanation.load(file)
    assert [token.strip() for token in loaded.tokens] == ["U", "a", "b", "A", "T"]
    assert loaded.by_message().tokens[0] == "user"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat-template-kwargs", "{}"], "give --chat too"),
        (["--chat", "--chat-template-kwargs", "[1]"], "'[1]' is not a JSON object"),
        (["--chat", "--chat-template-kwargs", "{x"], "'{x' is not a JSON object"),
    ],
)
def test_wrong_arguments_of_a_template_are_reported(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["attribute", "--model", "x", "--text", "Ice is cold", *arguments])
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atribute"], "Did you mean 'attribute'?"),
        (["attribute", "--method", "contributon"], "Did you mean 'contribution'?"),
        (
            ["evaluate", "--methods", "vw,atention"],
            "'atention' is unknown; known: target, input",
        ),
        (["evaluate", "--methods", "vw,atention"], "Did you mean 'attention'?"),
        (["evaluate", "--rates", "a"], "'a' is not a list of numbers"),
        (["evaluate", "--samples", "0"], "give 1 or more"),
        (["reproduce", "--only", "T1,f5B"], "Did you mean 'F5b'?"),
        (["evaluate", "--out", "x"], "Run captum-cw evaluate --help"),
    ],
)
def test_wrong_usage_is_reported_with_a_suggestion(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_wrong_usage_is_json_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["attribute", "--model", "x", "--text", "", "--json"])
    document = printed_json(capsys)
    assert document["type"] == "UsageError"
    assert "the text is empty" in document["error"]


def test_a_model_that_does_not_exist_is_reported(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", f"{folder}s"]) == 1
    assert "There is no such folder, and the hub does not answer." in capsys.readouterr().err
    assert main(["models", str(tmp_path)]) == 1
    assert "no config.json." in capsys.readouterr().err
    assert main(["models", "HuggingFaceTB/SmolLM2-135M-instruct"]) == 1
    err = capsys.readouterr().err
    assert "the hub does not answer. Did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'?" in err


def test_a_file_that_does_not_exist_is_reported(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = data.replace("letters", "letter")
    assert main(["attribute", "--model", "unused", "--file", wrong]) == 1
    assert f"There is no {wrong}." in capsys.readouterr().err
    for name, message in ((wrong, "not a file, or a folder"), ("gsm8", "Did you mean 'gsm8k'?")):
        assert main(["evaluate", "--model", "unused", "--data", name, "--out", "x"]) == 1
        assert message in capsys.readouterr().err


def test_a_missing_package_is_reported_before_anything_is_loaded(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert main(["evaluate", "--model", "unused", "--data", data, "--out", "x", "--json"]) == 1
    found = printed_json(capsys)
    assert found["type"] == "ImportError"
    assert found["error"].startswith("pandas is not installed")
    assert found["error"].endswith("pip install 'captum-cw[evaluate]'")


def test_a_text_that_is_too_long_is_reported_before_the_run(
    tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, long, short = str(tmp_path / "gpt2"), "b c " * 35, "b c"
    gpt2().save_pretrained(model)  # type: ignore[operator]  # its table has 64 positions
    tiny_tokenizer.save_pretrained(model)
    assert main(["attribute", "--model", model, "--text", long]) == 1
    assert "70 tokens" in capsys.readouterr().err
    file, out = tmp_path / "texts.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (short, long, short)))
    arguments = ["evaluate", "--model", model, "--data", str(file), "--batch-size", "1"]
    assert main([*arguments, "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "The longest text has 70 tokens" in told
    assert "Use --length to cut texts" in told
    assert not out.exists()
    assert main([*arguments, "--length", "64", "--rates", "0.5", "--out", str(out)]) == 0


def test_a_text_may_be_longer_than_the_config_says_where_the_model_runs_it(
    folder: str, tmp_path: Path
) -> None:
    """Rotary positions are not limited."""
    whole = " ".join((string.ascii_letters + string.digits) * 3)[: 2 * 140]
    assert main(["attribute", "--model", folder, "--text", whole]) == 0
    file = tmp_path / "long.txt"
    file.write_text(whole)
    arguments = ["--methods", "attention,random", "--rates", "0.5", "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--model", folder, "--data", str(file), *arguments]) == 0


def test_a_text_without_a_token_is_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "--model", folder, "--text", " "]) == 1
    assert "at least one token" in capsys.readouterr().err


def test_an_interrupted_run_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attribute, "run", interrupted)
    assert main(["attribute", "--model", "x", "--text", "Ice is cold", "--json"]) == 130
    assert printed_json(capsys) == {"error": "Interrupted.", "type": "KeyboardInterrupt"}


# ---------------------------------------------------------------------------------------------
# The program


def test_a_program_reads_json_alone(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "--model", folder, "--text", "a b", "--json"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["scores"]
    assert "Loading" in printed.err


def test_of_several_processes_one_tells_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["attribute", "--model", "unused", "--file", "missing", "--json"]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "There is no missing" in printed.err


def test_a_program_reads_the_exit_code_of_a_failure(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    failed = started("attribute", "--model", "unused", "--file", missing, "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["type"] == "FileNotFoundError"
    assert "Traceback" not in failed.stderr


def test_what_libraries_print_is_no_part_of_the_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> SimpleNamespace:
        print("a note")
        return SimpleNamespace(document={"found": [float("inf")]})

    monkeypatch.setattr(attribute, "run", run)
    assert main(["attribute", "--model", "x", "--text", "Ice is cold", "--json"]) == 0
    assert printed_json(capsys) == {"found": [None]}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["evaluate", "--help"], ["models"], ["--version"]]
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: list[str]) -> None:
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"from captum_cw.cli import main; main({arguments!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stderr.strip() == "False"


def test_the_package_runs_as_a_module() -> None:
    run = started("--version")
    assert run.stdout.strip() == captum_cw.__version__
    wrong = started("attribute", "--json")
    assert wrong.returncode == 2
    assert "required" in json.loads(wrong.stdout)["error"]


# ---------------------------------------------------------------------------------------------
# Options and completion


def test_choices_are_those_of_the_library() -> None:
    assert tuple(_HUB_SETS) == choices.DATA
    assert tuple(ITEMS) == choices.ITEMS
    assert tuple(PLANS) == choices.PRESETS
    for known, of in (
        (choices.REDUCTIONS, Reduction),
        (choices.SCORINGS, Scoring),
        (choices.RANKINGS, RankingScope),
        (choices.RATES_OF, RateOf),
        (choices.QUANTITIES, QuantityName),
        (choices.GRANULARITIES, Granularity),
        (choices.STATES, StateSpace),
        (choices.STARTS, Bos),
    ):
        assert known == get_args(of)


def test_the_least_count_can_be_typed() -> None:
    arguments = ["reproduce", "--out", "x", "--samples", "1", "--skip", "0"]
    found = parser().parse_args(arguments)
    assert (found.samples, found.skip) == (1, 0)


def test_every_option_is_explained() -> None:
    for command in commands().values():
        assert all(action.help for action in command._actions)


def examples(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each command in a help text."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if "captum-cw" in words[:1]:
            yield words[1 : words.index(">") if ">" in words else None]
        elif "captum_cw" in words:
            yield words[words.index("captum_cw") + 1 :]


@pytest.mark.parametrize("name", commands())
def test_examples_of_the_help_can_be_typed(name: str) -> None:
    found = list(examples((commands()[name].epilog or "").partition("examples:")[2]))
    assert 2 <= len(found) <= 5
    for arguments in found:
        assert parser().parse_args(arguments).command == name


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the completions of bash after some words."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "script").write_text(started("--print-completion", "bash").stdout)
    (folder / "texts.jsonl").touch()
    asked = """\
source ./script
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
function=$(complete -p captum-cw | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function captum-cw "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

    def complete(*words: str) -> list[str]:
        run = subprocess.run(
            ["bash", "-c", asked, "bash", "captum-cw", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], ["attribute", "evaluate", "reproduce", "models", "demo"]),
        (["ev"], ["evaluate"]),
        (["attribute", "--meth"], ["--method"]),
        (["attribute", "--model", "M", "--method", "v"], ["vwon", "vw"]),
        (["evaluate", "--methods", "relative"], ["relative-norm", "relative-norm-cosine"]),
        (["evaluate", "--data", "te"], ["texts.jsonl"]),
        (["reproduce", "--only", "F5"], ["F5a", "F5b", "F5c"]),
    ],
)
def test_bash_completes(completed: Any, words: list[str], offered: list[str]) -> None:
    assert completed(*words) == offered


@pytest.mark.parametrize("name", commands())
def test_completion_describes_commands_by_a_whole_sentence(name: str) -> None:
    """Completion scripts contain only the first line."""
    assert (commands()[name].description or "").splitlines()[0].endswith(".")


def test_scripts_offer_names_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    """To fish, the words of one line are one choice."""
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "fish"])
    asked = re.findall(r'-l (?:methods|only) -xka "\((.*)\)"', capsys.readouterr().out)
    assert len(asked) == 2
    for names in asked:
        offered = subprocess.run(["sh", "-c", names], capture_output=True, text=True, check=True)
        assert len(offered.stdout.splitlines()) > 10


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(word in script for word in ("captum-cw", "attribute", "contribution", "--reduction"))
