"""Inputs that some models take and others do not: the model is run, and its errors explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BatchEncoding

from captum_cw import AttentionWeights, ContributionWeights, TokenScores, remove_tokens
from support.inputs import token_ids
from support.models import build, gpt2, llama, t5

SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def seq2seq(family: str, head: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**SEQ2SEQ, **options)
    config._attn_implementation = "eager"
    return build(getattr(transformers, f"{family}{head}"), config)


def ending(T: int = 7) -> Tensor:
    """Texts that end as BART's do, which its classifiers ask for."""
    ids = token_ids(T=T)
    ids[:, -1] = 2
    return ids


# ---------------------------------------------------------------------------------------------
# Decoders that make their own tokens


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("Bart", "Model"),
        ("Bart", "ForSequenceClassification"),
        ("Bart", "ForQuestionAnswering"),
        ("Bart", "ForConditionalGeneration"),
        ("MBart", "ForSequenceClassification"),
        ("PLBart", "Model"),
        ("Mvp", "ForQuestionAnswering"),
    ],
)
def test_a_decoder_that_makes_its_own_tokens_runs_as_the_model_does(family: str, head: str) -> None:
    model = seq2seq(family, head)
    ids = ending()
    own: dict[str, Any] = {"output_attentions": True, "return_dict": True}
    with torch.no_grad():
        output = model(ids, **own)
    for kind, expected in (
        ("self", [*output.encoder_attentions, *output.decoder_attentions]),
        ("cross", list(output.cross_attentions)),
    ):
        method = AttentionWeights(model, kind=kind)  # type: ignore[arg-type]
        found = method.attribute(ids)
        assert len(found) == len(expected) == len(method.layers)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_its_layers_are_found_before_any_text_is_given() -> None:
    model = seq2seq("Bart", "ForSequenceClassification")
    model.config.eos_token_id = 9  # the classifier reads the text's state there
    assert len(ContributionWeights(model).layers) == 4


def test_the_mask_of_the_encoder_is_not_that_of_a_decoder_which_makes_its_tokens() -> None:
    model = seq2seq("Bart", "Model")
    ids, mask = ending(), torch.ones(2, 7, dtype=torch.long)
    mask[1, -2:] = 0
    maps = AttentionWeights(model).attribute({"input_ids": ids, "attention_mask": mask})
    encoder, decoder = maps[0][1], maps[2][1]
    assert not encoder[:, -2:].any()
    assert not encoder[:, :, -2:].any()
    assert torch.allclose(decoder.sum(-1), torch.ones(4, 7), atol=1e-5)


def test_a_decoder_that_lacks_tokens_is_refused_in_our_words_from_the_models_error() -> None:
    with pytest.raises(ValueError, match=r"decoder's tokens.*decoder_input_ids") as found:
        ContributionWeights(t5()).attribute(token_ids())
    with pytest.raises(Exception, match=".") as own:  # whatever a release says
        t5()(token_ids())
    assert isinstance(found.value.__cause__, type(own.value))
    assert str(own.value) in str(found.value)


def test_a_model_of_sounds_whose_decoder_lacks_tokens_is_refused_in_our_words() -> None:
    config = transformers.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=9, max_target_positions=20
    )
    model = build(transformers.WhisperModel, config)
    with pytest.raises(ValueError, match=r"decoder's tokens.*input_features and decoder_input_ids"):
        ContributionWeights(model).attribute({"input_features": torch.randn(2, 8, 18)})


def test_an_error_of_a_decoder_that_had_tokens_stays_what_it_is() -> None:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        num_labels=2,
        decoder_start_token_id=0,
        eos_token_id=1,
    )
    model = build(transformers.T5ForSequenceClassification, config)
    with pytest.raises(Exception, match=".") as own:  # there is no token of the end
        model(token_ids())
    with pytest.raises(type(own.value)) as found:
        ContributionWeights(model).attribute(token_ids())
    assert str(found.value) == str(own.value)


