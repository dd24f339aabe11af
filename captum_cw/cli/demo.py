"""``captum-cw demo``: explain why a small model predicts its next token."""

from __future__ import annotations

from argparse import Namespace

from rich.text import Text

from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.console import console
from captum_cw.cli.demo_figures import (
    DEMO_TEXT,
    IG,
    IG_STEPS,
    ExplainedPrediction,
    explain_prediction,
    save_figures,
)
from captum_cw.cli.output import SINK_NOTE, announce, share_table
from captum_cw.measures import TARGET
from captum_cw.models.loading import DEMO_MODEL, load_demo_model
from captum_cw.text.tokens import sink
from captum_cw.visualization.text import normalized_scores


def run(options: Namespace) -> Answer:
    """Explain a prediction of the demo model, and save figures."""
    text = DEMO_TEXT if options.text is None else options.text
    if not text:
        options.parser.error("the text is empty: give at least one token")
    announce(DEMO_MODEL)
    model, tokenizer = load_demo_model()
    explanation = explain_prediction(model, tokenizer, text)
    files = save_figures(model, tokenizer, explanation, options.out)

    def show() -> None:
        _show(text, explanation)
        show_files(files)

    document = {
        "model": DEMO_MODEL,
        "text": text,
        "prediction": explanation.prediction,
        "probability": explanation.probability,
        "tokens": explanation.tokens,
        "scores": {name: scores.tolist() for name, scores in explanation.scores.items()},
        "seconds": explanation.seconds,
        "files": [str(file) for file in files],
    }
    return Answer(document, show)


def _show(text: str, explanation: ExplainedPrediction) -> None:
    out = console()
    prediction, probability = explanation.prediction, explanation.probability
    out.print(Text.assemble("\n", text, (prediction, "bold underline")))
    summary = f"The model predicts {prediction!r} with a probability of {probability:.2f}. Why?"
    out.print(Text(summary), end="\n\n")
    tokens, scores = explanation.tokens, explanation.scores
    normalized = normalized_scores(scores, tokens, sink(tokens))
    out.print(share_table(tokens, scores, normalized))
    out.print(
        "Each column shows shares of all scores of a method, whose sizes sum to 100%. "
        "Target contributions explain the logit of the prediction, and Integrated Gradients its "
        "log-probability. Contributions and attention explain the attention outputs at the last "
        "position. " + SINK_NOTE,
        style="dim",
        end="\n\n",
    )
    for name, seconds in explanation.seconds.items():
        passes = "one forward and one backward pass" if name == TARGET else "one forward pass"
        passes = f"{IG_STEPS} forward and backward passes" if name == IG else passes
        out.print(f"{name:<20} {seconds:6.1f} s  {passes}")
