"""``captum-cw attribute``: score the tokens of a text. :mod:`.attribute_set` scores sets."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
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
from captum_cw.cli.output import check_generates_text, coloured_text, load
from captum_cw.explanation.builder import explain
from captum_cw.explanation.explanation import Explanation
from captum_cw.explanation.page import MAPPED
from captum_cw.functional import Reduction
from captum_cw.text.prompts import read_text
from captum_cw.text.tokens import sink, word_numbers
from captum_cw.visualization import readable_tokens
from captum_cw.visualization.text import normalized_scores

#: The measures of a prediction.
OF_TARGET = (measures.TARGET, measures.INPUT)
#: The files of an explanation.
ENDINGS = (".html", ".json", ".safetensors")


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
    wanted = [x for x in (options.target, options.contrast) if x is not None]
    if wanted and options.method != measures.INPUT and model.can_generate():
        ids = [tokenizer.encode(x, add_special_tokens=False) for x in wanted]
        # Of two outputs, the first token in which they differ is explained.
        if max(map(len, ids)) > 1 and (len(ids) == 1 or ids[0][:1] == ids[1][:1]):
            return None
    read = read_text(
        tokenizer,
        prompt,
        add_generation_prompt=True,
        chat_template_kwargs=options.chat_template_kwargs,
    )
    explanation: Explanation = explain(
        model,
        tokenizer,
        prompt,
        target=options.target,
        contrast=options.contrast,
        top_k=0 if options.out is None or read.ids.shape[1] > MAPPED else 32,
        chat_template_kwargs=options.chat_template_kwargs,
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
    found = explanation.settings
    document = {
        "model": options.model,
        "method": method,
        "reduction": None,
        "target": _told(options.target, found["target"]),
        "contrast": _told(options.contrast, found.get("contrast")),
        "probability": _number(found.get("target probability")),
        "contrast_probability": _number(found.get("contrast probability")),
    }
    return _answer(options, explanation, method, document)


def _told(given: str | None, readable: str | None) -> str | None:
    """Return a target as it was given, or the first token of it, which was explained."""
    if given is not None and readable is not None and given.strip() == readable.strip():
        return given
    return readable


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


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
        what = " for the prediction" if entry.explains_target else ""
        title = f"{method}{what}, {reduction} over the positions of the text"
        is_usual = reduction == "mean" or entry.explains_target
        label = method if is_usual else f"{method}, {reduction}"
        explanation = _explanation(options, model, tokenizer, prompt, ids, {label: scores})
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
        rather = "" if options.contrast is None else f", and not {options.contrast!r}"
        title, label = f"{method}, for the output {options.target!r}{rather}", method
        explanation = Explanation.from_llm(result, method)
    document = {
        "model": options.model,
        "method": method,
        "reduction": reduction if options.target is None else None,
        "target": options.target,
        "contrast": options.contrast,
        "probability": None,
        "contrast_probability": None,
    }
    return _answer(options, explanation, label, document, title)


def _answer(
    options: Namespace,
    explanation: Explanation,
    method: str,
    document: Mapping[str, Any],
    title: str | None = None,
) -> Answer:
    """Save an explanation where a file is asked for, and return the answer of the command."""
    files = [] if options.out is None else [str(options.out)]
    if options.out is not None:
        explanation.save(options.out)
    whole = {
        **document,
        "tokens": list(explanation.tokens),
        "scores": explanation.scores[method].tolist(),
        "shares": [x.to_dict() for x in explanation.shares(method)],
        "files": files,
    }

    def show() -> None:
        _show(explanation, method, title, raw=options.raw)
        if files:
            show_files(files)

    return Answer(whole, show)


def _check_usage(options: Namespace) -> None:
    usage_error = options.parser.error
    if options.data is not None and options.raw:
        usage_error("--raw prints the scores of one text, and --data saves them: leave it out")
    for name in ("target", "contrast"):
        if getattr(options, name) == "":
            usage_error(f"--{name} is empty: give a word or a class, or leave it out")
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
    for name in ("lines", "samples", "length", "batch_tokens", "shard_size", "keep_going"):
        if getattr(options, name) is not None:
            usage_error(f"--{name.replace('_', '-')} applies to a set of texts: give --data")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        usage_error(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out is not None and options.out.is_dir():
        usage_error(f"--out {options.out} is a folder: give a file, such as page.html")
    if options.out is not None and options.out.suffix.lower() not in ENDINGS:
        usage_error(f"--out {options.out}: the file must end in {', '.join(ENDINGS)}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a UTF-8 text: convert it first. {error}") from error


def _explanation(
    options: Namespace,
    model: Any,
    tokenizer: Any,
    prompt: Any,
    ids: Tensor,
    scores: Mapping[str, Tensor],
) -> Explanation:
    """Return the explanation by the given scores, or by all measures where it is saved."""
    if options.out is None or ids.shape[1] > MAPPED:
        words = word_numbers(tokenizer, ids[0])
        return Explanation(readable_tokens(tokenizer, ids[0]), scores, words=words)
    explanation: Explanation = explain(
        model,
        tokenizer,
        prompt,
        chat_template_kwargs=options.chat_template_kwargs,
        show_progress=True,
    )
    return replace(explanation, scores={**explanation.scores, **scores})


def _show(explanation: Explanation, method: str, title: str | None, *, raw: bool) -> None:
    out = console()
    if title is not None:
        out.print(Text(title, style="bold"), end="\n\n")
    words = explanation if explanation.words is None else explanation.by_word()
    scores = {method: words.scores[method]}
    coloured_text(
        out, words.tokens, normalized_scores(scores, words.tokens, sink(words.tokens))[method]
    )
    if title is not None:  # the scores do not answer the question of the explanation
        explanation = replace(explanation, settings={})
    out.print(Text(explanation.summary(method=method, raw=raw)))