def test_our_own_errors_are_not_taken_for_the_models() -> None:
    model: Any = seq2seq("Bart", "Model")
    with torch.no_grad():
        model.encoder.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^The output of attention layer 'encoder\.layers\.1"):
        ContributionWeights(model).attribute(ending())


# ---------------------------------------------------------------------------------------------
# Multiple choice


def choices(B: int = 2, C: int = 3, T: int = 6) -> dict[str, Tensor]:
    ids = token_ids(B * C, T).view(B, C, T)
    mask = torch.ones_like(ids)
    mask[1, 2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def flat(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.flatten(0, 1) for name, x in inputs.items()}


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_choices_are_examples_in_order_and_each_keeps_its_padding(family: str) -> None:
    options = {"dim": 32, "n_layers": 2, "n_heads": 4} if family == "DistilBert" else {}
    config = getattr(transformers, f"{family}Config")(**BERT, **options)
    model = build(getattr(transformers, f"{family}ForMultipleChoice"), config)
    inputs = choices()
    inner: Any = getattr(model, model.base_model_prefix)  # type: ignore[arg-type]
    for kind in (AttentionWeights, ContributionWeights):
        found, expected = kind(model).attribute(inputs), kind(inner).attribute(flat(inputs))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == (6, 4, 6, 6)
            assert torch.allclose(a, b, atol=1e-6)
            assert not a[5, :, -2:].any()
            assert not a[5, :, :, -2:].any()
    scores = TokenScores(ContributionWeights(model), queries=-1).attribute(inputs)
    assert torch.allclose(
        scores, TokenScores(ContributionWeights(inner), queries=-1).attribute(flat(inputs))
    )


def test_choices_are_taken_as_embeddings_too() -> None:
    model: Any = build(transformers.BertForMultipleChoice, transformers.BertConfig(**BERT))
    inputs = choices()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    for a, b in zip(
        ContributionWeights(model).attribute(given),
        ContributionWeights(model).attribute(inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_values_are_removed_of_each_choice_alone(scoring: Any) -> None:
    model: Any = build(transformers.BertForMultipleChoice, transformers.BertConfig(**BERT))
    inputs = choices()
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5, scoring=scoring):
        found = model(**inputs).logits
    with torch.no_grad(), remove_tokens(model.bert, "contribution", 0.5, scoring=scoring):
        expected = model.classifier(model.bert(**flat(inputs)).pooler_output).view(2, 3)
    assert torch.allclose(found, expected, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(found, model(**inputs).logits, atol=1e-3)


def test_a_model_that_folds_dimensions_before_the_last_takes_them() -> None:
    model, ids = gpt2(), token_ids(6, 5)
    found = ContributionWeights(model).attribute(ids.view(2, 3, 5))
    for a, b in zip(found, ContributionWeights(model).attribute(ids), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 4, 4), (1, 1, 5)])
def test_choices_are_refused_where_the_model_does_not_take_them(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        ContributionWeights(llama()).attribute(torch.randint(3, 60, shape))
    bert = build(transformers.BertModel, transformers.BertConfig(**BERT))
    with pytest.raises(ValueError, match=r"shape \(.*expected \(B, T\); for one text, ids\[None\]"):
        ContributionWeights(bert).attribute(torch.randint(3, 60, shape))


def test_a_mask_of_choices_must_fit_them() -> None:
    model = build(transformers.BertForMultipleChoice, transformers.BertConfig(**BERT))
    inputs = {**choices(), "attention_mask": torch.ones(4, 6)}
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 6\)"):
        ContributionWeights(model).attribute(inputs)


# ---------------------------------------------------------------------------------------------
# Modules that take one mapping


class Sentences(nn.Module):
    """Takes its features, and adds to them, as a ``SentenceTransformer`` does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner: Any = build(transformers.BertModel, transformers.BertConfig(**BERT))
        self.types: list[type] = []

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # noqa: A002
        self.types = [*self.types, type(input)]
        names = ("input_ids", "attention_mask", "token_type_ids")
        given = {name: input[name] for name in names if name in input}
        states = self.inner(**given, **kwargs).last_hidden_state
        input["attention_mask"].mul_(0)
        input.update({"token_embeddings": states, "input_ids": None})
        return input


def sentences() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": token_ids(), "attention_mask": mask}


@pytest.mark.parametrize(
    "wrapped", [dict, BatchEncoding, lambda x: {**x, "modality": "text", "prompts": ["a", "b"]}]
)
def test_a_module_of_one_mapping_is_given_a_copy_of_it(wrapped: Any) -> None:
    model = Sentences().eval()
    inputs = wrapped(sentences())
    before = {name: x.clone() for name, x in sentences().items()}
    expected = ContributionWeights(model.inner).attribute(sentences())
    found = ContributionWeights(model).attribute(inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert not a[1, :, -3:].any()
        assert not a[1, :, :, -3:].any()
    assert [name for name in inputs if name in before] == list(before)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    assert "token_embeddings" not in inputs


def test_a_module_of_one_mapping_sees_the_type_that_it_was_given() -> None:
    model = Sentences().eval()
    seen: list[type] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    ContributionWeights(model).attribute(BatchEncoding(sentences()))
    ContributionWeights(model).attribute(sentences())
    assert seen == [BatchEncoding, dict]


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_values_are_removed_in_a_module_of_one_mapping(scoring: Any) -> None:
    model = Sentences().eval()
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5, scoring=scoring):
        found = model(sentences())["token_embeddings"]
    with torch.no_grad(), remove_tokens(model.inner, "contribution", 0.5, scoring=scoring):
        expected = model.inner(**sentences()).last_hidden_state
    real = sentences()["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=1e-6)


def test_a_callable_of_one_mapping_is_given_it_as_a_whole() -> None:
    model: Any = llama()
    layers = [layer.self_attn for layer in model.model.layers]
    found = ContributionWeights(lambda batch: model(**batch), layers).attribute(sentences())
    for a, b in zip(found, ContributionWeights(model).attribute(sentences()), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_mapping_that_does_not_name_an_argument_is_refused_if_the_model_fails() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    model = Plain().eval()
    assert len(ContributionWeights(model).attribute(token_ids())) == 2
    with pytest.raises(ValueError, match="no arguments 'input_ids'.*mapping as a whole"):
        ContributionWeights(model).attribute({"input_ids": token_ids()})
    with pytest.raises(ValueError, match="attention_mask has shape"):
        ContributionWeights(Sentences().eval()).attribute(
            {"input_ids": token_ids(), "attention_mask": torch.ones(2, 8)}
        )


@pytest.mark.parametrize("family", ["pair of BERTs", "Marian"])
def test_the_ids_of_a_decoder_are_of_its_own_vocabulary(family: str) -> None:
    model = two_vocabularies(family)
    size = model.get_decoder().get_input_embeddings().num_embeddings
    inputs = {"input_ids": ending(), "decoder_input_ids": ending() + size - 64}
    inputs["input_ids"][:, 1] = 63
    inputs["decoder_input_ids"][:, 1] = size - 1
    assert len(TokenScores(ContributionWeights(model, kind="cross")).attribute(inputs)) == 2
    inputs["decoder_input_ids"][:, 1] = size
    with pytest.raises(ValueError, match=f"Token id {size} of decoder_input_ids is outside"):
        ContributionWeights(model, kind="cross").attribute(inputs)


def two_vocabularies(family: str) -> nn.Module:
    """A translator that reads 64 words and writes 90."""
    if family == "pair of BERTs":
        reader, writer = (transformers.BertConfig(**{**BERT, "vocab_size": n}) for n in (64, 90))
        kind = transformers.EncoderDecoderConfig
        pair = kind.from_encoder_decoder_configs(reader, writer)
        return build(transformers.EncoderDecoderModel, pair)
    return seq2seq(
        "Marian",
        "MTModel",
        decoder_vocab_size=90,
        tie_word_embeddings=False,
        share_encoder_decoder_embeddings=False,
    )
