"""``explain`` tells what a prediction is made of, for what a person may ask."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import Explanation, InputContributions, TargetContributions, TokenScores, explain
from captum_cw.capture import UnsupportedModelError
from support.models import GATED_MODELS, SIZES, bert, build, gemma3, gpt2, llama, mistral

IDS = torch.tensor([[1, 5, 3, 9, 1, 30, 12]])
MASK = 62  # the last token of the tokenizer
MASKED = torch.tensor([[1, 5, MASK, 9, 1]])
MODELS: dict[str, Any] = {
    "llama": llama,
    "gpt2": gpt2,
    "window": mistral,
    "gemma3": gemma3,
    **GATED_MODELS,
}
CLASSES = {
    "id2label": {0: "bad", 1: "good", 2: "fair"},
    "label2id": {"bad": 0, "good": 1, "fair": 2},
}


@pytest.fixture
def masking_tokenizer(tiny_tokenizer: Any) -> Any:
    """The last token is the masked token."""
    tiny_tokenizer.mask_token = tiny_tokenizer.convert_ids_to_tokens(MASK)
    return tiny_tokenizer


def classifier(**options: Any) -> nn.Module:
    return bert(transformers.BertForSequenceClassification, **{**CLASSES, **options})


def close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def check(found: Explanation, model: nn.Module, ids: Tensor, target: Any, contrast: Any) -> None:
    """Compare with the classes that compute the same, and with the model's own logits."""
    sums: dict[str, Any] = {"reduction": "sum", "layers": "sum", "heads": "sum", "signed": True}
    by_values = TokenScores(TargetContributions(model), **sums)
    asked = {"target": target, "contrast": contrast}
    close(found.scores["target"], by_values.attribute(ids, **asked)[0])
    close(found.scores["input"], InputContributions(model).attribute(ids, **asked)[0])
    close(found.maps["target"].sum(0), found.scores["target"])
    with torch.no_grad():
        logits = model(ids).logits[0]
    value, values = 0.0, {}
    for sign, name, place in ((1, "target", target), (-1, "contrast", contrast)):
        if place is not None:
            position, number = place if isinstance(place, tuple) else (-1, place)
            row = logits if logits.dim() == 1 else logits[position]
            value += sign * float(row[number])
            values[name] = float(row.softmax(-1)[number])
    assert float(found.settings["target value"]) == pytest.approx(value, rel=1e-3, abs=1e-4)
    for name in ("target", "contrast"):
        shown = found.settings.get(f"{name} probability")
        assert (shown is None) == (name not in values)
        assert shown is None or float(shown) == pytest.approx(values[name], rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_classes(name: str, tiny_tokenizer: Any) -> None:
    model = MODELS[name]()
    found = explain(model, tiny_tokenizer, IDS, target=" c", contrast=" x")
    assert (found.settings["target"], found.settings["contrast"]) == (" c", " x")
    check(found, model, IDS, 3, 24)


@pytest.mark.parametrize(
    ("target", "contrast", "same"),
    {
        "the first token of a text": ("c d", "x", (3, 24)),
        "numbers": (3, 24, (3, 24)),
        "zero": (3, 0, (3, 0)),
        "positions": ((2, 3), (2, 24), ((2, 3), (2, 24))),
        "from the end": ((-2, 0), None, ((-2, 0), None)),
        "two positions": ((2, 3), "x", ((2, 3), 24)),
    }.values(),
)
def test_targets_are_texts_numbers_and_positions(
    target: Any, contrast: Any, same: Any, tiny_tokenizer: Any
) -> None:
    model = llama()
    check(explain(model, tiny_tokenizer, IDS, target=target, contrast=contrast), model, IDS, *same)


def test_without_a_target_the_own_prediction_is_explained(tiny_tokenizer: Any) -> None:
    model = llama()
    with torch.no_grad():
        best = int(model(IDS).logits[0, -1].argmax())
    found = explain(model, tiny_tokenizer, IDS)
    assert found.predicted is not None
    assert found.settings["target"] == found.predicted[-1]
    check(found, model, IDS, best, None)
    check(explain(model, tiny_tokenizer, IDS, contrast=24), model, IDS, best, 24)


def test_a_masked_model_predicts_its_one_masked_token(masking_tokenizer: Any) -> None:
    model = bert()
    with torch.no_grad():
        best = int(model(MASKED).logits[0, 2].argmax())
    check(explain(model, masking_tokenizer, MASKED), model, MASKED, (2, best), None)
    found = explain(model, masking_tokenizer, MASKED, target=" c", contrast=24)
    check(found, model, MASKED, (2, 3), (2, 24))
    found = explain(model, masking_tokenizer, MASKED, target=(4, 3))
    check(found, model, MASKED, (4, 3), None)
    two = torch.tensor([[MASK, 5, MASK]])
    assert "target" not in explain(model, masking_tokenizer, two).scores


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_classes_have_labels(kind: str, tiny_tokenizer: Any) -> None:
    config = transformers.LlamaConfig(**SIZES, **CLASSES)
    decoder = transformers.LlamaForSequenceClassification
    model = classifier() if kind == "encoder" else build(decoder, config)
    found = explain(model, tiny_tokenizer, IDS, target="good", contrast="bad")
    assert (found.settings["target"], found.settings["contrast"]) == ("good", "bad")
    check(found, model, IDS, 1, 0)
    check(explain(model, tiny_tokenizer, IDS, target=2), model, IDS, 2, None)
    with torch.no_grad():
        best = int(model(IDS).logits[0].argmax())
    own = explain(model, tiny_tokenizer, IDS)
    assert own.settings["target"] == CLASSES["id2label"][best]
    check(own, model, IDS, best, None)


@pytest.mark.parametrize("label2id", [None, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}])
def test_names_of_classes_need_only_one_of_the_two_tables(
    label2id: Any, tiny_tokenizer: Any
) -> None:
    model = classifier()
    model.config.label2id = label2id
    found = explain(model, tiny_tokenizer, IDS, target="good")
    assert found.settings["target"] == "good"
    check(found, model, IDS, 1, None)
    assert explain(model, tiny_tokenizer, IDS, target=1).settings["target"] == "good"


