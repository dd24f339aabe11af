"""JSON files of results, with a version number of their format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "whole_file", "write_json"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` at the end.

    If the process is killed or the machine fails, ``path`` is either the whole new file or the old
    one. The temporary name starts with a dot, so that programs that read all files of a folder
    skip it. It is always the same, so that a killed process leaves one at most.
    """
    whole = Path(path).with_name(f".{Path(path).name}.part")
    if not whole.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {whole.parent}.")
    try:
        yield whole
        with whole.open("r+b") as written:  # it must be there
            os.fsync(written.fileno())
        whole.replace(path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole (see :func:`whole_file`)."""
    with whole_file(path) as whole:
        whole.write_text(json.dumps(content), encoding="utf-8")


def read_json(path: str | Path, version: int, needed: str) -> dict[str, Any]:
    """Read a file of :func:`write_json`, and check its version and that it has an entry.

    Args:
        path: The file.
        version: The version that this release reads.
        needed: The name of an entry that files of this kind have.

    Raises:
        ValueError: If the file is of another kind or version.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this package.") from error
    if found != version:
        raise ValueError(f"{path} has version {found!r}; this release reads {version}.")
    if needed not in content:
        raise ValueError(f"{path} is not a result of this kind.")
    return content
