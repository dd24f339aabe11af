"""Accuracy on downstream tasks after tokens are removed.

As Fig. 4 of arXiv 2606.07604. The tasks are those of lm-evaluation-harness, which asks, scores and
averages; here, every pass of the model that it calls for is changed by :func:`remove_tokens`. The
harness pads causal models' batches on the right and gives no mask, so that padding would be scored
and removed like a text: the mask is given here.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import version
from itertools import islice, product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_cw._utils.files import read_json, write_json
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records
from captum_cw.capture.model import evaluation_mode, unwrapped
from captum_cw.capture.outputs import logits_of
from captum_cw.metrics.faithfulness import checked_rates
from captum_cw.metrics.identity import check_told, described, fingerprint
from captum_cw.removal.interventions import remove_tokens
from captum_cw.removal.options import RemovalKeywords, RemovalOptions
from captum_cw.removal.ranking import Which

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack  # in typing since Python 3.11

__all__ = ["Score", "TaskResult", "evaluate_tasks"]

VERSION = 1

#: Of a normal distribution, on each side of the mean: 95 % lie between.
INTERVAL = 1.96

#: For standard errors without a formula. The harness's default, 100 000, takes minutes each time.
BOOTSTRAP_SAMPLES = 1000

Removed = Callable[[Tensor], AbstractContextManager[None]]
"""What changes a pass over the token ids ``(B, T)``."""


class Score(NamedTuple):
    """A metric of a task and its standard error, NaN where the harness gives none."""

    value: float
    stderr: float


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of tasks with nothing removed, and by method and rate.

    A task's accuracy is the first of its metrics that is better if higher, with the first of its
    filters: ``metric`` names it. The other metrics are in ``records`` and :meth:`to_dataframe`.

    Attributes:
        rates: The fractions that were removed.
        settings: What the numbers depend on.
        records: By task: its ``metric``, how many ``documents`` it has, its metrics in the
            ``baseline``, and in ``removed`` by method at each rate; a metric is its value and its
            standard error, None where there is none.

    Example:
        >>> removed = {"contribution": [{"acc,none": [0.7, 0.1]}, {"acc,none": [0.4, 0.1]}]}
        >>> baseline = {"acc,none": [0.75, 0.1]}
        >>> quiz = {"metric": "acc,none", "documents": 20, "baseline": baseline, "removed": removed}
        >>> result = TaskResult((0.3, 0.5), {}, {"quiz": quiz})
        >>> result.largest_rate("quiz", "contribution")
        0.3
    """

    rates: tuple[float, ...]
    settings: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]

    @property
    def tasks(self) -> list[str]:
        """Their names."""
        return list(self.records)

    @property
    def methods(self) -> list[str]:
        """Their names."""
        return list(next(iter(self.records.values()))["removed"])

    @property
    def metric(self) -> dict[str, str]:
        """By task, which metric counts as accuracy, with the harness's name of its filter."""
        return {task: record["metric"] for task, record in self.records.items()}

    @property
    def documents(self) -> dict[str, int]:
        """By task, how many were asked."""
        return {task: record["documents"] for task, record in self.records.items()}

    @property
    def baseline(self) -> dict[str, Score]:
        """By task, the accuracy of the unchanged model."""
        return {
            task: _score(record["baseline"], record["metric"])
            for task, record in self.records.items()
        }

    @property
    def scores(self) -> dict[str, dict[str, Tensor]]:
        """By task and method ``(rates,)``: the accuracy."""
        return self._table(0)

    @property
    def stderr(self) -> dict[str, dict[str, Tensor]]:
        """By task and method ``(rates,)``: the standard error of the accuracy."""
        return self._table(1)

    def largest_rate(self, task: str, method: str) -> float | None:
        """The largest rate at which the accuracy is not below the baseline's 95 % interval.

        The interval ends 1.96 standard errors below the baseline. Rates below the result may
        have left it, since curves go up and down by chance.

        Args:
            task: Its name.
            method: Its name.

        Returns:
            The rate; None if the accuracy is below at all of them.

        Raises:
            KeyError: If task or method was not evaluated.
            ValueError: If the baseline has no standard error.
        """
        if task not in self.records or method not in self.methods:
            raise KeyError(
                f"{task!r} with {method!r} was not evaluated; there are tasks "
                f"{', '.join(self.tasks)} and methods {', '.join(self.methods)}."
            )
        value, stderr = self.baseline[task]
        if stderr != stderr:  # NaN
            raise ValueError(
                f"Task {task!r} has no standard error of {self.metric[task]!r} for "
                f"{self.documents[task]} documents: give more, or another metric."
            )
        scores = self.scores[task][method].tolist()
        within = [
            rate
            for rate, score in zip(self.rates, scores, strict=True)
            if score >= value - INTERVAL * stderr
        ]
        return max(within, default=None)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each task, metric, method and rate (needs pandas)."""
        import pandas as pd

        rows = []
        for task, record in self.records.items():
            for metric, method in product(record["baseline"], self.methods):
                unchanged = _score(record["baseline"], metric)
                for rate, found in zip(self.rates, record["removed"][method], strict=True):
                    score = _score(found, metric)
                    rows.append(
                        {
                            "task": task,
                            "metric": metric,
                            "is_accuracy": metric == record["metric"],
                            "method": method,
                            "rate": rate,
                            "value": score.value,
                            "stderr": score.stderr,
                            "baseline": unchanged.value,
                            "baseline_stderr": unchanged.stderr,
                            "documents": record["documents"],
                        }
                    )
        return pd.DataFrame(rows)

    def plot(self, *, use_pyplot: bool = True) -> tuple[Figure, npt.NDArray[Any]]:
        """The accuracy of each task against the fraction removed (Fig. 4).

        Args:
            use_pyplot: Makes a pyplot figure, which notebooks show.

        Returns:
            The figure and its axes, one a task; the baseline's 95 % interval is shaded.
        """
        from captum_cw.visualization.curves import plot_tasks

        titles = {
            task: f"{task} ({metric.partition(',')[0]})" for task, metric in self.metric.items()
        }
        return plot_tasks(
            {titles[task]: curves for task, curves in self.scores.items()},
            self.rates,
            {
                titles[task]: (value, INTERVAL * stderr)
                for task, (value, stderr) in self.baseline.items()
            },
            use_pyplot=use_pyplot,
        )

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON; floats come back bit for bit."""
        content = {
            "version": VERSION,
            "task_rates": list(self.rates),
            "settings": dict(self.settings),
            "records": dict(self.records),
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> TaskResult:
        """Reads what :meth:`save` has written.

        Raises:
            ValueError: If the file is no such result, or of an unknown version.
        """
        content = read_json(path, VERSION, "task_rates")
        return cls(tuple(content["task_rates"]), content["settings"], content["records"])

    def _table(self, place: int) -> dict[str, dict[str, Tensor]]:
        return {
            task: {
                method: torch.tensor(
                    [_score(found, record["metric"])[place] for found in several],
                    dtype=torch.float64,
                    device="cpu",
                )
                for method, several in record["removed"].items()
            }
            for task, record in self.records.items()
        }


def _score(metrics: Mapping[str, Sequence[float | None]], name: str) -> Score:
    value, stderr = metrics[name]
    assert value is not None
    return Score(value, float("nan") if stderr is None else stderr)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    methods: Mapping[str, object],
    rates: Sequence[float],
    *,
    which: Which = "bottom",
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    resume_from: str | Path | None = None,
    show_progress: bool = False,
    **options: Unpack[RemovalKeywords],
) -> TaskResult:
    """Runs tasks of lm-evaluation-harness with nothing removed, and by method and rate.

    The harness draws with its own default seeds, so that runs repeat; the caller's generators of
    random numbers are left as they were.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, or of groups that have a score of their own, such as ``"mmlu"``.
        methods: By a name of your choice, what :func:`captum_cw.remove_tokens` takes.
        rates: The fractions to remove, ascending, in (0, 1].
        which: Removes from the ``"bottom"`` of the ranking, or the ``"top"``.
        task_path: A folder with task files (``.yaml``) of your own. Where it has all of the tasks,
            the harness's thousands are not looked through, which takes a quarter of a minute.
        limit: Only the first documents of each task; None for all.
        batch_size: Texts at once.
        num_fewshot: Examples before each document; None for what the task says. A task that says
            0 keeps to that.
        apply_chat_template: Asks in the tokenizer's chat template, as the harness's option of that
            name does.
        chat_template_kwargs: Arguments for that template, such as ``{"enable_thinking": False}``.
        resume_from: A file that keeps every finished evaluation of a task; an interrupted run of
            the same settings, documents and model goes on from it, to the same numbers.
        show_progress: Shows a bar once it has taken two seconds.
        options: How pairs are scored, ranked and protected, as for ``remove_tokens``. With
            ``"random"``, what is drawn for a text depends on ``seed`` and ``batch_size``.

    Returns:
        Accuracy, with standard errors, by task, method and rate.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        TypeError, ValueError: If the model or tokenizer is of another kind, a task is unknown,
            made of others without a score of its own, or has no metric that is better if higher,
            there is no chat template to apply, and as ``remove_tokens``.
        NotADirectoryError: If ``task_path`` is no folder.
        RecordsError: If ``resume_from`` is damaged, or of another run.

    Example:
        >>> methods = {"contribution": ContributionWeights(model), "attention": "attention"}
        >>> result = evaluate_tasks(
        ...     model, tokenizer, ["winogrande"], methods, [0.3, 0.5, 0.7], limit=100
        ... )  # doctest: +SKIP
        >>> result.largest_rate("winogrande", "contribution")  # doctest: +SKIP
        0.7
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks={tasks!r}: give a list of one name or more.")
    if not methods:
        raise ValueError("There is no method to evaluate: methods is empty.")
    for name, count in {"limit": limit, "batch_size": batch_size}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: give one or more.")
    if chat_template_kwargs and not apply_chat_template:
        raise ValueError(
            f"chat_template_kwargs={dict(chat_template_kwargs)} without a chat template: give "
            "apply_chat_template=True too."
        )
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "apply_chat_template=True, but the tokenizer has no chat template: use that of the "
            "model's version for chats, or set tokenizer.chat_template."
        )
    several = checked_rates({which: rates})[which]
    model = unwrapped(model)
    chosen = RemovalOptions(**options)
    for method in methods.values():
        with remove_tokens(model, method, several[0], which, **options):
            pass  # raises where a choice is unknown
    with _quiet_and_seeded():
        lm = _harness_model()(model, tokenizer, batch_size, dict(chat_template_kwargs or {}))
        chat = lm if apply_chat_template else None
        units = _load(list(dict.fromkeys(tasks)), task_path, num_fewshot)
        settings = {
            "which": which,
            "rates": list(several),
            **asdict(chosen),
            "limit": limit,
            "batch_size": batch_size,
            "num_fewshot": num_fewshot,
            **_template_settings(tokenizer, apply_chat_template, chat_template_kwargs),
            "tasks": {unit.name: unit.checksum(limit, chat) for unit in units},
            "methods": {name: described(method, model) for name, method in methods.items()},
            "model": getattr(model.config, "name_or_path", None),
            "weights": fingerprint(model),
            "tokenizer": _tokenizer_checksum(tokenizer),
            "versions": {p: version(p) for p in ("torch", "transformers", "captum", "lm_eval")},
        }

    def removed(method: object, rate: float, ids: Tensor) -> AbstractContextManager[None]:
        # Chance is drawn by place in the batch: by the texts, too, it differs between them.
        own = zlib.crc32(f"{chosen.seed}/{ids.tolist()}".encode())
        drawn: RemovalKeywords = {**options, "seed": own}
        return remove_tokens(model, method, rate, which, **drawn)

    # By what tells it apart: nothing removed, then by method and rate.
    runs: dict[tuple[Any, ...], Removed] = {(): lambda ids: nullcontext()}
    for (name, method), rate in product(methods.items(), several):
        runs[name, rate] = partial(removed, method, rate)
    with ExitStack() as stack:
        if resume_from is not None:
            check_told(settings["methods"])
        kept = None if resume_from is None else stack.enter_context(Records(resume_from, settings))
        known: dict[str, Any] = dict(kept or {})
        total = len(units) * len(runs)
        bar = stack.enter_context(progress_bar(total, "Tasks", show=show_progress))
        for unit, (run, change) in product(units, runs.items()):
            key = _key(unit.name, run)
            if key not in known:
                with _quiet_and_seeded(), evaluation_mode([model], model):
                    known[key] = unit.evaluate(lm, change, limit, apply_chat_template)
                if kept is not None:
                    kept.add(key, known[key])
            bar.update(1)
    records = {}
    for unit in units:
        unchanged = known[_key(unit.name, ())]
        records[unit.name] = {
            "metric": next(m for m in unchanged["metrics"] if m.partition(",")[0] == unit.metric),
            "documents": unchanged["documents"],
            "baseline": unchanged["metrics"],
            "removed": {
                name: [known[_key(unit.name, (name, rate))]["metrics"] for rate in several]
                for name in methods
            },
        }
    return TaskResult(several, settings, records)


def _template_settings(
    tokenizer: PreTrainedTokenizerBase, applied: bool, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What tells runs in a chat template from others; nothing without one."""
    if not applied:
        return {}
    template = zlib.crc32(json.dumps(tokenizer.chat_template).encode())
    return {"chat_template": f"{template:08x}", "chat_template_kwargs": dict(given or {})}


