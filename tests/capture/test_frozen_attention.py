"""The gradient of attention whose weights are held fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from captum_cw import InputContributions, TargetContributions, TokenScores
from captum_cw.capture import frozen_attention as module
from captum_cw.capture import linear_rules
from captum_cw.capture.frozen_attention import ValueGradient, frozen_attention, node_of
from captum_cw.capture.function_call import FunctionCall
from captum_cw.weights import SoftmaxWeights
from support.inputs import padded_batch, token_ids
from support.models import llama

B, H, T, D = 2, 6, 7, 4


def _tensors(shared: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, T, D), (B, shared, S, D), (B, shared, S, D), (B, H, T, D)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _mask(name: str, S: int) -> Tensor | None:
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None].repeat(B, 1, 1, 1)
    if name == "padded":
        causal[0, :, :, :2] = False
        causal[0, :, :2] = False  # such queries see no key
    if name == "window":
        causal &= torch.ones(T, S, dtype=torch.bool).triu(S - T - 2)
    if name == "all queries":
        causal = causal[:, :, -1:]
    return None if name in ("none", "causal") else causal


def _reference(q: Tensor, k: Tensor, g: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The definition: ``sum_i a_ij g_i`` in float64, one number after the other."""
    q, k, g = (x.double() for x in (q, k, g))
    shared, S = k.shape[1:3]
    total = torch.zeros(B, shared, S, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            of = h // (H // shared)
            for i in range(T):
                seen = range(S)
                if mask is not None:
                    rows = mask[b, 0].expand(T, S)
                    seen = [j for j in seen if rows[i, j]]
                elif causal:
                    seen = range(i + 1)
                if not seen:
                    continue
                logits = torch.stack([q[b, h, i] @ k[b, of, j] / D**0.5 for j in seen])
                for j, a in zip(seen, logits.softmax(0), strict=True):
                    total[b, of, j] += a * g[b, h, i]
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [1, 3, 6])
@pytest.mark.parametrize("name", ["none", "causal", "padded", "window", "all queries", "longer"])
def test_gradient_is_a_sum_over_queries(name: str, shared: int, dtype: torch.dtype) -> None:
    S = 9 if name in ("longer", "none") else T
    q, k, v, g = _tensors(shared, S, dtype)
    mask, causal = _mask(name, S), name == "causal"
    value = v.requires_grad_()

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    result = frozen_attention(q, k, value, run, mask=mask, causal=causal, scaling=None)
    assert torch.equal(result, run())
    (found,) = torch.autograd.grad(result, value, g)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        found.double(), _reference(q, k, g, mask, causal), rtol=tolerance, atol=tolerance
    )


def test_sum_is_the_same_however_the_weights_were_read() -> None:
    q, k, _, g = _tensors(3, T)
    a = (q @ k.repeat_interleave(2, 1).mT).softmax(-1)
    whole = ValueGradient(lambda rows: a[:, :, rows], g, 3, T).whole()
    for read in ([(0, 3)], [(0, 3), (3, 7)], [(2, 4)], [(0, 2), (4, 6)], [(0, 7), (0, 7)]):
        weights = ValueGradient(lambda rows: a[:, :, rows], g, 3, T)
        for start, stop in read:
            assert torch.equal(weights(slice(start, stop)), a[:, :, start:stop])
        torch.testing.assert_close(weights.whole(), whole)


def _node(change: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, g = _tensors(6, T)
    value = v.requires_grad_()

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v.detach())

    y = frozen_attention(q, k, value, run, mask=None, causal=False, scaling=None)
    if change == "rearranged":
        y = y.transpose(1, 2).contiguous()
    elif change == "scaled":
        y = y * 2
    elif change == "summed":
        y = y + torch.ones_like(y, requires_grad=True)
    return y, value, g


@pytest.mark.parametrize("change", ["none", "rearranged", "scaled"])
def test_node_is_found_behind_its_result(change: str) -> None:
    node = node_of(_node(change)[0])
    assert node is not None
    assert node.shape == (B, 6, T, D)


def test_no_node_is_found_behind_a_sum() -> None:
    assert node_of(_node("summed")[0]) is None
    assert node_of(torch.ones(1)) is None


def test_a_sum_of_other_gradients_is_not_taken() -> None:
    y, value, g = _node("scaled")
    (expected,) = torch.autograd.grad(y, value, g, retain_graph=True)
    node = node_of(y)
    # It was summed with the gradient at the scaled result, which is half of the node's own.
    node.gathered = ValueGradient(lambda rows: torch.full((B, H, 7, T), 1 / T)[:, :, rows], g, 6, T)
    (found,) = torch.autograd.grad(y, value, g, retain_graph=True)
    assert torch.equal(found, expected)
    # The sum is of the right gradient, but of fewer keys, as if a cache had empty places.
    a = torch.full((B, H, T, T - 1), 1 / (T - 1))
    node.gathered = ValueGradient(lambda rows: a[:, :, rows], 2 * g, 6, T - 1)
    (found,) = torch.autograd.grad(y, value, g)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("queries", ["all", -1])
def test_weights_are_computed_once_for_scores_and_gradient(
    monkeypatch: pytest.MonkeyPatch, queries: Any
) -> None:
    model, ids = llama(), token_ids(1, 8)
    scores = TokenScores(TargetContributions(model), queries=queries)
    before = scores.attribute(ids, target=3)  # finds the source of the weights
    read: list[int] = []
    compute = SoftmaxWeights.__call__

    def counted(self: SoftmaxWeights, rows: slice) -> Tensor:
        read.append(rows.stop - rows.start)
        return compute(self, rows)

    monkeypatch.setattr(SoftmaxWeights, "__call__", counted)
    assert torch.equal(scores.attribute(ids, target=3), before)
    # One more query in each layer checks that they are the model's weights.
    assert sum(read) == len(model.model.layers) * (8 + 1)


def test_shares_are_those_of_the_kernels_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, _) = llama(), padded_batch("left")
    method = InputContributions(model)
    ours = method.attribute(inputs, target=3)
    used: list[Tensor] = []
    original = module._FrozenAttention.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        used.append(grads[0])
        return original(ctx, *grads)

    monkeypatch.setattr(module._FrozenAttention, "backward", staticmethod(backward))
    assert torch.equal(method.attribute(inputs, target=3), ours)
    assert len(used) >= len(model.model.layers)
    monkeypatch.setattr(linear_rules, "run_frozen", FunctionCall.run)
    torch.testing.assert_close(method.attribute(inputs, target=3), ours, rtol=1e-4, atol=1e-6)
