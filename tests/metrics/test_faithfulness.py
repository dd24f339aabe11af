"""Comprehensiveness and sufficiency, against removal by hand and hand-made cases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    VWONAttention,
    comprehensiveness,
    measures,
    remove_tokens,
    remove_values,
    sufficiency,
)
from captum_cw._utils.records import RecordsError
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import AttentionLayer, FrozenUpdate, QueryMask
from captum_cw.metrics import FaithfulnessResult, agreement, with_shuffled_weights
from captum_cw.metrics.result import curve_styles
from captum_cw.removal.changes import FixedChange
from captum_cw.removal.ranking import chosen_pairs
from captum_cw.removal.scoring import RandomPairs, pair_scorer
from captum_cw.removal.sinks import find_sinks
from captum_cw.visualization.curves import plot_curves
from support import reference
from support.inputs import padded_batch, position_ids, token_ids
from support.models import bert, gpt2, llama
from support.reference import eager_layers, mean_nll, sorted_pairs
from support.state import state_of

SIDES = {"comprehensiveness": "top", "sufficiency": "bottom"}
METHODS_HERE = {"cw": "contribution", "a": "attention"}


def logits_of(model: nn.Module, inputs: dict[str, Tensor], **given: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, **given).logits
    return logits


# -- the numbers ----------------------------------------------------------------------------


class DirectAttention(nn.Module):
    """Runs the attention of a Llama layer without the registry of transformers."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> Any:
        inner, shape = self.inner, (*hidden_states.shape[:2], -1, self.inner.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return inner.o_proj(y.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("direct", [[], [1], [0, 1]])
def test_removal_needs_no_registered_kernels(direct: list[int]) -> None:
    model, ids = llama(), token_ids()
    metric = ComprehensivenessSufficiency(model, {"top": [0.3]}, scoring="clean")
    expected = metric.evaluate({"cw": "contribution"}, ids).records
    for n in direct:
        model.model.layers[n].self_attn = DirectAttention(model.model.layers[n].self_attn)
    found = metric.evaluate({"cw": "contribution"}, ids).records
    for a, b in zip(found, expected, strict=True):
        assert a["nll"]["cw"]["top"] == pytest.approx(b["nll"]["cw"]["top"], rel=1e-5)
    change = FixedChange(model, [torch.zeros(1, 1, 9)] * 2, registered_only=True)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(change.in_force())
        if direct:  # some attention was not changed
            stack.enter_context(pytest.raises((ValueError, UnsupportedModelError)))
        model(ids)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_deltas_equal_removal_by_hand(scoring: Any, padding: str, side: Any) -> None:
    model = llama()
    inputs, real = padded_batch(padding)
    ids = inputs["input_ids"]
    scores: dict[str, list[Tensor]] = {"inter": [], "attention": []}
    kept: list[Tensor] = []

    def note(number: int, seen: dict[str, Tensor]) -> Tensor:
        for name, layers in scores.items():
            layers.append(reference.token_scores(seen[name], seen["visible"], "mean"))
        kept.append(reference.sinks(seen["hidden"], real))
        return torch.zeros_like(scores["inter"][-1], dtype=torch.bool)

    clean = mean_nll(reference.llama_logits(model, ids, real, note), ids, real)
    metric = ComprehensivenessSufficiency(model, [0.25, 0.5], scoring=scoring)
    result = metric.evaluate(METHODS_HERE, inputs)
    assert result.clean == pytest.approx(float(torch.tensor(clean).exp().mean()), rel=1e-4)

    def deltas(measure: str, rate: str) -> Tensor:
        def remove(number: int, seen: dict[str, Tensor]) -> Tensor:
            here = scores[measure][number]
            if scoring == "online":
                here = reference.token_scores(seen[measure], seen["visible"], "mean")
            # Sinks are those of the clean pass.
            (mask,) = sorted_pairs(
                [here], real, [kept[number]], rate, SIDES[side], "layer", "removable"
            )
            return mask

        changed = mean_nll(reference.llama_logits(model, ids, real, remove), ids, real)
        return torch.tensor(changed).exp() - torch.tensor(clean).exp()

    for name, measure in (("cw", "inter"), ("a", "attention")):
        for i, rate in enumerate(("0.25", "0.5")):
            found = result.per_example[name][side][:, i]
            assert torch.allclose(found.float(), deltas(measure, rate), rtol=1e-3, atol=1e-3)
            assert found.abs().min() > 1e-3


@pytest.mark.parametrize("metric", ["perplexity", "nll", "log_prob", "prob", "kl", "own"])
def test_each_metric_is_what_its_name_says(metric: Any) -> None:
    model = llama()
    inputs, real = padded_batch("left")
    masks = [torch.zeros(2, 1, 9, dtype=torch.bool) for _ in range(2)]
    scores = torch.arange(9.0).expand(2, 9)
    where = position_ids(real)
    clean = logits_of(model, inputs, position_ids=where)
    sinks = torch.stack(find_sinks(model, inputs)).any(0)
    removable = real & ~sinks
    for b in range(2):
        count = round(0.25 * int(removable[b].sum()) + 1e-9)
        for mask in masks:
            mask[b, 0, removable[b].nonzero()[-count:, 0]] = True
    with remove_values(model, masks):
        changed = logits_of(model, inputs, position_ids=where)

    def own(logits: Tensor, batch: Any, clean_logits: Tensor) -> Tensor:
        assert torch.equal(batch["input_ids"], inputs["input_ids"])
        return (logits - clean_logits).abs().mean((1, 2))

    log_clean, log_changed = (x.double().log_softmax(-1) for x in (clean, changed))
    target = clean[:, -1].argmax(-1)
    row = torch.arange(2)
    kl = (log_clean.exp() * (log_clean - log_changed)).sum(-1)
    nll = [torch.tensor(mean_nll(x, inputs["input_ids"], real)) for x in (changed, clean)]
    expected = {
        "perplexity": nll[0].exp() - nll[1].exp(),
        "nll": nll[0] - nll[1],
        "log_prob": (log_clean - log_changed)[row, -1, target],
        "prob": (log_clean.exp() - log_changed.exp())[row, -1, target],
        "kl": torch.stack([kl[b][real[b]].mean() for b in range(2)]),
        "own": (changed - clean).abs().mean((1, 2)),
    }[metric]
    found = comprehensiveness(
        model, inputs, scores, [0.25], quantity=own if metric == "own" else metric
    )
    assert found.shape == (2, 1)
    assert torch.allclose(found[:, 0].float(), expected.float(), rtol=1e-3, atol=1e-5)


def test_a_target_may_be_given() -> None:
    model, ids = llama(), token_ids()
    every = torch.ones(2, 4, ids.shape[1], dtype=torch.bool)
    every[..., 0] = False  # the sink
    with torch.no_grad():
        clean = model(ids).logits[:, -1].double().softmax(-1)
        with remove_values(model, [every, every]):
            changed = model(ids).logits[:, -1].double().softmax(-1)
    found = sufficiency(model, ids, "random", [1.0], quantity="prob", target=7)
    each = sufficiency(model, ids, "random", [1.0], quantity="prob", target=torch.tensor([7, 7]))
    assert torch.equal(found, each)
    other = sufficiency(model, ids, "random", [1.0], quantity="prob", target=8)
    assert not torch.allclose(found, other)
    torch.testing.assert_close(found[:, 0].double(), (clean - changed)[:, 7], rtol=1e-4, atol=1e-7)


def test_where_more_is_better_the_sign_is_turned() -> None:
    model, ids = llama(), token_ids()

    def good(logits: Tensor, batch: Any, clean: Tensor) -> Tensor:
        return logits.mean((1, 2))

    plainly = comprehensiveness(model, ids, "contribution", [0.5], quantity=good)
    good.higher_is_better = True  # type: ignore[attr-defined]
    turned = comprehensiveness(model, ids, "contribution", [0.5], quantity=good)
    assert torch.equal(plainly, -turned)
    assert plainly.abs().max() > 0


def test_tokens_labelled_as_ignored_do_not_count() -> None:
    model, ids = llama(), token_ids(2, 10)
    labels = ids.clone()
    labels[0, :6] = -100
    metric = ComprehensivenessSufficiency(model, [0.5])
    batch = {"input_ids": ids, "labels": labels}
    result = metric.evaluate({"c": "contribution"}, batch, show_progress=False)
    with torch.no_grad():
        logits = model(ids).logits
    for b, first in ((0, 6), (1, 1)):
        rows = logits[b, first - 1 : -1].log_softmax(-1)
        nll = -rows.gather(-1, ids[b, first:, None]).mean()
        assert result.records[b]["count"] == 10 - first
        assert result.records[b]["clean_nll"] == pytest.approx(float(nll), rel=1e-5)
    with pytest.raises(ValueError, match=r"shape of input_ids, \(2, 10\), got \(2, 9\)"):
        metric.evaluate({"c": "contribution"}, {**batch, "labels": labels[:, 1:]})


def test_vanishing_outputs_are_warned_of() -> None:
    model: Any = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    metric = ComprehensivenessSufficiency(model, [0.5])
    with pytest.warns(UserWarning, match="18 attention outputs of a batch vanish"):
        metric.evaluate({"c": "contribution"}, token_ids(), show_progress=False)


def test_both_panels_have_the_same_scale() -> None:
    wide, narrow = torch.tensor([1.0, 1000.0]), torch.tensor([1.0, 2.0])
    cases = [
        (wide, narrow, "log"),
        (wide, -narrow, "symlog"),
        (narrow, -narrow, "linear"),
        (50 * narrow, -narrow, "linear"),
        (narrow, narrow, "linear"),
    ]
    for top, values, scale in cases:
        _, axes = plot_curves(
            {"top": {"a": top}, "bottom": {"a": values}},
            {"top": [0.1, 0.2], "bottom": [0.1, 0.2]},
            use_pyplot=False,
        )
        assert [ax.get_yscale() for ax in axes] == [scale, scale]


# -- hand-made cases ------------------------------------------------------------------------


@pytest.mark.parametrize("method", measures.names())
def test_a_head_that_copies_one_token_ranks_it_first(method: str) -> None:
    B, H, T, d_h = 1, 3, 6, 4
    generator = torch.Generator().manual_seed(0)
    a = torch.full((B, H, T, T), 0.01)
    a[:, 1, :, 4] = 1.0  # head 1 copies token 4
    value = 0.1 * torch.randn(B, H, T, d_h, generator=generator)
    value[:, 1, 4] = 10
    w = torch.randn(H, d_h, H * d_h, generator=generator)
    layer = AttentionLayer.from_tensors(a, value, w)
    scores = pair_scorer(method)(layer, 0)
    real = torch.ones(B, T, dtype=torch.bool)
    (first,) = chosen_pairs([scores], [real], [~real], 1 / (H * T), "top")
    assert first.nonzero().tolist() == [[0, 1, 4]]


def test_controls_are_the_products_of_their_factors() -> None:
    model = llama()
    (layer, _) = eager_layers(model, input_ids=token_ids())
    m = reference.measures(layer.attention, layer.value, layer.output_weight)
    o = reference.outputs(
        layer.attention, reference.projected_values(layer.value, layer.output_weight)
    )[1].norm(dim=-1)[:, None, :, None]
    visible = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 4, 9, 9)
    d = layer.output_weight.shape[-1]
    gain, scale = torch.randn(d), torch.rand(2, 9)
    centre = torch.eye(d, dtype=torch.float64) - 1 / d
    after_norm = reference.measures(
        layer.attention, layer.value, layer.output_weight, scale[..., None, None] * centre * gain
    )
    expected = {
        "contribution-signed": (m["inter"], True),
        "contribution-intra": (m["intra"], False),
        "contribution-residual": (after_norm["inter"], False),
        "relative-norm": (m["relative_norm"], False),
        "cosine": (m["cosine"], False),
        "attention-cosine": (m["attention"] * m["cosine"], False),
        "relative-norm-cosine": (m["relative_norm"] * m["cosine"], False),
        "projection": (m["inter"] * o, False),
        "closeness": (2 * m["inter"] - m["vwon"] ** 2, True),
    }
    assert {*expected} == {*measures.names(controls=True)} - {*measures.names()}
    mask = QueryMask(9, 9, causal=True)
    seen = AttentionLayer.from_tensors(layer.attention, layer.value, layer.output_weight, mask)
    seen = dataclasses.replace(seen, update=FrozenUpdate(gain, scale, centred=True))
    for name, (g, signed) in expected.items():
        for reduction in ("mean", "sum", "max", "rms"):
            found = pair_scorer(name, reduction)(seen, 0)
            right = reference.token_scores(g, visible, reduction, signed=signed)
            assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-5), (name, reduction)


