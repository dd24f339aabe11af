"""Shares of words sum to one, keep their signs, and are told in one sentence."""

import pytest
import torch

from captum_cw import Explanation, explain
from captum_cw.explanation import shares
from captum_cw.explanation.heads import HeadMaps
from captum_cw.explanation.shares import sentence
from captum_cw.text.tokens import readable_ids


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"target": " Rome"},
            "“Rome” comes from “capital” (30%) and “Italy” (20%). “of” (10%) worked against it. "
            "40% came by way of the first token “The”, an attention sink, and says little about "
            "that word.",
        ),
        (
            {"target": " Rome", "contrast": " Paris"},
            "“Rome” rather than “Paris” comes from “capital” (30%) and “Italy” (20%). “of” (10%) "
            "worked for “Paris”. 40% came by way of the first token “The”, an attention sink",
        ),
        (
            {},
            "By “contribution to the prediction”, the largest shares are those of “capital” (30%) "
            "and “Italy” (20%). “of” (10%) worked against it. 40% came by way of the first token",
        ),
    ],
)
def test_the_sentence(settings: dict[str, str], expected: str) -> None:
    assert expected in str(made(**settings))


def test_a_sink_may_work_against_the_target() -> None:
    scores = {"target": torch.tensor([-3.0, 1.0])}
    found = str(Explanation(["The", " end"], scores, settings={"target": "!"}))
    assert "75% was taken away by the first token “The”, an attention sink" in found
    assert found.startswith("Why “!”?")


def test_no_word_for_the_target() -> None:
    scores = {"target": torch.tensor([0.0, -1.0])}
    found = str(Explanation(["The", " end"], scores, settings={"target": "!"}))
    assert "“!” comes from no single word." in found
    assert "“end” (100%) worked against it." in found


def test_raw_scores_have_a_unit() -> None:
    found = made(target=" Rome").summary(1, raw=True)
    assert "capital       3 " in found
    assert found.endswith("Scores: contribution to the prediction, in the unit of the target.")
    assert "2 more words: 30% together" in found


def test_scores_of_zero_have_no_shares() -> None:
    nothing = Explanation(["a", " b"], {"contribution": torch.zeros(2)})
    assert [x.share for x in nothing.shares()] == [0, 0]
    assert "those of no word" in str(nothing)


def test_maps_alone_are_summarised_by_their_contents() -> None:
    maps = Explanation(["a", " b"], {}, maps={"attention": torch.eye(2)})
    assert str(maps) == repr(maps)
    with pytest.raises(ValueError, match="method='attention' has no scores here"):
        maps.shares("attention")


def test_the_probability_stands_beside_the_question(asked: Explanation) -> None:
    probability = float(asked.settings["target probability"])
    line = str(asked).splitlines()[0]
    assert line.startswith(f"Why “{asked.settings['target'].strip()}”? (probability ")
    assert float(line.split()[-1].rstrip("%)")) == pytest.approx(100 * probability, rel=0.06)


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


def test_words_that_occur_again_are_told_apart() -> None:
    scores = {"target": torch.tensor([1.0, -2.0, 3.0, 4.0])}
    found = Explanation(["a", " the", " b", " the"], scores, settings={"target": "!"})
    assert [x.label for x in found.shares()] == ["a", "the (1st)", "b", "the (2nd)"]
    assert "“!” comes from the 2nd “the” (40%) and “b” (30%)." in str(found)
    assert "The 1st “the” (20%) worked against it." in str(found)
    assert [shares._ordinal(n) for n in (1, 2, 3, 4, 11, 12, 21, 102, 113)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "21st", "102nd", "113th"),
    ]


@pytest.mark.parametrize(
    ("mark", "meaning"), [("␣", "a space"), ("⏎", "a line break"), ("⇥", "a tab")]
)
def test_a_predicted_mark_is_explained(mark: str, meaning: str) -> None:
    scores = {"target": torch.tensor([3.0, 1.0])}
    found = Explanation(["a", " b"], scores, settings={"target": mark, "contrast": " b"})
    assert f"“{mark}” ({meaning}) rather than “b” comes from “b” in the text (25%)." in str(found)
    assert str(found).startswith(f"Why “{mark}”, and not “b”?")


def test_a_word_that_is_also_the_prediction_is_told_from_it() -> None:
    scores = {"target": torch.tensor([1.0, 3.0, 1.0])}
    found = Explanation(["a", " onions", " of"], scores, settings={"target": " onions"})
    assert "“onions” comes from “onions” in the text (60%) and “of” (20%)." in str(found)
    twice = Explanation(["onions", " onions", " of"], scores, settings={"target": " onions"})
    assert "“onions” comes from the 2nd “onions” (60%) and “of” (20%)." in str(twice)
    asked = {"target": " onions", "contrast": " of"}
    against = Explanation(["a", " onions", " of"], {"target": -scores["target"]}, settings=asked)
    assert "“onions” in the text (60%) and “of” in the text (20%) worked for “of”" in str(against)


