"""The demonstration: why a small model predicts its next token, by three methods side by side.

Contributions and attention explain the attention outputs at the last position, from one
observed forward pass; Integrated Gradients explain the log-probability of the prediction, by the
gradients along a path. They answer related questions, not the same one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn

from captum_cw._utils.progress import progress_bar
from captum_cw.attr import AttentionWeights, ContributionWeights, TokenScores
from captum_cw.capture.outputs import logits_of
from captum_cw.explanation.builder import explain
from captum_cw.text.tokens import sink
from captum_cw.visualization import (
    plot_attention_and_contribution,
    plot_decomposition,
    plot_token_scores,
    readable_tokens,
    save_figure,
    save_text,
    text_records,
)

__all__ = [
    "DEMO_TEXT",
    "IG",
    "IG_STEPS",
    "ExplainedPrediction",
    "explain_prediction",
    "save_pictures",
]

DEMO_TEXT = (
    "In Germany people speak German, in Spain people speak Spanish, and in Italy people speak"
)
IG = "integrated gradients"
IG_STEPS = 50


@dataclass(frozen=True)
class ExplainedPrediction:
    """What a model predicts after a text, and the scores of the text's tokens.

    Args:
        input_ids: ``(1, T)``.
        tokens: ``T`` readable tokens.
        prediction: The most probable next token, readable.
        probability: Its probability.
        scores: A method's ``(T,)`` scores, by its name.
        seconds: What each method took.
        ig_delta: By how much the sum of the Integrated Gradients exceeds the change of the
            log-probability that it should equal: what is lost by few steps.
    """

    input_ids: Tensor
    tokens: list[str]
    prediction: str
    probability: float
    scores: dict[str, Tensor]
    seconds: dict[str, float]
    ig_delta: float


def explain_prediction(model: nn.Module, tokenizer: Any, text: str) -> ExplainedPrediction:
    """Explains a model's next token by contributions, attention and Integrated Gradients.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, with a line break or an end token, the baseline of Integrated
            Gradients.
        text: The text to continue.

    Returns:
        Scores of the text's tokens by each method, and what each took.

    Example:
        >>> tokenizer.eos_token = "a"
        >>> explain_prediction(model, tokenizer, "b c d").scores["contribution"].shape
        torch.Size([3])
    """
    ids = tokenizer(text, return_tensors="pt").input_ids.to(next(model.parameters()).device)
    with torch.no_grad():
        probabilities = logits_of(model(input_ids=ids))[0, -1].float().softmax(-1)
    prediction = int(probabilities.argmax())

    scores, seconds = {}, {}
    for method in (ContributionWeights, AttentionWeights):
        start = time.perf_counter()
        scorer = TokenScores(method(model), queries=-1)
        scores[method.name] = scorer.attribute(ids, show_progress=True)[0].cpu()
        seconds[method.name] = time.perf_counter() - start
    start = time.perf_counter()
    scores[IG], delta = _integrated_gradients(model, ids, prediction, _baseline(tokenizer, ids))
    seconds[IG] = time.perf_counter() - start
    return ExplainedPrediction(
        input_ids=ids,
        tokens=readable_tokens(tokenizer, ids[0]),
        prediction=readable_tokens(tokenizer, [prediction])[0],
        probability=float(probabilities[prediction]),
        scores=scores,
        seconds=seconds,
        ig_delta=delta,
    )


def _baseline(tokenizer: Any, ids: Tensor) -> Tensor:
    """Line breaks after the same first token.

    Without it the path from the baseline leaves the attention sink that the model relies on; then
    the prediction jumps, and steps by the hundred do not sum to what they should.
    """
    line_break = tokenizer("\n", add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    baseline = torch.full_like(ids, line_break[0])
    baseline[:, 0] = ids[:, 0]
    return baseline


def _integrated_gradients(
    model: Any, ids: Tensor, target: int, baseline: Tensor
) -> tuple[Tensor, float]:
    with progress_bar(IG_STEPS, "Integrated Gradients: steps", show=True) as bar:

        def log_probability(input_ids: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                bar.update(len(input_ids))
            logits = logits_of(model(input_ids=input_ids, use_cache=False))[:, -1]
            return logits.float().log_softmax(-1)[:, target]

        method = LayerIntegratedGradients(log_probability, model.get_input_embeddings())
        attributions, delta = method.attribute(
            ids,
            baselines=baseline,
            n_steps=IG_STEPS,
            internal_batch_size=10,
            return_convergence_delta=True,
        )
    scores: Tensor = attributions[0].sum(-1).float().cpu()
    return scores, float(delta)


def save_pictures(
    model: nn.Module, tokenizer: Any, explanation: ExplainedPrediction, folder: Path
) -> list[Path]:
    """Saves the explanation as a page, and maps of a few heads as pictures.

    Args:
        model: The model that was explained.
        tokenizer: Its tokenizer.
        explanation: Of :func:`explain_prediction`.
        folder: Where the files go; made if needed.

    Returns:
        The files: ``explanation.html``, interactive, with all measures, layers and heads;
        ``demo.html`` and ``scores.png`` with the scores of all methods; ``maps.png``, the four
        heads in which one token contributes most at the last position; and ``decomposition.png``,
        the first of these heads by factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ("explanation.html", "demo.html", "scores.png", "maps.png", "decomposition.png")
    interactive, page, scores, maps, factors = (folder / name for name in names)
    explained = explain(model, tokenizer, explanation.input_ids)
    explained.save_page(interactive)
    tokens, skip = explanation.tokens, sink(explanation.tokens)
    records = text_records(
        explanation.scores,
        tokens,
        predicted=explanation.prediction,
        probability=explanation.probability,
        skip=skip,
    )
    save_text(records, page, title=f"Why {explanation.prediction.strip()!r} comes next")
    fig, _ = plot_token_scores(explanation.scores, tokens, skip=skip, use_pyplot=False)
    save_figure(fig, scores)

    layers = ContributionWeights(model).decompose(explanation.input_ids, show_progress=True)
    attention = [layer.attention for layer in layers]
    contribution = [layer.contribution for layer in layers]
    heads = _telling_heads(contribution, start=len(skip))
    fig, _ = plot_attention_and_contribution(
        attention, contribution, tokens, pairs=heads, use_pyplot=False
    )
    save_figure(fig, maps)
    layer, head = heads[0]
    fig, _ = plot_decomposition(layers[layer], tokens, head=head, use_pyplot=False)
    fig.suptitle(f"layer {layer}, head {head}")
    save_figure(fig, factors)
    return [interactive, page, scores, maps, factors]


def _telling_heads(contributions: list[Tensor], start: int) -> list[tuple[int, int]]:
    """Up to four (layer, head) pairs in which one token from ``start`` on adds most at the end."""
    peaks = torch.stack([c[0, :, -1, start:].abs().amax(-1) for c in contributions])
    heads = peaks.shape[1]
    best = peaks.flatten().topk(min(4, peaks.numel())).indices.tolist()
    return [divmod(place, heads) for place in best]