def test_random_scores_of_an_example_do_not_depend_on_its_batch() -> None:
    a, v, w = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 3), torch.randn(2, 3, 6)
    together = RandomPairs(0, ("7", "8", "9"))(AttentionLayer.from_tensors(a, v, w), 2)
    alone = RandomPairs(0, ("8",))(AttentionLayer.from_tensors(a[1:2], v[1:2], w), 2)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    other = RandomPairs(0, ("7", "8", "9"))(AttentionLayer.from_tensors(a, v, w), 3)
    assert not torch.equal(together, other)
    reseeded = RandomPairs(1, ("7", "8", "9"))(AttentionLayer.from_tensors(a, v, w), 2)
    assert not torch.equal(together, reseeded)


@pytest.mark.parametrize("granularity", ["pair", "token"])
def test_scores_of_tokens_remove_them_in_all_heads_and_layers(granularity: Any) -> None:
    model = llama()
    inputs, real = padded_batch("right")
    scores = torch.rand(2, 9, generator=torch.Generator().manual_seed(3))
    sinks = torch.stack(find_sinks(model, inputs)).any(0)
    expected = []
    for rate in (0.25, 0.5):
        (tokens,) = chosen_pairs([scores[:, None]], [real], [sinks], rate, "top")
        with remove_values(model, [tokens, tokens]):
            changed = logits_of(model, inputs)
        nll = mean_nll(changed, inputs["input_ids"], real)
        clean = mean_nll(logits_of(model, inputs), inputs["input_ids"], real)
        expected.append(torch.tensor(nll) - torch.tensor(clean))
    metric = ComprehensivenessSufficiency(
        model, [0.25, 0.5], quantity="nll", granularity=granularity
    )
    methods = {"tensor": scores, "call": lambda batch: scores, "one": lambda batch: (scores,)}
    result = metric.evaluate(methods, inputs)
    for name in methods:
        found = result.per_example[name]["comprehensiveness"]
        assert torch.allclose(found.float(), torch.stack(expected, 1), rtol=1e-3, atol=1e-5)


