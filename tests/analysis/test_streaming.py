"""Texts through a model layer by layer, uniform samples of what goes by, results on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from captum_cw import AttentionWeights
from captum_cw.analysis import AnalysisResult, first_token_weight
from captum_cw.analysis.streaming import Reservoir, SeenLayer, check_causal, run_texts, texts_of
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import AttentionLayer, QueryMask, attention, dense_map
from support.inputs import token_ids
from support.models import SIZES, build, gpt2, llama, mistral, with_virtual_tokens
from support.reference import eager_layers

# ---------------------------------------------------------------------------------------------
# Texts


def test_texts_lose_their_padding_on_either_side() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    padded = {"input_ids": ids, "attention_mask": mask}
    expected = [[5, 6], [7, 8, 9]]
    for batches in (padded, [padded], [torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9]])]):
        assert [text.tolist() for text in texts_of(batches)] == expected
    # Without a mask nothing is padding.
    assert [len(text) for text in texts_of({"input_ids": ids})] == [4, 4]
    assert [len(text) for text in texts_of(ids)] == [4, 4]


def test_texts_come_from_tokenizers_and_loaders(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.pad_token = "?"
    encoded = tiny_tokenizer(["a b c", "a b"], return_tensors="pt", padding=True)
    assert [text.tolist() for text in texts_of(encoded)] == [[1, 2, 3], [1, 2]]
    loader: Any = DataLoader([torch.tensor([1, 2, 3])] * 3, batch_size=2)
    assert [len(text) for text in texts_of(loader)] == [3, 3, 3]
    once = (token_ids(1, T) for T in (4, 5))
    assert [len(text) for text in texts_of(once)] == [4, 5]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (torch.rand(2, 3), TypeError, "token ids"),
        (torch.tensor([1, 2, 3]), TypeError, "token ids"),
        ("a text", TypeError, "type str"),
        ([[1, 2, 3]], TypeError, "type list"),
        ({"attention_mask": torch.ones(1, 3)}, TypeError, "input_ids"),
        ([], ValueError, "batches is empty"),
        ((token_ids(), token_ids()), TypeError, "The batches are a tuple of 2"),
        (torch.ones(2, 1, dtype=torch.long), ValueError, "Text 0 has 1 tokens.* 2 or more"),
        (
            {"input_ids": token_ids(1, 3), "attention_mask": torch.ones(1, 4)},
            ValueError,
            r"\(1, 4\).*\(1, 3\)",
        ),
    ],
)
def test_inputs_that_are_not_text_are_refused(
    batches: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        texts_of(batches)


# ---------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("make", [llama, gpt2, mistral])
def test_layers_come_text_by_text_in_order(make: Any) -> None:
    model = make()
    texts = [token_ids(1, T, seed=T)[0] for T in (9, 4, 6)]
    came: list[tuple[int, int, str]] = []

    def on_layer(seen: SeenLayer) -> None:
        came.append((seen.text, seen.number, seen.name))
        ids = texts[seen.text]
        assert len(ids) == seen.T
        expected = eager_layers(model, input_ids=ids[None])[seen.number].attention
        assert torch.allclose(dense_map(seen.layer, attention), expected, atol=1e-5)

    names = run_texts(model, texts, on_layer)
    assert names == AttentionWeights(model).layers
    assert came == [(text, n, name) for text in range(3) for n, name in enumerate(names)]


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="since transformers 5.5")
def test_no_layer_comes_twice_where_a_model_leaves_queries_out() -> None:
    """Gemma 4, asked for its last logits alone, runs its last layers on the last token alone."""
    from support import architectures  # builds models that transformers has since 5.0

    model = architectures.build("gemma4_text")
    texts = [token_ids(1, T, seed=T)[0] + architectures.RESERVED - 3 for T in (9, 4, 6)]
    texts = [text.clamp(max=63) for text in texts]
    came: list[tuple[int, int, int]] = []
    run_texts(model, texts, lambda seen: came.append((seen.text, seen.number, seen.T)))
    assert came == [(n, layer, T) for n, T in enumerate((9, 4, 6)) for layer in range(4)]


def test_bidirectional_layers_are_refused_where_a_model_has_to_be_causal() -> None:
    config = transformers.BertConfig(**{**SIZES, "bos_token_id": None, "eos_token_id": None})
    model = build(transformers.BertModel, config)
    texts = [token_ids(1, 5)[0]]
    with pytest.raises(ValueError, match="is bidirectional"):
        run_texts(model, texts, lambda seen: None)
    came: list[int] = []
    run_texts(model, texts, lambda seen: came.append(seen.number), causal=False)
    assert came == [0, 1]


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (QueryMask(3, 3, causal=True), True),
        (QueryMask(3, 3, visible=torch.ones(3, 3).tril().bool()[None, None]), True),
        (QueryMask(3, 3), False),
        (QueryMask(3, 3, visible=torch.ones(1, 1, 1, 3).bool()), False),
        (QueryMask(3, 3, visible=torch.eye(3).flip(0).bool()[None, None]), False),
    ],
)
def test_a_layer_is_causal_if_its_first_query_sees_itself_alone(
    mask: QueryMask, causal: bool
) -> None:
    tensors = torch.rand(1, 1, 3, 3), torch.rand(1, 1, 3, 2), torch.rand(1, 2, 4)
    layer = AttentionLayer.from_tensors(*tensors, mask)
    if causal:
        check_causal("a", layer)
    else:
        with pytest.raises(ValueError, match="'a' is bidirectional"):
            check_causal("a", layer)


def test_outputs_that_vanish_are_counted_once_for_all_texts() -> None:
    model = llama()
    texts = texts_of(token_ids(2, 5))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    with pytest.warns(UserWarning, match="10 attention outputs are zero") as told:
        run_texts(model, texts, lambda seen: None)
    assert len(told) == 1


def test_a_wrapped_model_runs_as_what_is_wrapped() -> None:
    model = llama()
    wrapped = nn.DataParallel(model)
    found = [first_token_weight(m, token_ids()).numbers for m in (model, wrapped)]
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------
# Samples


def sampled(
    size: int, seed: int, chunks: list[int], *, looking: bool = False
) -> np.ndarray[Any, Any]:
    sample = Reservoir(size, seed)
    start = 0
    for count in chunks:
        rows = np.arange(start, start + count)
        sample.add(rows[sample.draw(count)])
        start += count
        if looking:
            assert len(sample.rows) == min(size, start)
    return sample.rows


@pytest.mark.parametrize(
    ("chunks", "looking"),
    [([10] * 6, False), ([60], False), ([1, 0, 40, 2, 17], False), ([20, 20, 20], True)],
)
def test_every_row_is_as_likely_in_a_sample(chunks: list[int], looking: bool) -> None:
    n, size, runs = 60, 6, 1000
    counts = np.zeros(n)
    pairs = 0
    for seed in range(runs):
        found = sampled(size, seed, chunks, looking=looking)
        assert len(found) == size
        assert (np.diff(found) > 0).all()
        counts[found] += 1
        pairs += int({1, 2} <= set(found.tolist())) + int({1, 50} <= set(found.tolist()))
    expected = runs * size / n
    # Rows of one sample exclude each other, so the sum has n - 1 degrees of freedom.
    statistic = ((counts - expected) ** 2).sum() / expected * (n - 1) / (n - size)
    assert 0.001 < scipy.stats.chi2.sf(statistic, n - 1) < 0.999
    likely = 2 * runs * size * (size - 1) / (n * (n - 1))
    assert abs(pairs - likely) < 4 * math.sqrt(likely)


def test_a_stream_that_fits_is_kept_whole() -> None:
    for size in (60, 100):
        assert sampled(size, 0, [7, 0, 50, 3]).tolist() == list(range(60))


def test_most_of_a_long_stream_is_not_even_drawn() -> None:
    sample, drawn = Reservoir(10, seed=0), 0
    for start in range(0, 100_000, 1000):
        rows = np.arange(start, start + 1000)[sample.draw(1000)]
        drawn += len(rows)
        sample.add(rows)
    # About size * log(stream / size) after the first chunk.
    assert 1000 < drawn < 1400
    assert len(sample.rows) == 10
    assert sample.rows.max() > 20_000  # not the first ones alone


def test_the_same_seed_gives_the_same_sample() -> None:
    assert sampled(5, 3, [30, 30]).tolist() == sampled(5, 3, [30, 30]).tolist()
    assert sampled(5, 3, [30, 30]).tolist() != sampled(5, 4, [30, 30]).tolist()


def test_rows_keep_their_shape_and_numbers_go_together() -> None:
    sample = Reservoir(8, seed=0)
    for start in range(0, 100, 10):
        x = np.arange(start, start + 10.0)
        sample.add(np.stack([x, x**2], 1)[sample.draw(10)])
    assert sample.rows.shape == (8, 2)
    assert (sample.rows[:, 1] == sample.rows[:, 0] ** 2).all()


def test_a_sample_is_not_changed_through_the_rows_it_was_given() -> None:
    sample, rows = Reservoir(4, seed=0), np.arange(4.0)
    sample.add(rows[sample.draw(4)])
    rows[:] = -1
    assert sample.rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, -3])
def test_a_sample_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be 1 or more, got {size}"):
        Reservoir(size, 0)


# ---------------------------------------------------------------------------------------------
# Results


class Example(AnalysisResult):
    """A result with all that tables hold."""


def example() -> Example:
    main = pd.DataFrame(
        {
            "n": [1, 2, 3],
            "x": [0.1, float("nan"), 1.0],
            "y": [math.inf, -math.inf, 1 / 3],
            "name": ["a", "b", 'c "quoted" é'],
            "is": [True, False, True],
        }
    )
    settings = {"seed": 0, "layers": [1, 2], "name": "x"}
    return Example(settings, {"a": 0.1 + 0.2, "b": float("nan")}, {"main": main, "b": main[:1]})


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    result = example()
    result.save(tmp_path / "result.json")
    found = AnalysisResult.load(tmp_path / "result.json")
    assert type(found) is Example
    assert found.settings == result.settings
    assert found.numbers["a"] == result.numbers["a"]
    assert math.isnan(found.numbers["b"])
    assert list(found.tables) == ["main", "b"]
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(found.tables[name], table, check_exact=True)
    pd.testing.assert_frame_equal(found.to_dataframe(), result.tables["main"])


def test_a_table_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    Example({}, {}, {"main": example().tables["main"][:0]}).save(tmp_path / "result.json")
    found = AnalysisResult.load(tmp_path / "result.json").to_dataframe()
    assert list(found) == ["n", "x", "y", "name", "is"]
    assert len(found) == 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for content, message in (
        ("no json", "is not a result of this package"),
        ('{"version": 99, "analysis": "Example"}', "version 99"),
        ('{"version": 1}', "not a result of this kind"),
        ('{"version": 1, "analysis": "Unheard"}', "'Unheard'.*known: .*Example"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            AnalysisResult.load(path)


def test_files_are_json_that_others_read(tmp_path: Path) -> None:
    result = first_token_weight(llama(), token_ids())
    result.save(tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["analysis"] == "FirstTokenWeight"
    assert len(content["tables"]["texts"]["weight"]) == 8
    assert all(isinstance(x, float) for x in content["numbers"].values())


def test_virtual_tokens_are_not_taken_for_the_text() -> None:
    model = with_virtual_tokens("prompt")
    with pytest.raises(UnsupportedModelError, match="a model that reads the text alone"):
        run_texts(model, [token_ids(1)[0]], lambda layer: None)
