"""Words, spans, templates and chats: which tokens belong together, and that their scores add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    ImageMaskInput,
    LayerGradientXActivation,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
)
from matplotlib import pyplot as plt
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from captum_cw import ChatTokenInput, ContributionWeights, Explanation, LLMTokenAttribution, explain
from captum_cw.text.templates import encode, owners, places_of, render_chat
from captum_cw.text.tokens import group_scores, joined, readable_tokens, word_numbers, word_spans

CHAT = [{"role": "U", "content": "a b"}, {"role": "A", "content": "c"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} Z {% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


def bytes_only() -> PreTrainedTokenizerFast:
    """Every byte is a token, but for a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("b", "c"), ("x", "."), ("Ġ", "("), ("d", "e"), ("de", "f")]
    merges += [("â", "Ģ"), ("âĢ", "į")]  # a joiner
    words = [*alphabet, *dict.fromkeys("".join(pair) for pair in merges)]
    model = models.BPE({word: n for n, word in enumerate(words)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<s>"])


def word_piece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "play", "##ing", "don", "'", "t", "京", "東", "."]
    model = models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]")


def metaspace() -> PreTrainedTokenizerFast:
    """As in Llama 2: no pre-tokenizer splits, so that ``word_ids`` call everything one word."""
    words = ["▁", "a", "b", "c", "▁a", ".", "▁b"]
    model = models.BPE({word: n for n, word in enumerate(words)}, [("▁", "a"), ("▁", "b")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# Words


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (bytes_only, "bcd ab, (x.", ["bcd", " ab", ",", " (", "x."]),
        (bytes_only, "don't", ["don", "'", "t"]),
        (bytes_only, "4 85\n\na_b", ["4", "85", "a_b"]),
        (bytes_only, "é caf\u00e9s", ["é", "cafés"]),
        (bytes_only, "東京 ab", ["東", "京", " ab"]),
        (bytes_only, "データ", ["デー", "タ"]),
        (bytes_only, "हिन्दी", ["हिन्दी"]),
        (bytes_only, "😀😀", ["😀", "😀"]),
        (bytes_only, "<s>ab<s>c", ["ab", "c"]),
        (
            bytes_only,
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"],
        ),  # Persian, one word
        (
            word_piece,
            "[CLS] playing don't 東京.",
            [" playing", " don", " '", " t", " 東", " 京", "."],
        ),
        (metaspace, "a bc b.a", [" a", " bc", " b", ".", "a"]),
    ],
)
def test_words_are_found_by_their_text(make: Any, text: str, expected: list[str]) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = readable_tokens(tokenizer, ids)
    words = [joined(tokens[start:stop]) for start, stop in word_spans(tokenizer, ids)]
    assert words == expected


def test_tokens_outside_of_words_do_not_have_a_number() -> None:
    tokenizer = bytes_only()
    ids = torch.tensor(tokenizer("<s>b  c\n")["input_ids"])
    assert word_numbers(tokenizer, ids) == [None, 0, None, None, 1, None]
    with pytest.raises(ValueError, match=r"shape \(1, 6\)"):
        word_spans(tokenizer, ids[None])