def test_a_measure_by_token_is_its_token_scores() -> None:
    model, ids = llama(), token_ids()
    scores = TokenScores(ContributionWeights(model)).attribute
    metric = ComprehensivenessSufficiency(model, [0.2, 0.5], granularity="token")
    result = metric.evaluate({"measure": "contribution", "scores": scores}, ids)
    for side in SIDES:
        found = result.per_example
        assert torch.equal(found["measure"][side], found["scores"][side])


def test_a_batch_equals_its_single_examples() -> None:
    model = llama()
    inputs, real = padded_batch("left")
    metric = ComprehensivenessSufficiency(model, [0.3, 0.6])
    methods = {"cw": "contribution", "chance": "random"}
    together = metric.evaluate(methods, inputs)
    singly = metric.evaluate(methods, [inputs["input_ids"][b, real[b]][None] for b in range(2)])
    for side in SIDES:
        for name in methods:
            assert torch.allclose(
                together.per_example[name][side], singly.per_example[name][side], rtol=1e-4
            )


def test_own_classes_and_their_names_are_the_same_method() -> None:
    model, ids = gpt2(), token_ids()
    metric = ComprehensivenessSufficiency(model, [0.5], scoring="clean", ranking="global")
    methods = {
        "class": VWONAttention(model),
        "name": "vwon",
        "scores": TokenScores(VWONAttention(model), "mean"),
        "sum": TokenScores(VWONAttention(model), "sum"),
    }
    found = metric.evaluate(methods, ids).sufficiency
    assert torch.equal(found["class"], found["name"])
    assert torch.equal(found["class"], found["scores"])
    assert not torch.equal(found["class"], found["sum"])


def test_sinks_are_removed_only_where_they_are_not_protected() -> None:
    model, ids = llama(), token_ids()
    protected = comprehensiveness(model, ids, "attention", [1.0], scoring="clean")
    everything = comprehensiveness(
        model, ids, "attention", [1.0], scoring="clean", protect_sinks=False
    )
    of_all = comprehensiveness(model, ids, "attention", [1.0], scoring="clean", rate_of="all")
    assert torch.equal(protected, of_all)
    assert not torch.allclose(protected, everything)


