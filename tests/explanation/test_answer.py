"""The answer in words: the question, how sure the model is, the sentence, and the summary."""

import pytest
import torch

from captum_cw import Explanation, explain
from captum_cw.explanation import shares
from captum_cw.explanation.answer import sentence, verdict
from captum_cw.explanation.heads import HeadMaps
from captum_cw.explanation.shares import in_percent
from captum_cw.text.tokens import readable_ids

LETTERS = "a b c d e f g h i j"


@pytest.fixture
def own(tiny_model, tiny_tokenizer) -> Explanation:
    """An explanation of the model's own prediction."""
    return explain(tiny_model, tiny_tokenizer, LETTERS)


def made(**settings: object) -> Explanation:
    scores = {"target": torch.tensor([4.0, 3.0, -1.0, 2.0])}
    return Explanation(["The", " capital", " of", " Italy"], scores, settings=settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"target": " Rome"},
            "“Rome” comes from “capital” (30%) and “Italy” (20%). “of” (10%) worked against it. "
            "40% came by way of the first token “The”. It is an attention sink, so this part says "
            "little about the word.",
        ),
        (
            {"target": " Rome", "contrast": " Paris"},
            "“Rome” rather than “Paris” comes from “capital” (30%) and “Italy” (20%). “of” (10%) "
            "worked for “Paris”. 40% came by way of the first token “The”. It is an attention sink",
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
    assert "75% of the answer worked against it by way of the first token “The”. It is" in found
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


def test_the_verdict_says_how_sure_the_model_is(own: Explanation) -> None:
    probability = float(own.settings["target probability"])
    asked, said = str(own).splitlines()[:2]
    name = own.settings["target"].strip()
    assert asked == f"Why “{name}”?"
    assert said == verdict(own)
    assert f"“{name}” has a probability of only {in_percent(probability)}." in said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target probability": "0.7"}, "“a” has a probability of 70%."),
        ({"target probability": "0.9996"}, "“a” has a probability of 100%."),
        (
            {"target probability": "0.7", "contrast": "b", "contrast probability": "0.0123"},
            "“a” has a probability of 70%, and “b” of 1.2%.",
        ),
        (
            {"target probability": "0.19", "best other probability": "0.01"},
            "The model is not sure: “a” has a probability of only 19%.",
        ),
        (
            {"target probability": "0.4", "best other probability": "0.31"},
            "The model is not sure: “a” has a probability of 40%.",
        ),
        (
            {"target probability": "0.4", "best other probability": "0.29"},
            "“a” has a probability of 40%.",
        ),
        (
            {
                "target probability": "0.1",
                "contrast": "␣",
                "contrast probability": "0.08",
                "model's prediction": "“c” (50%)",
                "best other probability": "0.5",
                "other predictions": "“d” 3%",
            },
            "The model prefers “c” (50%) to “a” (10%) and “␣” (a space) (8%). "
            "Other predictions: “d” 3%.",
        ),
        (
            {
                "target probability": "0.1",
                "contrast": " b",
                "contrast probability": "0.8",
                "model's prediction": "“b” (80%)",
                "best other probability": "0.8",
            },
            "The model prefers “b” (80%) to “a” (10%).",
        ),
        (
            {"target probability": "0.12", "contrast": "b", "contrast probability": "0.02"},
            "“a” has a probability of only 12%, and “b” of 2%.",
        ),
        (
            {"target probability": "0.12", "contrast": "b", "contrast probability": "0.1"},
            "The model is not sure: “a” has a probability of only 12%, and “b” of 10%.",
        ),
        (
            {
                "target probability": "0.16",
                "model's prediction": "“b” (18%)",
                "best other probability": "0.18",
            },
            "The model is not sure: it prefers “b” (18%) to “a” (16%).",
        ),
        ({"target value": "1.5"}, "The logit of “a” is 1.5."),
        (
            {"target value": "-1.5", "contrast": "b"},
            "The logits of “a” and “b” differ by -1.5.",
        ),
        ({}, None),
    ],
)
def test_verdicts(settings: dict[str, str], expected: str | None) -> None:
    explained = Explanation(["x"], {}, settings={"target": " a", **settings})
    assert verdict(explained) == expected


def test_no_verdict_without_a_question() -> None:
    assert verdict(Explanation(["x"], {}, settings={"target value": "1"})) is None


