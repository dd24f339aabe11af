"""The registry of measures: names, labels, one-line explanations, units and colours.

To add a measure, write its class or function and :func:`register` one entry. Removal, the metric,
the command line, explanations, figures and the page read the registry. It refers to classes and
functions by their import path, so that the help of the command line does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from captum_cw.attr.measures import AttentionAttribution
    from captum_cw.functional import Measure

__all__ = [
    "INPUT",
    "RANDOM",
    "SIGNED",
    "TARGET",
    "Entry",
    "colours",
    "entries",
    "explained",
    "find",
    "known_names",
    "names",
    "register",
    "unregister",
]

#: The name of random scores.
RANDOM = "random"
#: The name of contributions with their signs.
SIGNED = "contribution-signed"
#: The names of contributions to a target, by values and by inputs.
TARGET, INPUT = "target", "input"
#: The colours of curves of what has none in the registry.
OTHER_COLOURS = ("#777777", "#003355", "#553300", "#99bbee")


@dataclass(frozen=True)
class Entry:
    """A measure by its name.

    Args:
        name: The name that users type.
        source: A class of ``captum_cw.attr``, or a function of a
            :class:`~captum_cw.functional.AttentionLayer`; or the import path of either, such as
            ``"captum_cw.functional:projection"``.
        label: A short label for tables, figures and the page.
        about: One line that explains the measure.
        unit: The unit of its numbers; empty for numbers without a unit.
        colour: A colour of Matplotlib for its curves, which should not be one of those of signs;
            None for the next of the colour cycle.
        signed: Whether signs are kept when scores are taken. Scores of heads are then added up;
            otherwise absolute values are averaged.
        scope: The argument of a source that takes a scope and returns the function.
        space: The space in which projections and norms are measured if pairs are scored by name;
            None for the space of the class. :func:`~captum_cw.explain` has a ``space`` of its own.
        control: Whether the entry is a control, which changes one factor of a contribution to show
            what this factor adds.
        explained: Whether :func:`~captum_cw.explain` computes the measure for every layer.
        explains_target: Whether the measure explains a target, such as a prediction, and not the
            output of a layer.
        form: The form of :class:`~captum_cw.EffectContributions`.

    Example:
        >>> Entry("mine", ContributionWeights, "Mine", "My measure.").attribution().__name__
        'ContributionWeights'
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
    explains_target: bool = False
    form: Literal["joint", "effect", "sensitivity"] | None = None

    def attribution(self) -> type[AttentionAttribution]:
        """Return the class that computes the measure as a Captum attribution.

        Raises:
            TypeError: If the measure has only a function.
        """
        source = self._resolved()
        if isinstance(source, type):
            return source
        raise TypeError(f"{self.name!r} has no class of captum_cw.attr: use it for removal only.")

    def of_model(self, model: nn.Module) -> AttentionAttribution:
        """Return the measure as a Captum attribution of a model."""
        options: dict[str, Any] = {} if self.form is None else {"form": self.form}
        return self.attribution()(model, **options)

    def function(self) -> Measure:
        """Return the function of a layer that computes the measure."""
        source = self._resolved()
        function = getattr(source, "measure", source)
        return function if self.scope is None else function(self.scope)  # type: ignore[no-any-return]

    def seen_in(self) -> Literal["attention", "residual"]:
        """Return the space in which projections and norms are measured."""
        own: Literal["attention", "residual"] = getattr(self._resolved(), "space", "attention")
        return self.space or own

    @property
    def is_built_in(self) -> bool:
        """Whether the measure belongs to this package, so that its name identifies it."""
        return self in _built_in

    @property
    def scores_pairs(self) -> bool:
        """Whether the measure scores pairs of head and token, from one layer alone."""
        combines_heads = getattr(self.function(), "puts_heads_together", False)
        needs_stream = getattr(self._resolved(), "needs_stream", False)
        return not (combines_heads or needs_stream or self.explains_target)

    def _resolved(self) -> Any:
        if not isinstance(self.source, str):
            return self.source
        module, _, name = self.source.partition(":")
        return getattr(import_module(module), name)


_registry: dict[str, Entry] = {}
_built_in: list[Entry] = []


def entries(*, controls: bool = False, targets: bool = False) -> list[Entry]:
    """Return the registered measures, the most useful first.

    Args:
        controls: Whether controls are included.
        targets: Whether measures of a target are included.

    Example:
        >>> [entry.name for entry in entries()]
        ['contribution', 'vwon', 'vw', 'attention']
    """
    return [
        entry
        for entry in _registry.values()
        if (controls or not entry.control) and (targets or not entry.explains_target)
    ]


def names(*, controls: bool = False, targets: bool = False) -> tuple[str, ...]:
    """Return the names of the registered measures, in the order of :func:`entries`."""
    return tuple(entry.name for entry in entries(controls=controls, targets=targets))


