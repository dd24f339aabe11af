"""Models as they come in practice: adapted, quantised, wrapped, in training."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from captum_cw import (
    ContributionWeights,
    TokenScores,
    remove_tokens,
    remove_values,
)
from captum_cw.capture import UnsupportedModelError
from support.inputs import token_ids
from support.measures import MEASURES
from support.models import gemma2, gpt2, llama, qwen2
from support.paths import ROOT
from support.state import check_untouched


def check_alike(a: nn.Module, b: nn.Module, atol: float = 1e-4) -> None:
    """Compare all measures and both removals of two models that compute the same."""
    ids = token_ids()
    for method in MEASURES.values():
        for x, y in zip(method(a).attribute(ids), method(b).attribute(ids), strict=True):
            assert torch.allclose(x, y, atol=atol * max(1.0, float(y.abs().max())))
    masks = [torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.3] * 2
    for changed in (
        lambda m: remove_values(m, masks),
        lambda m: remove_tokens(m, "contribution", 0.5),
        lambda m: remove_tokens(m, "vw", 0.5, scoring="clean"),
    ):
        with torch.no_grad(), changed(a):
            found = a(ids).logits
        with torch.no_grad(), changed(b):
            expected = b(ids).logits
        assert torch.allclose(found, expected, atol=atol * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------
# Adapters


def adapted(model: nn.Module, targets: list[str], **options: Any) -> Any:
    """A model with LoRA adapters that change its output."""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, **options)
    found: Any = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for name, p in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return found


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(llama(), ["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0.1),
    "dora": lambda: adapted(llama(), ["v_proj", "o_proj"], use_dora=True),
    "conv1d": lambda: adapted(gpt2(), ["c_proj", "c_attn"], fan_in_fan_out=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_count_whether_merged_or_not(name: str) -> None:
    apart = ADAPTERS[name]()
    merged = copy.deepcopy(apart).merge_and_unload()
    with torch.no_grad(), apart.disable_adapter():
        without = apart(token_ids()).logits
    with torch.no_grad():
        assert not torch.allclose(apart(token_ids()).logits, without, atol=1e-2)
    check_alike(apart, merged)
    check_untouched(apart)


def test_adapters_that_are_turned_off_do_not_count() -> None:
    model = ADAPTERS["lora"]()
    with model.disable_adapter():
        check_alike(model, llama())


# ---------------------------------------------------------------------------------------------
# Projections that are not one linear layer


class _Mixed(nn.Module):
    """A map that is linear in the head outputs, but not a factor of each feature."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, y: Tensor) -> Tensor:
        return self.inner(y + y.flip(-1))  # type: ignore[no-any-return]

    def plain(self) -> Tensor:
        w = self.inner.weight.detach()
        return w + w.flip(-1)


class _Adapted(_Mixed):
    """A hand-written adapter with the same input as the projection."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner)
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.inner(y) + self.up(self.down(y))  # type: ignore[no-any-return]

    def plain(self) -> Tensor:
        return self.inner.weight.detach() + self.up.weight.detach() @ self.down.weight.detach()


class _Packed(_Mixed):
    """A weight that cannot be read, in a product that is not a PyTorch function."""

    def forward(self, y: Tensor) -> Tensor:
        return torch.tensordot(y, self.inner.weight, dims=([-1], [-1]))

    def plain(self) -> Tensor:
        return self.inner.weight.detach()


@pytest.mark.parametrize("kind", [_Mixed, _Adapted, _Packed])
def test_whatever_is_linear_in_the_head_outputs_is_a_projection(kind: type[_Mixed]) -> None:
    model, plain = llama(), llama()
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        projection = kind(layer.self_attn.o_proj).eval()
        layer.self_attn.o_proj = projection
        with torch.no_grad():
            other.self_attn.o_proj.weight.copy_(projection.plain())
    check_alike(model, plain)
    check_untouched(model)


class _Subclass(torch.Tensor):
    """A tensor of another class, like quantised weights."""


def test_weights_of_another_class_are_asked_for() -> None:
    model = llama()
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj
        projection.weight = nn.Parameter(projection.weight.detach().as_subclass(_Subclass))
    check_alike(model, llama())


class _Bent(_Mixed):
    def forward(self, y: Tensor) -> Tensor:
        return torch.tensordot(y, self.inner.weight, dims=([-1], [-1])).tanh()


def test_a_product_that_is_not_linear_is_not_a_projection() -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.o_proj = _Bent(attention.o_proj).eval()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn"):
        ContributionWeights(model).attribute(token_ids())


class _Nearly(_Mixed):
    """A weight with a small adapter that is not linear."""

    def forward(self, y: Tensor) -> Tensor:
        return self.inner(y) + 0.01 * self.inner(y).relu()  # type: ignore[no-any-return]


class _ByToken(_Mixed):
    """A gate for each position before the projection, for texts of one length only."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner)
        self.gate = nn.Parameter(torch.rand(9, 32))

    def forward(self, y: Tensor) -> Tensor:
        return self.inner(y * self.gate)  # type: ignore[no-any-return]


