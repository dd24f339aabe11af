"""``captum-cw attribute``: the scores of a text's tokens."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from captum_cw.attr import LLMTokenAttribution, TokenScores
from captum_cw.attr.inputs import device_of, longest_text
from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.output import SINK_NOTE, coloured_text, load, token_table
from captum_cw.explaining import explain
from captum_cw.explanation import Explanation
from captum_cw.functional import Reduction
from captum_cw.scoring import METHODS
from captum_cw.tokens import sink
from captum_cw.visualization import readable_tokens
from captum_cw.visualization.text import normalized_scores

#: Tokens of the longest text whose page has maps.
MAPPED = 1024
#: Tokens that are shown in a table.
TOP = 10


def run(options: Namespace) -> Answer:
    """Scores the tokens of a text, or of a prompt for an output."""
    usage_error = options.parser.error
    if options.target is not None and options.reduction is not None:
        usage_error("--reduction is over all positions, --target explains some: give one of them")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        usage_error(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out is not None and options.out.is_dir():
        usage_error(f"--out {options.out} is a folder: name a file, such as page.html")
    text = options.text if options.file is None else _read(options.file)
    if not text:
        usage_error("the text is empty: give at least one token")

    model, tokenizer = load(options, options.model)
    _check_length(model, tokenizer, text, options.target or "")
    reduction: Reduction = options.reduction or "mean"
    scorer = TokenScores(METHODS[options.method](model), reduction=reduction)
    if options.target is None:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(device_of(model))
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
        if options.target is None:
            explanation = _explanation(model, tokenizer, ids, options.method, reduction, scores)
        else:
            explanation = Explanation.from_llm(result, options.method)
        explanation.save_page(options.out)

    def show() -> None:
        _show(title, options.method, scores, tokens)
        if options.out is not None:
            show_files([options.out])

    document = {
        "model": options.model,
        "method": options.method,
        "reduction": reduction if options.target is None else None,
        "target": options.target,
        "tokens": tokens,
        "scores": scores.tolist(),
        "files": [] if options.out is None else [str(options.out)],
    }
    return Answer(document, show)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: convert it first. {error}") from error


def _check_length(model: Any, tokenizer: Any, text: str, target: str) -> None:
    # An output has no tokens of its own at its beginning and end.
    prompt = tokenizer(text, verbose=False).input_ids
    output = tokenizer(target, add_special_tokens=False, verbose=False).input_ids
    if not prompt:
        raise ValueError(f"The text {text!r} makes no token: give at least one.")
    limit, length = longest_text(model), len(prompt) + len(output)
    if limit is not None and length > limit:
        raise ValueError(
            f"The text has {length} tokens, but the model has positions for {limit}: give a "
            "shorter one, or a model with a longer context."
        )


def _explanation(
    model: Any, tokenizer: Any, ids: Tensor, method: str, reduction: Reduction, scores: Tensor
) -> Explanation:
    """All measures of the text, with the scores that were asked for among them."""
    if ids.shape[1] > MAPPED:
        print(
            f"The page of {ids.shape[1]} tokens holds their scores alone: maps grow with the "
            f"square of a text, and are in pages of up to {MAPPED} tokens.",
            file=sys.stderr,
        )
        return Explanation(readable_tokens(tokenizer, ids[0]), {method: scores})
    found = explain(model, tokenizer, ids, show_progress=True)
    if reduction == "mean":
        return found
    return replace(found, scores={**found.scores, f"{method}, {reduction}": scores})


def _show(title: str, method: str, scores: Tensor, tokens: Sequence[str]) -> None:
    console = Console(highlight=False, markup=False)
    console.print(Text(title, style="bold"), end="\n\n")
    normalized = normalized_scores({method: scores}, tokens, sink(tokens))
    coloured_text(console, tokens, normalized[method])
    top = scores.abs().topk(min(TOP, len(tokens))).indices.tolist()
    console.print(token_table(tokens, {method: scores}, normalized, top))
    console.print(SINK_NOTE, style="dim")
