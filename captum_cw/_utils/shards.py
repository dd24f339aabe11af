"""Parquet files of a long run, each written as a whole, so that a killed run can be resumed.

The rows of a run are cut into a fixed number of files. A file that has its final name is finished,
so processes need no list of what is done, and never write to the same file. Each file has the
settings of the run in its metadata, so the rows of different runs do not mix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_cw._utils.extras import imported
from captum_cw._utils.files import whole_file
from captum_cw._utils.records import RecordsError, differences

__all__ = ["Shards"]

#: The key of the settings in the metadata of a file.
KEY = b"captum_cw"


class Shards:
    """The Parquet files of a run.

    Args:
        folder: The folder of the files.
        rows: The number of rows in each file.
        run: The settings and versions that all files must share (JSON).
        notes: Further entries of the metadata, which may differ between files (JSON).

    Raises:
        ImportError: If `pyarrow` is not installed.

    Example:
        >>> import pyarrow
        >>> shards = Shards(getfixture("tmp_path"), rows=[2, 1], run={"seed": 0})
        >>> schema = pyarrow.schema({"score": pyarrow.float32()})
        >>> shards.write(1, [{"score": 0.5}], schema)
        >>> shards.unfinished()
        [0]
        >>> shards.write(0, [{"score": 1.5}, {"score": None}], schema)
        >>> shards.count("score")
        2
        >>> shards.path(1).name
        'texts-00001-of-00002.parquet'
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[int],
        run: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self._parquet = imported("pyarrow.parquet", "evaluate")
        self._arrow = imported("pyarrow", "evaluate")
        self.folder, self.rows = folder, list(rows)
        self._run = json.loads(json.dumps(run))
        self._settings = {**(notes or {}), **self._run}

    def path(self, number: int) -> Path:
        """Return the file of a number, counted from 0."""
        return self.folder / f"texts-{number:05d}-of-{len(self.rows):05d}.parquet"

    def unfinished(self) -> list[int]:
        """Return the numbers of the files that do not exist yet.

        Raises:
            RecordsError: If a Parquet file of the folder is damaged, or belongs to another run.
        """
        expected = {self.path(number): rows for number, rows in enumerate(self.rows)}
        for path in sorted(self.folder.glob("*.parquet")):
            if self._rows_in(path) != expected.get(path):
                raise RecordsError(
                    f"{path} does not belong to this run, so its rows would mix with those of the "
                    "run: choose another folder."
                )
        return [number for number, path in enumerate(expected) if not path.exists()]

    def write(self, number: int, rows: Sequence[Mapping[str, Any]], schema: Any) -> None:
        """Write a file. It is on disk when this returns.

        Args:
            number: The number of the file.
            rows: Its rows.
            schema: The columns, as a ``pyarrow.Schema``.
        """
        described = schema.with_metadata({KEY: json.dumps(self._settings)})
        table = self._arrow.Table.from_pylist(list(rows), schema=described)
        with whole_file(self.path(number)) as whole:
            self._parquet.write_table(table, whole)

    def count(self, column: str) -> int:
        """Return the number of rows of all files that have a value in a column."""
        paths = map(self.path, range(len(self.rows)))
        columns = (self._parquet.read_table(path, columns=[column])[column] for path in paths)
        return sum(len(found) - found.null_count for found in columns)

    def _rows_in(self, path: Path) -> int:
        """Return the number of rows of a file of this run."""
        try:
            found = self._parquet.read_metadata(path)
            settings = json.loads((found.metadata or {})[KEY])
        except (self._arrow.ArrowException, KeyError, ValueError) as error:
            raise RecordsError(
                f"{path} is damaged, or was not written by this command ({error}): move it away, "
                "and run the command again."
            ) from error
        there = {name: settings.get(name) for name in self._run}
        if there != self._run:
            raise RecordsError(
                f"{path} is of another run ({differences(there, self._run)}): use the same "
                "settings, or choose another folder."
            )
        count: int = found.num_rows
        return count