def test_a_joiner_is_shown_where_it_joins_nothing() -> None:
    tokenizer = bytes_only()
    assert readable_tokens(tokenizer, tokenizer("a\u200d")["input_ids"]) == ["a", "⟨200d⟩"]


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4, 5)])
def test_scores_are_grouped_along_the_last_dimension(how: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = group_scores(x, [(3, 5), (0, 1)], how)
    assert found.shape == (*shape[:-1], 2)
    reduce: Any = getattr(torch, {"max": "amax"}.get(how, how))
    assert torch.equal(found[..., 0], reduce(x[..., 3:], -1))
    assert torch.equal(found[..., 1], x[..., 0])
    assert group_scores(x, [], how).shape == (*shape[:-1], 0)


@pytest.mark.parametrize(
    ("spans", "how", "message"),
    [
        ([(1, 1)], "sum", r"\(1, 1\) is empty or not within the 4 tokens"),
        ([(2, 1)], "sum", r"\(2, 1\)"),
        ([(-1, 2)], "sum", r"\(-1, 2\)"),
        ([(2, 5)], "sum", r"\(2, 5\).*4 tokens"),
        ([(2, 4), (0, 3)], "sum", r"\(0, 3\) and \(2, 4\) overlap"),
        ([(0, 1)], "median", "how='median'.*'sum', 'mean', 'max'"),
    ],
)
def test_bad_spans_are_named(spans: Any, how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_scores(torch.zeros(4), spans, how)


# Explanations by word and span


@pytest.fixture
def given() -> Explanation:
    """Five tokens, of which the first belongs to no word."""
    generator = torch.Generator().manual_seed(0)
    return Explanation(
        ["<s>", " un", "do", " it", "."],
        {"ig": torch.randn(5, generator=generator)},
        {"signed": torch.softmax(torch.randn(5, 5, generator=generator), -1)},
        predicted=list("abcde"),
        probability=torch.arange(5.0),
        words=[None, 0, 0, 1, 2],
        text=" undo it.",
        offsets=[(0, 0), (0, 3), (3, 5), (5, 8), (8, 9)],
    )


def test_words_hold_their_tokens_scores(given: Explanation) -> None:
    found = given.by_word()
    assert found.tokens == ["<s>", " undo", " it", "."]
    scores, signed = given.scores["ig"], given.maps["signed"]
    assert torch.allclose(found.scores["ig"][1], scores[1] + scores[2])
    assert torch.allclose(found.scores["ig"].sum(), scores.sum())
    assert torch.allclose(found.maps["signed"].sum(-1), torch.ones(4))
    assert torch.allclose(found.maps["signed"][1, 2], (signed[1, 3] + signed[2, 3]) / 2)
    assert torch.allclose(found.maps["signed"][2, 1], signed[3, 1] + signed[3, 2])
    assert found.predicted == ["a", "c", "d", "e"]
    assert found.probability is not None
    assert found.probability.tolist() == [0, 2, 3, 4]
    assert found.settings == {"by": "word", "how": "sum"}
    two = Explanation(["<s>", "<s>", "a"], {"ig": torch.ones(3)}, words=[None, None, 0])
    assert two.by_word().tokens == ["<s>", "<s>", "a"]
    largest = given.by_word("max")
    assert torch.equal(largest.scores["ig"][1], scores[1:3].amax())


def test_queries_of_their_own_stay(given: Explanation) -> None:
    own = Explanation(
        given.tokens, {}, {"x": given.maps["signed"][:2]}, queries=["q", "r"], words=given.words
    )
    found = own.by_word()
    assert found.maps["x"].shape == (2, 4)
    assert found.queries == ["q", "r"]
    assert torch.allclose(found.maps["x"].sum(-1), torch.ones(2))


def test_spans_are_tokens_characters_or_pieces_of_the_text(given: Explanation) -> None:
    expected = given.by_span([(1, 3), (3, 4)])
    assert expected.tokens == [" undo", " it"]
    assert expected.maps["signed"].shape == (2, 2)
    for spans, unit in (
        ([(1, 5), (6, 8)], "characters"),
        (["undo", "it"], "tokens"),
        ([" undo", (3, 4)], "tokens"),
    ):
        found = given.by_span(spans, unit=unit)
        assert found.tokens == expected.tokens
        assert torch.equal(found.scores["ig"], expected.scores["ig"])
        assert torch.equal(found.maps["signed"], expected.maps["signed"])
    assert given.by_span(["ndo"]).tokens == ["do"]  # " un" begins outside of it


@pytest.mark.parametrize(
    ("spans", "unit", "message"),
    [
        (["si"], "tokens", "'si' occurs 0 times"),
        ([""], "tokens", "'' occurs 0 times"),
        ([" "], "tokens", "' ' occurs 2 times"),
        (["t"], "tokens", r"'t' at \(7, 8\) does not hold most"),
        (["undo", "do"], "tokens", r"\(1, 3\) and \(2, 3\) overlap"),
        ([(3, 12)], "characters", r"\(3, 12\).*9 characters"),
        ([(4, 4)], "characters", r"\(4, 4\) is empty"),
        ([(0, 1)], "characters", r"' ' at \(0, 1\) does not hold most"),
        ([(0, 2), (1, 3)], "tokens", "overlap"),
        ([(0, 9)], "tokens", r"\(0, 9\).*5 tokens"),
        ([(0, 1)], "words", "unit='words'.*'tokens', 'characters'"),
    ],
)
def test_spans_that_hold_nothing_are_named(
    given: Explanation, spans: Any, unit: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        given.by_span(spans, unit=unit)


def test_what_is_not_known_is_not_guessed() -> None:
    bare = Explanation(["a", "b"], {"ig": torch.ones(2)})
    with pytest.raises(ValueError, match="words="):
        bare.by_word()
    with pytest.raises(ValueError, match="in tokens instead"):
        bare.by_span(["a"])
    with pytest.raises(ValueError, match="not given as a chat"):
        bare.by_message()


# Templates


def test_a_token_belongs_to_what_holds_most_of_it() -> None:
    text = "the dog ran"
    # " dog" begins in the text between, but its space does not count.
    assert owners(text, [(0, 3), (3, 7), (7, 11)], [(4, 7)]) == [None, 0, None]
    assert owners("as I go", [(2, 4)], [(3, 4)]) == [0]
    assert owners(text, [(0, 6), (6, 11)], [(4, 7)]) == [None, None]
    assert owners(text, [(0, 4), (4, 9), (9, 11)], [(4, 7)]) == [None, 0, None]
    # Two characters each: the one where it begins.
    assert owners("abcd", [(0, 4)], [(0, 2), (2, 4)]) == [0]
    assert owners("abcd", [(0, 4)], [(2, 4)]) == [None]
    assert owners("a b", [(0, 0), (1, 2)], [(0, 3)]) == [None, 0]


def test_values_are_found_wherever_a_template_puts_them() -> None:
    def formatted(template: str) -> Any:
        return lambda values: template.format(*values)

    assert places_of(formatted("<{}> {} <{}>"), ["a", "a", ""]) == [[(1, 2)], [(4, 5)], [(7, 7)]]
    assert places_of(formatted("{1}{0}{1}"), ["ab", "c"]) == [[(1, 3)], [(0, 1), (3, 4)]]
    assert places_of(formatted("<{}>"), [" a "]) == [[(1, 4)]]
    assert places_of(lambda v: v[0].strip() + "!", [" ab "]) == [[(0, 2)]]
    assert places_of(lambda v: v[0].rstrip() + "!", ["  ab "]) == [[(2, 4)]]
    assert places_of(lambda v: " ".join(v[:1]), ["a", "b"]) == [[(0, 1)], []]
    for changing in (
        formatted("{!r}"),
        formatted("{:>4}"),
        lambda v: v[0].replace(" ", "")[:2],
        lambda v: str(len(v[0])),
        lambda v: {"a b": "c"}[v[0]],
    ):
        assert places_of(changing, ["a b"]) is None


@pytest.fixture
def language_model(tiny_model: nn.Module, tiny_tokenizer: Any) -> tuple[nn.Module, Any]:
    tiny_tokenizer.chat_template = TEMPLATE
    return tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("inp", "features"),
    [
        (TextTemplateInput("a {} c {} e", ["b d", "f"]), [[1, 2], [4]]),
        (TextTemplateInput("a {y} c {x}", {"x": "b d", "y": "f"}), [[3, 4], [1]]),
        (TextTemplateInput("{0} c {0}", ["a b"]), [[0, 1, 3, 4]]),
        (TextTemplateInput("a {} c {}", ["b", ""]), [[1], []]),
        (TextTemplateInput(lambda x, y: f"{y} a {x}", ["b", "c d"]), [[3], [0, 1]]),
        (
            TextTemplateInput("{} {} {}", ["a", "b c", "d"], mask=[7, 3, 7]),
            [[0, 3], [1, 2], [0, 3]],
        ),
        (
            TextTemplateInput(
                "{x} {y} {z}",
                {"x": "a", "y": "b", "z": "c"},
                baselines={"x": "d", "y": "e", "z": "f"},
                mask={"x": "p", "y": "p", "z": "q"},
            ),
            [[0, 1], [0, 1], [2]],
        ),
    ],
)
def test_a_templates_values_have_the_sums_of_their_tokens(
    inp: Any, features: list[list[int]], language_model: tuple[nn.Module, Any]
) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
    whole = llm.attribute(inp.to_model_input(), target="g h")
    found = llm.attribute(inp, target="g h")
    expected = torch.stack([whole.token_attr[:, tokens].sum(-1) for tokens in features], -1)
    assert torch.allclose(found.token_attr, expected)
    assert torch.allclose(found.seq_attr, expected.mean(0))
    captums = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, target="g h", use_cached_outputs=False
    )
    assert found.token_attr.shape == captums.token_attr.shape
    assert found.seq_attr.shape == captums.seq_attr.shape
    assert found.input_tokens == captums.input_tokens
    for figure, _ in (found.plot_token_attr(), found.plot_seq_attr()):
        plt.close(figure)
    assert Explanation.from_llm(found).tokens == inp.values


def test_a_token_across_a_border_counts_on_one_side() -> None:
    tokenizer = bytes_only()
    text = "abc defg"
    ids = tokenizer(text)["input_ids"]
    assert readable_tokens(tokenizer, ids) == ["a", "bc", "␣", "def", "g"]
    encoded = encode(tokenizer, text)
    assert encoded.offsets is not None
    # "ab" has "a", and half of "bc", which begins there; "fg" but a third of "def".
    assert owners(text, encoded.offsets, [(0, 2), (6, 8)]) == [0, 0, None, None, 1]


def test_templates_that_cannot_be_followed_are_refused(
    language_model: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
    with pytest.raises(ValueError, match=r"puts its values \['a b'\]"):
        llm.attribute(TextTemplateInput("{:>5}", ["a b"]), target="c")
    with pytest.raises(TypeError, match="ImageMaskInput.*TextTemplateInput"):
        llm.attribute(ImageMaskInput(Image.new("RGB", (2, 2))), target="c")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        llm.attribute(TextTemplateInput("{}", ["a b"]), target="c")


# Chats


def test_a_chat_is_its_template_with_the_messages_places(language_model: Any) -> None:
    _, tokenizer = language_model
    chat = render_chat(tokenizer, CHAT, add_generation_prompt=True)
    assert chat.text == "U a b Z A c Z A"
    assert chat.messages == [("U", 1, 3), ("A", 5, 6)]
    as_always = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert chat.ids[0].tolist() == as_always["input_ids"]


def test_a_template_that_strips_is_followed_and_one_that_rewrites_is_not(
    language_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = language_model
    spaced = [{"role": "U", "content": "  a b "}, {"role": "A", "content": ""}]
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    assert render_chat(tokenizer, spaced, add_generation_prompt=False).messages == [("U", 1, 3)]
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content.split(' ')[-1]")
    chat = render_chat(tokenizer, CHAT, add_generation_prompt=False)
    assert chat.text.startswith("U b Z")
    assert chat.messages is None
    tokenizer.chat_template = TEMPLATE.replace("in messages", "in messages if m.role == 'U'")
    chat = render_chat(tokenizer, CHAT, add_generation_prompt=False)
    assert (chat.text, chat.messages) == ("U a b Z ", None)
    with pytest.raises(ValueError, match="skip_tokens='template'"):
        ChatTokenInput(CHAT, tokenizer, skip_tokens="template")
    with pytest.raises(ValueError, match="skip_tokens='Z': give a list"):
        ChatTokenInput(CHAT, tokenizer, skip_tokens="Z")  # type: ignore[arg-type]  # the point
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert render_chat(tokenizer, CHAT, add_generation_prompt=False).messages is None


def test_chats_are_attributed_as_their_text(language_model: tuple[nn.Module, Any]) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
    found = llm.attribute(CHAT, target="d e")
    expected = llm.attribute("U a b Z A c Z A", target="d e")
    assert found.input_tokens == expected.input_tokens
    assert torch.equal(found.token_attr, expected.token_attr)
    skipping = llm.attribute(ChatTokenInput(CHAT, tokenizer, skip_tokens="template"), target="d e")
    assert skipping.input_tokens == [" a", " b", " c"]
    assert torch.equal(skipping.token_attr, expected.token_attr[:, [1, 2, 5]])
    for result in (found, skipping):
        by_message = Explanation.from_llm(result, "c").by_message()
        assert by_message.tokens == ["U", "A"]
        sums = [expected.seq_attr[1:3].sum(), expected.seq_attr[5]]
        assert torch.allclose(by_message.scores["c"], torch.stack(sums))
    assert Explanation.from_llm(skipping, "c").by_span(["a b"]).tokens == [" a b"]
    marks = llm.attribute(ChatTokenInput(CHAT, tokenizer, skip_tokens=["Z"]), target="d e")
    assert marks.input_tokens == [" U", " a", " b", " A", " c", " A"]
    assert Explanation.from_llm(marks).messages == [("U", 1, 3), ("A", 4, 5)]
    alone = llm.attribute(ChatTokenInput(CHAT, tokenizer, skip_tokens=["c"]), target="d e")
    assert Explanation.from_llm(alone).messages == [("U", 1, 3)]


def test_captums_own_attribution_takes_a_chat(language_model: tuple[nn.Module, Any]) -> None:
    model, tokenizer = language_model
    inp = ChatTokenInput(CHAT, tokenizer, baselines="?", skip_tokens="template")
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, target="d e", use_cached_outputs=False
    )
    assert result.token_attr.shape == (2, 3)
    with torch.no_grad():

        def log_prob(text: str) -> Tensor:
            ids = torch.tensor([tokenizer.encode(text + " d")])
            return model(ids).logits[0, -2].log_softmax(-1)[tokenizer.encode("d")[0]]

        expected = log_prob("U a b Z A c Z A") - log_prob("U ? b Z A c Z A")
    assert torch.allclose(result.token_attr[0, 0], expected, atol=1e-5)
    assert Explanation.from_llm(result, "ablation").by_message().tokens == ["U", "A"]


def test_captums_gradients_take_a_chat(language_model: tuple[nn.Module, Any]) -> None:
    model, tokenizer = language_model
    method = LayerGradientXActivation(model, model.get_input_embeddings())
    inp = ChatTokenInput(CHAT, tokenizer)
    found = LLMGradientAttribution(method, tokenizer).attribute(inp, target="d")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert found.input_tokens == readable_tokens(tokenizer, tokenizer.encode(text))
    embedded = model.get_input_embeddings()(inp.to_model_input()).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0, -1]
    logits.log_softmax(-1)[tokenizer.encode("d")[0]].backward()
    expected = (embedded.grad * embedded).sum(-1)[0]
    assert torch.allclose(found.token_attr[0], expected, atol=1e-6)
    explanation = Explanation.from_llm(found, "gradient")
    with pytest.raises(ValueError, match="a result of Captum does not tell its input"):
        explanation.by_message()


def test_a_chat_is_explained_without_a_prompt_for_more(
    language_model: tuple[nn.Module, Any],
) -> None:
    model, tokenizer = language_model
    found = explain(model, tokenizer, CHAT)
    assert found.text == "U a b Z A c Z "
    as_text = explain(model, tokenizer, found.text)
    assert torch.equal(found.maps["contribution-signed"], as_text.maps["contribution-signed"])
    by_message = found.by_message()
    assert by_message.tokens == ["U", "A"]
    expected = found.maps["contribution-signed"][5, 1:3].sum()
    assert torch.allclose(by_message.maps["contribution-signed"][1, 0], expected)


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        ([], ValueError, "chat is empty"),
        (["a"], TypeError, "'a' is not a message.*'explain' takes several texts"),
        ([{"role": "U", "content": [{"type": "text"}]}], TypeError, "apply the chat template"),
        ([{"content": "a"}], TypeError, "is not a message: give {'role'"),
    ],
)
def test_inputs_that_are_not_a_chat_are_refused(
    messages: Any, kind: Any, message: str, language_model: tuple[nn.Module, Any]
) -> None:
    model, tokenizer = language_model
    with pytest.raises(kind, match=message):
        LLMTokenAttribution(ContributionWeights(model), tokenizer).attribute(messages, target="a")
    if messages == ["a"]:  # a list of texts
        assert [x.text for x in explain(model, tokenizer, messages)] == messages
        return
    with pytest.raises(kind, match=message):
        explain(model, tokenizer, messages)


def test_a_tokenizer_without_a_template_is_refused(
    tiny_model: nn.Module, tiny_tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=r"no chat template.*set tokenizer\.chat_template"):
        explain(tiny_model, tiny_tokenizer, CHAT)
