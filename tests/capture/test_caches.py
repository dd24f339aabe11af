"""Key-value caches, known by what they are: whatever the argument is called, and left as given."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from captum_cw import (
    AttentionWeights,
    ContributionWeights,
    TokenScores,
    VWONAttention,
    remove_tokens,
    remove_values,
    scale_values,
)
from captum_cw.capture.caches import find_cache, is_cache, own_copy, tokens_in
from support.inputs import token_ids
from support.models import SIZES, build, llama, mistral


class Remembering(transformers.LlamaForCausalLM):
    """Takes its cache by a name of its own, and returns it in a tuple behind its logits."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, remembered: Any = None) -> Any:
        given = {
            "attention_mask": attention_mask,
            own_name(transformers.LlamaForCausalLM): remembered,
        }
        output = super().forward(input_ids=input_ids, use_cache=remembered is not None, **given)
        return output.logits, remembered


def own_name(kind: type[nn.Module]) -> str:
    """What this release of transformers calls the argument."""
    return next(
        n for n in inspect.signature(kind.forward).parameters if n in ("cache", "past_key_values")
    )


def remembering() -> nn.Module:
    return build(Remembering, transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def names(model: nn.Module) -> list[str]:
    """All names under which the model takes a cache: an old one too, where it is still taken."""
    own = "remembered" if isinstance(model, Remembering) else own_name(type(model))
    return [own, "past_key_values"] if own == "cache" else [own]


MODELS_AND_NAMES = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make in (llama, remembering)
    for name in names(make())
]
by_name = pytest.mark.parametrize(("make", "name"), MODELS_AND_NAMES)


def logits(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return found


def filled(model: nn.Module, ids: Tensor, name: str) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **{name: cache})
    return cache


def contents(cache: Any) -> list[Tensor]:
    return [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]


@by_name
@pytest.mark.parametrize("kind", [ContributionWeights, VWONAttention, AttentionWeights])
def test_a_given_cache_is_as_it_was_and_a_second_call_gives_the_same(
    make: Any, name: str, kind: Any
) -> None:
    model, ids = make(), token_ids(B=1)
    cache = filled(model, ids[:, :5], name)
    before = contents(cache)
    given = {"input_ids": ids[:, 5:], "attention_mask": torch.ones(1, 9), name: cache}
    first, second = kind(model).attribute(given), kind(model).attribute(given)
    assert tokens_in(cache) == 5
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))
    whole = kind(model).attribute({"input_ids": ids})
    for one, two, rows in zip(first, second, whole, strict=True):
        assert one.shape == (1, 4, 4, 9)
        assert torch.equal(one, two)
        assert torch.allclose(one, rows[:, :, 5:], atol=1e-5)


@by_name
def test_a_mask_of_the_new_tokens_alone_is_taken_beside_a_cache(make: Any, name: str) -> None:
    model, ids = make(), token_ids(B=1)
    scores = TokenScores(ContributionWeights(model), queries=-1)
    cache = filled(model, ids[:, :5], name)
    given = {"input_ids": ids[:, 5:], "attention_mask": torch.ones(1, 9), name: cache}
    assert torch.allclose(scores.attribute(given), scores.attribute(ids), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 7\).*after 5 in a cache.*\(1, 9\)"):
        scores.attribute({**given, "attention_mask": torch.ones(1, 7)})


def test_a_cache_that_autograd_has_recorded_is_copied() -> None:
    model, ids = llama(), token_ids(B=1)
    cache = find_cache(model(ids[:, :5], use_cache=True))
    assert contents(cache)[0].requires_grad
    name = own_name(type(model))
    scores = TokenScores(ContributionWeights(model)).attribute(
        {"input_ids": ids[:, 5:], name: cache}
    )
    assert scores.shape == (1, 9)
    assert tokens_in(cache) == 5


def test_a_static_cache_and_a_window_are_left_as_they_were() -> None:
    ids = token_ids(B=1)
    for model, cache in (
        (llama(), StaticCache(config=llama().config, max_cache_len=12)),
        (mistral(), DynamicCache(config=mistral().config)),
    ):
        name = own_name(type(model))
        with torch.no_grad():
            model(ids[:, :5], **{name: cache})
        before = contents(cache)
        ContributionWeights(model).attribute({"input_ids": ids[:, 5:], name: cache})
        assert tokens_in(cache) == 5
        assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))


@by_name
@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_an_empty_cache_is_filled_once_and_changes_nothing(
    make: Any, name: str, scoring: Any
) -> None:
    model, ids = make(), token_ids()
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5, scoring=scoring):
        expected = logits(model(ids))
        cache = DynamicCache()
        found = logits(model(ids, **{name: cache}))
    assert torch.allclose(found, expected, atol=1e-5)
    assert tokens_in(cache) == 9


