"""``explain`` agrees with the measures, and results of other classes become explanations."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from torch import Tensor, nn

from captum_cw import (
    AttentionWeights,
    ContributionWeights,
    Explanation,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
    explain,
    functional,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.explanation.heads import HeadMaps
from support.models import GATED_MODELS, SIZES, bert, build, gemma3, gpt2, llama, mistral, t5
from support.state import state_of

IDS = torch.tensor([[1, 5, 3, 9, 1, 30, 12]])
METHODS: dict[str, Any] = {
    "attention": AttentionWeights,
    "vw": VWAttention,
    "vwon": VWONAttention,
    "contribution": ContributionWeights,
}


MODELS: dict[str, Any] = {
    "llama": llama,
    "gpt2": gpt2,
    "window": mistral,
    "bert": bert,
    "gemma3": gemma3,
    **GATED_MODELS,
}


def of(name: str, model: nn.Module, space: Any) -> Any:
    return METHODS[name](model, **({} if name == "attention" else {"space": space}))


@pytest.mark.parametrize("space", ["attention", "residual"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_scores_and_heads_are_those_of_the_measures(
    name: str, space: Any, tiny_tokenizer: Any
) -> None:
    model = MODELS[name]()
    before = state_of(model)
    found = explain(model, tiny_tokenizer, IDS, space=space)
    assert state_of(model) == before
    of_layers = [*METHODS, "contribution-signed"]
    if name == "bert":  # a text without a masked token has no prediction
        assert list(found.scores) == list(found.maps) == of_layers
    else:
        assert list(found.scores) == ["target", "input", *of_layers]
        assert list(found.maps) == ["target", *of_layers]
    for measure in METHODS:
        method = of(measure, model, space)
        dense = torch.stack([x[0] for x in method.attribute(IDS)])  # (L, H, T, S)
        close(found.maps[measure], dense.abs().mean((0, 1)))
        close(found.scores[measure], TokenScores(method).attribute(IDS)[0])
        for number, layer in enumerate(found.heads):
            close(spread(layer.keys, layer.measure(measure), 7), dense[number].abs())
    method = ContributionWeights(model, space=space)
    dense = torch.stack([x[0] for x in method.attribute(IDS)])
    close(found.maps["contribution-signed"], dense.sum(1).mean(0))
    close(found.maps["contribution-signed"].sum(-1), torch.ones(7))
    signed = TokenScores(method, heads="sum", signed=True)
    close(found.scores["contribution-signed"], signed.attribute(IDS)[0])
    share = method.head_share(IDS)[0]
    for number, layer in enumerate(found.heads):
        assert layer.name == method.layers[number]
        close(spread(layer.keys, layer.measure("contribution-signed"), 7), dense[number])
        close(layer.share, share[number])


def close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def spread(keys: Tensor, x: Tensor, S: int) -> Tensor:
    """``(H, T, K)`` at their places; a key that stands twice has something once."""
    return torch.zeros(*x.shape[:2], S).scatter_add(-1, keys.long(), x)


def test_the_keys_that_are_kept_are_those_that_matter_most(tiny_tokenizer: Any) -> None:
    model = llama()
    found = explain(model, tiny_tokenizer, IDS, top_k=2)
    for layer, d in zip(found.heads, ContributionWeights(model).decompose(IDS), strict=True):
        importance = torch.maximum(
            d.attention / d.attention.amax(-1, keepdim=True),
            d.contribution.abs() / d.contribution.abs().amax(-1, keepdim=True),
        )[0]
        best = importance.topk(2).indices
        assert torch.equal(layer.keys[:, 1:].long(), best[:, 1:])  # the first sees one key
        close(layer.attention, d.attention[0].gather(-1, best))
    assert explain(model, tiny_tokenizer, IDS, top_k=1).heads[0].keys.shape == (4, 7, 1)
    assert explain(model, tiny_tokenizer, IDS, top_k=0).heads == ()


def test_blocks_of_queries_change_nothing(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    whole = explain(model, tiny_tokenizer, IDS, top_k=4)
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", 60)  # two queries
    blocks = explain(model, tiny_tokenizer, IDS, top_k=4)
    for name, x in whole.maps.items():
        close(blocks.maps[name], x)
        close(blocks.scores[name], whole.scores[name])
    for one, other in zip(whole.heads, blocks.heads, strict=True):
        close(spread(other.keys, other.attention, 7), spread(one.keys, one.attention, 7))


def test_predictions_are_known_for_language_models_only(tiny_tokenizer: Any) -> None:
    model = llama()
    found = explain(model, tiny_tokenizer, IDS)
    with torch.no_grad():
        best = model(IDS).logits[0].softmax(-1).max(-1)
    close(found.probability, best.values)
    vocabulary = tiny_tokenizer.get_vocab()
    assert [vocabulary.get(x.strip(), 63) for x in found.predicted] == best.indices.tolist()
    for kind in (transformers.BertForMaskedLM, transformers.BertLMHeadModel):  # the other generates
        both_ways = build(kind, transformers.BertConfig(**SIZES))
        assert explain(both_ways, tiny_tokenizer, IDS).predicted is None
    classifier = build(
        transformers.LlamaForTokenClassification, transformers.LlamaConfig(**SIZES, num_labels=9)
    )
    assert explain(classifier, tiny_tokenizer, IDS).predicted is None


def test_a_prediction_beyond_the_tokenizer_is_shown_as_its_number(tiny_tokenizer: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[63] = 1.0
    found = explain(model, tiny_tokenizer, IDS).predicted
    assert set(found) == {"⟨#63⟩", "?"}


def test_repr_is_one_line(tiny_model: Any, tiny_tokenizer: Any) -> None:
    names = "attention, vw, vwon, contribution, contribution-signed"
    assert repr(explain(tiny_model, tiny_tokenizer, "a b c")) == (
        f"<Explanation: 3 tokens; scores of target, input, {names}; maps of target, {names}; "
        "heads of 2 layers>"
    )
    given = Explanation(["a", "b"], {}, {"m": torch.ones(3, 2)}, queries=["x", "y", "z"])
    assert repr(given) == "<Explanation: 2 tokens; 3 queries; maps of m>"


def test_a_single_token_contributes_everything(tiny_tokenizer: Any) -> None:
    for model in (llama(), bert()):
        found = explain(model, tiny_tokenizer, torch.tensor([4]))
        close(found.maps["contribution-signed"], torch.ones(1, 1))
        close(found.maps["attention"], torch.ones(1, 1))


def test_zero_outputs_have_zero_rows_and_a_warning(tiny_tokenizer: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    with pytest.warns(UserWarning, match="7 attention outputs vanish"):
        found = explain(model, tiny_tokenizer, IDS)
    with pytest.warns(UserWarning, match="vanish"):
        gone, _ = explain(model, tiny_tokenizer, IDS, top_k=1).heads
    close(gone.attention[..., 0], AttentionWeights(model).attribute(IDS)[0][0].amax(-1))
    gone = found.heads[0]
    assert not gone.output_norm.any()
    assert not gone.measure("contribution-signed").any()
    assert not gone.share.any()
    assert gone.attention.any()
    close(found.maps["contribution-signed"].sum(-1), torch.full((7,), 0.5))
    assert all(x.isfinite().all() for x in found.maps.values())


def test_a_text_and_its_ids_are_explained_alike(tiny_tokenizer: Any) -> None:
    model = llama()
    as_text, as_ids = (
        explain(model, tiny_tokenizer, x) for x in ("a e c", torch.tensor([1, 5, 3]))
    )
    assert as_text.tokens == as_ids.tokens == [" a", " e", " c"]
    assert as_text.words == as_ids.words == [0, 1, 2]
    assert all(torch.equal(x, as_ids.maps[name]) for name, x in as_text.maps.items())
    assert as_text.offsets == [(0, 1), (2, 3), (4, 5)]
    assert as_ids.offsets is None


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    {
        "empty": (lambda t: explain(llama(), t, ""), ValueError, r"shape \(1, 0\).*one token"),
        "a batch": (lambda t: explain(llama(), t, IDS.expand(2, 7)), ValueError, r"shape \(2, 7\)"),
        "keys": (
            lambda t: explain(llama(), t, IDS, top_k=-1),
            ValueError,
            "top_k must be 0 or more, got -1",
        ),
        "an encoding": (
            lambda t: explain(llama(), t, t(["a b", "c d"], return_tensors="pt")),
            ValueError,
            r"shape \(2, 2\): give one text",
        ),
        "two texts": (
            lambda t: explain(t5(), t, IDS),
            UnsupportedModelError,
            "T5For.*an encoder and a decoder.*kind='cross'",
        ),
    }.values(),
)
def test_what_cannot_be_explained_is_refused(
    call: Any, kind: Any, message: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(kind, match=message):
        call(tiny_tokenizer)


def test_maps_that_would_not_fit_are_refused_with_their_size(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr("captum_cw._utils.memory.psutil.virtual_memory", Memory)
    model = llama()
    before = state_of(model)
    with pytest.raises(
        MemoryError, match=r"GB \(5 maps of 7 x 7, and 7 keys.*2 x 4 heads.*top_k=0"
    ):
        explain(model, tiny_tokenizer, IDS)
    needed = 4 * (6 * 7 * 7 + 2 * 4 * 7 * (7 * 4 + 1))
    Memory.available = needed - 1
    with pytest.raises(MemoryError):
        explain(model, tiny_tokenizer, IDS)
    Memory.available = needed
    explain(model, tiny_tokenizer, IDS)
    assert state_of(model) == before


# Conversions


def test_dense_maps_make_the_same_explanation(tiny_tokenizer: Any) -> None:
    for model in (llama(), mistral(), bert()):
        expected = explain(model, tiny_tokenizer, IDS, top_k=3)
        method = ContributionWeights(model)
        found = Explanation.from_maps(
            expected.tokens, method.decompose(IDS), layers=method.layers, top_k=3
        )
        plain = Explanation.from_maps(
            expected.tokens, {name: kind(model).attribute(IDS) for name, kind in METHODS.items()}
        )
        for name in ("attention", "vwon", "contribution", "contribution-signed"):
            for made in (found, plain):
                close(made.maps[name], expected.maps[name])
                close(made.scores[name], expected.scores[name])
        close(plain.maps["vw"], expected.maps["vw"])
        assert not plain.heads
        for one, other in zip(found.heads, expected.heads, strict=True):
            assert one.name == other.name
            close(
                spread(one.keys, one.measure("vwon"), 7),
                spread(other.keys, other.measure("vwon"), 7),
            )
            close(one.share, other.share)
            assert one.output_norm.isnan().all()


def test_only_attention_itself_stays_negative() -> None:
    a, relative_norm, cosine = torch.tensor([[[[[0.2, -0.8]]]], [[[[2.0, 1.0]]]], [[[[1.0, 1.0]]]]])
    d = functional.Decomposition(a, relative_norm, cosine, a * relative_norm * cosine)
    (layer,) = Explanation.from_maps(["a", "b"], [d], queries=["q"]).heads
    assert layer.keys.tolist() == [[[1, 0]]]
    assert torch.allclose(layer.measure("attention"), torch.tensor([-0.8, 0.2]))
    assert torch.allclose(layer.measure("vwon"), torch.tensor([0.8, 0.4]))
    assert torch.allclose(layer.measure("contribution-signed"), torch.tensor([-0.8, 0.4]))
    with pytest.raises(ValueError, match="measure='norm'.*signed"):
        layer.measure("norm")


def test_a_query_sees_a_key_if_any_head_is_not_zero() -> None:
    both = torch.tensor([[[[1.0, 0.0], [0.0, 0.5]], [[0.5, 0.0], [1.0, 0.5]]]])  # (1, H, T, S)
    found = Explanation.from_maps(["a", "b"], {"m": [both]})
    assert found.scores["m"].tolist() == [0.625, 0.5]


def test_queries_may_be_other_tokens() -> None:
    model = t5()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "decoder_input_ids": torch.tensor([[4, 5]])}
    maps = ContributionWeights(model, kind="cross").attribute(inputs)
    found = Explanation.from_maps(list("abc"), {"contribution": maps}, queries=list("de"))
    close(found.maps["contribution-signed"].sum(-1), torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*and the queries"):
        Explanation.from_maps(list("abc"), {"contribution": maps})


@pytest.mark.parametrize(
    ("maps", "kind", "message"),
    [
        ({"ig": [torch.zeros(2, 1, 3, 3)]}, ValueError, r"'ig'.*\(2, 1, 3, 3\).*x\[:1\]"),
        ({"ig": [(torch.zeros(3),)]}, TypeError, "'ig'.*tuple"),
        ([torch.zeros(1, 1, 3, 3)], TypeError, "name the measure"),
        ({}, ValueError, "maps are empty"),
        ([], ValueError, "maps are empty"),
        ({"ig": []}, ValueError, "maps are empty"),
    ],
)
def test_other_things_than_maps_of_one_text_are_refused(maps: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        Explanation.from_maps(list("abc"), maps)


def test_shapes_that_do_not_fit_are_named() -> None:
    given = Explanation(["a", "b"], {"ig": torch.zeros(2)})
    for change, message in {
        "scores": ({"scores": {"ig": torch.zeros(1, 2)}}, r"scores\['ig'\].*\(1, 2\).*x\[0\]"),
        "words": ({"words": [0]}, "words has 1 entries, expected 2"),
        "probability": ({"probability": torch.zeros(3)}, "probability has 3 entries"),
        "offsets": ({"offsets": []}, "offsets has 0 entries"),
    }.values():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(given, **change)


def results(model: nn.Module, tokenizer: Any) -> dict[str, LLMAttributionResult]:
    """Ours and Captum's, of the same prompt and output."""
    inp = TextTokenInput("a b c", tokenizer, skip_tokens=["b"])
    template = TextTemplateInput("a {} c {}", ["b d", "e"])
    ablation = LLMAttribution(FeatureAblation(model), tokenizer)
    gradients = LayerIntegratedGradients(model, model.get_input_embeddings())
    shap = LLMAttribution(KernelShap(model), tokenizer)
    return {
        "ours": LLMTokenAttribution(ContributionWeights(model), tokenizer).attribute(inp, "d e"),
        "ablation": ablation.attribute(inp, "d e", use_cached_outputs=False),
        "template": ablation.attribute(template, "d e", use_cached_outputs=False),
        "gradients": LLMGradientAttribution(gradients, tokenizer).attribute(inp, "d e"),
        "shap": shap.attribute(inp, "d e", use_cached_outputs=False, n_samples=4),
    }


