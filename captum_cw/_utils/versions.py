"""The releases that results depend on."""

from __future__ import annotations

from importlib.metadata import version

from captum_cw._version import __version__

__all__ = ["versions"]


def versions(*more: str) -> dict[str, str]:
    """Return the versions of captum_cw, torch, transformers and other libraries.

    Example:
        >>> [*versions("captum")]
        ['captum_cw', 'torch', 'transformers', 'captum']
    """
    return {"captum_cw": __version__} | {x: version(x) for x in ("torch", "transformers", *more)}
