"""What a model is, to be compared before and after a call of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from captum_cw import ContributionWeights
from support.inputs import token_ids


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that an observation touches."""
    file = sys.modules[type(model).__module__]
    # Some models have no part in it before transformers 5.
    registry = getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return {
        "implementation": model.config._attn_implementation,
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "registry": {name: registry[name] for name in registry},
        "local": dict(registry._local_mapping),
        "eager": getattr(file, "eager_attention_forward", None),
        "training": [m.training for m in model.modules()],
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
    }


def contents_of(x: Any, known: dict[int, Any] | None = None) -> Any:
    """All that an object holds, as something that can be compared."""
    known = {} if known is None else known
    if id(x) in known:
        return "again"
    if isinstance(x, Tensor):
        return x.dtype, tuple(x.shape), x.requires_grad, x.is_leaf, x.detach().flatten().tolist()
    if isinstance(x, (str, int, float, type(None), torch.device, torch.dtype, type)) or callable(x):
        return x if not isinstance(x, nn.Module) else contents_of_module(x, known)
    known[id(x)] = x
    if isinstance(x, dict):
        return [(contents_of(a, known), contents_of(b, known)) for a, b in x.items()]
    if isinstance(x, (list, tuple)):
        return [contents_of(y, known) for y in x]
    if isinstance(x, (set, frozenset)):
        return sorted(map(repr, x))
    return type(x), contents_of(getattr(x, "__dict__", None), known)


def contents_of_module(module: nn.Module, known: dict[int, Any]) -> Any:
    known[id(module)] = module
    return type(module), contents_of(vars(module), known)


def check_untouched(
    model: nn.Module, method: Callable[[nn.Module], Any] = ContributionWeights
) -> None:
    """Observing leaves no hook and no forward behind."""
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        alone = model(token_ids()).logits
        method(model).attribute(token_ids())
        assert torch.equal(model(token_ids()).logits, alone)
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before
