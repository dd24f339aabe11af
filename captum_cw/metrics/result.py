"""The result of an evaluation: curves, comparisons with intervals, a table, a plot and a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from captum_cw import measures
from captum_cw._utils.files import read_json, write_json
from captum_cw.functional import check_choice
from captum_cw.metrics.tables import MARKS, Cell, Verdict, in_markdown, in_text, number, percent
from captum_cw.removal.ranking import Which

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Comparison", "FaithfulnessResult", "Side", "Statistic", "curve_styles"]

VERSION = 2
#: The number of texts that an interval over texts needs.
COMPARABLE = 2
#: With fewer examples, intervals between their percentiles are too narrow, and a result says so.
FEW = 5
#: The number of examples that are held at once while resampling.
RESAMPLED = 1_000_000
Side = Literal["comprehensiveness", "sufficiency"]
REMOVED: dict[Side, Which] = {"comprehensiveness": "top", "sufficiency": "bottom"}
TITLES: dict[Side, str] = {
    "comprehensiveness": "Top removed (higher is better)",
    "sufficiency": "Bottom removed (lower is better)",
}
Statistic = Literal["mean", "corpus", "nll"]
#: The labels of statistics and quantities on an axis.
LABELS: dict[str, str] = {
    "corpus": "corpus perplexity",
    "nll": "mean negative log-likelihood (nats)",
    "log_prob": "log-probability (nats)",
    "prob": "probability",
    "kl": "KL divergence (nats)",
}


class _Numbers(NamedTuple):
    """The parts of a comparison."""

    rates: tuple[float, ...]
    difference: Tensor
    low: Tensor
    high: Tensor
    better: tuple[str | None, ...]


class Comparison(_Numbers):
    """The difference of two methods at each rate, with its paired bootstrap interval.

    Attributes:
        rates: the removed fractions.
        difference: ``(rates,)``, the statistic of ``a`` minus that of ``b``.
        low: ``(rates,)``, the lower end of the interval.
        high: ``(rates,)``, the upper end of the interval.
        better: the name of the better method at each rate; None if the interval holds zero.
        methods: the names of ``a`` and ``b``. Like the next, it is not one of the five that
            unpacking gives.
        examples: the number of examples; 0 if it is unknown.

    Example:
        >>> low, high = torch.tensor([-2.0, -0.5]), torch.tensor([-1.0, 0.1])
        >>> difference, better = torch.tensor([-1.5, -0.2]), ("contribution", None)
        >>> found = Comparison((0.5, 0.7), difference, low, high, better)
        >>> found.methods = ("contribution", "vw")
        >>> print(found)
        contribution is better than vw at 50%. At 70% the difference is undecided.
          50%: contribution - vw = -1.5 (-2 to -1)
          70%: contribution - vw = -0.2 (-0.5 to 0.1)
    """

    methods: tuple[str, str] = ("a", "b")
    examples: int = 0

    def __str__(self) -> str:
        """Say which method is better at which rates, with the differences and intervals."""
        a, b = self.methods

        def at(name: str | None) -> str:
            found = [percent(r) for r, x in zip(self.rates, self.better, strict=True) if x == name]
            return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))

        said = [f"{x} is better than {y} at {at(x)}." for x, y in ((a, b), (b, a)) if at(x)]
        if at(None):
            said.append(f"At {at(None)} the difference is undecided.")
        if self.examples and self.examples < FEW:
            said.append(f"These are only {self.examples} texts, so the intervals are rough.")
        rows = zip(self.rates, self.difference, self.low, self.high, strict=True)
        lines = (f"  {percent(r)}: {a} - {b} = {d:.3g} ({x:.3g} to {y:.3g})" for r, d, x, y in rows)
        return "\n".join([" ".join(said), *lines])


@dataclass(frozen=True)
class FaithfulnessResult:
    """The comprehensiveness and sufficiency of methods, example by example.

    A delta is what a removal costs: ``f(changed) - f(clean)`` of the quantity ``f`` if less of it
    is better, and the negative if more of it is better. High comprehensiveness and low sufficiency
    are better.

    Attributes:
        rates: the removed fractions, from the ``"top"`` and from the ``"bottom"``.
        settings: the settings, models and versions that the numbers depend on.
        records: one record per example, with its ``index``, its quantity in the clean pass
            (``clean``), and by method and side the quantity (``values``) and the mean negative
            log-likelihood in nats (``nll``) at each rate. There is no likelihood if the model does
            not predict tokens, as a classifier.

    Raises:
        ValueError: If there are no records.

    Example:
        >>> metric = ComprehensivenessSufficiency(model, rates=[0.25, 0.5])
        >>> texts = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> methods = {"contribution": "contribution", "chance": "random"}
        >>> result = metric.evaluate(methods, texts)
        >>> result.per_example["contribution"]["sufficiency"].shape
        torch.Size([1, 2])
        >>> result.aopc().keys()
        dict_keys(['contribution', 'chance'])
    """

    rates: Mapping[Which, tuple[float, ...]]
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("The data are empty: give at least one example.")

    @property
    def methods(self) -> list[str]:
        """The names of the methods."""
        return list(self.records[0]["values"])

    @property
    def sides(self) -> dict[Side, Which]:
        """The evaluated sides, and the end of the ranking that was removed for each."""
        return {side: which for side, which in REMOVED.items() if which in self.rates}

    @property
    def has_likelihood(self) -> bool:
        """Whether the likelihood of the texts is known, because the model predicts their tokens."""
        return "clean_nll" in self.records[0]

    @property
    def comprehensiveness(self) -> dict[str, Tensor]:
        """By method, the mean delta with the top removed (Eq. 16), ``(rates,)``."""
        return self._means("comprehensiveness")

    @property
    def sufficiency(self) -> dict[str, Tensor]:
        """By method, the mean delta with the bottom removed (Eq. 17), ``(rates,)``."""
        return self._means("sufficiency")

    @property
    def per_example(self) -> dict[str, dict[Side, Tensor]]:
        """By method and side, the deltas ``(examples, rates)``."""
        return {
            name: {side: self.deltas(name, side) for side in self.sides} for name in self.methods
        }

    @property
    def corpus(self) -> dict[str, dict[Side, Tensor]]:
        """By method and side, the delta of the corpus perplexity ``(rates,)``.

        The corpus perplexity is ``exp(mean NLL)`` over all tokens of all texts.

        Raises:
            ValueError: If the likelihood of the texts is not known.
        """
        return {
            name: {side: self._statistic(name, side, "corpus")[0] for side in self.sides}
            for name in self.methods
        }

    @property
    def clean(self) -> float:
        """The mean of the quantity over the unchanged examples."""
        return float(self._column("clean").mean())

    @property
    def clean_corpus(self) -> float:
        """The corpus perplexity of the unchanged examples, ``exp(mean NLL)`` over all tokens.

        Raises:
            ValueError: If the likelihood of the texts is not known.
        """
        _check_statistic(self, "corpus")
        return float(_corpus(self._column("clean_nll")[:, None], self._column("count")))

    def deltas(self, method: str, side: Side) -> Tensor:
        """Return the deltas of the quantity, ``(examples, rates)``.

        Raises:
            KeyError: If the method was not evaluated.
        """
        sign = -1 if self.settings["higher_is_better"] else 1
        changed = self._table("values", method, side)
        return sign * (changed - self._column("clean")[:, None])

    def aopc(self) -> dict[str, dict[Side, float]]:
        """Return by method and side the mean over the rates of the mean delta."""
        return {
            name: {side: float(self.deltas(name, side).mean()) for side in self.sides}
            for name in self.methods
        }

    def compare(
        self,
        a: str,
        b: str,
        side: Side = "sufficiency",
        *,
        statistic: Statistic = "mean",
        samples: int = 10_000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Comparison:
        """Return the difference of two methods with a paired bootstrap interval over examples.

        Args:
            a: the name of a method.
            b: the name of another method.
            side: ``"comprehensiveness"`` or ``"sufficiency"``.
            statistic: ``"mean"`` for the mean delta over examples, ``"nll"`` for the mean delta of
                the negative log-likelihood, or ``"corpus"`` for the delta of the corpus
                perplexity, which a single example does not dominate.
            samples: the number of resamples of the examples.
            confidence: the confidence of the interval, between percentiles.
            seed: the random seed of the resamples.

        Returns:
            At each rate, ``a - b`` and its interval.

        Raises:
            KeyError: If a method was not evaluated.
            ValueError: If a choice is unknown, there are fewer than two examples, or the statistic
                needs a likelihood that is not known.
        """
        check_choice("side", side, Side)
        check_choice("statistic", statistic, Statistic)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}.")
        n = len(self.records)
        if n < COMPARABLE:
            raise ValueError(
                f"An interval over texts needs {COMPARABLE} or more texts, got {n}: evaluate more "
                "texts, or read the differences from .deltas(method, side)."
            )

        def difference(drawn: Tensor | None = None) -> Tensor:
            first, second = (self._statistic(name, side, statistic, drawn) for name in (a, b))
            return first - second

        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n, (samples, n), generator=generator, device="cpu")
        parts = torch.split(drawn, max(1, RESAMPLED // n))
        resampled = torch.cat([difference(part) for part in parts])
        tail = (1 - confidence) / 2
        low, high = torch.quantile(resampled, resampled.new_tensor([tail, 1 - tail]), dim=0)
        lower, higher = (a, b) if side == "sufficiency" else (b, a)  # the better if below, above 0
        better = tuple(
            lower if y < 0 else higher if x > 0 else None
            for x, y in zip(low.tolist(), high.tolist(), strict=True)
        )
        found = Comparison(self.rates[REMOVED[side]], difference()[0], low, high, better)
        found.methods, found.examples = (a, b), n
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row for each method, side and rate (needs pandas).

        The columns ``delta_nll`` and ``delta_corpus_perplexity`` exist if the likelihood is known.
        """
        import pandas as pd

        columns: dict[str, Statistic] = {"delta": "mean"}
        if self.has_likelihood:
            columns |= {"delta_nll": "nll", "delta_corpus_perplexity": "corpus"}
        tables = []
        for name in self.methods:
            for side, which in self.sides.items():
                deltas = {c: self._statistic(name, side, s)[0].tolist() for c, s in columns.items()}
                row = {"method": name, "side": side, "rate": list(self.rates[which])}
                tables.append(pd.DataFrame({**row, **deltas}))
        return pd.concat(tables, ignore_index=True)

    def plot(
        self,
        *,
        statistic: Statistic = "mean",
        log: bool | None = None,
        use_pyplot: bool = True,
    ) -> tuple[Figure, npt.NDArray[Any]]:
        """Plot the delta against the removed fraction, with a panel per side (Fig. 3).

        Args:
            statistic: the statistic of the deltas, as for :meth:`compare`.
            log: whether the scale is logarithmic; None for a logarithmic scale if all deltas are
                positive and those of a side span two decades.
            use_pyplot: whether to make a pyplot figure, which notebooks show.

        Returns:
            The figure and its axes, one per side.

        Raises:
            ValueError: If ``statistic`` is unknown, or needs a likelihood that is not known.
        """
        from captum_cw.visualization.curves import plot_curves

        check_choice("statistic", statistic, Statistic)
        what = self.settings["quantity"] if statistic == "mean" else statistic
        return plot_curves(
            {
                TITLES[side]: {n: self._statistic(n, side, statistic)[0] for n in self.methods}
                for side in self.sides
            },
            {TITLES[side]: self.rates[which] for side, which in self.sides.items()},
            ylabel=f"delta of {LABELS.get(what, what)}",
            log=log,
            styles=curve_styles(self.methods, self.settings),
            use_pyplot=use_pyplot,
        )

    def save(self, path: str | Path) -> None:
        """Write the result as JSON. Floats are exact."""
        content = {"rates": self.rates, "settings": self.settings, "records": self.records}
        write_json(path, {"version": VERSION, **content})

    @classmethod
    def load(cls, path: str | Path) -> FaithfulnessResult:
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: If the file is not such a result, or has an unknown version.
        """
        content = read_json(path, VERSION, "rates")
        rates = {which: tuple(rates) for which, rates in content["rates"].items()}
        return cls(rates, content["settings"], content["records"])

    def __str__(self) -> str:
        """A table for each side, with a row for each rate, and a mark at each cell."""
        return _as_text(self)

    def to_markdown(
        self, reference: str | None = None, *, statistic: Statistic | None = None
    ) -> str:
        """Return one table, with a row for each method and a column for each rate.

        A figure is bold where it is better than the reference's by a paired 95% interval, has a
        ``-`` where it is worse, and a ``~`` where the interval holds zero. Positive figures are
        what a removal costs, as for :meth:`deltas`.

        Args:
            reference: the method that the others are compared with; None for the first.
            statistic: the statistic of the deltas, as for :meth:`compare`; None for the corpus
                perplexity if the quantity is the perplexity, and for the mean otherwise.

        Raises:
            KeyError: If the reference was not evaluated.
            ValueError: If ``statistic`` is unknown, or needs a likelihood that is not known.
        """
        chosen = _statistic_of_tables(self) if statistic is None else statistic
        check_choice("statistic", chosen, Statistic)
        return _as_markdown(self, self.methods[0] if reference is None else reference, chosen)

    def _means(self, side: Side) -> dict[str, Tensor]:
        names = self.methods if side in self.sides else []
        return {name: self.deltas(name, side).mean(0) for name in names}

    def _column(self, name: str) -> Tensor:
        """Return an entry of all records, ``(examples,)``."""
        return _float64([record[name] for record in self.records])

    def _table(self, name: str, method: str, side: Side) -> Tensor:
        """Return an entry of all records at each rate, ``(examples, rates)``."""
        if method not in self.methods:
            raise KeyError(f"{method!r} was not evaluated; there are {', '.join(self.methods)}.")
        return _float64([record[name][method][REMOVED[side]] for record in self.records])

    def _statistic(
        self, method: str, side: Side, statistic: Statistic, drawn: Tensor | None = None
    ) -> Tensor:
        """Return a statistic of the resampled examples ``drawn``, ``(samples, rates)``.

        Without ``drawn``, the only sample is that of all examples.
        """
        _check_statistic(self, statistic)
        if drawn is None:
            drawn = torch.arange(len(self.records), device="cpu")[None]
        if statistic == "mean":
            return self.deltas(method, side)[drawn].mean(1)
        changed, clean = self._table("nll", method, side), self._column("clean_nll")[:, None]
        if statistic == "nll":
            return (changed - clean)[drawn].mean(1)
        counts = self._column("count")[drawn]
        return _corpus(changed[drawn], counts) - _corpus(clean[drawn], counts)


def _check_statistic(result: FaithfulnessResult, statistic: Statistic) -> None:
    if statistic != "mean" and not result.has_likelihood:
        raise ValueError(
            f"statistic={statistic!r} needs the likelihood of the texts, which is not known: "
            "the model does not predict tokens, or sees the tokens that it predicts. Use "
            "statistic='mean', .aopc() or .deltas(method, side)."
        )


def cells(
    result: FaithfulnessResult, side: Side, reference: str, statistic: Statistic
) -> dict[str, list[Cell]]:
    """Return the deltas of each method at each rate, compared with those of the reference."""
    found = {}
    result._statistic(reference, side, statistic)  # an unknown name is an error, also for one text
    for name in result.methods:
        deltas = result._statistic(name, side, statistic)[0].tolist()
        verdicts: Sequence[Verdict | None] = [None] * len(deltas)
        if name != reference and len(result.records) >= COMPARABLE:
            verdicts = [
                "undecided" if better is None else "better" if better == name else "worse"
                for better in result.compare(reference, name, side, statistic=statistic).better
            ]
        found[name] = [
            Cell(x, verdict if isfinite(x) else None)
            for x, verdict in zip(deltas, verdicts, strict=True)
        ]
    return found


def _statistic_of_tables(result: FaithfulnessResult) -> Statistic:
    """Return the corpus perplexity for perplexity, because a few texts do not dominate it."""
    of_corpus = result.settings["quantity"] == "perplexity" and result.has_likelihood
    return "corpus" if of_corpus else "mean"


def _as_text(result: FaithfulnessResult) -> str:
    statistic = _statistic_of_tables(result)
    clean = result.clean_corpus if statistic == "corpus" else result.clean
    of = f"{'corpus ' * (statistic == 'corpus')}{result.settings['quantity']}"
    change = "loss" if result.settings["higher_is_better"] else "rise"
    parts = [f"{of} with nothing removed: {number(clean)} (texts: {len(result.records)})"]
    for side, which in result.sides.items():
        rates = [percent(rate) for rate in result.rates[which]]
        table = in_text(rates, cells(result, side, result.methods[0], statistic))
        parts.append(f"{TITLES[side]}: {change} of {of}\n{table}")
    return "\n\n".join([*parts, _legend(result)])


def _as_markdown(result: FaithfulnessResult, reference: str, statistic: Statistic) -> str:
    sides = dict(reversed(result.sides.items()))  # what can go comes first
    columns = [cells(result, side, reference, statistic) for side in sides]
    rates = (f"{which} {percent(r)}" for which in sides.values() for r in result.rates[which])
    rows = [
        [name, *(cell.in_markdown for column in columns for cell in column[name])]
        for name in result.methods
    ]
    return in_markdown(["method", *rates], rows)


def _legend(result: FaithfulnessResult) -> str:
    first, *others = result.methods
    if not others:
        return "One method alone is not compared."
    if len(result.records) < COMPARABLE:
        return "One text does not give an interval, so methods are not compared."
    few = ""
    if len(result.records) < FEW:
        few = f"\nThese are only {len(result.records)} texts, so the intervals are rough."
    return (
        f"{MARKS['better']} is better than {first}, and {MARKS['worse']} is worse. "
        f"{MARKS['undecided']} is undecided: the paired\n95% bootstrap interval of the difference "
        f"contains zero.{few}"
    )


def curve_styles(methods: Iterable[str], settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the label and colour of each method's curve, for Matplotlib.

    A method of the registry has its colour, and its label if it goes by its registered name.

    Args:
        methods: the names of the methods in a result.
        settings: the settings of the result, which say what the methods are.

    Example:
        >>> curve_styles(["vw", "mine"], {"methods": {"vw": "vw", "mine": "attention"}})["mine"]
        {'label': 'mine', 'color': '#7700dd'}
    """
    known = {}
    for name in methods:
        description = settings.get("methods", {}).get(name, "")
        entry = measures.find(description) or measures.find(name)
        label = entry.label if entry is not None and description == name else name
        known[name] = (label, name if entry is None else entry.name)
    colours = measures.colours(measure for _, measure in known.values())
    return {
        name: {"label": label, "color": colour}
        for (name, (label, _)), colour in zip(known.items(), colours, strict=True)
    }


def _corpus(nll: Tensor, counts: Tensor) -> Tensor:
    """Return ``exp`` of the mean NLL over tokens.

    Args:
        nll: ``(..., examples, rates)``, the mean NLL of each example.
        counts: ``(..., examples)``, the number of tokens of each example.
    """
    weights = counts[..., None]
    return ((nll * weights).sum(-2) / weights.sum(-2)).exp()


def _float64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
