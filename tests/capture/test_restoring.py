"""After any call of the package, the model and what was passed are what they were before."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from captum_cw import (
    ALTIWeights,
    AttentionWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    LLMTokenAttribution,
    TokenScores,
    VWAttention,
    VWONAttention,
    explain,
    remove_tokens,
    scale_values,
)
from captum_cw.capture import evaluating
from captum_cw.capture.restoring import _ModuleState
from captum_cw.models.inspection import attention_layers
from captum_cw.removal.sinks import find_sinks, first_token_mass, sink_rate
from support.inputs import letter_tokenizer
from support.models import SIZES, build, llama
from support.state import contents_of


class Untidy(transformers.LlamaForCausalLM):
    """Leaves things behind in each pass: attributes, buffers, entries of lists, written tensors."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lengths: list[int] = []
        self.seen = {"last": 0}
        self.deltas: Tensor | None = None
        self.kept = torch.zeros(4)
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("table", torch.zeros(1))

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        T = kwargs["inputs_embeds"].shape[1] if input_ids is None else input_ids.shape[1]
        self.lengths.append(T)
        self.seen["last"] = T
        self.deltas = torch.full((2,), T)
        self.later = T
        self.kept.add_(T)
        self.passes += 1
        self.table = torch.ones(T)
        self.model.layers[0].self_attn.note = T
        if input_ids is not None:
            ids = input_ids.clone()
            input_ids.zero_()  # into what it was given
            input_ids = ids
        return super().forward(input_ids=input_ids, **kwargs)


def untidy() -> nn.Module:
    return build(Untidy, transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def text() -> Tensor:
    return torch.tensor([[5, 9, 3, 7, 11, 4, 8]])


def measured(kind: Any) -> Callable[[nn.Module, Any], Any]:
    return lambda model, inputs: kind(model).attribute(inputs)


def metric(model: nn.Module, inputs: Any, **options: Any) -> None:
    found = ComprehensivenessSufficiency(model, rates=[0.5], **options)
    methods = {"contribution": ContributionWeights(model), "random": "random"}
    found.evaluate(methods, inputs, show_progress=False)


def llm(model: nn.Module, inputs: Any, **options: Any) -> None:
    tokenizer = letter_tokenizer()
    LLMTokenAttribution(ContributionWeights(model), tokenizer).attribute("a b c", **options)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "attention": measured(AttentionWeights),
    "vw": measured(VWAttention),
    "vwon": measured(VWONAttention),
    "contribution": measured(ContributionWeights),
    "alti": measured(ALTIWeights),
    "layers": lambda model, inputs: ContributionWeights(model).layers,
    "decompose": lambda model, inputs: ContributionWeights(model).decompose(inputs),
    "head_share": lambda model, inputs: ContributionWeights(model).head_share(inputs),
    "token scores": lambda m, x: TokenScores(ContributionWeights(m)).attribute(x),
    "rollout": lambda m, x: TokenScores(AttentionWeights(m), layers="rollout").attribute(x),
    "sinks": find_sinks,
    "first token": first_token_mass,
    "sink rate": sink_rate,
    "overview": attention_layers,
    "metric": metric,
    "metric, clean": lambda m, x: metric(m, x, scoring="clean"),
    "metric, tokens": lambda m, x: metric(m, x, granularity="token"),
    "llm": lambda m, x: llm(m, x, target="d e"),
    "llm, generated": lambda m, x: llm(m, x, gen_args={"max_new_tokens": 2}),
    "explain": lambda m, x: explain(m, letter_tokenizer(), "a b c"),
}
needs_ids = {"metric", "metric, clean", "metric, tokens", "llm", "llm, generated", "explain"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [llama, untidy])
def test_a_call_leaves_the_model_and_its_inputs_as_they_were(
    make: Any, call: str, training: bool
) -> None:
    model = make().train(training)
    inputs = {"input_ids": text(), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    before = contents_of([model, inputs])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The model is in training mode")
        CALLS[call](model, inputs)
    assert contents_of([model, inputs]) == before


@pytest.mark.parametrize("call", sorted(CALLS.keys() - needs_ids))
def test_a_call_leaves_embeddings_as_they_were(call: str) -> None:
    model = llama()
    inputs = {"inputs_embeds": model.get_input_embeddings()(text()).detach()}
    before = contents_of([model, inputs])
    CALLS[call](model, inputs)
    assert contents_of([model, inputs]) == before


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"alti", "rollout", "sinks"} - needs_ids))
def test_a_call_leaves_a_cache_as_it_was(call: str) -> None:
    model = llama()
    cache = DynamicCache()
    with torch.no_grad():
        model(text(), **{_name_of_cache(model): cache})
    inputs = {"input_ids": text(), _name_of_cache(model): cache}
    before = contents_of([model, inputs])
    CALLS[call](model, inputs)
    assert contents_of([model, inputs]) == before


