"""Figures and text pages show what they are given, and nothing else."""

import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import visualization as captum_visualization
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from captum_cw.visualization import (
    plot_attention_and_contribution,
    plot_decomposition,
    plot_token_scores,
    readable_tokens,
    save_figure,
    text_html,
    text_records,
)

CORPUS = ["the cat sat on the mat, playing a game of cards for $5"] * 4
SCRIPT = "<script>alert('x')</script>"


@pytest.fixture
def byte_level() -> PreTrainedTokenizerFast:
    """As in GPT-2, Llama 3 and Qwen: spaces are ``Ġ``, other characters bytes."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    model.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[0], eos_token=special[1]
    )


@pytest.fixture
def byte_fallback() -> PreTrainedTokenizerFast:
    """As in Llama 2 and Gemma: spaces are ``▁``, unknown characters ``<0xF0>``."""
    model = Tokenizer(models.BPE(byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>")


@pytest.fixture
def word_piece() -> PreTrainedTokenizerFast:
    """As in BERT: continuations are ``##ing``."""
    words = ["[UNK]", "[CLS]", "play", "##ing", "##"]
    model = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", cls_token="[CLS]")


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    """Causal attention with a sink, and contributions mostly positive: two heads, five tokens."""
    torch.manual_seed(0)
    visible = torch.ones(5, 5).tril().bool()
    attention = (torch.randn(1, 2, 5, 5) + 3 * torch.eye(5)[0]).masked_fill(~visible, -torch.inf)
    attention = attention.softmax(-1)
    return attention, attention * (torch.rand(1, 2, 5, 5) - 0.2)


@pytest.fixture(autouse=True)
def no_warnings_and_no_figures_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def page_text(html: str) -> str:
    """What a reader of the page sees."""
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            seen.append(data)

    Reader().feed(html)
    return "".join(seen)


def tick_labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


# Readable tokens


def test_every_id_gives_one_string(byte_level):
    ids = byte_level("<|im_start|>the cat 😀\n\n  caf\u00e9\t$5<|im_end|>")["input_ids"]
    assert len(readable_tokens(byte_level, ids)) == len(ids)
    assert readable_tokens(byte_level, torch.tensor(ids)) == readable_tokens(byte_level, ids)


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback", "word_piece"])
def test_no_mark_of_a_vocabulary_is_seen(family, request):
    tokenizer = request.getfixturevalue(family)
    seen = "".join(readable_tokens(tokenizer, tokenizer("the cat playing é 😀")["input_ids"]))
    assert not re.search("[ĠĊ▁\ufffd]|##|<0x", seen)


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_tokens_joined_are_the_text(family, request):
    tokenizer = request.getfixturevalue(family)
    ids = tokenizer("the cat sat on cards")["input_ids"]
    assert "".join(readable_tokens(tokenizer, ids)).strip() == "the cat sat on cards"


def test_a_continuation_has_no_space_and_no_mark(word_piece):
    ids = word_piece("[CLS] playing")["input_ids"]
    assert readable_tokens(word_piece, ids) == ["[CLS]", " play", "ing"]


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_parts_of_a_character_are_shown_as_bytes(family, request):
    tokenizer = request.getfixturevalue(family)
    seen = "".join(readable_tokens(tokenizer, tokenizer("😀")["input_ids"]))
    assert "⟨f0⟩⟨9f⟩⟨98⟩⟨80⟩" in seen


def test_lonely_white_space_is_visible(byte_level):
    ids = [byte_level.convert_tokens_to_ids(glyph) for glyph in "ĠĊĉ"]
    assert readable_tokens(byte_level, ids) == ["␣", "⏎", "⇥"]


def test_special_tokens_stay_whole(byte_level):
    ids = byte_level("<|im_start|>cat<|im_end|>")["input_ids"]
    seen = readable_tokens(byte_level, ids)
    assert (seen[0], seen[-1]) == ("<|im_start|>", "<|im_end|>")


def test_a_literal_hash_is_not_taken_for_a_mark(byte_level):
    ids = byte_level("## a")["input_ids"]
    assert "".join(readable_tokens(byte_level, ids)) == "## a"


@pytest.mark.parametrize("wrong", [-100, 10**6])
def test_an_unknown_id_is_named(byte_level, wrong):
    with pytest.raises(ValueError, match=rf"{wrong}, which the tokenizer does not know"):
        readable_tokens(byte_level, [0, wrong])


