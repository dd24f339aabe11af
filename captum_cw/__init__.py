"""Contribution Weights for Captum: which tokens made a transformer's output."""

from captum_cw._version import __version__ as __version__
from captum_cw.attr import (
    ALTIWeights,
    AttentionWeights,
    ChatTokenInput,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
)
from captum_cw.explaining import explain
from captum_cw.explanation import Explanation
from captum_cw.interventions import remove_tokens, remove_values, scale_values
from captum_cw.metrics import ComprehensivenessSufficiency, comprehensiveness, sufficiency

__all__ = [
    "ALTIWeights",
    "AttentionWeights",
    "ChatTokenInput",
    "ComprehensivenessSufficiency",
    "ContributionWeights",
    "Explanation",
    "LLMTokenAttribution",
    "TokenScores",
    "VWAttention",
    "VWONAttention",
    "comprehensiveness",
    "explain",
    "remove_tokens",
    "remove_values",
    "scale_values",
    "sufficiency",
]
