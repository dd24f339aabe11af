"""A killed run loses at most the record being written; any other damage is refused."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

from captum_cw._utils.records import Records, RecordsError

RUN = {"model": "m", "rates": (0.1, 0.5)}
VALUES = {"a": [0.1, 1 / 3, -0.0, 1e-310], "b": [math.inf, 2.0**0.5], "c": {"text": "ü\n"}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with Records(tmp_path / "folder" / "run.records", RUN) as records:
        for key, value in VALUES.items():
            records.update({key: value})
    return tmp_path / "folder" / "run.records"


def test_records_come_back_bit_for_bit(file: Path) -> None:
    with Records(file, RUN) as records:
        assert dict(records) == VALUES
        assert math.copysign(1, records["a"][2]) == -1


def test_a_record_is_on_disk_before_the_file_is_closed(file: Path, tmp_path: Path) -> None:
    with Records(file, RUN) as records:
        records.update({"d": 1})
        (tmp_path / "copy").write_bytes(file.read_bytes())
        with Records(tmp_path / "copy", RUN) as others:
            assert others["d"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of this kind")
def test_two_runs_do_not_write_one_file(file: Path) -> None:
    with Records(file, RUN), pytest.raises(RecordsError, match="being written by another run"):
        Records(file, RUN)
    with Records(file, RUN):
        pass


def test_a_file_cut_anywhere_in_its_last_line_loses_that_record_only(file: Path) -> None:
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole)):
        file.write_bytes(whole[:length])
        with Records(file, RUN) as records:
            assert list(records) == ["a", "b"]
            records.update({"c": VALUES["c"]})
        assert file.read_bytes() == whole


def test_a_file_cut_anywhere_in_its_first_line_is_begun_again(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(whole.index(b"\n") + 1):
        file.write_bytes(whole[:length])
        with Records(file, RUN) as records:
            for key, value in VALUES.items():
                records.update({key: value})
        assert file.read_bytes() == whole


def test_any_other_damage_is_refused_and_nothing_lost(file: Path) -> None:
    whole = file.read_bytes()
    end = whole.rindex(b"\n", 0, -1)
    for place in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        if place > end and damaged[place] == ord("\n"):
            continue  # what follows would be a torn line, were the checksum before it right
        file.write_bytes(damaged)
        with pytest.raises(RecordsError, match="damaged|not a file of records"):
            Records(file, RUN)
        assert file.read_bytes() == bytes(damaged)


def test_a_lost_line_break_is_refused(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0].rstrip() + b"".join(lines[1:]))
    with pytest.raises(RecordsError, match="damaged"):
        Records(file, RUN)


@pytest.mark.parametrize("content", [b"text", b"text\n", b"\n", b"{}\n{}\n", bytes(64)])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(RecordsError, match="not a file of records"):
        Records(tmp_path / "foreign", RUN)
    assert (tmp_path / "foreign").read_bytes() == content


def test_another_run_is_refused_with_what_differs(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(RecordsError, match=r"model: 'm' there, 'n' here\)"):
        Records(file, {**RUN, "model": "n"})
    assert file.read_bytes() == before


def test_a_file_without_a_record_is_begun_again_by_another_run(tmp_path: Path) -> None:
    path, other = tmp_path / "run.records", {**RUN, "model": "n"}
    for torn in (b"", b"0"):
        with Records(path, RUN):
            pass
        with path.open("ab") as file:
            file.write(torn)
        with Records(path, other) as records:
            records["a"] = 1
        with Records(path, other) as records:
            assert records == {"a": 1}
        path.unlink()


def test_a_line_that_is_no_record_is_refused(file: Path) -> None:
    first, *_ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + first)
    with pytest.raises(RecordsError, match="damaged at line 2"):
        Records(file, RUN)


def test_each_record_is_synced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(file.stat().st_size))
    with Records(file, RUN) as records:
        records.update({"d": 1})
        records.update({"e": 1, "f": 2})
    assert len(synced) == 2
    assert synced[-1] == file.stat().st_size
