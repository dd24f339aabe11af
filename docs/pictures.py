"""Makes the pictures of the documentation, ``docs/pictures/*.png``, from the small real model.

Run ``python docs/pictures.py`` where a picture, or what it shows, has changed: some minutes. With
``page`` it takes the picture of the interactive page alone, for which it needs Chromium.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from captum_cw import (
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    analysis,
    explain,
)
from captum_cw.cli.demo_figures import DEMO_TEXT, explain_prediction
from captum_cw.data import token_batches
from captum_cw.models.loading import load_demo_model
from captum_cw.visualization import (
    plot_attention_and_contribution,
    plot_decomposition,
    plot_token_scores,
    readable_tokens,
    save_figure,
)

FOLDER = Path(__file__).parent / "pictures"
PROMPT = "The capital of France is Paris, and the capital of Italy is"
TEXTS = [
    "The market opens at seven. At seven the farmers set up their tables, and by eight most of "
    "the bread is gone. The cheese lasts longer, since there is more of it.",
    "Lena has 6 pens and finds 4 more, so now she has 10 pens. She gives half of the 10 pens to "
    "her brother, and keeps 5 pens for herself.",
    "Copper is a metal, and metals conduct heat. So a copper pan gets hot quickly, while the "
    "wooden handle of the pan stays cool.",
    "The bus to the harbour leaves every twenty minutes. If you miss the bus at noon, the next "
    "bus to the harbour leaves at twenty past twelve.",
    "In Spain people speak Spanish, and in France people speak French. In Switzerland some "
    "people speak French, some German, and some Italian.",
    "A river rises in the mountains and ends in the sea. On its way other rivers join it, so that "
    "the river is widest where it reaches the sea.",
]


def pictures(model: Any, tokenizer: Any) -> Iterator[tuple[str, Figure]]:
    """Each picture with its name."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = readable_tokens(tokenizer, ids[0])
    contribution = ContributionWeights(model)

    prediction = explain_prediction(model, tokenizer, DEMO_TEXT)
    figure, _ = plot_token_scores(prediction.scores, prediction.tokens, skip=[0], use_pyplot=False)
    yield "scores", figure

    rome = {
        method.name: LLMTokenAttribution(method(model), tokenizer)
        .attribute(PROMPT, target=" Rome")
        .seq_attr
        for method in (ContributionWeights, AttentionWeights)
    }
    figure, _ = plot_token_scores(rome, tokens, skip=[0], use_pyplot=False)
    yield "rome", figure

    maps = contribution.attribute(ids)
    pairs = telling_heads(maps, 3)
    figure, _ = plot_attention_and_contribution(
        AttentionWeights(model).attribute(ids),
        maps,
        tokens,
        pairs=pairs,
        quantile=0.98,
        use_pyplot=False,
    )
    yield "maps", figure

    layer, head = pairs[0]
    module = model.get_submodule(contribution.layers[layer])
    factors = ContributionWeights(model, module).decompose(ids)
    figure, _ = plot_decomposition(factors, tokens, head=head, quantile=0.98, use_pyplot=False)
    yield "factors", figure

    reductions = {how: TokenScores(contribution, how).attribute(ids)[0] for how in ("mean", "sum")}
    figure, _ = plot_token_scores(reductions, tokens, skip=[0], use_pyplot=False)
    yield "reductions", figure

    yield "marginals", marginals(model, ids, tokens, layer)

    batches = token_batches(TEXTS, tokenizer, batch_size=3)
    metric = ComprehensivenessSufficiency(
        model, rates={"top": [0.02, 0.05, 0.1], "bottom": [0.3, 0.5, 0.7]}, quantity="nll"
    )
    methods = ("contribution", "vwon", "vw", "attention", "random")
    result = metric.evaluate({name: name for name in methods}, batches)
    figure, _ = result.plot(use_pyplot=False)
    yield "curves", figure

    singles = token_batches(TEXTS, tokenizer, batch_size=1)
    looks: dict[str, Callable[..., Any]] = {
        "first_token": analysis.first_token_weight,
        "scaling": analysis.sink_scaling,
    }
    for name, look in looks.items():
        figure, _ = look(model, singles).plot(use_pyplot=False)
        yield name, figure


def telling_heads(maps: list[torch.Tensor], count: int) -> list[tuple[int, int]]:
    """The heads in which a token behind the first contributes most to the last position."""
    peaks = torch.stack([c[0, :, -1, 1:-1].amax(-1) for c in maps])
    return [divmod(int(place), peaks.shape[1]) for place in peaks.flatten().topk(count).indices]


def marginals(model: Any, ids: torch.Tensor, tokens: list[str], number: int) -> Figure:
    """What three terms explain of one output, by the formula and by random removals."""
    found: list[torch.Tensor] = []

    def on_layer(_: Any, layer: Any) -> None:
        a = layer.weights(slice(0, layer.T))[0, :, -1]
        v = layer.value[0].repeat_interleave(layer.H // layer.value.shape[1], 0)
        terms = torch.einsum("hs,hsk,hkd->hsd", a, v, layer.output_weight).double()
        found.append(terms)

    ContributionWeights(model).observe(ids, None, on_layer)
    terms = found[number]
    _, S, d = terms.shape
    flat = terms.reshape(-1, d)
    output = flat.sum(0)
    whole = output.square().sum()
    c, r2 = flat @ output / whole, flat.square().sum(-1) / whole
    # The largest share, the longest term with a small share, and the most negative share.
    chosen = [c.argmax(), (r2 - 2 * c.abs()).argmax(), c.argmin()]
    rates = torch.linspace(0, 1, 11, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, term in zip(("#0072b2", "#009e73", "#d55e00"), map(int, chosen), strict=True):
        head, key = divmod(term, S)
        axes.plot(rates, 2 * rates * c[term] + (1 - 2 * rates) * r2[term], color=colour)
        means = []
        for rate in rates:
            stays = torch.rand(2000, len(flat), generator=generator, dtype=torch.float64) >= rate
            stays[:, term] = False
            left = output - stays.double() @ flat
            gain = left.square().sum(-1) - (left - flat[term]).square().sum(-1)
            means.append(float(gain.mean() / whole))
        label = f"head {head}, {tokens[key]!r}"
        axes.plot(rates, means, "o", color=colour, label=label)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_xlabel("fraction of the other terms that is removed")
    axes.set_ylabel("part of the output that the term adds")
    axes.legend(frameon=False)
    return figure


def picture_of_page(model: Any, tokenizer: Any, path: Path) -> None:
    """The interactive page, as it opens."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        explain(model, tokenizer, DEMO_TEXT).save_page(file)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1120, "height": 1300}, device_scale_factor=1.5)
        page.goto(file.as_uri())
        page.locator("main:not([aria-busy])").wait_for()
        end = page.locator("#map-part").bounding_box()["y"]
        page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1120, "height": end})
        browser.close()
    # As few colours as it has, which is a third of the size.
    Image.open(path).quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    loaded = load_demo_model("wheel")
    picture_of_page(*loaded, FOLDER / "page.png")
    for name, figure in () if sys.argv[1:] == ["page"] else pictures(*loaded):
        save_figure(figure, FOLDER / f"{name}.png")
        print(name)
