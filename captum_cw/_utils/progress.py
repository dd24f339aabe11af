"""The progress bar."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int | None, description: str, *, show: bool, unit: str = "it") -> Any:
    """Return a bar that appears after two seconds of work, and disappears at the end."""
    return tqdm(total=total, desc=description, disable=not show, delay=2, leave=False, unit=unit)