def test_long_words_are_shortened() -> None:
    """Such as addresses, which are one word of many tokens."""
    word = " https://" + "x" * 60
    scores = {"target": torch.tensor([1.0, 3.0])}
    found = Explanation(["a", word], scores, settings={"target": word})
    short = "https://" + "x" * 31 + "…"
    assert str(found).startswith(f"Why “{short}”?")
    assert f"“{short}” comes from “{short}” in the text (75%)" in str(found)
    assert max(map(len, str(found).splitlines()[3:])) <= 80
    assert found.shares()[1].text == word


def test_no_word_leads_if_all_are_alike() -> None:
    words = [f" w{n}" for n in range(8)]
    scores = torch.ones(8)
    flat = Explanation(words, {"target": scores}, settings={"target": "!"})
    assert "“!” comes from many words, most from “w1” (12%)" in str(flat)
    scores[3] = 4
    one = Explanation(words, {"target": scores}, settings={"target": "!"})
    assert "“!” comes from “w3” (36%)" in str(one)


def test_other_predictions_are_named(asked: Explanation, tiny_model, tiny_tokenizer) -> None:
    ids = tiny_tokenizer("a b c d e f g h i j", return_tensors="pt").input_ids
    with torch.no_grad():
        chances = tiny_model(ids).logits[0, -1].softmax(-1)
    best = chances.topk(4)
    names = [readable_ids(tiny_tokenizer, [n])[0].strip() for n in best.indices.tolist()]
    expected = zip(names[1:], best.values[1:].tolist(), strict=True)
    others = ", ".join(f"“{name}” {100 * x:.2g}%" for name, x in expected)
    assert asked.settings["other predictions"] == others
    assert f"Other predictions: {others}." in str(asked)
    second = explain(tiny_model, tiny_tokenizer, "a b c d e f g h i j", target=names[1])
    assert second.settings["other predictions"].startswith(f"“{names[0]}” ")
    assert f"“{names[1]}”" not in second.settings["other predictions"]


def test_the_models_own_prediction_is_named_if_another_is_explained(
    asked: Explanation, tiny_model, tiny_tokenizer
) -> None:
    ids = tiny_tokenizer("a b c d e f g h i j", return_tensors="pt").input_ids
    with torch.no_grad():
        chances = tiny_model(ids).logits[0, -1].softmax(-1)
    (first, second) = chances.topk(2).indices.tolist()
    named = readable_ids(tiny_tokenizer, [first])[0].strip()
    said = f"The model itself predicts “{named}” ({100 * chances[first].item():.2g}%)."
    assert said not in str(asked)
    for contrast in (None, first):
        other = explain(
            tiny_model, tiny_tokenizer, "a b c d e f g h i j", target=second, contrast=contrast
        )
        assert sentence(other).startswith(f"{said} “")
        assert said in str(other)


def test_the_sentence_names_only_words_that_have_a_bar() -> None:
    scores = torch.tensor([0.0, *range(20, 8, -1), -3.0])
    words = [f" w{n}" for n in range(len(scores))]
    made = Explanation(words, {"target": scores}, settings={"target": "!"})
    assert "against" not in sentence(made)
    fewer = Explanation(words[5:], {"target": scores[5:]}, settings={"target": "!"})
    assert "against" in sentence(fewer)


def test_an_explanation_that_has_scores_of_one_method_and_the_map_of_another() -> None:
    scores, grid = torch.tensor([1.0, 3.0]), torch.rand(2, 2)
    made = Explanation(["a", "b"], {"ig": scores}, maps={"attention": grid})
    assert [x.percent for x in made.shares()] == ["25%", "75%"]
    assert "“b” (75%)" in str(made)
    assert "b" in made.page()
    only_a_map = Explanation(["a", "b"], {}, maps={"attention": grid})
    assert str(only_a_map) == repr(only_a_map)
    assert "attention" in only_a_map.page()
    with pytest.raises(ValueError, match="method='attention' has no scores here"):
        only_a_map.shares()


def test_an_explanation_that_has_heads_alone() -> None:
    ones = torch.ones(1, 2, 1)
    layer = HeadMaps("l", ones.int() * 0, ones, ones, ones, torch.ones(2), torch.ones(1, 2))
    made = Explanation(["a", "b"], {}, heads=[layer])
    assert str(made) == repr(made)
    with pytest.raises(ValueError, match="known ones: none"):
        made.shares()


def test_no_words_besides_sinks() -> None:
    lines = Explanation(["a", "b"], {"ig": torch.tensor([1.0, 3.0])}, settings={}).summary(0)
    assert "1 more word: 75% together" in lines
