"""The accuracy on downstream tasks after tokens are removed (Fig. 4 of arXiv 2606.07604).

lm-evaluation-harness builds the prompts, runs the model and computes the metrics. It runs each
document inside :func:`~captum_cw.remove_tokens`, as a batch of one. (In larger batches it pads
texts without a mask, so padding would be ranked and removed.)
"""

from __future__ import annotations

import copy
import io
import json
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import nn

from captum_cw._utils.extras import imported
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records
from captum_cw._utils.suggestions import suggestion
from captum_cw._utils.versions import versions
from captum_cw.capture.model import evaluation_mode, unwrapped
from captum_cw.metrics.faithfulness import checked_methods, checked_rates
from captum_cw.metrics.identity import check_identified, described, fingerprint
from captum_cw.metrics.task_result import Score, TaskResult
from captum_cw.removal.interventions import remove_tokens
from captum_cw.removal.options import RemovalKeywords, options_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack  # in typing since Python 3.11

__all__ = ["Score", "TaskResult", "check_task_model", "evaluate_tasks"]

#: The resamples for standard errors without a formula. The harness's default of 100 000 takes
#: minutes for each evaluation.
BOOTSTRAP_SAMPLES = 1000
#: The methods of a model that the harness calls with its prompts.
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
#: The harness's default seeds.
PYTHON_SEED, OTHER_SEED = 0, 1234

Removal = Callable[[str], AbstractContextManager[None]]
"""Returns the context in which a document with this prompt is run."""


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    methods: Mapping[str, object],
    rates: Sequence[float],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    resume_from: str | Path | None = None,
    show_progress: bool = False,
    **options: Unpack[RemovalKeywords],
) -> TaskResult:
    """Evaluate tasks of lm-evaluation-harness, unchanged and by method and rate of removal.

    Every evaluation uses the harness's default seeds, so runs repeat. The caller's random states
    are restored.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's tokenizer.
        tasks: the names of tasks, or of groups with a score of their own, such as ``"mmlu"``.
        methods: by a name of your choice, a method of :func:`captum_cw.remove_tokens`.
        rates: the fractions to remove from the bottom of the ranking, ascending, in (0, 1].
        task_path: a folder with your own task files (``.yaml``). If it has all the tasks, the
            harness's own thousands are not searched, which saves several seconds.
        limit: the number of documents per task, from the first; None for all.
        apply_chat_template: whether the tokenizer's chat template is applied to the prompts.
        chat_template_kwargs: arguments for the chat template, such as
            ``{"enable_thinking": False}``.
        resume_from: a file that keeps every finished evaluation of a task. An interrupted run with
            the same settings, documents and model resumes from it, and gives the same numbers.
        show_progress: whether to show a progress bar after two seconds.
        options: how pairs are scored, ranked and protected, as for ``remove_tokens``. With
            ``"random"``, each prompt has random scores of its own, which repeat with ``seed``.

    Returns:
        The accuracy and its standard error by task, method and rate.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        TypeError: If the model is not a causal language model of transformers, the tokenizer is
            not one of transformers, or a method cannot be used for removal.
        ValueError: If a task is unknown, is a group without a score of its own, or has no metric
            that is better if higher; if the tokenizer lacks an end token or the chat template; or
            if a choice is out of range.
        NotADirectoryError: If ``task_path`` is not a folder.
        RecordsError: If ``resume_from`` is damaged, or belongs to another run.

    Example:
        >>> methods = {"contribution": ContributionWeights(model), "attention": "attention"}
        >>> result = evaluate_tasks(
        ...     model, tokenizer, ["winogrande"], methods, [0.3, 0.5, 0.7], limit=100
        ... )  # doctest: +SKIP
        >>> result.largest_rate("winogrande", "contribution")  # doctest: +SKIP
        0.7
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list of one name or more, got {tasks!r}.")
    methods = checked_methods(methods)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all documents, got {limit}.")
    if chat_template_kwargs and not apply_chat_template:
        raise ValueError("chat_template_kwargs needs apply_chat_template=True.")
    checked = checked_rates({"bottom": rates})["bottom"]
    model = unwrapped(model)
    check_task_model(model, tokenizer)
    removals: dict[tuple[str, float], Removal] = {}
    for (name, method), rate in product(methods.items(), checked):
        removals[name, rate] = partial(_removal, model, method, rate, options)
        with removals[name, rate](""):
            pass  # raises an error if a choice is unknown
    with evaluation_mode([model], model):
        lm = _harness_model(model, tokenizer, chat_template_kwargs)
        loaded = _load_tasks(lm, tasks, task_path, limit, apply_chat_template)
        settings = {
            "rates": list(checked),
            **asdict(options_from(options)),
            "limit": limit,
            "apply_chat_template": apply_chat_template,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
            "tasks": {task.name: task.checksum() for task in loaded},
            "methods": {name: described(method, model) for name, method in methods.items()},
            "model": getattr(model.config, "name_or_path", None),
            "weights": fingerprint(model),
            "tokenizer": _tokenizer_checksum(tokenizer),
            "versions": versions("captum", "lm_eval"),
        }
        records = _evaluate(loaded, removals, settings, resume_from, show_progress)
    return TaskResult(checked, settings, records)


def check_task_model(model: object, tokenizer: object) -> None:
    """Check that the harness can evaluate a model and its tokenizer.

    Raises:
        TypeError: If the model is not a causal language model of transformers, or the tokenizer is
            not one of transformers.
        ValueError: If the tokenizer does not have an end token.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if (
        not isinstance(model, PreTrainedModel)
        or model.config.is_encoder_decoder
        or not model.can_generate()
    ):
        raise TypeError(
            f"Tasks need a causal language model of transformers, got {type(model).__name__}."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"Tasks need a tokenizer of transformers, got {type(tokenizer).__name__}.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "Tasks need an end token, which the tokenizer does not have: set tokenizer.eos_token "
            "to the end token that the model was trained with."
        )