def test_what_is_nearly_linear_is_refused() -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.o_proj = _Nearly(attention.o_proj).eval()
    with pytest.raises(UnsupportedModelError, match=r"Two linear layers.*layers\.1\.self_attn"):
        ContributionWeights(model).attribute(token_ids())


def test_a_projection_of_one_length_alone_is_followed_inside() -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.o_proj = _ByToken(attention.o_proj).eval()
    c = ContributionWeights(model).attribute(token_ids())[1]
    assert torch.allclose(c.sum((1, 3)), torch.ones(2, 9), atol=1e-5)
    check_untouched(model)


class _Thinned(nn.Module):
    """A dropout before the projection, which is not a projection itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.drop, self.inner = nn.Dropout(0.5), inner

    def forward(self, y: Tensor) -> Tensor:
        return self.inner(self.drop(y).clone())  # type: ignore[no-any-return]


def test_a_module_that_passes_head_outputs_on_is_no_projection() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj = _Thinned(layer.self_attn.o_proj).eval()
    check_alike(model, llama())


# ---------------------------------------------------------------------------------------------
# Quantised


def test_eight_bit_weights_with_rounded_activations() -> None:
    plain = llama()
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}).eval()
    assert "quantized" in type(model.model.layers[0].self_attn.o_proj).__module__
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(model.get_submodule(name).weight().dequantize())
    for method in MEASURES.values():
        maps = method(model).attribute(token_ids()), method(plain).attribute(token_ids())
        for x, y in zip(*maps, strict=True):
            assert torch.allclose(x, y, atol=0.1 * float(y.abs().max()))
    for c in ContributionWeights(model).attribute(token_ids()):
        assert torch.allclose(c.sum((1, 3)), torch.ones(2, 9), atol=1e-5)
    check_untouched(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(bits: int) -> None:
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao import quantization

    plain = llama()
    model = copy.deepcopy(plain)
    config = (
        quantization.Int8WeightOnlyConfig()
        if bits == 8
        else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    )
    torchao.quantize_(model, config)
    dequantised = copy.deepcopy(plain)
    for layer, q in zip(dequantised.model.layers, model.model.layers, strict=True):
        for a, b in zip(layer.modules(), q.modules(), strict=True):
            if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
                a.weight = nn.Parameter(b.weight.dequantize())
    head: Any = model.lm_head.weight
    if hasattr(head, "dequantize"):
        dequantised.lm_head.weight = nn.Parameter(head.dequantize())
    check_alike(model, dequantised, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Wrapped, and in training


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel() -> None:
    check_alike(nn.parallel.DistributedDataParallel(llama()), llama())


@pytest.mark.usefixtures("_one_process")
def test_fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = llama(), init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_alike(model, llama())


def test_data_parallel() -> None:
    check_alike(nn.DataParallel(llama()), llama())


def test_gradient_checkpointing_in_training() -> None:
    model = llama()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.warns(UserWarning, match="training mode: dropout is off"):
        found = ContributionWeights(model).attribute(token_ids())
    expected = ContributionWeights(llama()).attribute(token_ids())
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert model.training
    assert model.is_gradient_checkpointing


def test_checkpoints_that_are_run_again_under_a_removal_are_refused() -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    masks = [torch.ones(2, 4, 9, dtype=torch.bool)] * 2
    with remove_values(model, masks):
        loss = model(token_ids()).logits.square().sum()
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            loss.backward()


def test_scores_of_a_compiled_model() -> None:
    model = torch.compile(llama(), backend="eager")
    right = TokenScores(ContributionWeights(llama())).attribute(token_ids())
    assert torch.equal(TokenScores(ContributionWeights(model)).attribute(token_ids()), right)


@pytest.mark.skipif(
    transformers.__version__ < "5",
    reason="transformers spreads models over CPU processes since 5.0",
)
def test_models_that_are_spread_over_processes_are_as_the_whole(tmp_path: Path) -> None:
    models = {"llama": llama(), "qwen2": qwen2(), "gemma2": gemma2()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in models]
    script = ROOT / "tests" / "support" / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(script), *folders],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for process in (0, 1):
        for name in models:
            assert f"process {process}: {name}: 23 results" in done.stdout
