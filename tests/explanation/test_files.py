"""Explanations survive files and conversions to other libraries unchanged."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_cw import Explanation, explain
from captum_cw.explanation.heads import HeadMaps
from support.paths import ROOT

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture
def explanation(tiny_model: nn.Module, tiny_tokenizer: Any) -> Explanation:
    """An explanation with every kind of content."""
    tiny_tokenizer.chat_template = TEMPLATE
    chat = [{"role": "U", "content": "a b ?"}, {"role": "A", "content": "c d"}]
    return explain(tiny_model, tiny_tokenizer, chat, top_k=3)


def check_equal(found: Any, expected: Any) -> None:
    """Bit for bit, type for type."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.numpy().tobytes() == expected.numpy().tobytes()
    elif isinstance(expected, (Explanation, HeadMaps)):
        check_equal(vars(found), vars(expected))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, x in expected.items():
            check_equal(found[name], x)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    else:
        assert found == expected


def test_loading_restores_every_bit(explanation: Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "a.safetensors")
    loaded = Explanation.load(tmp_path / "a.safetensors")
    check_equal(loaded, explanation)
    assert loaded.messages is not None
    assert loaded.messages[0].role == "U"
    assert loaded.settings.keys() >= {"model", "space", "captum_cw", "torch", "transformers"}
    loaded.save(tmp_path / "b.safetensors")
    explanation.save(tmp_path / "a.safetensors")  # over the old one
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(files) == 2
    assert files[0] == files[1]


def test_plain_scores_are_saved_too(tmp_path: Path) -> None:
    batch = torch.tensor([[0.1, -0.0, float("nan")], [1.0, 2.0, 3.0]], dtype=torch.float64)
    given = Explanation(
        ["a", "\N{GRINNING FACE}", "\ud800"],
        {"ig/1": batch[0], "z": batch.half()[1], "a": batch[:, 1].repeat(2)[:3]},
        queries=[],
    )
    given.save(tmp_path / "scores")
    check_equal(Explanation.load(tmp_path / "scores"), Explanation(**{**vars(given), "heads": []}))


