"""The command line: ``captum-cw attribute`` and ``captum-cw demo``.

Results go to standard output; progress and errors to standard error. The exit code is 0 for
success, 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

import captum_cw
from captum_cw.attr import (
    AttentionWeights,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
)
from captum_cw.demo import DEMO_TEXT, IG, IG_STEPS, explain_prediction, save_pictures, sink
from captum_cw.functional import Reduction
from captum_cw.loading import DEMO_MODEL, load_demo_model, load_model
from captum_cw.visualization import readable_tokens, save_text, text_records
from captum_cw.visualization.text import normalized_scores

__all__ = ["main"]

METHODS = {
    method.name: method
    for method in (ContributionWeights, VWONAttention, VWAttention, AttentionWeights)
}
DTYPES = ("float32", "bfloat16", "float16")
TOP = 10
# Red and green as in Captum's pages, as the far ends of white.
NEGATIVE, POSITIVE = (229, 77, 77), (32, 223, 32)
SINK_NOTE = (
    "Colours are on each method's own scale, which the first token, often an attention sink, does "
    "not set: it would pale all others."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What follows the program's name; None takes them from the shell.

    Returns:
        The exit code: 0, 1 for a failure, of which one line on standard error tells, or 130 where
        the run was interrupted.

    Raises:
        SystemExit: With code 2 for wrong usage, with 0 after ``--help`` or ``--version``.

    Example:
        >>> main(["attribute", "--model", "no/such.gguf", "--text", "Hello"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:  # whatever fails below: a person wants its message, not our stack
        if options.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{options.parser.prog}: error: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="captum-cw", description=captum_cw.__doc__)
    parser.add_argument("--version", action="version", version=captum_cw.__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the stack of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    attribute = commands.add_parser(
        "attribute",
        parents=[common],
        help="score the tokens of a text",
        description="Score the tokens of a text, or those of a prompt for a given output.",
    )
    attribute.set_defaults(run=_attribute, parser=attribute)
    attribute.add_argument(
        "--model", required=True, metavar="M", help="hub id, local folder or .gguf file"
    )
    text = attribute.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="T", help="the text")
    text.add_argument("--file", type=Path, metavar="F", help="a UTF-8 file that holds the text")
    attribute.add_argument(
        "--target", metavar="T", help="explain this output, with the text as its prompt"
    )
    attribute.add_argument(
        "--method", choices=METHODS, default=ContributionWeights.name, help="default: %(default)s"
    )
    attribute.add_argument(
        "--reduction",
        choices=get_args(Reduction),
        help="over the positions that see a token, without --target (default: mean)",
    )
    attribute.add_argument("--out", type=Path, metavar="PAGE.html", help="save a coloured page")
    attribute.add_argument("--json", action="store_true", help="print the scores as JSON")
    attribute.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    attribute.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="explain a prediction of a small model, beside Integrated Gradients",
        description=f"Explain what {DEMO_MODEL} predicts next by contributions, by attention and "
        "by Captum's Integrated Gradients, and save pictures.",
    )
    demo.set_defaults(run=_demo, parser=demo)
    demo.add_argument("--text", default=DEMO_TEXT, metavar="T", help="the text to continue")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("captum-cw-demo"),
        metavar="DIR",
        help="folder for the pictures (default: %(default)s)",
    )
    return parser


def _attribute(options: argparse.Namespace) -> None:
    usage_error = options.parser.error
    if options.target is not None and options.reduction is not None:
        usage_error("--reduction is over all positions, --target explains some: give one of them")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        usage_error(f"--out {options.out}: there is no folder {options.out.parent}")
    text = options.text if options.file is None else _read(options.file)
    if not text:
        usage_error("the text is empty: give at least one token")

    _announce(options.model)
    model, tokenizer = load_model(
        options.model, dtype=getattr(torch, options.dtype), device=options.device
    )
    reduction: Reduction = options.reduction or "mean"
    scorer = TokenScores(METHODS[options.method](model), reduction=reduction)
    if options.target is None:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(options.device)
        scores = scorer.attribute(ids, show_progress=True)[0].cpu()
        title = f"{options.method}, {reduction} over the positions of the text"
    else:
        result = LLMTokenAttribution(scorer, tokenizer).attribute(
            text, target=options.target, show_progress=True
        )
        ids, scores = result.inp.to_model_input(), result.seq_attr
        title = f"{options.method}, for the output {options.target!r}"
    tokens = readable_tokens(tokenizer, ids[0])

    if options.out is not None:
        records = text_records(
            {options.method: scores}, tokens, target=options.target or "", skip=sink(tokens)
        )
        save_text(records, options.out, title=title)
    if options.json:
        settings = {
            "model": options.model,
            "method": options.method,
            "reduction": reduction if options.target is None else None,
            "target": options.target,
        }
        print(json.dumps({**settings, "tokens": tokens, "scores": scores.tolist()}))
    else:
        _print_scores(title, options.method, scores, tokens)
        if options.out is not None:
            print(f"Saved {options.out}")


def _print_scores(title: str, method: str, scores: Tensor, tokens: Sequence[str]) -> None:
    console = Console(highlight=False)
    console.print(Text(title, style="bold"), end="\n\n")
    normalized = normalized_scores({method: scores}, tokens, sink(tokens))
    if _colourful(console):
        console.print(_coloured_text(tokens, normalized[method]), end="\n\n")
    top = scores.abs().topk(min(TOP, len(tokens))).indices.tolist()
    console.print(_table(tokens, {method: scores}, normalized, top))
    console.print(SINK_NOTE, style="dim")


def _demo(options: argparse.Namespace) -> None:
    if not options.text:
        options.parser.error("the text is empty: give at least one token")
    _announce(DEMO_MODEL)
    model, tokenizer = load_demo_model()
    explanation = explain_prediction(model, tokenizer, options.text)
    files = save_pictures(model, explanation, options.out)

    console = Console(highlight=False)
    console.print(Text.assemble("\n", options.text, (explanation.prediction, "bold underline")))
    console.print(
        Text(
            f"The model predicts {explanation.prediction!r} with probability "
            f"{explanation.probability:.2f}. Why?"
        ),
        end="\n\n",
    )
    tokens, scores = explanation.tokens, explanation.scores
    normalized = normalized_scores(scores, tokens, sink(tokens))
    console.print(_table(tokens, scores, normalized, range(len(tokens))))
    console.print(
        "Contributions and attention explain the attention outputs at the last position, "
        "Integrated Gradients the log-probability of the prediction. " + SINK_NOTE,
        style="dim",
        end="\n\n",
    )
    for name, seconds in explanation.seconds.items():
        passes = f"{IG_STEPS} forward and backward passes" if name == IG else "one forward pass"
        console.print(f"{name:<20} {seconds:6.1f} s  {passes}")
    total = float(scores[IG].sum())
    console.print(
        f"\nIn {IG_STEPS} steps, Integrated Gradients sum to {total:.1f}; exact ones would sum to "
        f"{total - explanation.ig_delta:.1f}, the change of the log-probability."
    )
    print("\nSaved:", *files, sep="\n  ")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: convert it first. {error}") from error


def _announce(model: str) -> None:
    """Says what takes long before it does; the libraries that load show bars of their own."""
    print(f"Loading {model} ...", file=sys.stderr, flush=True)


def _colourful(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _style(score: float) -> Style:
    """The background for a score in [-1, 1]: white at zero."""
    end = POSITIVE if score > 0 else NEGATIVE
    red, green, blue = (round(255 + (colour - 255) * abs(score)) for colour in end)
    return Style(color="#000000", bgcolor=f"#{red:02x}{green:02x}{blue:02x}")


def _coloured_text(tokens: Sequence[str], normalized: Tensor) -> Text:
    parts = zip(tokens, normalized.tolist(), strict=True)
    return Text.assemble(*((token, _style(score)) for token, score in parts))


def _table(
    tokens: Sequence[str],
    scores: Mapping[str, Tensor],
    normalized: Mapping[str, Tensor],
    places: Iterable[int],
) -> Table:
    """Scores of the tokens at some places, a column a method, coloured as normalised."""
    table = Table("place", "token")
    for name in scores:
        table.add_column(name, justify="right")
    for place in places:
        cells = (
            Text(f"{scores[name][place]:#.3g}", _style(float(normalized[name][place])))
            for name in scores
        )
        table.add_row(str(place), Text(tokens[place]), *cells)
    return table
