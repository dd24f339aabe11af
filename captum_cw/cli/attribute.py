"""``captum-cw attribute``: score the tokens of a text. :mod:`.attribute_set` scores sets."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor

from captum_cw import measures
from captum_cw.attr import LLMTokenAttribution, TokenScores
from captum_cw.capture.model import device_of
from captum_cw.cli import attribute_set
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
#: The measures of a prediction.
OF_TARGET = (measures.TARGET, measures.INPUT)
#: The number of tokens in the printed table.
TOP = 10


def run(options: Namespace) -> Answer | None:
    """Score the tokens of a text, or of each text of a set. Only one process returns an answer."""
    _check_usage(options)
    if options.data is not None:
        return attribute_set.run(options)
    _check_single(options)
    text = options.text if options.file is None else _read(options.file)
    if not text:
        options.parser.error("the text is empty: give at least one token")
    prompt = [{"role": "user", "content": text}] if options.chat else text

    model, tokenizer = load(options, options.model)
    if options.method in (None, *OF_TARGET) and options.reduction is None:
        answer = _explain_prediction(options, model, tokenizer, prompt)
        if answer is not None:
            return answer
    return _score(options, model, tokenizer, prompt)


def _explain_prediction(
    options: Namespace, model: Any, tokenizer: Any, prompt: Any
) -> Answer | None:
    """Explain a prediction; None for an output of several tokens, or without a prediction."""
    if options.target is not None and options.contrast is None and options.method is None:
        generates = model.can_generate()
        if generates and len(tokenizer.encode(options.target, add_special_tokens=False)) > 1:
            return None
    read = read_text(
        tokenizer,
        prompt,
        add_generation_prompt=True,
        chat_template_kwargs=options.chat_template_kwargs,
    )
    explanation = explain(
        model,
        tokenizer,
        read.ids.to(device_of(model)),
        target=options.target,
        contrast=options.contrast,
        top_k=0 if options.out is None or read.ids.shape[1] > MAPPED else 32,
        show_progress=True,
    )
    if measures.TARGET not in explanation.scores:
        if options.method is not None:
            raise ValueError(
                f"{type(model).__name__} predicts neither a token nor a class here: use "
                "--method contribution."
            )
        return None
    method = options.method or measures.TARGET
    if options.out is not None:
        if len(explanation.tokens) > MAPPED:
            _say_without_maps(len(explanation.tokens))
            explanation = replace(explanation, maps={}, heads=())
        explanation.save_page(options.out)
    files = [] if options.out is None else [str(options.out)]
    found = explanation.settings
    document = {
        "model": options.model,
        "method": method,
        "reduction": None,
        "target": found["target"] if options.target is None else options.target,
        "contrast": options.contrast,
        "probability": _number(found.get("target probability")),
        "contrast_probability": _number(found.get("contrast probability")),
        "tokens": list(explanation.tokens),
        "scores": explanation.scores[method].tolist(),
        "files": files,
    }
    shown = dict.fromkeys((method, *OF_TARGET, "contribution"))
    scores = {name: explanation.scores[name] for name in shown if name in explanation.scores}
    title, hint = _question(found), found.get("hint")
    return Answer(document, lambda: _show(title, scores, explanation.tokens, files, hint))


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _question(found: Mapping[str, Any]) -> str:
    """Return the question that the scores answer, with the probabilities of its words."""

    def word(role: str) -> str:
        probability = found.get(f"{role} probability")
        return repr(found[role]) + ("" if probability is None else f" (probability {probability})")

    if "contrast" not in found:
        return f"Why {word('target')}?"
    return f"Why {word('target')}, and not {word('contrast')}?"


def _score(options: Namespace, model: Any, tokenizer: Any, prompt: Any) -> Answer:
    """Score tokens by a measure of layers, or for an output of several tokens."""
    template = options.chat_template_kwargs
    of_target = options.target is not None and options.method is None
    method = options.method or (measures.TARGET if of_target else "contribution")
    entry = measures.find(method)
    assert entry is not None  # the parser accepts only registered names
    reduction: Reduction = options.reduction or "mean"
    measure = entry.of_model(model)
    if options.target is None:
        read = read_text(
            tokenizer, prompt, add_generation_prompt=True, chat_template_kwargs=template
        )
        ids = read.ids.to(device_of(model))
        reduction = "sum" if entry.explains_target else reduction
        scorer = TokenScores(measure, reduction=reduction)
        scores = scorer.attribute(ids, show_progress=True)[0].cpu()
        tokens = readable_tokens(tokenizer, ids[0])
        what = " for the prediction" if entry.explains_target else ""
        title = f"{method}{what}, {reduction} over the positions of the text"
        if options.out is not None:
            is_usual = reduction == "mean" or entry.explains_target
            label = method if is_usual else f"{method}, {reduction}"
            _explanation(model, tokenizer, ids, label, scores).save_page(options.out)
    else:
        check_generates_text(
            model, "leave --target out to score the tokens of the text in its attention layers"
        )
        result = LLMTokenAttribution(measure, tokenizer).attribute(
            prompt,
            target=options.target,
            contrast=options.contrast,
            chat_template_kwargs=template,
            show_progress=True,
        )
        tokens, scores = result.input_tokens, result.seq_attr
        rather = "" if options.contrast is None else f", and not {options.contrast!r}"
        title = f"{method}, for the output {options.target!r}{rather}"
        if options.out is not None:
            Explanation.from_llm(result, method).save_page(options.out)
    files = [] if options.out is None else [str(options.out)]
    document = {
        "model": options.model,
        "method": method,
        "reduction": reduction if options.target is None else None,
        "target": options.target,
        "contrast": options.contrast,
        "probability": None,
        "contrast_probability": None,
        "tokens": tokens,
        "scores": scores.tolist(),
        "files": files,
    }
    return Answer(document, lambda: _show(title, {method: scores}, tokens, files))


def _check_usage(options: Namespace) -> None:
    usage_error = options.parser.error
    if options.target is not None and options.reduction is not None:
        usage_error("--reduction applies to all positions, --target to some: give one of them")
    if options.contrast is not None and options.target is None:
        usage_error("--contrast is subtracted from a target: give --target too")
    entry = None if options.method is None else measures.find(options.method)
    explains_target = entry is None or entry.explains_target
    of_target = ", ".join(x.name for x in measures.entries(targets=True) if x.explains_target)
    if options.contrast is not None and not explains_target:
        usage_error(f"--contrast needs --method {of_target}, or none")
    if options.data is not None and options.target is not None and not explains_target:
        usage_error(
            f"--method {options.method} has no target in a set of texts: leave --target out, or "
            f"give --method {of_target}"
        )
    if entry is not None and explains_target and options.reduction is not None:
        usage_error(f"--reduction does not apply to --method {options.method}: leave it out")
    if options.chat_template_kwargs is not None and not options.chat:
        usage_error("--chat-template-kwargs applies to a chat: give --chat too")


def _check_single(options: Namespace) -> None:
    usage_error = options.parser.error
    for name in ("samples", "length", "batch_tokens", "shard_size"):
        if getattr(options, name) is not None:
            usage_error(f"--{name.replace('_', '-')} applies to a set of texts: give --data")
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
        _say_without_maps(ids.shape[1])
        return Explanation(readable_tokens(tokenizer, ids[0]), {label: scores})
    explanation = explain(model, tokenizer, ids, show_progress=True)
    return replace(explanation, scores={**explanation.scores, label: scores})


def _say_without_maps(T: int) -> None:
    print(
        f"The text has {T} tokens, so its page shows scores but not maps. Maps grow with the "
        f"square of the length; pages of up to {MAPPED} tokens have them.",
        file=sys.stderr,
    )


def _show(
    title: str,
    scores: Mapping[str, Tensor],
    tokens: Sequence[str],
    files: Sequence[str],
    hint: str | None = None,
) -> None:
    out = console()
    out.print(Text(title, style="bold"), end="\n\n")
    normalized = normalized_scores(scores, tokens, sink(tokens))
    first = next(iter(scores))
    coloured_text(out, tokens, normalized[first])
    top = scores[first].abs().topk(min(TOP, len(tokens))).indices.tolist()
    out.print(token_table(tokens, scores, normalized, top))
    out.print(SINK_NOTE, style="dim")
    if hint is not None:
        out.print(Text(hint, style="bold"))
    if files:
        show_files(files)