def test_a_sink_is_told_of_by_its_size() -> None:
    """First if it is more than all words, last if it is less, and not at all if it is little."""
    words, settings = ["The", " sea", " is"], {"target": " blue", "contrast": " red"}
    sink = (
        "by way of the first token “The”. It is an attention sink, so this part says little about "
        "the word."
    )
    large = {"target": torch.tensor([6.0, 3.0, -1.0])}
    assert sentence(Explanation(words, large, settings=settings)) == (
        f"60% of the answer came {sink} Among the words, “sea” (30%) did most for “blue” rather "
        "than “red”. “is” (10%) worked for “red”."
    )
    against = {"target": torch.tensor([-6.0, 3.0, -1.0])}
    assert sentence(Explanation(words, against, settings=settings)).startswith(
        f"60% of the answer worked for “red” {sink} Among the words, “sea” (30%)"
    )
    less = {"target": torch.tensor([4.0, 5.0, -1.0])}
    assert sentence(Explanation(words, less, settings=settings)) == (
        "“blue” rather than “red” comes from “sea” (50%). “is” (10%) worked for “red”. "
        f"40% came {sink}"
    )
    little = {"target": torch.tensor([0.4, 9.0, -0.6])}
    assert sentence(Explanation(words, little, settings=settings)) == (
        "“blue” rather than “red” comes from “sea” (90%). “is” (6%) worked for “red”."
    )
    alone = {"target": torch.tensor([6.0, 0.0, -1.0])}
    assert "comes from no single word" in sentence(Explanation(words, alone, settings=settings))


def test_words_that_occur_again_are_told_apart() -> None:
    scores = {"target": torch.tensor([1.0, -2.0, 3.0, 4.0])}
    found = Explanation(["a", " The", " b", " the"], scores, settings={"target": "!"})
    assert [x.label for x in found.shares()] == ["a", "The (1st)", "b", "the (2nd)"]
    assert "“!” comes from the 2nd “the” (40%) and “b” (30%)." in str(found)
    assert "The 1st “The” (20%) worked against it." in str(found)
    assert [shares.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 21, 102, 113)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "21st", "102nd", "113th"),
    ]


@pytest.mark.parametrize(
    ("mark", "meaning"),
    [("␣", "a space"), ("⏎", "a line break"), ("⇥", "a tab"), ('"', "a quotation mark")],
)
def test_a_predicted_mark_is_explained(mark: str, meaning: str) -> None:
    scores = {"target": torch.tensor([1.0, 3.0])}
    found = Explanation(["a", " b"], scores, settings={"target": mark, "contrast": " b"})
    assert f"“{mark}” ({meaning}) rather than “b” comes from “b” in the text (75%)." in str(found)
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


def test_other_predictions_are_named(own: Explanation, tiny_model, tiny_tokenizer) -> None:
    ids = tiny_tokenizer(LETTERS, return_tensors="pt").input_ids
    with torch.no_grad():
        chances = tiny_model(ids).logits[0, -1].softmax(-1)
    best = chances.topk(4)
    names = [readable_ids(tiny_tokenizer, [n])[0].strip() for n in best.indices.tolist()]
    expected = zip(names[1:], best.values[1:].tolist(), strict=True)
    others = ", ".join(f"“{name}” {100 * x:.2g}%" for name, x in expected)
    assert own.settings["other predictions"] == others
    assert f"Other predictions: {others}." in str(own)
    second = explain(tiny_model, tiny_tokenizer, LETTERS, target=names[1])
    left = second.settings["other predictions"]
    assert left.startswith(f"“{names[2]}” ")  # the verdict names the first
    assert f"“{names[0]}”" not in left
    assert f"“{names[1]}”" not in left


def test_the_models_own_prediction_is_named_if_another_is_explained(
    own: Explanation, tiny_model, tiny_tokenizer
) -> None:
    ids = tiny_tokenizer(LETTERS, return_tensors="pt").input_ids
    with torch.no_grad():
        chances = tiny_model(ids).logits[0, -1].softmax(-1)
    (first, second) = chances.topk(2).indices.tolist()
    (best, lesser) = (
        f"“{readable_ids(tiny_tokenizer, [n])[0].strip()}” ({in_percent(chances[n].item())})"
        for n in (first, second)
    )
    said = f"The model is not sure: it prefers {best} to {lesser}."
    assert "prefers" not in str(own)
    assert float(own.settings["best other probability"]) == pytest.approx(
        chances[second].item(), rel=1e-3
    )
    for contrast in (None, first):
        other = explain(tiny_model, tiny_tokenizer, LETTERS, target=second, contrast=contrast)
        assert verdict(other).startswith(said)
        assert said in str(other)
        assert str(other).count(best) == 1
        assert float(other.settings["best other probability"]) == pytest.approx(
            chances[first].item(), rel=1e-3
        )


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
