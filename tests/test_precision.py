"""Results on devices without float64, under autocast, and with products in TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import test_gates
import torch
from models import gpt2, llama, token_ids
from test_default_dtype import TEXT, small_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
    functional,
    remove_tokens,
    scale_values,
)
from captum_cw.analysis import first_token_weight, token_selection
from captum_cw.functional import AttentionLayer, output_gram, value_norms, widest
from captum_cw.metrics import agreement
from captum_cw.sinks import find_sinks, sink_rate

# ---------------------------------------------------------------------------------------------
# Without float64


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as MPS: making a tensor of it is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor, which the device does not have.")
        return result


def tensors(x: Any) -> list[Tensor]:
    """Those of a nested result, booleans as numbers."""
    if isinstance(x, Tensor):
        return [x.detach().float()]
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [y for part in x for y in tensors(part)]
    return [torch.tensor(float(x))] if isinstance(x, (int, float)) else []


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found.float()


def padded(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def removed(method: object, **options: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, ids: Tensor) -> Tensor:
        with remove_tokens(model, method, 0.5, **options):
            return logits(model, ids)

    return run


def evaluated(metric: Any = "perplexity", **options: Any) -> Callable[[nn.Module, Tensor], Any]:
    def run(model: nn.Module, ids: Tensor) -> Any:
        faithfulness = ComprehensivenessSufficiency(model, [0.5], metric=metric, **options)
        methods = {"ours": "contribution", "chance": "random", "vw": "vw"}
        found = faithfulness.evaluate(methods, padded(model, ids), show_progress=False)
        # What is read later lies on the CPU, which has float64.
        return [[r["clean"], r["clean_nll"], *tensors([r["values"], r["nll"]])] for r in found.records]

    return run


def explained(model: nn.Module, ids: Tensor) -> Any:
    found = explain(model, small_tokenizer(), ids[:1])
    return [found.scores, found.maps, [vars(head) for head in found.heads]]


def generated(model: nn.Module, ids: Tensor) -> Any:
    llm = LLMTokenAttribution(ContributionWeights(model), small_tokenizer())
    found = llm.attribute(TEXT, target="b d e")
    return [found.seq_attr, found.token_attr, found.output_probs]


def scores(method: Callable[[nn.Module], Any], **options: Any) -> Callable[[nn.Module, Tensor], Any]:
    def run(model: nn.Module, ids: Tensor) -> Any:
        return TokenScores(method(model), **options).attribute(padded(model, ids))

    return run


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "attention": AttentionWeights,
    "vw": VWAttention,
    "vwon": VWONAttention,
    "contribution": ContributionWeights,
    "intra": lambda model: ContributionWeights(model, scope="intra"),
    "residual": lambda model: ContributionWeights(model, space="residual"),
    "alti": ALTIWeights,
}

ENTRIES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    **{
        name: lambda model, ids, make=make: make(model).attribute(padded(model, ids))
        for name, make in METHODS.items()
    },
    "decompose": lambda model, ids: ContributionWeights(model).decompose(ids),
    "head_share": lambda model, ids: ContributionWeights(model).head_share(ids),
    "mean scores": scores(VWAttention),
    "largest scores": scores(METHODS["intra"], reduction="max", layers=None, heads=None),
    "rollout": scores(VWAttention, layers="rollout"),
    "flow": scores(ContributionWeights, layers="flow", queries=-1),
    "explain": explained,
    "LLMTokenAttribution": generated,
    "find_sinks": lambda model, ids: find_sinks(model, padded(model, ids), space="residual"),
    "sink_rate": lambda model, ids: sink_rate(model, ids),
    "online removal": removed("contribution"),
    "clean removal": removed("contribution-intra", scoring="clean"),
    "random removal": removed("random"),
    "perplexity": evaluated(),
    "log_prob": evaluated("log_prob"),
    "kl": evaluated("kl"),
    "a metric of one's own": evaluated(lambda logits, batch, clean: (logits - clean).sum((1, 2))),
    "metric of tokens": evaluated("nll", granularity="token"),
    "agreement": lambda model, ids: agreement(*logits(model, ids)[:, :2].unbind(1)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_result_needs_float64(entry: str) -> None:
    # BitNet multiplies head outputs by a factor of each feature.
    for make in (llama, gpt2, test_gates.bitnet) if entry in METHODS else (llama,):
        model, ids = make(), token_ids(2, 9)
        expected = tensors(ENTRIES[entry](model, ids))
        with NoFloat64():
            found = tensors(ENTRIES[entry](model, ids))
        assert found
        assert all(torch.isfinite(x).all() for x in expected)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_device_is_asked_for_float64_each_time() -> None:
    cpu = torch.device("cpu")
    assert widest(cpu) == torch.float64
    with NoFloat64():
        assert widest(cpu) == torch.float32
    assert widest(cpu) == torch.float64
    assert widest(torch.device("meta")) == torch.float64
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(1).double()


@pytest.mark.parametrize("d", [576, 8])
def test_norms_without_float64_lose_no_small_ones(d: int) -> None:
    """The square of a norm of 1e-5 of the largest is below float32's rounding of theirs."""
    random = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, 64, d, generator=random).double(), full_matrices=False)
    weight = (u * torch.logspace(0, -5, u.shape[-1], dtype=torch.float64)) @ v
    value = u.mT[None].float()  # each value has the norm of one singular value
    expected = (value.double() @ weight.float().double()).norm(dim=-1).float()
    with NoFloat64():
        found = value_norms(value, weight.float())
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)
    quadratic = ((value @ output_gram(weight.float())) * value).sum(-1).clamp(min=0).sqrt()
    assert (quadratic - expected).abs().max() > 1e-5


def test_analyses_without_float64_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has it, whatever the model's device has not."""
    model, ids = llama(), token_ids(1, 9)
    expected = first_token_weight(model, ids).to_dataframe()
    moved: list[AttentionLayer] = []
    on_cpu = AttentionLayer.on_cpu

    def counted(layer: AttentionLayer) -> AttentionLayer:
        moved.append(layer)
        return on_cpu(layer)

    monkeypatch.setattr("captum_cw.analysis.streaming.widest", lambda device: torch.float32)
    monkeypatch.setattr(AttentionLayer, "on_cpu", counted)
    found = first_token_weight(model, ids).to_dataframe()
    assert len(moved) == 2
    assert found.equals(expected)
    assert len(token_selection(model, ids, sizes=(2,), random_sets=1).to_dataframe())
