"""Comprehensiveness and sufficiency of models that predict classes, and of other outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import ComprehensivenessSufficiency, comprehensiveness, remove_values, sufficiency
from captum_cw.cli.demo_figures import explain_prediction
from captum_cw.cli.run_folder import save_result
from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.quantities import QuantityName
from support.inputs import token_ids
from support.models import SIZES, bert, build, llama

CLASSES = 3
MASK = 3


def classifier(kind: str) -> Any:
    if kind == "bert":
        return bert(transformers.BertForSequenceClassification, num_labels=CLASSES)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=CLASSES)
    return build(transformers.LlamaForSequenceClassification, config)


def masked_model() -> Any:
    return bert()


def tagger() -> Any:
    return bert(transformers.BertForTokenClassification, num_labels=CLASSES)


def batch() -> dict[str, Tensor]:
    """Two texts, the second with two padded tokens."""
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def first_class(logits: Tensor, batch: Any, clean: Tensor) -> Tensor:
    """A metric of one's own, of the text as the model is given it."""
    assert logits.shape == clean.shape == (len(batch["input_ids"]), CLASSES)
    return logits[:, 0] - clean[:, 0]


@pytest.mark.parametrize("metric", ["own", "log_prob", "prob", "kl"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_deltas_of_classes_equal_removal_by_hand(kind: str, metric: Any) -> None:
    model, inputs = classifier(kind), batch()
    scores = torch.arange(9.0).expand(2, 9)
    mask = torch.zeros(2, 1, 9, dtype=torch.bool)
    mask[0, 0, 7:] = mask[1, 0, 5:7] = True  # a quarter of the tokens, half rounded up
    with torch.no_grad():
        clean = model(**inputs).logits.double()
        with remove_values(model, [mask] * 2):
            changed = model(**inputs).logits.double()
    log_clean, log_changed = clean.log_softmax(-1), changed.log_softmax(-1)
    row, target = torch.arange(2), clean.argmax(-1)
    expected = {
        "own": changed[:, 0] - clean[:, 0],
        "log_prob": (log_clean - log_changed)[row, target],
        "prob": (log_clean.exp() - log_changed.exp())[row, target],
        "kl": (log_clean.exp() * (log_clean - log_changed)).sum(-1),
    }[metric]
    given = first_class if metric == "own" else metric
    settings: dict[str, Any] = {"quantity": given, "protect_sinks": False}
    found = comprehensiveness(model, inputs, scores, [0.25], **settings)
    assert expected.abs().min() > 1e-5
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("granularity", ["pair", "token"])
@pytest.mark.parametrize("scoring", ["online", "clean"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classifiers_are_measured_by_pairs_and_tokens(
    kind: str, scoring: Any, granularity: Any
) -> None:
    model = classifier(kind)
    choices: dict[str, Any] = {"scoring": scoring, "granularity": granularity}
    for metric in (first_class, "log_prob", "prob", "kl"):
        choices.update(quantity=metric, protect_sinks=False)
        whole = ComprehensivenessSufficiency(model, [0.5], **choices)
        result = whole.evaluate({"c": "contribution", "r": "random"}, batch(), show_progress=False)
        assert result.deltas("c", "sufficiency").isfinite().all()
        assert (result.deltas("c", "sufficiency") != 0).any()


def test_a_class_may_be_given() -> None:
    model, inputs = classifier("bert"), batch()
    settings: dict[str, Any] = {"quantity": "prob"}
    each = [sufficiency(model, inputs, "vw", [0.5], target=c, **settings) for c in range(CLASSES)]
    assert torch.stack(each).sum(0).abs().max() < 1e-6  # probabilities sum to one
    two = sufficiency(model, inputs, "vw", [0.5], target=torch.tensor([2, 0]), **settings)
    torch.testing.assert_close(two, torch.stack([each[2][0], each[0][1]]))
    for wrong in (CLASSES, -1):
        with pytest.raises(
            ValueError, match=rf"target={wrong}, but the model has the classes 0..2"
        ):
            sufficiency(model, inputs, "vw", [0.5], target=wrong, **settings)


@pytest.mark.parametrize("metric", ["perplexity", "nll"])
@pytest.mark.parametrize("make", [lambda: classifier("bert"), lambda: classifier("llama"), tagger])
def test_a_text_has_no_likelihood_by_a_classifier(make: Any, metric: QuantityName) -> None:
    with pytest.raises(
        ValueError, match=r"predicts classes, not tokens .* use quantity='log_prob'"
    ):
        sufficiency(make(), batch(), "contribution", [0.5], quantity=metric)


def test_labels_of_classes_are_no_labels_of_tokens() -> None:
    inputs = {**batch(), "labels": torch.tensor([0, 2])}

    def of_label(logits: Tensor, batch: Any, clean: Tensor) -> Tensor:
        return logits.gather(-1, batch["labels"][:, None])[:, 0]

    found = sufficiency(classifier("bert"), inputs, "vw", [0.5], quantity=of_label)
    assert (found != 0).all()


def test_a_mask_token_is_refused_where_nothing_is_masked() -> None:
    with pytest.raises(ValueError, match=f"mask_token_id={MASK} .* predicts classes: leave it out"):
        sufficiency(classifier("bert"), batch(), "vw", [0.5], quantity="kl", mask_token_id=MASK)
    with pytest.raises(ValueError, match="predicts the next token: leave it out"):
        sufficiency(llama(), token_ids(), "vw", [0.5], mask_token_id=MASK)


@pytest.mark.parametrize("make", [masked_model, tagger])
def test_without_a_mask_token_the_logits_are_those_of_the_text_as_it_is(make: Any) -> None:
    model, inputs = make(), batch()
    with torch.no_grad():
        logits = model(**inputs).logits
    seen = []

    def own(logits: Tensor, batch: Any, clean: Tensor) -> Tensor:
        seen.append(clean)
        return (logits - clean).abs().sum((1, 2))

    assert (sufficiency(model, inputs, "vw", [0.5], quantity=own) > 0).all()
    assert torch.equal(seen[0], logits)
    assert (sufficiency(model, inputs, "vw", [0.5], quantity="kl") > 0).all()
    for metric in ("log_prob", "prob"):
        with pytest.raises(ValueError, match="need one for the token after"):
            sufficiency(model, inputs, "vw", [0.5], quantity=metric)


def test_results_without_likelihood_are_saved_shown_and_refused_by_name(tmp_path: Path) -> None:
    metric = ComprehensivenessSufficiency(classifier("bert"), [0.25, 0.5], quantity="log_prob")
    settings: dict[str, Any] = {"resume_from": tmp_path / "run", "show_progress": False}
    methods = {"c": "contribution", "r": "random"}
    result = metric.evaluate(methods, batch(), **settings)
    assert metric.evaluate(methods, batch(), **settings).records == result.records
    assert not {"clean_nll", "nll", "count"} & result.records[0].keys()
    assert list(result.to_dataframe().columns) == ["method", "side", "rate", "delta"]
    (tmp_path / "out").mkdir()
    files = save_result(result, tmp_path / "out")
    assert {file.name for file in files} == {"result.json", "result.csv", "result.md", "curves.png"}
    again = FaithfulnessResult.load(tmp_path / "out" / "result.json")
    assert again.records == result.records
    assert again.compare("c", "r").difference.isfinite().all()
    for asked in (
        lambda: again.corpus,
        lambda: again.clean_corpus,
        lambda: again.compare("c", "r", statistic="nll"),
        lambda: again.plot(statistic="corpus"),
    ):
        with pytest.raises(
            ValueError, match="needs the likelihood of the texts, which is not known"
        ):
            asked()  # type: ignore[no-untyped-call]


def test_results_with_likelihood_keep_their_columns() -> None:
    result = ComprehensivenessSufficiency(llama(), [0.5]).evaluate(
        {"c": "contribution"}, token_ids(), show_progress=False
    )
    columns = ["method", "side", "rate", "delta", "delta_nll", "delta_corpus_perplexity"]
    assert list(result.to_dataframe().columns) == columns


# ---------------------------------------------------------------------------------------------
# Other outputs


class Returns(nn.Module):
    """A language model that returns its logits in another way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = llama(), how
        self.eval()
        self.config = self.inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()  # type: ignore[operator]

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        logits = self.inner(input_ids=input_ids, use_cache=False).logits
        loss = logits.sum()
        return {
            "logits, loss": (logits, loss),
            "loss, logits": (loss, logits),
            "losses, logits": (logits.sum(-1), logits),
            "tensor": logits,
        }[self.how]


@pytest.mark.parametrize("how", ["logits, loss", "loss, logits", "losses, logits", "tensor"])
def test_the_first_logits_of_tokens_count(how: str, tiny_tokenizer: Any) -> None:
    model, ids = Returns(how), token_ids()
    for metric in ("perplexity", "log_prob", "kl"):
        settings: dict[str, Any] = {"quantity": metric}
        found = sufficiency(model, ids, "contribution", [0.5], **settings)
        assert torch.equal(found, sufficiency(model.inner, ids, "contribution", [0.5], **settings))
    tiny_tokenizer.eos_token = "a"
    explained = explain_prediction(model, tiny_tokenizer, "b c d")
    plain = explain_prediction(model.inner, tiny_tokenizer, "b c d")
    assert explained.probability == plain.probability
    assert torch.equal(explained.scores["contribution"], plain.scores["contribution"])


def test_a_model_without_logits_is_refused() -> None:
    model = build(transformers.BertModel, transformers.BertConfig(**SIZES))
    with pytest.raises(TypeError, match=r"without logits .*\(B, C\)"):
        sufficiency(model, batch(), "contribution", [0.5], quantity="kl")
