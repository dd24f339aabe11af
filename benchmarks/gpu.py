"""Check the kernels on a GPU, and measure time and memory of attribution there.

    python benchmarks/gpu.py

The checks compare the kernels with the definition in float64. The models are Llamas of 1B and 8B
parameters in bfloat16 with random weights, which are made on the device: neither time nor memory
depends on the weights. The script prints a table for the page of the benchmarks. It stops when its
time is used up, and says which cells are missing. If a check fails, nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from run import CALLS, LAST, ONLINE_REMOVAL, SCORES, TARGETS

from captum_cw import remove_tokens
from captum_cw.metrics.tables import in_markdown
from captum_cw.products import BLOCKWISE, KERNEL
from support.kernel_cases import TOLERANCES, core_cases, engine, error_of, make

LENGTHS = (512, 2048, 8192, 32768)
REMOVED = 0.5

#: The sizes of Llama 3.2 1B and Llama 3.1 8B.
MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}

#: What a cell says if it was not measured.
NO_MEMORY, NO_TIME = "out of memory", "out of time"

#: A call runs a second time, without the time to compile kernels, if the first took less than this.
REPEATED_BELOW = 8.0


def _removal(model: Any, ids: Tensor) -> object:
    with remove_tokens(model, "contribution", REMOVED):
        return CALLS[LAST](model, ids)


#: Each measurement: its name, its call, and its engine.
MEASUREMENTS: tuple[tuple[str, Callable[[Any, Tensor], object], str | None], ...] = (
    (LAST, CALLS[LAST], None),
    (f"{SCORES}, kernels", CALLS[SCORES], KERNEL),
    (f"{SCORES}, blockwise", CALLS[SCORES], BLOCKWISE),
    (f"{TARGETS}, kernels", CALLS[TARGETS], KERNEL),
    (f"removal, {ONLINE_REMOVAL}", _removal, KERNEL),
)


@dataclass(frozen=True)
class Budget:
    """The time that is left."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left; negative if there are none."""
        return self.start + self.seconds - time.monotonic()


def failed_checks(device: str, budget: Budget) -> Iterator[str]:
    """Yield a line for each case in which a kernel departs from the definition."""
    for case, reduction, signed in core_cases(device):
        if budget.left < 0:
            yield "The checks took all the time."
            return
        error = error_of(case, make(case), reduction, signed=signed)
        allowed = TOLERANCES[case.dtype]
        if not error < allowed:
            yield f"error {error:.1e}, above {allowed:.0e}: {case}, {reduction}, signed={signed}"


@contextmanager
def random_llama(size: str, device: str, longest: int) -> Iterator[Any]:
    """Make a Llama with random weights on a device, and free its memory afterwards."""
    config = transformers.LlamaConfig(
        **MODELS[size],
        vocab_size=32000,
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    yield model
    del model
    _free(device)


def measured(call: Callable[[], object], device: str, budget: Budget) -> tuple[str, str]:
    """Return the seconds and the gigabytes of a call, as text, or why there are none."""
    if budget.left < 0:
        return NO_TIME, ""
    _free(device)
    try:
        seconds = _seconds(call, device)  # it may compile kernels
        if seconds < min(REPEATED_BELOW, budget.left):
            _free(device)
            seconds = _seconds(call, device)
    except torch.cuda.OutOfMemoryError:
        return NO_MEMORY, ""
    peak = torch.cuda.max_memory_allocated(device) if device != "cpu" else 0
    return f"{seconds:.3f}", f"{peak / 1e9:.1f}"


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _seconds(call: Callable[[], object], device: str) -> float:
    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    result = call()
    wait()
    del result  # held until here, because it is part of the memory that a call needs
    return time.perf_counter() - start


def table(sizes: Sequence[str], lengths: Sequence[int], device: str, budget: Budget) -> str:
    """Measure all cells, the short texts first, and return them as Markdown."""
    cells: dict[tuple[str, int, str], tuple[str, str]] = {}
    for size in sizes:
        with random_llama(size, device, max(lengths)) as model, torch.no_grad():
            for length in lengths:
                ids = torch.randint(32000, (1, length), device=device)
                for name, call, by in MEASUREMENTS:
                    with engine(by if device != "cpu" else None):
                        found = measured(partial(call, model, ids), device, budget)
                    cells[size, length, name] = found
                    print(size, length, name, *found, file=sys.stderr, flush=True)
    heads = ["", *(f"{n} tokens: {unit}" for n in lengths for unit in ("s", "GB"))]
    rows = [
        [f"{size}: {name}", *(cell for n in lengths for cell in cells[size, n, name])]
        for size in sizes
        for name, _, _ in MEASUREMENTS
    ]
    return in_markdown(heads, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check the kernels on a GPU, and measure time and memory of attribution.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="sizes of the models")
    add("--lengths", nargs="+", type=int, default=LENGTHS, help="lengths of texts, in tokens")
    add("--seconds", type=float, default=220, help="time for everything")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and the measurements, and print their table."""
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none.", file=sys.stderr)
        return 1
    device, budget = "cuda", Budget(options.seconds)
    wrong = list(failed_checks(device, budget))
    if wrong:
        print("The kernels are not right on this device:", *wrong, sep="\n", file=sys.stderr)
        return 1
    print(f"All kernels are right ({budget.left:.0f} s are left).", file=sys.stderr)
    found = table(options.models, options.lengths, device, budget)
    print(
        f"{torch.cuda.get_device_name(device)}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; Llamas with random weights, bfloat16, one text. Gigabytes "
        "are the largest that were allocated, with the model.\n"
    )
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
