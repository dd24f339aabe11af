"""Where the repository and the data sets beside it are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("CAPTUM_CW_DATA") or ROOT.parent / "shared" / "data")


def shared_data(name: str) -> Path:
    """A data set that is kept beside the repository; the test is skipped where it is missing."""
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is missing: CAPTUM_CW_DATA names the folder of these sets")
    return SHARED / name
