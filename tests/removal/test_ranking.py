"""Which pairs are chosen: exact counts, ties, kept tokens, scopes; against a plain sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_cw.removal.ranking import chosen_pairs, quota
from support.reference import sorted_pairs


@pytest.mark.parametrize("rate_of", ["removable", "all"])
@pytest.mark.parametrize("scope", ["layer", "global", "head"])
@pytest.mark.parametrize("which", ["top", "bottom"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_choice_follows_the_rules(
    which: Any, scope: Any, rate_of: Any, data: st.DataObject
) -> None:
    B, L, H, S = (data.draw(st.integers(1, n)) for n in (2, 3, 3, 7))
    seed = data.draw(st.integers(0, 999))
    rate = data.draw(st.sampled_from(["0", "0.05", "0.1", "0.145", "0.3", "0.5", "0.7", "1"]))
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that many are equal.
    scores = [torch.randint(0, 4, (B, H, S), generator=generator).float() / 3 for _ in range(L)]
    real = torch.rand(B, S, generator=generator) < 0.8
    kept = [(torch.rand(B, S, generator=generator) < 0.2) & real for _ in range(L)]
    found = chosen_pairs(scores, [real] * L, kept, float(rate), which, scope, rate_of)
    for x, y in zip(
        found, sorted_pairs(scores, real, kept, rate, which, scope, rate_of), strict=True
    ):
        assert torch.equal(x, y)


def test_half_of_a_pair_is_a_whole_one() -> None:
    assert [quota(0.5, n) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert quota(0.145, 100) == 15  # 14.499999999999998 in floats
    assert quota(1.0, 7) == 7
