"""Results on disk: JSON, with the version of its form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "whole_file", "write_json"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write what becomes the file at once: a kill leaves no half one."""
    whole = Path(f"{path}.part")
    if not whole.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {whole.parent}.")
    try:
        yield whole
        whole.replace(path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a file at once."""
    with whole_file(path) as whole:
        whole.write_text(json.dumps(content), encoding="utf-8")


def read_json(path: str | Path, version: int, needed: str) -> dict[str, Any]:
    """What :func:`write_json` wrote, of that version and with that entry.

    Raises:
        ValueError: If the file is another one, or of an unknown version.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no result of this package.") from error
    if found != version:
        raise ValueError(f"{path} has version {found!r}; this release reads {version}.")
    if needed not in content:
        raise ValueError(f"{path} holds no result of this kind.")
    return content
