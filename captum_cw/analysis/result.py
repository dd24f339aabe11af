"""What an analysis found: figures, tables, a picture; on disk and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from captum_cw._utils.files import read_json, write_json

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["AnalysisResult", "Picture"]

VERSION = 1

Picture: TypeAlias = "tuple[Figure, npt.NDArray[Any]]"
"""A figure and its array of axes."""


@dataclass(frozen=True)
class AnalysisResult:
    """The result of an analysis; each analysis has a class of its own, which says what is in it.

    Attributes:
        settings: What the figures depend on: numbers of texts and tokens, seeds, choices.
        numbers: The headline figures, by name.
        tables: All figures, by the name of the table; the first is the main one.

    Example:
        >>> from captum_cw.analysis import AnalysisResult, first_token_weight
        >>> path = getfixture("tmp_path") / "weight.json"
        >>> result = first_token_weight(model, input_ids)
        >>> result.save(path)
        >>> AnalysisResult.load(path).numbers == result.numbers
        True
    """

    settings: Mapping[str, Any]
    numbers: Mapping[str, float]
    tables: Mapping[str, pd.DataFrame]

    _kinds: ClassVar[dict[str, type[AnalysisResult]]] = {}

    def __init_subclass__(cls) -> None:
        AnalysisResult._kinds[cls.__name__] = cls

    def to_dataframe(self) -> pd.DataFrame:
        """The main table."""
        return next(iter(self.tables.values()))

    def plot(self, *, use_pyplot: bool = True) -> Picture:
        """A figure and its array of axes; ``use_pyplot`` makes one that notebooks show."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON; floats come back bit for bit."""
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
        """Reads what :meth:`save` has written, as the class that it was.

        Raises:
            ValueError: If the file is no such result, or of an unknown version.
        """
        import pandas as pd

        content = read_json(path, VERSION, "analysis")
        kind = AnalysisResult._kinds.get(content["analysis"])
        if kind is None:
            raise ValueError(
                f"{path} holds a result of the analysis {content['analysis']!r}, which is not "
                f"known; known: {', '.join(sorted(AnalysisResult._kinds))}."
            )
        tables = {name: pd.DataFrame(columns) for name, columns in content["tables"].items()}
        return kind(content["settings"], content["numbers"], tables)
