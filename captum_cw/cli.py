"""The command line: ``captum-cw attribute``, ``evaluate``, ``reproduce`` and ``demo``.

Results go to standard output; progress and errors to standard error. The exit code is 0 for
success, 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

import captum_cw
from captum_cw.attr import ContributionWeights, LLMTokenAttribution, TokenScores
from captum_cw.capture import StateSpace
from captum_cw.data import Bos, load_texts, token_batches
from captum_cw.demo import DEMO_TEXT, IG, IG_STEPS, explain_prediction, save_pictures, sink
from captum_cw.evaluation import evaluate_into, save_tasks
from captum_cw.functional import Reduction
from captum_cw.interventions import Scoring
from captum_cw.loading import DEMO_MODEL, load_demo_model, load_model
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.quantities import MetricName
from captum_cw.metrics.result import TITLES
from captum_cw.metrics.tasks import TaskResult, evaluate_tasks
from captum_cw.processes import Processes
from captum_cw.ranking import RateOf, Scope
from captum_cw.reproduce import (
    ITEMS,
    PAPER_DATA,
    PAPER_MODELS,
    PAPER_TASKS,
    PLANS,
    Study,
    StudyResults,
    reproduce,
)
from captum_cw.reproduce.claims import CLAIMS
from captum_cw.scoring import METHODS, known_names, pair_scorer
from captum_cw.visualization import readable_tokens, save_text, text_records
from captum_cw.visualization.text import normalized_scores

__all__ = ["main", "parser"]

TASK_RATES = (0.3, 0.5, 0.7)
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
    options = parser().parse_args(arguments)
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


def parser() -> argparse.ArgumentParser:
    """What reads the arguments of all commands."""
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
    _add_model(attribute)
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

    _add_evaluate(commands, common)
    _add_reproduce(commands, common)

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


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="hub id, local folder or .gguf file"
    )
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument(
        "--device", default="cpu", help="such as cuda, or auto to spread it (default: %(default)s)"
    )


def _add_evaluate(commands: Any, common: argparse.ArgumentParser) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        parents=[common],
        help="measure which method finds the tokens that matter",
        description="Remove what each method ranks highest, and lowest, and measure what the model "
        "loses. Goes on where a run of the same settings into the same folder stopped. Under "
        "torchrun, processes share the batches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.set_defaults(run=_evaluate, parser=evaluate)
    _add_model(evaluate)
    add = evaluate.add_argument
    add("--data", metavar="D", help="a set's name, such as gsm8k, or a file")
    add("--tasks", type=_words, metavar="A,B", help="tasks of lm-evaluation-harness, for accuracy")
    add("--task-path", type=Path, metavar="DIR", help="folder of task files of your own")
    add(
        "--methods",
        type=_names,
        default=",".join((*METHODS, "random")),
        metavar="A,B",
        help=f"of {known_names()}",
    )
    add("--rates", type=_numbers, metavar="P,Q", help="fractions to remove, for both sides")
    add("--reduction", choices=get_args(Reduction), default="mean", help="of scores over queries")
    add("--scoring", choices=get_args(Scoring), default="online", help="when scores are taken")
    add("--scope", choices=get_args(Scope), default="layer", help="over which pairs are ranked")
    add("--rate-of", choices=get_args(RateOf), default="removable", help="pairs that rates count")
    add("--metric", choices=get_args(MetricName), default="perplexity", help="what the model loses")
    add("--granularity", choices=("pair", "token"), default="pair", help="what is removed")
    add("--allow-sinks", action="store_true", help="remove attention sinks like any token")
    add("--sink-space", choices=get_args(StateSpace), default="normed", help="of their states")
    add("--length", type=int, default=512, metavar="T", help="cut texts to so many tokens")
    add("--pack", action="store_true", help="join texts to exactly that length")
    add("--bos", choices=get_args(Bos), default="auto", help="begin token of packed texts")
    add("--samples", type=int, default=64, metavar="N", help="number of texts")
    add("--batch-size", type=int, default=8, metavar="B", help="texts in one pass")
    add("--seed", type=int, default=0, help="of random scores")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run")


def _add_reproduce(commands: Any, common: argparse.ArgumentParser) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        parents=[common],
        help="compute the tables and figures of the paper, in one report",
        description="Compute every table and figure of arXiv 2606.07604 on models and texts, judge "
        "its claims, and write one HTML report beside the numbers. Goes on where a run of the same "
        "settings into the same folder stopped.",
    )
    reproduce.set_defaults(run=_reproduce, parser=reproduce)
    add = reproduce.add_argument
    add("--model", action="append", metavar="M", help="hub id, local folder or .gguf file; repeats")
    _add_place(reproduce)
    add(
        "--data",
        action="append",
        metavar="D",
        help="a set's name, such as gsm8k, or a file; repeats",
    )
    add("--only", type=_words, metavar="T1,F5b", help=f"of {', '.join(ITEMS)}")
    size = reproduce.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a first look, in minutes")
    size.add_argument(
        "--preset",
        choices=PLANS,
        default="full",
        help="how much is run; paper brings its models and sets, too (default: %(default)s)",
    )
    add("--samples", type=int, metavar="N", help="at most so many texts, of all items")
    add("--length", type=int, metavar="T", help="at most so many tokens a text, of all items")
    add("--tasks", type=_words, metavar="A,B", help="tasks of lm-evaluation-harness, for F4")
    add("--task-path", type=Path, metavar="DIR", help="folder of task files of your own")
    add("--seed", type=int, default=0, help="of random choices (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report")


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        pair_scorer(name)  # raises where it is unknown
    return names


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _attribute(options: argparse.Namespace) -> None:
    usage_error = options.parser.error
    if options.target is not None and options.reduction is not None:
        usage_error("--reduction is over all positions, --target explains some: give one of them")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        usage_error(f"--out {options.out}: there is no folder {options.out.parent}")
    text = options.text if options.file is None else _read(options.file)
    if not text:
        usage_error("the text is empty: give at least one token")

    model, tokenizer = _load(options.model, options)
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


def _evaluate(options: argparse.Namespace) -> None:
    if options.data is None and options.tasks is None:
        options.parser.error("give --data, --tasks, or both")
    processes = Processes()
    if options.tasks and processes.count > 1:
        options.parser.error("--tasks run in one process; --data can be shared between several")
    files = []
    texts = None
    if options.data is not None:  # first: that fails quickly
        texts = load_texts(options.data, samples=None if options.pack else options.samples)
    model, tokenizer = _load(options.model, options, processes)
    if texts is not None:
        files += _evaluate_texts(options, model, tokenizer, texts, processes)
    if options.tasks is not None:
        files += _evaluate_tasks(options, model, tokenizer)
    if processes.is_main:
        print("\nSaved:", *files, sep="\n  ")


def _evaluate_texts(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    processes: Processes,
) -> list[Path]:
    metric = ComprehensivenessSufficiency(
        model,
        options.rates,
        scoring=options.scoring,
        scope=options.scope,
        rate_of=options.rate_of,
        protect_sinks=not options.allow_sinks,
        sink_space=options.sink_space,
        metric=options.metric,
        reduction=options.reduction,
        granularity=options.granularity,
        seed=options.seed,
    )
    batches = token_batches(
        texts,
        tokenizer,
        length=options.length,
        samples=options.samples,
        batch_size=options.batch_size,
        pack=options.pack,
        bos=options.bos,
    )
    place = next(model.parameters()).device
    result, files = evaluate_into(
        options.out,
        metric,
        {name: name for name in options.methods},
        [{name: x.to(place) for name, x in batch.items()} for batch in batches],
        shard=processes.count > 1,
        show_progress=True,
    )
    if processes.is_main:
        _print_result(result)
    return files


def _evaluate_tasks(options: argparse.Namespace, model: Any, tokenizer: Any) -> list[Path]:
    result = evaluate_tasks(
        model,
        tokenizer,
        options.tasks,
        {name: name for name in options.methods},
        options.rates or TASK_RATES,
        task_path=options.task_path,
        limit=options.samples,
        batch_size=options.batch_size,
        scoring=options.scoring,
        scope=options.scope,
        reduction=options.reduction,
        protect_sinks=not options.allow_sinks,
        sink_space=options.sink_space,
        seed=options.seed,
        resume_from=options.out / "tasks.records",
        show_progress=True,
    )
    _print_tasks(result)
    return save_tasks(result, options.out)


def _reproduce(options: argparse.Namespace) -> None:
    plan = PLANS["quick" if options.quick else options.preset]
    plan = replace(plan.resized(options.samples, options.length), seed=options.seed)
    paper = plan.name == "paper"
    models = options.model or (PAPER_MODELS if paper else ())
    data = options.data or (PAPER_DATA if paper else ())
    if not models or not data:
        options.parser.error("give --model and --data, or --preset paper, which brings its own")
    needed = max(plan.texts, plan.correlations[0], plan.scaling[0], plan.removal[0])
    texts = {name: load_texts(name, samples=needed) for name in data}  # first: that fails quickly

    def studies() -> Iterator[Study]:
        for name in models:
            model, tokenizer = _load(name, options)
            asked = options.tasks or (PAPER_TASKS if paper else ())
            for of, several in texts.items():
                named = _called(name), _called(of)
                yield Study(model, tokenizer, several, *named, plan, asked, options.task_path)
                asked = ()  # they are the same beside other texts

    tell = partial(print, file=sys.stderr)
    found, files = reproduce(studies(), options.out, only=options.only, tell=tell)
    for study in found:
        _print_claims(study)
    print("\nSaved:", *files, sep="\n  ")


def _called(name: str) -> str:
    """A file or folder by its own name, since its place means nothing to a reader."""
    path = Path(name)
    return path.stem if path.exists() else name


def _print_claims(study: StudyResults) -> None:
    console = Console(highlight=False)
    table = Table("claim", "verdict", "figures")
    for claim in CLAIMS:
        judgement = study.judgement(claim)
        if judgement.verdict != "not run":
            table.add_row(claim.name, judgement.verdict, judgement.figures)
    console.print(f"\n{study.model} on {study.data}")
    console.print(table)


def _print_tasks(result: TaskResult) -> None:
    console = Console(highlight=False)
    for task in result.tasks:
        baseline = result.baseline[task]
        table = Table("method", *(f"{100 * rate:g}%" for rate in result.rates), "at most")
        for name in result.methods:
            rate = result.largest_rate(task, name)
            cells = [f"{x:.3f}" for x in result.scores[task][name].tolist()]
            table.add_row(name, *cells, "none" if rate is None else f"{100 * rate:g}%")
        console.print(
            f"\n{task}: {result.metric[task]} of {result.documents[task]} documents, bottom "
            f"removed; unchanged {baseline.value:.3f} (standard error {baseline.stderr:.3f})"
        )
        console.print(table)
    console.print(
        "At most: the largest fraction removed that leaves the accuracy within the 95% interval of "
        "the unchanged one.",
        style="dim",
    )


def _print_result(result: FaithfulnessResult) -> None:
    console = Console(highlight=False)
    examples, processes = len(result.records), result.settings["processes"]
    console.print(
        f"{result.settings['metric']} of {examples} texts: {result.clean:.4g} (corpus perplexity "
        f"{result.clean_corpus:.4g}), {processes} process{'es' if processes > 1 else ''}"
    )
    for side, which in result.sides.items():
        table = Table("method")
        for rate in result.rates[which]:
            table.add_column(f"{100 * rate:g}%", justify="right")
        table.add_column("AOPC", justify="right")
        for name in result.methods:
            deltas = result.deltas(name, side).mean(0).tolist()
            table.add_row(name, *map(_readable, (*deltas, result.aopc()[name][side])))
        console.print(f"\n{TITLES[side]}: mean delta")
        console.print(table)
    first, *others = result.methods
    for name in others:
        for side, which in result.sides.items():
            better = result.compare(first, name, side).better
            verdicts = {
                winner: ", ".join(
                    f"{100 * rate:g}%"
                    for rate, b in zip(result.rates[which], better, strict=True)
                    if b == winner
                )
                for winner in (first, name, None)
            }
            console.print(
                f"{side}, {first} against {name}: "
                + "; ".join(
                    f"{'undecided' if winner is None else f'{winner} better'} at {rates}"
                    for winner, rates in verdicts.items()
                    if rates
                ),
                style="dim",
            )
    console.print("Decided where the paired 95% bootstrap interval excludes zero.", style="dim")


def _readable(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


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


def _load(
    name: str, options: argparse.Namespace, processes: Processes | None = None
) -> tuple[Any, Any]:
    """The model, on the device of its process where there are several, and its tokenizer."""
    several = processes is not None and processes.count > 1
    if processes is None or processes.is_main:
        _announce(name)
    place: dict[str, Any] = {
        "dtype": getattr(torch, options.dtype),
        "device": processes.device if several and processes else options.device,
    }
    if name == DEMO_MODEL:  # has another source than the hub
        return load_demo_model(**place)
    return load_model(name, **place)


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
