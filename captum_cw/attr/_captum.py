"""Imports of Captum's private helpers, all in one place since releases change them."""

from collections.abc import Callable
from typing import TypeVar

from captum.attr._core.llm_attr import BaseLLMAttribution
from captum.attr._utils.attribution import Attribution, LayerAttribution
from captum.attr._utils.interpretable_input import TextTemplateInput, TextTokenInput
from captum.log import log_usage

__all__ = [
    "Attribution",
    "BaseLLMAttribution",
    "LayerAttribution",
    "TextTemplateInput",
    "TextTokenInput",
    "logged",
]

F = TypeVar("F", bound=Callable[..., object])


def logged(function: F) -> F:
    """Decorate ``attribute`` as Captum does; its NoiseTunnel calls ``attribute.__wrapped__``."""
    wrapped: F = log_usage()(function)
    return wrapped
