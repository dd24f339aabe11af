"""Contributions to targets, against linearised models that are written out by hand in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import InputContributions, TargetContributions, functional
from captum_cw.capture.target_run import TargetPass
from captum_cw.functional import TargetLayer, dense_map
from support import linearised
from support.inputs import padded_batch, token_ids
from support.linearised import Choose, Linearised
from support.models import bert, gemma2, gemma3, gpt2, jamba, llama, t5, with_gains
from support.precision import InDouble

Model = tuple[Callable[[], nn.Module], Callable[..., Linearised]]

MODELS: dict[str, Model] = {
    "llama": (lambda: llama(2), linearised.llama),
    "gpt2": (gpt2, linearised.gpt2),
    "gemma2": (gemma2, linearised.gemma),
    "gemma3": (gemma3, linearised.gemma),
    "t5": (t5, linearised.t5),
    "jamba": (jamba, linearised.jamba),
    "bert-classifier": (
        lambda: bert(transformers.BertForSequenceClassification, num_labels=3),
        linearised.bert_classifier,
    ),
}

#: The first token of a BERT is the one that is read, so it is never padding.
SIDES = dict.fromkeys(MODELS, ("none", "left", "right")) | {"bert-classifier": ("none", "right")}

#: A target and its contrast, with the position and the token of each example. A negative position
#: counts from the last token that is not padding.
TOKENS: dict[str, tuple[Any, Any, list[tuple[int, int]], list[tuple[int, int]]]] = {
    "token": (7, None, [(-1, 7), (-1, 7)], []),
    "position and token": ((5, 9), None, [(5, 9), (5, 9)], []),
    "one an example": ([7, (-3, 11)], None, [(-1, 7), (-3, 11)], []),
    "contrast": ([7, (5, 9)], (-2, 3), [(-1, 7), (5, 9)], [(-2, 3), (-2, 3)]),
}
CLASSES: dict[str, tuple[Any, Any, list[tuple[int, int]], list[tuple[int, int]]]] = {
    "class": (1, None, [(0, 1), (0, 1)], []),
    "one an example": (torch.tensor([2, 0]), None, [(0, 2), (0, 0)], []),
    "contrast": (2, [0, 1], [(0, 2), (0, 2)], [(0, 0), (0, 1)]),
}
#: Where SDPA is possible in Gemma 2, it leaves out the soft-cap.
RUNS = [
    (name, side, implementation)
    for name in MODELS
    for side in SIDES[name]
    for implementation in ("eager", "sdpa")
    if (name, implementation) != ("gemma2", "sdpa")
]
CASES = [
    (name, side, implementation, target)
    for name, side, implementation in RUNS
    for target in (CLASSES if name.startswith("bert") else TOKENS)
    if implementation == "eager" or target == "contrast"
]


def inputs_of(name: str, side: str) -> tuple[dict[str, Tensor], Tensor]:
    inputs, real = padded_batch(side)
    if name == "t5":
        inputs["decoder_input_ids"] = token_ids(T=7, seed=1)
    if name == "bert-classifier":
        inputs["token_type_ids"] = (torch.arange(9) > 3).long().expand(2, 9).contiguous()
    return inputs, real


@functools.cache
def model_of(name: str, implementation: str, dtype: torch.dtype) -> Any:
    model: Any = with_gains(MODELS[name][0]()).to(dtype)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        pytest.skip(str(error))
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fused product has no float64
    return model


@functools.cache
def reference_of(name: str, side: str) -> Linearised:
    model = model_of(name, "eager", torch.float32)
    with torch.no_grad():
        return MODELS[name][1](model, *inputs_of(name, side))


def choose(name: str, real: Tensor, target: str) -> Choose:
    """Choose the target from logits by loops."""
    _, _, chosen, opposed = (CLASSES if name.startswith("bert") else TOKENS)[target]
    real = real if name != "t5" else torch.ones(2, 7, dtype=torch.bool)

    def values(logits: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
        found = logits.new_zeros(len(logits), 2)
        for b, (position, token) in enumerate(pairs):
            if logits.dim() == 3:  # of classes
                found[:, b] = logits[:, b, token]
            else:
                places = real[b].nonzero()[:, 0] if position < 0 else torch.arange(9)
                found[:, b] = logits[:, b, places[position], token]
        return found

    return lambda logits: values(logits, chosen) - values(logits, opposed)


def found_by_us(model: Any, inputs: dict[str, Tensor], target: Any, contrast: Any) -> TargetPass:
    def whole_map(layer: TargetLayer) -> Tensor:
        return dense_map(layer, functional.target)

    method = TargetContributions(model, kind="all")
    return method.run(
        inputs, None, lambda _, x: whole_map(x), target=target, contrast=contrast, by_example=True
    )


def check(
    name: str, side: str, target: str, found: TargetPass, tolerance: float, of: Linearised
) -> None:
    _, real = inputs_of(name, side)
    shares, constants, maps = of.shares(choose(name, real, target))
    values = constants + sum(x.sum(1) for x in shares.values())
    assert found.constants is not None
    assert found.shares.keys() == shares.keys()
    pairs = [
        (found.values, values),
        (found.linear, values),
        (found.constants, constants),
        *((found.shares[x], shares[x]) for x in shares),
        *((m, t) for (_, m), t in zip(found.layers, maps, strict=True)),
    ]
    largest = max(float(values.abs().max()), *(float(x.abs().max()) for x in shares.values()))
    for ours, theirs in pairs:
        scale = max(largest if theirs.dim() < 3 else 0.0, float(theirs.abs().max()))
        assert scale > 1e-4, "the reference must not be zero"
        assert ours.shape == theirs.shape
        assert torch.allclose(ours.double(), theirs, 0, tolerance * scale)
    assert float(found.delta.abs().max()) < tolerance * largest


@pytest.mark.parametrize(("name", "side", "implementation", "target"), CASES)
def test_shares_are_those_of_the_reference(
    name: str, side: str, implementation: str, target: str
) -> None:
    model, expected = model_of(name, implementation, torch.float64), reference_of(name, side)
    inputs, _ = inputs_of(name, side)
    ours, contrast, *_ = (CLASSES if name.startswith("bert") else TOKENS)[target]
    with InDouble():
        found = found_by_us(model, inputs, ours, contrast)
        check(name, side, target, found, 1e-9, expected)


@pytest.mark.parametrize(("name", "side", "implementation"), RUNS)
def test_single_precision_is_near_the_reference(name: str, side: str, implementation: str) -> None:
    model = model_of(name, implementation, torch.float32)
    inputs, _ = inputs_of(name, side)
    ours, contrast, *_ = (CLASSES if name.startswith("bert") else TOKENS)["contrast"]
    found = found_by_us(model, inputs, ours, contrast)
    check(name, side, "contrast", found, 1e-4, reference_of(name, side))


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_the_model(name: str) -> None:
    inputs, real = inputs_of(name, "right")
    model = model_of(name, "eager", torch.float64)
    with torch.no_grad(), InDouble():
        logits = model(**inputs).logits
    expected = reference_of(name, "right").logits
    assert expected is not None
    seen = real if logits.shape[1] == real.shape[1] else ...
    assert torch.allclose(logits[seen], expected.value[seen], 0, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_public_results_are_those_of_the_reference(name: str) -> None:
    model = model_of(name, "eager", torch.float32)
    inputs, real = inputs_of(name, "right")
    target, contrast, *_ = (CLASSES if name.startswith("bert") else TOKENS)["contrast"]
    expected, _, maps = reference_of(name, "right").shares(choose(name, real, "contrast"))
    scores = InputContributions(model).attribute(inputs, target, contrast=contrast)
    scores = scores if isinstance(scores, dict) else {"input_ids": scores}
    layers = TargetContributions(model, kind="all").attribute(inputs, target, contrast=contrast)
    for ours, theirs in zip([*scores.values(), *layers], [*expected.values(), *maps], strict=True):
        assert torch.allclose(ours.double(), theirs, 0, 1e-4 * float(theirs.abs().max()))
