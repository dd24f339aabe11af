"""Models of images and text: what ranks tokens and explains texts is of the language layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import BatchFeature

from captum_cw import (
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    explain,
    remove_tokens,
    remove_values,
    scale_values,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.removal.sinks import find_sinks
from support.models import SIZES, build

IMAGE = 3
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
}
#: How Qwen2-VL counts in three dimensions, in the names of old and new releases.
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
GRID: dict[str, Any] = {
    "text_config": {**TEXT, "rope_parameters": ROPE, "rope_scaling": {**ROPE, "type": "mrope"}},
    "image_token_id": IMAGE,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}
PATCHES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}


def text_with_image(before: int = 3, after: int = 3, B: int = 2) -> Tensor:
    """Four tokens of an image within a text."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 64, (B, before + after), generator=generator)
    image = torch.full((B, 4), IMAGE)
    return torch.cat([words[:, :before], image, words[:, before:]], 1)


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def llava(vision: str = "CLIP") -> nn.Module:
    tower = getattr(transformers, f"{vision}VisionConfig")(**VISION, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default" if vision == "CLIP" else "full",
    )
    return build(transformers.LlavaForConditionalGeneration, config)


def siglip() -> nn.Module:
    """Its tower ends in a layer of cross-attention."""
    return llava("Siglip")


def qwen2_vl() -> nn.Module:
    """Its vision layers read the patches of all images as one sequence, and cannot be seen."""
    config = transformers.Qwen2VLConfig(
        **GRID, vision_config={**PATCHES, "embed_dim": 32, "mlp_ratio": 2, "in_channels": 3}
    )
    return build(transformers.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl() -> nn.Module:
    """Some of its vision layers attend within windows."""
    options = {"out_hidden_size": 32, "intermediate_size": 48, "in_channels": 3}
    config = transformers.Qwen2_5_VLConfig(
        **GRID,
        vision_config={**PATCHES, **options, "window_size": 16, "fullatt_block_indexes": [1]},
    )
    return build(transformers.Qwen2_5_VLForConditionalGeneration, config)


def gemma3() -> nn.Module:
    """The tokens of an image see each other."""
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=8),
        vision_config=transformers.SiglipVisionConfig(
            **VISION, patch_size=4, vision_use_head=False
        ),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=5,
        eoi_token_index=6,
    )
    return build(transformers.Gemma3ForConditionalGeneration, config)


def idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.Idefics3VisionConfig(**VISION, patch_size=4).to_dict(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return build(transformers.Idefics3ForConditionalGeneration, config)


def internvl() -> nn.Module:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.InternVLVisionConfig(
            **{**VISION, "image_size": [16, 16]}, patch_size=[4, 4]
        ),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return build(transformers.InternVLForConditionalGeneration, config)


def inputs_of(make: Callable[[], nn.Module], B: int = 2, after: int = 3) -> dict[str, Tensor]:
    ids = text_with_image(after=after, B=B)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = {"pixel_values": pixels(B, 3, 16, 16)}
    if make in (qwen2_vl, qwen2_5_vl):
        ids[:, 2] = 5
        images = {
            "pixel_values": pixels(B * 16, 48),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * B),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
        if "mm_token_type_ids" not in inspect.signature(make().forward).parameters:
            del images["mm_token_type_ids"]
    if make is gemma3:
        given["token_type_ids"] = (ids == IMAGE).long()
    if make is idefics3:
        images["pixel_values"] = images["pixel_values"][:, None]
    return {**given, **images}


SEEN = [llava, siglip, gemma3, idefics3, internvl]
UNSEEN = [qwen2_vl, qwen2_5_vl]
by_model = pytest.mark.parametrize("make", [*SEEN, *UNSEEN], ids=lambda make: make.__name__)


def language_model(model: nn.Module) -> Any:
    inner: Any = model.model
    return getattr(inner, "language_model", None) or inner.text_model


def language_layers(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in language_model(model).layers]


def alone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the language model is given for these inputs, images among the embeddings."""
    found: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)

    handle = language_model(model).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    wanted = ("inputs_embeds", "attention_mask", "position_ids")
    return {name: found[name] for name in wanted if found.get(name) is not None}


@pytest.fixture
def words() -> Any:
    model = WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="w0")


# ---------------------------------------------------------------------------------------------
# Removing and scaling values


@by_model
@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_values_are_removed_as_in_the_language_model_alone(make: Any, scoring: Any) -> None:
    model, inputs = make(), inputs_of(make)
    inner, given = language_model(model), alone(model, inputs)
    for which in ("bottom", "top"):
        options = {"rate": 0.5, "which": which, "scoring": scoring}
        with torch.no_grad(), remove_tokens(model, "contribution", **options):
            found = model(**inputs).logits
        with torch.no_grad(), remove_tokens(inner, "contribution", **options):
            expected = model.get_output_embeddings()(inner(**given).last_hidden_state)
        with torch.no_grad():
            clean = model(**inputs).logits
        assert torch.allclose(found, expected, atol=2e-4 * float(clean.abs().max()))
        assert not torch.allclose(found, clean, atol=1e-2 * float(clean.abs().max()))


@by_model
def test_values_of_text_tokens_are_scaled_in_the_language_layers_alone(make: Any) -> None:
    model, inputs = make(), inputs_of(make)
    inner, given = language_model(model), alone(model, inputs)
    for layers in (None, [1]):
        with torch.no_grad(), scale_values(model, 0.0, positions=[1, -1], layers=layers):
            found = model(**inputs).logits
        with torch.no_grad(), scale_values(inner, 0.0, positions=[1, -1], layers=layers):
            expected = model.get_output_embeddings()(inner(**given).last_hidden_state)
        assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    with pytest.raises(IndexError, match=r"attention layers 0\.\.1"):  # noqa: SIM117
        with torch.no_grad(), scale_values(model, 0.0, positions=0, layers=[2]):
            model(**inputs)


@pytest.mark.parametrize("make", [llava, siglip], ids=lambda make: make.__name__)
def test_a_text_as_long_as_an_image_is_not_taken_for_it(make: Any) -> None:
    model = make()
    ids = text_with_image(before=1, after=0)  # CLIP has a token beside its four patches
    ids = ids if make is llava else ids[:, 1:]
    inputs = {"input_ids": ids, "pixel_values": pixels(2, 3, 16, 16)}
    maps = dict(zip((m := AttentionWeights(model)).layers, m.attribute(inputs), strict=False))
    assert {x.shape for x in maps.values()} == {(2, 4, ids.shape[1], ids.shape[1])}
    inner, given = language_model(model), alone(model, inputs)
    for scoring in ("online", "clean"):
        with torch.no_grad(), remove_tokens(model, "vwon", 0.5, scoring=scoring):
            found = model(**inputs).logits
        with torch.no_grad(), remove_tokens(inner, "vwon", 0.5, scoring=scoring):
            expected = model.lm_head(inner(**given).last_hidden_state)
        assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [llava, qwen2_vl], ids=lambda make: make.__name__)
def test_padding_does_not_move_the_positions_of_a_text_with_an_image(make: Any, side: str) -> None:
    model, inputs = make(), inputs_of(make)
    method = ContributionWeights(model, language_layers(model))
    zeros = torch.zeros(2, 2, dtype=torch.long)
    padded = {
        name: torch.cat([zeros.to(x), x] if side == "left" else [x, zeros.to(x)], 1)
        if x.shape == inputs["input_ids"].shape
        else x
        for name, x in inputs.items()
    }
    kept = slice(2, None) if side == "left" else slice(-2)
    for c, expected in zip(method.attribute(padded), method.attribute(inputs), strict=True):
        assert torch.allclose(c[:, :, kept, kept], expected, atol=1e-5)


def test_a_batch_of_other_images_is_of_the_same_text_layers() -> None:
    """One image for two texts, and pixels in another type than the model's."""
    model: Any = llava().double()
    ids = text_with_image()
    ids[1] = ids[1].clamp(min=10)
    inputs = {"input_ids": ids, "pixel_values": pixels(1, 3, 16, 16)}
    inner, given = language_model(model), alone(model, inputs)
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5):
        found = model(**inputs).logits
    with torch.no_grad(), remove_tokens(inner, "contribution", 0.5):
        expected = model.lm_head(inner(**given).last_hidden_state)
    assert torch.allclose(found, expected, atol=1e-4)


