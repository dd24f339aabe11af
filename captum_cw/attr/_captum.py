"""The only door to Captum's private helpers, which change between releases."""

from captum.attr._core.llm_attr import BaseLLMAttribution
from captum.attr._utils.attribution import Attribution, LayerAttribution
from captum.attr._utils.interpretable_input import TextTokenInput
from captum.log import log_usage

__all__ = ["Attribution", "BaseLLMAttribution", "LayerAttribution", "TextTokenInput", "log_usage"]
