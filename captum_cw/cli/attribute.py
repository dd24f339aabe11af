"""``captum-cw attribute``: the scores of a text's tokens."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from captum_cw import measures
from captum_cw.attr import LLMTokenAttribution, TokenScores
from captum_cw.attr.chat import ChatTokenInput
from captum_cw.capture.model import device_of
from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.console import console
from captum_cw.cli.output import SINK_NOTE, coloured_text, load, predicted_by, token_table
from captum_cw.explanation.builder import explain
from captum_cw.explanation.explanation import Explanation
from captum_cw.functional import Reduction
from captum_cw.text.tokens import sink
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
    if options.chat_template_kwargs is not None and not options.chat:
        usage_error("--chat-template-kwargs are for a chat: give --chat too")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        usage_error(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out is not None and options.out.is_dir():
        usage_error(f"--out {options.out} is a folder: name a file, such as page.html")
    text = options.text if options.file is None else _read(options.file)
    if not text:
        usage_error("the text is empty: give at least one token")

    model, tokenizer = load(options, options.model)
    if options.target is not None:
        _check_predicts_tokens(model, options.target)
    prompt = _prompt(options, tokenizer, text)
    reduction: Reduction = options.reduction or "mean"
    chosen = measures.find(options.method)
    assert chosen is not None, "the parser knows the names"
    kind = chosen.attribution()
    scorer = TokenScores(kind(model), reduction=reduction)
    if options.target is None:
        ids = prompt if isinstance(prompt, Tensor) else prompt.inp_tensor
        ids = ids.to(device_of(model))
        scores = scorer.attribute(ids, show_progress=True)[0].cpu()
        title = f"{options.method}, {reduction} over the positions of the text"
    else:
        result = LLMTokenAttribution(scorer, tokenizer).attribute(
            text if isinstance(prompt, Tensor) else prompt,
            target=options.target,
            show_progress=True,
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


def _prompt(options: Namespace, tokenizer: Any, text: str) -> Tensor | ChatTokenInput:
    """The token ids ``(1, T)`` of a text, or the prompt that a chat template makes of it."""
    if options.chat:
        chat = [{"role": "user", "content": text}]
        return ChatTokenInput(chat, tokenizer, chat_template_kwargs=options.chat_template_kwargs)
    # Of no token, a tensor of ids would be one of floats.
    ids = tokenizer(text, verbose=False).input_ids
    if not ids:
        raise ValueError(f"The text {text!r} makes no token: give at least one.")
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def _check_predicts_tokens(model: Any, target: str) -> None:
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} predicts {predicted_by(model)}, so it cannot write the target "
            f"{target!r}: leave --target out to score the text's tokens in the attention layers, "
            "or give a causal language model."
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
    out = console()
    out.print(Text(title, style="bold"), end="\n\n")
    normalized = normalized_scores({method: scores}, tokens, sink(tokens))
    coloured_text(out, tokens, normalized[method])
    top = scores.abs().topk(min(TOP, len(tokens))).indices.tolist()
    out.print(token_table(tokens, {method: scores}, normalized, top))
    out.print(SINK_NOTE, style="dim")
