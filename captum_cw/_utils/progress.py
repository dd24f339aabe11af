"""The one progress bar."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int | None, description: str, *, show: bool) -> Any:
    """A bar that appears once the work has taken two seconds, and leaves nothing behind."""
    return tqdm(total=total, desc=description, disable=not show, delay=2, leave=False)