def _removal(
    model: nn.Module,
    method: object,
    rate: float,
    options: RemovalKeywords,
    prompt: str,
) -> AbstractContextManager[None]:
    # Random scores depend on the seed and the place in the batch, so each prompt has its own seed.
    seed = zlib.crc32(f"{options.get('seed', 0)}/{prompt}".encode())
    seeded: RemovalKeywords = {**options, "seed": seed}
    return remove_tokens(model, method, rate, **seeded)


def _evaluate(
    tasks: Sequence[_Task],
    removals: Mapping[tuple[str, float], Removal],
    settings: Mapping[str, Any],
    resume_from: str | Path | None,
    show_progress: bool,
) -> dict[str, dict[str, Any]]:
    """Return the records of a :class:`TaskResult`."""
    with ExitStack() as stack:
        kept: dict[str, Any] = {}
        if resume_from is not None:
            check_identified(settings["methods"])
            run = {name: x for name, x in settings.items() if name != "model"}  # a path
            kept = stack.enter_context(Records(resume_from, run))
        total = len(tasks) * (1 + len(removals))
        bar = stack.enter_context(progress_bar(total, "Tasks", show=show_progress))

        def evaluation(task: _Task, removal: Removal, *run: object) -> Any:
            key = json.dumps([task.name, *run])
            if key not in kept:
                kept.update({key: task.evaluate(removal)})
            bar.update(1)
            return kept[key]

        records = {}
        for task in tasks:
            baseline = evaluation(task, lambda prompt: nullcontext())
            removed: dict[str, list[Any]] = {name: [] for name in settings["methods"]}
            for (name, rate), removal in removals.items():
                removed[name].append(evaluation(task, removal, name, rate)["metrics"])
            metrics = baseline["metrics"]
            records[task.name] = {
                "metric": next(key for key in metrics if key.partition(",")[0] == task.metric),
                "documents": baseline["documents"],
                "baseline": metrics,
                "removed": removed,
            }
    return records


def _tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a checksum of the vocabulary, and of the special tokens around a text."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer("").input_ids]
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


# ---------------------------------------------------------------------------------------------
# Tasks of the harness