def test_generated_tokens_keep_what_the_prompt_with_its_image_has_lost() -> None:
    model: Any = llava()
    model.generation_config.eos_token_id = None
    inputs = inputs_of(llava, B=1)
    arguments: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    for scoring in ("online", "clean"):
        found = []
        for use_cache in (True, False):
            with torch.no_grad(), remove_tokens(model, "contribution", 0.5, scoring=scoring):
                output = model.generate(**inputs, **arguments, use_cache=use_cache)
            found.append(torch.cat(output.logits))
        plain = torch.cat(model.generate(**inputs, **arguments).logits)
        assert torch.allclose(*found, atol=1e-3)
        assert not torch.allclose(found[0], plain, atol=1e-2)


def test_masks_of_remove_values_count_the_vision_layers() -> None:
    model, inputs = llava(), inputs_of(llava)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bool)
    removed = torch.zeros(2, 4, 10, dtype=torch.bool)
    removed[:, 1, 4] = True
    inner, given = language_model(model), alone(model, inputs)
    with torch.no_grad(), remove_values(model, [nothing, nothing, removed, removed]):
        found = model(**inputs).logits
    with torch.no_grad(), remove_values(inner, [removed, removed]):
        expected = model.get_output_embeddings()(inner(**given).last_hidden_state)
    assert torch.allclose(found, expected, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Comprehensiveness and sufficiency


class Alone(nn.Module):
    """A language model that is given the embeddings of text and images, whatever ids it is."""

    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.head, self.given = (
            language_model(model),
            model.get_output_embeddings(),
            given,
        )

    def forward(self, input_ids: Tensor) -> Any:
        return (self.head(self.inner(**self.given).last_hidden_state),)


@pytest.mark.parametrize("make", [llava, siglip, qwen2_vl], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("scoring", "scope", "granularity"),
    [("online", "layer", "pair"), ("clean", "global", "pair"), ("clean", "layer", "token")],
)
def test_faithfulness_is_that_of_the_language_model_alone(
    make: Any, scoring: Any, scope: Any, granularity: Any
) -> None:
    model, inputs = make(), inputs_of(make)
    reference = Alone(model, alone(model, inputs)).eval()
    options = {"rates": [0.25, 0.5], "scoring": scoring, "ranking": scope, "quantity": "nll"}
    methods = {"ours": "contribution", "chance": "random"}
    found, expected = (
        ComprehensivenessSufficiency(m, **options, granularity=granularity).evaluate(
            methods, batch, show_progress=False
        )
        for m, batch in ((model, inputs), (reference, inputs["input_ids"]))
    )
    for name in methods:
        for side in ("comprehensiveness", "sufficiency"):
            a, b = found.deltas(name, side), expected.deltas(name, side)
            assert torch.allclose(a, b, atol=1e-4)
            assert (a.abs() > 1e-3).any()


def test_padding_of_the_text_does_not_count_in_the_likelihood() -> None:
    model, inputs = llava(), inputs_of(llava)
    inputs["attention_mask"][1, -2:] = 0
    metric = ComprehensivenessSufficiency(model, [0.5], quantity="nll")
    result = metric.evaluate({"ours": "contribution"}, inputs, show_progress=False)
    assert [record["count"] for record in result.records] == [9, 7]
    with torch.no_grad():
        logits = model(**inputs).logits.log_softmax(-1)
    rows = logits[1, :7].gather(-1, inputs["input_ids"][1, 1:8, None])
    assert result.records[1]["clean_nll"] == pytest.approx(-float(rows.mean()), abs=1e-5)


def test_tokens_that_are_seen_ahead_do_not_count_in_the_likelihood() -> None:
    """In Gemma 3 the tokens of an image see each other, and the text sees what comes before it."""
    model, inputs = gemma3(), inputs_of(gemma3)
    metric = ComprehensivenessSufficiency(model, [0.5], quantity="nll")
    result = metric.evaluate({"ours": "contribution"}, inputs, show_progress=False)
    with torch.no_grad():
        logits = model(**inputs).logits.log_softmax(-1)
    predicted = [1, 2, 3, 7, 8, 9]  # of four image tokens, 3 to 6, nobody sees the first ahead
    for b, record in enumerate(result.records):
        places = torch.tensor(predicted)
        rows = logits[b, places - 1].gather(-1, inputs["input_ids"][b, places, None])
        assert record["count"] == 6
        assert record["clean_nll"] == pytest.approx(-float(rows.mean()), abs=1e-5)


def test_a_model_that_sees_all_later_tokens_is_refused_still() -> None:
    config = transformers.BertConfig(**SIZES)
    model = build(transformers.BertForMaskedLM, config)
    metric = ComprehensivenessSufficiency(model, [0.5])
    with pytest.raises(ValueError, match="sees later tokens.*mask_token_id"):
        metric.evaluate({"ours": "contribution"}, text_with_image(), show_progress=False)


# ---------------------------------------------------------------------------------------------
# What cannot be seen


@pytest.mark.parametrize("make", UNSEEN, ids=lambda make: make.__name__)
def test_unseen_vision_layers_are_refused_with_the_way_to_the_language_layers(make: Any) -> None:
    model, inputs = make(), inputs_of(make)
    for call in (
        lambda: ContributionWeights(model).attribute(inputs),
        lambda: TokenScores(ContributionWeights(model), layers="rollout").attribute(inputs),
    ):
        with pytest.raises(UnsupportedModelError, match=r"visual\.blocks\.0\.attn") as found:
            call()
        message = str(found.value)
        way_out = "layer=[m.self_attn for m in model.get_decoder().layers]"
        assert way_out in message
    layers = eval(way_out.removeprefix("layer="), {"model": model})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        method = ContributionWeights(model, layers)
        maps = method.attribute(inputs)
    assert [x.shape for x in maps] == [(2, 4, 10, 10)] * 2
    for x in maps:
        assert torch.allclose(x.sum((1, 3)), torch.ones(2, 10), atol=1e-4)


def test_the_way_out_is_named_where_sinks_are_looked_for_too() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer=\[m\.self_attn for m in"):
        find_sinks(qwen2_vl(), inputs_of(qwen2_vl))


def test_an_unseen_language_layer_is_not_said_to_be_helped_by_a_choice() -> None:
    model: Any = llava()
    with torch.no_grad():
        language_layers(model)[1].v_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^The output of .*language_model\.layers\.1.*NaN") as e:
        ContributionWeights(model).attribute(inputs_of(llava))
    assert "layer=" not in str(e.value)


# ---------------------------------------------------------------------------------------------
# Generated text, and explanations


@by_model
def test_generated_text_is_explained_by_the_language_layers(make: Any, words: Any) -> None:
    model, prompt = make(), inputs_of(make, B=1)
    target = torch.tensor([20, 21])
    n = prompt["input_ids"].shape[1]
    whole = {
        **prompt,
        "input_ids": torch.cat([prompt["input_ids"], target[None]], 1),
        "attention_mask": torch.ones(1, n + 2, dtype=torch.long),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in prompt:
            whole[name] = torch.cat([prompt[name], torch.zeros(1, 2).to(prompt[name])], 1)
    maps = torch.stack(ContributionWeights(model, language_layers(model)).attribute(whole))
    expected = maps.abs().mean((0, 2))[0, n - 1 : n + 1, :n]
    with torch.no_grad():
        probs = model(**whole).logits[0, n - 1 : n + 1].softmax(-1)[[0, 1], target]
    llm = LLMTokenAttribution(ContributionWeights(model), words)
    for given in (prompt, BatchFeature(dict(prompt))):
        found = llm.attribute(given, target=target)
        assert torch.allclose(found.token_attr, expected, atol=1e-6)
        assert torch.allclose(found.output_probs, probs, atol=1e-5)
    assert len(found.input_tokens) == n


@pytest.mark.parametrize("make", [llava, qwen2_vl], ids=lambda make: make.__name__)
@pytest.mark.parametrize("layers", ["mean", "rollout"])
def test_text_that_a_model_generates_from_an_image_is_explained(
    make: Any, layers: Any, words: Any
) -> None:
    model, prompt = make(), inputs_of(make, B=1)
    method = TokenScores(ContributionWeights(model), layers=layers)
    found = LLMTokenAttribution(method, words).attribute(prompt, gen_args={"max_new_tokens": 3})
    chosen = ContributionWeights(model, language_layers(model))
    same = LLMTokenAttribution(TokenScores(chosen, layers=layers), words)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, 10:]
    expected = same.attribute(prompt, target=ids)
    assert found.output_tokens == expected.output_tokens
    assert torch.allclose(found.token_attr, expected.token_attr, atol=1e-6)


@by_model
def test_a_text_beside_an_image_is_explained_by_the_language_layers(make: Any, words: Any) -> None:
    model, inputs = make(), inputs_of(make, B=1)
    expected = TokenScores(ContributionWeights(model, language_layers(model))).attribute(inputs)
    found = explain(model, words, inputs)
    assert torch.allclose(found.scores["contribution"], expected[0], atol=1e-6)
    assert len(found.heads) == 2
    assert torch.allclose(found.maps["contribution-signed"].sum(-1), torch.ones(10), atol=1e-4)
    mirrored = {**inputs, "pixel_values": -inputs["pixel_values"]}
    other = explain(model, words, mirrored)
    assert not torch.allclose(found.scores["contribution"], other.scores["contribution"], atol=1e-4)


def test_channels_are_not_tokens_even_if_there_are_as_many(words: Any) -> None:
    """An image ``(1, 3, 16, 16)`` beside a prompt of three tokens."""
    from captum_cw.text.prompts import extended

    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": pixels(1, 3, 16, 16)}
    found = extended(inputs, torch.tensor([4]))
    assert torch.equal(found["pixel_values"], inputs["pixel_values"])
    assert found["input_ids"].tolist() == [[1, 2, 3, 4]]


def test_output_after_an_image_is_of_the_type_of_text() -> None:
    from captum_cw.text.prompts import extended

    inputs = {
        "input_ids": torch.tensor([[7, 3]]),
        "mm_token_type_ids": torch.tensor([[0, 1]]),
        "cross_attention_mask": torch.tensor([[[[0]], [[1]]]]),
    }
    found = extended(inputs, torch.tensor([8, 9]))
    assert found["mm_token_type_ids"].tolist() == [[0, 1, 0, 0]]
    assert found["cross_attention_mask"].flatten().tolist() == [0, 1, 1, 1]


def test_an_image_in_cross_attention_is_refused_where_its_tokens_would_be_ranked() -> None:
    sizes = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = transformers.MllamaConfig(
        text_config={**sizes, "rope_parameters": ROPE, "rope_scaling": {"rope_type": "default"}},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )
    model = build(transformers.MllamaForConditionalGeneration, config)
    ids = torch.tensor([[3, 20, 21, 22, 23, 24, 25]])
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1).long(),
        "aspect_ratio_mask": torch.ones(1, 1, 1).long(),
        "cross_attention_mask": torch.ones(1, 7, 1, 1).long(),
    }
    for changed in (
        remove_tokens(model, "contribution", 0.5),
        remove_tokens(model, "contribution", 0.5, scoring="clean"),
        scale_values(model, 0.0, positions=0),
    ):
        with pytest.raises(UnsupportedModelError, match="cross-attention"), torch.no_grad():  # noqa: SIM117
            with changed:
                model(**inputs)


def test_single_tokens_of_a_masked_language_model_are_measured_beside_padding() -> None:
    model = build(transformers.BertForMaskedLM, transformers.BertConfig(**SIZES))
    inputs = {
        "input_ids": torch.tensor([[9, 0, 0], [12, 0, 0]]),
        "attention_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
    }
    metric = ComprehensivenessSufficiency(
        model, [0.5], quantity="nll", mask_token_id=5, protect_sinks=False
    )
    result = metric.evaluate({"ours": "contribution"}, inputs, show_progress=False)
    assert [record["count"] for record in result.records] == [1, 1]
