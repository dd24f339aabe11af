"""A browser, a way to open a page in it, and explanations to show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_cw import Explanation, explain
from captum_cw.explanation.heads import OF_HEADS
from support.page import Page, Show

TEXT = "a b c d e f g h i j"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FIREFOX = os.environ.get("FIREFOX") or shutil.which("firefox") or shutil.which("firefox-esr")
# The policy of the page forbids eval, by which the driver of Firefox reads the page.
POLICY = "script-src 'unsafe-inline'"
# Why a browser cannot be used, so that each is tried once.
MISSING: dict[str, str] = {}


@pytest.fixture(scope="module")
def browsers() -> Iterator[Callable[[str], Any]]:
    """Launch a browser when a test first needs it, and skip the test if there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    launched: dict[str, Any] = dict(MISSING)

    def launch(driver: Any, name: str) -> Any:
        if name == "chromium":
            if CHROMIUM is None:
                return "no chromium on the path, and CHROMIUM does not name one"
            return driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if FIREFOX is None:
            return "no firefox on the path, and FIREFOX does not name one"
        try:
            browser = driver.firefox.launch(executable_path=FIREFOX, channel="moz-firefox")
            browser.new_context().close()
        except sync_api.Error as error:
            return f"this playwright cannot drive {FIREFOX}: {error.message.splitlines()[0]}"
        return browser

    with ExitStack() as stack:
        driver = stack.enter_context(sync_api.sync_playwright())

        def browser(name: str) -> Any:
            if name not in launched:
                launched[name] = launch(driver, name)
                if not isinstance(launched[name], str):
                    stack.callback(launched[name].close)
            if isinstance(launched[name], str):
                MISSING[name] = launched[name]
                pytest.skip(launched[name])
            return launched[name]

        yield browser


@pytest.fixture
def browser_name() -> str:
    return os.environ.get("PAGE_BROWSER", "chromium")


@pytest.fixture
def show(browsers: Callable[[str], Any], browser_name: str, tmp_path: Path) -> Iterator[Show]:
    """Open a page, and fail if it requests another file or reports an error."""
    browser = browsers(browser_name)
    contexts, troubles = [], []

    def opened(
        given: Explanation | str,
        width: int = 1280,
        link: str = "",
        options_open: bool = True,
        **options: Any,
    ) -> Page:
        path = tmp_path / f"{len(contexts)}.html"
        text = given if isinstance(given, str) else given.page()
        if browser_name == "firefox":
            if options.keys() & {"color_scheme", "has_touch"}:
                pytest.skip("the driver of Firefox sets no colour scheme, and sends no touches")
            text = text.replace(POLICY, f"{POLICY} 'unsafe-eval'")
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        own = ("data:", "blob:", path.as_uri())
        page.on("request", lambda x: x.url.startswith(own) or troubles.append(x.url))
        page.goto(f"{path.as_uri()}{link and f'#{link}'}")
        if page.locator("main").count():
            page.locator("main:not([aria-busy])").wait_for()
            if options_open:
                page.evaluate("document.getElementById('controls-box').open = true")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def explanation(tiny_model, tiny_tokenizer) -> Explanation:
    """Why the model's own prediction?"""
    return explain(tiny_model, tiny_tokenizer, TEXT, top_k=4)


@pytest.fixture
def of_layers(explanation: Explanation) -> Explanation:
    """The measures of layers alone, of which the page shows the contribution first."""
    scores = {name: x for name, x in explanation.scores.items() if name in OF_HEADS}
    maps = {name: x for name, x in explanation.maps.items() if name in OF_HEADS}
    return replace(explanation, scores=scores, maps=maps, settings={})


@pytest.fixture
def asked(tiny_model, tiny_tokenizer) -> Explanation:
    """Why this, and not that? Tokens 2 and 7 work against it."""
    found = explain(tiny_model, tiny_tokenizer, TEXT, top_k=4, target=" c", contrast=" x")
    scores = found.scores["target"].abs()
    scores[[2, 7]] = -scores[[2, 7]]
    grid = scores.expand(10, 10).tril() / torch.arange(10, 0, -1)
    maps = {**found.maps, "target": grid}
    return replace(found, scores={**found.scores, "target": grid.sum(0)}, maps=maps)


@pytest.fixture
def of_words(tiny_model, tiny_tokenizer) -> Explanation:
    """Sixteen tokens that make thirteen words; the third word works against the target."""
    letters = "a b c d e f g h i j k l m n o p"
    found = explain(tiny_model, tiny_tokenizer, letters, top_k=4, target=" c", contrast=" x")
    words = [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, None, 10, 10, 11]
    scores = found.scores["target"].abs()
    scores[3:5] *= -1
    grid = scores.expand(16, 16).tril() / torch.arange(16, 0, -1)
    maps = {**found.maps, "target": grid}
    return replace(found, words=words, scores={**found.scores, "target": grid.sum(0)}, maps=maps)
