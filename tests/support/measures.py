"""The classes of the measures, by the names that ``support.reference`` gives to the definitions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_cw import AttentionWeights, ContributionWeights, VWAttention, VWONAttention

MEASURES: dict[str, Any] = {
    "attention": AttentionWeights,
    "vw": VWAttention,
    "vwon": VWONAttention,
    "inter": ContributionWeights,
}
MEASURES_AND_INTRA: dict[str, Any] = {
    **MEASURES,
    "intra": lambda *arguments: ContributionWeights(*arguments, scope="intra"),
}


def check_measures(
    module: nn.Module, inputs: Any, expected: dict[str, Tensor], number: int = 0
) -> None:
    """Each measure of the module's attention call with this number is the expected one."""
    for name, method in MEASURES.items():
        found = method(module, kind="all").attribute(inputs)[number]
        assert torch.allclose(found.double(), expected[name], atol=1e-5), name
