"""Time the interactive page in Chromium: how fast it opens, and how fast it answers a click.

    python benchmarks/page.py

The page is that of 512 tokens by the demo model: 30 layers of 9 heads, with all measures. A time
ends when the browser has painted the result, so it includes up to a frame (17 ms) of waiting.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from captum_cw import explain
from captum_cw.metrics.tables import in_markdown
from captum_cw.models.loading import load_demo_model

TOKENS = 512
SENTENCE = "In Germany people speak German, in Spain people speak Spanish, and in Italy Italian. "
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

#: Notes when the page has painted its answer, and when it has painted its map.
WATCH = """
const note = (name) => {
  window[name] ??= 0;
  requestAnimationFrame(() => setTimeout(() => { window[name] ||= performance.now(); }));
};
const seen = new MutationObserver(() => {
  if (!document.querySelector("#bars li")) return;
  note("answered");
  if (document.querySelector("main").hasAttribute("aria-busy")) return;
  seen.disconnect();
  note("opened");
});
seen.observe(document, { subtree: true, childList: true, attributes: true });"""
#: Does something, waits until the page shows it and has painted it, and returns the milliseconds.
TIMED = """async ([act, isShown]) => {
  const start = performance.now();
  eval(act);
  while (!eval(isShown)) await new Promise((go) => setTimeout(go));
  await new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
  return performance.now() - start;
}"""
SUMMARY = "document.querySelector('#controls-summary').textContent"
CHOSEN = "document.querySelector('#method').selectedOptions[0].textContent"
#: By what a reader does: the deed and how the page shows it, of which round ``n`` is one.
DEEDS = {
    "click on a word": (
        "document.querySelectorAll('#tokens .token')[{place}].click()",
        "document.querySelectorAll('#tokens .token')[{place}].classList.contains('query')",
    ),
    "another layer": (
        "const x = document.querySelector('#layer'); x.value = '{layer}'; "
        "x.dispatchEvent(new Event('change'))",
        f"{SUMMARY}.includes('layer {{layer}}')",
    ),
    "another measure": (
        "const x = document.querySelector('#method'); x.value = x.options[{measure}].value; "
        "x.dispatchEvent(new Event('change'))",
        f"{SUMMARY}.includes(`${{{{METHOD}}}},`)".replace("METHOD", CHOSEN),
    ),
}


def text_of(tokenizer: Any) -> str:
    """Return a text of exactly ``TOKENS`` tokens."""
    ids = tokenizer(SENTENCE * (TOKENS // 10)).input_ids[:TOKENS]
    return str(tokenizer.decode(ids))


def opening(browser: Any, file: Path) -> tuple[float, float]:
    """Return the milliseconds until the answer is painted, and until the map is."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(WATCH)
    page.goto(file.as_uri())
    page.wait_for_function("window.opened")
    found = page.evaluate("[window.answered, window.opened]")
    page.close()
    return found[0], found[1]


def deeds(browser: Any, file: Path, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each deed in each round."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(file.as_uri())
    page.locator("main:not([aria-busy])").wait_for()
    found: dict[str, list[float]] = {name: [] for name in DEEDS}
    for n in range(rounds):
        place, layer, measure = (37 * n + 5) % TOKENS, (7 * n) % 30, n % 5
        for name, deed in DEEDS.items():
            words = [part.format(place=place, layer=layer, measure=measure) for part in deed]
            found[name].append(page.evaluate(TIMED, words))
    page.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time the interactive page in Chromium.")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each row (default: 20)")
    options = parser.parse_args(argv)
    model, tokenizer = load_demo_model()
    page = explain(model, tokenizer, text_of(tokenizer), show_progress=True).page()
    # The policy of the page forbids eval, by which this script acts.
    tested = page.replace("script-src 'unsafe-inline'", "script-src 'unsafe-inline' 'unsafe-eval'")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "page.html"
        file.write_text(tested, encoding="utf-8")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = [opening(browser, file) for _ in range(options.rounds)]
        found = {
            "the answer is shown": [x for x, _ in opened],
            "the map is shown": [x for _, x in opened],
            **deeds(browser, file, options.rounds),
        }
    print(f"{TOKENS} tokens, {len(page.encode()) / 1e6:.1f} MB; milliseconds\n")
    rows = [[name, f"{statistics.median(of):.0f}", f"{max(of):.0f}"] for name, of in found.items()]
    print(in_markdown(["", "median", "longest"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
