"""Results on devices without float64, under autocast, and with products in TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

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
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.rounding import product_rounding, rounding
from captum_cw.functional import AttentionLayer, output_gram, widest
from captum_cw.metrics import agreement
from captum_cw.removal.sinks import find_sinks, sink_rate
from support.inputs import TEXT, letter_tokenizer, token_ids
from support.models import bitnet, gpt2, head_gated, llama

# ---------------------------------------------------------------------------------------------
# Without float64


class NoFloat64(TorchDispatchMode):
    """Simulate a device without float64, such as MPS: creating such a tensor is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor, which the device does not have.")
        return result


def tensors(x: Any) -> list[Tensor]:
    """Return the tensors of a nested result, with booleans as numbers."""
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
        faithfulness = ComprehensivenessSufficiency(model, [0.5], quantity=metric, **options)
        methods = {"ours": "contribution", "chance": "random", "vw": "vw"}
        found = faithfulness.evaluate(methods, padded(model, ids), show_progress=False)
        # The results are on the CPU, which has float64.
        return [
            [r["clean"], r["clean_nll"], *tensors([r["values"], r["nll"]])] for r in found.records
        ]

    return run


def explained(model: nn.Module, ids: Tensor) -> Any:
    found = explain(model, letter_tokenizer(), ids[:1])
    return [found.scores, found.maps, [vars(head) for head in found.heads]]


def generated(model: nn.Module, ids: Tensor) -> Any:
    llm = LLMTokenAttribution(ContributionWeights(model), letter_tokenizer())
    found = llm.attribute(TEXT, target="b d e")
    return [found.seq_attr, found.token_attr, found.output_probs]


def scores(
    method: Callable[[nn.Module], Any], **options: Any
) -> Callable[[nn.Module, Tensor], Any]:
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
    for make in (llama, gpt2, bitnet) if entry in METHODS else (llama,):
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
    """A norm of 1e-5 of the largest has a square below the rounding of float32."""
    random = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(
        torch.randn(3, 64, d, generator=random).double(), full_matrices=False
    )
    weight = (u * torch.logspace(0, -5, u.shape[-1], dtype=torch.float64)) @ v
    value = u.mT[None].float()  # each value has the norm of one singular value
    expected = (value.double() @ weight.float().double()).norm(dim=-1).float()
    attention = torch.ones(1, 3, 1, value.shape[2])
    with NoFloat64():
        found = AttentionLayer.from_tensors(attention, value, weight.float()).value_norms
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)
    quadratic = ((value @ output_gram(weight.float())) * value).sum(-1).clamp(min=0).sqrt()
    assert (quadratic - expected).abs().max() > 1e-5


def test_analyses_without_float64_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has float64, even if the device of the model does not."""
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


# ---------------------------------------------------------------------------------------------
# Autocast


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def sharpened(model: nn.Module, by: float) -> nn.Module:
    """Larger logits, so that rounded queries and keys change the weights."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(by)
    return model


def error(found: Any, expected: Any) -> float:
    """Return the largest error, relative to the largest number of its tensor."""
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


UNDER_AUTOCAST = (*METHODS, "mean scores", "rollout", "LLMTokenAttribution", "head_share")


@pytest.mark.parametrize("entry", UNDER_AUTOCAST)
def test_measures_under_autocast_are_near_those_without(entry: str) -> None:
    """Errors are below 0.06 of the largest number; for a bfloat16 model they are 0.003 to 0.03."""
    for make in (llama, gpt2):
        model, ids = make(), token_ids(2, 9)
        expected = ENTRIES[entry](model, ids)
        with autocast():
            found = ENTRIES[entry](model, ids)
        assert 0 < error(found, expected) < 0.06


@pytest.mark.parametrize("make", [llama, gpt2, bitnet, head_gated])
@pytest.mark.parametrize("method", ["random", "contribution"])
def test_online_removal_runs_under_autocast(make: Any, method: str) -> None:
    model, ids = make(), token_ids(2, 9)
    whole = logits(model, ids)
    expected = ENTRIES["random removal"](model, ids) if method == "random" else None
    with autocast():
        before = model(ids).logits
        with remove_tokens(model, method, 0.5), torch.no_grad():
            found = model(ids).logits
    assert found.dtype == before.dtype
    assert found.isfinite().all()
    assert error(found, whole) > 0.1  # something was removed
    if expected is not None:  # the same pairs, in spite of the rounding
        assert error(found, expected) < 0.05


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("entry", ["perplexity", "log_prob", "metric of tokens"])
def test_faithfulness_under_autocast_is_near_that_without(make: Any, entry: str) -> None:
    model, ids = make(), token_ids(2, 9)
    expected = ENTRIES[entry](model, ids)
    with autocast():
        found = ENTRIES[entry](model, ids)
    assert 0 < error(found, expected) < 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("by", [3, 12])
def test_large_logits_under_autocast_are_those_of_the_kernel(attention: str, by: float) -> None:
    """The kernel reads queries and keys in bfloat16, although the model passes float32."""
    model = sharpened(llama(), by)
    model.set_attn_implementation(attention)
    with autocast():
        layers = ContributionWeights(model).attribute(token_ids(2, 9))
    for c in layers:
        assert c.dtype == torch.float32
        torch.testing.assert_close(c.sum((1, 3)), torch.ones(2, 9), rtol=0, atol=0.02)


def test_values_are_scaled_under_autocast_as_without() -> None:
    model, ids = llama(), token_ids(2, 9)

    def run() -> Tensor:
        with scale_values(model, 0.3, positions=[0, -1]):
            return logits(model, ids)

    expected = run()
    with autocast():
        assert error(run(), expected) < 0.05


