"""Vision transformers of timm and torchvision, where these are installed."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import ContributionWeights, TokenScores, remove_values
from support.measures import check_measures
from support.reference import multihead_measures, projection_measures

for name in ("timm", "torchvision"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)


def _declared_operators() -> torch.library.Library:
    """A build of torchvision for CUDA brings no operators to a torch without; ViTs need none."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in {"nms", *re.findall(r'(?:torchvision::|register_meta\(")(\w+)', text)}:
        with contextlib.suppress(RuntimeError):  # declared already
            library.define(f"{operator}(Tensor x) -> Tensor")
    return library


try:
    import torchvision  # noqa: F401
except RuntimeError:
    operators = _declared_operators()
import timm  # noqa: E402
from torchvision.models import VisionTransformer  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def inputs_of(modules: list[Any]) -> Iterator[list[Tensor]]:
    """What modules are given, in order."""
    given: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: given.append(args[0])) for m in modules]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def by_definition(attention: Any, x: Tensor) -> dict[str, Tensor]:
    """The measures of one attention module of timm, from its parts."""
    H = attention.num_heads
    q, k, v = attention.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    a = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return projection_measures(a, v, attention.proj.weight)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "qk_norm": True}),
    ],
)
def test_vision_transformers_of_timm(name: str, options: dict[str, Any], fused: bool) -> None:
    model = timm.create_model(name, depth=2, **options).eval()
    attentions = [block.attn for block in model.blocks]
    for attention in attentions:
        attention.fused_attn = fused
    pixels = torch.randn(2, 3, options["img_size"], options["img_size"])
    with torch.no_grad(), inputs_of(attentions) as given:
        before = model(pixels)
    for number, (attention, x) in enumerate(zip(attentions, given, strict=True)):
        with torch.no_grad():
            check_measures(model, pixels, by_definition(attention, x), number)
    contribution = ContributionWeights(model)
    scores = TokenScores(contribution, queries=0).attribute(pixels)
    assert scores.shape == (2, given[0].shape[1])
    assert contribution.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert torch.equal(model(pixels), before)


def test_values_are_removed_in_a_vision_transformer_of_timm() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    pixels, attention = torch.randn(2, 3, 32, 32), model.blocks[0].attn
    mask = torch.rand(2, 3, 17) < 0.4
    with torch.no_grad(), inputs_of([attention]) as given, inputs_of([attention.proj]) as heads:
        model(pixels)
        with remove_values(model, [mask]):
            model(pixels)
        q, k, v = attention.qkv(given[0]).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        expected = (a @ v.masked_fill(mask[..., None], 0)).transpose(1, 2).flatten(2)
    assert torch.allclose(heads[1], expected, atol=1e-5)
    assert not torch.allclose(heads[0], expected, atol=1e-2)


def test_vision_transformer_of_torchvision() -> None:
    model = VisionTransformer(32, 8, 2, 4, 16, 32).eval()
    attentions = [layer.self_attention for layer in model.encoder.layers]
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), inputs_of(attentions) as given:
        model(pixels)
    for number, (attention, x) in enumerate(zip(attentions, given, strict=True)):
        assert isinstance(attention, nn.MultiheadAttention)
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        check_measures(model, pixels, multihead_measures(attention, x, x, seen), number)
