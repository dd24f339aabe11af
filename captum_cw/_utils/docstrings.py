"""Texts that stand in the docstring of the function they describe."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["paragraphs"]


def paragraphs(function: Callable[..., object]) -> list[str]:
    """Return the paragraphs of a function's docstring, each as one line.

    Raises:
        RuntimeError: If Python has removed the docstring (``python -OO``).

    Example:
        >>> paragraphs(paragraphs)[0]
        "Return the paragraphs of a function's docstring, each as one line."
    """
    if function.__doc__ is None:
        raise RuntimeError(
            f"{function.__qualname__} has no docstring, which holds a text of the report: run "
            "Python without -OO."
        )
    return [" ".join(paragraph.split()) for paragraph in function.__doc__.split("\n\n")]
