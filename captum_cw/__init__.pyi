from . import attr, capture, functional, metrics, sinks
from ._version import __version__ as __version__
from .attr import (
    ALTIWeights,
    AttentionWeights,
    ChatTokenInput,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
)
from .explaining import explain
from .explanation import Explanation
from .interventions import remove_tokens, remove_values, scale_values
from .metrics import ComprehensivenessSufficiency, comprehensiveness, sufficiency

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
    "attr",
    "capture",
    "comprehensiveness",
    "explain",
    "functional",
    "metrics",
    "remove_tokens",
    "remove_values",
    "scale_values",
    "sinks",
    "sufficiency",
]
