"""Removal by measures of a target, against scores and rankings that are written out here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    EffectContributions,
    InputContributions,
    TargetContributions,
    TokenScores,
    remove_tokens,
    remove_values,
)
from captum_cw.removal.target_scores import OwnText
from support.inputs import token_ids
from support.models import build, llama
from support.state import state_of

NAMES = {
    "joint": lambda model: EffectContributions(model),
    "effect": lambda model: EffectContributions(model, form="effect"),
    "sensitivity": lambda model: EffectContributions(model, form="sensitivity"),
    "target": lambda model: TargetContributions(model),
}


def padded() -> dict[str, Tensor]:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of_text(inputs: Mapping[str, Tensor]) -> Callable[[Any], Tensor]:
    """The sum of the logits of a text's own tokens, one by one."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def target(output: Any) -> Tensor:
        sums = []
        for b, row in enumerate(output.logits):
            n = int(mask[b].sum())
            sums.append(sum(row[t, ids[b, t + 1]] for t in range(n - 1)))
        return torch.stack(sums)

    return target


def pair_scores(model: Any, name: str, inputs: Mapping[str, Tensor], target: Any) -> list[Tensor]:
    """The sizes of all queries, summed: for each layer ``(B, H, S)``."""
    maps = NAMES[name](model).attribute(dict(inputs), target=target)
    real = inputs["attention_mask"].bool()
    return [x.abs().masked_fill(~real[:, None, :, None], 0).sum(2) for x in maps]


def chosen(
    scores: list[Tensor], inputs: Mapping[str, Tensor], rate: float, which: str, ranking: str
) -> list[Tensor]:
    """The removed pairs: sorted one example and one group at a time."""
    masks = [torch.zeros_like(x, dtype=torch.bool) for x in scores]
    for b, real in enumerate(inputs["attention_mask"].bool()):
        pairs = [
            (float(x[b, h, s]), n, h, s)
            for n, x in enumerate(scores)
            for h in range(x.shape[1])
            for s in real.nonzero()[:, 0].tolist()
        ]
        by = {"global": lambda p: 0, "layer": lambda p: p[1], "head": lambda p: p[1:3]}[ranking]
        for group in {by(p) for p in pairs}:
            members = sorted((p for p in pairs if by(p) == group), reverse=which == "top")
            for _, n, h, s in members[: math.floor(rate * len(members) + 0.5)]:
                masks[n][b, h, s] = True
    return masks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranking", ["layer", "global", "head"])
@pytest.mark.parametrize("which", ["bottom", "top"])
def test_pairs_are_removed_in_the_order_of_their_summed_sizes(
    name: str, ranking: str, which: Any
) -> None:
    model, inputs = llama().double(), padded()
    scores = pair_scores(model, name, inputs, logits_of_text(inputs))
    options: Any = {"ranking": ranking, "protect_sinks": False}
    if ranking == "global":
        options["scoring"] = "clean"
    before = state_of(model)
    with torch.no_grad():
        with remove_values(model, chosen(scores, inputs, 0.4, which, ranking)):
            expected = model(**inputs).logits
        with remove_tokens(model, name, 0.4, which, **options):
            found = model(**inputs).logits
    assert state_of(model) == before
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])


