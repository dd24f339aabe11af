"""The result of an analysis: settings, numbers and tables that can be plotted, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pandas as pd
from torch import Tensor

from captum_cw._utils.files import read_json, write_json

if TYPE_CHECKING:
    from captum_cw.visualization._output import Picture

VERSION = 1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AnalysisResult:
    """The result of an analysis. Each analysis has a subclass that documents its contents.

    A subclass needs a figure in ``captum_cw.analysis.figures``.

    Attributes:
        settings: The choices that the numbers depend on, such as the number of texts and tokens,
            the options and the random seed.
        numbers: The headline numbers, by name.
        tables: All numbers, as tables by name. The first is the main table.

    Example:
        >>> from captum_cw.analysis import AnalysisResult, first_token_weight
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> result = first_token_weight(model, inputs)
        >>> path = getfixture("tmp_path") / "weight.json"
        >>> result.save(path)
        >>> AnalysisResult.load(path).numbers == result.numbers
        True
    """

    settings: Mapping[str, Any]
    numbers: Mapping[str, float]
    tables: Mapping[str, pd.DataFrame]

    def to_dataframe(self) -> pd.DataFrame:
        """Return the main table."""
        return next(iter(self.tables.values()))

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """Plot the result.

        Args:
            use_pyplot: Make a pyplot figure, which notebooks show. False makes a plain figure,
                which need not be closed.

        Returns:
            The figure and its array of axes.
        """
        from captum_cw.analysis.figures import FIGURES

        return FIGURES[type(self).__name__](self, use_pyplot)

    def save(self, path: str | Path) -> None:
        """Save the result as JSON. Floats are restored bit for bit."""
        content = {
            "version": VERSION,
            "analysis": type(self).__name__,
            "settings": dict(self.settings),
            "numbers": dict(self.numbers),
            "tables": {name: table.to_dict("list") for name, table in self.tables.items()},
        }
        write_json(path, content)

    @staticmethod
    def load(path: str | Path) -> AnalysisResult:
        """Load a result that :meth:`save` wrote, as an instance of its own class.

        Raises:
            ValueError: If the file is not a saved result, or has an unknown version or analysis.
        """
        content = read_json(path, VERSION, "analysis")
        known = {cls.__name__: cls for cls in AnalysisResult.__subclasses__()}
        if content["analysis"] not in known:
            raise ValueError(
                f"{path} holds a result of the unknown analysis {content['analysis']!r}; "
                f"known: {', '.join(sorted(known))}."
            )
        tables = {name: pd.DataFrame(columns) for name, columns in content["tables"].items()}
        return known[content["analysis"]](content["settings"], content["numbers"], tables)


def settings_of(texts: Sequence[Tensor], **options: Any) -> dict[str, Any]:
    """Return the settings of a result: the number of texts and tokens, and the options."""
    return {"texts": len(texts), "tokens": sum(map(len, texts)), **options}
