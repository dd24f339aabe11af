"""Learned virtual tokens before a text are neither ranked, nor removed, nor counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    comprehensiveness,
    remove_tokens,
    sufficiency,
)
from captum_cw.capture import UnsupportedModelError
from support.inputs import token_ids
from support.models import VIRTUAL_KINDS, llama, with_virtual_tokens
from support.reference import mean_nll

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids")
UNPROTECTED: dict[str, Any] = {"protect_sinks": False}


def batch() -> dict[str, Tensor]:
    """Two texts, the first with two padded tokens before it, each where it would stand alone."""
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@contextmanager
def zeroed(model: nn.Module, removed: Tensor) -> Iterator[None]:
    """Zeros the values that each layer makes of these tokens of the text, ``(B, T)``."""

    def zero(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept = torch.ones(output.shape[:2], dtype=torch.bool)
        kept[:, -removed.shape[1] :] = ~removed
        return output * kept[..., None]

    handles = [
        module.register_forward_hook(zero)
        for name, module in model.named_modules()
        if name.endswith("v_proj")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def text_nll(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the text's own tokens, ``(B,)``."""
    ids = inputs["input_ids"]
    found = mean_nll(logits[:, -ids.shape[1] :], ids, inputs["attention_mask"])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("granularity", ["pair", "token"])
@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_the_metric_counts_from_the_end(kind: str, granularity: Any) -> None:
    model, inputs = with_virtual_tokens(kind), batch()
    scores = torch.arange(9.0).expand(2, 9)
    removed = torch.zeros(2, 9, dtype=torch.bool)
    removed[0, 5:] = removed[1, 4:] = True  # half of 7 and of 9, rounded up
    with torch.no_grad():
        clean = text_nll(model(**inputs).logits, inputs)
        with zeroed(model, removed):
            changed = text_nll(model(**inputs).logits, inputs)
    settings: dict[str, Any] = {"quantity": "nll", "granularity": granularity, **UNPROTECTED}
    metric = ComprehensivenessSufficiency(model, [0.5], **settings)
    result = metric.evaluate({"s": scores}, inputs, show_progress=False)
    assert [record["count"] for record in result.records] == [6, 8]
    assert torch.tensor([r["clean_nll"] for r in result.records]) == pytest.approx(
        clean.float(), rel=1e-5
    )
    found = result.deltas("s", "comprehensiveness")[:, 0]
    torch.testing.assert_close(found, changed - clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate_of", ["removable", "all"])
@pytest.mark.parametrize("scoring", ["online", "clean"])
@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_virtual_tokens_are_never_removed(kind: str, scoring: Any, rate_of: Any) -> None:
    model, inputs = with_virtual_tokens(kind), batch()
    settings: dict[str, Any] = {"scoring": scoring, "rate_of": rate_of, **UNPROTECTED}
    with torch.no_grad():
        clean = model(**inputs).logits
        with zeroed(model, inputs["attention_mask"] != 0):
            expected = model(**inputs).logits
        with remove_tokens(model, "contribution", 1.0, **settings):
            found = model(**inputs).logits
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(found[:, -9:][real], expected[:, -9:][real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, clean, atol=1e-2)
    lost = sufficiency(model, inputs, "contribution", [1.0], quantity="nll", **settings)
    by_hand = text_nll(expected, inputs) - text_nll(clean, inputs)
    torch.testing.assert_close(lost[:, 0], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_pairs_are_ranked_by_the_scores_of_the_texts_own_tokens(kind: str) -> None:
    """The pair of the highest score of each layer is removed, in a pass by hand."""
    model, ids = with_virtual_tokens(kind), token_ids(1, 9)
    method = TokenScores(ContributionWeights(model), layers=None, heads=None)
    scores = method.attribute(ids)[0, :, :, -9:]  # (L, H, T)
    handles = []
    layers = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    for module, of_layer in zip(layers, scores, strict=True):
        head, place = divmod(int(of_layer.flatten().argmax()), 9)

        def lose(
            o_proj: nn.Module, args: Any, attn: Any = module, head: int = head, place: int = place
        ) -> Any:
            # What the head made of that token: its weight, times its value.
            (x,) = args
            x = x.clone()
            width = attn.head_dim
            weight, value = seen[attn]
            key = place - 9
            part = weight[:, head, :, key, None] * value[:, head // 2, key, None]
            x[..., head * width : (head + 1) * width] -= part
            return (x,)

        handles.append(module.o_proj.register_forward_pre_hook(lose))  # type: ignore[union-attr, arg-type]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    import transformers.models.llama.modeling_llama as source

    eager = source.eager_attention_forward

    def noting(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, query, key, value, *args, **kwargs)
        seen[module] = weights, value
        return output, weights

    model.get_base_model().set_attn_implementation("eager")
    source.eager_attention_forward = noting
    try:
        with torch.no_grad():
            changed = model(input_ids=ids).logits[:, -9:]
    finally:
        source.eager_attention_forward = eager
        for handle in handles:
            handle.remove()
    with (
        torch.no_grad(),
        remove_tokens(model, "contribution", 1 / 36, "top", scoring="clean", **UNPROTECTED),
    ):
        found = model(input_ids=ids).logits[:, -9:]
    torch.testing.assert_close(found, changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_every_method_and_sink_rule_runs(kind: str) -> None:
    model, inputs = with_virtual_tokens(kind), batch()
    for space in ("normed", "residual", "key", "value"):
        settings: dict[str, Any] = {"sink_space": space, "granularity": "token"}
        metric = ComprehensivenessSufficiency(model, [0.5], **settings)
        methods = {
            "c": "contribution",
            "own": ContributionWeights(model),
            "other": ContributionWeights(llama()),
            "r": "random",
            "s": lambda batch: batch["input_ids"].float(),
        }
        result = metric.evaluate(methods, inputs, show_progress=False)
        assert torch.equal(result.deltas("c", "sufficiency"), result.deltas("own", "sufficiency"))
        assert result.deltas("s", "sufficiency").isfinite().all()


def test_other_tokens_of_a_models_own_are_refused() -> None:
    class Begins(nn.Module):
        """Puts a token before each text."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.eval()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(torch.nn.functional.pad(input_ids, (1, 0), value=1)).logits

    with pytest.raises(UnsupportedModelError, match="runs 10 tokens, but the text has 9 ids"):
        comprehensiveness(Begins(), token_ids(), "contribution", [0.5])


def test_an_adapter_that_is_off_has_no_virtual_tokens() -> None:
    model, ids = with_virtual_tokens("prompt"), token_ids()
    adapted = sufficiency(model, ids, "contribution", [0.5])
    with model.disable_adapter():
        found = sufficiency(model, ids, "contribution", [0.5])
    expected = sufficiency(model.get_base_model(), ids, "contribution", [0.5])
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, adapted)
