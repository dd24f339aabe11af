"""The explanation of one text: how it is built, what it holds, its files and its page."""

from captum_cw.explanation.builder import explain
from captum_cw.explanation.explanation import Explanation

__all__ = ["Explanation", "explain"]