def test_a_write_that_fails_leaves_the_file_that_was(
    explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    explanation.save(path)
    before = path.read_bytes()

    def fails(tensors: Any, part: Path, metadata: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr("captum_cw.explanation.files.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        explanation.save(path)
    assert path.read_bytes() == before


def changed(path: Path, **changes: Any) -> None:
    """The same file with other metadata."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["captum_cw"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    content.update(changes)
    dropped = {name: x for name, x in content.items() if x is not ...}
    save_file(tensors, path, {"captum_cw": json.dumps(dropped)})


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is not a safetensors file"),
        "empty": (lambda p: p.write_bytes(b""), "is not a safetensors file"),
        "JSON": (lambda p: p.write_text('{"version": 1}' * 9), "is not a safetensors file"),
        "weights": (lambda p: save_file({"w": torch.ones(2)}, p), "does not hold a result"),
        "of others": (
            lambda p: save_file({"w": torch.ones(2)}, p, {"format": "pt"}),
            "does not hold a result",
        ),
        "no JSON": (
            lambda p: save_file({"w": torch.ones(2)}, p, {"captum_cw": "{"}),
            "does not hold a result",
        ),
        "later": (lambda p: changed(p, version=2), "version 2; this release reads 1"),
        "earlier": (lambda p: changed(p, version=0), "version 0; this release reads 1"),
        "another kind": (lambda p: changed(p, kind="faithfulness"), "but 'faithfulness'"),
        "no tokens": (lambda p: changed(p, tokens=...), "lacks 'tokens'"),
        "no tensor": (lambda p: changed(p, scores=["x"] * 9), "lacks 'scores/7'"),
        "other tokens": (lambda p: changed(p, tokens=["a"]), "damaged: scores.*for 1 tokens"),
    }.values(),
)
def test_damaged_and_other_files_are_refused(
    explanation: Explanation, tmp_path: Path, damage: Any, message: str
) -> None:
    path = tmp_path / "a.safetensors"
    explanation.save(path)
    damage(path)
    with pytest.raises(ValueError, match=message) as refused:
        Explanation.load(path)
    assert "a.safetensors" in str(refused.value)


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Explanation.load(tmp_path / "none")


def test_settings_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"torch\.float16.*JSON"):
        Explanation(["a"], {}, settings={"dtype": torch.float16}).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_table_has_one_row_per_token(explanation: Explanation) -> None:
    table = explanation.to_dataframe()
    assert list(table) == ["place", "token", "word", "word_number", *explanation.scores]
    assert table.token.tolist() == explanation.tokens
    unknown = [word is None for word in explanation.words or ()]
    assert table.word.isna().tolist() == table.word_number.isna().tolist() == unknown
    assert str(table.word_number.dtype) == "Int64"
    for name, x in explanation.scores.items():
        assert torch.equal(torch.tensor(table[name].to_numpy()), x)


def test_columns_hold_what_they_say() -> None:
    scores = {"ig": torch.tensor([1.0, 2.0, 4.0])}
    given = Explanation(["The", " cap", "ital"], scores, {"ig": torch.eye(3)}, words=[0, 1, 1])
    assert given.to_dataframe().word.tolist() == ["The", " capital", " capital"]
    words = given.by_word()
    assert list(words.to_dataframe()) == ["place", "word", "ig"]
    assert words.to_dataframe().word.tolist() == ["The", " capital"]
    assert list(words.to_dataframe("maps")) == ["query", "query_word", "place", "word", "ig"]


@pytest.mark.parametrize("ending", ["json", "html", "JSON"])
def test_the_ending_names_the_kind_of_file(
    explanation: Explanation, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    explanation.save(path)
    text = path.read_text("utf-8")
    if ending == "html":
        assert text == explanation.page()
        return
    found = json.loads(text)
    assert found == explanation.to_dict()
    assert found["tokens"] == explanation.tokens
    assert found["scores"]["target"] == explanation.scores["target"].tolist()
    assert found["settings"] == dict(explanation.settings)
    assert found["shares"].keys() == explanation.scores.keys()
    words = [(x.text, x.place, x.share, x.is_sink) for x in explanation.shares("target")]
    shares = [(x["word"], x["place"], x["share"], x["sink"]) for x in found["shares"]["target"]]
    assert shares == words
    assert sum(abs(x["share"]) for x in found["shares"]["target"]) == pytest.approx(1)
    assert "maps" not in found
    T = len(explanation.tokens)
    maps = explanation.to_dict(maps=True)["maps"]
    assert torch.tensor(maps["target"]).shape == (T, T)


def test_other_endings_are_refused(explanation: Explanation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in '\.pdf': an explanation is saved as"):
        explanation.save(tmp_path / "page.pdf")
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_first_release_has_no_effects(
    explanation: Explanation, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    before = [replace(layer, effect=None) for layer in explanation.heads]
    replace(explanation, heads=before).save(path)
    assert all(layer.effect is None for layer in Explanation.load(path).heads)
    explanation.save(path)
    for layer, loaded in zip(explanation.heads, Explanation.load(path).heads, strict=True):
        assert torch.equal(layer.effect, loaded.effect)


def test_a_long_table_has_a_row_for_each_query_and_token(explanation: Explanation) -> None:
    table = explanation.to_dataframe("maps")
    T = len(explanation.tokens)
    assert len(table) == T * T
    wide = table.pivot(index="query", columns="place", values="contribution-signed")
    assert torch.equal(torch.tensor(wide.to_numpy()), explanation.maps["contribution-signed"])
    row = table[(table["query"] == 3) & (table.place == 1)].iloc[0]
    assert (row.query_token, row.token) == (explanation.tokens[3], explanation.tokens[1])
    with pytest.raises(ValueError, match="of='heads'"):
        explanation.to_dataframe("heads")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ValueError, match="'token'"):
        Explanation(["a"], {"token": torch.ones(1)}).to_dataframe()


def test_a_data_set_has_named_dimensions(explanation: Explanation, tmp_path: Path) -> None:
    found = explanation.to_xarray()
    for name, x in explanation.scores.items():
        assert torch.equal(torch.tensor(found.scores.sel(measure=name).values), x)
    assert list(explanation.maps) == [name for name in explanation.scores if name != "input"]
    for name, x in explanation.maps.items():
        maps = found.maps.sel(measure=name).transpose("query", "key")
        assert torch.equal(torch.tensor(maps.values), x)
    assert found.token.values.tolist() == explanation.tokens
    assert found.predicted.values.tolist() == explanation.predicted
    words = [None if word != word else int(word) for word in found.word.values.tolist()]
    assert words == explanation.words
    for number, layer in enumerate(explanation.heads):
        at = found.isel(layer=number)
        assert at.layer_name == layer.name
        product = at.attention * at.relative_norm * at.cosine
        assert product.dims == ("head", "query", "rank")
        assert torch.equal(torch.tensor(product.values), layer.measure("contribution-signed"))
        assert torch.equal(torch.tensor(at.head_key.values), layer.keys)
        assert torch.equal(torch.tensor(at.output_norm.values), layer.output_norm)
        assert torch.equal(torch.tensor(at.share.values), layer.share)
    assert found.attrs["space"] == "attention"
    found.to_netcdf(tmp_path / "a.nc", engine="scipy")
    xarray.testing.assert_equal(xarray.load_dataset(tmp_path / "a.nc", engine="scipy"), found)


def test_layers_with_fewer_heads_are_filled_up() -> None:
    def layer(H: int, K: int) -> HeadMaps:
        x = torch.ones(H, 2, K)
        return HeadMaps(f"of {H}", x.int(), x, x, x, torch.ones(2), torch.ones(H, 2))

    found = Explanation(["a", "b"], {}, heads=[layer(1, 2), layer(3, 1)]).to_xarray()
    assert dict(found.sizes) == {
        "measure": 0,
        "key": 2,
        "query": 2,
        "layer": 2,
        "head": 3,
        "rank": 2,
    }
    assert found.share.notnull().sum("head").values.tolist() == [[1, 1], [3, 3]]
    assert (found.head_key[0, 1:] == -1).all()
    assert found.attention[1, :, :, 1].isnull().all()
    assert int(found.attention.notnull().sum()) == 1 * 2 * 2 + 3 * 2 * 1


def test_a_method_without_a_map_has_none_in_a_data_set() -> None:
    given = Explanation(
        ["a", "b"],
        {"ig": torch.ones(2)},
        {"x": torch.ones(1, 2)},
        queries=["q"],
        predicted=["p"],
        probability=torch.tensor([0.5]),
    )
    found = given.to_xarray()
    assert found.predicted.dims == found.probability.dims == ("query",)
    assert found.scores.sel(measure="x").isnull().all()
    assert found.maps.sel(measure="ig").isnull().all()
    assert found.query_token.values.tolist() == ["q"]


@pytest.mark.parametrize(("call", "name"), [("to_dataframe", "pandas"), ("to_xarray", "xarray")])
def test_a_library_that_is_missing_is_named_with_its_extra(
    call: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} is not installed.*captum-cw\[interchange\]"):
        getattr(Explanation(["a"], {}), call)()


def test_the_page_on_results_runs(
    tiny_model: nn.Module, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "howto" / "results.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny_model, "tokenizer": tiny_tokenizer}
    for block in blocks:
        exec(block, names)
