"""The interactive page, in a real browser: what is shown against the tensors that it shows."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from captum_cw import ContributionWeights, Explanation, LLMTokenAttribution, explain
from captum_cw.explanation import HeadMaps
from captum_cw.visualization import explanation_page
from captum_cw.visualization.page import LEVELS, MAP_LEVELS, POWER, SIGNED_LEVELS, _coded

TEXT = "a b c d e f g h"
HOSTILE = [
    "<script>window.struck = 1</script>",
    "</script><script>window.struck = 2</script>",
    "<img src=x onerror='window.struck = 3'>",
    "&lt;b&gt;",
    "<!--",
    '" onfocus="window.struck = 4',
    "שלום",
    "👩‍👩‍👧",
    "x" * 400,
]

Show = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium: install it, or name it in the variable CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Show]:
    """Opens a page; at the end nothing may have gone wrong in it or been asked of a network."""
    complaints: list[str] = []
    contexts = []

    def opened(content: Explanation | str, **options: Any) -> Any:
        file = tmp_path / "page.html"
        page_text = content if isinstance(content, str) else content.page()
        file.write_text(page_text, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        own = (file.as_uri(), "data:", "about:")
        page.on("request", lambda r: None if r.url.startswith(own) else complaints.append(r.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#legend span", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def explained(tiny_model: Any, tiny_tokenizer: Any) -> Explanation:
    return explain(tiny_model, tiny_tokenizer, TEXT)


def token(page: Any, place: int, box: str = "tokens") -> Any:
    return page.locator(f"#{box} .token").nth(place)


def background(locator: Any) -> tuple[int, ...]:
    css = locator.evaluate("x => getComputedStyle(x).backgroundColor")
    return tuple(int(x) for x in re.findall(r"\d+", css)[:3])


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace("%", ""))


def figures(page: Any, heading: str) -> list[tuple[str, float]]:
    """The rows below a heading of the panel."""
    found = page.locator("#details").evaluate(
        """(box, heading) => {
            const titles = [...box.querySelectorAll("h2, h3")];
            const title = titles.find((x) => x.textContent === heading);
            const list = title.nextElementSibling;
            return [...list.querySelectorAll("dt")].map((x) => [
                x.textContent, x.nextElementSibling.textContent]);
        }""",
        heading,
    )
    return [(name, number(value)) for name, value in found]


def largest(x: Tensor, count: int = 5) -> list[int]:
    order = sorted(range(len(x)), key=lambda i: (-abs(float(x[i])), i))
    return [i for i in order if x[i] != 0][:count]


def places(rows: list[tuple[str, float]]) -> list[int]:
    return [int(name.split()[0]) for name, _ in rows]


def close(rows: list[tuple[str, float]], x: Tensor, rel: float = 0.006) -> None:
    assert [value for _, value in rows] == pytest.approx(x.tolist(), rel=rel, abs=1e-9)


def test_tokens_are_coloured_by_their_scores(show: Show, explained: Explanation) -> None:
    page = show(explained)
    assert page.locator("#tokens .token").all_text_contents() == list(explained.tokens)
    colours = [sum(background(token(page, i))) for i in range(len(explained.tokens))]
    by_score = [colours[i] for i in explained.scores["contribution"].argsort(descending=True)]
    assert by_score == sorted(by_score)  # the most is darkest
    assert by_score[0] < by_score[-1] - 100


@pytest.mark.parametrize("name", ["contribution", "attention", "vw", "vwon", "signed"])
def test_a_chosen_token_shows_what_it_drew_and_what_it_fed(
    show: Show, explained: Explanation, name: str
) -> None:
    page = show(explained)
    page.select_option("#method", index=list(explained.maps).index(name))
    token(page, 4).click()
    x = explained.maps[name]
    drew, fed = figures(page, "Drew most from"), figures(page, "Fed most")
    assert places(drew) == largest(x[4])
    assert places(fed) == largest(x[:, 4])
    close(drew, x[4][places(drew)])
    close(fed, x[:, 4][places(fed)])
    scores = figures(page, "Score over all layers and heads")
    close(scores, torch.stack([explained.scores[n][4] for n in explained.maps]))
    assert f"“{explained.predicted[4]}”" in page.locator("#details").inner_text()  # type: ignore[index]


def test_pointing_is_choosing_for_a_moment(show: Show, explained: Explanation) -> None:
    page = show(explained)
    token(page, 2).click()
    token(page, 5).hover()
    assert "(5)" in page.locator("#details h2").inner_text()
    page.mouse.move(5, 5)
    assert "(2)" in page.locator("#details h2").inner_text()
    token(page, 2).click()  # again: lets go
    page.mouse.move(5, 5)
    assert page.locator("#details h2").inner_text() == "Nothing chosen"


def cell_of(page: Any, query: int, key: int) -> None:
    """Goes there with the arrow keys."""
    page.locator("#map").focus()
    page.keyboard.press("ArrowDown")
    for pressed, count in (("ArrowDown", query), ("ArrowRight", key)):
        for _ in range(count):
            page.keyboard.press(pressed)


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3)])
def test_a_cell_of_a_head_shows_its_factors(
    show: Show, explained: Explanation, layer: int, head: int
) -> None:
    page = show(explained)
    page.select_option("#layer", value=str(layer))
    page.select_option("#head", value=str(head))
    cell_of(page, 6, 3)
    maps = explained.heads[layer]
    place = maps.keys[head, 6].tolist().index(3)
    a, norm, cosine = (
        float(x[head, 6, place]) for x in (maps.attention, maps.relative_norm, maps.cosine)
    )
    shown = [number(x) for x in page.locator("#details dl").first.evaluate(
        "x => [...x.children].map((t) => t.textContent)"
    )[1::2]]  # fmt: skip
    c = a * norm * cosine
    vwon = a * norm
    expected = [a, norm, cosine, c, vwon * float(maps.output_norm[6]), vwon]
    # Two digits, of eight bits.
    largest_of_row = float((maps.measure("contribution")[head, 6]).max())
    assert shown == pytest.approx(expected, rel=0.07, abs=0.013 * max(largest_of_row, 1e-9))


def test_a_cell_of_all_heads_shows_every_measure(show: Show, explained: Explanation) -> None:
    page = show(explained)
    cell_of(page, 5, 2)
    values = page.locator("#details dl").first.locator("dd").all_text_contents()
    assert [number(x) for x in values] == pytest.approx(
        [float(x[5, 2]) for x in explained.maps.values()], rel=0.006
    )
    page.keyboard.press("Escape")
    assert page.locator("#details h2").inner_text() == "Nothing chosen"


def test_the_map_is_as_dark_as_the_numbers(show: Show, explained: Explanation) -> None:
    page = show(explained)
    page.select_option("#scale", value="map")
    x = explained.maps["contribution"]
    drawn = page.locator("#map").evaluate(
        """(canvas, count) => {
            // The cells are the squares right of the labels, all of one size.
            const box = canvas.getBoundingClientRect();
            const cell = (box.height - 2 - 92) / count;
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const rows = [];
            for (let r = 0; r < count; r++) for (let c = 0; c < count; c++) {
                const [i, j] = [112 + (c + 0.5) * cell, 92 + (r + 0.5) * cell].map(Math.round);
                const at = 4 * (j * canvas.width + i);
                rows.push(pixels.data[at] + pixels.data[at + 1] + pixels.data[at + 2]);
            }
            return rows;
        }""",
        len(x),
    )
    dark = torch.tensor(drawn).view_as(x)
    order = x.flatten().argsort(descending=True)
    assert (dark.flatten()[order].diff() >= 0).all()
    assert dark.flatten()[order[0]] < dark.flatten()[order[-1]] - 200


def test_without_the_sink_others_are_darker(show: Show, explained: Explanation) -> None:
    scores = explained.scores["contribution"]
    assert scores.argmax() != 0 or len(scores) > 1
    sink = int(scores.argmax())
    page = show(explained.page(sinks=[sink]))
    before = [sum(background(token(page, i))) for i in range(len(scores))]
    page.locator("#sinks").check()
    after = [sum(background(token(page, i))) for i in range(len(scores))]
    second = int(scores.argsort(descending=True)[1])
    assert after[second] < before[second]
    assert "line-through" in token(page, sink).evaluate(
        "x => getComputedStyle(x).textDecorationLine"
    )
    assert page.locator("#sink-names").inner_text().startswith(f"the sink {sink} ")


def test_keys_go_everywhere(show: Show, explained: Explanation) -> None:
    page = show(explained)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
    for control in ("theme", "method", "layer", "scale", "sinks", "token", "map"):
        assert any(control in x for x in reached), control
    token(page, 0).focus()
    for pressed, place in (("ArrowRight", 1), ("End", 7), ("ArrowLeft", 6), ("Home", 0)):
        page.keyboard.press(pressed)
        assert page.evaluate("Number(document.activeElement.dataset.place)") == place
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert token(page, 1).get_attribute("aria-selected") == "true"
    assert explained.tokens[1].strip() in page.locator("#status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(show: Show, explained: Explanation, scheme: str) -> None:
    page = show(explained, color_scheme=scheme)
    paper = "x => getComputedStyle(x).backgroundColor"
    bright = sum(int(x) for x in re.findall(r"\d+", page.locator("body").evaluate(paper))[:3])
    assert (bright > 600) == (scheme == "light")
    other = {"light": "dark", "dark": "light"}[scheme]
    page.select_option("#theme", label=other)
    changed = sum(int(x) for x in re.findall(r"\d+", page.locator("body").evaluate(paper))[:3])
    assert (changed > 600) == (other == "light")
    for place in range(len(explained.tokens)):
        ink = token(page, place).evaluate("x => getComputedStyle(x).color")
        colours = [
            tuple(int(x) for x in re.findall(r"\d+", ink)[:3]),
            background(token(page, place)),
        ]
        assert contrast(*colours) > 4.5


def contrast(*colours: tuple[int, ...]) -> float:
    """As WCAG defines it."""

    def light(colour: tuple[int, ...]) -> float:
        parts = [x / 255 for x in colour]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(light, colours))
    return (high + 0.05) / (low + 0.05)


def test_text_that_is_html_is_shown_as_text(show: Show) -> None:
    S = len(HOSTILE)
    scores = {"<b>ig</b></script>": torch.arange(S) + 1.0}
    given = Explanation(HOSTILE, scores, predicted=HOSTILE, settings={"model": HOSTILE[1]})
    page = show(given, viewport={"width": 400, "height": 800})
    assert page.locator("#tokens .token").all_text_contents() == HOSTILE
    for place in range(3):
        token(page, place).click()
    assert page.evaluate("window.struck") is None
    assert page.locator("#tokens img, #details img, #details script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 400  # long tokens break


def test_scores_of_any_methods_without_maps(show: Show) -> None:
    scores = {"ig": torch.tensor([0.5, -2.0, 0.1]), "random": torch.tensor([3.0, 0.0, 1.0])}
    page = show(Explanation(["a", " b", " c"], scores))
    assert not page.locator("#map").is_visible()
    assert page.locator("#method option").all_text_contents() == ["ig", "random"]
    token(page, 1).click()
    assert dict(figures(page, "Score")) == {"ig": -2.0, "random": 0.0}


def test_an_output_draws_from_a_prompt(show: Show, tiny_model: Any, tiny_tokenizer: Any) -> None:
    llm = LLMTokenAttribution(ContributionWeights(tiny_model), tiny_tokenizer)
    result = llm.attribute("a b c d", target="e f")
    page = show(Explanation.from_llm(result, "contribution"))
    assert page.locator("#queries .token").count() == 2
    token(page, 1, "queries").click()
    drew = figures(page, "Drew most from")
    assert places(drew) == largest(result.token_attr[1])
    close(drew, result.token_attr[1][places(drew)])


def test_a_model_that_looks_both_ways(show: Show, tiny_tokenizer: Any) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    explained = explain(model, tiny_tokenizer, "a b c d e")
    page = show(explained)
    token(page, 1).click()
    assert places(figures(page, "Drew most from")) == largest(explained.maps["contribution"][1])


def test_a_notebook_shows_it_in_a_frame(show: Show, explained: Explanation) -> None:
    frame = explained._repr_html_()
    host = f'<!DOCTYPE html><body>{frame}<div id="legend"><span></span></div>'
    page = show(host)
    inside = page.frame_locator("iframe")
    inside.locator("#tokens .token").nth(3).click()
    assert "(3)" in inside.locator("#details h2").inner_text()


def test_the_page_is_for_phones_too(show: Show, explained: Explanation) -> None:
    page = show(explained, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    token(page, 3).tap()
    assert "(3)" in page.locator("#details h2").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def large(T: int = 512, L: int = 30, H: int = 9, K: int = 32) -> Explanation:
    """Random numbers of the size of a real model's."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    visible = torch.ones(T, T).tril()
    maps = {name: rand(T, T) * visible for name in ("attention", "vw", "vwon", "contribution")}
    maps["signed"] = (rand(T, T) - 0.5) * visible
    heads = []
    for layer in range(L):
        order = rand(H, T, T).masked_fill(visible == 0, -1).topk(K).indices.sort(-1).values
        seen = order <= torch.arange(T)[:, None]
        a = torch.randn(H, T, K, generator=generator).mul(2).exp() * seen  # as uneven as a real one
        heads.append(
            HeadMaps(
                f"model.layers.{layer}.self_attn", order.int(), a / a.sum(-1, keepdim=True),
                rand(H, T, K), 2 * rand(H, T, K) - 1, rand(T), rand(H, T),
            )
        )  # fmt: skip
    scores = {name: x.abs().mean(0) for name, x in maps.items()}
    return Explanation([f" t{i}" for i in range(T)], scores, maps, heads)


