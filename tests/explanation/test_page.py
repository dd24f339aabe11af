"""The interactive page shows what it is given, in a real browser, by mouse and by keyboard."""

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from captum_cw import ContributionWeights, Explanation, explain, measures
from captum_cw.explanation.heads import OF_HEADS, HeadMaps

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = playwright.Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the path, and CHROMIUM does not name one"
)

TEXT = "a b c d e f g h i j"
# The room for the labels of the map, in pixels.
MARGIN_TOP, MARGIN_LEFT = 92, 112
ENTRIES = measures.entries(controls=True, targets=True)
LABELS = {entry.name: entry.label for entry in ENTRIES}
ABOUT = {entry.name: entry.about for entry in ENTRIES}
SIGNED = LABELS["contribution-signed"]
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
Show = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path: Path) -> Iterator[Show]:
    """Open a page, and fail if it requests another file or reports an error."""
    contexts, troubles = [], []

    def opened(given: Explanation | str, width: int = 1400, **options: object) -> Page:
        path = tmp_path / f"{len(contexts)}.html"
        text = given if isinstance(given, str) else given.page()
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith("data:")
                or request.url == path.as_uri()
                or troubles.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        if page.locator("#text-hint").count():
            page.locator("#text-hint:not(:empty)").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def explanation(tiny_model, tiny_tokenizer) -> Explanation:
    return explain(tiny_model, tiny_tokenizer, TEXT, top_k=4)


@pytest.fixture
def of_layers(explanation: Explanation) -> Explanation:
    """The measures of layers alone, of which the page shows the contribution first."""
    scores = {name: x for name, x in explanation.scores.items() if name in OF_HEADS}
    maps = {name: x for name, x in explanation.maps.items() if name in OF_HEADS}
    return replace(explanation, scores=scores, maps=maps, settings={})


def figures(page: Page, heading: str | None = None) -> dict[str, float]:
    """Return the numbers of the details: of all lists, or of the one below a heading."""
    lists = page.locator("#details dl")
    if heading:
        lists = page.locator(f"#details h3:has-text('{heading}') + dl")
    lists.first.wait_for()  # those of a cell wait for all maps
    # All at once, since the mouse or a map that is unpacked can replace them.
    names, values = lists.evaluate_all(
        """lists => ["dt", "dd"].map(
            tag => lists.flatMap(list => [...list.querySelectorAll(tag)].map(x => x.innerText)))"""
    )
    read = [float(value.replace(MINUS, "-")) for value in values]
    return dict(zip(names, read, strict=True))


def token(page: Page, place: int, box: str = "tokens"):
    return page.locator(f"#{box} .token").nth(place)


def choose_cell(page: Page, query: int, key: int) -> None:
    """Select a cell with the keyboard, on a map of at most ten rows."""
    page.locator("#map").focus()
    page.keyboard.press("PageUp")
    page.keyboard.press("PageUp")
    page.keyboard.press("Home")
    for _ in range(query):
        page.keyboard.press("ArrowDown")
    for _ in range(key):
        page.keyboard.press("ArrowRight")


def cell_colours(page: Page, rows: int, columns: int) -> np.ndarray:
    """``(rows, columns, 3)``, near the corners of the cells, where no crosshair runs."""
    picture = np.asarray(Image.open(io.BytesIO(page.locator("#map").screenshot())).convert("RGB"))
    cell = (picture.shape[0] - MARGIN_TOP - 2) / rows
    y = (MARGIN_TOP + (np.arange(rows) + 0.75) * cell).astype(int)
    x = (MARGIN_LEFT + (np.arange(columns) + 0.75) * cell).astype(int)
    return picture[y[:, None], x].astype(int)


def backgrounds(page: Page, box: str = "tokens") -> list[str]:
    return page.locator(f"#{box} .token").evaluate_all(
        "tokens => tokens.map(token => token.style.backgroundColor)"
    )


def darkness(colour: str) -> int:
    return 765 - sum(map(int, re.findall(r"\d+", colour)))


def rounded(x: Tensor | float, digits: int = 3) -> float:
    return float(f"{float(x):.{digits}g}")


