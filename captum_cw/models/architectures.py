"""Which model types of transformers are tested, and what came of each.

``architectures.json`` beside this file is written by the tests of the whole matrix of model types,
``python -m support.matrix`` in ``tests/``, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from captum_cw._utils.files import read_json, write_json

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
    """What became of a model type.

    Args:
        status: ``"works"``, ``"refused"`` or why there is nothing to be right about.
        reason: Of a refusal.
        layers: How many attention layers were seen.
        kinds: The classes of their modules.
        way: How its attention is computed: through the ``"registry"``, or ``"by itself"``.
    """

    status: str
    reason: str = ""
    layers: int = 0
    kinds: tuple[str, ...] = ()
    way: str = ""


@dataclass(frozen=True)
class ModelTypes:
    """All model types of a release of transformers.

    Args:
        transformers: The release.
        torch: With which it was tested.
        groups: By group, as :data:`TITLES` has them, and type.

    Example:
        >>> tested = ModelTypes.load()
        >>> tested.groups["causal"]["llama"].kinds
        ('LlamaAttention',)
        >>> tested.counts("vision")["works"] <= len(tested.groups["vision"])
        True
    """

    transformers: str
    torch: str
    groups: Mapping[str, Mapping[str, Outcome]]

    def counts(self, group: str) -> dict[str, int]:
        """How many types of a group there are of each status."""
        found = [outcome.status for outcome in self.groups[group].values()]
        return {status: found.count(status) for status in STATUSES}

    def of_registry(self, group: str) -> tuple[int, int]:
        """How many types go through the attention registry, and how many of these work."""
        found = [x.status for x in self.groups[group].values() if x.way == "registry"]
        return len(found), found.count("works")

    def save(self) -> None:
        """Writes the file that :meth:`load` reads."""
        groups = {
            group: {name: vars(outcome) for name, outcome in of_group.items()}
            for group, of_group in self.groups.items()
        }
        versions = {"transformers": self.transformers, "torch": self.torch}
        write_json(FILE, {"version": VERSION, **versions, "groups": groups})

    @classmethod
    def load(cls) -> ModelTypes:
        """What was found when this release was made."""
        content = read_json(FILE, VERSION, "groups")
        groups = {
            group: {
                name: Outcome(**{**outcome, "kinds": tuple(outcome["kinds"])})
                for name, outcome in of_group.items()
            }
            for group, of_group in content["groups"].items()
        }
        return cls(content["transformers"], content["torch"], groups)
