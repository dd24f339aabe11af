"""Layers and single heads on the page."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from captum_cw import ContributionWeights, Explanation
from captum_cw.explanation.heads import HeadMaps
from support.page import (
    LABELS,
    Show,
    choose_cell,
    figures,
    in_both_browsers,
    number,
    percent,
    token,
)

SIGNED = LABELS["contribution-signed"]
TIMES = "\N{MULTIPLICATION SIGN}"


def choose_layer(page: object, layer: int) -> None:
    page.select_option("#layer", str(layer))
    page.locator("#head:enabled").wait_for()


@in_both_browsers
def test_a_cell_of_a_head_shows_its_factors(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    token(page, 8).click()
    choose_layer(page, 1)
    page.select_option("#head", "2")
    layer = of_layers.heads[1]
    shown = re.search(r"2: (\S+) of the layer", page.locator("#head").text_content())[1]
    assert number(shown) == percent(layer.share[2, 8])
    for query, key in ((8, int(layer.keys[2, 8, 0])), (8, int(layer.keys[2, 8, 3]))):
        choose_cell(page, query, key)
        at = layer.keys[2, query].tolist().index(key)
        shown = figures(page)
        for name, x in {
            "attention": layer.attention,
            f"{TIMES} relative norm": layer.relative_norm,
            f"= {SIGNED}": layer.measure("contribution-signed"),
        }.items():
            row = x[2, query]
            # Half a step of the code, and half a digit of two.
            largest, value = float(row.abs().max()), float(row[at])
            error = 0.012 * largest + 0.05 * abs(value)
            assert shown[name] == pytest.approx(value, abs=error), name
        for name, measure in ((LABELS["vw"], "vw"), (LABELS["vwon"], "vwon")):
            row = layer.measure(measure)[2, query]
            error = 0.02 * float(row.max()) + 0.05 * float(row[at])
            assert shown[name] == pytest.approx(float(row[at]), abs=error), name
        factors = [shown[name] for name in list(shown)[:3]]
        assert np.prod(factors) == pytest.approx(shown[f"= {SIGNED}"], rel=0.15)


def test_keys_that_were_not_kept_are_named_as_such(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    choose_layer(page, 0)
    page.select_option("#head", "0")
    layer = of_layers.heads[0]
    missing = sorted(set(range(10)) - set(layer.keys[0, 9].tolist()))[0]
    choose_cell(page, 9, missing)
    text = page.inner_text("#details")
    assert "not among the 4 keys that are kept" in text
    held, made = re.search(r"they have (\S+) of the attention, and made (\S+)\.", text).groups()
    assert number(held) == percent(layer.attention[0, 9].sum())
    assert number(made) == percent(layer.measure("contribution-signed")[0, 9].sum())
    whole = re.search(r"this head made (\S+) here", text)[1]
    assert number(whole) == percent(layer.share[0, 9])


def dense(layer: HeadMaps, name: str) -> torch.Tensor:
    """``(H, T, S)``, zero where a key was not kept."""
    H, T, _ = layer.keys.shape
    return torch.zeros(H, T, T).scatter_add(2, layer.keys.long(), layer.measure(name))


@pytest.mark.parametrize("name", ["contribution", "contribution-signed"])
def test_all_heads_of_a_layer(show: Show, of_layers: Explanation, name: str) -> None:
    """They are a mean over heads, or a sum if the measure has signs."""
    page = show(of_layers, link="numbers=raw")
    page.select_option("#method", label=LABELS[name])
    choose_layer(page, 1)
    assert page.input_value("#head") == ""  # no head was asked for
    heads = dense(of_layers.heads[1], name)
    grid = heads.sum(0) if name == "contribution-signed" else heads.mean(0)
    for query, key in ((9, 0), (9, 9), (4, 2)):
        choose_cell(page, query, key)
        shown = figures(page)[LABELS[name]]
        error = 0.012 * float(heads[:, query].abs().sum(0).max()) + 0.05 * abs(grid[query, key])
        assert shown == pytest.approx(float(grid[query, key]), abs=float(error))


def test_another_layer_keeps_the_head(show: Show, of_layers: Explanation) -> None:
    page = show(of_layers)
    choose_layer(page, 0)
    page.select_option("#head", "3")
    choose_layer(page, 1)
    page.locator("#controls-summary", has_text="layer 1").wait_for()
    assert page.input_value("#head") == "3"
    page.select_option("#layer", "")
    page.locator("#head:disabled").wait_for()
    choose_layer(page, 0)
    assert page.input_value("#head") == ""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_layer_of_a_prediction(show: Show, asked: Explanation, width: int) -> None:
    """Single layers do not have contributions to the prediction, so the measure changes."""
    page = show(asked, width=width)
    choose_layer(page, 1)
    page.locator("#controls-summary", has_text=f"{SIGNED}, by").wait_for()
    assert "layer 1" in page.inner_text("#controls-summary")
    title = page.inner_text("#bars-title")
    assert title == f"The words with the largest scores, by “{SIGNED}”"
    assert "of all scores (all layers and heads)" in page.inner_text("#bars-note")
    page.select_option("#method", label=LABELS["target"])
    page.locator("#head:disabled").wait_for()
    assert page.input_value("#layer") == ""


def head_box(page: object, layer: int, head: int) -> tuple[float, float]:
    """Return the middle of a head in the map of all heads, in the canvas."""
    cell = page.locator("#heads").bounding_box()["width"] / 2
    return (layer + 0.5) * cell, (head + 0.5) * cell


@pytest.mark.parametrize("way", ["mouse", "touch", "keyboard"])
def test_the_map_of_heads_leads_to_a_head(show: Show, asked: Explanation, way: str) -> None:
    effects = torch.stack([layer.effect for layer in asked.heads])
    options = {"has_touch": True, "is_mobile": True} if way == "touch" else {}
    page = show(asked, width=390 if way == "touch" else 1280, **options)
    order = effects.abs().flatten().argsort(descending=True)[:3].tolist()
    shown = re.findall(
        r"layer (\d+), head (\d+), (\S+) towards “(.)”", page.inner_text("#heads-note")
    )
    assert [4 * int(layer) + int(head) for layer, head, _, _ in shown] == order
    shares = effects.flatten() / effects.abs().sum()
    assert [number(x) for _, _, x, _ in shown] == [percent(shares[n].abs()) for n in order]
    assert [x for *_, x in shown] == ["c" if shares[n] > 0 else "x" for n in order]
    heads = page.locator("#heads")
    if way == "keyboard":
        heads.focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
        assert page.inner_text("#status").startswith("layer 1, head 2, ")
        page.keyboard.press("Enter")
    else:
        x, y = head_box(page, 1, 2)
        act = heads.tap if way == "touch" else heads.click
        act(position={"x": x, "y": y})
    page.locator("#controls-summary", has_text="layer 1").wait_for()
    assert (page.input_value("#layer"), page.input_value("#head")) == ("1", "2")
    assert page.locator("#method option:checked").text_content() == SIGNED
    assert page.inner_text("#heads-at").startswith("Shown: layer 1, head 2, ")


def test_no_map_of_heads_without_effects(show: Show, asked: Explanation) -> None:
    bare = [replace(layer, effect=None) for layer in asked.heads]
    assert not show(replace(asked, heads=bare)).locator("#heads-part").is_visible()


def test_heads_without_maps(show: Show, explanation: Explanation) -> None:
    page = show(replace(explanation, scores={}, maps={}), link="numbers=raw")
    assert page.input_value("#layer") == "0"
    page.select_option("#head", "0")
    token(page, 5).hover()
    layer = explanation.heads[0]
    most = float(layer.measure("attention")[0, 5].max())
    assert max(figures(page, "Draws most from").values()) == pytest.approx(most, rel=0.03)


def two_tokens(attention: list[list[float]]) -> Explanation:
    keys = torch.tensor([[[0, 0], [0, 1]]], dtype=torch.int32)
    ones = torch.ones(1, 2, 2)
    weights = torch.tensor([attention])
    layer = HeadMaps("l", keys, weights, ones, ones, torch.ones(2), torch.ones(1, 2))
    return Explanation(["a", "b"], {}, heads=[layer])


def test_attention_that_is_nearly_nothing_is_still_seen(show: Show) -> None:
    page = show(two_tokens([[1.0, 0.0], [1.0, 1e-9]]))
    page.select_option("#head", "0")
    choose_cell(page, 1, 1)
    assert "does not see" not in page.locator("#details").inner_text()
    choose_cell(page, 0, 1)
    assert "does not see" in page.locator("#details").inner_text()


def test_value_weighted_attention_has_no_sign(show: Show) -> None:
    page = show(two_tokens([[1.0, 0.0], [0.5, -0.5]]), link="numbers=raw")
    page.select_option("#head", "0")
    choose_cell(page, 1, 1)
    found = figures(page)
    assert found["attention"] == pytest.approx(-0.5, rel=0.02)
    assert found[LABELS["vwon"]] == pytest.approx(0.5, rel=0.02)


def test_dense_maps_offer_no_vw_of_heads(show: Show, tiny_model, tiny_tokenizer) -> None:
    ids = tiny_tokenizer("a b c d e f", return_tensors="pt").input_ids
    layers = ContributionWeights(tiny_model).decompose(ids)
    page = show(Explanation.from_maps(["a", "b", "c", "d", "e", "f"], layers))
    assert LABELS["vw"] not in page.locator("#method option").all_text_contents()
    choose_layer(page, 1)
