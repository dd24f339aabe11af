"""Texts that are longer than a model's positions: refused only where a learned table ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import (
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    remove_tokens,
)
from support.inputs import token_ids
from support.models import SIZES, build, gpt2, gptj, llama


def encoder(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "pad_token_id": 1, **options})
    return build(getattr(transformers, f"{name}ForMaskedLM"), config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=1,
    )
    return build(transformers.OPTForCausalLM, config)


TABLES = {
    "gpt2": (gpt2, 64),
    "opt": (opt, 64),
    "gpt-j": (gptj, 64),
    "bert": (lambda: encoder("Bert"), 64),
    "roberta": (lambda: encoder("Roberta"), 62),
    "xlm-roberta": (lambda: encoder("XLMRoberta"), 62),
    "camembert": (lambda: encoder("Camembert", max_position_embeddings=34), 32),
}


def text(T: int) -> Tensor:
    """No id of a special token."""
    return token_ids(B=1, T=T).clamp(min=5)


@pytest.mark.parametrize("name", TABLES)
def test_a_text_is_refused_from_where_the_table_of_positions_ends(name: str) -> None:
    make, limit = TABLES[name]
    model = make()
    with torch.no_grad():
        model(text(limit))
        with pytest.raises((IndexError, RuntimeError)):
            model(text(limit + 1))
    scores = TokenScores(ContributionWeights(model))
    assert scores.attribute(text(limit)).shape == (1, limit)
    for T in (limit + 1, limit + 2, limit + 3, limit + 40):
        with pytest.raises(
            ValueError, match=rf"has {T} tokens, .* {limit}( positions .*)?: cut the text"
        ):
            scores.attribute(text(T))


def test_padding_does_not_move_the_limit_of_roberta() -> None:
    method = ContributionWeights(encoder("Roberta"))

    def attribute(T: int, padded: int) -> list[Tensor]:
        ids = text(T)
        mask = torch.ones_like(ids)
        ids[:, :padded], mask[:, :padded] = 1, 0
        found: list[Tensor] = method.attribute({"input_ids": ids, "attention_mask": mask})
        return found

    attribute(64, padded=2)
    with pytest.raises(ValueError, match="(ends after|has) 62( positions .*)?: cut"):
        attribute(70, padded=3)


def test_positions_that_are_given_are_held_against_the_table_too() -> None:
    model, ids = gpt2(), text(9)
    method = ContributionWeights(model)
    method.attribute({"input_ids": ids, "position_ids": torch.arange(55, 64)[None]})
    with pytest.raises(ValueError, match="ends after"):
        method.attribute({"input_ids": ids, "position_ids": torch.arange(56, 65)[None]})


def test_removal_and_the_metric_say_so_too() -> None:
    model = gpt2()
    with (
        remove_tokens(model, "contribution", 0.5),
        torch.no_grad(),
        pytest.raises(ValueError, match="ends after 64"),
    ):
        model(text(65))
    metric = ComprehensivenessSufficiency(model, rates=[0.5])
    with pytest.raises(ValueError, match="ends after 64"):
        metric.evaluate({"contribution": "contribution"}, text(65), show_progress=False)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("scaling", [None, YARN, DYNAMIC], ids=["plain", "yarn", "dynamic"])
def test_rotary_models_run_beyond_their_configured_length(scaling: Any) -> None:
    model, ids = llama(rope_scaling=scaling), text(100)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, output_attentions=True)
    fresh = llama(rope_scaling=scaling)
    found = AttentionWeights(fresh).attribute(ids)
    for a, b in zip(found, expected.attentions, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        again = fresh(ids).logits
        # What a long text leaves behind in the model (dynamic scaling) is gone.
        short = fresh(text(9)).logits
        assert torch.allclose(short, llama(rope_scaling=scaling)(text(9)).logits, atol=1e-5)
    assert torch.allclose(again, expected.logits, atol=1e-4)


@pytest.mark.parametrize("always", [True, False])
def test_another_error_of_a_long_text_is_left_as_it_is(always: bool) -> None:
    model = llama()

    def fail(module: nn.Module, args: Any) -> None:
        if always or args[0].shape[1] > 64:
            raise RuntimeError("the model's own")

    model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="^the model's own$"):
        TokenScores(ContributionWeights(model)).attribute(text(100))


def test_an_id_outside_of_the_vocabulary_is_not_taken_for_a_position() -> None:
    with pytest.raises(
        ValueError, match=r"Token id 64 of input_ids is outside of the model's vocabulary"
    ):
        ContributionWeights(llama()).attribute(torch.tensor([[3, 64]]))


def test_masks_are_not_taken_for_positions() -> None:
    class Masked(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            real = torch.ones_like(input_ids, dtype=torch.bool)
            assert len(input_ids[real]) == input_ids.numel()
            return super().forward(input_ids=input_ids, **kwargs)

    model, ids = build(Masked, llama().config), text(9)
    expected = ContributionWeights(llama()).attribute(ids)
    for a, b in zip(ContributionWeights(model).attribute(ids), expected, strict=True):
        assert torch.equal(a, b)