def test_a_long_text_fits_and_can_be_used(show: Show) -> None:
    given = large()
    content = given.page()
    assert len(content) < 25e6
    page = show(content)
    assert page.locator("#tokens .token").count() == 512
    page.select_option("#layer", value="29")
    page.select_option("#head", value="8")
    token(page, 400).click()
    drew = figures(page, "Drew most from")
    head = given.heads[29]
    full = torch.zeros(512)
    full[head.keys[8, 400].long()] = head.measure("contribution")[8, 400]
    assert set(places(drew)) <= set(largest(full, 7))  # two may change places by rounding
    shown = torch.tensor([x for _, x in drew])
    assert torch.allclose(shown, full[places(drew)], rtol=0.06)


def test_what_eight_bits_lose() -> None:
    x = torch.randn(200, 32).double().exp() * torch.randn(200, 32).sign()
    largest_of_row = x.abs().amax(-1, keepdim=True)
    for levels, type_, limit, of_small in (
        (LEVELS, "u1", 0.006, 0.027),
        (SIGNED_LEVELS, "i1", 0.012, 0.055),
    ):
        given = x.abs() if levels == LEVELS else x
        _, coded = _coded(given, levels)
        n = torch.from_numpy(coded.view(type_).astype("f8"))
        back = n.sign() * (n.abs() / levels) ** POWER * largest_of_row
        error = (back - given).abs()
        assert (error / largest_of_row).max() < limit
        big = given.abs() > largest_of_row / 100
        assert (error / given.abs())[big].max() < of_small
    assert MAP_LEVELS == 2**15 - 1


def test_the_same_explanation_gives_the_same_bytes(explained: Explanation) -> None:
    assert explained.page() == explained.page()
    assert not re.search(r"https?:|@import|url\(", explained.page())


@pytest.mark.parametrize(
    ("given", "sinks", "message"),
    [
        (Explanation(["a"], {}), (), "nothing to show"),
        (Explanation(["a"], {"ig": torch.tensor([float("nan")])}), (), r"scores\['ig'\] holds nan"),
        (Explanation(["a"], {"ig": torch.ones(1)}), (3,), "sinks holds 3, outside the 1 tokens"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    given: Explanation, sinks: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explanation_page(given, sinks=sinks)


def test_heads_that_were_not_kept_cannot_be_chosen(
    show: Show, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    page = show(explain(tiny_model, tiny_tokenizer, TEXT, keys=0))
    assert page.locator("#layer option").count() == 1
    assert page.locator("#head").is_disabled()
