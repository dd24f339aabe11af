"""PyTorch's defaults for new tensors do not change any number.

Each test builds a model and its inputs, and then calls ``torch.set_default_dtype`` or
``torch.set_default_device``, as a program may do for another model. On the device "meta" tensors do
not have numbers, so code that reads a tensor made there fails.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import TextTemplateInput, TextTokenInput
from matplotlib import pyplot as plt
from torch import Tensor

import captum_cw
from captum_cw import (
    ALTIWeights,
    AttentionWeights,
    ChatTokenInput,
    ComprehensivenessSufficiency,
    ContributionWeights,
    Explanation,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
    analysis,
    explain,
    remove_tokens,
    remove_values,
    scale_values,
)
from captum_cw.capture.model import two_tokens
from captum_cw.data import token_batches
from captum_cw.metrics import agreement, with_shuffled_weights
from captum_cw.models.inspection import attention_layers
from captum_cw.removal.sinks import find_sinks, first_token_mass, sink_rate
from captum_cw.text.tokens import readable_tokens, word_spans
from captum_cw.visualization import (
    fold_patches,
    plot_decomposition,
    plot_image_scores,
    plot_token_scores,
    text_html,
    text_records,
)
from support.inputs import TEXT, letter_tokenizer, token_ids
from support.models import bert, gpt2, llama

SHARES = [0.1, 0.3333333, 0.7, 0.11, 0.013, -0.2, 0.05, 0.6]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def both(dtype: torch.dtype, device: str) -> Iterator[None]:
    with default_dtype(dtype), default_device(device):
        yield


DEFAULTS: dict[str, Callable[[], Any]] = {
    "bfloat16 on meta": lambda: both(torch.bfloat16, "meta"),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Everything that must exist before the defaults change."""
    tokenizer = letter_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = "?", "Z"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    )
    model, ids = llama(), token_ids(1, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    texts = token_ids(2, 9)
    removed = [torch.zeros(1, 4, 9, dtype=torch.bool) for _ in range(2)]
    removed[0][:, 1, 4] = True
    metric = ComprehensivenessSufficiency(model, rates=[0.25, 0.5])
    result = metric.evaluate({"ours": "contribution", "chance": "random"}, texts)
    return SimpleNamespace(
        model=model,
        gpt2=gpt2(),
        bert=bert(),
        ids=ids,
        tokenizer=tokenizer,
        path=tmp_path_factory.mktemp("saved"),
        padded={"input_ids": texts, "attention_mask": mask},
        removed=removed,
        scores=torch.rand(2, 9),
        of_texts=torch.rand(2, 9),
        result=result,
        texts=texts,
        maps=ContributionWeights(model).attribute(ids),
        factors=ContributionWeights(model).decompose(ids),
        explanation=explain(model, tokenizer, TEXT),
        prompt=TextTokenInput(TEXT, tokenizer, skip_tokens=[2]),
        target=torch.tensor([5, 7]),
        long=token_ids(1, 24),
        output=torch.tensor([5, 7, 9]),
        chat=[{"role": "U", "content": "a b c"}, {"role": "A", "content": "d e"}],
        image=torch.rand(3, 4, 4),
        pixels=torch.rand(5),
    )


def logits(at: SimpleNamespace) -> Tensor:
    with torch.no_grad():
        found: Tensor = at.model(at.ids).logits
    return found


def removal(**options: Any) -> Callable[[SimpleNamespace], Tensor]:
    def run(at: SimpleNamespace) -> Tensor:
        method = options.get("method", "contribution")
        given = {name: x for name, x in options.items() if name != "method"}
        with remove_tokens(at.model, method, 0.5, **given):
            return logits(at)

    return run


def faithfulness(*methods: object, T: int = 9, **options: Any) -> Callable[[SimpleNamespace], Any]:
    def run(at: SimpleNamespace) -> Any:
        metric = ComprehensivenessSufficiency(at.model, rates=[0.5], **options)
        inputs = {name: x[:, -T:] for name, x in at.padded.items()}
        target = at.target if "prob" in str(options.get("quantity")) else None
        of = {str(n): m(at) if callable(m) else m for n, m in enumerate(methods)}
        found = metric.evaluate(of, inputs, target=target, show_progress=False)
        return found.per_example, found.corpus, found.aopc()

    return run


def masked_faithfulness(at: SimpleNamespace) -> Any:
    options = {"rates": [0.5], "mask_token_id": 0, "protected_ids": [3]}
    metric = ComprehensivenessSufficiency(at.bert, **options)
    inputs = {name: x[:, -4:] for name, x in at.padded.items()}
    found = metric.evaluate({"chance": "random"}, inputs, show_progress=False)
    return found.per_example, found.corpus, found.aopc()


def llm(
    method: Callable[[Any], Any], inp: Callable[[Any], Any], target: object = None
) -> Callable[[Any], Any]:
    def run(at: SimpleNamespace) -> Any:
        found = LLMTokenAttribution(method(at.model), at.tokenizer).attribute(
            inp(at), target=target or at.output
        )
        return found.seq_attr, found.token_attr, found.output_probs

    return run


def saved(at: SimpleNamespace) -> Explanation:
    at.explanation.save(at.path / "x.safetensors")
    return Explanation.load(at.path / "x.safetensors")


def texts_scaled(at: SimpleNamespace) -> Tensor:
    with scale_values(at.model, 0.3, positions=[0, -1]):
        return logits(at)


def without_values(at: SimpleNamespace) -> Tensor:
    with remove_values(at.model, at.removed):
        return logits(at)


def drawn(figure: Any) -> Any:
    """Return the numbers of a figure's images."""
    fig = figure[0]
    found = [np.asarray(image.get_array()) for ax in fig.axes for image in ax.images]
    plt.close(fig)
    return found


ANALYSES: dict[str, Callable[[Any], Any]] = {
    "component_correlations": lambda at: analysis.component_correlations(at.model, at.texts),
    "component_dispersion": lambda at: analysis.component_dispersion(at.model, at.texts),
    "component_regression": lambda at: analysis.component_regression(at.model, at.texts),
    "first_token_weight": lambda at: analysis.first_token_weight(at.model, at.texts),
    "head_regimes": lambda at: analysis.head_regimes(at.model, at.ids, size=2),
    "interference": lambda at: analysis.interference(at.model, at.texts),
    "output_norms": lambda at: analysis.output_norms(at.model, at.texts),
    "reference_frames": lambda at: analysis.reference_frames(at.model, at.texts, permutations=49),
    "selection_assumptions": lambda at: analysis.selection_assumptions(at.model, at.long),
    "semantic_cone": lambda at: analysis.semantic_cone(at.model, at.texts),
    "sink_scaling": lambda at: analysis.sink_scaling(at.model, at.ids, epsilon=0.05, factors=[0.5]),
    "token_selection": lambda at: analysis.token_selection(
        at.model, at.ids, sizes=(2,), random_sets=1
    ),
    "value_alignment": lambda at: analysis.value_alignment(at.model, at.texts),
    "weight_entropy": lambda at: analysis.weight_entropy(at.model, at.texts),
    "weight_maps": lambda at: drawn(analysis.weight_maps(at.model, at.texts).plot()),
}

MEASURES = (AttentionWeights, VWAttention, VWONAttention, ContributionWeights, ALTIWeights)

ENTRIES: dict[str, Callable[[Any], Any]] = {
    **{
        kind.__name__: lambda at, kind=kind: kind(at.model).attribute(at.padded)
        for kind in MEASURES
    },
    "intra": lambda at: ContributionWeights(at.model, scope="intra").attribute(at.padded),
    "residual": lambda at: VWAttention(at.gpt2, space="residual").attribute(at.ids),
    "decompose": lambda at: ContributionWeights(at.model).decompose(at.padded),
    "head_share": lambda at: ContributionWeights(at.model).head_share(at.padded),
    "layers": lambda at: ContributionWeights(at.model).layers,
    "two_tokens": lambda at: two_tokens(at.model),
    **{
        f"TokenScores {reduction}{' signed' * signed}": lambda at, r=reduction, s=signed: (
            TokenScores(ContributionWeights(at.model), r, signed=s).attribute(at.padded)
        )
        for reduction in ("mean", "sum", "max", "rms")
        for signed in (False, True)
    },
    "TokenScores of a query": lambda at: TokenScores(
        VWAttention(at.model), "sum", layers=None, heads=None, queries=-1
    ).attribute(at.padded),
    **{
        f"{kind.__name__} rollout": lambda at, kind=kind: TokenScores(
            kind(at.model), layers="rollout", queries=-1
        ).attribute(at.padded)
        for kind in (AttentionWeights, VWAttention, ContributionWeights, ALTIWeights)
    },
    "LLMTokenAttribution of texts": llm(ContributionWeights, lambda at: TEXT, target="b d e"),
    "LLMTokenAttribution of ids": llm(ContributionWeights, lambda at: at.prompt),
    "LLMTokenAttribution of rollout": llm(
        lambda model: TokenScores(ALTIWeights(model), layers="rollout"), lambda at: TEXT
    ),
    "LLMTokenAttribution of a chat": llm(VWAttention, lambda at: at.chat),
    "LLMTokenAttribution of some tokens": llm(
        VWAttention, lambda at: ChatTokenInput(at.chat, at.tokenizer, skip_tokens=[3])
    ),
    "LLMTokenAttribution of a template": llm(
        VWAttention, lambda at: TextTemplateInput("a {} c {}", ["b d e", "f"])
    ),
    "explain a text": lambda at: explain(at.model, at.tokenizer, TEXT),
    "explain ids": lambda at: explain(at.model, at.tokenizer, at.ids),
    "explain a chat": lambda at: explain(at.model, at.tokenizer, at.chat),
    "explanation page": lambda at: at.explanation.page(),
    "explanation frames": lambda at: (
        at.explanation.to_dataframe(),
        at.explanation.to_dataframe("maps"),
    ),
    "explanation xarray": lambda at: at.explanation.to_xarray().to_dict(),
    "explanation by word": lambda at: at.explanation.by_word("mean"),
    "explanation saved": saved,
    "explanation from maps": lambda at: Explanation.from_maps(
        list(TEXT.replace(" ", "") + "i"), {"contribution": at.maps}
    ),
    "explanation from a decomposition": lambda at: Explanation.from_maps(
        list(TEXT.replace(" ", "") + "i"), at.factors
    ),
    "find_sinks": lambda at: find_sinks(at.model, at.padded),
    "sink_rate": lambda at: sink_rate(at.model, at.padded),
    "first_token_mass": lambda at: first_token_mass(at.model, at.padded),
    "remove_tokens by contribution": removal(),
    "remove_tokens at random": removal(method="random"),
    "remove_tokens, clean": removal(scoring="clean", ranking="global", method="random"),
    "remove_values": without_values,
    "scale_values": texts_scaled,
    **{
        f"metric {name}": faithfulness("contribution", "random", quantity=name)
        for name in ("perplexity", "nll", "log_prob", "prob", "kl")
    },
    "metric of one's own": faithfulness(
        "vw", quantity=lambda logits, batch, clean: (logits - clean).abs().mean((1, 2))
    ),
    "metric of tokens": faithfulness(
        lambda at: at.scores,
        lambda at: ALTIWeights(at.model),
        "random",
        granularity="token",
        reduction="sum",
    ),
    "metric of masked tokens": masked_faithfulness,
    "metric of a shuffled model": faithfulness(
        lambda at: ContributionWeights(with_shuffled_weights(at.model))
    ),
    "metric, clean": faithfulness("random", "vwon", scoring="clean", ranking="global"),
    "compare": lambda at: [
        at.result.compare("ours", "chance", statistic=s, samples=50)
        for s in ("mean", "nll", "corpus")
    ],
    "result frame": lambda at: at.result.to_dataframe(),
    "agreement": lambda at: agreement(at.scores.round(decimals=1), at.of_texts),
    "token_batches": lambda at: token_batches([TEXT, "a b"], at.tokenizer, max_length=6),
    "packed token_batches": lambda at: token_batches(
        [TEXT, "a b c"], at.tokenizer, max_length=4, pack=True
    ),
    "readable_tokens": lambda at: readable_tokens(at.tokenizer, [1, 2, 3]),
    "word_spans": lambda at: word_spans(at.tokenizer, at.ids[0]),
    "attention_layers": lambda at: attention_layers(at.model),
    "text_records": lambda at: [
        (record.word_attributions, record.attr_score)
        for record in text_records({"list": SHARES, "tensor": at.scores[0, :8]}, list(TEXT[::2]))
    ],
    "text_html": lambda at: text_html(text_records({"x": SHARES}, list(TEXT[::2]), skip=[0])),
    "fold_patches": lambda at: fold_patches(at.pixels, image_size=4, patch_size=2),
    "plot_image_scores": lambda at: drawn(plot_image_scores(at.pixels, at.image, patch_size=2)),
    "plot_token_scores": lambda at: drawn(
        plot_token_scores({"x": at.scores[0, :8]}, list(TEXT[::2]))
    ),
    "plot_decomposition": lambda at: drawn(plot_decomposition(at.factors[0])),
    **ANALYSES,
}


def numbers(x: Any) -> Any:
    """Convert a result to lists, numbers and text, with the dtypes of its tensors."""
    if isinstance(x, Tensor):
        assert x.device.type == "cpu"
        return str(x.dtype), tuple(x.shape), numbers(x.tolist())
    if isinstance(x, np.ndarray):
        return str(x.dtype), numbers(np.ma.filled(x, -1.0).tolist())
    if isinstance(x, pd.DataFrame):
        return numbers(x.to_dict("list"))
    if isinstance(x, Mapping):
        return {key: numbers(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [numbers(value) for value in x]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: numbers(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, float) and math.isnan(x):
        return "nan"
    return x if isinstance(x, (int, float, str, type(None))) else str(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES)
def test_defaults_for_new_tensors_change_no_number(at: SimpleNamespace, entry: str) -> None:
    expected = numbers(ENTRIES[entry](at))
    assert expected not in ([], {}, None)
    for name, default in DEFAULTS.items():
        with default():
            found = ENTRIES[entry](at)
        assert numbers(found) == expected, name


#: Functions whose results depend on the defaults. ``from_numpy`` and generators do not.
MAKERS = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}
#: Functions that return integers for any default.
OF_INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}


def implicit_makers(source: str) -> list[str]:
    """Return the calls that leave the device or the dtype to PyTorch's defaults."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        name = call.func.attr
        if ast.unparse(call.func) != f"torch.{name}" or name not in MAKERS:
            continue
        needed = {"device"} if name in OF_INTEGERS else {"device", "dtype"}
        if needed - {keyword.arg for keyword in call.keywords}:
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "line", ["torch.zeros(3)", "torch.ones(2, dtype=x.dtype)", "torch.tensor(n, device=x.device)"]
)
def test_a_tensor_made_by_defaults_is_found(line: str) -> None:
    assert implicit_makers(line) == [line]


def test_every_tensor_is_made_with_dtype_and_device() -> None:
    files = sorted(Path(captum_cw.__file__).parent.rglob("*.py"))
    found = {file.name: implicit_makers(file.read_text("utf-8")) for file in files}
    assert len(files) > 50
    assert not {name: lines for name, lines in found.items() if lines}
