"""Records of a long run, written to disk one by one, so that a killed run can be resumed.

The first line of a file identifies the run. Each further line is one record with its key. Lines are
appended and synced one at a time, each with a checksum. If the process is killed, only the last
line can be incomplete; it is dropped. A file without a record, which a run leaves that fails at
once, is begun again. Any other damage raises an error, and the file is not changed.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Records", "RecordsError", "differences"]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return which settings of two runs differ, for error messages; "" if none does.

    Example:
        >>> differences({"seed": 0, "rates": [0.5]}, {"seed": 1, "rates": [0.5]})
        'seed: 0 there, 1 here'
    """
    return ", ".join(
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    )


class RecordsError(ValueError):
    """Raised if a file of records is damaged or belongs to another run. The file is unchanged."""


class Records(dict[str, Any], AbstractContextManager["Records"]):
    """Records by key, in memory and on disk. As a context manager it closes the file.

    Args:
        path: The file. A missing file, or folder, is created.
        run: The settings and versions that all records of the file must share (JSON).

    Raises:
        RecordsError: If the file is damaged, is not a file of records, belongs to another run, or
            is being written by another run.

    Example:
        >>> path = getfixture("tmp_path") / "run.records"
        >>> with Records(path, {"seed": 0}) as records:
        ...     records.update({"a": [0.1, 0.2]})
        >>> with Records(path, {"seed": 0}) as records:
        ...     records["a"]
        [0.1, 0.2]
        >>> Records(path, {"seed": 1})
        Traceback (most recent call last):
        ...
        captum_cw._utils.records.RecordsError: ...run.records is of another run (seed: 0...
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        run = json.loads(json.dumps(run))  # tuples become lists, as on disk
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        try:
            _lock(self._file, self.path)
            self._open(self.path.read_bytes(), run)
        except BaseException:
            self._file.close()
            raise

    def _open(self, content: bytes, run: Mapping[str, Any]) -> None:
        *whole, torn = content.split(b"\n")
        lines = [self._read(line, n) for n, line in enumerate(whole, 1)]
        if not lines and torn and not _line({"run": run}).startswith(torn):
            raise RecordsError(f"{self.path} is not a file of records: choose another name.")
        if len(lines) == 1 and set(lines[0]) == {"run"} and lines[0]["run"] != run:
            lines, torn = [], b""  # another run has left no record that could be lost
            os.truncate(self.path, 0)
        if lines:
            self._check_run(lines[0], run)
            for n, line in enumerate(lines[1:], 2):
                if set(line) != {"key", "value"} or line["key"] in self:
                    raise self._damaged(n)
                super().__setitem__(line["key"], line["value"])
        if torn:
            os.truncate(self.path, len(content) - len(torn))
        if not lines:
            self._append({"run": run})

    def __setitem__(self, key: str, value: Any) -> None:
        """Add a record, as :meth:`update` does."""
        self.update({key: value})

    def update(self, records: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Add records (JSON; floats are exact). They are on disk when this returns."""
        self._append(*({"key": key, "value": value} for key, value in records.items()))
        super().update(records)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _append(self, *contents: Mapping[str, Any]) -> None:
        self._file.write(b"".join(map(_line, contents)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, line: bytes, n: int) -> dict[str, Any]:
        checksum, _, text = line.partition(b" ")
        if checksum != _checksum(text):
            raise self._damaged(n)
        content: dict[str, Any] = json.loads(text)
        return content

    def _check_run(self, first: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        if set(first) != {"run"}:
            raise self._damaged(1)
        there = first["run"]
        if there != here:
            raise RecordsError(
                f"{self.path} is of another run ({differences(there, here)}): use the same "
                "settings, or choose another file."
            )

    def _damaged(self, n: int) -> RecordsError:
        what = "is damaged" if n > 1 else "is damaged, or is not a file of records,"
        return RecordsError(
            f"{self.path} {what} at line {n}: restore it, or choose another file for a new run."
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file for this run. The system unlocks it when it is closed or the run ends."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordsError(
                f"{path} is being written by another run: wait for it, or choose another file."
            ) from None


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return _checksum(text) + b" " + text + b"\n"