def test_scores_colour_the_text(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    page.wait_for_selector("#tokens .token[style]")
    dark = torch.tensor([float(darkness(colour)) for colour in backgrounds(page)])
    assert dark.argsort().tolist() == of_layers.scores["contribution"].argsort().tolist()
    page.select_option("#method", label=LABELS["attention"])
    page.locator("#about", has_text=ABOUT["attention"]).wait_for()
    dark = torch.tensor([float(darkness(colour)) for colour in backgrounds(page)])
    assert dark.argsort().tolist() == of_layers.scores["attention"].argsort().tolist()


def test_hovering_shows_what_a_token_drew_from_and_fed(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    assert "Nothing selected" in page.inner_text("#details")
    token(page, 6).hover()
    grid = of_layers.maps["contribution"]
    drew = figures(page, "Top keys")
    best = grid[6].topk(5)
    assert list(drew.values()) == [rounded(x) for x in best.values]
    assert [int(name.split()[0]) for name in drew] == best.indices.tolist()
    assert list(figures(page, "Top queries").values()) == [
        rounded(x) for x in grid[:, 6].sort(descending=True).values if x
    ]
    dark = [darkness(colour) for colour in backgrounds(page)]
    assert max(range(10), key=dark.__getitem__) == int(grid[6].argmax())
    lines = page.locator("#tokens .token").evaluate_all("xs => xs.map(x => !!x.style.boxShadow)")
    assert lines == (grid[:, 6] > 0).tolist()
    page.mouse.move(5, 5)
    assert "Nothing selected" in page.inner_text("#details")


def test_a_selection_stays_until_it_is_cleared(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    token(page, 6).click()
    page.mouse.move(5, 5)
    assert token(page, 6).get_attribute("aria-selected") == "true"
    scores = {LABELS[name]: rounded(x[6]) for name, x in explanation.scores.items()}
    assert figures(page, "Score") == scores
    assert f"“{explanation.predicted[6]}”" in page.inner_text("#details")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Escape")
    assert "Strongest tokens" in page.inner_text("#details")


def test_a_cell_shows_every_measure(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    for query, key in ((0, 0), (5, 2), (9, 9), (2, 5)):
        choose_cell(page, query, key)
        shown = figures(page)
        for name, x in explanation.maps.items():
            # Half a digit of three, and half a step of 16 bits.
            error = 0.005 * abs(x[query, key]) + x[query].abs().max() / 65534
            assert abs(shown[LABELS[name]] - x[query, key]) <= error, name


def test_a_cell_of_a_head_shows_its_factors(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    token(page, 8).click()
    page.select_option("#layer", "1")
    page.select_option("#head", "2")
    assert page.locator("#head option").count() == 4
    layer = of_layers.heads[1]
    share = float(layer.share[2, 8])
    assert f"2: {rounded(100 * share, 2):g}".replace("-", MINUS) in page.inner_text("#head")
    for query, key in ((8, int(layer.keys[2, 8, 0])), (8, int(layer.keys[2, 8, 3]))):
        choose_cell(page, query, key)
        at = layer.keys[2, query].tolist().index(key)
        shown = figures(page)
        for name, x in {
            "attention": layer.attention,
            f"{TIMES} relative norm": layer.relative_norm,
            f"= {SIGNED}": layer.measure("contribution-signed"),
        }.items():
            row = x[2, query]
            # Half a step of the code, and half a digit of two.
            largest, value = float(row.abs().max()), float(row[at])
            error = 0.012 * largest + 0.05 * abs(value)
            assert shown[name] == pytest.approx(value, abs=error), name
        for name, measure in ((LABELS["vw"], "vw"), (LABELS["vwon"], "vwon")):
            row = layer.measure(measure)[2, query]
            error = 0.02 * float(row.max()) + 0.05 * float(row[at])
            assert shown[name] == pytest.approx(float(row[at]), abs=error), name
        factors = [shown[name] for name in list(shown)[:3]]
        assert np.prod(factors) == pytest.approx(shown[f"= {SIGNED}"], rel=0.15)


def test_keys_that_were_not_kept_are_named_as_such(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    page.select_option("#layer", "0")
    page.locator("#head:enabled").wait_for()
    layer = of_layers.heads[0]
    missing = sorted(set(range(10)) - set(layer.keys[0, 9].tolist()))[0]
    choose_cell(page, 9, missing)
    assert "not among the 4 keys that are kept" in page.inner_text("#details")
    held = 100 * float(layer.attention[0, 9].sum())
    assert f"they have {rounded(held, 2):g}% of the attention" in page.inner_text("#details")
    sums = [
        rounded(x) for x in (layer.measure("contribution-signed")[0, 9].sum(), layer.share[0, 9])
    ]
    found = re.search(
        r"sum to (\S+), and those of all keys to (\S+)\.", page.inner_text("#details")
    )
    assert [float(x.replace(MINUS, "-")) for x in found.groups()] == pytest.approx(sums, rel=1e-3)


def test_the_map_is_coloured_as_the_tensor(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    page.select_option("#scale", "map")
    grid = of_layers.maps["contribution"]
    dark = 765 - cell_colours(page, 10, 10).sum(-1)
    ranks = [np.argsort(np.argsort(x.flatten())) for x in (dark, grid.numpy())]
    assert np.corrcoef(*ranks)[0, 1] > 0.99
    page.select_option("#scale", "row")
    dark = 765 - cell_colours(page, 10, 10).sum(-1)
    assert dark.argmax(-1).tolist() == grid.argmax(-1).tolist()
    assert len(set(dark.max(-1))) == 1


def test_colours_need_no_reading_of_a_canvas(show: Show, explanation: Explanation) -> None:
    """Browsers that guard against fingerprints give noise there."""
    guarded = """<head><script>
        for (const of of [CanvasRenderingContext2D, OffscreenCanvasRenderingContext2D])
            of.prototype.getImageData = () => ({ data: new Uint8ClampedArray(1024).fill(99) });
        </script>"""
    found = []
    for given in (explanation.page(), explanation.page().replace("<head>", guarded, 1)):
        page = show(given)
        page.wait_for_selector("#tokens .token[style]")
        found.append(backgrounds(page))
    assert found[0] == found[1]


def test_signs_are_blue_and_orange(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    page.select_option("#method", label=LABELS["contribution-signed"])
    page.locator("#legend", has_text="negative").wait_for()
    grid = explanation.maps["contribution-signed"]
    sure = (grid.abs() > 0.1 * grid.abs().amax(-1, keepdim=True)).numpy()
    colours = cell_colours(page, 10, 10)
    bluer = colours[..., 2] > colours[..., 0]
    assert (grid < 0).numpy()[sure].any()
    assert (bluer == (grid > 0).numpy())[sure].all()


def test_the_colour_scale_can_ignore_sinks(show: Show, explanation: Explanation) -> None:
    grid = explanation.maps["attention"].clone()
    grid[:, 0] += 10
    page = show(replace(explanation, maps={"attention": grid}, heads=()))
    token(page, 9).click()
    assert f"draws from a token: 0 to {rounded(grid[9].max()):g}" in page.inner_text("#legend")
    page.check("#sinks")
    assert f"draws from a token: 0 to {rounded(grid[9, 1:].max()):g}" in page.inner_text("#legend")
    assert "sink" in token(page, 0).get_attribute("class").split()
    assert backgrounds(page)[0] == ""
    assert not any(name.startswith("0 ") for name in figures(page, "Top keys"))
    page.uncheck("#sinks")
    assert "sink" not in token(page, 0).get_attribute("class").split()


def test_sinks_of_choice(show: Show, explanation: Explanation) -> None:
    page = show(explanation.page(sinks=[0, 3]))
    page.check("#sinks")
    struck = page.locator("#tokens .sink").evaluate_all("xs => xs.map(x => x.dataset.place)")
    assert struck == ["0", "3"]
    assert not show(explanation.page(sinks=[])).locator("#sink-label").is_visible()


def test_a_group_that_holds_the_sink_is_not_offered_as_one(
    show: Show, explanation: Explanation
) -> None:
    words = explanation.by_word()
    assert show(words.page()).locator("#sink-label").is_visible()
    spans = explanation.by_span([(0, 3), (3, len(explanation.tokens))])
    assert not show(spans.page()).locator("#sink-label").is_visible()
    assert not show(explanation.by_span([(0, 2)]).page()).locator("#sink-label").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_follow_the_system_and_the_switch(
    show: Show, explanation: Explanation, scheme: str
) -> None:
    page = show(explanation, color_scheme=scheme)

    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return darkness(colour) > 382

    assert is_dark() == (scheme == "dark")
    before = cell_colours(page, 10, 10)
    other = "light" if scheme == "dark" else "dark"
    page.select_option("#theme", other)
    assert is_dark() == (other == "dark")
    assert (cell_colours(page, 10, 10) != before).any()
    page.select_option("#theme", "")
    assert (cell_colours(page, 10, 10) == before).all()
    page.emulate_media(color_scheme=other)
    assert is_dark() == (other == "dark")


def test_all_is_reached_by_keyboard(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.closest('[role=listbox]')?.id"
            )
        )
    # The choice of heads waits for a layer.
    assert reached[:7] == ["theme", "method", "layer", "scale", "sinks", "tokens", "map"]


def test_tokens_by_keyboard(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    page.locator("#tokens .token").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert token(page, 2).evaluate("x => x === document.activeElement")
    assert page.inner_text("#status").startswith(f"2 “{explanation.tokens[2]}”.")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert token(page, 9).get_attribute("aria-selected") == "true"
    outline = token(page, 9).evaluate("x => getComputedStyle(x).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert token(page, 9).get_attribute("aria-selected") == "false"


def test_the_next_token_of_hebrew_is_on_the_left(show: Show) -> None:
    page = show(Explanation((" שלום", " עולם"), {"m": torch.ones(2)}))
    token(page, 0).focus()
    page.keyboard.press("ArrowLeft")
    assert token(page, 1).evaluate("x => x === document.activeElement")


def test_lines_by_keyboard(show: Show) -> None:
    words = tuple(f" word{n}" for n in range(200))
    page = show(Explanation(words, {"m": torch.rand(200)}), width=400)
    page.locator("#tokens .token").first.focus()
    top = "x => x.getClientRects()[0].top"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    place = int(page.evaluate("document.activeElement.dataset.place"))
    assert 4 < place < 20
    assert token(page, place).evaluate(top) > token(page, 0).evaluate(top)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    place = int(page.evaluate("document.activeElement.dataset.place"))
    assert token(page, place).evaluate(top) == token(page, 0).evaluate(top)


def test_cells_are_spoken(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    choose_cell(page, 4, 1)
    expected = rounded(of_layers.maps["contribution"][4, 1])
    assert page.inner_text("#status") == (
        f"Query 4 “{of_layers.tokens[4]}”, key 1 “{of_layers.tokens[1]}”: "
        f"contribution, size {expected:g}."
    )


HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--",
    "{{ 7 * 7 }}",
    " שלום",
    " مرحبا",
    "👩‍👩‍👧‍👦",
    "\ud800",
    "\u2028",
    "",
    "x" * 3000,
    "quote\"'&amp;",
)


@pytest.mark.parametrize("width", [400, 1400])
def test_tokens_are_text_and_fit(show: Show, width: int) -> None:
    n = len(HOSTILE)
    names = {"<b>bold</b>": torch.rand(n)}
    page = show(
        Explanation(
            HOSTILE,
            names,
            {"<b>bold</b>": torch.rand(n, n)},
            predicted=HOSTILE,
            probability=torch.rand(n),
            settings={"model": "<i>m</i>"},
        ),
        width=width,
    )
    shown = page.locator("#tokens .token").evaluate_all("xs => xs.map(x => x.textContent)")
    expected = [x if x != "\ud800" else "�" for x in HOSTILE]
    assert [re.sub("[\ud800-\udfff]", "�", x) for x in shown] == [x or "∅" for x in expected]
    token(page, 1).click()
    choose_cell(page, 0, 1)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#details b, #tokens img, #settings i").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_scores_alone(show: Show) -> None:
    scores = {"integrated gradients": torch.tensor([0.5, -1.0, 0.25]), "random": torch.rand(3)}
    page = show(Explanation(("a", " b", " c"), scores))
    assert not page.locator("#map-part").is_visible()
    assert not page.locator("#layer").is_visible()
    token(page, 1).hover()
    assert figures(page) == {name: rounded(x[1]) for name, x in scores.items()}
    red, _, blue = map(int, re.findall(r"\d+", backgrounds(page)[1]))
    assert red > blue
    assert "negative" in page.inner_text("#legend")
    page.select_option("#method", label="random")
    assert "negative" not in page.inner_text("#legend")


def test_scores_beside_maps_of_other_methods(show: Show, of_layers: Explanation) -> None:
    scores = {**of_layers.scores, "gradients": torch.rand(10)}
    page = show(replace(of_layers, scores=scores))
    page.select_option("#layer", "1")
    page.locator("#head:enabled").wait_for()
    page.select_option("#method", label="gradients")
    page.wait_for_selector("#map-part", state="hidden")
    token(page, 2).hover()
    assert figures(page)["gradients"] == rounded(scores["gradients"][2])


def test_heads_without_maps(show: Show, explanation: Explanation) -> None:
    page = show(replace(explanation, scores={}, maps={}))
    page.wait_for_selector("#map-part", state="visible")
    assert page.input_value("#layer") == "0"
    token(page, 5).hover()
    layer = explanation.heads[0]
    most = float(layer.measure("contribution")[0, 5].max())
    assert max(figures(page, "Top keys").values()) == pytest.approx(most, rel=0.03)


def test_output_tokens_draw_from_input_tokens(show: Show) -> None:
    """As in an ``LLMAttributionResult``, or cross-attention."""
    inputs, outputs = ("The", " capital", " of"), (" Paris", ".")
    grid = torch.tensor([[0.1, 0.7, 0.2], [0.5, -0.3, 0.4]])
    page = show(Explanation(inputs, {"m": grid.mean(0)}, {"m": grid}, queries=outputs))
    assert page.locator("#queries .token").all_inner_texts() == [" Paris", "."]
    token(page, 1, "queries").click()
    assert list(figures(page, "Top keys").values()) == pytest.approx([0.5, 0.4, -0.3])
    token(page, 1).click()
    assert figures(page) == {"m": pytest.approx(-0.3, rel=1e-3)}
    token(page, 1, "queries").click()
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur()")
    assert list(figures(page, "Top queries").values()) == pytest.approx([0.7, -0.3])


def test_no_kept_keys_show_no_heads(show: Show, tiny_model, tiny_tokenizer) -> None:
    page = show(explain(tiny_model, tiny_tokenizer, TEXT, top_k=0))
    assert page.locator("#layer option").count() == 1


def test_a_notebook_shows_it_in_a_frame(show: Show, explanation: Explanation) -> None:
    page = show(f"<!DOCTYPE html><body>{explanation._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    frame.locator("#tokens .token[style]").first.wait_for()
    assert frame.locator("#tokens .token").count() == 10
    assert frame.locator("#map").bounding_box()["width"] > 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_frame_has_the_theme_of_its_notebook(
    show: Show, explanation: Explanation, scheme: str
) -> None:
    other = "light" if scheme == "dark" else "dark"
    host = f'<!DOCTYPE html><body style="color-scheme: {scheme}">{explanation._repr_html_()}'
    page = show(host, color_scheme=other)
    frame = page.frame_locator("iframe")
    frame.locator(f"html[data-theme={scheme}]").wait_for()
    frame.locator("#theme").select_option(other)
    frame.locator(f"html[data-theme={other}]").wait_for()


@pytest.fixture(scope="module")
def long_explanation() -> Explanation:
    """512 tokens, 30 layers of 9 heads, from random numbers, which compress worst."""
    T, H, K = 512, 9, 32
    draw = torch.Generator().manual_seed(0)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    attention = torch.randn(H, T, T, generator=draw).mul(3).masked_fill(~seen, -torch.inf)
    kept = attention.softmax(-1).topk(K)
    norm = torch.rand(H, T, K, generator=draw) + 0.5
    cosine = torch.rand(H, T, K, generator=draw) * 2 - 1
    layer = HeadMaps(
        "layer", kept.indices.int(), kept.values, norm, cosine, torch.ones(T), cosine.sum(-1)
    )
    maps = {name: torch.rand(T, T, generator=draw) * seen for name in OF_HEADS}
    scores = {name: x.mean(0) for name, x in maps.items()}
    return Explanation([f" token{n}" for n in range(T)], scores, maps, [layer] * 30)


@pytest.fixture(scope="module")
def long_page(long_explanation: Explanation) -> str:
    return long_explanation.page()


def test_a_long_text_stays_small_and_can_be_looked_into(
    show: Show, long_explanation: Explanation, long_page: str
) -> None:
    assert len(long_page) < 25e6
    page = show(long_page)
    page.wait_for_selector("#tokens .token[style]")
    page.select_option("#layer", value="29")
    page.select_option("#head", value="8")
    token(page, 400).evaluate("x => x.click()")
    layer = long_explanation.heads[29]
    row = torch.zeros(512)
    row[layer.keys[8, 400].long()] = layer.measure("contribution")[8, 400]
    drew = {int(name.split()[0]): x for name, x in figures(page, "Top keys").items()}
    assert set(drew) <= set(row.topk(7).indices.tolist())  # near ones may change places
    for place, x in drew.items():
        assert x == pytest.approx(float(row[place]), rel=0.06)


def test_the_window_follows_the_chosen_token(show: Show, long_page: str) -> None:
    page = show(long_page)
    page.wait_for_selector("#tokens .token[style]")
    assert page.locator("#overview").is_visible()
    before = page.locator("#map").screenshot()
    token(page, 400).evaluate("x => x.click()")
    assert page.locator("#map").screenshot() != before
    box = page.locator("#overview").bounding_box()
    page.mouse.click(box["x"] + 1.5, box["y"] + box["height"] - 1.5)
    query, key = map(int, re.findall(r"(\d+) “", page.inner_text("#status")))
    assert query > 505
    assert key < 6


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
    page = show(explanation, color_scheme=scheme)
    page.wait_for_selector("#tokens .token[style]")
    found = inks(page)
    assert len(found) == len(explanation.tokens)
    assert min(contrast(*pair) for pair in found) > 4.5


def test_a_finger_chooses_on_a_phone(show: Show, explanation: Explanation) -> None:
    page = show(explanation, width=390, has_touch=True, is_mobile=True)
    token(page, 3).tap()
    assert "(3)" in page.locator("#details h2").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_model_that_looks_both_ways(show: Show, tiny_tokenizer) -> None:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    explained = explain(model, tiny_tokenizer, "a b c d e")
    page = show(explained)
    page.wait_for_selector("#tokens .token[style]")
    token(page, 1).click()
    drew = [int(name.split()[0]) for name in figures(page, "Top keys")]
    assert drew == explained.maps["contribution"][1].argsort(descending=True).tolist()


@pytest.mark.parametrize("queries", [None, ["x", "y", "z"]])
def test_a_text_of_one_token(show: Show, queries: list[str] | None) -> None:
    T = 1 if queries is None else 3
    given = Explanation(["a"], {"m": torch.ones(1)}, {"m": torch.ones(T, 1)}, queries=queries)
    page = show(given)
    token(page, 0).click()
    assert "Top queries" in page.locator("#details").inner_text()


def test_attention_that_is_nearly_nothing_is_still_seen(show: Show) -> None:
    keys = torch.tensor([[[0, 0], [0, 1]]], dtype=torch.int32)
    attention = torch.tensor([[[1.0, 0.0], [1.0, 1e-9]]])
    ones = torch.ones(1, 2, 2)
    layer = HeadMaps("l", keys, attention, ones, ones, torch.ones(2), torch.ones(1, 2))
    page = show(Explanation(["a", "b"], {}, heads=[layer]))
    choose_cell(page, 1, 1)
    assert "does not see" not in page.locator("#details").inner_text()


def test_value_weighted_attention_has_no_sign(show: Show) -> None:
    keys = torch.tensor([[[0, 0], [0, 1]]], dtype=torch.int32)
    attention = torch.tensor([[[1.0, 0.0], [0.5, -0.5]]])
    ones = torch.ones(1, 2, 2)
    layer = HeadMaps("l", keys, attention, ones, ones, torch.ones(2), torch.ones(1, 2))
    page = show(Explanation(["a", "b"], {}, heads=[layer]))
    choose_cell(page, 1, 1)
    found = figures(page)
    assert found["attention"] == pytest.approx(-0.5, rel=0.02)
    assert found[LABELS["vwon"]] == pytest.approx(0.5, rel=0.02)


def test_what_is_announced_is_of_what_is_shown(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    choose_cell(page, 4, 2)
    # At once, before the other map is unpacked.
    said = page.evaluate(
        """() => {
            const select = document.getElementById("method");
            select.value = 0;
            select.dispatchEvent(new Event("change"));
            document.getElementById("map").dispatchEvent(
                new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
            return document.getElementById("status").textContent;
        }"""
    )
    shown = float(re.search(r"([\d.]+)\.$", said)[1])
    name = "contribution" if LABELS["contribution"] in said else "attention"
    assert shown == pytest.approx(float(of_layers.maps[name][4, 3]), rel=0.006)


def test_dense_maps_offer_no_vw_of_heads(show: Show, tiny_model, tiny_tokenizer) -> None:
    ids = tiny_tokenizer(TEXT, return_tensors="pt").input_ids
    layers = ContributionWeights(tiny_model).decompose(ids)
    page = show(Explanation.from_maps(TEXT.split(), layers))
    assert LABELS["vw"] not in page.locator("#method option").all_text_contents()


@pytest.fixture
def asked(tiny_model, tiny_tokenizer) -> Explanation:
    """Why this, and not that? Tokens 2 and 7 work against it."""
    found = explain(tiny_model, tiny_tokenizer, TEXT, top_k=4, target=" c", contrast=" x")
    scores = found.scores["target"].abs()
    scores[[2, 7]] = -scores[[2, 7]]
    grid = scores.expand(10, 10).tril() / torch.arange(10, 0, -1)
    maps = {**found.maps, "target": grid}
    return replace(found, scores={**found.scores, "target": grid.sum(0)}, maps=maps)


def test_a_target_is_asked_for_and_explained_first(show: Show, asked: Explanation) -> None:
    page = show(asked)
    assert page.inner_text("#title") == "Why “c”, and not “x”?"
    named = [asked.settings[f"{x} probability"] for x in ("target", "contrast")]
    value = asked.settings["target value"].replace("-", MINUS)
    target, contrast = (f"{rounded(float(x), 2):g}" for x in named)
    assert page.inner_text("#answer") == (
        f"“c” has a probability of {target}, and “x” has a probability of {contrast}. "
        f"The difference of their logits is {value}."
    )
    assert page.locator("#method option:checked").inner_text() == LABELS["target"]
    assert page.locator("#method option").nth(1).inner_text() == LABELS["input"]
    assert page.inner_text("#about").startswith(ABOUT["target"])
    assert page.input_value("#scale") == "map"
    page.select_option("#method", label=LABELS["attention"])
    assert page.input_value("#scale") == "row"


def test_the_own_prediction_is_asked_for_too(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    predicted = explanation.predicted[-1].strip()
    probability = f"{rounded(explanation.probability[-1], 2):g}"
    assert page.inner_text("#title") == f"Why “{predicted}”?"
    assert page.inner_text("#answer").startswith(
        f"“{predicted}” has a probability of {probability}. Its logit is "
    )


def test_other_explanations_ask_nothing(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    assert page.inner_text("#title") == "Which tokens each token draws from"
    assert not page.locator("#answer").is_visible()


@pytest.mark.parametrize("name", ["target", "input"])
def test_tokens_against_a_target_have_the_other_hue(
    show: Show, asked: Explanation, name: str
) -> None:
    scores = asked.scores[name]
    page = show(asked)
    page.select_option("#method", label=LABELS[name])
    page.locator("#about", has_text=ABOUT[name]).wait_for()
    reds, _, blues = zip(*(map(int, re.findall(r"\d+", x)) for x in backgrounds(page)), strict=True)
    sure = scores.abs() > 0.05 * scores.abs().max()
    against = torch.tensor(reds) > torch.tensor(blues)
    assert (scores < 0)[sure].any()
    assert torch.equal(against[sure], (scores < 0)[sure])
    legend = page.inner_text("#legend")
    largest = f"{rounded(scores.abs().max()):g}"
    assert f"0 to {largest} (for “c”)" in legend
    assert f"against “c”: 0 to {MINUS}{largest}" in legend


def test_rows_of_a_target_share_one_scale(show: Show, asked: Explanation) -> None:
    page = show(asked)
    grid = asked.maps["target"]
    colours = cell_colours(page, 10, 10)
    sure = (grid.abs() > 0.1 * grid.abs().max()).numpy()
    bluer = colours[..., 2] > colours[..., 0]
    assert (bluer == (grid > 0).numpy())[sure].all()
    dark = 765 - colours.sum(-1)
    assert dark[0].max() < dark.max()  # the first row is nearly nothing
    token(page, 5).hover()
    assert f"draws from a token: 0 to {rounded(grid.abs().max()):g} (for “c”)" in page.inner_text(
        "#legend"
    )


def test_the_strongest_tokens_are_listed_until_one_is_selected(
    show: Show, asked: Explanation
) -> None:
    page = show(asked)
    scores = asked.scores["target"]
    best = scores.topk(5)
    listed = figures(page, "For “c”")
    assert [int(name.split()[0]) for name in listed] == best.indices.tolist()
    assert list(listed.values()) == [rounded(x) for x in best.values]
    against = figures(page, "Against “c”")
    worst = sorted((2, 7), key=scores.__getitem__)
    assert [int(name.split()[0]) for name in against] == worst
    assert list(against.values()) == [rounded(scores[n]) for n in worst]
    page.locator("#details button").nth(5).click()
    assert token(page, worst[0]).get_attribute("aria-selected") == "true"
    shown = figures(page, "Score")
    assert shown[LABELS["target"]] == rounded(scores[worst[0]])
    assert shown[LABELS["target"]] < 0
    assert shown[LABELS["input"]] == rounded(asked.scores["input"][worst[0]])
    page.check("#sinks")
    page.keyboard.press("Escape")
    assert not any(name.startswith("0 ") for name in figures(page, "For “c”"))


def test_a_saved_target_is_shown_by_word(show: Show, asked: Explanation, tmp_path: Path) -> None:
    asked = replace(asked, words=[0, 0, 1, 1, 1, 2, 2, 3, 3, 4])
    asked.save(tmp_path / "a.safetensors")
    loaded = Explanation.load(tmp_path / "a.safetensors")
    assert loaded.page() == asked.page()
    words = loaded.by_word()
    page = show(words)
    assert page.inner_text("#title") == "Why “c”, and not “x”?"
    token(page, 1).click()
    expected = asked.scores["target"][2:5].sum()
    assert figures(page, "Score")[LABELS["target"]] == rounded(expected)
    assert sum(figures(page, "Top queries").values()) == pytest.approx(float(expected), rel=0.01)


def test_a_long_text_opens_where_the_prediction_is_made(show: Show) -> None:
    T = 300
    scores = {"target": torch.linspace(-1, 1, T)}
    settings = {"target": " not", "target value": "1"}
    given = Explanation(
        [f" token{n}" for n in range(T)],
        scores,
        {"target": torch.ones(T, T).tril()},
        predicted=["x"] * T,
        settings=settings,
    )
    page = show(given)
    assert page.inner_text("#title") == "Why “not”?"
    assert page.inner_text("#answer") == "Its logit is 1."
    box, last = page.locator("#tokens").bounding_box(), token(page, T - 1).bounding_box()
    assert box["y"] < last["y"] < box["y"] + box["height"]
    page.locator("#map").focus()
    page.keyboard.press("ArrowDown")
    query, key = map(int, re.findall(r"(\d+) “", page.inner_text("#status")))
    assert query > T - 30
    assert key > T - 40
