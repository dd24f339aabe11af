"""``captum-cw evaluate``: measure which method finds the tokens that matter."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_cw._utils.extras import imported
from captum_cw._utils.processes import Processes
from captum_cw.capture.model import device_of
from captum_cw.cli.answer import Answer, show_files
from captum_cw.cli.output import load, observe_longest
from captum_cw.cli.run_folder import save_result
from captum_cw.data import STREAMED, load_texts, token_batches
from captum_cw.metrics import ComprehensivenessSufficiency, FaithfulnessResult
from captum_cw.metrics.result import COMPARABLE, Side, Statistic
from captum_cw.metrics.tasks import TaskResult, check_task_model, evaluate_tasks
from captum_cw.removal.options import RemovalKeywords

#: The rates of tasks without ``--rates``.
TASK_RATES = (0.3, 0.5, 0.7)


def run(options: Namespace) -> Answer | None:
    """Evaluate methods on texts, tasks or both. Only the main process returns an answer."""
    processes = Processes()
    _check_usage(options, processes)
    # What can fail quickly comes first.
    imported("pandas", "evaluate")
    if options.tasks is not None:
        imported("lm_eval", "tasks")
    texts = None
    if options.data is not None:
        samples = None if options.pack else options.samples
        texts = load_texts(options.data, samples=samples, lines=options.lines)
    model, tokenizer = load(options, options.model, processes)
    if options.tasks is not None:
        check_task_model(model, tokenizer)

    files: list[Path] = []
    result, tasks = None, None
    if texts is not None:
        result, files = _evaluate_texts(options, model, tokenizer, texts, processes)
    if options.tasks is not None:
        tasks = _evaluate_tasks(options, model, tokenizer)
        files = files + save_result(tasks, options.out)
    if not processes.is_main:
        return None

    document = {
        "model": options.model,
        "data": options.data,
        "methods": options.methods,
        "texts": None if result is None else _document_of_texts(result),
        "tasks": None if tasks is None else _document_of_tasks(tasks),
        "files": [str(file) for file in files],
    }
    return Answer(document, lambda: _show(document, result, tasks))


def _check_usage(options: Namespace, processes: Processes) -> None:
    usage_error = options.parser.error
    if options.data is None and options.tasks is None:
        usage_error("give --data, --tasks, or both")
    if options.pack and options.data in STREAMED:
        usage_error(
            f"--pack joins all texts, and {options.data} is too large to load in full: leave "
            "--pack out, or give a file with a part of it"
        )
    if options.tasks and processes.count > 1:
        usage_error("--tasks runs in one process; only --data can be shared between processes")
    if options.chat_template_kwargs is not None and not options.apply_chat_template:
        usage_error("--chat-template-kwargs needs --apply-chat-template")
    if options.apply_chat_template and options.tasks is None:
        usage_error("--apply-chat-template needs --tasks")


def _evaluate_texts(
    options: Namespace,
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    processes: Processes,
) -> tuple[FaithfulnessResult, list[Path]]:
    batches = token_batches(
        texts,
        tokenizer,
        max_length=options.length,
        num_examples=options.samples,
        batch_size=options.batch_size,
        pack=options.pack,
        bos=options.bos,
    )
    device = device_of(model)
    batches = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
    metric = ComprehensivenessSufficiency(
        model,
        options.rates,
        quantity=options.quantity,
        **_masking(options, model, tokenizer),
        **_removal(options),
    )
    observe_longest(model, max(batches, key=lambda batch: batch["input_ids"].shape[1]))
    result = metric.evaluate(
        {name: name for name in options.methods},
        batches,
        resume_from=options.out / "run.records",
        shard=processes.count > 1,
    )
    return result, save_result(result, options.out) if processes.is_main else []


def _removal(options: Namespace) -> RemovalKeywords:
    """Return the options of removal as keyword arguments of the library."""
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
    """Return the arguments by which a masked language model predicts each token from a mask."""
    masked = type(model).__name__.endswith("ForMaskedLM") and tokenizer.mask_token_id is not None
    if not masked or options.quantity not in ("perplexity", "nll"):
        return {}
    return {"mask_token_id": tokenizer.mask_token_id, "protected_ids": tokenizer.all_special_ids}


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
# For programs


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
                "better": _comparisons(result, side, "mean"),
                **({"corpus": _of_corpus(result, side)} if result.has_likelihood else {}),
            }
            for side, which in result.sides.items()
        },
    }


def _of_corpus(result: FaithfulnessResult, side: Side) -> dict[str, Any]:
    """Return the changes of the corpus perplexity, which the printed table shows."""
    return {
        "delta": {name: of[side].tolist() for name, of in result.corpus.items()},
        "better": _comparisons(result, side, "corpus"),
    }


def _comparisons(
    result: FaithfulnessResult, side: Side, statistic: Statistic
) -> dict[str, list[str | None]]:
    """Compare each method with the first: the better one at each rate, None if undecided."""
    first, *others = result.methods
    if len(result.records) < COMPARABLE:
        return {name: [None] * len(result.rates[result.sides[side]]) for name in others}
    return {
        name: list(result.compare(first, name, side, statistic=statistic).better) for name in others
    }


def _document_of_tasks(result: TaskResult) -> dict[str, Any]:
    return {
        task: {
            "metric": result.metric[task],
            "documents": result.documents[task],
            "baseline": list(result.baseline[task]),
            "rates": list(result.rates),
            "accuracy": {name: result.scores[task][name].tolist() for name in result.methods},
            "at_most": {
                name: result.largest_rate(task, name) if result.has_interval(task) else None
                for name in result.methods
            },
        }
        for task in result.tasks
    }


# ---------------------------------------------------------------------------------------------
# For people


def _show(
    document: dict[str, Any], result: FaithfulnessResult | None, tasks: TaskResult | None
) -> None:
    print(*(x for x in (result, tasks) if x is not None), sep="\n\n")
    show_files(document["files"])
