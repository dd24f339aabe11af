"""``captum-cw evaluate``: which method finds the tokens that matter."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from captum_cw._utils.processes import Processes
from captum_cw.capture.run import Runner, ignore_layer
from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.console import console
from captum_cw.cli.output import load
from captum_cw.cli.problems import need
from captum_cw.cli.run_folder import evaluate_into, save_tasks
from captum_cw.data import load_texts, token_batches
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import COMPARABLE, REMOVED, TITLES
from captum_cw.metrics.tasks import TaskResult, check_task_model, evaluate_tasks
from captum_cw.removal.options import RemovalKeywords

TASK_RATES = (0.3, 0.5, 0.7)


def run(options: Namespace) -> Answer | None:
    """Evaluates methods on texts, on tasks, or on both; None in a process that only helps."""
    if options.data is None and options.tasks is None:
        options.parser.error("give --data, --tasks, or both")
    processes = Processes()
    if options.tasks and processes.count > 1:
        options.parser.error("--tasks run in one process; --data can be shared between several")
    if options.chat_template_kwargs is not None and not options.apply_chat_template:
        options.parser.error(
            "--chat-template-kwargs are for tasks that are asked in a chat: give "
            "--apply-chat-template too"
        )
    if options.apply_chat_template and options.tasks is None:
        options.parser.error("--apply-chat-template is of --tasks: give some")
    need("pandas", *["datasets"] * (options.data is not None), *["lm_eval"] * bool(options.tasks))

    files: list[Path] = []
    texts = None
    if options.data is not None:  # first: that fails quickly
        texts = load_texts(options.data, samples=None if options.pack else options.samples)
    model, tokenizer = load(options, options.model, processes)
    if options.tasks is not None:  # before the texts, which take long
        check_task_model(model, tokenizer)
    result, tasks = None, None
    if texts is not None:
        batches = _batches(options, model, tokenizer, texts)
        result, saved = _evaluate_texts(options, model, tokenizer, batches, processes)
        files += saved
    if options.tasks is not None:
        tasks = _evaluate_tasks(options, model, tokenizer)
        files += save_tasks(tasks, options.out)
    if not processes.is_main:
        return None

    def show() -> None:
        if result is not None:
            _show_texts(result)
        if tasks is not None:
            _show_tasks(tasks)
        show_files(files)

    document = {
        "model": options.model,
        "data": options.data,
        "methods": options.methods,
        "texts": None if result is None else _document_of_texts(result),
        "tasks": None if tasks is None else _document_of_tasks(tasks),
        "files": [str(file) for file in files],
    }
    return Answer(document, show)


def _batches(
    options: Namespace, model: Any, tokenizer: Any, texts: Sequence[str]
) -> list[dict[str, Tensor]]:
    batches = token_batches(
        texts,
        tokenizer,
        max_length=options.length,
        num_examples=options.samples,
        batch_size=options.batch_size,
        pack=options.pack,
        bos=options.bos,
    )
    place = next(model.parameters()).device
    return [{name: x.to(place) for name, x in batch.items()} for batch in batches]


def _evaluate_texts(
    options: Namespace,
    model: Any,
    tokenizer: Any,
    batches: list[dict[str, Tensor]],
    processes: Processes,
) -> tuple[FaithfulnessResult, list[Path]]:
    metric = ComprehensivenessSufficiency(
        model,
        options.rates,
        quantity=options.quantity,
        **_masking(options, model, tokenizer),
        **_removal(options),
    )
    _try_longest(model, batches)
    return evaluate_into(
        options.out,
        metric,
        {name: name for name in options.methods},
        batches,
        shard=processes.count > 1,
        show_progress=True,
    )


def _removal(options: Namespace) -> RemovalKeywords:
    """The options of removal, as the library takes them."""
    return {
        "reduction": options.reduction,
        "scoring": options.scoring,
        "ranking": options.ranking,
        "granularity": options.granularity,
        "rate_of": options.rate_of,
        "protect_sinks": not options.allow_sinks,
        "sink_space": options.sink_space,
        "seed": options.seed,
    }


def _masking(options: Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """How a masked language model predicts a token, where the metric asks for that."""
    masked = type(model).__name__.endswith("ForMaskedLM") and tokenizer.mask_token_id is not None
    if not masked or options.quantity not in ("perplexity", "nll"):
        return {}
    return {"mask_token_id": tokenizer.mask_token_id, "protected_ids": tokenizer.all_special_ids}


def _try_longest(model: Any, batches: list[dict[str, Tensor]]) -> None:
    """Observes the longest text, so that a model that cannot read it fails before the run.

    Raises:
        ValueError: If the model cannot read it.
    """
    batch, row = max(
        ((batch, row) for batch in batches for row in range(len(batch["input_ids"]))),
        key=lambda place: int(place[0]["attention_mask"][place[1]].sum()),
    )
    real = batch["attention_mask"][row] != 0
    longest = {"input_ids": batch["input_ids"][row, real][None]}
    try:
        Runner(model).observe(longest, ignore_layer)
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"The longest text, of {int(real.sum())} tokens, cannot be run: {error} (--length cuts "
            "texts.)"
        ) from error


def _evaluate_tasks(options: Namespace, model: Any, tokenizer: Any) -> TaskResult:
    return evaluate_tasks(
        model,
        tokenizer,
        options.tasks,
        {name: name for name in options.methods},
        options.rates or TASK_RATES,
        task_path=options.task_path,
        limit=options.samples,
        apply_chat_template=options.apply_chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        resume_from=options.out / "tasks.records",
        show_progress=True,
        **_removal(options),
    )


# ---------------------------------------------------------------------------------------------
# For machines


def _document_of_texts(result: FaithfulnessResult) -> dict[str, Any]:
    aopc = result.aopc()
    return {
        "quantity": result.settings["quantity"],
        "examples": len(result.records),
        "processes": result.settings["processes"],
        "clean": result.clean,
        "clean_corpus": result.clean_corpus if result.has_likelihood else None,
        **{
            side: {
                "rates": list(result.rates[which]),
                "delta": {name: result.deltas(name, side).mean(0).tolist() for name in aopc},
                "aopc": {name: aopc[name][side] for name in aopc},
                "better": _comparisons(result, side),
            }
            for side, which in result.sides.items()
        },
    }


def _comparisons(result: FaithfulnessResult, side: Any) -> dict[str, list[str | None]]:
    """By method: whether the first one, this one or none is better at each rate."""
    first, *others = result.methods
    if len(result.records) < COMPARABLE:
        return {name: [None] * len(result.rates[REMOVED[side]]) for name in others}
    return {name: list(result.compare(first, name, side).better) for name in others}


def _document_of_tasks(result: TaskResult) -> dict[str, Any]:
    return {
        task: {
            "metric": result.metric[task],
            "documents": result.documents[task],
            "baseline": list(result.baseline[task]),
            "rates": list(result.rates),
            "accuracy": {name: result.scores[task][name].tolist() for name in result.methods},
            "at_most": {name: result.largest_rate(task, name) for name in result.methods},
        }
        for task in result.tasks
    }


# ---------------------------------------------------------------------------------------------
# For people


def _show_texts(result: FaithfulnessResult) -> None:
    out = console()
    examples, processes = len(result.records), result.settings["processes"]
    corpus = f" (corpus perplexity {result.clean_corpus:.4g})" if result.has_likelihood else ""
    out.print(
        f"{result.settings['quantity']} of {examples} text{'s' if examples > 1 else ''}: "
        f"{result.clean:.4g}{corpus}, {processes} process{'es' if processes > 1 else ''}"
    )
    for side, which in result.sides.items():
        table = Table("method")
        for rate in result.rates[which]:
            table.add_column(f"{100 * rate:g}%", justify="right")
        table.add_column("AOPC", justify="right")
        for name in result.methods:
            deltas = result.deltas(name, side).mean(0).tolist()
            table.add_row(name, *map(_readable, (*deltas, result.aopc()[name][side])))
        out.print(f"\n{TITLES[side]}: mean delta")
        out.print(table)
    if examples < COMPARABLE:
        out.print("One text: no interval, so no method is told to be better.", style="dim")
        return
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
            out.print(
                f"{side}, {first} against {name}: "
                + "; ".join(
                    f"{'undecided' if winner is None else f'{winner} better'} at {rates}"
                    for winner, rates in verdicts.items()
                    if rates
                ),
                style="dim",
            )
    out.print("Decided where the paired 95% bootstrap interval excludes zero.", style="dim")


def _show_tasks(result: TaskResult) -> None:
    out = console()
    for task in result.tasks:
        baseline = result.baseline[task]
        table = Table("method", *(f"{100 * rate:g}%" for rate in result.rates), "at most")
        for name in result.methods:
            rate = result.largest_rate(task, name)
            cells = [f"{x:.3f}" for x in result.scores[task][name].tolist()]
            table.add_row(name, *cells, "none" if rate is None else f"{100 * rate:g}%")
        out.print(
            f"\n{task}: {result.metric[task]} of {result.documents[task]} documents, bottom "
            f"removed; unchanged {baseline.value:.3f} (standard error {baseline.stderr:.3f})"
        )
        out.print(table)
    out.print(
        "At most: the largest fraction removed that leaves the accuracy within the 95% interval of "
        "the unchanged one.",
        style="dim",
    )


def _readable(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
