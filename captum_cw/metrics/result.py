"""What an evaluation found: curves, comparisons with intervals, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from captum_cw._utils.files import read_json, write_json
from captum_cw.functional import check_choice
from captum_cw.removal.ranking import Which

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Comparison", "FaithfulnessResult", "Side", "Statistic"]

VERSION = 1
#: Texts that have a spread, and with it an interval.
COMPARABLE = 2
#: Examples that are held at once while resampling.
RESAMPLED = 1_000_000
Side = Literal["comprehensiveness", "sufficiency"]
REMOVED: dict[Side, Which] = {"comprehensiveness": "top", "sufficiency": "bottom"}
TITLES: dict[Side, str] = {
    "comprehensiveness": "Top removed (higher is better)",
    "sufficiency": "Bottom removed (lower is better)",
}
Statistic = Literal["mean", "corpus", "nll"]
#: Statistics and metrics, as an axis names them.
LABELS: dict[str, str] = {
    "corpus": "corpus perplexity",
    "nll": "mean negative log-likelihood (nats)",
    "log_prob": "log-probability (nats)",
    "prob": "probability",
    "kl": "KL divergence (nats)",
}


class Comparison(NamedTuple):
    """The difference of two methods at each rate, ``a - b``, with its paired interval.

    ``difference``, ``low`` and ``high`` are ``(rates,)``; ``better`` is the name of the method
    that is better at each rate, None where the interval holds zero.

    Example:
        >>> low, high = torch.tensor([-2.0]), torch.tensor([-1.0])
        >>> Comparison((0.5,), torch.tensor([-1.5]), low, high, ("contribution",)).better
        ('contribution',)
    """

    rates: tuple[float, ...]
    difference: Tensor
    low: Tensor
    high: Tensor
    better: tuple[str | None, ...]


@dataclass(frozen=True)
class FaithfulnessResult:
    """Comprehensiveness and sufficiency of several methods, example by example.

    A delta is what the metric loses by the removal, ``f(changed) - f(clean)`` where less is better
    (the sign is turned where more is better): comprehensiveness is better the higher it is,
    sufficiency the lower.

    Attributes:
        rates: What was removed, by ``"top"`` and ``"bottom"``.
        settings: What the numbers depend on.
        records: For each example its ``index``, ``clean`` metric, and by method and side the
            metric (``values``) and mean negative log-likelihood (``nll``) at each rate. There is
            no likelihood where the model predicts no tokens, such as a classifier.

    Raises:
        ValueError: If there is no example.

    Example:
        >>> metric = ComprehensivenessSufficiency(model, rates=[0.25, 0.5])
        >>> texts = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
        >>> result = metric.evaluate({"contribution": "contribution", "chance": "random"}, texts)
        >>> result.per_example["contribution"]["sufficiency"].shape
        torch.Size([2, 2])
        >>> result.compare("contribution", "chance").rates
        (0.25, 0.5)
    """

    rates: Mapping[Which, tuple[float, ...]]
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("There is no example: the data are empty.")

    @property
    def methods(self) -> list[str]:
        """Their names."""
        return list(self.records[0]["values"])

    @property
    def sides(self) -> dict[Side, Which]:
        """The sides that were evaluated, and what was removed."""
        return {side: which for side, which in REMOVED.items() if which in self.rates}

    @property
    def has_likelihood(self) -> bool:
        """Whether the likelihood of the texts is known: the model predicts their tokens."""
        return "clean_nll" in self.records[0]

    @property
    def comprehensiveness(self) -> dict[str, Tensor]:
        """By method ``(rates,)``: the mean delta over examples (Eq. 16), top removed."""
        return self._means("comprehensiveness")

    @property
    def sufficiency(self) -> dict[str, Tensor]:
        """By method ``(rates,)``: the mean delta over examples (Eq. 17), bottom removed."""
        return self._means("sufficiency")

    @property
    def per_example(self) -> dict[str, dict[Side, Tensor]]:
        """By method and side ``(examples, rates)``: the deltas."""
        return {
            name: {side: self.deltas(name, side) for side in self.sides} for name in self.methods
        }

    @property
    def corpus(self) -> dict[str, dict[Side, Tensor]]:
        """By method and side ``(rates,)``: the delta of ``exp(mean NLL)`` over all tokens.

        Raises:
            ValueError: If the likelihood of the texts is not known.
        """
        return {
            name: {side: self._statistic(name, side, "corpus", None)[0] for side in self.sides}
            for name in self.methods
        }

    @property
    def clean(self) -> float:
        """The mean of the metric over the unchanged examples."""
        return float(self._column("clean").mean())

    @property
    def clean_corpus(self) -> float:
        """``exp(mean NLL)`` over all tokens of the unchanged examples.

        Raises:
            ValueError: If the likelihood of the texts is not known.
        """
        self._check_statistic("corpus")
        return float(self._corpus(self._column("clean_nll")[:, None], self._column("count")))

    def deltas(self, method: str, side: Side) -> Tensor:
        """``(examples, rates)`` of the metric."""
        sign = -1 if self.settings["higher_is_better"] else 1
        changed = self._table("values", method, side)
        return sign * (changed - self._column("clean")[:, None])

    def aopc(self) -> dict[str, dict[Side, float]]:
        """By method and side: the plain mean over the rates of the mean delta."""
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
        """The difference of two methods, with a paired bootstrap interval over examples.

        Args:
            a: A method.
            b: Another.
            side: ``"comprehensiveness"`` or ``"sufficiency"``.
            statistic: Of the deltas: their ``"mean"`` over examples, or that of ``"nll"``, or the
                delta of ``"corpus"`` perplexity, which no single example dominates.
            samples: Resamples of the examples.
            confidence: Of the interval (percentiles).
            seed: Of the resamples.

        Returns:
            At each rate, ``a - b`` and its interval.

        Raises:
            KeyError: If a method was not evaluated.
            ValueError: If a choice is unknown, there are fewer than two examples, or the likelihood
                of the texts is asked for and not known.
        """
        check_choice("side", side, Side)
        check_choice("statistic", statistic, Statistic)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r}: give a fraction between 0 and 1.")
        n = len(self.records)
        if n < COMPARABLE:
            raise ValueError(
                f"There is {n} text, but an interval over texts needs {COMPARABLE} or more: "
                "evaluate more texts, or read the differences from .deltas(method, side)."
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n, (samples, n), generator=generator, device="cpu")
        here = self._statistic(a, side, statistic, None) - self._statistic(b, side, statistic, None)
        found = torch.cat(
            [
                self._statistic(a, side, statistic, some)
                - self._statistic(b, side, statistic, some)
                for some in torch.split(drawn, max(1, RESAMPLED // n))
            ]
        )
        tail = (1 - confidence) / 2
        bounds = found.new_tensor([tail, 1 - tail])
        low, high = torch.quantile(found, bounds, dim=0)
        less = side == "sufficiency"
        better = tuple(
            (a if (y < 0) == less else b) if x > 0 or y < 0 else None
            for x, y in zip(low.tolist(), high.tolist(), strict=True)
        )
        return Comparison(self.rates[REMOVED[side]], here[0], low, high, better)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each method, side and rate (needs pandas).

        ``delta_nll`` and ``delta_corpus_perplexity`` are there where the likelihood is known.
        """
        import pandas as pd

        columns: dict[str, Statistic] = {"delta": "mean"}
        if self.has_likelihood:
            columns |= {"delta_nll": "nll", "delta_corpus_perplexity": "corpus"}
        rows = []
        for name in self.methods:
            for side, which in self.sides.items():
                found = {
                    column: self._statistic(name, side, statistic, None)[0].tolist()
                    for column, statistic in columns.items()
                }
                for i, rate in enumerate(self.rates[which]):
                    numbers = {column: values[i] for column, values in found.items()}
                    rows.append({"method": name, "side": side, "rate": rate, **numbers})
        return pd.DataFrame(rows)

    def plot(
        self,
        *,
        statistic: Statistic = "mean",
        log: bool | None = None,
        use_pyplot: bool = True,
    ) -> tuple[Figure, npt.NDArray[Any]]:
        """The two curves (Fig. 3): the delta against the fraction removed.

        Args:
            statistic: As for :meth:`compare`.
            log: A logarithmic scale; None where all deltas are positive, and those of a side span
                two decades.
            use_pyplot: Makes a pyplot figure, which notebooks show.

        Returns:
            The figure and its two axes.

        Raises:
            ValueError: If ``statistic`` is unknown, or is of a likelihood that is not known.
        """
        from captum_cw.visualization.curves import plot_curves

        check_choice("statistic", statistic, Statistic)
        what = self.settings["quantity"] if statistic == "mean" else statistic
        return plot_curves(
            {
                TITLES[side]: {
                    name: self._statistic(name, side, statistic, None)[0] for name in self.methods
                }
                for side in self.sides
            },
            {TITLES[side]: self.rates[which] for side, which in self.sides.items()},
            ylabel=f"delta of {LABELS.get(what, what)}",
            log=log,
            use_pyplot=use_pyplot,
        )

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON; floats come back bit for bit."""
        content = {
            "version": VERSION,
            "rates": {which: list(rates) for which, rates in self.rates.items()},
            "settings": dict(self.settings),
            "records": list(self.records),
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> FaithfulnessResult:
        """Reads what :meth:`save` has written.

        Raises:
            ValueError: If the file is no such result, or of an unknown version.
        """
        content = read_json(path, VERSION, "rates")
        rates = {which: tuple(rates) for which, rates in content["rates"].items()}
        return cls(rates, content["settings"], content["records"])

    def _means(self, side: Side) -> dict[str, Tensor]:
        """Empty where the side was not evaluated."""
        names = self.methods if side in self.sides else []
        return {name: self.deltas(name, side).mean(0) for name in names}

    def _column(self, name: str) -> Tensor:
        return _numbers([record[name] for record in self.records])

    def _table(self, what: str, method: str, side: Side) -> Tensor:
        if method not in self.methods:
            raise KeyError(f"{method!r} was not evaluated; there are {', '.join(self.methods)}.")
        rows = [record[what][method][REMOVED[side]] for record in self.records]
        return _numbers(rows)

    def _statistic(
        self, method: str, side: Side, statistic: Statistic, drawn: Tensor | None
    ) -> Tensor:
        """``(samples, rates)`` over resampled examples, ``(1, rates)`` over all."""
        self._check_statistic(statistic)
        if drawn is None:
            drawn = torch.arange(len(self.records), device="cpu")[None]
        if statistic == "mean":
            return self.deltas(method, side)[drawn].mean(1)
        changed, clean = self._table("nll", method, side), self._column("clean_nll")[:, None]
        if statistic == "nll":
            return (changed - clean)[drawn].mean(1)
        counts = self._column("count")[drawn]
        return self._corpus(changed[drawn], counts) - self._corpus(clean[drawn], counts)

    def _check_statistic(self, statistic: Statistic) -> None:
        if statistic != "mean" and not self.has_likelihood:
            raise ValueError(
                f"{statistic!r} is of the likelihood of the texts, which is not known: the model "
                "predicts no tokens, or sees the tokens that it predicts. Use statistic='mean', "
                ".aopc() or .deltas(method, side), which are of the metric."
            )

    @staticmethod
    def _corpus(nll: Tensor, counts: Tensor) -> Tensor:
        """``exp`` of the mean over tokens; examples are the last dimension but one of ``nll``."""
        weights = counts[..., None]
        return ((nll * weights).sum(-2) / weights.sum(-2)).exp()


def _numbers(of: list[Any]) -> Tensor:
    return torch.tensor(of, dtype=torch.float64, device="cpu")