def _key(task: str, run: tuple[Any, ...]) -> str:
    return json.dumps([task, *run])


# ---------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class _Unit:
    """A task, or a group of tasks with one score.

    Args:
        name: Of the task, or the group.
        loaded: The tasks of the harness, and the groups, by name.
        metric: The first that is better if higher.
        num_fewshot: Examples before each document; None for what the tasks say.
    """

    name: str
    loaded: Mapping[str, Any]
    metric: str
    num_fewshot: int | None

    def evaluate(
        self, lm: Any, removed: Removed, limit: int | None, apply_chat_template: bool
    ) -> dict[str, Any]:
        """How many documents there are, and by metric its value and standard error."""
        from lm_eval.evaluator import evaluate

        self._prepare()
        lm.removed = removed
        results = evaluate(
            lm,
            self.loaded,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            apply_chat_template=apply_chat_template,
            # As the harness does by default where a chat template is applied.
            fewshot_as_multiturn=apply_chat_template,
        )
        found = results["results"][self.name]
        metrics = {}
        for key, value in found.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, Real) and not metric.endswith("_stderr"):
                stderr = found.get(f"{metric}_stderr,{chosen}")
                metrics[key] = [float(value), float(stderr) if isinstance(stderr, Real) else None]
        return {"documents": int(found["sample_len"]), "metrics": metrics}

    def checksum(self, limit: int | None, chat: Any = None) -> str:
        """Of all that is asked, word by word, and of what is right.

        Args:
            limit: How many documents are asked.
            chat: The harness's model whose chat template is applied; None for none.
        """
        self._prepare()
        crc = 0
        for name, task in self.loaded["tasks"].items():
            applied = (
                {}
                if chat is None
                else {
                    "apply_chat_template": True,
                    "fewshot_as_multiturn": True,
                    "chat_template": chat.apply_chat_template,
                    "tokenizer_name": chat.tokenizer_name,
                }
            )
            task.build_all_requests(limit=limit, **applied)
            asked = [[x.doc, x.args] for x in task.instances]
            whole = [name, task.VERSION, list(task.aggregation()), asked]
            # What JSON does not know, such as pictures, may print its address in memory.
            text = json.dumps(whole, default=lambda x: type(x).__name__)
            crc = zlib.crc32(text.encode(), crc)
        return f"{crc:08x}"

    def _prepare(self) -> None:
        """What the harness's ``simple_evaluate`` does before it runs tasks.

        That itself takes two seconds each time to describe the machine.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        for task in self.loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own != 0:
                task.set_config("num_fewshot", own or 0)
                if self.num_fewshot is not None:
                    task.set_config("num_fewshot", self.num_fewshot)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _load(
    names: Sequence[str], task_path: str | Path | None, num_fewshot: int | None
) -> list[_Unit]:
    from lm_eval.tasks import TaskManager

    manager = None
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise NotADirectoryError(
                f"task_path={str(task_path)!r} is no folder: give one with .yaml files of tasks."
            )
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
    # A group may be of tasks that are elsewhere.
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks) or ["none is like it"]
        raise ValueError(
            f"Task {unknown[0]!r} is unknown ({', '.join(near)}): give a name that `lm-eval ls "
            "tasks` lists, or the task of a .yaml file in task_path (files that cannot be read are "
            "passed over)."
        )
    return [_unit(manager, name, num_fewshot) for name in names]


def _unit(manager: Any, name: str, num_fewshot: int | None) -> _Unit:
    parts: list[str] = []
    if name in manager.all_tags:  # before their data are fetched
        parts = sorted(manager.task_index[name].tags)
    else:
        loaded = manager.load([name])
        group = loaded["groups"].get(name)
        if group is not None and not group.has_aggregation:
            parts = list(loaded["tasks"])
    if parts:
        raise ValueError(
            f"{name!r} stands for tasks that have no score together: give them by name: "
            f"{', '.join(parts)}."
        )
    better = {m: x for task in loaded["tasks"].values() for m, x in task.higher_is_better().items()}
    metrics = list(better) if group is None else [x.metric for x in group.aggregate_metric_list]
    metric = next((m for m in metrics if better.get(m)), None)
    if metric is None:
        raise ValueError(
            f"Task {name!r} has no metric that is better if higher ({', '.join(metrics)}), so "
            "no accuracy: for perplexity, use ComprehensivenessSufficiency."
        )
    return _Unit(name, loaded, metric, num_fewshot)


# ---------------------------------------------------------------------------------------------
# The harness


@cache
def _harness_model() -> Any:
    """The harness's class for models of transformers, with a mask, and with a change of passes."""
    from lm_eval.models.huggingface import HFLM

    class _Masked(HFLM):  # type: ignore[misc]  # lm_eval has no types for it
        """Knows which tokens of a batch are padding.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            batch_size: Texts at once.
            template_kwargs: Arguments for the chat template.
        """

        def __init__(
            self,
            model: PreTrainedModel,
            tokenizer: PreTrainedTokenizerBase,
            batch_size: int,
            template_kwargs: dict[str, Any],
        ) -> None:
            check_task_model(model, tokenizer)
            self.removed: Removed = lambda ids: nullcontext()
            self._rows: Iterator[list[int]] = iter(())
            with evaluation_mode([model], model):
                # A copy, since it may be given a token for padding.
                tokenizer = copy.deepcopy(tokenizer)
                super().__init__(
                    model,
                    "causal",
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    chat_template_args=template_kwargs,
                )

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[Any, list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            """Notes which rows will come: each text once, the longest first, cut from the left."""
            texts = {tuple((context + following)[:-1]) for _, context, following in requests}
            long = sum(len(text) > self.max_length for text in texts)
            if long:
                warnings.warn(
                    f"{long} of {len(texts)} texts are longer than the model's {self.max_length} "
                    "tokens: lm-evaluation-harness leaves out their beginnings.",
                    stacklevel=2,
                )
            order = sorted(texts, key=lambda text: (-len(text), text))
            self._rows = (list(text[-self.max_length :]) for text in order)
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return found

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """``(B, T, V)`` of ids ``(B, T)`` that are padded on the right, by zeros."""
            rows = list(islice(self._rows, len(inps)))
            mask = {} if len(inps) == 1 else {"attention_mask": _real(rows, inps).long()}
            with self.removed(inps), torch.no_grad():
                return logits_of(self.model(inps, **mask))

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The harness gives the mask of ids ``(B, T)`` by itself here."""
            with self.removed(context):
                found: Tensor = super()._model_generate(context, *args, **kwargs)
            return found

    return _Masked


def _real(rows: Sequence[Sequence[int]], ids: Tensor) -> Tensor:
    """``(B, T)``, False at what pads these rows to the ids.

    Raises:
        RuntimeError: If the ids are of other rows.
    """
    B, T = ids.shape
    padded = [[*row, *[0] * (T - len(row))] for row in rows]
    if padded != ids.tolist():
        raise RuntimeError(
            f"lm-eval {version('lm_eval')} runs texts in another order than 0.4.13, so which "
            "tokens are padding is not known: give batch_size=1, or install lm-eval==0.4.13."
        )
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=ids.device)
    return torch.arange(T, device=ids.device).expand(B, T) < lengths[:, None]


def check_task_model(model: object, tokenizer: object) -> None:
    """Refuses what the tasks cannot be asked of.

    Raises:
        TypeError: If it is not a causal language model of transformers and its tokenizer.
        ValueError: If the tokenizer has no token for the end of a text.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        raise TypeError(
            f"model is of type {type(model).__name__}: give a causal language model of "
            "transformers."
        )
    if not model.can_generate():
        raise TypeError(
            f"{type(model).__name__} does not predict the next token, which tasks are asked by: "
            "give a causal language model of transformers."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is of type {type(tokenizer).__name__}: give the model's own.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no token for the end of a text, which the harness needs: set "
            "tokenizer.eos_token to the one that the model was trained with."
        )


def _tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the vocabulary, and of what is put around a text."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer("").input_ids]
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


@contextmanager
def _quiet_and_seeded() -> Iterator[None]:
    """The harness without its bars and notes, and with its seeds; all is put back."""
    try:
        import lm_eval.api.model as api_model
        import lm_eval.api.task as api_task
        import lm_eval.models.huggingface as huggingface
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    except ImportError as error:
        raise ImportError(
            "Tasks are run by lm-evaluation-harness, which cannot be imported "
            f"({error}): pip install 'captum-cw[tasks]'"
        ) from error
    import numpy as np

    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    bars = {module: module.tqdm for module in (api_model, api_task, huggingface)}
    with torch.random.fork_rng():
        try:
            logger.setLevel(logging.ERROR)
            for module, bar in bars.items():
                module.tqdm = _hidden(bar)
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
        finally:
            logger.setLevel(level)
            for module, bar in bars.items():
                module.tqdm = bar
            random.setstate(python)
            np.random.set_state(numpy)


def _hidden(bar: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return bar(*args, **{**kwargs, "disable": True})

    return make
