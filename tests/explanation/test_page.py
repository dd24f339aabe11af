"""The text, the map and the details of the page, in a real browser, by mouse and by keyboard."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from captum_cw import Explanation, explain
from captum_cw.explanation.heads import OF_HEADS, HeadMaps
from support.colours import difference
from support.page import (
    ABOUT,
    LABELS,
    MINUS,
    Page,
    Show,
    backgrounds,
    cell_colours,
    choose_cell,
    darkness,
    figures,
    in_both_browsers,
    is_selected,
    number,
    percent,
    places,
    rounded,
    token,
)


@in_both_browsers
def test_scores_colour_the_text(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    # The first token is a sink, which is grey.
    dark = torch.tensor([float(darkness(colour)) for colour in backgrounds(page)[1:]])
    assert dark.argsort().tolist() == of_layers.scores["contribution"][1:].argsort().tolist()
    page.select_option("#method", label=LABELS["attention"])
    page.locator("#about", has_text=ABOUT["attention"]).wait_for()
    dark = torch.tensor([float(darkness(colour)) for colour in backgrounds(page)[1:]])
    assert dark.argsort().tolist() == of_layers.scores["attention"][1:].argsort().tolist()


@in_both_browsers
def test_hovering_shows_what_a_token_drew_from_and_fed(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers, link="numbers=raw")
    assert "Select a word" in page.inner_text("#details")
    token(page, 6).hover()
    grid = of_layers.maps["contribution"]
    drew = figures(page, "Draws most from")
    best = grid[6].topk(5)
    assert list(drew.values()) == [rounded(x) for x in best.values]
    assert places(drew) == best.indices.tolist()
    fed = figures(page, "What draws most from it")
    assert list(fed.values()) == [rounded(x) for x in grid[:, 6].sort(descending=True).values if x]
    dark = [darkness(colour) for colour in backgrounds(page)]
    assert max(range(10), key=dark.__getitem__) == int(grid[6].argmax())
    lines = page.locator("#tokens .token").evaluate_all("xs => xs.map(x => !!x.style.boxShadow)")
    assert lines == (grid[:, 6] > 0).tolist()
    page.mouse.move(5, 5)
    assert "Select a word" in page.inner_text("#details")


@in_both_browsers
def test_a_selection_stays_until_it_is_cleared(show: Show, explanation: Explanation) -> None:
    page = show(explanation, link="numbers=raw")
    token(page, 6).click()
    page.mouse.move(5, 5)
    assert is_selected(page, 6)
    scores = {LABELS[name]: rounded(x[6]) for name, x in explanation.scores.items()}
    assert figures(page, "Score") == scores
    assert f"“{explanation.predicted[6].strip()}”" in page.inner_text("#details")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Escape")
    assert not is_selected(page, 6)
    assert "Select a word" in page.inner_text("#details")


def test_a_cell_shows_every_measure(show: Show, explanation: Explanation) -> None:
    page = show(explanation, link="numbers=raw")
    for query, key in ((0, 0), (5, 2), (9, 9), (2, 5)):
        choose_cell(page, query, key)
        shown = figures(page)
        for name, x in explanation.maps.items():
            # Half a digit of three, and half a step of 16 bits.
            error = 0.005 * abs(x[query, key]) + x[query].abs().max() / 65534
            assert abs(shown[LABELS[name]] - x[query, key]) <= error, name


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
    pages = explanation.page(), explanation.page().replace("<head>", guarded, 1)
    found = [backgrounds(show(page)) for page in pages]
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
    given = replace(explanation, maps={"attention": grid}, heads=())
    page = show(given, link="measure=attention&numbers=raw")
    token(page, 9).click()
    draws = "how much “j” (9) draws from it, 0 to "
    assert f"{draws}{rounded(grid[9].max()):g}" in page.inner_text("#legend")
    page.check("#sinks")
    assert f"{draws}{rounded(grid[9, 1:].max()):g}" in page.inner_text("#legend")
    assert "sink" in token(page, 0).get_attribute("class").split()
    assert backgrounds(page)[0] == ""
    assert 0 not in places(figures(page, "Draws most from"))
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colour_blind_readers_tell_the_three_meanings_apart(
    show: Show, explanation: Explanation, scheme: str
) -> None:
    page = show(explanation, color_scheme=scheme)
    page.select_option("#method", label=LABELS["contribution-signed"])
    token(page, 5).hover()
    page.locator("#legend", has_text="line below a word").wait_for()
    ramps = page.locator("#legend i").evaluate_all(
        "bars => bars.map((bar) => getComputedStyle(bar).backgroundImage)"
    )
    strongest = [re.findall(r"rgb\((\d+), (\d+), (\d+)\)", ramp)[-1] for ramp in ramps]
    towards, against, read_by = ([int(part) for part in rgb] for rgb in strongest)
    assert difference(towards, against) > 60
    assert difference(towards, read_by) > 15
    assert difference(against, read_by) > 15


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


def focused(page: Page) -> str:
    """Return the id of the control, the list, the bar or the strip that has the focus."""
    found: str = page.evaluate(
        "document.activeElement.id || document.activeElement.closest('[id]').id"
    )
    return found


@in_both_browsers
def test_all_is_reached_by_keyboard(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        if not reached or reached[-1] != focused(page):
            reached.append(focused(page))
    # The choice of heads waits for a layer.
    expected = [
        *("copy", "export", "theme", "controls-summary", "method", "layer", "unit", "numbers"),
        *("scale", "sinks", "bars", "compare-attention", "compare-contribution", "tokens"),
        *("map", "heads"),
    ]
    assert reached[: len(expected)] == expected


@in_both_browsers
def test_tokens_by_keyboard(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    page.locator("#tokens .token").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert token(page, 2).evaluate("x => x === document.activeElement")
    assert page.inner_text("#status").startswith(f"“{explanation.tokens[2].strip()}” (2).")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert is_selected(page, 9)
    outline = token(page, 9).evaluate("x => getComputedStyle(x).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert not is_selected(page, 9)


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
    page = show(of_layers, link="numbers=raw")
    choose_cell(page, 4, 1)
    expected = rounded(of_layers.maps["contribution"][4, 1])
    tokens = [x.strip() for x in of_layers.tokens]
    assert page.inner_text("#status") == (
        f"Query “{tokens[4]}” (4), key “{tokens[1]}” (1): contribution, size {expected:g}."
    )


def test_what_is_announced_is_of_what_is_shown(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers, link="numbers=raw")
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


@pytest.mark.parametrize("width", [390, 1280])
def test_tokens_are_text_and_fit(show: Show, width: int) -> None:
    n = len(HOSTILE)
    settings = {"model": "<i>m</i>", "target": HOSTILE[1], "contrast": "y" * 300}
    settings |= {"target value": "1", "other predictions": HOSTILE[1]}
    settings["model's prediction"] = HOSTILE[0]
    maps = {name: torch.rand(n, n) for name in ("<b>bold</b>", "attention", "contribution")}
    page = show(
        Explanation(
            HOSTILE,
            {"<b>bold</b>": torch.rand(n), "target": torch.randn(n)},
            maps,
            predicted=HOSTILE,
            probability=torch.rand(n),
            settings=settings,
        ),
        width=width,
    )
    shown = page.locator("#tokens .token").evaluate_all("xs => xs.map(x => x.textContent)")
    expected = [x if x != "\ud800" else "�" for x in HOSTILE]
    written = [re.sub("[\ud800-\udfff]", "�", x) for x in shown]
    assert [x.strip() for x in written] == [
        x.strip() or "∅" if x != "\u2028" else "" for x in expected
    ]
    token(page, 1).click()
    page.select_option("#method", label="<b>bold</b>")
    page.locator("#map").wait_for()
    token(page, 2).click()
    if width > 1000:
        choose_cell(page, 0, 1)
    assert page.evaluate("window.hacked") is None
    page.locator("#compare-at", has_text="At").wait_for()
    strips = page.locator(".strip").evaluate_all("xs => xs.map(x => x.textContent)")
    assert all(HOSTILE[1] in text for text in strips)
    assert page.locator("main b, main img, #settings i, #title img, #intro img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@in_both_browsers
def test_scores_alone(show: Show) -> None:
    scores = {"integrated gradients": torch.tensor([0.5, -1.0, 0.25]), "random": torch.rand(3)}
    page = show(Explanation(("a", " b", " c"), scores), link="numbers=raw")
    assert page.inner_text("#title") == "Token scores"
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
    page = show(replace(of_layers, scores=scores), link="numbers=raw")
    page.select_option("#layer", "1")
    page.locator("#head:enabled").wait_for()
    page.select_option("#method", label="gradients")
    page.wait_for_selector("#map-part", state="hidden")
    token(page, 2).hover()
    assert figures(page)["gradients"] == rounded(scores["gradients"][2])


@in_both_browsers
def test_output_tokens_draw_from_input_tokens(show: Show) -> None:
    """As in an ``LLMAttributionResult``, or cross-attention."""
    inputs, outputs = ("The", " capital", " of"), (" Paris", ".")
    grid = torch.tensor([[0.1, 0.7, 0.2], [0.5, -0.3, 0.4]])
    page = show(Explanation(inputs, {"m": grid.mean(0)}, {"m": grid}, queries=outputs))
    assert page.locator("#queries .token").all_inner_texts() == ["Paris", "."]
    token(page, 1, "queries").click()
    assert list(figures(page, "Draws most from").values()) == pytest.approx([0.5, 0.4, -0.3])
    token(page, 1).click()
    assert figures(page) == {"m": pytest.approx(-0.3, rel=1e-3)}
    token(page, 1, "queries").click()
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur()")
    drew = figures(page, "What draws most from it")
    assert list(drew.values()) == pytest.approx([0.7, -0.3])


def test_no_kept_keys_show_no_heads(show: Show, tiny_model, tiny_tokenizer) -> None:
    page = show(explain(tiny_model, tiny_tokenizer, "a b c d", top_k=0))
    assert page.locator("#layer option").count() == 1
    assert not page.locator("#heads-part").is_visible()


def test_a_notebook_shows_it_in_a_frame(show: Show, explanation: Explanation) -> None:
    page = show(f"<!DOCTYPE html><body>{explanation._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    frame.locator("main:not([aria-busy])").wait_for()
    assert frame.locator("#tokens .token").count() == 10
    assert frame.locator("#map").bounding_box()["width"] > 300
    assert not frame.locator("#copy").is_visible()  # a frame has no address
    frame.locator("#tokens .token").nth(3).click()
    frame.locator("#details h2", has_text="(3)").wait_for()


def test_a_frame_is_as_high_as_its_page(show: Show, explanation: Explanation) -> None:
    one = Explanation(["a"], {"m": torch.ones(1)})
    for given, lowest, highest in ((explanation, 900, 1600), (one, 200, 799)):
        page = show(f"<!DOCTYPE html><body>{given._repr_html_()}</body>")
        frame = page.frame_locator("iframe")
        frame.locator("main:not([aria-busy])").wait_for()
        page.wait_for_function("() => document.querySelector('iframe').offsetHeight !== 800")
        height = page.locator("iframe").bounding_box()["height"]
        assert lowest < height <= highest
        own = frame.locator("body").evaluate("body => body.offsetHeight")
        assert height >= min(own, 1600)


def test_a_frame_follows_its_notebook_to_another_theme(
    show: Show, explanation: Explanation
) -> None:
    page = show(f'<!DOCTYPE html><body style="color-scheme: light">{explanation._repr_html_()}')
    frame = page.frame_locator("iframe")
    frame.locator("html[data-theme=light]").wait_for()
    page.evaluate("() => { document.body.style.colorScheme = 'dark'; }")
    frame.locator("html[data-theme=dark]").wait_for()


def test_a_frame_follows_a_class_and_a_late_style_sheet(
    show: Show, explanation: Explanation
) -> None:
    """As in VS Code, which sets a class, and in notebooks that load the style of a theme."""
    style = "<style>.dark { background: #222; color: #ccc } .light { color: #333 }</style>"
    page = show(f'<!DOCTYPE html>{style}<body class="dark">{explanation._repr_html_()}')
    frame = page.frame_locator("iframe")
    frame.locator("html[data-theme=dark]").wait_for()
    page.evaluate("() => { document.body.className = 'light'; }")
    frame.locator("html[data-theme=light]").wait_for()
    page.evaluate(
        """() => {
            document.body.className = "";
            setTimeout(() => document.head.insertAdjacentHTML(
                "beforeend", "<style>body { color: white }</style>"), 100);
        }"""
    )
    frame.locator("html[data-theme=dark]").wait_for()


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
def large_page() -> str:
    """Show 512 tokens, 30 layers of 9 heads, from random numbers, which compress worst."""
    T, H, K = 512, 9, 32
    draw = torch.Generator().manual_seed(0)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    attention = torch.randn(H, T, T, generator=draw).mul(3).masked_fill(~seen, -torch.inf)
    kept = attention.softmax(-1).topk(K)
    norm = torch.rand(H, T, K, generator=draw) + 0.5
    cosine = torch.rand(H, T, K, generator=draw) * 2 - 1
    keys = kept.indices.int()
    layer = HeadMaps("layer", keys, kept.values, norm, cosine, torch.ones(T), cosine.sum(-1))
    maps = {name: torch.rand(T, T, generator=draw) * seen for name in OF_HEADS}
    scores = {name: x.mean(0) for name, x in maps.items()}
    return Explanation([f" token{n}" for n in range(T)], scores, maps, [layer] * 30).page()


def test_a_large_page_stays_small_and_follows_the_selection(show: Show, large_page: str) -> None:
    assert len(large_page) < 25e6
    page = show(large_page)
    assert page.locator("#overview").is_visible()
    before = page.locator("#map").screenshot()
    token(page, 400).evaluate("x => x.click()")
    assert page.locator("#map").screenshot() != before
    box = page.locator("#overview").bounding_box()
    page.mouse.click(box["x"] + 1.5, box["y"] + box["height"] - 1.5)
    query, key = map(int, re.findall(r"\((\d+)\)", page.inner_text("#status")))
    assert query > 505
    assert key < 6
    page.select_option("#layer", value="29")
    page.locator("#head:enabled").wait_for()


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
    token(page, 1).click()
    drew = places(figures(page, "Draws most from"))
    assert drew == explained.maps["contribution"][1].argsort(descending=True).tolist()


@pytest.mark.parametrize("queries", [None, ["x", "y", "z"]])
def test_a_text_of_one_token(show: Show, queries: list[str] | None) -> None:
    T = 1 if queries is None else 3
    given = Explanation(["a"], {"m": torch.ones(1)}, {"m": torch.ones(T, 1)}, queries=queries)
    page = show(given)
    token(page, 0).click()
    assert len(figures(page, "What draws most from it")) == T
    assert page.locator("#bars li").count() == 1


@pytest.mark.parametrize("name", ["target", "input"])
def test_tokens_against_a_target_have_the_other_hue(
    show: Show, asked: Explanation, name: str
) -> None:
    scores = asked.scores[name]
    page = show(asked, link="numbers=raw")
    page.select_option("#method", label=LABELS[name])
    page.locator("#about", has_text=ABOUT[name]).wait_for()
    reds, _, blues = zip(*(map(int, re.findall(r"\d+", x)) for x in backgrounds(page)), strict=True)
    sure = scores.abs() > 0.05 * scores.abs().max()
    against = torch.tensor(reds) > torch.tensor(blues)
    assert (scores < 0)[sure].any()
    assert torch.equal(against[sure], (scores < 0)[sure])
    legend = page.inner_text("#legend")
    assert f"towards “c”: score, 0 to {rounded(scores.abs().max()):g}" in legend
    assert "towards “x”: the same scale" in legend


def test_the_legend_names_the_other_side_only_if_something_is_on_it(show: Show) -> None:
    for scores, said in ((torch.tensor([1.0, 2.0]), False), (torch.tensor([1.0, -2.0]), True)):
        page = show(Explanation(["Ice", " is"], {"target": scores}))
        page.locator("#legend", has_text="score").wait_for()
        assert ("the same scale" in page.inner_text("#legend")) == said


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
    most = grid.abs().max() / asked.scores["target"].abs().sum()
    shown = re.search(r"draws from it, 0 to (\S+) of all contributions", page.inner_text("#legend"))
    assert number(shown[1]) == percent(most)
    page.select_option("#method", label=LABELS["attention"])
    assert page.input_value("#scale") == "row"


def test_a_long_text_opens_where_the_prediction_is_made(show: Show) -> None:
    T = 300
    settings = {"target": " not", "target value": "1", "target position": T - 1}
    given = Explanation(
        [f" token{n}" for n in range(T)],
        {"target": torch.linspace(-1, 1, T)},
        {"target": torch.ones(T, T).tril()},
        predicted=["x"] * T,
        settings=settings,
    )
    page = show(given)
    assert page.inner_text("#answer") == "The logit of “not” is 1."
    box, last = page.locator("#tokens").bounding_box(), token(page, T - 1).bounding_box()
    assert box["y"] < last["y"] < box["y"] + box["height"]
    page.locator("#map").focus()
    page.keyboard.press("ArrowDown")
    query, key = map(int, re.findall(r"\((\d+)\)", page.inner_text("#status")))
    assert query > T - 30
    assert key > T - 40


def test_a_saved_explanation_has_the_same_page(asked: Explanation, tmp_path: Path) -> None:
    asked.save(tmp_path / "a.safetensors")
    assert Explanation.load(tmp_path / "a.safetensors").page() == asked.page()
    assert MINUS not in asked.page().split('id="data">')[1].split("</script>")[0]
