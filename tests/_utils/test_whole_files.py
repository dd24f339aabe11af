"""A file is written as a whole, or stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from captum_cw._utils.files import whole_file


def write(path: Path, then: Callable[[Path], object]) -> None:
    with whole_file(path) as whole:
        whole.write_text("new")
        then(whole)


def test_a_file_that_was_not_finished_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write(path, lambda whole: 1 / 0)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_part_that_is_gone_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError):
        write(path, Path.unlink)
    assert path.read_text() == "old"
