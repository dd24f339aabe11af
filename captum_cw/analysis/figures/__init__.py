"""The figures of the analyses."""

from captum_cw.analysis.figures import frames, geometry, selection  # noqa: F401  # they register
from captum_cw.analysis.figures.drawing import FIGURES

__all__ = ["FIGURES"]
