"""Attribution classes in Captum's form, over :mod:`captum_cw.capture` and
:mod:`captum_cw.functional`."""

from captum_cw.attr.layer import AttentionWeights, ContributionWeights, VWAttention, VWONAttention
from captum_cw.attr.llm import LLMTokenAttribution
from captum_cw.attr.token_scores import TokenScores

__all__ = [
    "AttentionWeights",
    "ContributionWeights",
    "LLMTokenAttribution",
    "TokenScores",
    "VWAttention",
    "VWONAttention",
]
