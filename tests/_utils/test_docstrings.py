"""Texts of docstrings."""

from __future__ import annotations

import pytest

from captum_cw._utils.docstrings import paragraphs


def test_paragraphs_are_lines() -> None:
    def described() -> None:
        """Say one thing,
        on two lines.

        Say another thing.
        """

    assert paragraphs(described) == ["Say one thing, on two lines.", "Say another thing."]


def test_a_docstring_that_python_removed_is_named() -> None:
    def bare() -> None:
        pass

    with pytest.raises(RuntimeError, match="bare has no docstring.*without -OO"):
        paragraphs(bare)