def _name_of_cache(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def test_hooks_that_a_model_installs_once_are_taken_off_and_installed_again() -> None:
    """Asked for hidden states, models of transformers 5 put hooks on their layers and note it."""
    model = llama()
    given = {"input_ids": text(), "output_hidden_states": True}
    before = contents_of([model])
    ContributionWeights(model).attribute(given)
    assert contents_of([model]) == before
    with torch.no_grad():
        assert len(model(**given).hidden_states) == 3
    installed = contents_of([model])
    ContributionWeights(model).attribute(given)
    assert contents_of([model]) == installed
    with torch.no_grad():
        assert len(model(**given).hidden_states) == 3


def test_a_lazy_module_keeps_the_sizes_that_it_has_found() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with evaluating([model]):
        model(torch.zeros(1, 5))
    assert model[0].in_features == 5
    assert model(torch.zeros(1, 5)).shape == (1, 3)


def test_buffers_without_a_size_are_left_to_the_first_pass() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    for _ in range(2):
        with evaluating([model]):
            assert model(torch.ones(2, 5)).shape == (2, 5)
    assert model.training
    assert model[0].training


def test_a_model_that_cannot_be_kept_is_left_alone() -> None:
    class Odd(list[int]):
        def copy(self) -> list[int]:
            raise ZeroDivisionError

    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].odd = Odd()  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError), evaluating([model]):
        pass
    del model[1].odd
    with evaluating([model]):
        model[0].noted = 1  # type: ignore[assignment]
    assert model.training
    assert model[0].training
    assert not hasattr(model[0], "noted")


def test_a_model_is_as_it_was_after_an_error_too() -> None:
    model = untidy()
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    before = contents_of([model])
    with pytest.raises(ZeroDivisionError):
        ContributionWeights(model).attribute(text())
    assert contents_of([model]) == before
    handle.remove()


def test_what_a_forward_of_the_users_leaves_behind_stays() -> None:
    model, other = untidy(), untidy()
    with torch.no_grad():
        other(text())
        with remove_tokens(model, "contribution", 0.5, scoring="clean"):
            model(text())
    assert model.lengths == other.lengths == [7]
    assert torch.equal(model.passes, other.passes)
    assert model.later == 7
    with torch.no_grad(), scale_values(model, 0.5, positions=0):
        model(text())
    assert model.lengths == [7, 7]


def test_a_tensor_too_large_to_copy_is_named_where_it_is_overwritten() -> None:
    model = untidy()
    model.register_buffer("passes", torch.zeros(2**18 + 1))
    with pytest.warns(UserWarning, match="overwrites its tensor 'passes'"):
        ContributionWeights(model).attribute(text())


def test_several_threads_put_back_what_the_first_has_found() -> None:
    model = nn.Linear(2, 2)
    model.note = "before"  # type: ignore[assignment]
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with evaluating([model]):
            model.note = "inside"  # type: ignore[assignment]
            entered.set()
            assert leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(20)
    with evaluating([model]):
        assert not model.training
    assert (model.note, model.training) == ("inside", False)
    leave.set()
    thread.join()
    assert (model.note, model.training) == ("before", True)


def test_a_module_is_left_with_the_methods_that_others_put_on_it() -> None:
    model = nn.Linear(2, 2)
    with evaluating([model]):
        model.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert model(torch.ones(2)).tolist() == [2, 2]


def test_a_tensor_that_was_made_in_inference_mode_is_put_back() -> None:
    model = untidy()
    with torch.inference_mode():  # as an earlier pass of the user may do
        model.register_buffer("offsets", torch.ones(2))
    model.train()
    before = contents_of([model])
    ContributionWeights(model).attribute(text())
    assert contents_of([model]) == before
    assert model.training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_one_module_that_cannot_be_put_back_does_not_keep_the_others(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untidy().train()
    broken = next(model.children())  # many others are restored after it
    plain = _ModuleState.restore

    def restore(self: _ModuleState, module: nn.Module) -> None:
        if module is broken:
            raise error("no")
        plain(self, module)

    monkeypatch.setattr(_ModuleState, "restore", restore)
    with pytest.raises(error, match="no"), evaluating([model]):
        pass
    assert all(module.training for module in model.modules() if module is not broken)
    monkeypatch.undo()
    model.train()
    with evaluating([model]):
        assert not model.training
    assert broken.training