@pytest.mark.parametrize(
    "options",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"id2label": {0: "value"}, "label2id": {"value": 0}},
    ],
)
def test_classes_that_do_not_exclude_each_other_have_no_probability(
    options: Any, tiny_tokenizer: Any
) -> None:
    found = explain(classifier(**options), tiny_tokenizer, IDS)
    assert "target value" in found.settings
    assert "target probability" not in found.settings


@pytest.mark.parametrize(
    ("model", "asked", "kind", "message"),
    {
        "unknown label": (
            classifier,
            {"target": "god"},
            ValueError,
            r"'god' is not a class of the model: its classes are \['bad', 'good', 'fair'\]",
        ),
        "unknown contrast": (classifier, {"contrast": "god"}, ValueError, "'god' is not a class"),
        "empty": (llama, {"target": ""}, ValueError, "'' has no tokens: give a word"),
        "empty contrast": (llama, {"contrast": ""}, ValueError, "'' has no tokens: give a word"),
        "itself": (
            llama,
            {"target": "c", "contrast": 3},
            ValueError,
            "the contrast 3 are the same",
        ),
        "alike": (llama, {"target": "c d", "contrast": "c e"}, ValueError, "same token ' c'"),
        "number": (llama, {"target": 64}, IndexError, r"target=64 is out of range.*0\.\.63"),
        "position": (llama, {"target": (7, 3)}, IndexError, "position 7, but the model predicts 7"),
        "type": (llama, {"target": 0.5}, TypeError, r"target=0\.5 is not a target: give"),
        "no logits": (
            lambda: llama().model,
            {"target": 3},
            TypeError,
            r"without logits.*AutoModelForCausalLM",
        ),
    }.values(),
)
def test_what_is_no_target_is_refused(
    model: Any, asked: Any, kind: Any, message: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(kind, match=message):
        explain(model(), tiny_tokenizer, IDS, **asked)


class Blurred(nn.Module):
    """A function that is not linear, and that nobody knows the rule of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, -1)


def test_a_model_that_is_not_understood_has_the_other_measures(tiny_tokenizer: Any) -> None:
    model: Any = llama()
    model.model.layers[0].mlp.act_fn = Blurred().eval()
    with pytest.warns(UserWarning, match="Contributions to the prediction are left out.") as warned:
        found = explain(model, tiny_tokenizer, IDS)
    assert [Path(w.filename) for w in warned] == [Path(__file__)]
    assert list(found.maps) == ["attention", "vw", "vwon", "contribution", "contribution-signed"]
    assert "target" not in found.settings
    for asked in ({"target": "c"}, {"contrast": 3}):
        with pytest.raises(UnsupportedModelError, match="logcumsumexp|act_fn"):
            explain(model, tiny_tokenizer, IDS, **asked)


def test_a_model_without_gradients_has_the_other_measures(tiny_tokenizer: Any) -> None:
    """As those whose kernels have no backward pass."""
    model: Any = llama()
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.view(torch.int32).view(torch.float32)
    )
    with pytest.warns(UserWarning, match=r"are left out\. The target, or a part of it"):
        assert "target" not in explain(model, tiny_tokenizer, IDS).scores
    with pytest.raises(ValueError, match="does not depend on the inputs by a gradient"):
        explain(model, tiny_tokenizer, IDS, target="c")


def test_a_model_without_logits_has_no_target(tiny_tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (llama().model, bert(transformers.BertModel)):
            found = explain(model, tiny_tokenizer, IDS)
            assert list(found.scores) == list(found.maps)
            assert "target" not in found.scores


def test_files_and_groups_keep_the_target(tiny_tokenizer: Any, tmp_path: Path) -> None:
    found = explain(llama(), tiny_tokenizer, IDS, target=" c", contrast=" x")
    found.save(tmp_path / "a.safetensors")
    loaded = Explanation.load(tmp_path / "a.safetensors")
    assert loaded.settings == found.settings
    assert torch.equal(loaded.maps["target"], found.maps["target"])
    grouped = loaded.by_span([(0, 2), (2, 3), (3, 7)])
    expected = torch.stack([x.sum() for x in found.scores["target"].split([2, 1, 4])])
    close(grouped.scores["target"], expected)
    close(grouped.maps["target"].sum(0), expected)
    averaged = found.maps["attention"][3:].mean(0)
    close(grouped.maps["attention"][2], torch.stack([x.sum() for x in averaged.split([2, 1, 4])]))
    assert grouped.settings["target probability"] == found.settings["target probability"]
