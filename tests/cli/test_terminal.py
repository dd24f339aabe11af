"""The command line on terminals with few characters, and after its output is closed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from captum_cw.cli import main
from captum_cw.models import loading
from support.models import SIZES, build
from support.paths import ROOT

#: A Windows code page and ASCII lack some of these characters.
WORDS = ["ж", "→", "中", "é", "a", "b"]
#: Environment variables that simulate terminals that cannot show them.
TERMINALS = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts of these words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = tmp_path_factory.mktemp("terminal")
    model = Tokenizer(WordLevel({word: n for n, word in enumerate(["?", *WORDS])}, unk_token="?"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?")
    tokenizer.eos_token = "b"
    tokenizer.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 7}, num_key_value_heads=2)
    build(transformers.LlamaForCausalLM, config).save_pretrained(folder / "model")  # type: ignore[operator]
    rows = ("ж → 中 é a b ж", "é a b ж → 中 é")
    lines = (json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def command(name: str, place: Path, out: Path) -> list[str]:
    model, data = str(place / "model"), str(place / "texts.jsonl")
    return {
        "attribute": ["attribute", "--model", model, "--text", "ж → 中 é", "--out", f"{out}.html"],
        "target": ["attribute", "--model", model, "--text", "ж → é", "--target", "中"],
        "evaluate": [
            "evaluate",
            "--model",
            model,
            "--data",
            data,
            "--methods",
            "vw,random",
            "--rates",
            "0.5",
            "--out",
            str(out),
        ],
        "reproduce": [
            "reproduce",
            "--model",
            model,
            "--data",
            data,
            "--quick",
            "--only",
            "T2",
            "--out",
            str(out),
        ],
        "models": ["models"],
        "layers": ["models", model],
        "failure": ["attribute", "--model", f"{model}→", "--text", "ж"],
        "usage": ["attribute", "--model", model, "--text", "ж", "--method", "→"],
    }[name]


DEMO = """\
import sys
from captum_cw.cli import demo, main
from captum_cw.models.loading import load_model
demo.load_demo_model = lambda: load_model(sys.argv[1])
sys.exit(main(["demo", "--text", "ж → 中", "--out", sys.argv[2]]))
"""


def environment(**settings: str) -> dict[str, str]:
    drop = ("LC_", "LANG", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE")
    kept = {name: x for name, x in os.environ.items() if not name.startswith(drop)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **settings}


def started(arguments: list[str], **settings: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**settings),
        capture_output=True,
        check=False,
    )


COMMANDS = ["attribute", "target", "evaluate", "reproduce", "layers", "models"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("name", [*COMMANDS, "failure"])
def test_no_stream_is_given_what_it_cannot_show(
    name: str, encoding: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(command(name, place, tmp_path / "вых")) == (name == "failure")
    shown = [stream.buffer.getvalue() for stream in streams]  # type: ignore[attr-defined]
    assert shown[name == "failure"]
    if name == "attribute":
        assert rb"\u4e2d" in shown[0]


@pytest.mark.parametrize(
    ("name", "terminal"),
    [
        ("attribute", "C"),
        *(pytest.param(n, t, marks=pytest.mark.slow) for n in COMMANDS for t in TERMINALS),
    ],
)
def test_no_character_ends_a_command(name: str, terminal: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "вых"
    run = started(["-m", "captum_cw", *command(name, place, out)], **TERMINALS[terminal])
    assert run.returncode == 0, run.stderr.decode()
    assert b"Traceback" not in run.stderr
    if name == "attribute":
        assert rb"\u4e2d" in run.stdout
        page = Path(f"{out}.html").read_text(encoding="utf-8")
        assert all(json.dumps(word)[1:-1] in page for word in WORDS[:4])  # in the page's data


@pytest.mark.slow
@pytest.mark.parametrize("terminal", TERMINALS)
def test_no_character_ends_the_demo(terminal: str, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "demo.py"
    file.write_text(DEMO, encoding="utf-8")
    arguments = [str(file), str(place / "model"), str(tmp_path / "out")]
    run = started(arguments, **TERMINALS[terminal])
    assert run.returncode == 0, run.stderr.decode()
    page = (tmp_path / "out" / "explanation.html").read_text(encoding="utf-8")
    assert json.dumps("中")[1:-1] in page  # in its data


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize(
    ("name", "code"), [pytest.param("failure", 1, marks=pytest.mark.slow), ("usage", 2)]
)
def test_no_character_ends_a_message(
    name: str, code: int, terminal: str, place: Path, tmp_path: Path
) -> None:
    run = started(["-m", "captum_cw", *command(name, place, tmp_path)], **TERMINALS[terminal])
    assert run.returncode == code
    assert b"captum-cw attribute: error: " in run.stderr
    assert b"Traceback" not in run.stderr


def test_text_of_the_shell_is_read_as_utf8_in_any_locale(place: Path, tmp_path: Path) -> None:
    arguments = command("target", place, tmp_path)
    run = started(["-m", "captum_cw", *arguments, "--json"], **TERMINALS["C"])
    assert run.returncode == 0, run.stderr.decode()
    document = json.loads(run.stdout)
    assert [token.strip() for token in document["tokens"]] == ["ж", "→", "é"]
    assert document["target"] == "中"


# ---------------------------------------------------------------------------------------------
# Pipes


def closed_after(count: int, arguments: list[str]) -> tuple[int, str]:
    """Read ``count`` bytes of a command's output, close it, and return exit code and messages."""
    process = subprocess.Popen(
        [sys.executable, "-m", "captum_cw", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if count:
        assert process.stdout.read(count)
    process.stdout.close()
    told = process.stderr.read().decode()
    return process.wait(timeout=120), told


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("attribute", ["--json"]),
        *(
            pytest.param(name, more, marks=pytest.mark.slow)
            for name in ("attribute", "evaluate", "reproduce", "layers")
            for more in ([], ["--json"])
        ),
    ],
)
def test_a_pipe_that_closes_ends_a_command_quietly(
    name: str, more: list[str], place: Path, tmp_path: Path
) -> None:
    code, told = closed_after(0, [*command(name, place, tmp_path / "out"), *more])
    assert code == 141
    assert "Traceback" not in told
    assert "BrokenPipe" not in told
    if name == "evaluate":  # the results were saved before
        assert (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["models", "--json"]])
def test_a_pipe_that_closes_ends_what_needs_no_model(arguments: list[str]) -> None:
    code, told = closed_after(0, arguments)
    # argparse ignores a pipe that is closed when it writes, but it may also close a moment later.
    assert code in ((0, 141) if "--help" in arguments else (141,))
    assert not told


def test_a_failure_is_reported_if_nobody_reads_the_output(tmp_path: Path) -> None:
    arguments = ["attribute", "--model", "x", "--file", str(tmp_path / "missing")]
    code, told = closed_after(0, arguments)
    assert code == 1
    assert "There is no" in told


def test_another_broken_pipe_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from captum_cw.cli import attribute

    def run(options: Any) -> None:
        raise BrokenPipeError("The helper has gone.")

    monkeypatch.setattr(attribute, "run", run)
    assert main(["attribute", "--model", "x", "--text", "Ice is cold"]) == 1
    assert "The helper has gone." in capsys.readouterr().err
