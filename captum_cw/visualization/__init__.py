"""Plots of scores and maps: coloured text, attention next to contribution, scores on images.

All functions take plain tensors; they do not run a model.
"""

from captum_cw.text.tokens import readable_tokens
from captum_cw.visualization._output import save_figure
from captum_cw.visualization.image import PatchScores, fold_patches, plot_image_scores
from captum_cw.visualization.maps import (
    plot_attention_and_contribution,
    plot_decomposition,
    plot_token_scores,
)
from captum_cw.visualization.text import text_html, text_records

__all__ = [
    "PatchScores",
    "fold_patches",
    "plot_attention_and_contribution",
    "plot_decomposition",
    "plot_image_scores",
    "plot_token_scores",
    "readable_tokens",
    "save_figure",
    "text_html",
    "text_records",
]