@pytest.mark.parametrize("name", NAMES)
def test_whole_tokens_rank_by_the_mean_of_their_pairs(name: str) -> None:
    model, inputs = llama().double(), padded()
    scores = pair_scores(model, name, inputs, logits_of_text(inputs))
    of_tokens = torch.stack([x.mean(1) for x in scores]).mean(0)
    options: Any = {"granularity": "token", "protect_sinks": False}
    with torch.no_grad():
        with remove_tokens(model, of_tokens, 0.5, **options):
            expected = model(**inputs).logits
        with remove_tokens(model, name, 0.5, **options):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_can_be_given(name: str) -> None:
    model, inputs = llama().double(), padded()
    scores = pair_scores(model, name, inputs, 3)
    with torch.no_grad():
        with remove_values(model, chosen(scores, inputs, 0.5, "bottom", "layer")):
            expected = model(**inputs).logits
        with remove_tokens(model, NAMES[name](model), 0.5, target=3, protect_sinks=False):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_contrast_is_subtracted(name: str) -> None:
    model, inputs = llama().double(), padded()

    def difference(output: Any) -> Tensor:
        ends = output.logits[torch.arange(2), [8, 5]]
        return ends[:, 3] - ends[:, 7]

    options: Any = {"protect_sinks": False}
    with torch.no_grad():
        with remove_tokens(model, name, 0.5, target=difference, **options):
            expected = model(**inputs).logits
        with remove_tokens(model, name, 0.5, target=3, contrast=7, **options):
            found = model(**inputs).logits
        with remove_tokens(model, name, 0.5, target=3, **options):
            assert not torch.allclose(model(**inputs).logits, expected)
    torch.testing.assert_close(found, expected)


def test_token_scores_bring_their_reduction_and_sign() -> None:
    model, inputs = llama().double(), padded()
    maps = TargetContributions(model).attribute(inputs, target=3)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    real = inputs["attention_mask"].bool()
    counted = seen[None, None] & real[:, None, :, None]
    scores = [x.masked_fill(~counted, -math.inf).amax(2) for x in maps]
    method = TokenScores(TargetContributions(model), reduction="max", signed=True)
    with torch.no_grad():
        with remove_values(model, chosen(scores, inputs, 0.5, "top", "layer")):
            expected = model(**inputs).logits
        with remove_tokens(model, method, 0.5, "top", target=3, protect_sinks=False):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("quantity", ["perplexity", "log_prob"])
@pytest.mark.parametrize("granularity", ["pair", "token"])
def test_the_metric_explains_its_own_quantity(quantity: Any, granularity: Any) -> None:
    model, inputs = llama().double(), padded()
    options: Any = {"granularity": granularity, "protect_sinks": False}
    metric = ComprehensivenessSufficiency(
        model, {"bottom": [0.5]}, quantity=quantity, scoring="clean", **options
    )
    names = ("joint", "effect", "sensitivity", "contribution")
    found = metric.evaluate({name: name for name in names}, inputs, show_progress=False)
    with torch.no_grad():
        target = model(**inputs).logits[torch.arange(2), [8, 5]].argmax(-1)
    for name in names[:-1]:
        of = logits_of_text(inputs) if quantity == "perplexity" else target
        method = NAMES[name](model)
        with torch.no_grad(), remove_tokens(model, method, 0.5, target=of, **options):
            changed = model(**inputs).logits.double().log_softmax(-1)
        for b, n in enumerate((9, 6)):
            if quantity == "log_prob":
                value = changed[b, n - 1, target[b]]
            else:
                rows = torch.arange(n - 1)
                value = (-changed[b, rows, inputs["input_ids"][b, 1:n]].mean()).exp()
            measured = found.records[b]["values"][name]["bottom"][0]
            assert measured == pytest.approx(float(value), rel=1e-5)


def test_the_metric_explains_logits_or_the_likelihood_of_the_text() -> None:
    model, inputs = llama(), padded()
    metric = ComprehensivenessSufficiency(model, [0.3, 0.6], scoring="clean", protect_sinks=False)

    def values(method: object, **options: Any) -> list[Any]:
        found = metric.evaluate({"": method}, inputs, show_progress=False, **options)
        return [record["values"] for record in found.records]

    assert values("effect") == values("effect", target="logits")
    assert values("target") == values("target", target="log_likelihood")
    assert values("effect") != values("effect", target="log_likelihood")
    assert values("effect") != values("effect", target="expected_logits")


def test_passes_of_the_metric() -> None:
    """One clean pass, one pass with a gradient, and one for each rate."""
    model, inputs = llama(), padded()
    EffectContributions(model).attribute(inputs, target=3)  # compares the outputs once a model
    metric = ComprehensivenessSufficiency(model, [0.2, 0.4, 0.6])
    calls: list[None] = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(None))
    metric.evaluate({"joint": "joint"}, inputs, show_progress=False)
    handle.remove()
    assert len(calls) == 1 + 1 + 6


