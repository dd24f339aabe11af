"""Measure time and memory of attribution, compared with the model's own forward pass.

    python benchmarks/run.py

Every figure comes from a separate process, so that no call reuses memory that another has freed.
The speed of a machine drifts, so ratios are taken between alternating calls in one process. A run
that was stopped resumes when the same command is started again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import captum
import numpy as np
import psutil
import torch
import transformers
from captum.attr import LayerIntegratedGradients
from torch import Tensor

from captum_cw import ContributionWeights, InputContributions, TargetContributions, TokenScores
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records, RecordsError
from captum_cw.metrics.tables import in_markdown
from captum_cw.models.loading import DEMO_MODEL, load_demo_model, load_model
from captum_cw.removal.changes import FixedChange, RankedRemoval
from captum_cw.removal.clean_pass import CleanPass
from captum_cw.removal.options import RemovalOptions
from captum_cw.removal.scoring import pair_scorer

Result = TypeVar("Result")
Results = dict[tuple[str, int], Any]
"""Measurements by name and length."""

OUT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
STEPS = 50
WARM_UP_TOKENS = 8
SAMPLED_EVERY = 0.005
FAILED = "failed"
REMOVED = 0.5

ON_A_GPU = """## On a GPU

Not measured. `python benchmarks/gpu.py` measures it on a machine with an NVIDIA GPU, after it has \
checked the kernels there. All figures on this page are of a CPU."""

#: The option of glibc's ``mallopt`` by which memory of this size or more has pages of its own. They
#: are given back when it is freed.
M_MMAP_THRESHOLD, OWN_PAGES = -3, 2**16

#: The times of a short text vary more, and cost less. So a ratio is taken over as many rounds as
#: make this number of tokens for each repeat, up to the most.
TOKENS_A_REPEAT, MOST_ROUNDS = 1024, 8


@dataclass(frozen=True)
class Settings:
    """The settings of all measurements of a run.

    Args:
        model: A hub id or a local folder; None is the demo model.
        threads: The number of threads of torch.
        repeats: How often each call runs; more often where ratios of short texts are taken.
        gradient_steps: The number of steps of Integrated Gradients that are run.
    """

    model: str | None
    threads: int
    repeats: int
    gradient_steps: int

    def rounds(self, length: int) -> range:
        """Return the rounds over which ratios are taken for texts of this length."""
        return range(self.repeats * min(max(1, TOKENS_A_REPEAT // length), MOST_ROUNDS))


# ---------------------------------------------------------------------------------------------
# What is measured


def _eager(model: Any, ids: Tensor) -> object:
    model.set_attn_implementation("eager")
    return model(ids, output_attentions=True)


def _integrated_gradients(model: Any, ids: Tensor, steps: int) -> object:
    def log_probability(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.log_softmax(-1)[:, 0]  # any token: the cost is the same

    method = LayerIntegratedGradients(log_probability, model.get_input_embeddings())
    with torch.enable_grad():
        return method.attribute(ids, n_steps=steps, internal_batch_size=1)


def _gradient(model: Any, ids: Tensor) -> object:
    """Run the same target forward and backward to the embeddings, as plain autograd does."""
    model.requires_grad_(requires_grad=False)
    with torch.enable_grad():
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
        return torch.autograd.grad(logits[0, -1, 0] - logits[0, -1, 1], embeddings)


def _target_scores(model: Any, ids: Tensor) -> object:
    method = TokenScores(TargetContributions(model), reduction="sum", signed=True)
    return method.attribute(ids, target=0, contrast=1)


PLAIN, LAST, SCORES = "forward", "forward, last logits only", "token scores"
ONE_QUERY = "scores of the last query"
CLEAN_REMOVAL, ONLINE_REMOVAL = "clean scoring", "online scoring"
DENSE, EAGER, GRADIENTS = "dense maps", "eager forward", "Integrated Gradients"
GRADIENT, INPUTS, TARGETS = "forward and backward", "input contributions", "target scores"

OF_TARGET = (GRADIENT, INPUTS, TARGETS)

Call = Callable[[Any, Tensor], object]

#: What begins the name of a measurement of memory.
MEMORY = "memory of "

CALLS: dict[str, Call] = {
    PLAIN: lambda model, ids: model(ids),
    LAST: lambda model, ids: model(ids, logits_to_keep=1, use_cache=False),
    SCORES: lambda model, ids: TokenScores(ContributionWeights(model)).attribute(ids),
    DENSE: lambda model, ids: ContributionWeights(model).attribute(ids),
    EAGER: _eager,
    GRADIENT: _gradient,
    INPUTS: lambda model, ids: InputContributions(model).attribute(ids, target=0, contrast=1),
    TARGETS: _target_scores,
}

#: Calls of which only the ratio to another call is taken.
ONLY_RATIOS: dict[str, Call] = {
    ONE_QUERY: lambda model, ids: TokenScores(ContributionWeights(model), queries=-1).attribute(ids)
}

EXPLAINED = {
    PLAIN: "`model(ids)` with SDPA, as a user runs it: with all logits and the cache",
    LAST: "the same without the cache and with the logits of the last token only. This is the "
    "harder comparison, because attribution needs neither",
    SCORES: "`TokenScores(ContributionWeights(model))`, all layers and heads",
    DENSE: "`ContributionWeights(model).attribute(ids)`, the maps of all layers and heads",
    EAGER: "`model(ids, output_attentions=True)`: only attention weights, returned by the model",
    GRADIENT: "the gradient of the difference of two logits at the embeddings, by plain autograd, "
    "without the cache and with the logits of the last token only",
    INPUTS: "`InputContributions(model)` of the same difference",
    TARGETS: "`TokenScores(TargetContributions(model))` of the same difference, all layers and "
    "heads",
    GRADIENTS: f"Captum's `LayerIntegratedGradients` on the embeddings, {STEPS} steps, one at a "
    "time",
}


# ---------------------------------------------------------------------------------------------
# How it is measured


class ExtraMemory:
    """Watch resident memory in a ``with`` block; ``peak`` is the largest increase since its start.

    A thread samples the memory. The system's own maximum is that of the whole process, and may
    have been reached while the model was loaded.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ExtraMemory:
        self._before: int = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._done.wait(SAMPLED_EVERY)
            self.peak = max(self.peak, self._process.memory_info().rss - self._before)


