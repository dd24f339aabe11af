"""The model types of transformers that were tested, with the result of each.

Only the tests of the whole matrix of model types, ``python -m support.matrix`` in ``tests/``, write
the file ``architectures.json`` in this folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from captum_cw._utils.files import read_json

__all__ = ["STATUSES", "TITLES", "ModelTypes", "Outcome"]

VERSION = 1
FILE = Path(__file__).with_name("architectures.json")

STATUSES = "works", "in part", "refused", "no softmax attention", "not built"
TITLES = {
    "causal": "Causal language models",
    "encoder": "Masked language models",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Vision",
}


@dataclass(frozen=True)
class Outcome:
    """The result of testing one model type.

    Args:
        status: One of :data:`STATUSES`.
        reason: The reason of a refusal.
        layers: The number of attention layers that were observed.
        kinds: The classes of the attention modules.
        way: How the model computes attention: through the ``"registry"`` of transformers, or
            ``"by itself"``.
    """

    status: str
    reason: str = ""
    layers: int = 0
    kinds: Sequence[str] = ()
    way: str = ""


@dataclass(frozen=True)
class ModelTypes:
    """The results of all model types in one release of transformers.

    Args:
        transformers: The release.
        torch: The release of PyTorch.
        groups: The results by group (see :data:`TITLES`) and model type.

    Example:
        >>> tested = ModelTypes.load()
        >>> tested.groups["causal"]["llama"].kinds
        ['LlamaAttention']
        >>> tested.counts("vision")["works"] <= len(tested.groups["vision"])
        True
    """

    transformers: str
    torch: str
    groups: Mapping[str, Mapping[str, Outcome]]

    def counts(self, group: str) -> dict[str, int]:
        """Count the model types of a group by status."""
        statuses = [outcome.status for outcome in self.groups[group].values()]
        return {status: statuses.count(status) for status in STATUSES}

    @classmethod
    def load(cls) -> ModelTypes:
        """Load the results of this release."""
        content = read_json(FILE, VERSION, "groups")
        groups = {
            group: {name: Outcome(**outcome) for name, outcome in of_group.items()}
            for group, of_group in content["groups"].items()
        }
        return cls(content["transformers"], content["torch"], groups)
