"""Captum attribution classes: the measures, token scores, and language models."""

from captum_cw.attr.chat import ChatTokenInput
from captum_cw.attr.effects import EffectContributions
from captum_cw.attr.llm import LLMTokenAttribution
from captum_cw.attr.measures import (
    ALTIWeights,
    AttentionWeights,
    ContributionWeights,
    VWAttention,
    VWONAttention,
)
from captum_cw.attr.targets import InputContributions, TargetContributions
from captum_cw.attr.token_scores import TokenScores

__all__ = [
    "ALTIWeights",
    "AttentionWeights",
    "ChatTokenInput",
    "ContributionWeights",
    "EffectContributions",
    "InputContributions",
    "LLMTokenAttribution",
    "TargetContributions",
    "TokenScores",
    "VWAttention",
    "VWONAttention",
]