def _give_back_memory() -> None:
    """Return freed memory to the system, now and later in this process.

    Otherwise, what is resident depends on the order in which earlier calls freed their tensors.
    """
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # only glibc has these
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, OWN_PAGES)
            ctypes.CDLL(None).malloc_trim(0)


def _extra_of(call: Callable[[], object]) -> int:
    """Return the memory that a call takes, with its result. Later calls are slower."""
    _give_back_memory()
    with ExtraMemory() as memory:
        result = call()
    del result  # held until here, because the result is part of the memory that a call needs
    return memory.peak


def _seconds_of(call: Callable[[], object]) -> float:
    """Return the time of a call."""
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _load(settings: Settings) -> Any:
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    model, _ = load_demo_model() if settings.model is None else load_model(settings.model)
    return model


def _ids(model: Any, length: int) -> Tensor:
    """Return random tokens ``(1, length)``. They do not change the time or the memory."""
    return torch.randint(
        model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)
    )


def seconds(settings: Settings, name: str, length: int) -> float | str:
    """Return the median time of one of ``CALLS``, or why it was refused."""
    call = _warm(settings, CALLS[name], length)
    try:
        return median(_seconds_of(call) for _ in range(settings.repeats))
    except MemoryError as error:
        return _refused(error)


def memory(settings: Settings, name: str, length: int) -> int | str:
    """Return the bytes that a call takes, or a step of Integrated Gradients.

    If it is refused, return why. The memory that the process held right before is not counted.
    """
    one_step = partial(_integrated_gradients, steps=1)
    call = _warm(settings, one_step if name == GRADIENTS else CALLS[name], length)
    try:
        return _extra_of(call)
    except MemoryError as error:
        return _refused(error)


def _warm(settings: Settings, call: Call, length: int) -> Callable[[], object]:
    """Return the call for a text of some length. It has run on a short text.

    The first call loads code, and weights that were only mapped into memory.
    """
    model = _load(settings)
    call(model, _ids(model, WARM_UP_TOKENS))
    return partial(call, model, _ids(model, length))


def _refused(error: MemoryError) -> str:
    return f"refused: {str(error).split(' (')[0]}"


