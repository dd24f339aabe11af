"""The reasons that the documentation gives for contributions, by enumeration."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from captum_cw.functional import (
    AttentionLayer,
    QueryMask,
    closeness,
    contribution,
    dense_map,
    vwon,
)


@pytest.fixture
def layer() -> AttentionLayer:
    """Two heads of three keys, which one query reads: six terms."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)

    weights = normal(1, 2, 1, 3).softmax(-1)
    return AttentionLayer.from_tensors(
        weights, normal(1, 2, 3, 4), normal(2, 4, 8), QueryMask(1, 3)
    )


def terms_of(layer: AttentionLayer) -> Tensor:
    """The terms ``a v~``, ``(6, d)``, in the order of heads and keys."""
    a = layer.weights(slice(0, 1))[0, :, 0]
    return torch.einsum("hs,hsk,hkd->hsd", a, layer.value[0], layer.output_weight).flatten(0, 1)


def explained(terms: Tensor, some: tuple[int, ...]) -> float:
    output = terms.sum(0)
    rest = output - terms[list(some)].sum(0)
    return float(output.square().sum() - rest.square().sum())


def test_a_contribution_is_a_shapley_value(layer: AttentionLayer) -> None:
    terms = terms_of(layer)
    values = [0.0] * 6
    orders = list(permutations(range(6)))
    for order in orders:
        for place, term in enumerate(order):
            values[term] += explained(terms, order[: place + 1]) - explained(terms, order[:place])
    shapley = torch.tensor(values, dtype=torch.float64) / len(orders)
    c = dense_map(layer, contribution("inter"))[0, :, 0].flatten()
    torch.testing.assert_close(shapley, c * terms.sum(0).square().sum())


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_marginal_at_a_rate_lies_between_vwon_and_closeness(
    layer: AttentionLayer, rate: float
) -> None:
    terms = terms_of(layer)
    marginals = []
    for term in range(6):
        others = [n for n in range(6) if n != term]
        mean = 0.0
        for size in range(6):
            for there in combinations(others, size):
                weight = (1 - rate) ** size * rate ** (5 - size)
                gain = explained(terms, (*there, term)) - explained(terms, there)
                mean += weight * gain
        marginals.append(mean)
    found = torch.tensor(marginals, dtype=torch.float64) / terms.sum(0).square().sum()

    def of(measure: object) -> Tensor:
        return dense_map(layer, measure)[0, :, 0].flatten()  # type: ignore[arg-type]

    c, r = of(contribution("inter")), of(vwon)
    torch.testing.assert_close(found, 2 * rate * c + (1 - 2 * rate) * r.square())
    if rate == 1.0:
        torch.testing.assert_close(found, of(closeness))
