"""Pairs of callables that differ in one thing, for tests in this process and in others."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn

from support.models import gpt2, llama

SCALE = 1.0


logger = logging.getLogger(__name__)


def scaled(factor: Any) -> Callable[..., Any]:
    return lambda batch: factor * batch


def with_default(factor: Any) -> Callable[..., Any]:
    def method(batch: Any, by: Any = factor) -> Any:
        return by * batch

    return method


def with_keyword_default(factor: Any) -> Callable[..., Any]:
    def method(batch: Any, *, by: Any = factor) -> Any:
        return by * batch

    return method


def by_global(batch: Any) -> Any:
    logger.debug("It is scored.")
    return SCALE * batch


def calls_another(batch: Any) -> Any:
    return by_global(batch)


def by_keyword(batch: Any, by: Any) -> Any:
    return by * batch


@dataclass
class Scorer:
    """A callable object with a state."""

    factor: Any

    def __call__(self, batch: Any) -> Any:
        return self.factor * batch

    def method(self, batch: Any) -> Any:
        return self.factor * batch


def of_code(factor: str, nested: bool) -> Callable[..., Any]:
    """A function that differs from others by a constant alone."""
    inside = f"lambda x: {factor} * x"
    names: dict[str, Any] = {"__name__": __name__}
    text = f"def method(batch):\n    return ({inside})(batch)" if nested else f"method = {inside}"
    exec(text, names)
    method: Callable[..., Any] = names["method"]
    return method


def gradients_of(model: nn.Module, steps: int) -> Callable[..., Any]:
    """A method of Captum in a closure."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]

    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids).logits
        return logits[:, -1].amax(-1)

    method = LayerIntegratedGradients(forward, embeddings)
    return lambda batch: method.attribute(batch, n_steps=steps).sum(-1)


PAIRS: dict[str, tuple[Any, Any]] = {
    "constants": (of_code("2.0", nested=False), of_code("3.0", nested=False)),
    "constants of nested code": (of_code("2.0", nested=True), of_code("3.0", nested=True)),
    "defaults": (with_default(2.0), with_default(3.0)),
    "keyword defaults": (with_keyword_default(2.0), with_keyword_default(3.0)),
    "closures": (scaled(2.0), scaled(3.0)),
    "sets in closures": (scaled({"a", "b"}), scaled({"a", "c"})),
    "tensors in closures": (scaled(torch.zeros(3)), scaled(torch.ones(3))),
    "arrays in closures": (scaled(np.zeros(3)), scaled(np.ones(3))),
    "models in closures": (scaled(llama()), scaled(llama(4))),
    "functions in closures": (scaled(scaled(2.0)), scaled(scaled(3.0))),
    "arguments of partials": (
        functools.partial(by_keyword, 2.0),
        functools.partial(by_keyword, 3.0),
    ),
    "keywords of partials": (
        functools.partial(by_keyword, by=2.0),
        functools.partial(by_keyword, by=3.0),
    ),
    "models of partials": (
        functools.partial(by_keyword, by=llama()),
        functools.partial(by_keyword, by=gpt2()),
    ),
    "objects": (Scorer(2.0), Scorer(3.0)),
    "tensors of objects": (Scorer(torch.zeros(3)), Scorer(torch.ones(3))),
    "bound methods": (Scorer(2.0).method, Scorer(3.0).method),
    "steps of captum": (gradients_of(llama(), 5), gradients_of(llama(), 6)),
    "models of captum": (gradients_of(llama(), 5), gradients_of(gpt2(), 5)),
}
