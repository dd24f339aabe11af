"""Measures, and the classes that wrap them, can be pickled and copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ALTIWeights,
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
    functional,
    measures,
)
from captum_cw.rollout import attention_mixing
from support.inputs import token_ids
from support.models import llama

IDS = token_ids(1, 7)
METHODS: dict[str, Any] = {
    "attention": AttentionWeights,
    "vw": VWAttention,
    "vwon": VWONAttention,
    "inter": ContributionWeights,
    "intra": lambda m: ContributionWeights(m, scope="intra"),
    "residual": lambda m: ContributionWeights(m, space="residual"),
    "one layer": lambda m: ContributionWeights(m, m.model.layers[1].self_attn),
    "alti": ALTIWeights,
    "scores": lambda m: TokenScores(ContributionWeights(m), heads=None, queries=slice(2, 5)),
    "rollout": lambda m: TokenScores(AttentionWeights(m), layers="rollout"),
}


def again(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def double(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_pickled_method_gives_the_same(make: Any) -> None:
    method = make(llama())
    expected = method.attribute(IDS)
    for other in (again(method), again(again(method))):
        assert type(other) is type(method)
        assert same(other.attribute(IDS), expected)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_copy_has_a_model_of_its_own(make: Any) -> None:
    model = llama()
    method = make(model)
    expected = method.attribute(IDS)
    copied = copy.deepcopy(method)
    assert copied.forward_func is not model
    double(model)  # the method sees the change, and its copy does not
    assert not same(method.attribute(IDS), expected)
    assert same(copied.attribute(IDS), expected)
    shallow = copy.copy(method)
    assert shallow.forward_func is model
    assert same(shallow.attribute(IDS), method.attribute(IDS))


def test_a_bound_forward_is_copied_with_its_model() -> None:
    model = llama()
    method = ContributionWeights(model.forward)
    copied = copy.deepcopy(method)
    assert copied.model is copied.forward_func.__self__ is not model
    assert same(copied.attribute(IDS), method.attribute(IDS))
    assert same(again(method).attribute(IDS), method.attribute(IDS))


def test_attribution_of_generated_text_is_pickled_with_its_tokenizer(tiny_tokenizer: Any) -> None:
    llm = LLMTokenAttribution(ContributionWeights(llama()), tiny_tokenizer)
    expected = llm.attribute("a b c", target="d e")
    for other in (again(llm), copy.deepcopy(llm)):
        assert other.model is other.attr_method.method.model is not llm.model
        found = other.attribute("a b c", target="d e")
        assert torch.equal(found.token_attr, expected.token_attr)
    result = again(expected)
    assert torch.equal(result.token_attr, expected.token_attr)
    assert torch.equal(result.output_ids, expected.output_ids)


def quality(logits: Tensor, batch: Any, clean: Tensor) -> Tensor:
    return logits[:, -1].amax(-1)


@pytest.mark.parametrize("metric", ["perplexity", "nll", "log_prob", "prob", "kl", quality])
def test_faithfulness_is_pickled(metric: Any) -> None:
    metrics = ComprehensivenessSufficiency(llama(), [0.3, 0.6], quantity=metric)
    methods = {"contribution": "contribution", "vwon": "vwon"}
    expected = metrics.evaluate(methods, IDS, show_progress=False)
    for other in (again(metrics), copy.deepcopy(metrics)):
        assert other.model is not metrics.model
        found = other.evaluate(methods, IDS, show_progress=False)
        for name in methods:
            assert same(found.comprehensiveness[name], expected.comprehensiveness[name])
            assert same(found.sufficiency[name], expected.sufficiency[name])


@pytest.mark.parametrize(
    "measure",
    [
        *(entry.function() for entry in measures.entries(controls=True)),
        functional.geometry("intra"),
        functional.cosine_with("intra"),
        attention_mixing("max"),
    ],
)
def test_measures_are_pickled(measure: Any) -> None:
    layer = functional.AttentionLayer.from_tensors(
        torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8)
    )
    other = again(measure)
    assert functional.heads_of(other, 2) == functional.heads_of(measure, 2)
    found, expected = (functional.dense_map(layer, m) for m in (other, measure))
    assert torch.equal(found, expected)