def gradients_seconds(settings: Settings, length: int) -> float:
    """Return the time of Integrated Gradients, extrapolated from fewer steps if so set.

    The time is affine in the number of steps, so two runs determine it.
    """
    model = _load(settings)
    _integrated_gradients(model, _ids(model, WARM_UP_TOKENS), steps=1)
    ids = _ids(model, length)
    steps = settings.gradient_steps
    whole, one = (_seconds_of(partial(_integrated_gradients, model, ids, n)) for n in (steps, 1))
    return whole + (STEPS - steps) * (whole - one) / (steps - 1)


def alternating(settings: Settings, length: int, names: Sequence[str]) -> list[dict[str, float]]:
    """Return the seconds of some calls, for each round.

    Each call has run on a text of this length before, as in a run over many texts.
    """
    model = _load(settings)
    ids = _ids(model, length)
    calls = {name: {**CALLS, **ONLY_RATIOS}[name] for name in names}
    for call in calls.values():
        call(model, ids)
    return [
        {name: _seconds_of(partial(call, model, ids)) for name, call in calls.items()}
        for _ in settings.rounds(length)
    ]


def alternating_removals(settings: Settings, length: int) -> list[dict[str, float]]:
    """Return the seconds of a forward pass and of removal passes, for each round.

    As in the metric, sinks and clean scores come from one clean pass for all methods and rates. The
    time includes ranking.
    """
    model = _load(settings)
    ids = _ids(model, length)
    scorer, options = pair_scorer("contribution"), RemovalOptions()
    clean = CleanPass.run(model, partial(model, ids), {"": scorer}, options, ())

    def removed_by_clean_scores() -> object:
        factors = options.factors(REMOVED, "bottom", clean.scores[""], clean.real, clean.sinks)
        with FixedChange(model, factors, registered_only=clean.all_registered).in_force():
            return model(ids)

    def removed_by_online_scores() -> object:
        with RankedRemoval(model, scorer, REMOVED, "bottom", options, clean.sinks).in_force():
            return model(ids)

    calls: dict[str, Callable[[], object]] = {
        PLAIN: partial(model, ids),
        CLEAN_REMOVAL: removed_by_clean_scores,
        ONLINE_REMOVAL: removed_by_online_scores,
    }
    for call in calls.values():
        call()
    return [
        {name: _seconds_of(call) for name, call in calls.items()} for _ in settings.rounds(length)
    ]


