"""Generated text is explained as the model computes it, and the model is left as it was."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_cw import (
    AttentionWeights,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    explain,
    functional,
)
from captum_cw.capture import UnsupportedModelError
from support.inputs import token_ids
from support.models import SIZES, bert, build, llama

IDS = token_ids(1, 9)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def expected_of(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """``(m, n)``: rows of the mean over heads and layers of a plain call."""
    maps = torch.stack(ContributionWeights(model).attribute(ids)).abs()
    return maps.mean((0, 2))[0, prompt - 1 : -1, :prompt]


# Models that do not predict the next token


@pytest.mark.parametrize("layers", ["mean", "rollout"])
@pytest.mark.parametrize("kind", [transformers.BertForMaskedLM, transformers.BertModel])
def test_a_model_that_sees_later_tokens_is_refused(
    kind: Any, layers: Any, tiny_tokenizer: Any
) -> None:
    scores = TokenScores(ContributionWeights(bert(kind)), layers=layers)
    llm = LLMTokenAttribution(scores, tiny_tokenizer)
    with pytest.raises(UnsupportedModelError, match="see those that come after.*TokenScores.*expl"):
        llm.attribute("a b c", target="d")
    assert TokenScores(ContributionWeights(bert(kind))).attribute(IDS).shape == (1, 9)


def test_a_bert_that_decodes_is_taken(tiny_tokenizer: Any) -> None:
    model = bert(transformers.BertLMHeadModel, is_decoder=True)
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    found = llm.attribute({"input_ids": IDS[:, :6]}, target=IDS[0, 6:])
    assert torch.allclose(found.token_attr, expected_of(model, IDS, 6), atol=1e-6)


class PrefixLM(nn.Module):
    """The first ``n`` tokens see each other, as in models that read a whole prompt at once."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.model, self.n, self.main_input_name = llama(), n, "input_ids"

    def forward(self, input_ids: Tensor) -> Any:
        T = input_ids.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        seen[: self.n, : self.n] = True
        return self.model(input_ids, attention_mask=seen[None, None])


@pytest.mark.parametrize(("seen", "fits"), [(5, True), (6, True), (7, False), (9, False)])
def test_tokens_of_a_prompt_may_see_each_other(seen: int, fits: bool, tiny_tokenizer: Any) -> None:
    model = PrefixLM(seen).eval()
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    inputs = {"input_ids": IDS[:, :6]}
    if not fits:
        with pytest.raises(UnsupportedModelError, match="see those that come after"):
            llm.attribute(inputs, target=IDS[0, 6:])
        return
    found = llm.attribute(inputs, target=IDS[0, 6:])
    assert torch.allclose(found.token_attr, expected_of(model, IDS, 6), atol=1e-6)


# Generation


def test_dropout_is_off_while_a_model_generates(tiny_tokenizer: Any) -> None:
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attn_pdrop": 0.9}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **dropout, **special)
    model = build(transformers.GPT2LMHeadModel, config)
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    still = llm.attribute("a b c", gen_args=GREEDY)
    model.train()
    model.transformer.h[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="training mode: dropout is off") as caught:
            found = llm.attribute("a b c", gen_args=GREEDY)
        assert len([w for w in caught if "training mode" in str(w.message)]) == 1
        assert found.output_tokens == still.output_tokens
        assert torch.allclose(found.token_attr, still.token_attr, atol=1e-6)
        assert {name: m.training for name, m in model.named_modules()} == modes


