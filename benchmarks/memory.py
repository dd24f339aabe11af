"""Estimate the memory of attribution for models of the Llama kind, and print a table.

``python benchmarks/memory.py`` prints the table of ``docs/howto/what_fits.md``. Each formula counts
the tensors that a pass holds at its peak, for one text of ``T`` tokens. A test compares them with
the memory of small models.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from captum_cw.weights import block_queries

#: The number of blocks of attention weights that a measure holds at once.
BLOCKS = 3

#: The numbers of tokens in the table.
LENGTHS = (2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of the Llama kind.

    Args:
        L: The number of layers.
        d: The size of hidden states.
        f: The size inside of an MLP.
        H: The number of query heads.
        H_kv: The number of key-value heads.
        d_h: The size of a head.
        V: The number of tokens in the vocabulary.
        b: The bytes of a weight or an activation.
    """

    L: int
    d: int
    f: int
    H: int
    H_kv: int
    d_h: int
    V: int
    b: int = 2

    @property
    def weights(self) -> int:
        """The bytes of all weights, with an output matrix of its own."""
        attention = 2 * self.d * (self.H + self.H_kv) * self.d_h
        layer = attention + 3 * self.d * self.f + 2 * self.d
        return self.b * (self.L * layer + 2 * self.V * self.d + self.d)

    @property
    def heads(self) -> int:
        """The numbers of a token in all queries, and in all head outputs."""
        return self.H * self.d_h

    @property
    def keys(self) -> int:
        """The numbers of a token in all keys and values."""
        return 2 * self.H_kv * self.d_h

    def forward(self, T: int) -> int:
        """Return the bytes of a forward pass: the peak is inside of an MLP."""
        return self.b * T * (4 * self.d + 3 * self.f + 2 * self.d_h)

    def scores(self, T: int) -> int:
        """Return the bytes of token scores: the peak is right after an output projection."""
        held = self.b * T * (5 * self.d + 2 * self.d_h + 2 * self.heads + self.keys)
        copies = 0
        if self.b < 4:  # queries, keys, values, head outputs, the output and its projection
            copies = 4 * T * (2 * self.heads + self.keys + self.d) + 4 * self.heads * self.d
        return max(self.forward(T), held + copies + 4 * T * 3 * self.heads + self.blocks(T))

    def removal(self, T: int) -> int:
        """Return the bytes of online removal: values of single heads besides."""
        return self.scores(T) + self.b * T * self.heads

    def maps(self, T: int) -> int:
        """Return the bytes of the maps of all layers, which are kept."""
        return self.scores(T) + 4 * self.L * self.H * T**2

    def target(self, T: int) -> int:
        """Return the bytes of contributions to a target: each layer keeps its activations."""
        start = self.b * T * (4 * self.f + 2 * self.d_h)
        return start + self.L * self._block(T) + self.blocks(T)

    def target_recomputed(self, T: int) -> int:
        """Return the bytes if layers run again: each keeps only its input and attention call."""
        layer = self.b * T * (2 * self.d + 2 * self.heads + self.keys)
        gradients = self.b * T * (6 * self.f + 2 * self.d)
        return self.L * layer + self._block(T) + gradients + self.blocks(T)

    def _block(self, T: int) -> int:
        """Return the bytes that the backward pass needs of one layer."""
        return self.b * T * (3 * self.f + 4 * self.d + self.heads + self.keys)

    def blocks(self, T: int) -> int:
        """Return the bytes of blocks of attention weights on a CPU."""
        per_query = self.H * T
        return BLOCKS * 4 * per_query * block_queries(per_query, torch.device("cpu"))


#: The sizes of Llama 3.1, in half precision.
MODELS = {
    "8B": Shape(L=32, d=4096, f=14336, H=32, H_kv=8, d_h=128, V=128256),
    "70B": Shape(L=80, d=8192, f=28672, H=64, H_kv=8, d_h=128, V=128256),
}


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch allocates on the CPU during a call and has not freed."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def table() -> str:
    """Return the table in Markdown, in gigabytes."""
    columns = {
        "forward pass": Shape.forward,
        "token scores": Shape.scores,
        "removal": Shape.removal,
        "contributions to a target": Shape.target,
        "the same, recomputed": Shape.target_recomputed,
        "dense maps": Shape.maps,
    }
    lines = [
        f"| model | weights | tokens | {' | '.join(columns)} |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for name, shape in MODELS.items():
        for T in LENGTHS:
            cells = [f"{needed(shape, T) / 1e9:,.1f}" for needed in columns.values()]
            lines.append(f"| {name} | {shape.weights / 1e9:.0f} | {T:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
