"""Encoder-decoders: two sequences of tokens, and attention between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    remove_tokens,
    remove_values,
    scale_values,
)
from captum_cw.capture import UnsupportedModelError
from support.models import SIZES, bart, bert, build, t5


def tokens(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 64, (2, n), generator=generator)


def one(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """One example of a batch, without its padding."""
    found = {}
    for prefix in ("", "decoder_"):
        ids = inputs[f"{prefix}input_ids"][b]
        mask = inputs.get(f"{prefix}attention_mask")
        found[f"{prefix}input_ids"] = (ids if mask is None else ids[mask[b] == 1])[None]
    return found


def masked(ids: Tensor, padding: int) -> Tensor:
    mask = torch.ones_like(ids)
    if padding:
        mask[1, -padding:] = 0
    return mask


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("lengths", "paddings"),
    [((9, 7), (2, 0)), ((7, 7), (2, 0)), ((7, 7), (0, 2)), ((7, 7), (3, 1)), ((7, 7), (1, 3))],
)
def test_padding_of_either_sequence_does_not_change_the_other_numbers(
    make: Any, kernel: str, lengths: tuple[int, int], paddings: tuple[int, int]
) -> None:
    model = make()
    model.set_attn_implementation(kernel)
    ids, written = tokens(lengths[0]), tokens(lengths[1], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": masked(ids, paddings[0]),
        "decoder_input_ids": written,
        "decoder_attention_mask": masked(written, paddings[1]),
    }
    real = {
        "encoder": inputs["attention_mask"].bool(),
        "decoder": inputs["decoder_attention_mask"].bool(),
    }
    for method in (VWAttention, ContributionWeights):
        measure = method(model, kind="all")
        maps = measure.attribute(inputs)
        for b in range(2):
            alone = method(model, kind="all").attribute(one(inputs, b))
            for name, x, y in zip(measure.layers, maps, alone, strict=True):
                cross = "encoder_attn" in name or "EncDec" in name
                queries = real["encoder"] if ".encoder." in f".{name}" else real["decoder"]
                keys = real["encoder"] if cross else queries
                part = x[b][:, queries[b]][:, :, keys[b]]
                assert torch.allclose(part, y[0], atol=1e-5), name
                assert not x[b][:, ~queries[b]].any()
                assert not x[b][:, :, ~keys[b]].any()


@pytest.mark.parametrize("make", [bart, t5])
def test_kinds_of_layers_and_their_shapes(make: Any) -> None:
    model = make()
    inputs = {"input_ids": tokens(9), "decoder_input_ids": tokens(7)}
    found = {}
    for kind in ("self", "cross", "all"):
        method = ContributionWeights(model, kind=kind)  # type: ignore[arg-type]
        assert len(method.layers) == {"self": 4, "cross": 2, "all": 6}[kind]
        found[kind] = [tuple(c.shape[2:]) for c in method.attribute(inputs)]
    assert found["cross"] == [(7, 9)] * 2
    assert found["self"] == [(9, 9)] * 2 + [(7, 7)] * 2
    assert found["all"] == [(9, 9)] * 2 + [(7, 7), (7, 9)] * 2


def test_kinds_are_recognised_if_both_texts_have_the_same_length() -> None:
    inputs = {"input_ids": tokens(7), "decoder_input_ids": tokens(7, 1)}
    assert len(ContributionWeights(bart(), kind="cross").attribute(inputs)) == 2
    assert len(ContributionWeights(bart(), kind="self").attribute(inputs)) == 4


def test_a_named_layer_does_not_need_a_kind() -> None:
    model: Any = bart()
    layer = model.model.decoder.layers[1].encoder_attn
    inputs = {"input_ids": tokens(9), "decoder_input_ids": tokens(7)}
    assert ContributionWeights(model, layer).attribute(inputs).shape == (2, 4, 7, 9)


def test_a_kind_that_a_model_does_not_have_is_refused() -> None:
    model = bert()
    with pytest.raises(ValueError, match="kind='cross', but all 2 .* are of the kind 'self'"):
        ContributionWeights(model, kind="cross").attribute(tokens(5))
    with pytest.raises(ValueError, match="kind='other' is unknown"):
        ContributionWeights(model, kind="other")  # type: ignore[arg-type]


def test_cross_attention_scores_the_tokens_of_the_encoder() -> None:
    model = bart()
    inputs = {
        "input_ids": tokens(9),
        "decoder_input_ids": tokens(7),
        "attention_mask": masked(tokens(9), 2),
    }
    method = ContributionWeights(model, kind="cross")
    scores = TokenScores(method, layers=None, heads="sum").attribute(inputs)
    assert scores.shape == (2, 2, 9)
    assert not scores[1, :, -2:].any()
    rows = TokenScores(method, layers=None, heads="sum", queries=-1).attribute(inputs)
    maps = method.attribute(inputs)
    for number, c in enumerate(maps):
        assert torch.allclose(rows[:, number], c.abs()[:, :, -1].sum(1), atol=1e-6)
        assert torch.allclose(scores[:, number], c.abs().mean(2).sum(1), atol=1e-6)


def test_labels_stand_for_the_decoders_tokens() -> None:
    found = ContributionWeights(bart()).attribute({"input_ids": tokens(9), "labels": tokens(7)})
    assert [c.shape[2] for c in found] == [9, 9, 7, 7]


def test_a_decoder_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="do not include the decoder's tokens"):
        ContributionWeights(t5()).attribute(tokens(9))


@pytest.mark.parametrize("make", [bart, t5])
def test_values_are_removed_from_cross_attention_too(make: Any) -> None:
    model: Any = make()
    inputs = {"input_ids": tokens(9), "decoder_input_ids": tokens(7)}
    keys = [c.shape[3] for c in ContributionWeights(model, kind="all").attribute(inputs)]
    nothing = [torch.zeros(2, 4, n, dtype=torch.bool) for n in keys]
    names = ContributionWeights(model, kind="all").layers
    cross = ContributionWeights(model, kind="cross").layers
    everything = [
        torch.ones_like(mask) if name in cross else mask
        for name, mask in zip(names, nothing, strict=True)
    ]
    other = {**inputs, "input_ids": tokens(9, 5)}
    with torch.no_grad():
        alone = model(**inputs).logits
        with remove_values(model, nothing):
            assert torch.equal(model(**inputs).logits, alone)
        with remove_values(model, everything):
            deaf, still_deaf = model(**inputs).logits, model(**other).logits
    assert torch.equal(deaf, still_deaf)  # the decoder no longer knows what was read
    assert not torch.allclose(deaf, alone, atol=1e-3)


def test_what_ranks_the_tokens_of_one_text_is_refused() -> None:
    model = bart()
    for make in (
        lambda: remove_tokens(model, "contribution", 0.5).__enter__(),
        lambda: scale_values(model, 0.5, 0).__enter__(),
        lambda: ComprehensivenessSufficiency(model),
    ):
        with pytest.raises(UnsupportedModelError, match="BartFor.*model with cross-attention"):
            make()
    with pytest.raises(UnsupportedModelError, match="encoder"):
        LLMTokenAttribution(ContributionWeights(model), None)


def test_images_and_texts_of_one_length_keep_their_own_padding() -> None:
    """One tower reads four patches. The other reads four tokens, two of which are padding."""
    sizes = {**SIZES, "num_hidden_layers": 1}
    config = transformers.SiglipConfig(
        text_config={**sizes, "projection_size": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )
    model: Any = build(transformers.SiglipModel, config)
    ids = tokens(4)
    inputs = {
        "input_ids": ids,
        "attention_mask": masked(ids, 2),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    method = ContributionWeights(model)
    found = method.attribute(inputs)
    maps = dict(zip(method.layers, found, strict=True))
    (vision,) = (c for name, c in maps.items() if "vision" in name and "head" not in name)
    (text,) = (c for name, c in maps.items() if "text" in name)
    assert torch.allclose(vision.sum((1, 3)), torch.ones(2, 4), atol=1e-5)
    assert torch.allclose(text[1].sum((0, 2)), torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=1e-5)


def test_an_image_and_a_text_in_one_sequence() -> None:
    """Scores of text and image tokens alike, in the layers of the language model."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **sizes, num_attention_heads=4, image_size=16, patch_size=8
        ),
        text_config=transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
        ),
        image_token_index=3,
    )
    model: Any = build(transformers.LlavaForConditionalGeneration, config)
    ids = torch.cat([tokens(2), torch.full((2, 4), 3), tokens(3, 1)], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    layers = [m for m in model.modules() if type(m).__name__ == "LlamaAttention"]
    scores = TokenScores(ContributionWeights(model, layers)).attribute(inputs)
    assert scores.shape == (2, 9)
    assert (scores > 0).all()
    with pytest.raises(ValueError, match="differ in heads or length"):
        TokenScores(ContributionWeights(model)).attribute(inputs)


def test_a_module_that_runs_in_every_layer_gives_one_map_for_each() -> None:
    config = transformers.AlbertConfig(
        **{**SIZES, "num_hidden_layers": 3}, embedding_size=16, num_hidden_groups=1
    )
    model: Any = build(transformers.AlbertModel, config)
    every = ContributionWeights(model)
    maps = every.attribute(tokens(5))
    assert len(maps) == 3
    assert len(set(every.layers)) == 1
    of_module = ContributionWeights(model, model.get_submodule(every.layers[0]))
    again = of_module.attribute(tokens(5))
    assert isinstance(again, tuple)
    assert all(torch.equal(x, y) for x, y in zip(again, maps, strict=True))