def test_the_model_is_left_as_it_was_in_training_mode_too() -> None:
    model, ids = gpt2().train(), token_ids()
    before = state_of(model)
    with pytest.warns(UserWarning, match="training mode"):
        found = sufficiency(model, ids, "contribution", [0.5])
    assert state_of(model) == before
    assert torch.equal(found, sufficiency(model.eval(), ids, "contribution", [0.5]))


def test_scores_of_another_model_are_taken_in_its_own_pass() -> None:
    model, other, ids = llama(), with_shuffled_weights(llama()), token_ids()
    scores = TokenScores(VWONAttention(other), layers=None, heads=None).attribute(ids)
    real = torch.ones_like(ids, dtype=torch.bool)
    masks = chosen_pairs(list(scores.unbind(1)), [real] * 2, find_sinks(model, ids), 0.5, "top")
    with remove_values(model, masks):
        changed = logits_of(model, {"input_ids": ids})
    nll, clean = (
        torch.tensor(mean_nll(x, ids, real))
        for x in (changed, logits_of(model, {"input_ids": ids}))
    )
    for scoring in ("online", "clean"):
        found = comprehensiveness(
            model, ids, VWONAttention(other), [0.5], quantity="nll", scoring=scoring
        )
        assert torch.allclose(found[:, 0].float(), nll - clean, rtol=1e-3, atol=1e-5)
    tokens = comprehensiveness(model, ids, VWONAttention(other), [0.5], granularity="token")
    by_hand = TokenScores(VWONAttention(other)).attribute(ids)
    assert torch.allclose(tokens, comprehensiveness(model, ids, by_hand, [0.5]))
    with (
        pytest.raises(ValueError, match="method belongs to another model"),
        remove_tokens(model, VWONAttention(other), 0.5),
    ):
        pass


@pytest.mark.parametrize("side", ["left", "right"])
def test_another_model_runs_without_padding_and_dropout(side: str) -> None:
    model, other = gpt2(), with_shuffled_weights(gpt2())
    inputs, real = padded_batch(side)
    expected = [
        sufficiency(model, inputs["input_ids"][b, real[b]][None], VWONAttention(other), [0.5])
        for b in range(2)
    ]
    with pytest.warns(UserWarning, match="training mode"):
        found = sufficiency(model, inputs, VWONAttention(other.train()), [0.5])
    assert other.training
    assert torch.allclose(found, torch.cat(expected), rtol=1e-3)


def test_a_token_that_is_a_sink_in_one_layer_stays_in_all() -> None:
    model, ids = llama(), token_ids()
    threshold = 0.2
    sinks = torch.stack(find_sinks(model, ids, threshold=threshold))
    assert (sinks.any(0) & ~sinks.all(0)).any()  # some are sinks in one layer only
    with remove_values(model, [(~sinks.any(0))[:, None]] * 2):
        changed = logits_of(model, {"input_ids": ids})
    real = torch.ones_like(ids, dtype=torch.bool)
    nll, clean = (
        torch.tensor(mean_nll(x, ids, real))
        for x in (changed, logits_of(model, {"input_ids": ids}))
    )
    options: dict[str, Any] = {"quantity": "nll", "sink_threshold": threshold, "scoring": "clean"}
    for scope in ("layer", "global"):
        scores = torch.rand(2, 9)
        found = comprehensiveness(model, ids, scores, [1.0], ranking=scope, **options)
        assert torch.allclose(found[:, 0].float(), nll - clean, rtol=1e-3, atol=1e-5)


def test_sinks_of_online_removal_are_those_of_the_clean_pass() -> None:
    model, ids = llama(), token_ids()
    threshold = 0.2
    sinks = find_sinks(model, ids, threshold=threshold)
    with remove_values(model, [~s[:, None] for s in sinks]):
        changed = logits_of(model, {"input_ids": ids})
    with remove_tokens(model, "vw", 1.0, sink_threshold=threshold):  # takes them from that pass
        in_flight = logits_of(model, {"input_ids": ids})
    assert not torch.allclose(changed, in_flight, atol=1e-3)
    real = torch.ones_like(ids, dtype=torch.bool)
    nll, clean = (
        torch.tensor(mean_nll(x, ids, real))
        for x in (changed, logits_of(model, {"input_ids": ids}))
    )
    found = comprehensiveness(model, ids, "vw", [1.0], quantity="nll", sink_threshold=threshold)
    assert torch.allclose(found[:, 0].float(), nll - clean, rtol=1e-3, atol=1e-5)


def test_chance_differs_between_batches() -> None:
    model, ids = llama(), token_ids(B=1)
    result = ComprehensivenessSufficiency(model, [0.5]).evaluate({"chance": "random"}, [ids, ids])
    first, second = result.per_example["chance"]["sufficiency"]
    assert first != second


