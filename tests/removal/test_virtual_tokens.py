"""Learned virtual tokens before a text: the scores of the text's own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ALTIWeights,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWONAttention,
    explain,
)
from captum_cw.capture import UnsupportedModelError
from support.inputs import token_ids
from support.models import VIRTUAL_COUNT, VIRTUAL_KINDS, llama, with_virtual_tokens

IDS = token_ids(1, 9)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids")


def maps_of_text(maps: list[Tensor]) -> Tensor:
    """``(L, H, 9, 9)``: the text's own queries and keys of maps ``(1, H, T, S)``."""
    return torch.stack([x[0, :, -9:, -9:] for x in maps])


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_virtual_tokens_are_seen_by_a_plain_call(kind: str) -> None:
    shapes = {tuple(x.shape) for x in ContributionWeights(with_virtual_tokens(kind)).attribute(IDS)}
    assert shapes == {(1, 4, 9 if kind == "prefix" else 9 + VIRTUAL_COUNT, 9 + VIRTUAL_COUNT)}


@pytest.mark.parametrize("measure", [ContributionWeights, VWONAttention])
@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_rows_are_those_of_the_texts_own_tokens(kind: str, measure: Any) -> None:
    model = with_virtual_tokens(kind)
    expected = maps_of_text(measure(model).attribute(IDS)).abs().mean((0, 1))
    for inputs in (IDS, {"input_ids": IDS}, (IDS,)):
        rows, output = TokenScores(measure(model)).rows(inputs, slice(3, 6))
        assert torch.allclose(rows[0], expected[3:6], atol=1e-5)
    assert output.logits.shape[-1] == 64


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_an_output_is_made_of_the_prompts_own_tokens(kind: str, tiny_tokenizer: Any) -> None:
    model = with_virtual_tokens(kind)
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    found = llm.attribute({"input_ids": IDS[:, :6]}, target=IDS[0, 6:])
    expected = maps_of_text(ContributionWeights(model).attribute(IDS)).abs().mean((0, 1))
    assert torch.allclose(found.token_attr, expected[5:8, :6], atol=1e-5)
    with torch.no_grad():
        logits = model(IDS).logits[0, -9:]
    probs = logits[5:8].softmax(-1).gather(-1, IDS[0, 6:, None])[:, 0]
    assert torch.allclose(found.output_probs, probs, atol=1e-5)
    generated = llm.attribute("a b c d", gen_args={"max_new_tokens": 3, "do_sample": False})
    assert generated.token_attr.shape == (len(generated.output_tokens), 4)


@pytest.mark.parametrize("method", [ContributionWeights, ALTIWeights])
def test_influence_over_virtual_tokens_is_followed_and_cut(method: Any) -> None:
    model = with_virtual_tokens("prompt")
    for query in (4, 8):
        last = TokenScores(
            method(model), layers="rollout", queries=query + VIRTUAL_COUNT
        ).attribute(IDS)
        rows, _ = TokenScores(method(model), layers="rollout").rows(IDS, slice(query, query + 1))
        assert torch.allclose(rows[0, 0], last[0, VIRTUAL_COUNT:], atol=1e-6)


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_an_explanation_is_of_the_texts_own_tokens(kind: str, tiny_tokenizer: Any) -> None:
    model = with_virtual_tokens(kind)
    found = explain(model, tiny_tokenizer, IDS, top_k=9)
    assert len(found.tokens) == 9
    contributions = ContributionWeights(model).attribute(IDS)
    mine = maps_of_text(contributions)
    assert torch.allclose(found.maps["contribution"], mine.abs().mean((0, 1)), atol=1e-5)
    assert torch.allclose(found.maps["contribution-signed"], mine.sum(1).mean(0), atol=1e-5)
    counts = torch.arange(9, 0, -1)  # the queries that see a key
    scores = mine.abs().sum(2) / counts
    assert torch.allclose(found.scores["contribution"], scores.mean((0, 1)), atol=1e-5)
    for heads, whole, c in zip(found.heads, contributions, mine, strict=True):
        kept = torch.zeros(4, 9, 9).scatter_add_(
            -1, heads.keys.long(), heads.measure("contribution-signed")
        )
        assert torch.allclose(kept, c, atol=1e-5)
        assert torch.allclose(heads.share, whole[0, :, -9:].sum(-1), atol=1e-5)
    with torch.no_grad():
        best = model(IDS).logits[0, -9:].softmax(-1).amax(-1)
    assert found.probability is not None
    assert torch.allclose(found.probability, best, atol=1e-5)


def test_blocks_of_queries_change_nothing(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_virtual_tokens("prompt")
    whole = explain(model, tiny_tokenizer, IDS)
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", 4 * 12 * 5)
    blocks = explain(model, tiny_tokenizer, IDS)
    for name, x in whole.maps.items():
        assert torch.allclose(blocks.maps[name], x, atol=1e-6)
        assert torch.allclose(blocks.scores[name], whole.scores[name], atol=1e-6)
    rows, _ = TokenScores(ContributionWeights(model)).rows(IDS, slice(0, 9))
    assert torch.allclose(rows[0], whole.maps["contribution"], atol=1e-6)


class Shortened(nn.Module):
    """Leaves out what a model is given first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.main_input_name = model, "input_ids"

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids[:, 2:])


class Padded(Shortened):
    """Fills up a text at its end, as models do whose attention is in windows."""

    def forward(self, input_ids: Tensor) -> Any:
        pad = nn.functional.pad
        return self.model(pad(input_ids, (0, 3)), pad(torch.ones_like(input_ids), (0, 3)))


@pytest.mark.parametrize("kind", [Shortened, Padded])
def test_layers_of_other_tokens_are_refused(kind: Any, tiny_tokenizer: Any) -> None:
    model = kind(llama()).eval()
    message = r"attends from (7|12) queries to (7|12) keys, but the text has 9 tokens"
    with pytest.raises(UnsupportedModelError, match=message):
        TokenScores(ContributionWeights(model)).rows({"input_ids": IDS}, slice(3, 6))
    with pytest.raises(UnsupportedModelError, match=message):
        explain(model, tiny_tokenizer, IDS)


def test_keys_of_a_given_cache_stay() -> None:
    model = llama()
    expected = torch.stack(ContributionWeights(model).attribute(IDS)).abs().mean((0, 2))[0]
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
    inputs = {"input_ids": IDS[:, 5:], "past_key_values": cache}
    rows, _ = TokenScores(ContributionWeights(model)).rows(inputs, slice(1, 3))
    assert torch.allclose(rows[0], expected[6:8], atol=1e-5)
