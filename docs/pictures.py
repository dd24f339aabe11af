"""Makes the pictures of the documentation, ``docs/pictures/*.png``, from the small real model.

Run ``python docs/pictures.py`` where a picture, or what it shows, has changed: some minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from captum_cw import (
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    analysis,
)
from captum_cw.data import token_batches
from captum_cw.demo import DEMO_TEXT, explain_prediction
from captum_cw.loading import load_demo_model
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

    batches = token_batches(TEXTS, tokenizer, batch_size=3)
    metric = ComprehensivenessSufficiency(
        model, rates={"top": [0.02, 0.05, 0.1], "bottom": [0.3, 0.5, 0.7]}, metric="nll"
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


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, figure in pictures(*load_demo_model("wheel")):
        save_figure(figure, FOLDER / f"{name}.png")
        print(name)
