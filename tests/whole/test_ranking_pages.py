"""The benchmarks of rankings: their formulas, their tables and their pages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_cw import EffectContributions, TokenScores, measures, remove_values
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


def test_the_page_of_rankings(
    ranking: ModuleType, tiny_model: Any, tiny_tokenizer: Any, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    arguments = ["--model", str(folder), "--data", f"letters={texts}", "--length", "6"]
    arguments += ["--samples", "3", "--batch-size", "2"]
    arguments += ["--scores", "effect, frozen;random;target, plain;input, frozen"]
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert ranking.main([*arguments, *folders]) == 0
    finally:
        torch.set_num_threads(threads)
    (page,) = tmp_path.glob("ranking-*.md")
    text = page.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "3 documents" in text
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    names = [cell for cell in cells if not cell.startswith("---")]
    of_pairs = ["score", "contribution", "random", "effect, frozen", "target, plain"]
    of_head = [name for name in of_pairs if name != "target, plain"]
    leader = ["score", "contribution", "effect, frozen"]
    of_tokens = [*of_pairs, "input, frozen"]
    expected = [of_pairs, of_pairs, of_head, of_tokens, *[leader] * 5]
    assert names == [name for table in expected for name in table * 2]


def test_normalised_scores_by_hand(ranking: ModuleType) -> None:
    class Result:
        records = (
            {"clean_nll": 1.0, "nll": {"a": _sides(2.0, 9.0), "b": _sides(4.0, 3.0)}},
            {"clean_nll": 0.0, "nll": {"a": _sides(1.0, 2.0), "b": _sides(3.0, 6.0)}},
        )

    rows = ranking.normalised(Result, ["a", "b"]).splitlines()[2:]
    assert [row.split(" | ")[1].partition(" ")[0] for row in rows] == ["1.00", "0.00"]
    assert [row.split(" | ")[2].partition(" ")[0] for row in rows] == ["0.50", "0.50"]


def _sides(bottom: float, top: float) -> dict[str, list[float]]:
    return {"bottom": [bottom], "top": [top]}


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
