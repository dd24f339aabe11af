"""The page on small and large screens, in both themes, by touch, and for assistive technology."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captum_cw import Explanation
from support.page import (
    Page,
    Show,
    choose_cell,
    darkness,
    in_both_browsers,
    is_selected,
    token,
)

PHONE = {"width": 390, "has_touch": True, "is_mobile": True}


def inks(page: Page) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the background and text colour of each coloured token."""
    pairs = page.locator("#tokens .token[style]").evaluate_all(
        "tokens => tokens.map(getComputedStyle).map(x => [x.backgroundColor, x.color])"
    )
    return [tuple(tuple(map(int, re.findall(r"\d+", x)[:3])) for x in pair) for pair in pairs]


def contrast(*colours: tuple[int, ...]) -> float:
    """As WCAG defines it."""

    def light(colour: tuple[int, ...]) -> float:
        parts = [x / 255 for x in colour]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(light, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out(show: Show, explanation: Explanation, scheme: str) -> None:
    found = inks(show(explanation, color_scheme=scheme))
    assert len(found) == len(explanation.tokens)
    assert min(contrast(*pair) for pair in found) > 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_keeps_people_out(show: Show, asked: Explanation, width: int, scheme: str) -> None:
    """Axe finds nothing serious, at opening, with a selection, with sinks ignored."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    page = show(asked, width=width, color_scheme=scheme)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())

    def findings() -> list[str]:
        found = page.evaluate("axe.run().then(({ violations }) => violations)")
        return [x["id"] for x in found if x["impact"] in ("serious", "critical")]

    assert findings() == []
    page.evaluate("document.getElementById('controls-box').open = true")
    page.check("#sinks")
    token(page, 5).click()
    assert findings() == []
    choose_cell(page, 8, 2)
    assert findings() == []


def test_a_finger_chooses_and_lets_go(show: Show, asked: Explanation) -> None:
    page = show(asked, **PHONE)
    token(page, 3).tap()
    assert "(3)" in page.locator("#details h2").inner_text()
    assert "Tap it again" in page.inner_text("#text-hint")
    token(page, 3).tap()
    assert not is_selected(page, 3)
    assert page.locator("#tokens .query").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_finger_chooses_a_cell(show: Show, asked: Explanation) -> None:
    page = show(asked, **PHONE)
    box = page.locator("#map").bounding_box()
    page.locator("#map").tap(position={"x": 84 + 3, "y": box["height"] - 6})
    assert page.inner_text("#details h2").startswith("Query “j” (9), key “a” (0)")


@in_both_browsers
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_each_option_can_be_chosen(
    show: Show, of_words: Explanation, width: int, theme: str
) -> None:
    """Each works by keyboard and by name, raises no error, and keeps the page narrow enough."""
    page = show(of_words, width=width)
    page.select_option("#theme", theme)
    for name in ("method", "layer", "head", "unit", "numbers", "scale"):
        options = page.locator(f"#{name} option:enabled").evaluate_all("xs => xs.map(x => x.value)")
        assert len(options) > 1, name
        for value in options:
            page.select_option(f"#{name}", value)
            page.wait_for_function(
                "([name, value]) => document.getElementById(name).value === value",
                arg=[name, value],
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, value)
        page.focus(f"#{name}")
        page.keyboard.press("ArrowUp")
        assert page.input_value(f"#{name}") == options[-2]
        page.keyboard.press("ArrowDown")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (darkness(colour) > 382) == (theme == "dark")
    label = page.locator("#method option:checked").inner_text()
    shown = page.inner_text("#controls-summary")
    assert shown.startswith(f"Options (now: {label}, by token, layer 1")


@pytest.mark.parametrize("width", [390, 1280])
def test_options_are_closed_at_first(show: Show, asked: Explanation, width: int) -> None:
    page = show(asked, width=width, options_open=False)
    assert not page.locator("#method").is_visible()
    page.click("#controls-summary")
    assert page.locator("#method").is_visible()


def test_the_prediction_follows_the_end_of_its_text(show: Show, asked: Explanation) -> None:
    page = show(asked)
    assert page.inner_text("#prompt") == "a b c d e f g h i j c not the model's choice"
    assert page.inner_text("#prompt b") == "c"
    page = show(replace(asked, settings={**asked.settings, "target position": 3}))
    assert not page.locator("#prompt").is_visible()


def test_words_that_occur_again_are_told_apart(show: Show) -> None:
    scores = {"m": torch.tensor([1.0, 4.0, 3.0, 2.0])}
    page = show(Explanation(["a", " The", " b", " the"], scores))
    names = page.locator("#bars li:not(.sink-row) button").all_inner_texts()
    assert [" ".join(name.split()) for name in names] == ["The 1st", "b", "the 2nd"]


@in_both_browsers
@pytest.mark.parametrize("width", [390, 1280])
def test_a_word_is_coloured_in_one_piece(show: Show, width: int) -> None:
    """The space before a word that begins a line would be a box at the end of the last one."""
    words = [f" word{n}" for n in range(120)]
    page = show(Explanation(words, {"m": torch.rand(120)}), width=width)
    pieces = page.locator("#tokens .token").evaluate_all(
        "xs => xs.map(x => x.getClientRects().length)"
    )
    assert pieces == [1] * 120
    lines = page.locator("#tokens .token").evaluate_all("xs => xs.map(x => x.offsetTop)")
    assert len(set(lines)) > 3


def test_the_text_is_as_high_as_it_needs(show: Show, asked: Explanation) -> None:
    short = show(asked).locator("#tokens").bounding_box()["height"]
    words = [f" word{n}" for n in range(150)]
    long = show(Explanation(words, {"m": torch.rand(150)})).locator("#tokens")
    assert short < 60
    assert long.bounding_box()["height"] > 3 * short
    assert long.evaluate("x => x.scrollHeight <= x.clientHeight + 1")


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_bars_are_not_cut(show: Show, asked: Explanation, width: int) -> None:
    page = show(asked, width=width)
    cut = page.locator("#bars button").evaluate_all(
        "xs => xs.filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.textContent)"
    )
    assert cut == []


def test_no_name_of_a_word_runs_into_the_next_one_on_a_phone(show: Show) -> None:
    words = [" The", *[" France", " is"] * 3]
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.02, 0.01])
    every = dict.fromkeys(("target", "attention", "contribution"), scores)
    page = show(Explanation(words, every, settings={"target": "!"}), **PHONE)
    assert page.inner_text("#compare-attention p").startswith("“The” 33%, 1st “France” 27%")
    boxes = page.eval_on_selector_all(
        "#bars li button bdi, #bars li button small",
        """all => all.map((x) =>
            [x.closest("li"), x].map((y) => y.getBoundingClientRect().toJSON()))""",
    )
    assert len(boxes) > len(words)
    for row, name in boxes:
        assert row["top"] - 1 <= name["top"]
        assert name["bottom"] <= row["bottom"] + 1
