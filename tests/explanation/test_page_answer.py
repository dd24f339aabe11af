"""The answer that the page opens with: question, sentence, bars, attention beside contributions."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from captum_cw import Explanation, explain
from captum_cw.explanation.answer import sentence, verdict
from captum_cw.explanation.shares import in_percent
from support.inputs import letter_tokenizer
from support.page import (
    ABOUT,
    LABELS,
    Show,
    backgrounds,
    bars,
    choose_cell,
    darkness,
    figures,
    in_both_browsers,
    is_selected,
    number,
    percent,
    rounded,
    token,
)


@in_both_browsers
def test_a_target_is_asked_for_and_explained_first(show: Show, asked: Explanation) -> None:
    page = show(asked)
    assert page.inner_text("#title") == "Why “c”, and not “x”?"
    assert page.title() == "Why “c”, and not “x”?"
    assert page.inner_text("#answer") == verdict(asked)
    for name in ("target", "contrast"):
        probability = in_percent(float(asked.settings[f"{name} probability"]))
        assert probability in page.inner_text("#answer")
    assert page.inner_text("#sentence") == sentence(asked)
    assert page.locator("#method option:checked").inner_text() == LABELS["target"]
    assert page.locator("#method option").nth(1).inner_text() == LABELS["input"]
    assert page.inner_text("#about").startswith(ABOUT["target"])
    assert page.input_value("#scale") == "map"


def test_the_own_prediction_is_asked_for_too(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    predicted = explanation.predicted[-1].strip()
    assert page.inner_text("#title") == f"Why “{predicted}”?"
    answer = page.inner_text("#answer")
    said = (
        f"“{predicted}” has a probability of only {in_percent(float(explanation.probability[-1]))}."
    )
    assert said in answer


@in_both_browsers
def test_the_prompt_has_the_colours_of_the_text(show: Show, of_words: Explanation) -> None:
    page = show(of_words)
    words = [x.strip() for x in of_words.by_word().tokens]
    assert page.inner_text("#prompt").startswith(" ".join(words) + " c")
    assert backgrounds(page, "#prompt span") == backgrounds(page)
    page.select_option("#unit", "token")
    assert page.locator("#prompt span").count() == 16


def test_an_answer_that_the_model_does_not_prefer_is_marked(show: Show, asked: Explanation) -> None:
    assert "model's prediction" in asked.settings
    page = show(asked)
    assert page.inner_text("#prompt").endswith("j c not the model's choice")
    assert page.inner_text("#answer").startswith("The model is not sure: it prefers ")
    own = {k: v for k, v in asked.settings.items() if k != "model's prediction"}
    assert show(replace(asked, settings=own)).inner_text("#prompt").endswith("j c")


def test_a_long_prompt_shows_its_end_and_the_words_of_the_bars(show: Show) -> None:
    words = [f" word{n}" for n in range(100)]
    scores = torch.full((100,), 0.01)
    scores[[0, 30, 31, 60, 97]] = torch.tensor([9.0, 5.0, 1.0, -3.0, 2.0])
    settings = {"target": " end", "target position": 99}
    explained = Explanation(words, {"target": scores}, settings=settings, predicted=words)
    shown = show(explained).inner_text("#prompt")
    parts = [part.split() for part in shown.split("…")]
    # Of the words with equal scores, bars show the first.
    places = [[*range(8)], [*range(29, 33)], [*range(59, 62)]]
    assert [[int(x[4:]) for x in part] for part in parts[:3]] == places
    assert parts[3][-3:] == ["word98", "word99", "end"]
    assert len(shown) < 260
    assert "…" not in show(explained.part(80, 100)).inner_text("#prompt")


def test_sinks_are_grey_and_do_not_set_the_scale(show: Show, of_words: Explanation) -> None:
    scores = of_words.scores["target"].clone()
    scores[:2] = 100  # the first word
    page = show(replace(of_words, scores={**of_words.scores, "target": scores}))
    colours = backgrounds(page)
    red, green, blue = map(int, re.findall(r"\d+", colours[0]))
    assert max(red, green, blue) - min(red, green, blue) <= 2
    bar = page.locator("#bars .sink-row .track i").evaluate("x => x.style.backgroundColor")
    assert bar == backgrounds(page, "#prompt span")[0] == colours[0]
    others = of_words.by_word().scores["target"][1:].abs()
    dark = [darkness(x) for x in colours[1:]]
    assert max(range(len(dark)), key=dark.__getitem__) == int(others.argmax())
    assert max(dark) > 300
    assert "attention sink" in page.inner_text("#legend")
    page.check("#sinks")
    assert backgrounds(page)[0] == ""
    assert "attention sink" not in page.inner_text("#legend")


def test_other_explanations_ask_nothing(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    assert page.inner_text("#title") == "Which tokens each token draws from"
    assert not page.locator("#answer").is_visible()
    title = f"The words with the largest scores, by “{LABELS['contribution']}”"
    assert page.inner_text("#bars-title") == title
    assert "Over all positions" in page.inner_text("#compare-at")


@in_both_browsers
def test_bars_are_the_shares_of_words(show: Show, of_words: Explanation) -> None:
    page = show(of_words)
    words = of_words.by_word()
    scores = words.scores["target"]
    shares = scores / scores.abs().sum()
    shown = bars(page)
    order = [0, *(1 + shares[1:].abs().argsort(descending=True)[:10]).tolist()]
    assert [x["word"] for x in shown] == [words.tokens[n].strip() for n in order]
    assert [number(x["value"]) for x in shown] == [percent(shares[n]) for n in order]
    assert [x["sink"] for x in shown] == [n == 0 for n in order]
    note = page.inner_text("#bars-note")
    assert f"{len(scores) - 11} more words: " in note
    left = 1 - shares[order].abs().sum()
    assert number(note.split("words: ")[1].split(". ")[0]) == percent(left)
    assert "The bars do not add up to the prediction" in note


def test_the_details_of_a_sink_say_what_it_is(show: Show, of_words: Explanation) -> None:
    page = show(of_words)
    page.locator("#bars button").nth(0).click()
    assert "An attention sink: many heads attend to it" in page.inner_text("#details")
    page.locator("#bars button").nth(1).click()
    assert "sink" not in page.inner_text("#details")


def test_bars_have_a_side_and_a_length(show: Show, of_words: Explanation) -> None:
    page = show(of_words)
    assert page.locator("#bars-ends span").all_inner_texts() == ["← towards “x”", "towards “c” →"]
    shown = bars(page)
    values = torch.tensor([number(x["value"]) for x in shown])
    lengths = torch.tensor([x["width"] for x in shown])
    assert (values < 0).any()
    longest = values.abs().max()
    assert torch.allclose(lengths, values.abs() / longest / 2, atol=0.03)
    for x, value in zip(shown, values, strict=True):
        edge = x["start"] + (x["width"] if value < 0 else 0)
        assert edge == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("way", ["mouse", "touch", "keyboard"])
def test_a_bar_leads_to_its_word(show: Show, of_words: Explanation, way: str) -> None:
    options = {"has_touch": True, "is_mobile": True} if way == "touch" else {}
    page = show(of_words, width=390 if way == "touch" else 1280, **options)
    words = of_words.by_word()
    button = page.locator("#bars button").nth(2)
    name = button.locator("bdi").inner_text()
    if way == "mouse":
        button.click()
    elif way == "touch":
        button.tap()
    else:
        button.focus()
        page.keyboard.press("Enter")
    place = [x.strip() for x in words.tokens].index(name)
    assert is_selected(page, place)
    assert token(page, place).evaluate("x => x === document.activeElement")
    box = token(page, place).bounding_box()
    assert 0 <= box["y"] <= 900 - box["height"]
    assert page.inner_text("#status").startswith(f"“{name}” ({place}).")


def test_one_word_more_is_not_called_words(show: Show) -> None:
    scores = torch.arange(12.0) + 1
    page = show(Explanation([f" w{n}" for n in range(12)], {"m": scores}))
    assert "1 more token: " in page.inner_text("#bars-note")
    assert f"{rounded(200 / 78, 2):g}%" in page.inner_text("#bars-note")


def raw_or_percent(scores: Tensor, unit: str) -> Tensor:
    return scores if unit == "raw" else scores / scores.abs().sum()


def test_numbers_in_percent_and_raw(show: Show, of_words: Explanation) -> None:
    page = show(of_words)
    words = of_words.by_word()
    token(page, 2).click()
    for unit in ("raw", "percent"):
        page.select_option("#numbers", unit)
        for name, scores in words.scores.items():
            expected = float(raw_or_percent(scores, unit)[2])
            shown = figures(page, "Score" if unit == "raw" else "Share")[LABELS[name]]
            assert shown == (percent(expected) if unit == "percent" else rounded(expected)), name
    page.select_option("#numbers", "raw")
    first = float(words.scores["target"][0])
    assert number(bars(page)[0]["value"]) == rounded(first)
    assert "Numbers are in the unit of the target" in page.inner_text("#bars-note")


@in_both_browsers
def test_words_are_those_of_the_explanation(show: Show, of_words: Explanation) -> None:
    page = show(of_words, link="numbers=raw")
    words = of_words.by_word()
    texts = page.locator("#tokens .token").all_inner_texts()
    assert texts == [x.strip() for x in words.tokens]
    choose_cell(page, 11, 2)
    shown = figures(page)
    for name, x in words.maps.items():
        error = 0.005 * abs(x[11, 2]) + x.abs().max() / 30000
        assert abs(shown[LABELS[name]] - x[11, 2]) <= error, name
    page.select_option("#unit", "token")
    texts = page.locator("#tokens .token").all_inner_texts()
    assert texts == [x.strip() for x in of_words.tokens]
    # The selection stays at the first token of what was selected.
    assert page.inner_text("#details h2") == "Query “n” (13), key “d” (3)"
    page.keyboard.press("Escape")
    token(page, 3).click()
    assert figures(page, "Score")[LABELS["target"]] == rounded(of_words.scores["target"][3])
    page.select_option("#unit", "word")
    assert is_selected(page, 2)


def test_no_choice_of_words_without_words(show: Show, of_words: Explanation) -> None:
    page = show(replace(of_words, words=None))
    assert not page.locator("#unit").is_visible()
    assert page.locator("#tokens .token").count() == 16
    assert page.inner_text("#bars-title") == "The tokens behind “c” and “x”"


def test_measures_of_less_use_stand_apart(show: Show, explanation: Explanation) -> None:
    page = show(explanation)
    more = page.locator("#method optgroup[label=more] option").all_inner_texts()
    assert more == [LABELS["vw"], LABELS["vwon"]]
    before = page.locator("#method > option").count()
    assert before + len(more) == len(explanation.scores)


def compared(page: object) -> dict[str, dict[str, float]]:
    """Return the words and percents that stand below each strip."""
    found = {}
    for name in ("attention", "contribution"):
        text = page.inner_text(f"#compare-{name} p")
        parts = [part.rsplit(" ", 1) for part in text.split(", ")]
        found[name] = {word: number(value) for word, value in parts}
    return found


def expected_comparison(explanation: Explanation, query: int) -> dict[str, dict[str, object]]:
    found = {}
    for name in ("attention", "contribution"):
        row = explanation.maps[name][query]
        top = (row / row.sum()).topk(3)
        words = [f"“{explanation.tokens[n].strip()}”" for n in top.indices]
        found[name] = dict(zip(words, map(percent, top.values), strict=True))
    return found


@in_both_browsers
def test_attention_stands_beside_contributions(show: Show, of_words: Explanation) -> None:
    words = of_words.by_word()
    given = replace(words, settings={**of_words.settings, "target position": 12})
    page = show(given)
    assert page.inner_text("#compare-at").startswith("At “p”")
    # Attention stands beside the answer, whose numbers are those of the bars.
    assert page.inner_text("#compare-contribution h3").endswith("towards “c” and towards “x”")
    scores = words.scores["target"] / words.scores["target"].abs().sum()
    top = scores.abs().topk(3).indices.tolist()
    answer = {f"“{words.tokens[n].strip()}”": percent(scores[n]) for n in top}
    expected = {**expected_comparison(words, 12), "contribution": answer}
    assert compared(page) == expected
    strip = "#compare-contribution .strip span"
    assert backgrounds(page, strip) == backgrounds(page)
    token(page, 7).hover()
    page.locator("#compare-at", has_text="At “j”").wait_for()
    assert "not about the prediction" in page.inner_text("#compare-at")
    assert page.inner_text("#compare-contribution h3").endswith("what makes the outputs of layers")
    assert compared(page) == expected_comparison(words, 7)
    token(page, 9).click()
    page.mouse.move(5, 5)
    page.locator("#compare-at", has_text="At “l”").wait_for()
    assert compared(page) == expected_comparison(words, 9)
    dark = [darkness(x) for x in backgrounds(page, "#compare-attention .strip span")]
    row = words.maps["attention"][9]
    assert max(range(13), key=dark.__getitem__) == int(row.argmax())


def test_the_comparison_can_ignore_the_sink(show: Show, of_words: Explanation) -> None:
    words = of_words.by_word()
    attention = words.maps["attention"].clone()
    attention[:, 0] = 1
    settings = {**of_words.settings, "target position": 12}
    page = show(replace(words, maps={**words.maps, "attention": attention}, settings=settings))
    strip = "#compare-attention .strip span"
    page.locator("#compare-at", has_text="At “p”").wait_for()
    before = backgrounds(page, strip)
    page.check("#sinks")
    after = backgrounds(page, strip)
    assert after[0] == "" != before[0]
    dark = [darkness(x) for x in after[1:]]
    assert max(range(12), key=dark.__getitem__) == int(attention[12, 1:].argmax())
    assert max(dark) > max(darkness(x) for x in before[1:])
    assert "“a”" not in page.inner_text("#compare-attention p")


def test_a_classifier_asks_for_no_query(show: Show) -> None:
    torch.manual_seed(3)
    tokenizer = letter_tokenizer("slow but good")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        id2label={0: "bad", 1: "fine"},
        label2id={"bad": 0, "fine": 1},
    )
    model = transformers.BertForSequenceClassification(config).eval()
    found = explain(model, tokenizer, "slow but good", target="fine")
    page = show(found)
    assert page.inner_text("#title") == "Why “fine”?"
    assert "Over all positions" in page.inner_text("#compare-at")
    assert page.locator("#tokens .asked").count() == 0
    assert "Select a " in page.inner_text("#details")
    for name in ("attention", "contribution"):
        scores = found.scores["target" if name == "contribution" else name]
        shown = compared(page)[name]
        best = float(scores.abs().max() / scores.abs().sum())
        assert max(map(abs, shown.values())) == percent(best)