def test_functions_on_tensors_leave_autocast_alone() -> None:
    random = torch.Generator().manual_seed(0)
    a, v, w = (
        torch.randn(*size, generator=random) for size in ((2, 4, 5, 5), (2, 2, 5, 8), (4, 8, 32))
    )

    def all_of_them() -> list[Tensor]:
        layer = AttentionLayer.from_tensors(a, v, w)
        return [
            functional.dense_map(layer, functional.contribution("intra")),
            functional.dense_map(layer, functional.vwon),
            functional.attention_weights(v, v),
            functional.output_gram(w),
            functional.pull_back(layer.output, w),
            functional.head_share(layer),
            functional.token_scores(layer, functional.contribution()),
            functional.query_scores(layer, functional.vw, slice(1, 3)),
        ]

    expected = all_of_them()
    with autocast():
        found = all_of_them()
        assert (w[0] @ w[0].T).dtype == torch.bfloat16
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


# ---------------------------------------------------------------------------------------------
# TF32


#: Products whose operands a GPU rounds. Attention kernels consist of such products.
PRODUCTS = {
    "matmul",
    "__matmul__",
    "bmm",
    "mm",
    "linear",
    "einsum",
    "addmm",
    "baddbmm",
    "scaled_dot_product_attention",
}


class Rounded(TorchFunctionMode):
    """Round the operands of the model's products to some bits, as TF32 rounds them to ten."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = 23 - bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            args = tree_map(self._rounded, args)
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        with torch._C.DisableTorchFunction():
            bits = x.detach().contiguous().view(torch.int32)
            half = (1 << (self.dropped - 1)) - 1 + ((bits >> self.dropped) & 1)
            rounded = ((bits + half) & -(1 << self.dropped)).view(torch.float32)
            # Rounding passes gradients on.
            return x + (rounded - x).detach() if x.requires_grad else rounded


@contextmanager
def products_in(setting: str) -> Iterator[None]:
    """Set PyTorch to TF32, and round products like a GPU with that setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with Rounded({"high": 10, "medium": 7}[setting]):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


IN_TF32 = (
    *METHODS,
    "decompose",
    "head_share",
    "mean scores",
    "rollout",
    "explain",
    "random removal",
    "find_sinks",
    "LLMTokenAttribution",
    "log_prob",
    "metric of tokens",
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("entry", IN_TF32)
def test_products_in_tf32_are_not_refused(entry: str, attention: str) -> None:
    for make in (llama, gpt2):
        model, ids = make(), token_ids(2, 9)
        model.set_attn_implementation(attention)
        expected = ENTRIES[entry](model, ids)
        with products_in("high"):
            found = ENTRIES[entry](model, ids)
        if entry == "explain":  # the keys of single heads are sorted, and their order may change
            found, expected = found[:2], expected[:2]
        if entry == "find_sinks":
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        else:
            assert 0 < error(found, expected) < 5e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("setting", ["high", "medium"])
@pytest.mark.parametrize("by", [1, 6])
def test_large_logits_of_rounded_operands_are_not_refused(
    attention: str, setting: str, by: float
) -> None:
    for make in (llama, bitnet):
        model = sharpened(make(), by)
        model.set_attn_implementation(attention)
        with products_in(setting):
            for c in ContributionWeights(model).attribute(token_ids(2, 9)):
                # Shares are relative to outputs that were rounded too.
                atol = 0.01 if setting == "high" else 0.1
                torch.testing.assert_close(c.sum((1, 3)), torch.ones(2, 9), rtol=0, atol=atol)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rounding_that_nobody_asked_for_is_refused(attention: str) -> None:
    model, ids = llama(), token_ids(2, 9)
    model.set_attn_implementation(attention)
    assert torch.get_float32_matmul_precision() == "highest"
    with Rounded(10), pytest.raises(UnsupportedModelError, match="recomputed"):
        ContributionWeights(model).attribute(ids)
    with products_in("high"), Rounded(5), pytest.raises(UnsupportedModelError, match="recomputed"):
        ContributionWeights(model).attribute(ids)


def test_adapters_and_containers_in_tf32_are_not_refused() -> None:
    """An adapter is compared with its module, and a container with its product."""
    torch.manual_seed(0)
    x, layer = torch.randn(2, 7, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    adapted = peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=["o_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    for model, inputs in ((encoder, x), (adapted, token_ids(2, 9))):
        expected = ContributionWeights(model).attribute(inputs)
        with products_in("high"):
            found = ContributionWeights(model).attribute(inputs)
        assert 0 < error(found, expected) < 5e-3


SETTINGS: dict[str, tuple[Callable[[], object], Callable[[], object], float]] = {
    "high": (
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("highest"),
        2**-10,
    ),
    "medium": (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
        2**-7,
    ),
    "allow_tf32": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False),
        2**-10,
    ),
    "fp32_precision": (
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        2**-10,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_rounding_of_products_follows_pytorchs_settings(name: str) -> None:
    if name == "fp32_precision" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("PyTorch has this setting since 2.9")
    choose, restore, expected = SETTINGS[name]
    wide, single, half = (
        torch.ones(1, dtype=t) for t in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert product_rounding(single) == torch.finfo(torch.float32).eps
    choose()
    try:
        assert product_rounding(single) == expected
        assert product_rounding(wide) == torch.finfo(torch.float64).eps
        assert product_rounding(single, half) == 2**-7
        assert rounding(single) == torch.finfo(torch.float32).eps
    finally:
        restore()
    assert product_rounding(single) == torch.finfo(torch.float32).eps
