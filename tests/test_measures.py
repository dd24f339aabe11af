"""A measure that joins the registry is found everywhere that reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_cw import ComprehensivenessSufficiency, explain, functional, measures, remove_tokens
from captum_cw._utils.colours import AGAINST, TOWARDS
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.cli import main
from captum_cw.cli.parsing import parser
from captum_cw.explanation.page import explanation_page
from captum_cw.metrics.identity import described
from support.colours import difference, of_hex
from support.inputs import token_ids
from support.models import llama


def squared(layer: functional.AttentionLayer) -> functional.Block:
    return lambda weights, rows: weights.square()


class SquaredAttention(AttentionAttribution):
    """The square of the attention weights."""

    name = "squared"
    measure = staticmethod(squared)


@pytest.fixture
def toy() -> Iterator[measures.Entry]:
    entry = measures.Entry(
        "squared", SquaredAttention, label="Squared attention", about="Attention by itself, twice."
    )
    measures.register(entry)
    yield entry
    measures.unregister("squared")


def test_entries_give_the_classes_of_their_names() -> None:
    for entry in measures.entries():
        assert entry.attribution().name == entry.name
    with pytest.raises(TypeError, match="'cosine' has no class"):
        measures.find("cosine").attribution()  # type: ignore[union-attr]


def test_colour_blind_readers_tell_curves_from_each_other_and_from_signs() -> None:
    known = {entry.colour for entry in measures.entries(targets=True) if entry.colour}
    colours = [TOWARDS, AGAINST, *map(of_hex, known | set(measures.OTHER_COLOURS))]
    assert len(colours) == 10
    for first, second in itertools.combinations(colours, 2):
        assert difference(first, second) > 24, (first, second)


def test_a_name_is_registered_once(toy: measures.Entry) -> None:
    with pytest.raises(ValueError, match="name='squared' is taken"):
        measures.register(toy)
    with pytest.raises(ValueError, match="name='random' is taken"):
        measures.register(measures.Entry("random", SquaredAttention, "", ""))


def test_a_new_measure_is_on_the_command_line(
    toy: measures.Entry, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, capsys: Any
) -> None:
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    command = ["attribute", "--model", str(tmp_path), "--text", "a b c", "--method", "squared"]
    assert main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    ids = tiny_tokenizer("a b c", return_tensors="pt").input_ids
    maps = SquaredAttention(tiny_model).attribute(ids)
    sees = torch.ones(3, 3).tril().sum(0)
    expected = torch.stack([x[0].mean(0).sum(0) / sees for x in maps]).mean(0)
    assert torch.allclose(torch.tensor(scores), expected, atol=1e-6)
    evaluate = parser().parse_args(
        ["evaluate", "--model", "M", "--out", "o", "--methods", "squared,contribution"]
    )
    assert evaluate.methods == ["squared", "contribution"]


def test_a_new_measure_is_in_removal_and_the_metric(toy: measures.Entry) -> None:
    model, ids = llama(), token_ids()
    metric = ComprehensivenessSufficiency(model, [0.5])
    methods = {"by name": "squared", "by class": SquaredAttention(model), "other": "contribution"}
    result = metric.evaluate(methods, ids, show_progress=False)
    found = result.deltas("by name", "sufficiency")
    assert torch.equal(found, result.deltas("by class", "sufficiency"))
    assert not torch.equal(found, result.deltas("other", "sufficiency"))
    with remove_tokens(model, "squared", 0.5), torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_a_new_measure_is_explained_and_on_the_page(
    toy: measures.Entry, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    found = explain(tiny_model, tiny_tokenizer, "a b c d")
    maps = SquaredAttention(tiny_model).attribute(
        tiny_tokenizer("a b c d", return_tensors="pt").input_ids
    )
    expected = torch.stack([x[0].mean(0) for x in maps]).mean(0)
    assert torch.allclose(found.maps["squared"], expected, atol=1e-6)
    page = explanation_page(found)
    assert '"label":"Squared attention"' in page
    assert "Attention by itself, twice." in page


def test_an_unknown_name_is_refused_everywhere_after_it_has_left(toy: measures.Entry) -> None:
    measures.unregister("squared")
    try:
        with pytest.raises(ValueError, match="'squared' is unknown"):
            ComprehensivenessSufficiency(llama(), [0.5]).evaluate({"x": "squared"}, token_ids())
    finally:
        measures.register(toy)


def power(exponent: float) -> functional.Measure:
    return lambda layer: lambda weights, rows: weights**exponent


def test_records_tell_apart_what_one_name_computed(tmp_path: Path) -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5])
    path = tmp_path / "run.records"
    for exponent in (1.0, 2.0):
        measures.register(measures.Entry("mine", power(exponent), "Mine", "A power.", control=True))
        try:
            if exponent == 1:
                metric.evaluate({"x": "mine"}, token_ids(), resume_from=path, show_progress=False)
            else:
                with pytest.raises(ValueError, match="is of another run"):
                    metric.evaluate({"x": "mine"}, token_ids(), resume_from=path)
        finally:
            measures.unregister("mine")


def test_a_registered_measure_is_identified_by_what_it_computes() -> None:
    found = set()
    for source in ("captum_cw.attr:VWAttention", "captum_cw.attr:AttentionWeights"):
        measures.register(measures.Entry("mine", source, "Mine", "A measure by another name."))
        found.add(described("mine"))
        measures.unregister("mine")
    assert len(found) == 2
    assert described("vw") == "vw"


def test_the_name_of_a_measure_of_whole_tokens_is_refused_with_the_way_out() -> None:
    measures.register(measures.Entry("alti", "captum_cw.attr:ALTIWeights", "ALTI", "Nearness."))
    try:
        with (
            pytest.raises(ValueError, match="scores whole tokens.* give the measure itself"),
            remove_tokens(llama(), "alti", 0.5),
        ):
            pass
    finally:
        measures.unregister("alti")