def generation(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``generate`` is called with."""
    calls: list[dict[str, Any]] = []
    generate = model.generate

    def watched(**arguments: Any) -> Any:
        calls.append(arguments)
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", watched)
    return calls


def test_no_token_of_a_prompt_is_padding(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    ids = torch.tensor([[0, 5, 0, 7]])  # 0 is the model's pad token
    assert model.generation_config.pad_token_id == 0
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    hidden = model.generate(ids, attention_mask=(ids != 0).long(), **GREEDY)
    assert not torch.equal(whole, hidden)  # so the mask matters here
    calls = generation(model, monkeypatch)
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    for given in (ids, {"input_ids": ids}):
        found: Any = llm.attribute(given, gen_args=GREEDY)
        assert torch.equal(found.output_ids, whole[0, 4:])
        assert calls.pop()["attention_mask"].tolist() == [[1, 1, 1, 1]]
        assert torch.allclose(found.token_attr, expected_of(model, whole, 4), atol=1e-6)
    llm.attribute("a b", gen_args=GREEDY)
    assert calls.pop()["attention_mask"].tolist() == [[1, 1]]


def test_generation_leaves_configurations_as_they_were(tiny_tokenizer: Any) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 3
    own, settings = model.generation_config, copy.deepcopy(vars(model.generation_config))

    class Changing(type(model)):  # type: ignore[misc]
        def generate(self, **arguments: Any) -> Any:
            self.generation_config = transformers.GenerationConfig()
            return super().generate(**arguments)

    model.__class__ = Changing
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    given = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    gen_args = {"generation_config": given}
    before = copy.deepcopy(vars(given))
    assert len(llm.attribute("a b", gen_args=gen_args).output_tokens) == 2
    assert gen_args == {"generation_config": given}
    assert vars(given) == before
    assert model.generation_config is own
    assert vars(own) == settings
    llm.attribute("a b")  # Captum's arguments
    assert model.generation_config is own
    assert vars(own) == settings
    asked = {**GREEDY, "return_dict_in_generate": True}
    assert len(llm.attribute("a b", gen_args=asked).output_tokens) == 4
    assert asked == {**GREEDY, "return_dict_in_generate": True}


# Memory


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def long(positions: int) -> nn.Module:
    sizes = {**SIZES, "max_position_embeddings": positions}
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes))


def test_what_is_held_of_a_layer_is_the_asked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    query_scores = functional.query_scores

    def weighed(*args: Any, **options: Any) -> Tensor:
        rows = query_scores(*args, **options)
        held.append(rows.untyped_storage().nbytes())
        return rows

    monkeypatch.setattr(functional, "query_scores", weighed)
    model = long(512)
    for T in (128, 256):
        TokenScores(ContributionWeights(model)).rows(token_ids(1, T), slice(T - 3, T))
        assert held == [4 * 3 * T] * 2
        held.clear()


def test_the_largest_tensor_grows_linearly_with_a_text(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", 2**10)
    model = long(2048)
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    sizes = []
    for T in (512, 1024):
        with Largest() as largest:
            llm.attribute({"input_ids": token_ids(1, T - 2)}, target=torch.tensor([5, 6]))
        sizes.append(largest.elements)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 1024 * 1024 / 4


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("queries", [slice(0, 2), slice(3, 6), slice(8, 9), slice(4, 4)])
def test_asked_rows_are_those_of_the_map(
    queries: slice, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_cw.weights.BLOCK_ELEMENTS", 4 * 9 * 2)  # two queries in a block
    model = llama()
    maps = torch.stack(ContributionWeights(model).attribute(IDS))
    expected = (maps if signed else maps.abs()).mean((0, 2))[:, queries]
    rows, _ = TokenScores(ContributionWeights(model), signed=signed).rows(IDS, queries)
    assert torch.allclose(rows, expected, atol=1e-6)


# Models in other forms


def offloaded(how: str, folder: Path) -> Any:
    device = torch.device("cpu")
    if how == "cpu":
        return accelerate.cpu_offload(llama(), execution_device=device)
    return accelerate.disk_offload(llama(), folder, execution_device=device)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_models_are_explained_as_others(
    how: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model, plain = offloaded(how, tmp_path), llama()
    assert next(model.parameters()).is_meta
    for gen_args, target in ((GREEDY, None), (None, "d e")):
        found, expected = (
            LLMTokenAttribution(ContributionWeights(m), tiny_tokenizer).attribute(
                "a b c", target=target, gen_args=gen_args
            )
            for m in (model, plain)
        )
        assert found.output_tokens == expected.output_tokens
        assert torch.allclose(found.token_attr, expected.token_attr, atol=1e-6)
        assert torch.allclose(found.output_probs, expected.output_probs, atol=1e-6)
    ours, theirs = explain(model, tiny_tokenizer, "a b c"), explain(plain, tiny_tokenizer, "a b c")
    assert torch.allclose(
        ours.maps["contribution-signed"], theirs.maps["contribution-signed"], atol=1e-6
    )
    assert ours.predicted == theirs.predicted


class Returning(nn.Module):
    """A model of one's own, that returns what ``form`` makes of its logits."""

    main_input_name = "input_ids"

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.model, self.form = llama(), form

    def forward(self, input_ids: Tensor) -> Any:
        return self.form(self.model(input_ids).logits)


FORMS: dict[str, Any] = {
    "logits and loss": lambda logits: (logits, logits.sum()),
    "loss and logits": lambda logits: (logits.sum(), logits),
    "a tensor": lambda logits: logits,
    "a dict": lambda logits: {"logits": logits},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_logits_are_found_in_whatever_a_model_returns(form: Any, tiny_tokenizer: Any) -> None:
    model = Returning(form).eval()
    expected = LLMTokenAttribution(ContributionWeights(llama()), tiny_tokenizer).attribute(
        "a b c", target="d e"
    )
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    found = llm.attribute("a b c", target="d e")
    assert torch.allclose(found.output_probs, expected.output_probs, atol=1e-6)
    assert torch.allclose(found.token_attr, expected.token_attr, atol=1e-6)
    ours, theirs = (
        explain(model, tiny_tokenizer, "a b c"),
        explain(llama(), tiny_tokenizer, "a b c"),
    )
    assert ours.predicted == theirs.predicted
    assert ours.probability is not None
    assert torch.allclose(ours.probability, theirs.probability, atol=1e-6)
    with pytest.raises(ValueError, match="Returning has no method generate: give the output"):
        llm.attribute("a b c")


def test_a_tuple_of_a_models_own_is_read(tiny_tokenizer: Any) -> None:
    model = llama()
    assert isinstance(model(IDS, return_dict=False), tuple)
    llm = LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer)
    found = llm.attribute({"input_ids": IDS[:, :6], "return_dict": False}, target=IDS[0, 6:])
    with torch.no_grad():
        probs = llama()(IDS).logits[0, 5:8].softmax(-1).gather(-1, IDS[0, 6:, None])[:, 0]
    assert torch.allclose(found.output_probs, probs, atol=1e-6)
    whole = explain(model, tiny_tokenizer, {"input_ids": IDS, "return_dict": False})
    assert whole.predicted == explain(model, tiny_tokenizer, IDS).predicted is not None


def test_hidden_states_are_not_logits(tiny_tokenizer: Any) -> None:
    for model in (llama().model, Returning(lambda logits: logits[..., :32]).eval()):
        assert explain(model, tiny_tokenizer, IDS).predicted is None
    with pytest.raises(TypeError, match="without logits"):
        LLMTokenAttribution(ContributionWeights(llama().model), tiny_tokenizer).attribute(
            "a b", target="c"
        )


def test_only_the_logits_of_the_output_are_asked_for(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
    LLMTokenAttribution(ContributionWeights(model), tiny_tokenizer).attribute("a b c", target="d e")
    assert sizes == [3]


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="since transformers 5.5")
def test_layers_that_leave_out_early_queries_are_read_from_the_end(tiny_tokenizer: Any) -> None:
    from support import architectures

    model = architectures.build("gemma4_text")
    scores = TokenScores(AttentionWeights(model))
    rows, _ = scores.rows({"input_ids": IDS, "logits_to_keep": 4}, slice(5, 8))
    expected, _ = scores.rows({"input_ids": IDS, "logits_to_keep": 0}, slice(5, 8))
    assert torch.allclose(rows, expected, atol=1e-6)
    llm = LLMTokenAttribution(AttentionWeights(model), tiny_tokenizer)
    found = llm.attribute({"input_ids": IDS[:, :6]}, target=IDS[0, 6:])
    assert torch.allclose(found.token_attr, expected[0, :, :6], atol=1e-6)


@pytest.mark.parametrize(
    ("target", "message"),
    [(3, "target is a int: give a text"), (torch.zeros(1, 2).long(), r"of shape \(1, 2\)")],
)
def test_targets_that_are_not_an_output_are_refused(
    target: Any, message: str, tiny_tokenizer: Any
) -> None:
    llm = LLMTokenAttribution(ContributionWeights(llama()), tiny_tokenizer)
    with pytest.raises(TypeError, match=message):
        llm.attribute("a b", target=target)


def test_nothing_is_said_where_all_is_well(tiny_tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLMTokenAttribution(ContributionWeights(llama()), tiny_tokenizer).attribute("a", target="b")