def interventions(model: nn.Module, B: int = 2) -> dict[str, Any]:
    masks = [torch.zeros(B, 4, 6, dtype=torch.bool) for _ in range(2)]
    masks[0][:, 1, 2] = masks[1][:, :, 4] = True
    return {
        "online": remove_tokens(model, "contribution", 0.5),
        "clean": remove_tokens(model, "contribution", 0.5, scoring="clean"),
        "values": remove_values(model, masks),
        "last": scale_values(model, 0.0, positions=-1),
    }


WHICH = ["online", "clean", "values", "last"]


@by_name
@pytest.mark.parametrize("which", WHICH)
def test_tokens_after_a_cache_keep_what_their_prompt_has_lost(
    make: Any, name: str, which: str
) -> None:
    model, text = make(), token_ids(T=9)
    with torch.no_grad(), interventions(model)[which]:
        cache = DynamicCache()
        found = [logits(model(text[:, :6], **{name: cache}))[:, -1]]
        found += [logits(model(text[:, n : n + 1], **{name: cache}))[:, -1] for n in (6, 7, 8)]
    # The same model and text, by generation that has no cache at all.
    plain_model = llama()
    plain_model.generation_config.eos_token_id = None
    with torch.no_grad(), interventions(plain_model)[which]:
        expected = plain_model.generate(
            text[:, :6],
            attention_mask=torch.ones(2, 6),
            use_cache=False,
            max_new_tokens=4,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[lambda ids, scores: forced(text, ids)],
        )
    for row, other in zip(found, expected.logits, strict=True):
        assert torch.allclose(row, other, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(found[3], logits(model(text))[:, -1], atol=1e-3)


def forced(text: Tensor, ids: Tensor) -> Tensor:
    """Scores that leave nothing but the next token of a text."""
    following = text[:, min(ids.shape[1], text.shape[1] - 1)]
    return torch.nn.functional.one_hot(following, 64).float().log()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_without_a_cache_writes_what_it_writes_with_one(which: str, beams: int) -> None:
    model, ids = llama(), token_ids(T=6)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    options["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad(), interventions(model, B=2 * beams)[which]:
        cached = model.generate(ids, use_cache=True, **options)
        uncached = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.scores, uncached.scores, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    plainly = model.generate(ids, **options)
    assert not torch.allclose(plainly.scores[1], uncached.scores[1], atol=1e-3)
    assert "generate" not in vars(model)


def test_generation_of_several_texts_at_once_is_refused_where_values_change() -> None:
    model, ids = llama(), token_ids(B=1)
    generate, own = model.generate, model.forward

    def two_texts(ids: Tensor) -> None:
        model(ids)
        model(ids.flip(1))

    model.generate = two_texts
    with remove_tokens(model, "contribution", 0.5), torch.no_grad():
        with pytest.raises(RuntimeError, match="another text than its prompt of 9 tokens"):
            model.generate(ids)
        model(ids)
    assert model.generate is two_texts
    assert model.forward == own
    del model.generate
    assert model.generate == generate


def test_a_pass_outside_of_generation_ranks_its_own_text() -> None:
    model, ids = llama(), token_ids(B=1)
    with torch.no_grad():
        with remove_tokens(model, "contribution", 0.5):
            model(ids[:, :6])
            found = model(ids).logits
        with remove_tokens(model, "contribution", 0.5):
            expected = model(ids).logits
    assert torch.equal(found, expected)


def test_a_tuple_of_keys_and_values_is_a_cache_and_is_refused_where_values_change() -> None:
    model = llama()
    pair = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)
    assert is_cache((pair, pair))
    assert tokens_in((pair, pair)) == 5
    assert not any(map(is_cache, (pair, torch.zeros(1), None, "cache", [1], {"keys": pair})))
    with (
        remove_tokens(model, "contribution", 0.5),
        pytest.raises(TypeError, match="tuple of tensors"),
    ):
        model(token_ids(), **{own_name(type(model)): (pair, pair)})


def test_a_copy_shares_what_is_shared_within_it_and_nothing_with_the_original() -> None:
    x = torch.zeros(2)
    given = {"a": [x, (x, 1)], "b": {"x"}}
    copied = own_copy(given)
    copied["a"][0].add_(1)
    assert copied["a"][1][0].tolist() == [1, 1]
    assert x.tolist() == [0, 0]
    assert own_copy(x.requires_grad_() * 2).tolist() == [0, 0]