def test_generated_text_keeps_what_the_prompt_lost() -> None:
    model, ids = llama(), token_ids()[:1]
    options: Any = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with remove_tokens(model, "joint", 0.5, protect_sinks=False):
        cached = model.generate(ids, **options)
        plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    whole = model.generate(ids, **options)
    for x, y, z in zip(cached.scores, plain.scores, whole.scores, strict=True):
        assert torch.allclose(x, y, atol=1e-4)
        assert not torch.allclose(x, z, atol=1e-3)


def test_a_classifier_explains_its_prediction() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        pad_token_id=0,
    )
    model = build(transformers.LlamaForSequenceClassification, config).double()
    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1)
        with remove_tokens(model, "effect", 0.5, target=best):
            expected = model(**inputs).logits
        with remove_tokens(model, "effect", 0.5):
            assert torch.equal(model(**inputs).logits, expected)


def test_own_text_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [7.0, 0.0]]])
    ids, counted = torch.tensor([[0, 1, 0]]), torch.tensor([[True, True]])
    assert OwnText(ids, counted)(logits).tolist() == [2.0 + 3.0]
    likelihood = OwnText(ids, counted, "log_likelihood")(logits)
    expected = (2 - math.log(math.e + math.e**2) + 3 - math.log(math.e**3 + math.e**5)) / 2
    assert float(likelihood) == pytest.approx(expected)
    assert OwnText(ids, torch.tensor([[False, True]]))(logits).tolist() == [3.0]
    expected = sum(
        (a * math.exp(a) + b * math.exp(b)) / (math.exp(a) + math.exp(b))
        for a, b in ((1, 2), (3, 5))
    )
    varying = logits.clone().requires_grad_()
    found = OwnText(ids, counted, "expected_logits")(varying)
    assert found.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(found.sum(), varying)
    torch.testing.assert_close(gradient[0, :2], logits[0, :2].softmax(-1))  # weights are fixed
    assert not gradient[0, 2].any()


WRONG: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "inputs rank tokens": (lambda model: "input", {}, "granularity='token'"),
    "other model": (lambda model: EffectContributions(llama()), {}, "another model"),
    "other model, inputs": (
        lambda model: InputContributions(llama()),
        {"granularity": "token"},
        "another model",
    ),
    "layer": (
        lambda model: EffectContributions(model, model.model.layers[0].self_attn),
        {},
        "without layer=",
    ),
    "queries": (
        lambda model: TokenScores(TargetContributions(model), queries=-1),
        {},
        "without layer= and queries=",
    ),
    "no target": (lambda model: "contribution", {"target": 3}, "does not explain a target"),
    "no contrast": (lambda model: "vwon", {"contrast": 3}, "contrast=3.*does not explain a target"),
    "contrast alone": (lambda model: "joint", {"contrast": 3}, "no target: give both"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_ranked_is_refused(case: str) -> None:
    method, options, message = WRONG[case]
    model = llama()
    with (
        pytest.raises(ValueError, match=message),
        remove_tokens(model, method(model), 0.5, **options),
    ):
        pass


def test_quantities_without_a_target_are_refused() -> None:
    model = llama()
    metric = ComprehensivenessSufficiency(model, [0.5], quantity="kl")
    with pytest.raises(ValueError, match="'joint' needs a target, but quantity='kl'"):
        metric.evaluate({"ours": "joint"}, padded())
    with pytest.raises(ValueError, match="target='logits' is for 'perplexity'"):
        metric.evaluate({"ours": ContributionWeights(model)}, padded(), target="logits")


def test_embeddings_need_a_target() -> None:
    model = llama()
    embeddings = model.get_input_embeddings()(token_ids())
    with remove_tokens(model, "joint", 0.5), pytest.raises(ValueError, match="give a target"):
        model(inputs_embeds=embeddings)