def test_shuffled_weights_are_the_same_numbers_elsewhere() -> None:
    model = llama()
    before = state_of(model)
    shuffled = with_shuffled_weights(model, seed=1)
    for x, y in zip(model.parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(x.flatten().sort()[0], y.flatten().sort()[0])
    assert not torch.equal(model.lm_head.weight, shuffled.lm_head.weight)
    again = with_shuffled_weights(model, seed=1)
    assert torch.equal(shuffled.lm_head.weight, again.lm_head.weight)
    assert state_of(model) == before


# -- results --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> FaithfulnessResult:
    metric = ComprehensivenessSufficiency(llama(), [0.2, 0.4, 0.8])
    batches = [token_ids(3, 9, seed) for seed in range(4)]
    return metric.evaluate({**METHODS_HERE, "chance": "random"}, batches)


def test_means_are_over_examples_and_rates(result: FaithfulnessResult) -> None:
    for name in ("cw", "a", "chance"):
        each = result.per_example[name]
        assert each["sufficiency"].shape == (12, 3)
        assert torch.equal(result.sufficiency[name], each["sufficiency"].mean(0))
        assert torch.equal(result.comprehensiveness[name], each["comprehensiveness"].mean(0))
        assert result.aopc()[name]["sufficiency"] == pytest.approx(
            float(result.sufficiency[name].mean())
        )


def test_corpus_perplexity_is_that_of_all_tokens(result: FaithfulnessResult) -> None:
    nll = torch.tensor([r["nll"]["cw"]["top"] for r in result.records], dtype=torch.float64)
    clean = torch.tensor([r["clean_nll"] for r in result.records], dtype=torch.float64)
    expected = nll.mean(0).exp() - clean.mean().exp()  # all texts are of one length
    assert torch.allclose(result.corpus["cw"]["comprehensiveness"], expected)
    assert result.clean_corpus == pytest.approx(float(clean.mean().exp()))


@pytest.mark.parametrize("statistic", ["mean", "nll", "corpus"])
def test_intervals_are_those_of_paired_resamples(
    result: FaithfulnessResult, statistic: Any
) -> None:
    found = result.compare("cw", "a", statistic=statistic, samples=4000, seed=1)
    generator = torch.Generator().manual_seed(5)
    a, b = (result.per_example[n]["sufficiency"] for n in ("cw", "a"))
    if statistic != "mean":
        a, b = (
            torch.tensor([r["nll"][n]["bottom"] for r in result.records], dtype=torch.float64)
            for n in ("cw", "a")
        )
    differences = []
    for _ in range(2000):
        drawn = torch.randint(12, (12,), generator=generator)
        x, y = a[drawn].mean(0), b[drawn].mean(0)
        differences.append(x.exp() - y.exp() if statistic == "corpus" else x - y)
    expected = torch.quantile(
        torch.stack(differences), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0
    )
    spread = expected[1] - expected[0]
    assert ((found.low - expected[0]).abs() < 0.15 * spread).all()
    assert ((found.high - expected[1]).abs() < 0.15 * spread).all()
    assert ((found.low < found.difference) & (found.difference < found.high)).all()


def test_less_confidence_gives_a_narrower_interval(result: FaithfulnessResult) -> None:
    wide, narrow = (result.compare("cw", "a", confidence=c) for c in (0.95, 0.5))
    samples = result.per_example["cw"]["sufficiency"] - result.per_example["a"]["sufficiency"]
    drawn = torch.randint(12, (10_000, 12), generator=torch.Generator().manual_seed(0))
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = torch.quantile(samples[drawn].mean(1), quarters, dim=0)
    assert torch.allclose(narrow.low, low)
    assert torch.allclose(narrow.high, high)
    assert (wide.low < narrow.low).all()
    assert (wide.high > narrow.high).all()


def test_corpus_perplexity_weighs_texts_by_their_tokens() -> None:
    model, ids = llama(), token_ids()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = ComprehensivenessSufficiency(model, [0.5]).evaluate(
        {"cw": "contribution"}, {"input_ids": ids, "attention_mask": mask}
    )
    nll = [r["clean_nll"] for r in found.records]
    assert [r["count"] for r in found.records] == [8, 3]
    expected = torch.tensor((8 * nll[0] + 3 * nll[1]) / 11).exp()
    assert found.clean_corpus == pytest.approx(float(expected))


def test_one_text_has_no_interval() -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5])
    result = metric.evaluate(METHODS_HERE, token_ids(1), show_progress=False)
    with pytest.raises(ValueError, match=r"needs 2 or more texts, got 1: evaluate more"):
        result.compare("cw", "a")
    two = metric.evaluate(METHODS_HERE, token_ids(2), show_progress=False).compare("cw", "a")
    assert two.low.isfinite().all()


def test_a_method_is_no_better_than_itself(result: FaithfulnessResult) -> None:
    found = result.compare("cw", "cw")
    assert found.better == (None, None, None)
    assert not found.difference.any()


def test_the_better_method_is_named_on_either_side() -> None:
    records = [
        {
            "index": i,
            "clean": 1.0,
            "clean_nll": 0.0,
            "count": 5,
            "values": {
                "a": {"top": [2.0 + i], "bottom": [2.0 + i]},
                "b": {"top": [3.0 + i], "bottom": [3.0 + i]},
            },
            "nll": {"a": {"top": [0.1], "bottom": [0.1]}, "b": {"top": [0.2], "bottom": [0.2]}},
        }
        for i in range(5)
    ]
    rates = {"top": (0.5,), "bottom": (0.5,)}
    result = FaithfulnessResult(rates, {"higher_is_better": False, "quantity": "nll"}, records)
    lower = result.compare("a", "b")
    for found in (lower.difference, lower.low, lower.high):
        assert found.tolist() == pytest.approx([-1.0])
    assert lower.better == ("a",)
    assert result.compare("a", "b", "comprehensiveness").better == ("b",)


def test_tables_and_figures_show_every_method_side_and_rate(result: FaithfulnessResult) -> None:
    table = result.to_dataframe()
    assert len(table) == 3 * 2 * 3
    row = table.query("method == 'cw' and side == 'sufficiency' and rate == 0.4").iloc[0]
    assert row.delta == float(result.sufficiency["cw"][1])
    assert row.delta_corpus_perplexity == float(result.corpus["cw"]["sufficiency"][1])
    _, axes = result.plot(use_pyplot=False)
    assert [len(ax.lines) for ax in axes] == [3, 3]
    drawn = dict(zip(("cw", "a", "chance"), axes[1].lines, strict=True))
    assert drawn["a"].get_ydata().tolist() == result.sufficiency["a"].tolist()
    assert drawn["a"].get_xdata().tolist() == [20, 40, 80]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["cw", "a", "chance"]


