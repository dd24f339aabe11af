"""The benchmarks of rankings: their formulas, their tables and their pages."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from torch import Tensor

from captum_cw import (
    ComprehensivenessSufficiency,
    EffectContributions,
    TokenScores,
    VWAttention,
    measures,
    remove_values,
)
from captum_cw.functional import AttentionLayer, QueryMask, dense_map
from support.inputs import token_ids
from support.models import llama
from support.paths import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    peers = importlib.import_module("peers_of_removal")
    for name in peers.PEERS:
        if measures.find(name) is not None:
            measures.unregister(name)


@pytest.fixture
def ranking() -> ModuleType:
    return importlib.import_module("ranking")


@pytest.fixture
def datamodelling() -> ModuleType:
    return importlib.import_module("datamodelling")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    rows = ("a b c d e f g h", "h g f e d c b a", "c d c d a b a b", "a c e g b d f h")
    file.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return file


def test_peers_by_their_formulas() -> None:
    peers = importlib.import_module("peers_of_removal")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)

    mask = QueryMask(4, 4, causal=True)
    a = normal(1, 2, 4, 4).masked_fill(~torch.ones(4, 4).tril().bool(), -1e9).softmax(-1)
    value, weight = normal(1, 2, 4, 3), normal(2, 3, 6)
    layer = AttentionLayer.from_tensors(a, value, weight, mask)
    heads = torch.einsum("bhts,bhsk->bhtk", a, value)
    projected = torch.einsum("bhsk,hkd->bhsd", value, weight)
    output = torch.einsum("bhts,bhsd->btd", a, projected)
    expected: dict[str, Tensor] = {name: torch.zeros_like(a) for name in peers.PEERS}
    for h in range(2):
        for i in range(4):
            for j in range(i + 1):
                w, v, p = a[0, h, i, j], value[0, h, j], projected[0, h, j]
                o = output[0, i]
                c, r = w * (o @ p) / (o @ o), w * p.norm() / o.norm()
                of = {
                    "VATP": w * v.abs().sum(),
                    "CriticalKV": (w + 1e-4) * p.norm(),
                    "OBCache": w**2 * (v @ v),
                    "CAOTE": w / (1 - w).clamp(min=2.3e-16) * (v - heads[0, h, i]).norm(),
                    "marginal-30": 0.6 * c + 0.4 * r**2,
                    "marginal-70": 1.4 * c - 0.4 * r**2,
                }
                for name, x in of.items():
                    expected[name][0, h, i, j] = x
    for name, (measure, _) in peers.PEERS.items():
        found = dense_map(layer, measure)
        if name == "CAOTE":  # the first query sees one key, and 0 / 0 is any number
            found, expected[name] = found[:, :, 1:], expected[name][:, :, 1:]
        torch.testing.assert_close(found, expected[name])


def test_scores_that_were_evaluated_apart_are_joined(ranking: ModuleType) -> None:
    metric = ComprehensivenessSufficiency(llama(), ranking.RATES, scoring="clean")
    methods, ids = {"vw": "vw", "attention": "attention"}, token_ids()
    apart = [metric.evaluate({x: x}, ids, show_progress=False) for x in methods]
    together = metric.evaluate(methods, ids, show_progress=False)
    assert ranking.joined(apart).records == together.records
    other = metric.evaluate({"vw": "vw"}, ids.flip(1), show_progress=False)
    with pytest.raises(ValueError, match="of different texts"):
        ranking.joined([apart[1], other])


def test_kvzip_plus_by_its_formula() -> None:
    peers = importlib.import_module("peers_of_removal")
    model = llama().double()
    lengths = VWAttention(model).attribute(token_ids())
    with torch.no_grad():
        streams = model(token_ids(), output_hidden_states=True).hidden_states
    found = peers.KVzipPlus(model).attribute(token_ids())
    for x, length, stream in zip(found, lengths, streams[:-1], strict=True):
        torch.testing.assert_close(x, length / stream.norm(dim=-1)[:, None, :, None].float())


@pytest.fixture
def model_folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_tokenizer.eos_token = "?"
    # Line breaks are unknown words.
    split = Split(Regex(r"\n|\w"), "removed", invert=True)
    tiny_tokenizer.backend_tokenizer.pre_tokenizer = split
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def written(module: ModuleType, arguments: list[str], out: Path) -> None:
    threads = torch.get_num_threads()
    folders = ["--work", str(out.parent / "work"), "--out", str(out)]
    try:
        assert module.main([*arguments, *folders]) == 0
    finally:
        torch.set_num_threads(threads)


def first_columns(text: str, column: int) -> list[str]:
    cells = [line.split("|")[column].strip() for line in text.splitlines() if line[:1] == "|"]
    return [cell for cell in cells if not cell.startswith("---")]


def test_the_pages_of_rankings(
    ranking: ModuleType, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(model_folder), "--data", f"letters={texts}", "--length", "6"]
    arguments += ["--samples", "3", "--batch-size", "2", "--settings"]
    out = tmp_path / "pages"
    written(ranking, [*arguments, "layer,token,global,max"], out)
    everything = (out / "rankings.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in everything
    assert "3 documents" in everything
    expected = []
    for key in ("layer", "token", "global", "max"):
        methods = ["contribution", *ranking.REPORTED[key].names]
        expected += ["method", *methods, "score", *methods]
    assert first_columns(everything, 1) == expected
    for question, key in (("pairs", "global"), ("tokens", "token")):
        assert (out / f"{question}.png").stat().st_size > 1000
        page = (out / f"{question}.md").read_text(encoding="utf-8")
        first, _, marks = page.partition("<!-- end of first -->")
        scores = ranking.QUESTIONS[question][2]
        assert first_columns(first, 2) == ["score", "contribution", *scores]
        assert set(first_columns(marks, 1)) - {"ranking"} <= {"global", "layer", "max", "token"}
        assert key in first_columns(marks, 1)

    written(ranking, [*arguments, "layer,token,global,max", "--finished"], out)
    assert (out / "rankings.md").read_text("utf-8").replace(" --finished", "") == everything
    records = tmp_path / "work" / "model" / "letters, last"
    (records / "layer" / "vwon.records").unlink()
    lines = (records / "max" / "contribution.records").read_text("utf-8").splitlines()
    (records / "max" / "contribution.records").write_text("\n".join(lines[:-1]), "utf-8")
    written(ranking, [*arguments, "layer,token,global,max", "--finished"], out)
    left = first_columns((out / "rankings.md").read_text("utf-8"), 1)
    for _ in range(2):  # both tables of the setting "layer"
        expected.remove("vwon")
    assert left == expected[:-12]
    assert not (records / "layer" / "vwon.records").exists()

    written(ranking, [*arguments, "expected", "--first"], out)
    tried = (out / "rankings-tried.md").read_text(encoding="utf-8")
    assert "The first 3 documents" in tried
    assert set(first_columns(tried, 1)) == {"method", "score", "contribution", *ranking.LEADERS}


def test_settings_and_texts_are_added_to_pages(
    ranking: ModuleType, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    pages = importlib.import_module("pages")
    arguments = ["--model", str(model_folder), "--length", "6", "--samples", "3", "--settings"]
    letters, other = (["--data", f"{name}={texts}"] for name in ("letters", "other"))
    out, whole = tmp_path / "pages", tmp_path / "whole"
    written(ranking, [*arguments, "global", *letters], out)
    first = pages.part_of(out / "pairs.md", "first")
    written(ranking, [*arguments, "max", *letters, "--add"], out)
    written(ranking, [*arguments, "global,max", *letters], whole)
    found, expected = (pages.sections_of(of / "rankings.md") for of in (out, whole))
    assert "--settings max --data letters=texts.jsonl --add" in found.pop("")
    assert list(found.items()) == [*expected.items()][1:]
    marks = pages.part_of(whole / "pairs.md", "all")
    assert pages.part_of(out / "pairs.md", "all") == marks
    assert pages.part_of(out / "pairs.md", "first") == first
    assert not (out / "tokens.md").exists()
    assert pages.part_of(out / "pairs.md", "command").count("benchmarks/ranking.py") == 2

    written(ranking, [*arguments, "max", *other, "--add"], out)
    both = pages.part_of(out / "pairs.md", "all")
    assert both.startswith("Each cell has a mark for model, letters; model, other, in this order.")
    for before, after in zip(marks.splitlines()[4:], both.splitlines()[4:], strict=True):
        second = "." if "| global" in before else r"\1"  # the same texts by another name
        assert after == re.sub(r"`([-+~])`", rf"`\1{second}`", before)

    page = out / "pairs.md"
    old = re.sub(r"letters \| joint \|.*", "letters | joint | old |", page.read_text())
    page.write_text(old)
    assert pages.part_of(page, "first") != first
    written(ranking, [*arguments, "global", *other, *letters, "--add"], out)
    written(ranking, [*arguments, "global", *letters, *other], whole)
    assert pages.part_of(page, "first") == pages.part_of(whole / "pairs.md", "first")


def test_words_around_the_parts_of_a_page_stay(tmp_path: Path) -> None:
    pages = importlib.import_module("pages")
    page = tmp_path / "page.md"
    pages.fill_page(page, "Why?", {"first": "1", "all": "2"})
    page.write_text(page.read_text().replace("<!-- end of first -->", "<!-- end of first -->Words"))
    pages.fill_page(page, "Why?", {"all": "3", "first": "4"})
    text = page.read_text()
    lines = [line for line in text.replace("<!-- end of first -->", "").splitlines() if line]
    assert [line for line in lines if line[:2] != "<!"] == ["# Why?", "4", "Words", "3"]
    with pytest.raises(ValueError, match="<!-- other -->"):
        pages.fill_page(page, "Why?", {"other": "5"})


@pytest.mark.parametrize("rises", [False, True])
def test_places_between_the_worst_and_the_best_by_hand(ranking: ModuleType, rises: bool) -> None:
    sides = [
        {"a": _sides(2.0, 9.0), "b": _sides(4.0, 3.0)},
        {"a": _sides(1.0, 2.0), "b": _sides(3.0, 6.0)},
    ]
    losses = [{"values": of, "nll": of, "clean_nll": 0.0, "count": 1} for of in sides]
    # A quantity that falls where its loss rises, beside a likelihood of the text that does not.
    falling = [
        {
            "values": {name: _sides(*(-x for (x,) in of.values())) for name, of in text.items()},
            "nll": {name: _sides(*(-x for (x,) in of.values())) for name, of in text.items()},
        }
        for text in sides
    ]
    rates = {"bottom": (0.5,), "top": (0.1,)}
    settings = {"quantity": "log_prob" if rises else "nll", "higher_is_better": rises}
    result = ranking.FaithfulnessResult(rates, settings, falling if rises else losses)
    found = ranking.places(result)
    assert {name: mean for name, (mean, *_) in found["bottom"].items()} == {"a": 1.0, "b": 0.0}
    assert {name: mean for name, (mean, *_) in found["top"].items()} == {"a": 0.5, "b": 0.5}


def _sides(bottom: float, top: float) -> dict[str, list[float]]:
    return {"bottom": [bottom], "top": [top]}


def test_marks_of_correlations_are_of_pairs(datamodelling: ModuleType) -> None:
    """The scores differ little from each other, and much from text to text."""
    reference = torch.tensor([0.1, 0.3, 0.5, 0.7])
    assert datamodelling.cell(reference, reference).startswith("0.400 (0.")
    assert datamodelling.cell(reference + 0.01, reference).startswith("**0.410** (0.")
    assert datamodelling.cell(reference - 0.01, reference).startswith("0.390 - (0.")
    other = reference + torch.tensor([0.01, -0.01, 0.01, -0.01])
    assert datamodelling.cell(other, reference).startswith("0.400 ~ (0.")


def test_sums_of_scores_against_random_removals(datamodelling: ModuleType) -> None:
    model = llama().double()
    batch = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    found = datamodelling.of_batch(model, batch, 0.2, 6, seed=3)
    target = datamodelling.OwnText.of(batch["input_ids"], batch["attention_mask"].bool())
    method = TokenScores(EffectContributions(model, form="effect"), "sum", layers=None, heads=None)
    scores = method.attribute(batch, target=target)
    B, L, H, S = scores.shape
    generator = torch.Generator().manual_seed(3)
    sums, lost = [], []
    for _ in range(6):
        gone = torch.rand(B, L, H, S, generator=generator) < 0.2
        gone[..., 0] = False
        with torch.no_grad(), remove_values(model, [gone[:, n] for n in range(L)]):
            logits = model(**batch).logits.log_softmax(-1)[:, :-1]
        lost.append(-logits.gather(-1, batch["input_ids"][:, 1:, None]).mean((1, 2)))
        sums.append((scores.double() * gone).sum((1, 2, 3)))
    for b in range(B):
        order = [sorted(range(6), key=lambda n, x=x: float(x[n][b])) for x in (sums, lost)]
        places = torch.tensor([[o.index(n) for n in range(6)] for o in order]).double()
        expected = float(torch.corrcoef(places)[0, 1])
        assert found["effect, frozen"][b] == pytest.approx(expected)


def test_a_hidden_key_is_masked_and_a_mean_is_that_of_its_head() -> None:
    replacements = importlib.import_module("replacements")
    model, ids = llama(), token_ids()
    T = ids.shape[1]
    kept = torch.ones(1, 4, T)
    kept[:, :, 2], kept[:, :, 5] = 0, 0
    real = torch.ones_like(ids, dtype=torch.bool)

    def found(how: str, factors: list[Tensor | None]) -> Tensor:
        with torch.no_grad(), replacements.replaced(model, factors, how, real):
            logits: Tensor = model(ids).logits
        return logits

    def written(module: Any, args: Any, value: Tensor) -> Tensor:
        value = value.clone()
        value[:, [2, 5]] = value.mean(1, keepdim=True)
        return value

    expected: dict[str, Tensor] = {}
    before = model.config._attn_implementation
    seen = torch.ones(T, T).tril().bool()
    seen[:, [2, 5]] = False
    mask = torch.zeros(2, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected["hidden"] = model(ids, attention_mask=mask).logits
        with remove_values(model, [kept == 0, torch.zeros(1, 4, T, dtype=torch.bool)]):
            expected["zero"] = model(ids).logits
        hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(written)
        expected["mean"] = model(ids).logits
        hook.remove()
    torch.testing.assert_close(found("hidden", [kept, kept]), expected["hidden"])
    torch.testing.assert_close(found("zero", [kept, None]), expected["zero"])
    torch.testing.assert_close(found("mean", [kept, None]), expected["mean"])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["prediction", "replacements", "datamodelling"])
def test_other_pages(
    name: str, model_folder: Path, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    module = importlib.import_module(name)
    file = tmp_path / "texts.jsonl"
    rows = ("a b c d e f g h", "h g f e d c b a", "c d c d a b a b")
    if name == "prediction":  # with the word that the model predicts
        texts = []
        for row in rows:
            ids = tiny_tokenizer(row, return_tensors="pt").input_ids
            begin = torch.tensor([[module.begin_token(tiny_tokenizer)]])
            with torch.no_grad():
                best = tiny_model(torch.cat([begin, ids], 1)).logits[0, -1].argmax()
            texts.append(f"{row} {tiny_tokenizer.decode(best).strip()}")
        rows = tuple(texts)
    file.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    out = tmp_path / "pages"
    arguments = ["--model", str(model_folder), "--data", f"letters={file}", "--samples", "2"]
    written(module, arguments, out)
    text = (out / f"{name}.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    first, _, tables = text.partition("<!-- tables -->")
    if name == "datamodelling":
        expected = ["score", *module.SCORES]
    else:
        settings = list(module.HOWS if name == "replacements" else module.SETTINGS)
        marks = first.partition("<!-- all -->")[2] if name == "prediction" else first
        assert list(dict.fromkeys(first_columns(marks, 1)[1:])) == settings
        expected = ["method", *module.COMPARED] * len(settings)
    if name == "prediction":
        own = first.partition("<!-- all -->")[0]
        assert first_columns(own, 2) == ["score", "contribution", *module.FIRST]
        # The second table is of whole tokens.
        expected += [*module.OF_TOKENS, "input x gradient", "Integrated Gradients", "ablation"]
    assert first_columns(tables, 1) == expected
    kinds = {
        "prediction": ("-pair", "-token"),
        "replacements": ("-zero", "-mean", "-hidden"),
        "datamodelling": ("",),
    }[name]
    assert {path.name for path in out.glob("*.png")} == {f"{name}{kind}.png" for kind in kinds}
    assert all(f"]({name}{kind}.png)" in text for kind in kinds)

    written(module, [*arguments, "--finished"], out)
    assert (out / f"{name}.md").read_text("utf-8").replace(" --finished", "") == text


def test_ablation_removes_one_token_after_another() -> None:
    prediction = importlib.import_module("prediction")
    model, ids = llama(), token_ids()[:1]
    found = prediction.ablation(model, {"input_ids": ids})
    T, lost = ids.shape[1], []
    with torch.no_grad():
        clean = model(ids).logits[0, -1].log_softmax(-1)
        best = int(clean.argmax())
        for j in range(T):
            gone = torch.zeros(1, 4, T, dtype=torch.bool)
            gone[..., j] = True
            with remove_values(model, [gone, gone]):
                lost.append(float(clean[best] - model(ids).logits[0, -1].log_softmax(-1)[best]))
    assert found[0].tolist() == pytest.approx(lost, abs=1e-6)
