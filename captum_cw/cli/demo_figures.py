"""The demo: four methods explain why a small model predicts its next token.

Contributions to the target explain the logit of the predicted token, and Integrated Gradients its
log-probability. Contributions and attention explain the attention outputs at the last position.
These are related questions, but not the same.
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
from captum_cw.attr import AttentionWeights, ContributionWeights, TargetContributions, TokenScores
from captum_cw.attr.llm import output_scores
from captum_cw.capture.model import device_of
from captum_cw.capture.outputs import logits_of
from captum_cw.explanation.builder import explain
from captum_cw.measures import TARGET
from captum_cw.text.tokens import sink
from captum_cw.visualization import (
    plot_attention_and_contribution,
    plot_token_scores,
    readable_tokens,
    save_figure,
)

DEMO_TEXT = (
    "In Germany people speak German, in Spain people speak Spanish, and in Italy people speak"
)
IG = "integrated gradients"
IG_STEPS = 50


@dataclass(frozen=True)
class ExplainedPrediction:
    """A predicted token, and the scores of the text's tokens by each method.

    Args:
        input_ids: The token ids ``(1, T)``.
        tokens: The ``T`` readable tokens.
        prediction: The most probable next token, readable.
        probability: Its probability.
        scores: For each method, the scores ``(T,)``.
        seconds: For each method, the run time in seconds.
    """

    input_ids: Tensor
    tokens: list[str]
    prediction: str
    probability: float
    scores: dict[str, Tensor]
    seconds: dict[str, float]


def explain_prediction(model: nn.Module, tokenizer: Any, text: str) -> ExplainedPrediction:
    """Explain a model's next token by contributions, attention and Integrated Gradients.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer. The baseline of Integrated Gradients needs its line break, or its
            end token.
        text: The text to continue, of ``T`` tokens.

    Example:
        >>> tokenizer.eos_token = "a"
        >>> explanation = explain_prediction(model, tokenizer, "The capital of France is")
        >>> explanation.scores["contribution"].shape
        torch.Size([5])
    """
    ids = tokenizer(text, return_tensors="pt").input_ids.to(device_of(model))
    with torch.no_grad():
        probabilities = logits_of(model(input_ids=ids))[0, -1].float().softmax(-1)
    prediction = int(probabilities.argmax())

    scores, seconds = {}, {}
    start = time.perf_counter()
    found = output_scores(TargetContributions(model))
    scores[TARGET] = found.attribute(ids, target=prediction)[0].cpu()
    seconds[TARGET] = time.perf_counter() - start
    for method in (ContributionWeights, AttentionWeights):
        start = time.perf_counter()
        scorer = TokenScores(method(model), queries=-1)
        scores[method.name] = scorer.attribute(ids, show_progress=True)[0].cpu()
        seconds[method.name] = time.perf_counter() - start
    start = time.perf_counter()
    scores[IG] = _integrated_gradients(model, ids, prediction, _baseline(tokenizer, ids))
    seconds[IG] = time.perf_counter() - start
    return ExplainedPrediction(
        input_ids=ids,
        tokens=readable_tokens(tokenizer, ids[0]),
        prediction=readable_tokens(tokenizer, [prediction])[0],
        probability=float(probabilities[prediction]),
        scores=scores,
        seconds=seconds,
    )


def _baseline(tokenizer: Any, ids: Tensor) -> Tensor:
    """Return the text's first token followed by line breaks, ``(1, T)``.

    The first token is an attention sink that the model relies on. On a path that changes it, the
    log-probability jumps, and even hundreds of steps do not sum to the right value.
    """
    line_break = tokenizer("\n", add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    baseline = torch.full_like(ids, line_break[0])
    baseline[:, 0] = ids[:, 0]
    return baseline


def _integrated_gradients(model: Any, ids: Tensor, target: int, baseline: Tensor) -> Tensor:
    """Return the scores ``(T,)`` of Integrated Gradients."""
    with progress_bar(IG_STEPS, "Integrated Gradients: steps", show=True) as bar:

        def log_probability(input_ids: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                bar.update(len(input_ids))
            logits = logits_of(model(input_ids=input_ids, use_cache=False))[:, -1]
            return logits.float().log_softmax(-1)[:, target]

        method = LayerIntegratedGradients(log_probability, model.get_input_embeddings())
        attributions: Tensor = method.attribute(
            ids, baselines=baseline, n_steps=IG_STEPS, internal_batch_size=10
        )
    return attributions[0].sum(-1).float().cpu()


def save_figures(
    model: nn.Module, tokenizer: Any, explanation: ExplainedPrediction, folder: Path
) -> list[Path]:
    """Save an interactive page and figures of an explanation.

    Args:
        model: The model that was explained.
        tokenizer: Its tokenizer.
        explanation: The result of :func:`explain_prediction`.
        folder: The folder for the files. It is created if needed.

    Returns:
        The files: ``explanation.html``, an interactive page with all measures, layers and heads;
        ``scores.png``, the scores of the four methods; and ``maps.png``, the maps of the four
        heads in which one token contributes most at the last position.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("explanation.html", "scores.png", "maps.png")]
    page, scores, maps = files
    explain(model, tokenizer, explanation.input_ids).save_page(page)
    tokens, skip = explanation.tokens, sink(explanation.tokens)
    figure, _ = plot_token_scores(explanation.scores, tokens, skip=skip, use_pyplot=False)
    save_figure(figure, scores)

    layers = ContributionWeights(model).decompose(explanation.input_ids, show_progress=True)
    contribution = [layer.contribution for layer in layers]
    figure, _ = plot_attention_and_contribution(
        [layer.attention for layer in layers],
        contribution,
        tokens,
        pairs=_strongest_heads(contribution, start=len(skip)),
        use_pyplot=False,
    )
    save_figure(figure, maps)
    return files


def _strongest_heads(contributions: list[Tensor], start: int) -> list[tuple[int, int]]:
    """Return up to four pairs of layer and head, by the largest contribution at the last position.

    Tokens before ``start`` do not count.
    """
    peaks = torch.stack([c[0, :, -1, start:].abs().amax(-1) for c in contributions])
    heads = peaks.shape[1]
    best = peaks.flatten().topk(min(4, peaks.numel())).indices.tolist()
    return [divmod(index, heads) for index in best]
