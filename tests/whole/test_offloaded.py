"""Models whose weights lie elsewhere until a layer runs give the results of models in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ALTIWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    EffectContributions,
    InputContributions,
    TargetContributions,
    TokenScores,
    remove_tokens,
)
from support import models
from support.inputs import padded_batch, token_ids

CPU = torch.device("cpu")


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=CPU)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def by_map(model: nn.Module, folder: Path) -> nn.Module:
    """Keep a part in memory, as ``device_map`` does, and put a layer and the head on disk."""
    places: dict[str, Any] = {name: "cpu" for name, _ in model.named_children()}
    (body,) = (name for name, child in model.named_children() if list(child.children()))
    del places[body]
    layers = "layers" if hasattr(getattr(model, body), "layers") else "h"
    for name, _ in getattr(model, body).named_children():
        places[f"{body}.{name}"] = "cpu"
    del places[f"{body}.{layers}"]
    places |= {f"{body}.{layers}.0": "disk", f"{body}.{layers}.1": "cpu"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": on_cpu,
    "disk": on_disk,
    "map": by_map,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": models.llama,
    "biased": lambda: models.llama(2, attention_bias=True),
    "gpt2": models.gpt2,
    "gemma3": models.gemma3,
}


def results_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    method = ContributionWeights(model)
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5):
        removed = model(**inputs).logits * inputs["attention_mask"][..., None]
    target = TargetContributions(model)
    return {
        "scores": TokenScores(method).attribute(inputs),
        "maps": torch.stack(method.attribute(inputs)),
        "residual": TokenScores(ContributionWeights(model, space="residual")).attribute(inputs),
        "rollout": TokenScores(method, layers="rollout").attribute(inputs),
        "alti": torch.stack(ALTIWeights(model).attribute(inputs)),
        "target": torch.stack(target.attribute(inputs, target=3)),
        "scores of a target": TokenScores(target).attribute(inputs, target=3),
        "inputs": InputContributions(model).attribute(inputs, target=3),
        "effects": torch.stack(EffectContributions(model).attribute(inputs, target=3)),
        "removal": removed,
    }


PAIRS = [
    ("llama", "cpu"),
    ("llama", "disk"),
    ("biased", "map"),
    ("gpt2", "map"),
    ("gemma3", "disk"),
]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_offloaded_models_give_the_same_results(name: str, way: str, tmp_path: Path) -> None:
    inputs = padded_batch("left")[0]
    expected = results_of(MODELS[name](), inputs)
    offloaded = WAYS[way](MODELS[name](), tmp_path)
    before = _state(offloaded)
    assert any(is_meta for _, is_meta, *_ in before)
    for what, found in results_of(offloaded, inputs).items():
        assert torch.allclose(found, expected[what], atol=1e-5), what
    assert _state(offloaded) == before


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return where the weights are, and the hooks of accelerate with the methods they wrap."""
    weights = [(name, p.is_meta, p.dtype, p.shape) for name, p in model.named_parameters()]
    hooks: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        own = vars(module)
        hooks.append((name, False, id(own.get("_hf_hook")), own.get("forward")))
        hooks.append((name, False, len(module._forward_hooks), len(module._forward_pre_hooks)))
    return [*weights, *hooks]


@pytest.mark.parametrize("way", ["cpu", "map"])
def test_offloaded_models_are_evaluated_alike(way: str, tmp_path: Path) -> None:
    def found(model: nn.Module) -> Any:
        metric = ComprehensivenessSufficiency(model, rates=[0.3])
        methods: dict[str, Any] = {"contribution": ContributionWeights(model), "target": "target"}
        return metric.evaluate(methods, token_ids(), show_progress=False)

    expected, result = found(models.llama()), found(WAYS[way](models.llama(), tmp_path))
    for name in ("contribution", "target"):
        for form in ("comprehensiveness", "sufficiency"):
            x, y = getattr(result, form)[name], getattr(expected, form)[name]
            assert torch.allclose(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-4), (name, form)
