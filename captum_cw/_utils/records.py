"""Records of a long run: on disk as soon as they exist, so that a killed run goes on.

A file of records is a line that says which run it belongs to, and a line for each record, keyed by
what was computed. Lines are appended and synced one at a time, each with a checksum. A kill can
only tear the last one: that is dropped. Any other damage is refused, and the file left alone.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

__all__ = ["Records", "RecordsError"]


class RecordsError(ValueError):
    """A file of records is damaged, or belongs to another run; it was left as it is."""


class Records(Mapping[str, Any]):
    """Records by key, in memory and on disk; a context manager that closes the file.

    Args:
        path: The file; made, with its folder, where there is none.
        run: What must be the same for records to belong together, such as settings and versions;
            JSON.

    Raises:
        RecordsError: If the file is damaged, no file of records, of another run, or being written.

    Example:
        >>> path = getfixture("tmp_path") / "run.records"
        >>> with Records(path, {"seed": 0}) as records:
        ...     records.add("a", [0.1, 0.2])
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
        self._records: dict[str, Any] = {}
        run = json.loads(json.dumps(run))  # tuples become lists, as on disk
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        try:
            _lock(self._file, self.path)
            self._open(self.path.read_bytes(), run)
        except BaseException:
            self.close()
            raise

    def _open(self, content: bytes, run: Mapping[str, Any]) -> None:
        *whole, torn = content.split(b"\n")
        lines = [self._read(line, n) for n, line in enumerate(whole, 1)]
        if not lines and torn and not _line({"run": run}).startswith(torn):
            raise RecordsError(f"{self.path} is no file of records: choose another name.")
        if lines:
            self._check_run(lines[0], run)
            for n, line in enumerate(lines[1:], 2):
                if set(line) != {"key", "value"} or line["key"] in self._records:
                    raise self._damaged(n)
                self._records[line["key"]] = line["value"]
        if torn:
            os.truncate(self.path, len(content) - len(torn))
        if not lines:
            self._append({"run": run})

    def add(self, key: str, value: Any) -> None:
        """Keeps a record (JSON; floats come back bit for bit); it is on disk on return."""
        self.update({key: value})

    def update(self, records: Mapping[str, Any]) -> None:
        """Keeps several records at once."""
        for key in records:
            if key in self._records:
                raise KeyError(f"There is a record {key!r} already.")
        self._append(*({"key": key, "value": value} for key, value in records.items()))
        self._records.update(records)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, key: str) -> Any:
        return self._records[key]

    def __iter__(self) -> Any:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

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
            differences = ", ".join(
                f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
                for name in sorted({*there, *here})
                if there.get(name) != here.get(name)
            )
            raise RecordsError(
                f"{self.path} is of another run ({differences}): go on with the same settings, or "
                "choose another file."
            )

    def _damaged(self, n: int) -> RecordsError:
        what = "is damaged" if n > 1 else "is damaged, or no file of records:"
        return RecordsError(
            f"{self.path} {what} at line {n}: restore it, or choose another file to start anew."
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """One run at a time writes a file; the system unlocks it when it is closed, or the run dies."""
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
