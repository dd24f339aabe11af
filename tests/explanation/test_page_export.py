"""What readers take away from the page: links, pictures, tables."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from captum_cw import Explanation
from support.page import (
    LABELS,
    Page,
    Show,
    backgrounds,
    bars,
    choose_cell,
    figures,
    is_selected,
    token,
)

SVG = "{http://www.w3.org/2000/svg}"


def exported(page: Page, what: str) -> bytes:
    if page.context.browser.browser_type.name == "firefox":
        pytest.skip("the driver of Firefox does not report downloads")
    with page.expect_download() as waiting:
        page.select_option("#export", what)
    return Path(waiting.value.path()).read_bytes()


def state_of(page: Page) -> dict[str, Any]:
    """Return what a reader sees of the state."""
    return {
        **{name: page.input_value(f"#{name}") for name in ("method", "layer", "head", "unit")},
        **{name: page.input_value(f"#{name}") for name in ("numbers", "scale")},
        "sinks": page.is_checked("#sinks"),
        "details": page.inner_text("#details"),
        "colours": backgrounds(page),
    }


def test_a_link_leads_to_the_same_state(show: Show, asked: Explanation) -> None:
    page = show(asked, permissions=["clipboard-read", "clipboard-write"])
    page.select_option("#unit", "token")
    page.select_option("#numbers", "raw")
    page.select_option("#method", label=LABELS["contribution-signed"])
    page.select_option("#layer", "1")
    page.locator("#head:enabled").wait_for()
    page.select_option("#head", "2")
    page.select_option("#scale", "map")
    page.check("#sinks")
    choose_cell(page, 8, 3)
    page.click("#copy")
    page.locator("#said", has_text="copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()").split("#")[1]
    other = show(asked, link=link)
    assert state_of(other) == state_of(page)
    assert other.input_value("#layer") == "1"


def test_a_link_without_a_clipboard(show: Show, asked: Explanation) -> None:
    page = show(asked)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
    token(page, 4).click()
    page.click("#copy")
    page.locator("#said", has_text="address of this page").wait_for()
    assert page.url.endswith("#query=4&key=4")
    # Another link in the same window is followed too.
    page.evaluate("() => { location.hash = 'query=2&key=2'; }")
    page.locator("#tokens [aria-selected=true][data-place='2']").wait_for()


def test_a_link_of_another_scale(show: Show, asked: Explanation) -> None:
    """The usual scale depends on the measure."""
    page = show(asked)
    page.select_option("#method", label=LABELS["attention"])
    page.select_option("#scale", "map")
    page.wait_for_function("() => location.hash.includes('scale')")
    other = show(asked, link=page.url.split("#")[1])
    assert other.input_value("#scale") == "map"


@pytest.mark.parametrize(
    "link",
    [
        "measure=none&unit=x&numbers=x&layer=length&head=-1&scale=x&sinks=x&query=99&key=-1&cell=true",
        "layer=map&head=1.5&query=1e1&key=constructor&cell=true",
        "layer=0&head=-1&%%%&=&query=",
    ],
)
def test_a_link_with_nonsense_is_harmless(show: Show, of_layers: Explanation, link: str) -> None:
    page = show(of_layers, link=link)
    assert page.input_value("#head") == ""
    assert page.locator("#tokens [aria-selected=true]").count() == 0
    assert page.locator("#bars li").count() > 3
    token(page, 3).click()
    assert figures(page)


def test_scores_as_csv(show: Show, of_words: Explanation) -> None:
    tokens = list(of_words.by_word().tokens)
    tokens[3], tokens[4] = ' a "b", c', "\n"
    words = replace(of_words.by_word(), tokens=tokens)
    page = show(words)
    rows = list(csv.DictReader(io.StringIO(exported(page, "scores").decode(), newline="")))
    assert [row["token"] for row in rows] == tokens
    for name, scores in words.scores.items():
        shown = torch.tensor([float(row[name]) for row in rows])
        assert torch.allclose(shown, scores, rtol=1e-5, atol=0), name
    page = show(of_words)
    rows = list(csv.DictReader(io.StringIO(exported(page, "scores").decode(), newline="")))
    shown = torch.tensor([float(row["target"]) for row in rows])
    assert torch.allclose(shown, words.scores["target"], rtol=1e-5)


def test_a_map_as_csv(show: Show, of_words: Explanation) -> None:
    page = show(of_words)
    rows = list(csv.reader(io.StringIO(exported(page, "map").decode(), newline="")))
    words = of_words.by_word()
    assert rows[0] == ["place", "query", *words.tokens]
    shown = torch.tensor([[float(x) for x in row[2:]] for row in rows[1:]])
    grid = words.maps["target"]
    assert torch.allclose(shown, grid, atol=float(grid.abs().max()) / 30000)
    page.select_option("#method", label=LABELS["input"])  # has no map
    page.wait_for_selector("#map-part", state="hidden")
    assert page.locator("#export-map").is_disabled()


def test_the_answer_as_svg(show: Show, of_words: Explanation) -> None:
    tokens = list(of_words.tokens)
    tokens[0] = " 👍<&\ud800\x01" + "x" * 300
    given = replace(of_words, tokens=tokens)
    page = show(given)
    picture = ElementTree.fromstring(exported(page, "svg").decode())
    texts = [x.text for x in picture.iter(f"{SVG}text")]
    assert texts[0] == "Why “c”, and not “x”?"
    said = " ".join(texts[1:])
    assert page.inner_text("#answer") in said
    shown = bars(page)
    assert [x["value"] for x in shown] == [x for x in texts if re.fullmatch(r"\S+%", x)]
    rectangles = list(picture.iter(f"{SVG}rect"))[1:]
    lengths = np.array([float(x.get("width")) for x in rectangles])
    assert np.allclose(lengths / lengths.max(), [2 * x["width"] for x in shown], atol=0.01)
    fills = {x.get("fill") for x in rectangles}
    assert len(fills) == 3  # two signs, and the sink
    assert "👍<&��x" in texts[texts.index(shown[0]["value"]) - 1]
    widths = page.evaluate(
        """svg => { document.body.insertAdjacentHTML("beforeend", svg);
            return [...document.body.lastChild.querySelectorAll("text")].map(x => {
                const box = x.getBBox(); return [box.x, box.x + box.width]; }); }""",
        ElementTree.tostring(picture, encoding="unicode").replace("ns0:", "").replace(":ns0", ""),
    )
    assert min(start for start, _ in widths) >= 0
    assert max(end for _, end in widths) <= float(picture.get("width"))


def test_a_picture_of_another_measure_has_no_sentence(show: Show, asked: Explanation) -> None:
    page = show(asked)
    sentence = page.inner_text("#sentence")[:20]
    assert sentence in exported(page, "svg").decode()
    page.select_option("#method", label=LABELS["attention"])
    page.locator("#controls-summary", has_text=LABELS["attention"]).wait_for()
    picture = exported(page, "svg").decode()
    assert sentence not in picture
    assert f"Scores: {LABELS['attention']}." in picture


def test_the_answer_as_png(show: Show, asked: Explanation) -> None:
    for scheme in ("light", "dark"):
        page = show(replace(asked, tokens=["👍", *asked.tokens[1:]]), color_scheme=scheme)
        picture = Image.open(io.BytesIO(exported(page, "png"))).convert("RGB")
        assert picture.width == 1440
        assert len(picture.getcolors(1 << 24)) > 10
        assert (sum(picture.getpixel((2, 2))) > 382) == (scheme == "light")


def test_files_that_there_are_not_cannot_be_chosen(show: Show, of_layers: Explanation) -> None:
    page = show(replace(of_layers, scores={}, heads=()))
    disabled = page.locator("#export option:disabled").evaluate_all("xs => xs.map(x => x.value)")
    assert disabled == ["svg", "png", "scores"]


@pytest.fixture(scope="module")
def long_page() -> str:
    """Show 2,000 tokens, whose maps are left out."""
    T = 2000
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(T, generator=draw) for name in ("target", "input")}
    scores |= {name: torch.rand(T, generator=draw) for name in ("attention", "contribution")}
    settings = {"target": " x", "target value": "1", "target position": T - 1}
    tokens = [f" token{n}" for n in range(T)]
    maps = {"attention": torch.rand(T, T, generator=draw)}
    return Explanation(tokens, scores, maps, settings=settings).page()


@pytest.mark.parametrize("width", [390, 1280])
def test_a_long_text_shows_scores_alone(show: Show, long_page: str, width: int) -> None:
    assert len(long_page) < 3e6
    page = show(long_page, width=width)
    assert "2,000 tokens" in page.inner_text("#note")
    assert "The strip is the whole text" in page.inner_text("#text-hint")
    assert "1,989 more tokens" in page.inner_text("#bars-note")
    assert not page.locator("#map-part").is_visible()
    minimap = page.locator("#minimap")
    box = minimap.bounding_box()  # twenty rows of a hundred tokens
    minimap.click(position={"x": 0.375 * box["width"], "y": 7.5 * box["height"] / 20})
    assert is_selected(page, 737)
    inside, outside = token(page, 737).bounding_box(), page.locator("#tokens").bounding_box()
    assert outside["y"] <= inside["y"] <= outside["y"] + outside["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
