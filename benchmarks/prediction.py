"""Measure which scores find what one prediction rests on.

    python benchmarks/prediction.py --model M --data lambada=FILE

Each text is read up to its last word. If the model predicts the first token of that word, the text
is used. Pairs of head and token, or whole tokens, are removed in the order of a score, and the
table shows the change of the log-probability of the prediction. Each setting is an evaluation in a
folder of its own, and a run that was stopped resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from evidence import Question, begin_token, input_x_gradient, integrated_gradients
from pages import fill_page, is_whole, legend, loaded, made_by, parser_of, save_picture
from peers_of_removal import register_peers
from ranking import LEADERS, OF_TOKENS, PAPER, SCORES, Results, figure, first_table, standings
from torch import Tensor

from captum_cw import ComprehensivenessSufficiency, measures, scale_values
from captum_cw._utils.progress import progress_bar
from captum_cw.data import load_texts
from captum_cw.metrics import FaithfulnessResult
from captum_cw.models.loading import origin
from captum_cw.removal.ranking import Which

RATES: dict[Which, Sequence[float]] = {"bottom": (0.7, 0.9, 0.95), "top": (0.01, 0.03, 0.1)}
COMPARED = (
    *(PAPER, "vwon", "attention", *LEADERS, "effect, plain", "target, frozen", "target, attnlrp"),
    *("target, plain", measures.RANDOM),
)
#: The scores of the first table, beside contributions.
FIRST = (*LEADERS, "target, frozen", "attention")
SETTINGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "pair": ("pairs of all layers ranked together", {"ranking": "global"}),
    "token": ("whole tokens", {"granularity": "token"}),
}


def predictions(texts: Sequence[str], model: Any, tokenizer: Any) -> Iterator[Tensor]:
    """Yield the ids ``(1, T)`` of the texts whose last word the model predicts, without it."""
    begin = begin_token(tokenizer)
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        ids = [begin, *tokenizer(context, add_special_tokens=False).input_ids]
        whole = [begin, *tokenizer(f"{context} {word}", add_special_tokens=False).input_ids]
        given = torch.tensor([ids])
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            continue  # the context ends within a token
        with torch.no_grad():
            if int(model(given).logits[0, -1].argmax()) == whole[len(ids)]:
                yield given


def _question(model: Any, ids: Tensor) -> Question:
    with torch.no_grad():
        return Question(ids[0].tolist(), [], int(model(ids).logits[0, -1].argmax()), None)


def gradient_x_input(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the sizes of embedding times gradient, ``(1, T)``."""
    return input_x_gradient(model, [_question(model, batch["input_ids"])]).abs()


def path_gradients(model: Any, tokenizer: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the sizes of Integrated Gradients, ``(1, T)``."""
    question = _question(model, batch["input_ids"])
    return integrated_gradients(model, tokenizer, [question]).abs()


def ablation(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the prediction loses without each token alone, ``(1, T)``, with its sign."""
    ids = batch["input_ids"]

    def log_probabilities() -> Tensor:
        found: Tensor = model(ids).logits[0, -1].log_softmax(-1)
        return found

    with torch.no_grad():
        clean = log_probabilities()
        best, lost = int(clean.argmax()), []
        for position in range(ids.shape[1]):
            with scale_values(model, 0.0, [position]):
                lost.append(clean[best] - log_probabilities()[best])
    return torch.stack(lost)[None]


def methods_of(key: str, model: Any, tokenizer: Any) -> dict[str, object]:
    """Return the scores of a setting by name."""
    names = COMPARED if key == "pair" else (*COMPARED, *OF_TOKENS)
    found = {name: SCORES[name](model, "sum") for name in names}
    if key == "token":
        found["input x gradient"] = partial(gradient_x_input, model)
        found["Integrated Gradients"] = partial(path_gradients, model, tokenizer)
        found["ablation"] = partial(ablation, model)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("prediction", "Measure which scores find what one prediction rests on.")
    add = parser.add_argument
    add("--settings", default=",".join(SETTINGS), help="what is removed")
    add("--samples", type=int, default=32, help="number of texts, from the last one on")
    return parser


def evaluated(
    model: Any, tokenizer: Any, key: str, texts: Sequence[Tensor], records: Path
) -> FaithfulnessResult:
    """Run the missing part of one evaluation, and return its result."""
    metric = ComprehensivenessSufficiency(
        model, RATES, quantity="log_prob", scoring="clean", reduction="sum", **SETTINGS[key][1]
    )
    batches = [{"input_ids": ids} for ids in texts]
    records.parent.mkdir(parents=True, exist_ok=True)
    methods = methods_of(key, model, tokenizer)
    return metric.evaluate(methods, batches, resume_from=records)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing evaluations, and fill the page."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    register_peers()
    chosen, weights = options.settings.split(","), []
    results: Results = {}
    sources = options.model or [None]
    with progress_bar(len(sources) * len(chosen) * len(options.data), "Settings", show=True) as bar:
        for source in sources:
            model, tokenizer, name = loaded(source, options.threads)
            weights.append(origin(model))
            for data, file in options.data:
                right = predictions(load_texts(file)[::-1], model, tokenizer)
                texts = list(islice(right, options.samples))
                for key in chosen:
                    bar.set_postfix_str(f"{name}, {data}, {key}")
                    records = options.work / name / data / f"{key}.records"
                    if options.finished and not is_whole(records, len(texts)):
                        continue
                    result = evaluated(model, tokenizer, key, texts, records)
                    results[name, data, key] = result
                    bar.update()
    head = (
        f"{made_by('prediction', argv, options.commit, weights)} "
        f"The last {options.samples} texts of each set whose last word the model predicts; it "
        "reads them up to this word. Cells are changes of "
        "the log-probability of the prediction, in nats. Positive is a loss: with the bottom "
        "removed, lower is better; with the top removed, higher is better. "
        f"{legend(PAPER, 'texts')} Sizes are summed over queries in an unchanged pass, and "
        "sinks stay. `ablation` removes each token alone and keeps the sign of what the "
        "prediction loses."
    )
    first = [first_table(results, chosen[0], FIRST)]
    for key in chosen:
        of_key = {f"{name}, {data}": x for (name, data, of), x in results.items() if of == key}
        if of_key:
            save_picture(figure(of_key), options.out / f"prediction-{key}.png")
            first.append(f"![Where each score stands: {SETTINGS[key][0]}.](prediction-{key}.png)")
    tables = "\n\n".join(
        f"### {name}, {data}: {SETTINGS[key][0]}\n\n{result.to_markdown(PAPER)}\n\n"
        f"{len(result.records)} texts."
        for (name, data, key), result in results.items()
    )
    shown = {
        "first": "\n\n".join(first),
        "command": head,
        "all": standings(results, chosen, "removed"),
        "tables": tables,
    }
    fill_page(options.out / "prediction.md", "What does one prediction rest on?", shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
