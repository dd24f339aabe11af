"""The registry of measures: their names, and what tables, figures and pages say of them.

To add a measure, write its class or function and :func:`register` one entry. Removal, the metric,
the command line, explanations and their page read the registry. It names classes and functions by
their import path, so that the help of the command line need not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from captum_cw.attr.measures import AttentionAttribution
    from captum_cw.functional import Measure

__all__ = [
    "RANDOM",
    "SIGNED",
    "Entry",
    "entries",
    "explained",
    "find",
    "known_names",
    "names",
    "register",
    "unregister",
]

#: The name of scores by chance.
RANDOM = "random"
#: The name of contributions with their signs.
SIGNED = "contribution-signed"


@dataclass(frozen=True)
class Entry:
    """A measure by its name.

    Args:
        name: The name that users type.
        source: The class of ``captum_cw.attr``, or a function of a
            :class:`~captum_cw.functional.AttentionLayer`; or the import path of one of them, as in
            ``"captum_cw.functional:projection"``.
        label: A short label for tables, figures and the page.
        about: One line that explains the measure.
        unit: The unit of its numbers; empty for numbers without a unit.
        colour: A colour of Matplotlib for its curves; None for the next of the colour cycle.
        signed: Whether signs are kept when scores are taken. Scores of heads are then added up;
            otherwise absolute values are averaged.
        scope: The argument for a source that takes a scope and gives the function.
        space: Where projections and norms are measured when pairs are scored by name; None for
            where the class measures them. :func:`~captum_cw.explain` has a ``space`` of its own.
        control: Whether the entry is a control, which changes one thing of a contribution to show
            what that thing is worth.
        explained: Whether :func:`~captum_cw.explain` computes the measure.
    """

    name: str
    source: str | type[AttentionAttribution] | Measure
    label: str
    about: str
    unit: str = ""
    colour: str | None = None
    signed: bool = False
    scope: Literal["inter", "intra"] | None = None
    space: Literal["attention", "residual"] | None = None
    control: bool = False
    explained: bool = True

    def attribution(self) -> type[AttentionAttribution]:
        """The class that computes the measure as a Captum attribution.

        Raises:
            TypeError: If the measure has a function alone.
        """
        found = self._resolved()
        if isinstance(found, type):
            return found
        raise TypeError(f"{self.name!r} has no class of captum_cw.attr: use it for removal.")

    def function(self) -> Measure:
        """The function of a layer that computes the measure."""
        found = self._resolved()
        found = found.measure if hasattr(found, "measure") else found
        function: Measure = found if self.scope is None else found(self.scope)
        return function

    def seen_in(self) -> Literal["attention", "residual"]:
        """Where projections and norms are measured."""
        own: Literal["attention", "residual"] = getattr(self._resolved(), "space", "attention")
        return self.space or own

    @property
    def is_built_in(self) -> bool:
        """Whether the measure is of this package, so that its name tells what it computes."""
        return self in _built_in

    @property
    def scores_pairs(self) -> bool:
        """Whether the measure scores pairs of head and token, by the layer alone."""
        found, function = self._resolved(), self.function()
        together = getattr(function, "puts_heads_together", False)
        return not (together or getattr(found, "needs_stream", False))

    def _resolved(self) -> Any:
        if not isinstance(self.source, str):
            return self.source
        module, _, name = self.source.partition(":")
        return getattr(import_module(module), name)


_registry: dict[str, Entry] = {}
_built_in: list[Entry] = []


def entries(*, controls: bool = False) -> list[Entry]:
    """The registered measures, those that users reach for first coming first.

    Args:
        controls: Whether controls are included.

    Example:
        >>> [entry.name for entry in entries()]
        ['contribution', 'vwon', 'vw', 'attention']
    """
    return [entry for entry in _registry.values() if controls or not entry.control]


def names(*, controls: bool = False) -> tuple[str, ...]:
    """The names of the registered measures, as :func:`entries` orders them."""
    return tuple(entry.name for entry in entries(controls=controls))


def known_names() -> str:
    """All names that a method of removal can have, for messages."""
    return ", ".join(map(repr, (*names(controls=True), RANDOM)))


def find(name: str) -> Entry | None:
    """The measure of that name; None if there is none."""
    return _registry.get(name)


def explained() -> list[Entry]:
    """The measures that :func:`captum_cw.explain` computes: simple ones first, signed ones last."""
    found = [entry for entry in reversed(_registry.values()) if entry.explained]
    return sorted(found, key=lambda entry: entry.signed)


def register(entry: Entry) -> None:
    """Adds a measure to the registry.

    Args:
        entry: The measure. Its source is a class, unless it is a control.

    Raises:
        ValueError: If the name is taken.

    Example:
        >>> register(Entry("mine", ContributionWeights, "Mine", "Contributions by another name."))
        >>> "mine" in names()
        True
        >>> unregister("mine")
    """
    if entry.name in (*_registry, RANDOM):
        raise ValueError(f"name={entry.name!r} is taken; registered: {known_names()}.")
    _registry[entry.name] = entry


def unregister(name: str) -> None:
    """Takes a measure out of the registry.

    Raises:
        KeyError: If there is none of that name.
    """
    del _registry[name]


def _control(name: str, function: str, label: str, about: str, **options: Any) -> Entry:
    source = f"captum_cw.functional:{function}"
    return Entry(name, source, label, about, control=True, explained=False, **options)


for _entry in (
    Entry(
        "contribution",
        "captum_cw.attr:ContributionWeights",
        label="contribution, size",
        about="Which share of a query's output a key made, whether for it or against it.",
        unit="share of the layer's output",
        colour="#0072b2",
    ),
    Entry(
        "vwon",
        "captum_cw.attr:VWONAttention",
        label="VW-ON: VW / output norm",
        about="How long a vector a key adds to a query's output, over the length of that output.",
        colour="#009e73",
    ),
    Entry(
        "vw",
        "captum_cw.attr:VWAttention",
        label="VW: attention \N{MULTIPLICATION SIGN} value norm",
        about="How long a vector a key adds to a query's output, in the unit of the hidden states.",
        unit="unit of the hidden states",
        colour="#e69f00",
    ),
    Entry(
        "attention",
        "captum_cw.attr:AttentionWeights",
        label="attention",
        about="How much a query looks at a key, 0 to 1.",
        colour="#d55e00",
    ),
    Entry(
        SIGNED,
        "captum_cw.functional:contribution",
        label="contribution, signed",
        about="Which share of a query's output a key made; below zero it worked against it. All "
        "shares of one query sum to 1.",
        unit="share of the layer's output",
        signed=True,
        scope="inter",
        control=True,
    ),
    _control(
        "contribution-intra",
        "contribution",
        "contribution, within a head",
        "Which share of its head's output a key made.",
        scope="intra",
    ),
    _control(
        "contribution-residual",
        "contribution",
        "contribution, to the residual stream",
        "Which share of what is added to the residual stream a key made.",
        scope="inter",
        space="residual",
    ),
    _control(
        "relative-norm",
        "relative_norm",
        "relative norm",
        "The length of a key's projected value over that of the output, without attention.",
    ),
    _control(
        "cosine",
        "cosine_with",
        "cosine",
        "The cosine of a key's projected value and the output, without attention.",
        scope="inter",
    ),
    _control(
        "attention-cosine",
        "attention_cosine",
        "attention \N{MULTIPLICATION SIGN} cosine",
        "Attention times the cosine, without the relative norm.",
    ),
    _control(
        "relative-norm-cosine",
        "geometry",
        "relative norm \N{MULTIPLICATION SIGN} cosine",
        "A contribution without attention.",
        scope="inter",
    ),
    _control(
        "projection",
        "projection",
        "projection",
        "A contribution that is not divided by the norm of the output.",
    ),
    _control(
        "closeness",
        "closeness",
        "closeness",
        "How much nearer to the output the key's term alone comes than nothing does.",
        signed=True,
    ),
):
    register(_entry)
_built_in += _registry.values()
