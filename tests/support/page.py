"""What tests of the interactive page read and do in a browser."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torch import Tensor

from captum_cw import measures

# The room for the labels of the map, in pixels, on a screen that is not a phone's.
MARGIN_TOP, MARGIN_LEFT = 92, 112
ENTRIES = measures.entries(controls=True, targets=True)
LABELS = {entry.name: entry.label for entry in ENTRIES}
ABOUT = {entry.name: entry.about for entry in ENTRIES}
MINUS = "\N{MINUS SIGN}"

Page = Any
Show = Callable[..., Page]

#: Runs a test in Chromium and in Firefox.
in_both_browsers = pytest.mark.parametrize("browser_name", ["chromium", "firefox"])


def number(text: str) -> float:
    """Read a number of the page, in percent or not."""
    return float(text.removesuffix("%").replace(MINUS, "-"))


def percent(x: Tensor | float) -> Any:
    """A share as the page shows it: whole percent from ten on, and two digits below."""
    x = 100 * float(x)
    return pytest.approx(x, abs=0.501 if abs(x) >= 9.5 else 0.051 * abs(x) + 1e-9)


def rounded(x: Tensor | float, digits: int = 3) -> float:
    return float(f"{float(x):.{digits}g}")


def figures(page: Page, heading: str | None = None) -> dict[str, float]:
    """Return the numbers of the details: of all lists, or of the list below a heading."""
    lists = page.locator("#details dl")
    if heading:
        lists = page.locator(f"#details h3:text-matches('^{heading}') + dl")
    lists.first.wait_for()  # those of a cell wait for all maps
    # All at once, since the mouse or a map that is unpacked can replace them.
    names, values = lists.evaluate_all(
        """lists => ["dt", "dd"].map(
            tag => lists.flatMap(list => [...list.querySelectorAll(tag)].map(x => x.innerText)))"""
    )
    return dict(zip(names, map(number, values), strict=True))


def places(named: dict[str, float]) -> list[int]:
    """Return the positions in names such as ``“is” (1)``."""
    return [int(re.search(r"\((\d+)\)$", name)[1]) for name in named]


def token(page: Page, place: int, box: str = "tokens") -> Any:
    return page.locator(f"#{box} .token").nth(place)


def is_selected(page: Page, place: int) -> bool:
    return bool(token(page, place).get_attribute("aria-selected") == "true")


def choose_cell(page: Page, query: int, key: int) -> None:
    """Select a cell with the keyboard, on a map of at most twenty rows."""
    page.locator("#map").focus()
    for pressed in ("PageUp", "PageUp", "PageUp", "Home"):
        page.keyboard.press(pressed)
    for _ in range(query):
        page.keyboard.press("ArrowDown")
    for _ in range(key):
        page.keyboard.press("ArrowRight")


def cell_colours(page: Page, rows: int, columns: int) -> npt.NDArray[Any]:
    """``(rows, columns, 3)``, near the corners of the cells, where no crosshair runs."""
    picture = np.asarray(Image.open(io.BytesIO(page.locator("#map").screenshot())).convert("RGB"))
    cell = (picture.shape[0] - MARGIN_TOP - 2) / rows
    y = (MARGIN_TOP + (np.arange(rows) + 0.75) * cell).astype(int)
    x = (MARGIN_LEFT + (np.arange(columns) + 0.75) * cell).astype(int)
    return picture[y[:, None], x].astype(int)


def backgrounds(page: Page, selector: str = "#tokens .token") -> list[str]:
    found: list[str] = page.locator(selector).evaluate_all(
        "tokens => tokens.map(token => token.style.backgroundColor)"
    )
    return found


def darkness(colour: str) -> int:
    return 765 - sum(map(int, re.findall(r"\d+", colour)))


def bars(page: Page) -> list[dict[str, Any]]:
    """Return the word, the value and the box of each bar, from top to bottom."""
    found: list[dict[str, Any]] = page.locator("#bars li").evaluate_all(
        """rows => rows.map(row => {
            const bar = row.querySelector("i").getBoundingClientRect();
            const track = row.querySelector(".track").getBoundingClientRect();
            return { word: row.querySelector("bdi").textContent,
                value: row.querySelector(".value").textContent, sink: row.className === "sink-row",
                start: (bar.left - track.left) / track.width, width: bar.width / track.width };
        })"""
    )
    return found
