"""The figures of the analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from captum_cw.analysis.figures import frames, geometry, selection
from captum_cw.visualization._output import Picture

#: The function that plots each kind of result. It takes the result and ``use_pyplot``.
FIGURES: Mapping[str, Callable[[Any, bool], Picture]] = {
    "ComponentCorrelations": geometry.plot_correlations,
    "ComponentDispersion": geometry.plot_dispersion,
    "ComponentRegression": geometry.plot_regression,
    "FirstTokenWeight": geometry.plot_first_token_weight,
    "FramesOverCheckpoints": frames.plot_checkpoints,
    "HeadRegimes": selection.plot_head_regimes,
    "Interference": geometry.plot_interference,
    "OutputNorms": geometry.plot_output_norms,
    "ReferenceFrames": frames.plot_reference_frames,
    "SelectionAssumptions": selection.plot_selection_assumptions,
    "SemanticCone": geometry.plot_cone,
    "SinkScaling": geometry.plot_sink_scaling,
    "TokenSelection": selection.plot_token_selection,
    "ValueAlignment": geometry.plot_alignment,
    "WeightEntropy": geometry.plot_entropy,
}
