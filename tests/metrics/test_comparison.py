"""A comparison of two methods is told in a sentence, with its numbers below."""

import pickle

import pytest
import torch

from captum_cw.metrics import FaithfulnessResult
from captum_cw.metrics.result import FEW


def result_of(*deltas: tuple[float, float]) -> FaithfulnessResult:
    """One rate from the bottom, and two methods."""
    records = [
        {
            "index": n,
            "clean": 1.0,
            "values": {"a": {"bottom": [1 + x]}, "b": {"bottom": [1 + y]}},
        }
        for n, (x, y) in enumerate(deltas)
    ]
    settings = {"quantity": "kl", "higher_is_better": False}
    return FaithfulnessResult({"bottom": (0.5,)}, settings, records)


@pytest.mark.parametrize(
    ("deltas", "sentence"),
    [
        ([(1.0, 2.0), (1.0, 2.5)] * 4, "a is better than b at 50%."),
        ([(2.0, 1.0), (2.5, 1.0)] * 4, "b is better than a at 50%."),
        ([(1.0, 2.0), (2.0, 1.0)] * 4, "At 50% the difference is undecided."),
    ],
)
def test_the_better_method_is_named(deltas: list[tuple[float, float]], sentence: str) -> None:
    found = result_of(*deltas).compare("a", "b")
    first, row = str(found).splitlines()
    assert first == sentence
    assert row.strip().startswith(f"50%: a - b = {float(found.difference[0]):.3g} (")
    assert torch.isfinite(found.low).all()
    rates, difference, low, high, better = found
    assert (rates, better) == ((0.5,), found.better)
    assert low <= difference <= high
    assert str(pickle.loads(pickle.dumps(found))) == str(found)


@pytest.mark.parametrize("count", [FEW - 1, FEW])
def test_few_texts_are_named(count: int) -> None:
    result = result_of(*[(1.0, 2.0)] * count)
    warning = f"These are only {count} texts, so the intervals are rough."
    assert (warning in str(result)) == (warning in str(result.compare("a", "b"))) == (count < FEW)