def test_results_of_captums_classes_become_explanations(
    tiny_model: nn.Module, tiny_tokenizer: Any
) -> None:
    for name, result in results(tiny_model, tiny_tokenizer).items():
        found = Explanation.from_llm(result, name)
        assert torch.equal(found.scores[name], result.seq_attr)
        if name == "ours":
            assert (found.tokens, found.queries) == (result.input_tokens, result.output_tokens)
        assert [x.strip() for x in found.tokens] == [x.strip() for x in result.input_tokens]
        assert [x.strip() for x in found.queries] == ["d", "e"]
        assert found.settings["method"] == name
        if name == "shap":
            assert result.token_attr is None
            assert not found.maps
        else:
            assert torch.equal(found.maps[name], result.token_attr)
        assert (found.probability is not None) == (name == "ours")
        assert (found.words is None) == (name in ("template", "gradients"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.to_dataframe()


def test_heads_are_of_the_tokens() -> None:
    def layer(T: int, key: int) -> HeadMaps:
        part = torch.ones(1, T, 1)
        return HeadMaps("l", key * part.int(), part, part, part, torch.ones(T), torch.ones(1, T))

    Explanation(["a", "b"], {}, heads=[layer(2, 1)])
    with pytest.raises(ValueError, match="keys from 2 to 2, but there are 2 tokens"):
        Explanation(["a", "b"], {}, heads=[layer(2, 2)])
    with pytest.raises(ValueError, match="'l' has 1 queries, expected 2"):
        Explanation(["a", "b"], {}, heads=[layer(1, 1)])


def test_a_model_from_a_folder_has_the_name_of_the_folder(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for name, expected in ((str(tmp_path), tmp_path.name), ("owner/model", "owner/model")):
        tiny_model.config._name_or_path = name
        assert explain(tiny_model, tiny_tokenizer, "a").settings["model"] == expected


def test_floats_are_refused_as_token_ids(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.float32: give token ids"):
        explain(tiny_model, tiny_tokenizer, torch.rand(3))


def test_maps_of_layers_of_different_shape_are_refused() -> None:
    maps = {"m": [torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 4)]}
    with pytest.raises(ValueError, match=r"\[\(3, 3\), \(3, 4\)\]"):
        Explanation.from_maps(["a", "b", "c"], maps)
