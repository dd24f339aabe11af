"""Measure the cost of one explanation, in this package and in others: model passes and time.

    pip install captum inseq lxt bertviz
    python benchmarks/peers.py

All libraries explain one predicted token of one prompt, in one process. If a library is missing or
fails, its row says why: LXT 2.1 can be imported with transformers 4.57.1, but not with 5.23.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from captum_cw import ContributionWeights, LLMTokenAttribution, TokenScores, explain
from captum_cw.models.loading import load_demo_model, load_model

PROMPT = "In Germany people speak German, in Spain people speak Spanish, and in Italy people speak"
TARGET = " Italian"


@dataclass(frozen=True)
class Question:
    """The question for all libraries: why does ``model`` continue ``PROMPT`` with ``TARGET``?"""

    model: Any
    tokenizer: Any
    ids: Tensor
    target: int


def _token_scores(question: Question) -> object:
    return TokenScores(ContributionWeights(question.model), queries=-1).attribute(question.ids)


def _llm(question: Question) -> object:
    method = LLMTokenAttribution(ContributionWeights(question.model), question.tokenizer)
    return method.attribute(PROMPT, target=TARGET)


def _explain(question: Question) -> object:
    return explain(question.model, question.tokenizer, PROMPT)


def _integrated_gradients(question: Question) -> object:
    from captum.attr import LayerIntegratedGradients

    def log_probability(ids: Tensor) -> Tensor:
        logits: Tensor = question.model(ids, use_cache=False).logits[:, -1]
        return logits.log_softmax(-1)[:, question.target]

    embeddings = question.model.get_input_embeddings()
    return LayerIntegratedGradients(log_probability, embeddings).attribute(question.ids)


def _ablation(question: Question) -> object:
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    method = LLMAttribution(FeatureAblation(question.model), question.tokenizer)
    return method.attribute(TextTokenInput(PROMPT, question.tokenizer), target=TARGET)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Use eager attention, the only one that returns maps, and restore the model's own after."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def _inseq(name: str, question: Question) -> object:
    import inseq

    with _eager(question.model) if name in NEED_MAPS else nullcontext():
        method = inseq.load_model(question.model, name, tokenizer=question.tokenizer)
        return method.attribute(PROMPT, PROMPT + TARGET, show_progress=False)


def _lxt(question: Question) -> object:
    embeddings = question.model.get_input_embeddings()(question.ids).detach().requires_grad_()
    logits = question.model(inputs_embeds=embeddings, use_cache=False).logits
    logits[0, -1, question.target].backward()
    return (embeddings * embeddings.grad).sum(-1)


def _bertviz(question: Question) -> object:
    from bertviz import head_view

    with torch.no_grad(), _eager(question.model):
        maps = question.model(question.ids, output_attentions=True).attentions
    tokens = question.tokenizer.convert_ids_to_tokens(question.ids[0])
    return head_view(maps, tokens, html_action="return")


OURS = "captum_cw"
NEED_MAPS = ("attention", "value_zeroing")

# LXT comes last: it changes the classes of transformers for the rest of the process.
CALLS: dict[tuple[str, str], Callable[[Question], object]] = {
    (OURS, "TokenScores"): _token_scores,
    (OURS, "LLMTokenAttribution"): _llm,
    (OURS, "explain"): _explain,
    ("captum", "LayerIntegratedGradients"): _integrated_gradients,
    ("captum", "LLMAttribution(FeatureAblation)"): _ablation,
    ("inseq", "saliency"): partial(_inseq, "saliency"),
    ("inseq", "attention"): partial(_inseq, "attention"),
    ("inseq", "value_zeroing"): partial(_inseq, "value_zeroing"),
    ("bertviz", "head_view"): _bertviz,
    ("lxt", "AttnLRP"): _lxt,
}


@contextmanager
def _passes(model: Any) -> Iterator[Counter[str]]:
    """Count the texts that pass through the model's last layer, forward and backward.

    Texts are counted, not calls, because fifty steps cost the same in one batch as one by one.
    """
    counter: Counter[str] = Counter()
    head = model.get_output_embeddings()
    hooks = [
        head.register_forward_hook(lambda _, __, output: counter.update(forward=len(output))),
        head.register_full_backward_hook(lambda _, __, out: counter.update(backward=len(out[0]))),
    ]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _plain(question: Question) -> object:
    with torch.no_grad():
        return question.model(question.ids)


def measured(library: str, question: Question, call: Callable[[Question], object], n: int) -> str:
    """Return the cells of a row: both kinds of passes, and the time over a forward pass."""
    if library == "lxt":
        from lxt.efficient import monkey_patch

        monkey_patch(sys.modules[type(question.model).__module__])
    with _passes(question.model) as counter:
        call(question)
    _plain(question)
    ratios = [
        _seconds(partial(call, question)) / _seconds(partial(_plain, question)) for _ in range(n)
    ]
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    return f"{counter['forward']} | {counter['backward']} | {median(ratios):.1f} ({spread})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table with a row for each explanation."""
    parser = argparse.ArgumentParser(
        description="Measure the cost of one explanation in each library."
    )
    parser.add_argument("--model", help="a hub id or a local folder; without it, the demo model")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed runs")
    options = parser.parse_args(argv)
    model, tokenizer = load_demo_model() if options.model is None else load_model(options.model)
    # No method needs gradients of weights, so users turn them off.
    model.requires_grad_(False)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    target = tokenizer(TARGET, add_special_tokens=False).input_ids[0]
    question = Question(model, tokenizer, ids, target)
    print(
        f"{ids.shape[1]} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    print("| library | explanation | forward | backward | time over a forward pass |")
    print("| --- | --- | ---: | ---: | ---: |")
    for (library, name), call in CALLS.items():
        try:
            # Each call gets a copy, because a method that fails may leave its hooks in the model.
            asked = replace(question, model=copy.deepcopy(model))
            cells = measured(library, asked, call, options.repeats)
            named = f"{library} {version(library)}" if library != OURS else OURS
        except Exception as error:  # the other libraries are still measured
            reason = str(error).strip().split("\n")[0]
            named, cells = library, f"{type(error).__name__}: {reason} | | "
        print(f"| {named} | {name} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
