"""Every causal model type of transformers: right, or refused with a reason."""

from __future__ import annotations

import pytest
from architectures import causal_types
from matrix import NO_SOFTMAX, Outcome, outcome, page

#: What is known not to work, so that nothing else comes to be refused unnoticed.
REFUSED = {
    "deepseek_v4": "output projection",  # heads are turned, then mixed by a low-rank map
    "diffllama": "output projection",  # two calls make one attention
    "jetmoe": "output projection",  # each token goes through projections of its own
    "prophetnet": "No attention",  # two streams of tokens in one
    "reformer": "No attention",  # keys are sorted into chunks
    "xlnet": "output projection",  # tokens before examples, and no linear layer
}


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", causal_types())
def test_type(model_type: str) -> None:
    found = outcome(model_type)
    if found.status == "not built":
        pytest.skip(found.reason)
    if model_type in REFUSED:
        assert found.status == "refused"
        assert REFUSED[model_type] in found.reason
    elif model_type in NO_SOFTMAX:
        assert found.status == "no softmax attention"
    else:
        assert found.status == "works", found.reason


def test_the_page_counts_what_it_lists() -> None:
    text = page(
        {
            "a": Outcome("works", layers=2, kinds=("AAttention",)),
            "b": Outcome("refused", "No layer. More of it.", 1, ("BAttention",)),
            "c": Outcome("no softmax attention", "why"),
        }
    )
    assert "Of the 2 types whose attention goes through the attention registry, 1 work." in text
    assert "1 works, 1 refused, 1 no softmax attention, 0 not built" in text
    assert "| b | `BAttention` | 1 | refused | No layer |" in text
