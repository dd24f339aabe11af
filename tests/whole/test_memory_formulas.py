"""The formulas of memory agree with the memory of small models, and the page has their table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import transformers

from captum_cw import ContributionWeights, TargetContributions, TokenScores
from captum_cw.capture import recomputing
from support.paths import ROOT

T = 1024


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("memory")


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_formulas_give_the_memory_of_a_small_model(
    memory: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = torch.finfo(dtype).bits // 8
    shape = memory.Shape(L=2, d=256, f=640, H=8, H_kv=4, d_h=32, V=64, b=b)
    config = transformers.LlamaConfig(
        vocab_size=shape.V,
        hidden_size=shape.d,
        intermediate_size=shape.f,
        num_hidden_layers=shape.L,
        num_attention_heads=shape.H,
        num_key_value_heads=shape.H_kv,
        max_position_embeddings=T,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    assert shape.weights == sum(p.nbytes for p in model.parameters())
    ids = torch.randint(0, shape.V, (1, T), generator=torch.Generator().manual_seed(0))
    scores = TokenScores(ContributionWeights(model))
    target = TokenScores(TargetContributions(model))

    def forward() -> object:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False)

    def recomputed() -> object:
        monkeypatch.setattr(recomputing, "SHARE", 0.0)
        return target.attribute(ids, target=3)

    calls: dict[str, Callable[[], object]] = {
        "forward": forward,
        "scores": lambda: scores.attribute(ids),
        "target": lambda: target.attribute(ids, target=3),
        "target_recomputed": recomputed,
    }
    scores.attribute(ids[:, :4])  # what is found out once about a model
    target.attribute(ids[:, :4], target=3)
    for name, call in calls.items():
        found, expected = memory.peak_bytes(call), getattr(shape, name)(T)
        assert 0.7 < found / expected < 1.3, (name, found, expected)


def test_the_page_has_the_table_of_the_formulas(memory: ModuleType) -> None:
    page = (ROOT / "docs" / "howto" / "what_fits.md").read_text("utf-8")
    assert memory.table() in page