def test_a_batch_of_ids_is_refused(byte_level):
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(T,\)"):
        readable_tokens(byte_level, torch.zeros(2, 3, dtype=torch.long))


# Text records and pages


def test_each_method_is_scaled_by_its_own_largest_score():
    scores = {"small": torch.tensor([0.01, -0.02]), "large": torch.tensor([50.0, 100.0])}
    small, large = text_records(scores, ["a", "b"])
    assert small.word_attributions.tolist() == pytest.approx([0.5, -1.0])
    assert large.word_attributions.tolist() == pytest.approx([0.5, 1.0])
    assert (small.attr_class, large.attr_class) == ("small", "large")


def test_the_attribution_score_is_the_raw_sum():
    (record,) = text_records({"ig": torch.tensor([3.0, -1.0])}, ["a", "b"])
    assert record.attr_score == 2.0


def test_zero_scores_stay_zero():
    (record,) = text_records({"zero": torch.zeros(3)}, ["a", "b", "c"])
    assert record.word_attributions.tolist() == [0, 0, 0]


def test_skipped_positions_do_not_set_the_scale():
    (record,) = text_records({"sink": torch.tensor([-9.0, 1.0, 2.0])}, ["a", "b", "c"], skip=[0])
    assert record.word_attributions.tolist() == [-1.0, 0.5, 1.0]
    (record,) = text_records({"sink": torch.tensor([9.0, 0.0])}, ["a", "b"], skip=[0])
    assert record.word_attributions.tolist() == [1.0, 0.0]


def test_half_precision_scores_that_carry_a_gradient_are_taken():
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    (record,) = text_records({"half": scores}, ["a", "b"])
    assert record.word_attributions.dtype == torch.float32
    assert not record.word_attributions.requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_named(bad):
    with pytest.raises(ValueError, match=rf"'ig' hold {bad} at position 1 \('b'\)"):
        text_records({"ig": torch.tensor([0.0, bad])}, ["a", "b"])


def test_scores_of_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"'ig' have shape \(1, 2\), expected \(2,\)"):
        text_records({"ig": torch.zeros(1, 2)}, ["a", "b"])


@pytest.mark.parametrize(("skip", "message"), [([2], "skip holds 2"), ([0, -1], "leaves none")])
def test_a_wrong_skip_is_refused(skip, message):
    with pytest.raises(ValueError, match=message):
        text_records({"ig": torch.zeros(2)}, ["a", "b"], skip=skip)


def test_captum_shows_the_records(capsys):
    tokens = ["<|im_start|>", SCRIPT, "a & b"]
    records = text_records({"ours": torch.rand(3), "ig": torch.randn(3)}, tokens, predicted="x")
    html = captum_visualization.visualize_text(records).data
    assert "<script>" not in html
    for text in (*tokens, "ours", "ig"):
        assert text in page_text(html)


def test_a_page_shows_markup_as_text():
    tokens = ["<|im_start|>", "<b>", SCRIPT, "&amp;"]
    records = text_records({SCRIPT: torch.rand(4)}, tokens, target=SCRIPT, predicted=SCRIPT)
    html = text_html(records, title=SCRIPT)
    assert "<script>" not in html
    assert "<b>" not in html
    assert page_text(html).count(SCRIPT) == 6  # twice in the title, in a token and three labels
    assert "<|im_start|>" in page_text(html)
    assert "&amp;" in page_text(html)


def test_a_page_is_made_without_displaying_it(capsys):
    html = text_html(text_records({"ig": torch.rand(1)}, ["a"]))
    assert html.startswith("<!DOCTYPE html>")
    assert capsys.readouterr() == ("", "")


def test_an_unknown_probability_is_not_shown():
    scores = {"ig": torch.rand(1)}
    assert "nan" not in text_html(text_records(scores, ["a"], predicted="cat"))
    assert "cat (0.25)" in text_html(text_records(scores, ["a"], predicted="cat", probability=0.25))


# Maps


def test_the_contribution_scale_is_symmetric_about_zero(maps):
    attention, contribution = maps
    _, axes = plot_attention_and_contribution(attention, contribution, pairs=[(0, 1)])
    weights, shares = (ax.images[0] for ax in axes[:, 0])
    assert weights.get_clim() == (0, pytest.approx(attention[0, 1].max().item()))
    largest = contribution[0, 1].abs().max().item()
    assert shares.get_clim() == pytest.approx((-largest, largest))