def known_names() -> str:
    """Return all names of methods of removal, for error messages."""
    return ", ".join(map(repr, (*names(controls=True, targets=True), RANDOM)))


def find(name: str) -> Entry | None:
    """Return the measure of a name; None if the name is not registered."""
    return _registry.get(name)


def colours(names: Iterable[str]) -> list[str]:
    """Return the colour of each name's curve: its own if it is registered with one.

    Example:
        >>> colours(["attention", "mine"])
        ['#7700dd', '#777777']
    """
    others, found = cycle(OTHER_COLOURS), []
    for name in names:
        entry = find(name)
        own = None if entry is None else entry.colour
        found.append(own or next(others))
    return found


def explained() -> list[Entry]:
    """Return the measures of :func:`captum_cw.explain`: simple ones first, signed ones last."""
    shown = [entry for entry in reversed(_registry.values()) if entry.explained]
    return sorted(shown, key=lambda entry: entry.signed)


def register(entry: Entry) -> None:
    """Add a measure to the registry.

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
        raise ValueError(f"name={entry.name!r} is taken; the names are {known_names()}.")
    _registry[entry.name] = entry


def unregister(name: str) -> None:
    """Remove a measure from the registry.

    Raises:
        KeyError: If the name is not registered.
    """
    del _registry[name]


def _effect(form: Literal["joint", "effect", "sensitivity"], about: str, unit: str) -> Entry:
    return Entry(
        form,
        "captum_cw.attr:EffectContributions",
        label={"joint": "joint contribution"}.get(form, f"contribution by {form}"),
        about=about,
        unit=unit,
        explained=False,
        explains_target=True,
        form=form,
    )


def _control(name: str, function: str, label: str, about: str, **options: Any) -> Entry:
    source = f"captum_cw.functional:{function}"
    return Entry(name, source, label, about, control=True, explained=False, **options)


for _entry in (
    Entry(
        TARGET,
        "captum_cw.attr:TargetContributions",
        label="contribution to the prediction",
        about="What a token's values add to the target in all heads; below zero, the token worked "
        "against it.",
        unit="unit of the target",
        colour="#553300",
        signed=True,
        explained=False,
        explains_target=True,
    ),
    Entry(
        INPUT,
        "captum_cw.attr:InputContributions",
        label="input's contribution to the prediction",
        about="What a token's embedding adds to the target; with the share of constants, all "
        "tokens sum to it.",
        unit="unit of the target",
        colour="#99bbee",
        signed=True,
        explained=False,
        explains_target=True,
    ),
    _effect(
        "joint",
        "What a token adds to a target and its share of the output, as a weighted geometric mean.",
        "fourth root of the target's unit",
    ),
    _effect(
        "effect",
        "The share of a query's output that a key made, times what the output adds to the target.",
        "unit of the target",
    ),
    _effect(
        "sensitivity",
        "The share of a query's output that a key made, times what the output could change.",
        "unit of the target",
    ),
    Entry(
        "contribution",
        "captum_cw.attr:ContributionWeights",
        label="contribution, size",
        about="The share of a query's output that a key made, whether for it or against it.",
        unit="share of the layer's output",
        colour="#000000",
    ),
    Entry(
        "vwon",
        "captum_cw.attr:VWONAttention",
        label="VW-ON: VW / output norm",
        about="The length of what a key adds to a query's output, divided by the output's length.",
        colour="#33ddbb",
    ),
    Entry(
        "vw",
        "captum_cw.attr:VWAttention",
        label="VW: attention \N{MULTIPLICATION SIGN} value norm",
        about="The length of what a key adds to a query's output.",
        unit="unit of the hidden states",
        colour="#eebb77",
    ),
    Entry(
        "attention",
        "captum_cw.attr:AttentionWeights",
        label="attention",
        about="How much a query attends to a key, from 0 to 1.",
        unit="share of the query's attention",
        colour="#7700dd",
    ),
    Entry(
        SIGNED,
        "captum_cw.functional:contribution",
        label="contribution, signed",
        about="The share of a query's output that a key made; below zero, the key worked against "
        "it. Over all heads, the shares of a query sum to 1.",
        unit="share of the layer's output",
        signed=True,
        scope="inter",
        control=True,
    ),
    _control(
        "contribution-intra",
        "contribution",
        "contribution, within a head",
        "The share of its head's output that a key made.",
        scope="intra",
    ),
    _control(
        "contribution-residual",
        "contribution",
        "contribution, to the residual stream",
        "The share that a key made of what is added to the residual stream.",
        scope="inter",
        space="residual",
    ),
    _control(
        "relative-norm",
        "relative_norm",
        "relative norm",
        "The length of a key's projected value divided by the output's length, without attention.",
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
        "How much nearer the key's term alone is to the output than the zero vector is.",
        signed=True,
    ),
):
    register(_entry)
_built_in += _registry.values()
