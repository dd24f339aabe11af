from . import attr, capture, functional, metrics, removal
from ._version import __version__ as __version__
from .attr import (
    ALTIWeights,
    AttentionWeights,
    ChatTokenInput,
    ContributionWeights,
    EffectContributions,
    InputContributions,
    LLMTokenAttribution,
    TargetContributions,
    TokenScores,
    VWAttention,
    VWONAttention,
)
from .explanation import Explanation, explain
from .metrics import ComprehensivenessSufficiency, comprehensiveness, sufficiency
from .removal import remove_tokens, remove_values, scale_values

__all__ = [
    "ALTIWeights",
    "AttentionWeights",
    "ChatTokenInput",
    "ComprehensivenessSufficiency",
    "ContributionWeights",
    "EffectContributions",
    "Explanation",
    "InputContributions",
    "LLMTokenAttribution",
    "TargetContributions",
    "TokenScores",
    "VWAttention",
    "VWONAttention",
    "attr",
    "capture",
    "comprehensiveness",
    "explain",
    "functional",
    "metrics",
    "removal",
    "remove_tokens",
    "remove_values",
    "scale_values",
    "sufficiency",
]