def test_zero_is_white_on_both_scales(maps):
    for paper_scale in (False, True):
        _, axes = plot_attention_and_contribution(*maps, pairs=[(0, 0)], paper_scale=paper_scale)
        shares = axes[1, 0].images[0]
        assert shares.norm(0.0) == pytest.approx(0.5)
        assert min(shares.to_rgba(0.0)[:3]) > 0.95


def test_the_paper_scale_has_the_limits_of_the_paper(maps):
    _, axes = plot_attention_and_contribution(*maps, pairs=[(0, 0)], paper_scale=True)
    assert axes[0, 0].images[0].get_clim() == (0, 1)
    assert axes[1, 0].images[0].get_clim() == (-0.01, 0.15)
    with pytest.raises(ValueError, match=r"leave out quantile=0\.5"):
        plot_attention_and_contribution(*maps, pairs=[(0, 0)], paper_scale=True, quantile=0.5)


def test_the_future_is_blank_and_a_zero_contribution_is_not(maps):
    attention, contribution = maps
    contribution = contribution.clone()
    contribution[0, 0, 3, 1] = 0
    _, axes = plot_attention_and_contribution(attention, contribution, pairs=[(0, 0)])
    future = np.triu(np.ones((5, 5), dtype=bool), 1)
    for ax in axes[:, 0]:
        assert np.array_equal(np.ma.getmaskarray(ax.images[0].get_array()), future)


def test_each_map_shows_its_own_head(maps):
    attention, contribution = maps
    layers = [attention, attention.flip(1)], [contribution, contribution.flip(1)]
    _, axes = plot_attention_and_contribution(*layers, pairs=[(1, 0), (0, 0)])
    for n, head in enumerate((1, 0)):
        for given, ax in zip(maps, axes[:, n], strict=True):
            shown = ax.images[0].get_array().filled(0)
            assert np.array_equal(shown, given[0, head].numpy())


def test_many_heads_stand_in_rows_of_four(maps):
    layers = [[given] * 8 for given in maps]
    pairs = [(layer, 1) for layer in range(6)]
    _, axes = plot_attention_and_contribution(*layers, pairs=pairs)
    assert [ax.get_title() for ax in axes[0]] == [f"layer {n}, head 1" for n, _ in pairs]
    assert len({round(ax.get_subplotspec().rowspan.start) for ax in axes.flat}) == 4
    assert len({round(ax.get_subplotspec().colspan.start) for ax in axes.flat}) == 3


def test_a_quantile_keeps_one_cell_from_setting_the_scale(maps):
    attention, contribution = maps
    contribution = contribution.clone()
    contribution[0, 0, 4, 0] = -100
    _, axes = plot_attention_and_contribution(attention, contribution, pairs=[(0, 0)], quantile=0.9)
    low, high = axes[1, 0].images[0].get_clim()
    assert -low == high < 1
    assert axes[1, 0].images[0].colorbar.extend in ("min", "both")


def test_maps_of_zeros_can_be_drawn(tmp_path: Path):
    zeros = torch.zeros(1, 1, 3, 3)
    fig, _ = plot_attention_and_contribution(zeros, zeros, pairs=[(0, 0)])
    save_figure(fig, tmp_path / "zeros.png")


def test_cross_attention_names_queries_and_keys():
    maps = torch.rand(1, 1, 2, 3)
    _, axes = plot_attention_and_contribution(
        maps, maps, ["a", "b", "c"], query_tokens=["x", "y"], pairs=[(0, 0)]
    )
    assert tick_labels(axes[1, 0]) == ["a", "b", "c"]
    assert [label.get_text() for label in axes[1, 0].get_yticklabels()] == ["x", "y"]


def test_many_tokens_are_named_in_part():
    maps = torch.rand(1, 1, 100, 100)
    _, axes = plot_attention_and_contribution(
        maps, maps, [str(n) for n in range(100)], pairs=[(0, 0)]
    )
    labels = tick_labels(axes[1, 0])
    assert labels == [str(n) for n in range(0, 100, 5)]


