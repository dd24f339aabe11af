"""For every model type of transformers, contributions sum to the target, or the type is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from packaging.version import parse
from torch import Tensor

from captum_cw import InputContributions
from captum_cw.capture import UnsupportedModelError
from support.architectures import GROUPS, CannotBuild, build, inputs, types
from support.matrix import answer

#: The types that are known to be refused, with a part of the reason.
REFUSED = {
    "blt": "changes the ids",  # embeds hashes of groups of bytes
    "musicgen": "depend on",  # the rows of a batch are codebooks of one sound
    "musicgen_melody": "depend on",
    "reformer": "backward pass",  # writes its own backward pass, for training alone
    "yoso": "do not sum",  # samples keys by hashes
}


def last_numbers(output: Any) -> Tensor:
    """Return one number an example, which depends on this example alone."""
    found = answer(output)
    if "logits_per_image" in output:  # (B, B): images by texts
        return found.diagonal()
    return found.flatten(1)[:, -1]


@pytest.mark.matrix
@pytest.mark.skipif(
    parse(transformers.__version__) < parse("5"), reason="the types of transformers 5 are listed"
)
@pytest.mark.parametrize(
    ("group", "model_type"), [(group, name) for group in GROUPS for name in types(group)]
)
@pytest.mark.filterwarnings("ignore")  # of models that are built with a few features
def test_contributions_sum_to_the_target(group: str, model_type: str) -> None:
    try:
        model = build(model_type, group)
        given = inputs(model, group)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    method = InputContributions(model)

    def attribute() -> tuple[Any, Tensor]:
        found: tuple[Any, Tensor] = method.attribute(
            given, target=last_numbers, return_convergence_delta=True
        )
        return found

    if model_type in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
            attribute()
        return
    shares, delta = attribute()
    parts = list(shares.values()) if isinstance(shares, dict) else [shares]
    whole = sum(float(part.abs().sum()) for part in parts)
    assert whole > 0
    assert float(delta.abs().max()) <= 1e-3 * whole
