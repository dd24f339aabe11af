"""Ids that look like padding without a mask, and texts that begin twice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    remove_tokens,
)
from captum_cw.removal.sinks import find_sinks
from support.models import llama

PADDED = "begins or ends with pad_token_id=0, but there is no attention_mask: every id counts"
TWICE = r"two beginning-of-sequence \(BOS\) tokens \(bos_token_id=1\).*add_special_tokens=False"


def evaluate(model: nn.Module, given: Any) -> None:
    metric = ComprehensivenessSufficiency(model, rates=[0.5])
    metric.evaluate({"contribution": "contribution"}, given, show_progress=False)


def removed(model: nn.Module, given: Any) -> None:
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5):
        model(**given) if isinstance(given, dict) else model(given)


CALLS: dict[str, Any] = {
    "maps": lambda model, given: ContributionWeights(model).attribute(given),
    "scores": lambda model, given: TokenScores(ContributionWeights(model)).attribute(given),
    "sinks": find_sinks,
    "metric": evaluate,
    "removal": removed,
}


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "given",
    [ids([5, 6, 7, 8], [9, 5, 6, 0]), ids([0, 0, 5, 6], [5, 6, 7, 8]), ids([0, 5, 6, 7])],
    ids=["right", "left", "one"],
)
def test_padding_without_a_mask_is_warned_of(call: str, given: Tensor) -> None:
    with pytest.warns(UserWarning, match=PADDED):
        CALLS[call](llama(), given)


@pytest.mark.parametrize("call", CALLS)
def test_ids_with_a_mask_or_without_padding_are_not_warned_of(call: str) -> None:
    padded = ids([5, 6, 7, 8], [9, 5, 6, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[call](llama(), {"input_ids": padded, "attention_mask": (padded != 0).long()})
        CALLS[call](llama(), ids([5, 0, 7, 8]))
        CALLS[call](llama(), ids([1, 6, 7, 2]))


def test_what_is_assumed_of_padding_without_a_mask_is_what_the_model_does() -> None:
    model, given = llama(), ids([9, 5, 6, 0])
    method = TokenScores(ContributionWeights(model))
    with pytest.warns(UserWarning, match=PADDED):
        found = method.attribute(given)
    ones = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    assert torch.equal(found, method.attribute(ones))


def test_an_end_token_that_pads_too_is_padding_from_the_second_on() -> None:
    model = llama()
    model.config.pad_token_id = model.config.eos_token_id
    method = ContributionWeights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute(ids([5, 6, 7, 2]))
        method.attribute(ids([2, 5, 6, 7]))
    with pytest.warns(UserWarning, match="pad_token_id=2"):
        method.attribute(ids([5, 6, 2, 2]))


@pytest.mark.parametrize("call", CALLS)
def test_two_bos_tokens_are_warned_of(call: str) -> None:
    with pytest.warns(UserWarning, match=TWICE):
        CALLS[call](llama(), ids([1, 1, 5, 6]))


def test_two_bos_tokens_are_warned_of_after_padding_but_not_within_a_text() -> None:
    method = ContributionWeights(llama())
    mask = ids([0, 1, 1, 1, 1])
    with pytest.warns(UserWarning, match=TWICE):
        method.attribute({"input_ids": ids([0, 1, 1, 5, 6]), "attention_mask": mask})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute({"input_ids": ids([0, 1, 5, 1, 1]), "attention_mask": mask})
