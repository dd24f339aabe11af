"""The documentation is right: its Python runs, its commands parse, and its links have targets.

Pages say ``model`` and ``input_ids`` as readers do; here these are small and random. Blocks of a
page run one after the other in one namespace. The tutorials have tests of their own.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec

import nbformat
import pytest
import torch
import transformers
from matplotlib import pyplot as plt
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import captum_cw
from captum_cw import analysis, capture, cli, data, metrics, reproduce, visualization
from captum_cw.cli import output
from captum_cw.cli.parsing import UsageError
from captum_cw.models import loading
from captum_cw.removal import sinks
from captum_cw.text import tokens
from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("howto/*.md")),
    *sorted(DOCS.glob("results/*.md")),
]
WORDS = r"\n|\w+|[^\w\s]"


def parsed_command(example: Example) -> None:
    """Check that a command accepts its arguments, and run it if a page has made its data."""
    for command in re.split(r"&&|\n", str(example.parsed).replace("\\\n", " ")):
        if ours := re.match(r"\s*(?:captum-cw|torchrun .*-m captum_cw) ([^>]*)", command):
            arguments = shlex.split(ours[1], comments=True)
            try:
                options = cli.parser().parse_args(arguments)
            except SystemExit as end:
                if end.code:  # otherwise it printed something, such as help, and ended
                    raise
                continue
            if options.command == "attribute" and Path(options.data or "").is_file():
                assert cli.main([*arguments, "--debug"]) == 0
        if script := re.match(r"\s*python (\S+\.py)", command):
            assert (ROOT / script[1]).is_file(), script[1]


SYBIL = Sybil([PythonCodeBlockParser(), CodeBlockParser("sh", parsed_command)])


def tokenizer_of(text: str) -> Any:
    """A tokenizer with one token for each word of the text."""
    words = sorted(set(re.findall(WORDS, text)))
    model = WordLevel({word: place for place, word in enumerate(["?", *words])}, unk_token="?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Split(Regex(WORDS), "removed", invert=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="?", pad_token="?", mask_token="?"
    )


def language_model() -> Any:
    """A Llama of two layers and four heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config).eval()


def other_models() -> dict[str, Any]:
    """Return ``bert``, ``whisper`` and ``vit``, and their inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=2048, num_hidden_layers=2, **sizes)
    ).eval()
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, num_hidden_layers=2, **sizes)
    ).eval()
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64,
            d_model=32,
            num_mel_bins=8,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=10,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).eval()
    sound, written = torch.randn(1, 8, 20), torch.tensor([[1, 5, 6]])
    classifier = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=2048, num_hidden_layers=2, **sizes)
    ).eval()
    images = torch.rand(2, 3, 16, 16)
    seen = captum_cw.ContributionWeights(vit)
    seen.attribute(images)
    return {
        "bert": bert,
        "classifier": classifier,
        "vit": vit,
        "last_layer": vit.get_submodule(seen.layers[-1]),
        "pixel_values": images,
        "images": images,
        "whisper": whisper,
        "sound": sound,
        "written": written,
        "inputs": {"input_features": sound, "decoder_input_ids": written},
        "plot_image_scores": visualization.plot_image_scores,
    }


@pytest.fixture
def _small_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.usefixtures("_small_things")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document: Document = SYBIL.parse(path)
    model, tokenizer = language_model(), tokenizer_of(document.text)
    for name in ("load_model", "load_demo_model"):
        small = create_autospec(getattr(loading, name), return_value=(model, tokenizer))
        monkeypatch.setattr(loading, name, small)
        monkeypatch.setattr(output, name, small)
    texts = ["a share of the output", "what a head adds, and what it takes", "more than the mean"]
    monkeypatch.setattr(data, "load_texts", create_autospec(data.load_texts, return_value=texts))
    document.namespace.update(
        other_models(),
        model=model,
        tokenizer=tokenizer,
        input_ids=torch.tensor([[1, 2, 3, 4, 5, 6]]),
    )
    for example in document.examples():
        example.evaluate()


def test_pages_have_code() -> None:
    examples = [example for path in PAGES for example in SYBIL.parse(path).examples()]
    assert len(examples) > 40


def test_a_wrong_command_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\ncaptum-cw attribute --modell M --text T\n```\n")
    (example,) = SYBIL.parse(page).examples()
    with pytest.raises(UsageError):
        example.evaluate()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    prose = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


PUBLIC = (captum_cw, analysis, capture, data, loading, metrics, reproduce, sinks, visualization)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_names_are_in_the_api(module: ModuleType) -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    whole = f".. automodule:: {module.__name__}\n" in pages  # it includes all names
    one_by_one = re.findall(r"\.\. auto(?:class|function):: (\w+)$", pages, re.MULTILINE)
    names = {
        name
        for name in module.__all__
        if not (name.startswith("_") or isinstance(getattr(module, name), ModuleType))
    }
    assert whole or names <= set(one_by_one)


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_pages_of_tutorials_are_those_of_their_notebooks(path: Path) -> None:
    page = (DOCS / "tutorials" / f"{path.stem}.md").read_text(encoding="utf-8")
    for cell in nbformat.read(path, as_version=4).cells:
        source = cell.source.replace("](../docs/", "](../")
        assert source in page, f"python docs/run_tutorials.py {path.stem}"


STABLE = (captum_cw, analysis, data, loading, metrics, sinks, tokens, visualization)


@pytest.mark.parametrize("module", STABLE, ids=lambda module: module.__name__)
def test_public_names_have_an_example(module: ModuleType) -> None:
    named = [getattr(module, name) for name in module.__all__]
    # Results and protocols are documented with the functions that return or take them.
    elsewhere = ("Comparison", "Score", "Tokenizer")
    without = [
        x.__name__
        for x in named
        if (inspect.isclass(x) or inspect.isfunction(x)) and ">>>" not in (x.__doc__ or "")
    ]
    assert not [name for name in without if name not in elsewhere]
