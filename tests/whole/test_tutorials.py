"""Every tutorial runs in a fresh kernel, and its cells have the expected outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from support.paths import ROOT

TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SHOWN = {
    "01_contribution_weights_and_integrated_gradients": {
        "model": "text/plain",
        "maps": "image/png",
        "decompose": "image/png",
        "share": "image/png",
        "ig": "text/plain",
        "compare": "text/html",
        "agreement": "text/plain",
        "reduction": "image/png",
        "llm": "image/png",
    },
    "02_which_method_finds_the_tokens_that_matter": {
        "model": "text/plain",
        "remove": "text/plain",
        "sinks": "text/plain",
        "sinks-matter": "text/plain",
        "protect": "text/html",
        "evaluate": "text/html",
        "plot": "image/png",
        "aopc": "text/html",
        "perplexity": "text/html",
        "compare": "text/html",
        "reduction": "text/html",
        "ig": "text/plain",
        "fair": "text/html",
        "fair-compare": "text/html",
        "fair-scores": "image/png",
        "agreement": "text/html",
        "sanity": "text/html",
        "long": "text/plain",
    },
    "03_what_attention_sinks_do": {
        "model": "text/plain",
        "maps": "image/png",
        "first": "image/png",
        "alignment": "image/png",
        "norms": "image/png",
        "cone": "image/png",
        "scaling": "image/png",
        "regimes": "image/png",
        "frames": "image/png",
        "save": "text/html",
    },
    "04_a_vision_transformer": {
        "images": "image/png",
        "train": "text/plain",
        "view": "image/png",
        "compare-view": "image/png",
        "found": "text/html",
        "faithful": "image/png",
        "why-view": "image/png",
        "why-found": "text/html",
    },
    "05_long_texts": {
        "text": "text/plain",
        "answer": "text/plain",
        "answer-top": "text/html",
        "answer-plot": "image/png",
        "answer-found": "text/plain",
        "all": "text/plain",
        "all-plot": "image/png",
    },
    "06_speech_encoders_and_other_models": {
        "encoder-view": "text/html",
        "encoder-found": "text/plain",
        "speech-map": "image/png",
        "speech-found": "text/plain",
        "speech-why": "image/png",
        "own-encoder": "text/plain",
        "adapter": "text/plain",
    },
}
"""The media types that cells must produce, by the ids of the cells."""


def shown_by(cell: Any) -> set[str]:
    """Return the media types of a cell's outputs; printed text is plain text."""
    printed = {"text/plain" for o in cell.outputs if o.get("name") == "stdout"}
    return printed.union(*(o.get("data", {}) for o in cell.outputs))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_are_kept_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_shows_its_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    # Without folders to search, the only kernel is ipykernel's python3: this interpreter.
    here = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=here)
    # A failed cell raises, and so does a failed assertion in a cell.
    folder = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, km=kernel, timeout=600, resources=folder).execute(cleanup_kc=True)
    cells = {cell.id: cell for cell in notebook.cells}
    missing = {i: what for i, what in SHOWN[path.stem].items() if what not in shown_by(cells[i])}
    assert not missing


def test_there_are_tutorials() -> None:
    assert {path.stem for path in TUTORIALS} == set(SHOWN)
