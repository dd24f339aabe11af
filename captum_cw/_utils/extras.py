"""Import libraries that only some features need, and name the extra that installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["imported"]


def imported(name: str, extra: str) -> Any:
    """Import a module.

    Args:
        name: The name of the module.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: If the module cannot be imported. The message names the extra.

    Example:
        >>> imported("no_such_module", "evaluate")
        Traceback (most recent call last):
        ...
        ImportError: no_such_module is not installed, or cannot be imported (No module named ...
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed, or cannot be imported ({error}): pip install "
            f"'captum-cw[{extra}]'"
        ) from error
