"""``captum-cw attribute``: score the tokens of a text."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor

from captum_cw import measures
from captum_cw.attr import LLMTokenAttribution, TokenScores
from captum_cw.capture.model import device_of
from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.console import console
from captum_cw.cli.output import (
    SINK_NOTE,
    check_generates_text,
    coloured_text,
    load,
    token_table,
)
from captum_cw.explanation.builder import explain
from captum_cw.explanation.explanation import Explanation
from captum_cw.functional import Reduction
from captum_cw.text.prompts import read_text
from captum_cw.text.tokens import sink
from captum_cw.visualization import readable_tokens
from captum_cw.visualization.text import normalized_scores

#: The page of a longer text has no maps.
MAPPED = 1024
#: The number of tokens in the printed table.
TOP = 10


def run(options: Namespace) -> Answer:
    """Score the tokens of a text, or the tokens of a prompt for a given output."""
    _check_usage(options)
    text = options.text if options.file is None else _read(options.file)
    if not text:
        options.parser.error("the text is empty: give at least one token")
    prompt = [{"role": "user", "content": text}] if options.chat else text
    template = options.chat_template_kwargs

    model, tokenizer = load(options, options.model)
    entry = measures.find(options.method)
    assert entry is not None  # the parser accepts only registered names
    reduction: Reduction = options.reduction or "mean"
    scorer = TokenScores(entry.attribution()(model), reduction=reduction)
    if options.target is None:
        read = read_text(
            tokenizer, prompt, add_generation_prompt=True, chat_template_kwargs=template
        )
        ids = read.ids.to(device_of(model))
        scores = scorer.attribute(ids, show_progress=True)[0].cpu()
        tokens = readable_tokens(tokenizer, ids[0])
        title = f"{options.method}, {reduction} over the positions of the text"
        if options.out is not None:
            label = options.method if reduction == "mean" else f"{options.method}, {reduction}"
            _explanation(model, tokenizer, ids, label, scores).save_page(options.out)
    else:
        check_generates_text(
            model, "leave --target out to score the tokens of the text in its attention layers"
        )
        result = LLMTokenAttribution(scorer, tokenizer).attribute(
            prompt, target=options.target, chat_template_kwargs=template, show_progress=True
        )
        tokens, scores = result.input_tokens, result.seq_attr
        title = f"{options.method}, for the output {options.target!r}"
        if options.out is not None:
            Explanation.from_llm(result, options.method).save_page(options.out)
    files = [] if options.out is None else [str(options.out)]
    document = {
        "model": options.model,
        "method": options.method,
        "reduction": reduction if options.target is None else None,
        "target": options.target,
        "tokens": tokens,
        "scores": scores.tolist(),
        "files": files,
    }
    return Answer(document, lambda: _show(title, options.method, scores, tokens, files))


def _check_usage(options: Namespace) -> None:
    usage_error = options.parser.error
    if options.target is not None and options.reduction is not None:
        usage_error("--reduction applies to all positions, --target to some: give one of them")
    if options.chat_template_kwargs is not None and not options.chat:
        usage_error("--chat-template-kwargs applies to a chat: give --chat too")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        usage_error(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out is not None and options.out.is_dir():
        usage_error(f"--out {options.out} is a folder: give a file, such as page.html")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a UTF-8 text: convert it first. {error}") from error


def _explanation(
    model: Any, tokenizer: Any, ids: Tensor, label: str, scores: Tensor
) -> Explanation:
    """Return the explanation by all measures, with the given scores among them."""
    if ids.shape[1] > MAPPED:
        print(
            f"The text has {ids.shape[1]} tokens, so its page shows scores but not maps. Maps grow "
            f"with the square of the length; pages of up to {MAPPED} tokens have them.",
            file=sys.stderr,
        )
        return Explanation(readable_tokens(tokenizer, ids[0]), {label: scores})
    explanation = explain(model, tokenizer, ids, show_progress=True)
    return replace(explanation, scores={**explanation.scores, label: scores})


def _show(
    title: str, method: str, scores: Tensor, tokens: Sequence[str], files: Sequence[str]
) -> None:
    out = console()
    out.print(Text(title, style="bold"), end="\n\n")
    normalized = normalized_scores({method: scores}, tokens, sink(tokens))
    coloured_text(out, tokens, normalized[method])
    top = scores.abs().topk(min(TOP, len(tokens))).indices.tolist()
    out.print(token_table(tokens, {method: scores}, normalized, top))
    out.print(SINK_NOTE, style="dim")
    if files:
        show_files(files)
