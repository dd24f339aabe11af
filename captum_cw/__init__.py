"""Contribution Weights for Captum: which tokens made a transformer's output."""

from captum_cw.attr import (
    AttentionWeights,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionWeights",
    "ContributionWeights",
    "LLMTokenAttribution",
    "TokenScores",
    "VWAttention",
    "VWONAttention",
]