def test_dollars_are_not_mathematics(maps, tmp_path: Path):
    tokens = ["$5", "$x_1$", r"$\frac$", "a_b", "⏎"]
    fig, axes = plot_attention_and_contribution(*maps, tokens, pairs=[(0, 0)])
    save_figure(fig, tmp_path / "dollars.png")
    assert tick_labels(axes[1, 0]) == tokens
    fig, _ = plot_token_scores({r"$\frac$": torch.rand(5)}, tokens)
    save_figure(fig, tmp_path / "dollars.svg")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attention": torch.rand(5)}, ValueError, r"\(5,\), expected \(1, H, T, S\)"),
        ({"attention": torch.rand(2, 2, 5, 5)}, ValueError, r"\(2, 2, 5, 5\).*x\[:1\]"),
        ({"attention": torch.rand(1, 2, 5, 4)}, ValueError, r"\(5, 4\), contribution \(5, 5\)"),
        ({"attention": [torch.rand(1, 2, 5, 5)] * 2}, ValueError, "attention has 2 layers"),
        ({"attention": torch.full((1, 2, 5, 5), torch.nan)}, ValueError, "not finite"),
        ({"pairs": [(0, 2)]}, IndexError, "head 2 does not exist"),
        ({"pairs": [(1, 0)]}, IndexError, "layer 1 does not exist"),
        ({"pairs": []}, ValueError, "pairs is empty"),
        ({"tokens": ["a"]}, ValueError, "got 1 tokens for 5 keys"),
        ({"quantile": 0.0}, ValueError, r"quantile=0\.0"),
    ],
)
def test_a_wrong_argument_is_named(maps, change, error, message):
    attention, contribution = maps
    given = {"attention": attention, "contribution": contribution, "pairs": [(0, 0)]}
    with pytest.raises(error, match=message):
        plot_attention_and_contribution(**given | change)


def test_the_decomposition_shows_its_four_factors(maps):
    attention, contribution = maps
    norm, cosine = torch.rand(1, 2, 5, 5) * 3, torch.rand(1, 2, 5, 5) * 2 - 1
    given = (attention, norm, cosine, contribution)
    _, axes = plot_decomposition(given, list("abcde"), head=1)
    assert [ax.get_title() for ax in axes] == [
        "attention",
        "relative norm",
        "cosine",
        "contribution",
    ]
    visible = np.tri(5, dtype=bool)
    for ax, factor in zip(axes, given, strict=True):
        shown = ax.images[0].get_array()
        assert np.array_equal(~np.ma.getmaskarray(shown), visible)
        assert np.array_equal(shown.filled(0), np.where(visible, factor[0, 1], 0))
    limits = [ax.images[0].get_clim() for ax in axes]
    assert [low for low, _ in limits[:2]] == [0, 0]
    assert limits[2] == (-1, 1)
    assert limits[3][0] == -limits[3][1]


def test_three_maps_are_no_decomposition(maps):
    with pytest.raises(ValueError, match="3 maps, expected 4"):
        plot_decomposition([maps[0]] * 3)


def test_token_scores_of_several_methods_share_one_scale():
    scores = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([300.0, 0.0])}
    _, ax = plot_token_scores(scores, ["x", "y"])
    assert ax.images[0].get_array().tolist() == [[0.5, -1.0], [1.0, 0.0]]
    assert ax.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="scores are empty"):
        plot_token_scores({}, ["x"])


# Files


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_same_maps_give_the_same_file(maps, tmp_path: Path, suffix, start):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        fig, _ = plot_attention_and_contribution(*maps, list("abcde"), pairs=[(0, 1)])
        save_figure(fig, tmp_path / name / f"maps.{suffix}")
    first, second = ((tmp_path / n / f"maps.{suffix}").read_bytes() for n in ("first", "second"))
    assert first == second
    assert first.startswith(start)


def test_another_suffix_is_refused(maps, tmp_path: Path):
    fig, _ = plot_attention_and_contribution(*maps, pairs=[(0, 1)])
    with pytest.raises(ValueError, match=r"'\.gif', expected '\.png' or '\.svg'"):
        save_figure(fig, tmp_path / "maps.gif")
    assert not list(tmp_path.iterdir())


def test_bare_figures_are_not_held_by_pyplot(maps):
    plot_attention_and_contribution(*maps, pairs=[(0, 1)], use_pyplot=False)
    assert plt.get_fignums() == []
    plot_attention_and_contribution(*maps, pairs=[(0, 1)])
    assert len(plt.get_fignums()) == 1


def test_scores_of_one_method_need_no_name():
    scores = torch.tensor([0.1, -0.2, 0.4])
    _, ax = plot_token_scores(scores, use_pyplot=False)
    assert ax.images[0].get_array().tolist() == [pytest.approx([0.25, -0.5, 1.0])]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["score"]