def test_curves_have_the_labels_and_colours_of_the_registry() -> None:
    described = {"vw": "vw", "mine": "contribution", "chance": "random"}
    styles = curve_styles(described, {"methods": described})
    registered = {name: measures.find(name) for name in ("vw", "contribution")}
    assert styles["vw"] == {"label": registered["vw"].label, "color": registered["vw"].colour}
    assert styles["mine"] == {"label": "mine", "color": registered["contribution"].colour}
    assert styles["chance"]["label"] == "chance"
    assert len({style["color"] for style in styles.values()}) == 3


def test_a_result_comes_back_bit_for_bit(result: FaithfulnessResult, tmp_path: Path) -> None:
    result.save(tmp_path / "result.json")
    loaded = FaithfulnessResult.load(tmp_path / "result.json")
    assert loaded.rates == result.rates
    for side in SIDES:
        assert torch.equal(loaded.per_example["cw"][side], result.per_example["cw"][side])
    assert loaded.settings == json.loads(json.dumps(result.settings))


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    for content, message in (
        ("[]", "not a result"),
        ("{", "not a result"),
        ('{"version": 9}', "reads 2"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            FaithfulnessResult.load(file)


# -- long runs ------------------------------------------------------------------------------


class Stops:
    """A method that is interrupted at its n-th batch."""

    def __init__(self, at: int | None) -> None:
        self.left = at

    def __call__(self, batch: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return batch.float()

    def __getstate__(self) -> None:
        """Where it stops is not what it computes."""


BATCHES = [token_ids(2, 7, seed) for seed in range(3)]


def run(file: Path | None, model: nn.Module | None = None, at: int | None = None, **options: Any):  # type: ignore[no-untyped-def]
    batches = options.pop("batches", BATCHES)
    methods = {"cw": options.pop("measure", "contribution"), "chance": "random", "own": Stops(at)}
    metric = ComprehensivenessSufficiency(model or llama(), [0.5], **options)
    return metric.evaluate(methods, batches, resume_from=file)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path, at: int) -> None:
    file = tmp_path / "run.records"
    with pytest.raises(KeyboardInterrupt):
        run(file, at=at)
    lines = file.read_bytes().count(b"\n")
    assert lines == 1 + 2 * at
    resumed = run(file, at=3 - at)  # what is finished is not run again
    assert resumed.records == run(None).records
    assert run(file, at=0).records == resumed.records


def test_a_model_may_lie_elsewhere_when_its_run_goes_on(tmp_path: Path) -> None:
    file, moved = tmp_path / "run.records", llama()
    with pytest.raises(KeyboardInterrupt):
        run(file, at=1)
    moved.config.name_or_path = "elsewhere"  # type: ignore[union-attr]
    resumed = run(file, moved)
    assert resumed.settings["model"] == "elsewhere"
    assert resumed.records == run(None).records


def test_a_batch_of_which_a_part_was_kept_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "run.records"
    whole = run(file).records
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    assert run(file).records == whole
    assert file.read_bytes() == b"".join(lines)


def test_another_run_is_refused_and_its_file_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.records"
    with pytest.raises(KeyboardInterrupt):
        run(file, at=2)
    before = file.read_bytes()
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    same = llama()
    changes: list[dict[str, Any]] = [
        {"scoring": "clean"},
        {"seed": 1},
        {"quantity": "nll"},
        {"reduction": "sum"},
        {"rate_of": "all"},
        {"ranking": "head"},
        {"granularity": "token"},
        {"protect_sinks": False},
        {"sink_threshold": 0.9},
        {"sink_space": "value"},
        {"protected_ids": [5]},
        {"measure": "vwon"},
        {"measure": TokenScores(ContributionWeights(same), signed=True), "model": same},
        {"measure": ContributionWeights(same, scope="intra"), "model": same},
        {"model": other},
        {"model": llama(rms_norm_eps=1e-3)},
        {"measure": ContributionWeights(with_shuffled_weights(llama()))},
        {"batches": [b + 1 for b in BATCHES]},
        {"batches": [torch.cat(BATCHES)]},
    ]
    for options in changes:
        with pytest.raises(RecordsError, match="another"):
            run(file, **options)
        assert file.read_bytes() == before


# -- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": [0.5, 0.2]}, "ascending order"),
        ({"rates": [0.5, 0.5]}, "ascending order"),
        ({"rates": [0.0, 0.5]}, r"fractions in \(0, 1\]"),
        ({"rates": [1.5]}, r"fractions in \(0, 1\]"),
        ({"rates": []}, r"fractions in \(0, 1\]"),
        ({"rates": [float("nan")]}, r"fractions in \(0, 1\]"),
        ({"rates": iter([])}, r"fractions in \(0, 1\]"),
        ({"rates": 0.5}, r"fractions in \(0, 1\], such as \[0.1, 0.5\], got 0.5"),
        ({"rates": {"top": 0.5}}, "got 0.5"),
        ({"rates": ["0.5"]}, "got \\['0.5'\\]"),
        ({"rates": "0.5"}, "got '0.5'"),
        ({"ranking": "global"}, "use scoring='clean'"),
        ({"quantity": "accuracy"}, "quantity='accuracy' is unknown"),
        ({"granularity": "word"}, "granularity='word' is unknown"),
        ({"reduction": "median"}, "reduction='median' is unknown"),
    ],
)
def test_senseless_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ComprehensivenessSufficiency(llama(), **options)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (torch.zeros(2, 8), ValueError, r"scores \(2, 8\).*\(2, 9\)"),
        (torch.full((2, 9), float("nan")), ValueError, "NaN or infinite"),
        (lambda batch: [1, 2], ValueError, "scores list"),
        ("gradients", ValueError, "method='gradients' is unknown"),
        (7, TypeError, "method is of type int"),
    ],
)
def test_methods_without_scores_are_refused(
    method: object, error: type[Exception], message: str
) -> None:
    model = llama()
    before = state_of(model)
    metric = ComprehensivenessSufficiency(model, [0.5])
    with pytest.raises(error, match=message):
        metric.evaluate({"m": method}, token_ids())
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data are empty"),
        (token_ids(2, 1), "fewer than two tokens"),
        (
            {"input_ids": token_ids(), "attention_mask": torch.tensor([[1] + [0] * 8, [1] * 9])},
            "fewer than two tokens",
        ),
        (torch.zeros(0, 5, dtype=torch.long), "empty"),
    ],
)
def test_data_without_text_are_refused(data: Any, message: str) -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5])
    with pytest.raises(ValueError, match=message):
        metric.evaluate({"cw": "contribution"}, data)


