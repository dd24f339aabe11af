"""Analyses of attention layers over texts: contributions, sinks, selection, reference frames.

Each analysis is a function of a model and token batches. It returns a small result with numbers
and tables, which can be plotted, saved and loaded. The analyses need the extra
``captum-cw[analysis]``.
"""

try:
    from captum_cw.analysis.assumptions import selection_assumptions
    from captum_cw.analysis.components import (
        component_correlations,
        component_dispersion,
        component_regression,
        interference,
    )
    from captum_cw.analysis.first_token import (
        first_token_weight,
        sink_scaling,
        value_alignment,
        weight_entropy,
    )
    from captum_cw.analysis.frames import frames_over_checkpoints, reference_frames
    from captum_cw.analysis.maps import weight_maps
    from captum_cw.analysis.regimes import head_regimes
    from captum_cw.analysis.result import AnalysisResult
    from captum_cw.analysis.selection import token_selection
    from captum_cw.analysis.suppression import output_norms, semantic_cone
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"captum_cw.analysis needs {error.name}: pip install 'captum-cw[analysis]'"
    ) from error

__all__ = [
    "AnalysisResult",
    "component_correlations",
    "component_dispersion",
    "component_regression",
    "first_token_weight",
    "frames_over_checkpoints",
    "head_regimes",
    "interference",
    "output_norms",
    "reference_frames",
    "selection_assumptions",
    "semantic_cone",
    "sink_scaling",
    "token_selection",
    "value_alignment",
    "weight_entropy",
    "weight_maps",
]