def in_own_process(job: Callable[..., Result], *args: object) -> Result | str:
    """Return the result of ``job`` in a new process, or how that process failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, job, *args), daemon=True)
    # The child ignores Ctrl-C, because its parent stops it, below.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    sender.close()
    try:
        result: Result = receiver.recv()
    except EOFError:
        process.join()
        return f"{FAILED}: exit code {process.exitcode}"
    except BaseException:
        process.kill()
        raise
    process.join()
    return result


def _failed(result: object) -> bool:
    """Return whether a process died. The machine may be the cause, so it is tried again."""
    return isinstance(result, str) and result.startswith(FAILED)


def _send(sender: Any, job: Callable[..., object], *args: object) -> None:
    sender.send(job(*args))


# ---------------------------------------------------------------------------------------------
# The run and its page


def run(
    settings: Settings,
    lengths: Sequence[int],
    ratio_lengths: Sequence[int],
    memory_lengths: Sequence[int],
    records: Records,
) -> str:
    """Run the measurements that are not in ``records``, and return all tables as Markdown."""
    jobs: dict[tuple[str, int], Callable[[], Any]] = {}
    own = partial(partial, in_own_process)
    for length in lengths:
        for name in CALLS:
            jobs[name, length] = own(seconds, settings, name, length)
            jobs[MEMORY + name, length] = own(memory, settings, name, length)
        if settings.gradient_steps:
            jobs[GRADIENTS, length] = own(gradients_seconds, settings, length)
            jobs[MEMORY + GRADIENTS, length] = own(memory, settings, GRADIENTS, length)
        jobs["target ratio", length] = own(alternating, settings, length, OF_TARGET)
        jobs["removal", length] = own(alternating_removals, settings, length)
    for length in ratio_lengths:
        names = (PLAIN, LAST, SCORES, ONE_QUERY)
        jobs["ratio", length] = own(alternating, settings, length, names)
    for length in memory_lengths:
        for name in (PLAIN, LAST, SCORES, INPUTS):
            jobs[MEMORY + name, length] = own(memory, settings, name, length)
    results: Results = {}
    with progress_bar(len(jobs), "Benchmark", show=True) as bar:
        for (name, length), job in jobs.items():
            key = f"{name}, {length} tokens"
            bar.set_postfix_str(key)
            result = records[key] if key in records else job()
            results[name, length] = result
            if key not in records and not _failed(result):
                records[key] = result
            bar.update()
    rounds = ", ".join(f"{len(settings.rounds(n))} rounds at {n} tokens" for n in ratio_lengths)
    return "\n\n".join(
        [
            "## Time and memory",
            _cost_table(results, lengths),
            _legend(settings),
            "## Token scores against a forward pass",
            _ratio_table(results, ratio_lengths),
            "The calls alternate in one process, and each round gives one ratio. The table shows "
            f"the median, and in brackets the quartiles, of {rounds}. The last column is of "
            "`queries=-1`, which explains one prediction. Each call has run on the text before, "
            "because the first pass over a text of some length is observed with more checks.",
            "## Contributions to a target against a forward and backward pass",
            _target_table(results, lengths),
            "Ratios are taken as above. The first call with a model also runs it once more, to "
            "check that its output is unchanged; this is not counted.",
            "## Removal passes against a forward pass",
            _removal_table(results, lengths),
            f"Each ratio is the time of a pass that removes {REMOVED:.0%} of the pairs of head and "
            "token, ranked by contributions, over the time of a forward pass. The clean pass that "
            "finds the sinks and the clean scores is not counted, because one such pass serves all "
            "methods and rates.",
            "## Memory of token scores",
            _memory_table(results, memory_lengths),
            f'Megabytes are measured as above. The last column is "{SCORES}" minus "{LAST}". '
            "It is the memory that attribution needs beyond a plain forward pass over the same "
            "unpadded input, without the cache and all logits.",
            ON_A_GPU,
            "## Other libraries",
            "`python benchmarks/peers.py` measures what one explanation costs in other libraries, "
            "in passes and time. The README has a summary.",
        ]
    )


def _seconds(found: float | str) -> str:
    return found if isinstance(found, str) else f"{found:.2f}"


def _megabytes(results: Results, name: str, length: int) -> str:
    found = results[MEMORY + name, length]
    return found if isinstance(found, str) else f"{found / 1e6:,.0f}"


def _cost_table(results: Results, lengths: Sequence[int]) -> str:
    heads = ["", *(f"{length} tokens: {unit}" for length in lengths for unit in ("s", "MB"))]
    rows = []
    for name in (*CALLS, GRADIENTS):
        if (name, lengths[0]) in results:
            cells = ((_seconds(results[name, n]), _megabytes(results, name, n)) for n in lengths)
            rows.append([name, *itertools.chain.from_iterable(cells)])
    return in_markdown(heads, rows)


def _legend(settings: Settings) -> str:
    steps = settings.gradient_steps
    explained = EXPLAINED if steps else {n: e for n, e in EXPLAINED.items() if n != GRADIENTS}
    lines = [f"* {name}: {explanation}" for name, explanation in explained.items()]
    if 0 < steps < STEPS:
        lines[-1] += f". The time is **extrapolated** from runs of 1 and {steps} steps"
    return (
        "Seconds are medians. Megabytes are the peak of the resident memory that a call took "
        "beyond that of the loaded model, including its result (sampled every "
        f"{SAMPLED_EVERY * 1000:.0f} ms), in a process of its own in which the C library gives "
        "freed memory back at once. For Integrated Gradients it is that of one step.\n\n"
        + ".\n".join(lines)
        + "."
    )


def _ratio(rounds: list[dict[str, float]] | str, name: str, over: str) -> str:
    if isinstance(rounds, str):
        return rounds
    ratios = [times[name] / times[over] for times in rounds]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _ratio_table(results: Results, lengths: Sequence[int]) -> str:
    pairs = ((SCORES, PLAIN), (SCORES, LAST), (ONE_QUERY, LAST))
    rows = [
        [str(n), *(_ratio(results["ratio", n], name, over) for name, over in pairs)]
        for n in lengths
    ]
    return in_markdown(["tokens", *(f"{name} over {over}" for name, over in pairs)], rows)


def _target_table(results: Results, lengths: Sequence[int]) -> str:
    def memory(name: str, n: int) -> str:
        ours, plain = results[MEMORY + name, n], results[MEMORY + GRADIENT, n]
        if isinstance(ours, str) or isinstance(plain, str):
            return "unknown"
        return f"{ours / plain:.2f}"

    names = (INPUTS, TARGETS)
    rows = [
        [
            str(n),
            *(_ratio(results["target ratio", n], name, GRADIENT) for name in names),
            *(memory(name, n) for name in names),
        ]
        for n in lengths
    ]
    return in_markdown(
        ["tokens", *(f"{name}: {of}" for of in ("time", "memory") for name in names)], rows
    )


def _removal_table(results: Results, lengths: Sequence[int]) -> str:
    names = (CLEAN_REMOVAL, ONLINE_REMOVAL)
    rows = [
        [str(n), *(_ratio(results["removal", n], name, PLAIN) for name in names)] for n in lengths
    ]
    return in_markdown(["tokens", *names], rows)


def _memory_table(results: Results, lengths: Sequence[int]) -> str:
    rows = []
    for n in lengths:
        cells = [_megabytes(results, name, n) for name in (PLAIN, LAST, SCORES, INPUTS)]
        scores, forward = results[MEMORY + SCORES, n], results[MEMORY + LAST, n]
        refused = isinstance(scores, str) or isinstance(forward, str)
        more = "unknown" if refused else f"{(scores - forward) / 1e6:,.0f}"
        rows.append([str(n), *cells, more])
    return in_markdown(["tokens", PLAIN, LAST, SCORES, INPUTS, "scores over a forward"], rows)


def _machine(settings: Settings) -> str:
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {settings.threads} threads, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"captum {captum.__version__}; {settings.model or DEMO_MODEL}, float32, one text."
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _lengths(text: str) -> list[int]:
    return sorted({_positive(length) for length in text.split(",")})


def _steps(text: str) -> int:
    if not (0 <= (steps := int(text)) <= STEPS and steps != 1):
        raise ValueError
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure time and memory of attribution, compared with a forward pass.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=_lengths, default="128,512,2048", help="lengths of texts, in tokens")
    add(
        "--ratio-lengths",
        type=_lengths,
        default="17,128,512,2048",
        help="lengths of texts for which token scores are compared with a forward pass",
    )
    add(
        "--memory-lengths",
        type=_lengths,
        default="2048,4096,8192",
        help="lengths of texts for which only memory is measured",
    )
    add("--threads", type=_positive, default=2, help="number of threads of torch")
    add("--model", help="a hub id or a local folder; without it, the demo model")
    add(
        "--repeats",
        type=_positive,
        default=5,
        help="runs of each call, except Integrated Gradients",
    )
    add(
        "--gradient-steps",
        type=_steps,
        default=4,
        help=f"steps of Integrated Gradients to run, 2 to {STEPS}; the time of {STEPS} steps is "
        "extrapolated from fewer; 0 skips Integrated Gradients",
    )
    add(
        "--out",
        type=Path,
        default=OUT,
        help="the page to write; an unfinished run keeps its measurements in PAGE.records",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, and print and write its page."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    settings = Settings(options.model, options.threads, options.repeats, options.gradient_steps)
    unfinished = options.out.with_suffix(".records")
    kinds = ("lengths", "ratio_lengths", "memory_lengths")
    lengths = {kind: getattr(options, kind) for kind in kinds}
    try:
        with Records(
            unfinished, {**asdict(settings), **lengths, "machine": _machine(settings)}
        ) as records:
            tables = run(settings, *lengths.values(), records)
    except RecordsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. The same command resumes from {unfinished}.", file=sys.stderr)
        return 130
    command = shlex.join(["python", "benchmarks/run.py", *argv])
    page = f"# Benchmarks\n\nResults of `{command}` on {_machine(settings)}\n\n{tables}\n"
    print(page)
    options.out.write_text(page, encoding="utf-8")
    unfinished.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
