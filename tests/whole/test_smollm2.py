"""The main statements hold on real weights: SmolLM2-135M-Instruct."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    Explanation,
    LLMTokenAttribution,
    TargetContributions,
    TokenScores,
    explain,
    measures,
    remove_tokens,
)
from captum_cw.data import load_texts, token_batches
from captum_cw.metrics import with_shuffled_weights
from support import reference
from support.measures import MEASURES_AND_INTRA
from support.models import IMPLEMENTATIONS
from support.paths import shared_data
from support.reference import eager_layers
from support.state import state_of

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "She sold 48 clips in April, and then half as many clips in May. How many did she sell?",
)


@pytest.fixture(scope="module")
def model(smollm2: tuple[nn.Module, Any]) -> nn.Module:
    return smollm2[0]


@pytest.fixture(scope="module")
def texts(smollm2: tuple[nn.Module, Any]) -> list[Tensor]:
    return [smollm2[1](text, return_tensors="pt").input_ids for text in TEXTS]


def batch(texts: list[Tensor], side: str) -> dict[str, Tensor]:
    """Both texts; the shorter one is padded."""
    short, long = texts
    missing = long.shape[1] - short.shape[1]
    padding = (missing, 0) if side == "left" else (0, missing)
    ids = [nn.functional.pad(short, padding, value=2), long]
    mask = [nn.functional.pad(torch.ones_like(short), padding), torch.ones_like(long)]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}


@pytest.fixture(autouse=True)
def sdpa_afterwards(model: nn.Module) -> Any:
    yield
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_measure_equals_the_definition(
    model: nn.Module, texts: list[Tensor], implementation: str
) -> None:
    ids = texts[0]
    seen = eager_layers(model, input_ids=ids)
    model.set_attn_implementation(implementation)
    found = {name: method(model).attribute(ids) for name, method in MEASURES_AND_INTRA.items()}
    assert all(len(maps) == len(seen) == 30 for maps in found.values())
    for number, layer in enumerate(seen):
        expected = reference.measures(layer.attention, layer.value, layer.output_weight)
        for name, maps in found.items():
            assert maps[number].shape == (1, 9, ids.shape[1], ids.shape[1])
            scale = float(expected[name].abs().max())
            error = float((maps[number].double() - expected[name]).abs().max())
            # The reference reads the attention of another kernel, in float32.
            assert error <= 1e-4 * scale, (number, name)


def test_token_scores_equal_the_definition(model: nn.Module, texts: list[Tensor]) -> None:
    ids = texts[0]
    T = ids.shape[1]
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(1, 9, T, T)
    seen = eager_layers(model, input_ids=ids)
    for reduction in ("mean", "sum", "max", "rms"):
        method = TokenScores(ContributionWeights(model), reduction, layers=None, heads=None)
        scores = method.attribute(ids)
        for number in (0, 13, 29):
            g = reference.measures(
                seen[number].attention, seen[number].value, seen[number].output_weight
            )
            expected = reference.token_scores(g["inter"], visible, reduction)
            assert torch.allclose(scores[:, number].double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scope", ["inter", "intra"])
def test_contributions_sum_to_one(model: nn.Module, texts: list[Tensor], scope: Any) -> None:
    method = ContributionWeights(model, scope=scope)
    maps, deltas = method.attribute(texts[1], return_convergence_delta=True)
    assert max(float(delta.abs().max()) for delta in deltas) <= 1e-5
    for x in maps:
        sums = x.sum((1, 3) if scope == "inter" else 3)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_contributions_sum_to_one_percent_in_bfloat16(
    model: nn.Module, texts: list[Tensor], implementation: str
) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.set_attn_implementation(implementation)
    maps, deltas = ContributionWeights(half).attribute(texts[1], return_convergence_delta=True)
    assert max(float(delta.abs().max()) for delta in deltas) <= 1e-2
    for sums in (x.sum((1, 3)) for x in maps):
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=2e-2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_padded_batch_equals_its_single_examples(
    model: nn.Module, texts: list[Tensor], side: str, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    inputs = batch(texts, side)
    real = inputs["attention_mask"].bool()
    for method in (
        TokenScores(ContributionWeights(model)),
        TokenScores(ContributionWeights(model), queries=-1, reduction="max"),
    ):
        scores = method.attribute(inputs)
        assert not scores[~real].any()
        for b, ids in enumerate(texts):
            alone = method.attribute(ids)[0]
            assert torch.allclose(scores[b][real[b]], alone, rtol=1e-3, atol=1e-5)
    layer = model.get_submodule("model.layers.20.self_attn")
    for name in ("vw", "vwon"):
        maps = MEASURES_AND_INTRA[name](model, layer).attribute(inputs)
        for b, ids in enumerate(texts):
            alone = MEASURES_AND_INTRA[name](model, layer).attribute(ids)[0]
            inside = maps[b][:, real[b]][:, :, real[b]]
            assert torch.allclose(inside, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_model_computes_the_same_and_is_left_as_it_was(
    model: nn.Module, texts: list[Tensor], implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    before = state_of(model)
    with torch.no_grad():
        alone = model(input_ids=texts[1]).logits
    observed: list[Tensor] = []

    def forward(ids: Tensor) -> Tensor:
        observed.append(model(input_ids=ids).logits)
        return observed[-1]

    layers = [layer.self_attn for layer in model.model.layers]
    ContributionWeights(forward, layers).attribute(texts[1])
    assert torch.equal(observed[0], alone)
    assert state_of(model) == before


def test_the_answer_is_drawn_from_the_question(smollm2: tuple[nn.Module, Any]) -> None:
    model, tokenizer = smollm2
    llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
    result = llm.attribute("The capital of France is", target=" Paris")
    assert result.output_probs is not None
    assert float(result.output_probs[0]) > 0.3
    words = dict(zip(result.input_tokens, result.token_attr[0].tolist(), strict=True))
    assert words[" France"] > words[" of"]


# -- faithfulness ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems(smollm2: tuple[nn.Module, Any]) -> Tensor:
    """Four texts of 128 tokens."""
    (batch,) = token_batches(
        load_texts(shared_data("gsm8k_test.jsonl")),
        smollm2[1],
        max_length=128,
        num_examples=4,
        batch_size=4,
        pack=True,
    )
    return batch["input_ids"]


@pytest.mark.slow
def test_contributions_find_what_matters_best_and_chance_worst(
    model: nn.Module, problems: Tensor
) -> None:
    methods = {name: name for name in (*measures.names(), "random")}
    for scoring, rates in (
        ("online", {"top": [0.1], "bottom": [0.5, 0.7]}),
        ("clean", {"top": [0.3]}),
    ):
        metric = ComprehensivenessSufficiency(model, rates, scoring=scoring)
        result = metric.evaluate(methods, problems)
        for side, found in result.corpus["contribution"].items():
            better, worse = (max, min) if side == "comprehensiveness" else (min, max)
            for i, value in enumerate(found.tolist()):
                all_of_them = [result.corpus[name][side][i].item() for name in methods]
                assert value == better(all_of_them)
                assert result.corpus["random"][side][i] == worse(all_of_them)


@pytest.mark.slow
def test_scores_of_a_model_that_has_learnt_nothing_find_nothing(
    model: nn.Module, problems: Tensor
) -> None:
    methods = {
        "contribution": ContributionWeights(model),
        "of nothing": ContributionWeights(with_shuffled_weights(model)),
        "random": "random",
    }
    metric = ComprehensivenessSufficiency(model, {"bottom": [0.5]}, quantity="nll", scoring="clean")
    loss = {name: float(x[0]) for name, x in metric.evaluate(methods, problems).sufficiency.items()}
    assert loss["contribution"] < 0.2 * loss["of nothing"]
    assert loss["of nothing"] > 0.5 * loss["random"]


def test_a_chat_is_explained_by_word_and_by_message(
    smollm2: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    chat = [
        {"role": "user", "content": "Which city is the capital of France?"},
        {"role": "assistant", "content": "Paris, of course."},
    ]
    found = explain(*smollm2, chat, top_k=4)
    assert [message.role for message in found.messages or ()] == ["user", "assistant"]
    words = found.by_word()
    assert words.tokens[-7:-1] == ["Paris", ",", " of", " course", ".", "<|im_end|>"]
    for x in (found, words):
        sums = x.maps["contribution-signed"].sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    for name, x in found.scores.items():
        assert torch.allclose(words.scores[name].sum(), x.sum(), rtol=1e-5)
    by_message = found.by_message().maps["contribution-signed"]
    assert by_message[0, 1] == 0  # causal
    assert (by_message.diag() > 0).all()
    found.save(tmp_path / "chat.safetensors")
    loaded = Explanation.load(tmp_path / "chat.safetensors")
    assert torch.equal(
        loaded.by_word().maps["contribution-signed"], words.maps["contribution-signed"]
    )


def test_flex_attention_gives_the_results_of_sdpa(model: nn.Module, texts: list[Tensor]) -> None:
    inputs, found = texts[0][:, :8], []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        scores = TokenScores(ContributionWeights(model)).attribute(inputs)
        target = TokenScores(TargetContributions(model)).attribute(inputs, target=3)
        with torch.no_grad(), remove_tokens(model, "contribution", 0.3):
            logits = model(inputs).logits[:, -1]
        found.append((scores, target, logits / logits.abs().max()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
