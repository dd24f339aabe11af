"""Shares of words sum to one and keep their signs."""

import pytest
import torch

from captum_cw import Explanation, explain


@pytest.fixture
def asked(tiny_model, tiny_tokenizer) -> Explanation:
    return explain(tiny_model, tiny_tokenizer, "a b c d e f g h i j")


WORDS = ["The", " cap", "ital", " of", " Italy"]
SCORES = {"target": torch.tensor([4.0, 1.0, 2.0, -1.0, 2.0])}


def made(**settings: object) -> Explanation:
    return Explanation(WORDS, SCORES, words=[0, 1, 1, 2, 3], settings=settings)


def test_sizes_of_shares_sum_to_one(asked: Explanation) -> None:
    for method, scores in asked.scores.items():
        shares = asked.shares(method)
        assert sum(abs(x.share) for x in shares) == pytest.approx(1)
        size = scores.double().abs().sum()
        # Each of these tokens is a word of its own.
        expected = (scores.double() / size).tolist()
        assert [x.share for x in shares] == pytest.approx(expected)
        assert [x.score for x in shares] == pytest.approx(scores.tolist())


def test_tokens_of_a_word_are_summed() -> None:
    shares = made().shares()
    assert [x.text for x in shares] == ["The", " capital", " of", " Italy"]
    assert [x.place for x in shares] == [0, 1, 3, 4]
    assert [x.score for x in shares] == [4, 3, -1, 2]
    assert [x.percent for x in shares] == ["40%", "30%", "-10%", "20%"]
    assert [x.is_sink for x in shares] == [True, False, False, False]


def test_what_each_head_did_sums_to_the_scores(asked: Explanation) -> None:
    effects = sum(layer.effect.double().sum() for layer in asked.heads)
    torch.testing.assert_close(effects, asked.scores["target"].double().sum(), rtol=1e-4, atol=1e-5)


def test_a_part_has_the_numbers_of_the_whole(asked: Explanation) -> None:
    part = asked.part(2, 7)
    assert part.tokens == asked.tokens[2:7]
    for name, x in asked.maps.items():
        assert torch.equal(part.maps[name], x[2:7, 2:7])
    for name, x in asked.scores.items():
        assert torch.equal(part.scores[name], x[2:7])
    for layer, whole in zip(part.heads, asked.heads, strict=True):
        dense = torch.zeros(*whole.keys.shape[:2], 10)
        dense.scatter_add_(-1, whole.keys.long(), whole.attention)
        found = torch.zeros(*layer.keys.shape[:2], 5)
        found.scatter_add_(-1, layer.keys.long(), layer.attention)
        assert torch.equal(found, dense[:, 2:7, 2:7])
    assert part.sinks == ()
    assert "target position" not in part.settings
    assert asked.part(5, 10).settings["target position"] == 4
    assert "contribution" in part.page()


def test_a_part_keeps_the_queries_of_an_output() -> None:
    whole = Explanation(
        ["a", "b", "c"], {}, {"m": torch.arange(6.0).view(2, 3)}, queries=["x", "y"]
    )
    assert whole.part(1, 3).maps["m"].tolist() == [[1, 2], [4, 5]]
    with pytest.raises(ValueError, match=r"Span \(2, 4\) is empty or not within the 3 tokens"):
        whole.part(2, 4)


def test_words_keep_the_place_of_the_prediction(tiny_model, tiny_tokenizer) -> None:
    whole = explain(tiny_model, tiny_tokenizer, "a b c d")
    assert whole.settings["target position"] == 3
    assert whole.by_word().settings["target position"] == 3
    assert whole.by_span([(0, 2), (2, 4)]).settings["target position"] == 1
    assert "target position" not in whole.by_span([(0, 2)]).settings
