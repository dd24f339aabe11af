"""Bad input raises an exception that names the value and a solution, and the model is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
import transformers
from torch import nn

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    InputContributions,
    LLMTokenAttribution,
    TokenScores,
    explain,
    remove_tokens,
)
from captum_cw.capture import UnsupportedModelError
from support.inputs import token_ids
from support.models import SIZES, build, gpt2, llama
from support.state import state_of

MODEL = llama()


def attribute(inputs: Any, additional: Any = None, **options: Any) -> Any:
    return ContributionWeights(MODEL, **options).attribute(inputs, additional)


def masked(*shape: int) -> dict[str, torch.Tensor]:
    return {"input_ids": token_ids(), "attention_mask": torch.ones(*shape, dtype=torch.long)}


def all_padding() -> dict[str, torch.Tensor]:
    inputs = masked(2, 9)
    inputs["attention_mask"][1] = 0
    return inputs


def free_memory(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    class Memory:
        available = amount

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "layer that is no attention module": (
        lambda: attribute(token_ids(), layer=MODEL.model.layers[0].mlp),
        ValueError,
        r"'model\.layers\.0\.mlp' \(LlamaMLP\).*model\.layers\.0\.self_attn",
    ),
    "layer that holds one": (
        lambda: attribute(token_ids(), layer=MODEL.model.layers[1]),
        ValueError,
        r"'model\.layers\.1' \(LlamaDecoderLayer\) is not an attention module",
    ),
    "layer of another model": (
        lambda: attribute(token_ids(), layer=nn.Linear(2, 2)),
        ValueError,
        "Linear is not part of the model",
    ),
    "layer by name": (
        lambda: attribute(token_ids(), layer="model.layers.0.self_attn"),
        TypeError,
        "'model.layers.0.self_attn' is not a module.*get_submodule",
    ),
    "no layers": (lambda: attribute(token_ids(), layer=[]), ValueError, "empty list"),
    "callable without layer": (
        lambda: ContributionWeights(lambda x: MODEL(x)),
        ValueError,
        "layer is None.*name the layers",
    ),
    "no model": (lambda: ContributionWeights("gpt2"), TypeError, "'gpt2' is a name: load"),
    "id above the vocabulary": (
        lambda: attribute(torch.tensor([[1, 64]])),
        ValueError,
        r"Token id 64.*0\.\.63",
    ),
    "id below the vocabulary": (
        lambda: attribute(torch.tensor([[1, -100]])),
        ValueError,
        "Token id -100",
    ),
    "no tokens": (
        lambda: attribute(torch.zeros(1, 0, dtype=torch.long)),
        ValueError,
        r"empty \(shape \(1, 0\)\)",
    ),
    "no examples": (
        lambda: attribute({"input_ids": torch.zeros(0, 4, dtype=torch.long)}),
        ValueError,
        r"'input_ids' is empty \(shape \(0, 4\)\)",
    ),
    "only padding": (lambda: attribute(all_padding()), ValueError, "Example 1 is empty"),
    "a text": (lambda: attribute("text"), TypeError, "of type str.*BatchEncoding"),
    "lists of ids": (
        lambda: attribute({"input_ids": [[1, 2]]}),
        TypeError,
        "'input_ids' is a list.*return_tensors='pt'",
    ),
    "one unbatched text": (
        lambda: attribute(torch.tensor([1, 2])),
        ValueError,
        r"shape \(2,\).*ids\[None\]",
    ),
    "float ids": (
        lambda: attribute(token_ids().float()),
        ValueError,
        r"float32 tensor of shape \(2, 9\).*embeddings",
    ),
    "mask of another length": (
        lambda: attribute(masked(2, 8)),
        ValueError,
        r"attention_mask has shape \(2, 8\).*must be \(2, 9\)",
    ),
    "mask of another batch": (
        lambda: attribute(token_ids(), torch.ones(3, 9)),
        ValueError,
        r"attention_mask has shape \(3, 9\)",
    ),
    "mask with three dimensions": (
        lambda: attribute(masked(2, 9, 9)),
        ValueError,
        r"attention_mask has shape \(2, 9, 9\)",
    ),
    "a mapping and more": (
        lambda: attribute(masked(2, 9), torch.ones(2, 9)),
        TypeError,
        "put them into the mapping",
    ),
    "a target": (
        lambda: ContributionWeights(MODEL).attribute(token_ids(), target=3),
        ValueError,
        "target=3.*TargetContributions",
    ),
    "unknown space": (
        lambda: attribute(token_ids(), space="logits"),
        ValueError,
        "space='logits'.*'attention'",
    ),
    "unknown kind": (
        lambda: attribute(token_ids(), kind="cross"),
        ValueError,
        "kind='cross'.*'self'",
    ),
    "unknown scope": (
        lambda: attribute(token_ids(), scope="outer"),
        ValueError,
        "scope='outer'.*'inter', 'intra'",
    ),
    "decomposition of intra": (
        lambda: ContributionWeights(MODEL, scope="intra").decompose(token_ids()),
        ValueError,
        "scope='intra'.*scope='inter'",
    ),
    "unknown measure": (lambda: TokenScores("contribution"), TypeError, "type str.*Contribution"),
    "unknown reduction": (
        lambda: TokenScores(ContributionWeights(MODEL), reduction="median"),
        ValueError,
        "reduction='median'.*'mean', 'sum', 'max', 'rms'",
    ),
    "unknown aggregation": (
        lambda: TokenScores(ContributionWeights(MODEL), layers="product"),
        ValueError,
        "layers='product'.*'mean'",
    ),
    "unknown queries": (
        lambda: TokenScores(ContributionWeights(MODEL), queries="last"),
        ValueError,
        "queries='last'.*an index or a slice",
    ),
    "query beyond the text": (
        lambda: TokenScores(ContributionWeights(MODEL), queries=9).attribute(token_ids()),
        IndexError,
        "queries=9, but example 0 has 9 tokens",
    ),
    "no query": (
        lambda: TokenScores(ContributionWeights(MODEL), queries=slice(9, 12)).attribute(
            token_ids()
        ),
        IndexError,
        r"queries=slice\(9, 12, None\) holds no token",
    ),
    "no method": (lambda: LLMTokenAttribution(MODEL, None), TypeError, "LlamaForCausalLM.*measure"),
}


class Pipeline:
    """It has the methods of a pipeline of transformers."""

    def __init__(self) -> None:
        self.model = MODEL

    def preprocess(self) -> None: ...

    def postprocess(self) -> None: ...

    def __call__(self) -> None: ...


NO_MODELS: dict[str, tuple[Any, str]] = {
    "a class": (transformers.LlamaForCausalLM, r"LlamaForCausalLM is a class: give an instance"),
    "a name": ("gpt2", r"'gpt2' is a name: load the model first, such as with load_model"),
    "a pipeline": (Pipeline(), r"Pipeline is a pipeline: give its model"),
}


@pytest.mark.parametrize("given", NO_MODELS)
def test_what_is_mistaken_for_a_model_is_named(given: str, tiny_tokenizer) -> None:
    model, message = NO_MODELS[given]
    calls: list[Callable[[Any], Any]] = [
        ContributionWeights,
        InputContributions,
        lambda model: explain(model, tiny_tokenizer, "Ice is cold"),
        lambda model: ComprehensivenessSufficiency(model, {"top": [0.5]}),
        lambda model: remove_tokens(model, "contribution", rate=0.5).__enter__(),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call(model)


def test_a_tokenizer_in_the_place_of_the_model_is_named(tiny_model, tiny_tokenizer) -> None:
    with pytest.raises(TypeError, match="is a tokenizer: give the model first, and then the"):
        explain(tiny_tokenizer, tiny_model, "Ice is cold")
    with pytest.raises(TypeError, match="tokenizer is of type LlamaForCausalLM: give the model's"):
        explain(tiny_model, tiny_model, "Ice is cold")
    with pytest.raises(TypeError, match="tokenizer is of type NoneType: give the model's"):
        LLMTokenAttribution(ContributionWeights(tiny_model), None)


def test_an_unknown_option_of_removal_is_named(tiny_model) -> None:
    message = "'scorring' is not an option of removal. Did you mean 'scoring'"
    with pytest.raises(TypeError, match=message):
        remove_tokens(tiny_model, "contribution", 0.5, scorring="clean").__enter__()
    with pytest.raises(TypeError, match=message):
        ComprehensivenessSufficiency(tiny_model, [0.5], scorring="clean")


def test_a_class_in_the_place_of_a_measure_is_named(tiny_model, tiny_tokenizer) -> None:
    message = "is the class ContributionWeights, and not an instance of it: give"
    metric = ComprehensivenessSufficiency(tiny_model, {"top": [0.5]})
    calls: list[Callable[[], Any]] = [
        lambda: TokenScores(ContributionWeights),
        lambda: LLMTokenAttribution(ContributionWeights, tiny_tokenizer),
        lambda: remove_tokens(tiny_model, ContributionWeights, rate=0.5).__enter__(),
        lambda: metric.evaluate({"mine": ContributionWeights}, [{"input_ids": token_ids()}]),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_the_model_left_as_it_was(case: str) -> None:
    call, kind, message = CASES[case]
    before = state_of(MODEL)
    with pytest.raises(kind, match=message):
        call()
    assert state_of(MODEL) == before


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="No attention was found in Linear"):
        ContributionWeights(nn.Linear(4, 4)).attribute(torch.ones(1, 4))


@pytest.mark.skipif(transformers.__version__ < "5", reason="JetMoe uses the registry since 5.0")
@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_whose_output_projection_is_not_found_is_refused(layers: int) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "num_attention_heads"}
    config = transformers.JetMoeConfig(
        **sizes, num_key_value_heads=2, kv_channels=8, num_experts_per_tok=2, num_local_experts=4
    )
    config.num_hidden_layers = layers
    model = build(transformers.JetMoeForCausalLM, config)  # each token has its own projections
    before = state_of(model)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.self_attention.*JetMoeAttention.*W_O"
    ):
        ContributionWeights(model).attribute(token_ids())
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_by_torchscript_is_refused() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    traced = torch.jit.trace(inner, torch.zeros(1, 2))
    for model, place in ((traced, "The model"), (nn.Sequential(inner, traced), "The module '1'")):
        with pytest.raises(UnsupportedModelError, match=f"{place}.* is compiled by TorchScript"):
            InputContributions(model).attribute(torch.ones(1, 2), target=0)
        with pytest.raises(UnsupportedModelError, match=f"{place}.* is compiled by TorchScript"):
            ContributionWeights(model)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(MODEL.config)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is on the meta device"):
        ContributionWeights(model).attribute(token_ids())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(bad: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = bad
    ids = token_ids()
    ids[1, 4] = 5
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn' is NaN or infinite at example 1, token \d"
    ):
        ContributionWeights(model).attribute(ids)
    assert state_of(model) == before


def test_a_result_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids()
    one_map = 4 * 2 * 4 * 9 * 9
    before = state_of(MODEL)
    free_memory(monkeypatch, 2 * one_map)
    assert len(ContributionWeights(MODEL).attribute(ids)) == 2
    with pytest.raises(MemoryError, match="2 layers"):  # it has four maps per layer
        ContributionWeights(MODEL).decompose(ids)
    free_memory(monkeypatch, 2 * one_map - 1)
    with pytest.raises(MemoryError, match=r"2 layers of 2 x 4 x 9 x 9.*layer=.*TokenScores"):
        ContributionWeights(MODEL).attribute(ids)
    assert state_of(MODEL) == before
    assert ContributionWeights(MODEL, MODEL.model.layers[0].self_attn).attribute(ids) is not None
    assert TokenScores(ContributionWeights(MODEL)).attribute(ids).shape == (2, 9)


def test_layers_of_different_shape_are_not_stacked() -> None:
    from captum_cw.attr.measures import stack_layers

    with pytest.raises(ValueError, match=r"\(1, 4, 9\), \(1, 2, 9\).*heads"):
        stack_layers([torch.zeros(1, 4, 9), torch.zeros(1, 2, 9)], "the scores")


def test_positions_beyond_the_learned_ones_are_refused() -> None:
    model = gpt2()
    with pytest.raises(ValueError, match="65 tokens.*64"):
        ContributionWeights(model).attribute(
            {"input_ids": token_ids(1, 5), "position_ids": torch.arange(60, 65)[None]}
        )