def test_a_text_of_sinks_is_refused() -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5], sink_threshold=-1.0)
    with pytest.raises(ValueError, match="All tokens of an example are protected"):
        metric.evaluate({"cw": "contribution"}, token_ids())


def test_tensors_for_one_batch_are_not_taken_for_several() -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5])
    batches = [token_ids(seed=1), token_ids(seed=2)]
    with pytest.raises(ValueError, match="belong to one batch"):
        metric.evaluate({"ig": torch.rand(2, 9)}, batches)
    with pytest.raises(ValueError, match="belong to one batch"):
        metric.evaluate({"cw": "contribution"}, batches, target=torch.tensor([1, 2]))
    metric.evaluate({"ig": torch.rand(2, 9)}, batches[:1])


def test_batches_come_as_a_data_loader_gives_them() -> None:
    model, ids = llama(), token_ids(4)
    metric = ComprehensivenessSufficiency(model, [0.5])
    loader = DataLoader(TensorDataset(ids), batch_size=2)
    found = metric.evaluate({"cw": "contribution"}, loader).per_example["cw"]["sufficiency"]
    expected = metric.evaluate({"cw": "contribution"}, [ids[:2], ids[2:]])
    assert torch.equal(found, expected.per_example["cw"]["sufficiency"])
    positions_first = {"position_ids": torch.arange(9)[None], "input_ids": ids}
    assert len(metric.evaluate({"cw": "contribution"}, positions_first).records) == 4
    with pytest.raises(TypeError, match="A batch is of type str"):
        metric.evaluate({"cw": "contribution"}, ["text"])
    masks = torch.ones_like(ids)
    with pytest.raises(TypeError, match="A batch has 2 tensors without names"):
        metric.evaluate({"cw": "contribution"}, DataLoader(TensorDataset(ids, masks)))
    with pytest.raises(TypeError, match="The inputs are a tuple of 2"):
        metric.evaluate({"cw": "contribution"}, (ids, masks))


def test_tokens_that_cannot_come_do_not_count_in_the_divergence() -> None:
    model, ids = llama(), token_ids()
    expected = sufficiency(model, ids, "contribution", [0.5], quantity="kl")

    def never_the_last(module: Any, args: Any, logits: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)

    model.lm_head.register_forward_hook(never_the_last)
    found = sufficiency(model, ids, "contribution", [0.5], quantity="kl")
    assert found.all()
    torch.testing.assert_close(found, expected)


def test_methods_may_use_gradients() -> None:
    model, ids = llama(), token_ids()

    def gradients(batch: Tensor) -> Tensor:
        embeddings = model.get_input_embeddings()(batch).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.log_softmax(-1)[:, -1, 5].sum().backward()
        return embeddings.grad.abs().sum(-1)  # type: ignore[union-attr]

    found = comprehensiveness(model, ids, gradients, [0.5])
    assert torch.equal(found, comprehensiveness(model, ids, gradients(ids), [0.5]))


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        sufficiency(model, token_ids(), "contribution", [0.5])


def test_other_misuse_is_refused(result: FaithfulnessResult) -> None:
    model = llama()
    metric = ComprehensivenessSufficiency(model, [0.5])
    with pytest.raises(ValueError, match="methods is empty"):
        metric.evaluate({}, token_ids())
    for methods in (["vw"], "vw", ContributionWeights(model)):
        with pytest.raises(TypeError, match="give each method a name of your choice"):
            metric.evaluate(methods, token_ids())  # type: ignore[arg-type]
    for data in (None, 5):
        with pytest.raises(TypeError, match=r"The data are of type .*: give token ids \(B, T\)"):
            metric.evaluate({"vw": "vw"}, data)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="'ig' was not evaluated"):
        result.compare("cw", "ig")
    with pytest.raises(TypeError, match="'model' is a name: load the model first"):
        ComprehensivenessSufficiency("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one number per example"):
        comprehensiveness(
            model, token_ids(), "vw", [0.5], quantity=lambda logits, batch, clean: logits.mean()
        )
    with pytest.raises(ValueError, match="target has shape"):
        sufficiency(model, token_ids(), "vw", [0.5], target=torch.tensor([1, 2, 3]))


# -- agreement ------------------------------------------------------------------------------


