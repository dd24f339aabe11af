"""Attribution classes in Captum's form; the work is in ``captum_cw.capture`` and ``functional``."""

from captum_cw.attr.chat import ChatTokenInput
from captum_cw.attr.llm import LLMTokenAttribution
from captum_cw.attr.measures import (
    ALTIWeights,
    AttentionWeights,
    ContributionWeights,
    VWAttention,
    VWONAttention,
)
from captum_cw.attr.token_scores import TokenScores

__all__ = [
    "ALTIWeights",
    "AttentionWeights",
    "ChatTokenInput",
    "ContributionWeights",
    "LLMTokenAttribution",
    "TokenScores",
    "VWAttention",
    "VWONAttention",
]