@dataclass(frozen=True)
class _Task:
    """A task of the harness, or a group of tasks with one score.

    Args:
        lm: the harness's model.
        name: the name of the task or group.
        loaded: its tasks and groups, as ``TaskManager.load`` returns them.
        metric: the metric that counts as accuracy.
        limit: the number of documents per task; None for all.
        chat: whether the chat template is applied.
    """

    lm: Any
    name: str
    loaded: Mapping[str, Any]
    metric: str
    limit: int | None
    chat: bool

    def evaluate(self, removal: Removal) -> dict[str, Any]:
        """Return the number of documents, and by metric its value and standard error."""
        from lm_eval import evaluate

        changed = _ChangedModel(self.lm, removal, sys.stderr)
        with _isolated():
            self._set_fewshot()
            results = evaluate(
                changed,
                self.loaded,
                limit=self.limit,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
            )["results"][self.name]
        metrics = {}
        for key, value in results.items():
            metric, comma, filtering = key.partition(",")
            if comma and isinstance(value, Real) and not metric.endswith("_stderr"):
                stderr = results.get(f"{metric}_stderr,{filtering}")
                metrics[key] = [float(value), float(stderr) if isinstance(stderr, Real) else None]
        return {"documents": int(results["sample_len"]), "metrics": metrics}

    def checksum(self) -> str:
        """Return a checksum of all documents, prompts and answers."""
        content = []
        with _isolated():
            self._set_fewshot()
            for name, part in self.loaded["tasks"].items():
                part.build_all_requests(
                    limit=self.limit,
                    apply_chat_template=self.chat,
                    fewshot_as_multiturn=self.chat,
                    chat_template=self.lm.apply_chat_template if self.chat else None,
                )
                requests = [[x.doc, x.args] for x in part.instances]
                content.append([name, part.VERSION, list(part.aggregation()), requests])
        # Objects that JSON cannot write, such as images, may print their memory address.
        text = json.dumps(content, default=lambda x: type(x).__name__)
        return f"{zlib.crc32(text.encode()):08x}"

    def _set_fewshot(self) -> None:
        """Set the number of examples and their seed, as the harness's ``simple_evaluate`` does.

        ``simple_evaluate`` itself spends two seconds per call on a description of the machine.
        """
        for part in self.loaded["tasks"].values():
            part.set_config("num_fewshot", part.get_config("num_fewshot") or 0)
            part.set_fewshot_seed(OTHER_SEED)


def _load_tasks(
    lm: Any, names: Sequence[str], task_path: str | Path | None, *prompting: Any
) -> list[_Task]:
    from lm_eval.tasks import TaskManager

    manager = None
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise NotADirectoryError(
                f"task_path={str(task_path)!r} is not a folder: give a folder of .yaml task files."
            )
        manager = TaskManager(include_path=task_path, include_defaults=False)
    # A group in the folder can have tasks of the harness.
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=task_path)
    tasks = []
    for name in dict.fromkeys(names):
        if name not in manager.all_tasks:
            raise ValueError(
                f"Task {name!r} is unknown.{suggestion(name, manager.all_tasks)} Use a name that "
                "`lm-eval ls tasks` lists, or a task of a .yaml file in task_path (files that "
                "cannot be read are skipped)."
            )
        with _isolated():
            loaded = manager.load([name])
        tasks.append(_Task(lm, name, loaded, _accuracy(name, loaded), *prompting))
    return tasks


def _accuracy(name: str, loaded: Mapping[str, Any]) -> str:
    """Return the first metric of a task or group that is better if higher."""
    parts, group = loaded["tasks"], loaded["groups"].get(name)
    better = {m: higher for x in parts.values() for m, higher in x.higher_is_better().items()}
    metrics: list[str] = list(better)
    if group is not None and group.has_aggregation:
        metrics = [x.metric for x in group.aggregate_metric_list]
    elif name not in parts:
        raise ValueError(
            f"{name!r} is a group of tasks without a score of its own. Name its tasks instead: "
            f"{', '.join(parts)}."
        )
    for metric in metrics:
        if better.get(metric):
            return metric
    raise ValueError(
        f"Task {name!r} does not have an accuracy: none of its metrics ({', '.join(metrics)}) is "
        "better if higher. For perplexity, use ComprehensivenessSufficiency."
    )


# ---------------------------------------------------------------------------------------------
# The harness's model


def _harness_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Any:
    harness = imported("lm_eval.models.huggingface", "tasks")
    with _isolated():
        return harness.HFLM(
            model,
            "causal",
            tokenizer=copy.deepcopy(tokenizer),  # the harness may set its padding token
            batch_size=1,
            chat_template_args=dict(chat_template_kwargs or {}),
        )


@dataclass(frozen=True)
class _ChangedModel:
    """A model of the harness whose forward passes are changed, for each prompt anew.

    Args:
        lm: the harness's model.
        removal: returns the context in which a prompt is run.
        stderr: the stream for warnings of the model, while the harness's own output is hidden.
    """

    lm: Any
    removal: Removal
    stderr: TextIO

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.lm, name)
        return partial(self._answers, attribute) if name in REQUESTS else attribute

    def _answers(self, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        answers = []
        # Options after one prompt stay together: the harness computes those of one token at once.
        for prompt, same in groupby(requests, key=lambda request: request.args[0]):
            with self.removal(prompt), redirect_stderr(self.stderr):
                answers += answer(list(same), disable_tqdm=True)
        return answers


@contextmanager
def _isolated() -> Iterator[None]:
    """Use the harness's default seeds and hide its output; restore both at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    sink = io.StringIO()
    with torch.random.fork_rng(), redirect_stdout(sink), redirect_stderr(sink):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