def test_rank_correlation_is_that_of_the_ranks() -> None:
    a = torch.tensor([[3.0, 1, 2, 2, 9], [1, 2, 3, 4, 5]])
    b = torch.tensor([[1.0, 1, 5, 0, 7], [5, 4, 3, 2, 1]])
    ranks = ([4, 1, 2.5, 2.5, 5], [2.5, 2.5, 4, 1, 5])  # by hand
    x, y = (torch.tensor(r) - 3 for r in ranks)
    expected = float((x @ y) / (x.norm() * y.norm()))
    found = agreement(a, b, top=0.4)
    assert found.rank_correlation.tolist() == pytest.approx([expected, -1.0])
    assert found.top_overlap.tolist() == [0.5, 0.0]


def test_tokens_that_do_not_count_change_no_agreement() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 8, generator=generator) for _ in range(2))
    real = torch.tensor([[False] + [True] * 7])
    whole, rest = agreement(a, b, real), agreement(a[:, 1:], b[:, 1:])
    assert whole.rank_correlation.tolist() == rest.rank_correlation.tolist()
    assert agreement(a, a.fill_(1)).rank_correlation.isnan().all()


def test_scores_that_cannot_be_compared_are_refused() -> None:
    a = torch.rand(1, 4)
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 3\)"):
        agreement(a, a[:, :3])
    with pytest.raises(ValueError, match=r"got 0\.0"):
        agreement(a, a, top=0.0)
    with pytest.raises(ValueError, match="Example 0 has fewer than two"):
        agreement(a, a, torch.tensor([[True, False, False, False]]))


# -- masked language models -----------------------------------------------------------------

CLS, SEP, MASK = 1, 2, 63


def bert_and_texts() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A BERT, two texts between class and separator tokens, and which tokens are real."""
    model = bert(bos_token_id=None, eos_token_id=None)
    ids = token_ids(2, 8)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 6:] = False
    ids[:, 0] = CLS
    ids[0, 7] = ids[1, 5] = SEP
    return model, {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}, real


@pytest.mark.parametrize("scoring", ["clean", "online"])
def test_masked_models_are_measured_by_pseudo_perplexity(scoring: Any) -> None:
    model, inputs, real = bert_and_texts()
    ids = inputs["input_ids"]
    metric = ComprehensivenessSufficiency(
        model, [0.5], scoring=scoring, mask_token_id=MASK, protected_ids=[CLS, SEP]
    )
    result = metric.evaluate({"cw": "contribution"}, inputs)
    sinks = find_sinks(model, inputs)
    kept = [s | (ids == CLS) | (ids == SEP) for s in sinks]
    scores = TokenScores(ContributionWeights(model), layers=None, heads=None).attribute(inputs)
    masks = chosen_pairs(list(scores.unbind(1)), [real] * 2, kept, 0.5, "bottom")

    def pseudo_nll(removed: bool) -> Tensor:
        losses: list[list[Tensor]] = [[], []]
        for b in range(2):
            for j in real[b].nonzero()[:, 0].tolist():
                if ids[b, j] in (CLS, SEP):
                    continue
                masked = ids[b : b + 1].clone()
                masked[0, j] = MASK
                given = {"input_ids": masked, "attention_mask": inputs["attention_mask"][b : b + 1]}
                one = [m[b : b + 1] for m in masks]
                with remove_values(model, one) if removed else contextlib.nullcontext():
                    logits = logits_of(model, given)
                losses[b].append(-logits[0, j].double().log_softmax(-1)[ids[b, j]])
        return torch.stack([torch.stack(x).mean() for x in losses])

    clean = pseudo_nll(False)
    assert [r["count"] for r in result.records] == [6, 4]
    assert torch.allclose(
        torch.tensor([r["clean"] for r in result.records]), clean.exp().float(), rtol=1e-4
    )
    found = result.per_example["cw"]["sufficiency"][:, 0]
    assert found.abs().min() > 1e-3
    if scoring == "clean":
        assert torch.allclose(found, pseudo_nll(True).exp() - clean.exp(), rtol=1e-3)
    else:
        other = ComprehensivenessSufficiency(
            model, [0.5], scoring="clean", mask_token_id=MASK, protected_ids=[CLS, SEP]
        ).evaluate({"cw": "contribution"}, inputs)
        sides = [
            torch.cat([r.per_example["cw"][side] for side in ("comprehensiveness", "sufficiency")])
            for r in (result, other)
        ]
        assert not torch.allclose(*sides, rtol=1e-3)


def test_a_masked_model_is_not_taken_for_a_causal_one() -> None:
    model, inputs, _ = bert_and_texts()
    with pytest.raises(ValueError, match="give mask_token_id"):
        sufficiency(model, inputs, "contribution", [0.5])


def test_a_masked_model_predicts_no_next_token() -> None:
    with pytest.raises(ValueError, match="quantity='prob' needs a prediction of the token after"):
        ComprehensivenessSufficiency(llama(), quantity="prob", mask_token_id=MASK)


def test_protected_tokens_are_never_removed() -> None:
    model, ids = llama(), token_ids()
    protected = sorted({*ids.flatten().tolist()})[::2]
    found = comprehensiveness(model, ids, "vw", [1.0], scoring="clean", protected_ids=protected)
    removed = ~torch.isin(ids, torch.tensor(protected))
    with remove_values(model, [(removed & ~sinks)[:, None] for sinks in find_sinks(model, ids)]):
        changed = logits_of(model, {"input_ids": ids})
    real = torch.ones_like(ids, dtype=torch.bool)
    nll, clean = (
        torch.tensor(mean_nll(x, ids, real))
        for x in (changed, logits_of(model, {"input_ids": ids}))
    )
    assert torch.allclose(found[:, 0].float(), nll.exp() - clean.exp(), rtol=1e-3, atol=1e-4)
