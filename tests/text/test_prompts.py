"""One text in every form that a user may have it in: all reach the model as they are."""

from __future__ import annotations

import string
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from torch import nn

from captum_cw import (
    ChatTokenInput,
    ContributionWeights,
    Explanation,
    LLMTokenAttribution,
    TokenScores,
    explain,
)
from captum_cw.data import token_batches
from captum_cw.text.templates import render_chat
from captum_cw.visualization import readable_tokens
from support.models import SIZES, bert, build, gpt2, llama


@pytest.fixture
def pairs() -> Any:
    """Of BERT's kind: ``[CLS] a b [SEP] c d [SEP]``, the second text with token types of one."""
    words = ["?", "[CLS]", "[SEP]", *string.ascii_lowercase]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    special = {"unk_token": "?", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **special
    )


# What a tokenizer returns


def test_a_pair_is_explained_with_its_token_types(pairs: Any) -> None:
    model = bert()
    encoding = pairs("a b", "c d", return_tensors="pt")
    assert encoding.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    expected = TokenScores(ContributionWeights(model)).attribute(encoding)[0]
    given: list[Any] = [("a b", "c d"), encoding, dict(encoding), pairs("a b", "c d")]
    given.append({name: np.array(x) for name, x in pairs("a b", "c d").items()})
    for text in given:
        found = explain(model, pairs, text)
        assert torch.allclose(found.scores["contribution"], expected, atol=1e-6)
        assert found.tokens == ["[CLS]", " a", " b", "[SEP]", " c", " d", "[SEP]"]
    without = explain(model, pairs, encoding.input_ids)  # ids alone have no types
    assert not torch.allclose(without.scores["contribution"], expected, atol=1e-4)


def test_all_that_a_tokenizer_gives_of_a_text_reaches_the_model(pairs: Any) -> None:
    model = gpt2()  # adds the embedding of a token's type, 0, to each token
    encoding = pairs("a b c", return_tensors="pt")
    method = TokenScores(ContributionWeights(model))
    expected = method.attribute(encoding)[0]
    assert not torch.allclose(method.attribute(encoding.input_ids)[0], expected, atol=1e-3)
    for text in ("a b c", encoding):
        found = explain(model, pairs, text)
        assert torch.allclose(found.scores["contribution"], expected, atol=1e-6)
    assert explain(model, pairs, "a b c").offsets == [(0, 0), (0, 1), (2, 3), (4, 5), (0, 0)]


def test_what_the_model_does_not_take_is_left_out(pairs: Any) -> None:
    encoding = pairs("a b", return_special_tokens_mask=True, return_offsets_mapping=True)
    assert {"token_type_ids", "offset_mapping", "special_tokens_mask"} <= set(encoding)
    found = explain(llama(), pairs, encoding)
    assert torch.equal(
        found.maps["contribution-signed"],
        explain(llama(), pairs, "a b").maps["contribution-signed"],
    )


def test_a_prompts_token_types_and_mask_go_on_over_the_output(pairs: Any) -> None:
    model = gpt2()
    llm = LLMTokenAttribution(ContributionWeights(model), pairs)
    prompt = pairs("a b", "c d", return_tensors="pt")
    whole = {
        "input_ids": torch.cat([prompt.input_ids, torch.tensor([[5, 6]])], 1),
        "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]),
        "attention_mask": torch.ones(1, 9, dtype=torch.long),
    }
    maps = ContributionWeights(model).attribute(whole)
    expected = torch.stack(maps).abs().mean((0, 2))[0, 6:8, :7]
    for given in (prompt, dict(prompt), pairs("a b", "c d")):
        found = llm.attribute(given, target=torch.tensor([5, 6]))
        assert torch.allclose(found.token_attr, expected, atol=1e-6)
    other = llm.attribute({"input_ids": prompt.input_ids}, target=torch.tensor([5, 6]))
    assert not torch.allclose(other.token_attr, expected, atol=1e-3)
    positions = {**prompt, "position_ids": torch.arange(10, 17)[None]}
    moved = llm.attribute(positions, target=torch.tensor([5, 6]))
    maps = ContributionWeights(model).attribute(
        {**whole, "position_ids": torch.arange(10, 19)[None]}
    )
    assert torch.allclose(moved.token_attr, torch.stack(maps).abs().mean((0, 2))[0, 6:8, :7])


IDS = torch.tensor([[3, 4, 5]])
CACHE = transformers.DynamicCache()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"input_ids": IDS, "attention_mask": (IDS != 5).long()}, ValueError, "0 at token 2"),
        (
            {"inputs_embeds": torch.zeros(1, 3, 32)},
            TypeError,
            "'inputs_embeds', but no 'inp",
        ),
        ({"role": "user", "content": "a"}, TypeError, "for a chat, a list of messages"),
        ({"input_ids": IDS.expand(2, 3)}, ValueError, r"shape \(2, 3\): give one text"),
        ({"input_ids": IDS.float()}, TypeError, r"torch.float32: give token ids"),
        ({"input_ids": IDS, "past_key_values": CACHE}, ValueError, "'past_key_values'.*whole"),
        (IDS.float(), TypeError, r"torch.float32: give token ids"),
        (3, TypeError, "of type int"),
        (["a b", 3], TypeError, "of type int|'a b' is not a message"),
    ],
)
def test_inputs_that_are_not_one_text_are_refused(
    given: Any, kind: Any, message: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(kind, match=message):
        explain(llama(), tiny_tokenizer, given)
    with pytest.raises(kind, match=message):
        LLMTokenAttribution(ContributionWeights(llama()), tiny_tokenizer).attribute(given, "a")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"labels": IDS}, "'labels' has an entry for each of the 3 tokens"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"attention_mask is \(1, 1, 3, 3\)"),
    ],
)
def test_what_cannot_go_on_over_the_output_is_refused(
    extra: Any, message: str, tiny_tokenizer: Any
) -> None:
    llm = LLMTokenAttribution(ContributionWeights(llama()), tiny_tokenizer)
    with pytest.raises(ValueError, match=message):
        llm.attribute({"input_ids": IDS, **extra}, target="a")


# Chats

THINKING = (
    "{% for m in messages %}{{ m.role }} "
    "{% if m.content is string %}{{ m.content }}"
    "{% elif m.content %}{% for part in m.content %}{{ part.text }} {% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {% endfor %}"
    " Z {% endfor %}"
    "{% if add_generation_prompt %}A {% if enable_thinking is not defined or enable_thinking %}T"
    "{% else %}N{% endif %}{% endif %}"
)
CHAT: list[dict[str, Any]] = [
    {"role": "U", "content": [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}]},
    {"role": "A", "content": None, "tool_calls": [{"function": {"name": "d"}}]},
    {"role": "A", "tool_calls": [{"function": {"name": "e"}}]},
    {"role": "U", "content": "f g"},
]


@pytest.fixture
def chats(tiny_tokenizer: Any) -> Any:
    tiny_tokenizer.chat_template = THINKING
    return tiny_tokenizer


@pytest.mark.parametrize("options", [None, {}, {"enable_thinking": False}])
@pytest.mark.parametrize("add", [True, False])
def test_a_chat_is_rendered_as_the_tokenizer_does(chats: Any, add: bool, options: Any) -> None:
    chat = render_chat(chats, CHAT, add_generation_prompt=add, chat_template_kwargs=options)
    own = chats.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, add_generation_prompt=add, **(options or {})
    )
    assert chat.ids[0].tolist() == list(own["input_ids"])
    end = "" if not add else " A T" if not options else " A N"
    assert chat.text is not None
    assert " ".join(chat.text.split()) == f"U a b c Z A d Z A e Z U f g Z{end}"
    assert chat.messages == [("U", 1, 4), ("U", 12, 14)]


def test_a_message_that_goes_on_is_not_followed_by_another(chats: Any) -> None:
    chat = [{"role": "U", "content": "a"}, {"role": "A", "content": "b c"}]
    options = {"continue_final_message": True}
    found = render_chat(chats, chat, add_generation_prompt=True, chat_template_kwargs=options)
    assert found.text == "U a Z A b c"
    assert found.messages == [("U", 1, 2), ("A", 4, 6)]


def test_arguments_of_a_template_reach_it_from_everywhere(chats: Any) -> None:
    model, options = llama(), {"enable_thinking": False}
    llm = LLMTokenAttribution(ContributionWeights(model), chats)
    prompt = ChatTokenInput(CHAT, chats, chat_template_kwargs=options)
    assert prompt.values[-2:] == [" A", " N"]
    for result in (
        llm.attribute(prompt, target="h"),
        llm.attribute(CHAT, target="h", chat_template_kwargs=options),
    ):
        assert result.input_tokens[-2:] == [" A", " N"]
        assert result.inp is not None
        assert torch.equal(result.inp.to_model_input(), prompt.to_model_input())
    assert llm.attribute(CHAT, target="h").input_tokens[-1] == " T"
    spoken = {"add_generation_prompt": True, **options}
    assert explain(model, chats, CHAT, chat_template_kwargs=spoken).tokens[-1] == " N"
    assert explain(model, chats, CHAT).by_message().tokens == ["U", "U"]


def test_arguments_of_a_template_need_a_chat(chats: Any) -> None:
    llm = LLMTokenAttribution(ContributionWeights(llama()), chats)
    options = {"enable_thinking": False}
    for given in ("a b", {"input_ids": IDS}, TextTokenInput("a b", chats)):
        with pytest.raises(ValueError, match="chat_template_kwargs={'enable_thinking': False}"):
            llm.attribute(given, target="a", chat_template_kwargs=options)
    with pytest.raises(ValueError, match="chat_template_kwargs={'enable_thinking': False}"):
        explain(llama(), chats, "a b", chat_template_kwargs=options)
    with pytest.raises(ValueError, match="chat_template_kwargs must not set 'tokenize'"):
        explain(llama(), chats, CHAT, chat_template_kwargs={"tokenize": False})


@pytest.mark.parametrize("content", [3, [{"type": "text"}], ["a"], {"text": "a"}])
def test_content_of_another_kind_is_refused(chats: Any, content: Any) -> None:
    with pytest.raises(TypeError, match="is not a message.*content must be a text, None"):
        explain(llama(), chats, [{"role": "U", "content": content}])


# Two BOS tokens


@pytest.fixture
def beginning(tiny_tokenizer: Any) -> Any:
    """Puts ``B`` before a text, and so does its chat template."""
    place = tiny_tokenizer.convert_tokens_to_ids("B")
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="B $A", special_tokens=[("B", place)]
    )
    tiny_tokenizer.add_special_tokens({"bos_token": "B"})
    tiny_tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    return tiny_tokenizer


def warnings_of(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "(BOS) tokens" in str(w.message)]


def test_a_rendered_chat_that_is_tokenized_again_is_warned_of(beginning: Any) -> None:
    model = llama()  # its configuration has another BOS token
    chat = [{"role": "U", "content": "a b"}]
    rendered = beginning.apply_chat_template(chat, tokenize=False)
    assert beginning(rendered).input_ids[:2] == [beginning.bos_token_id] * 2
    llm = LLMTokenAttribution(ContributionWeights(model), beginning)
    encoding = beginning(rendered, return_tensors="pt")
    for call in (
        lambda: explain(model, beginning, rendered),
        lambda: explain(model, beginning, encoding),
        lambda: explain(model, beginning, encoding.input_ids),
        lambda: llm.attribute(rendered, target="c"),
        lambda: llm.attribute(TextTokenInput(rendered, beginning), target="c"),
        lambda: token_batches([rendered], beginning),
        lambda: token_batches([rendered], beginning, max_length=3, pack=True),
    ):
        (found,) = warnings_of(call)
        assert "two beginning-of-sequence (BOS) tokens 'B'" in found
        assert "add_special_tokens=False" in found
    for call in (
        lambda: explain(model, beginning, chat),
        lambda: explain(model, beginning, "a b"),
        lambda: llm.attribute(chat, target="c"),
        lambda: token_batches(["a b"], beginning),
        lambda: token_batches([rendered], beginning, bos="never"),
    ):
        assert not warnings_of(call)


def test_a_repeated_bos_token_of_the_model_is_reported_only_by_the_forward_call(
    beginning: Any,
) -> None:
    model = llama()
    model.config.bos_token_id = beginning.bos_token_id  # the forward call warns of this token
    rendered = beginning.apply_chat_template([{"role": "U", "content": "a"}], tokenize=False)
    found = warnings_of(lambda: explain(model, beginning, rendered))
    assert not any("(BOS) tokens 'B'" in message for message in found)


# Vocabularies of bytes


class Bytes(transformers.PreTrainedTokenizer):
    """A vocabulary of bytes, as those of Qwen's first models, with a few longer entries."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012  # as transformers has it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        letters = [bytes([b]) for b in b"abcdef \xc3\xa9"]
        self.ranks = {entry: i for i, entry in enumerate([*letters, b" ab", b"cd"])}
        self.entries = {i: entry for entry, i in self.ranks.items()}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.ranks)

    def get_vocab(self) -> Any:
        return dict(self.ranks)

    def tokenize(self, text: str, **options: Any) -> Any:
        tokens, rest = [], text.encode()
        while rest:
            token = max((e for e in self.ranks if rest.startswith(e)), key=len)
            tokens.append(token)
            rest = rest[len(token) :]
        return tokens

    def _tokenize(self, text: str, **options: Any) -> Any:
        return self.tokenize(text)

    def _convert_token_to_id(self, token: Any) -> Any:
        return self.ranks[token]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        many = isinstance(tokens, (list, tuple))
        return [self.ranks[t] for t in tokens] if many else self.ranks.get(tokens)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        if not isinstance(ids, int):
            return [self.convert_ids_to_tokens(int(i)) for i in ids]
        if ids not in self.entries:
            raise ValueError("unknown ids")
        return self.entries[ids]

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return b"".join(self.entries[i] for i in ids).decode("utf-8", "replace")


def test_a_vocabulary_of_bytes_is_readable() -> None:
    tokenizer = Bytes()
    ids = tokenizer("cd abé").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [b"cd", b" ab", b"\xc3", b"\xa9"]
    assert readable_tokens(tokenizer, ids) == ["cd", " ab", "⟨c3⟩", "⟨a9⟩"]


def test_a_model_with_a_vocabulary_of_bytes_is_explained() -> None:
    tokenizer, model = Bytes(), llama()
    found = explain(model, tokenizer, "cd ab")
    assert found.tokens == ["cd", " ab"]
    assert found.predicted is not None
    assert all(isinstance(text, str) for text in found.predicted)
    llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
    result = llm.attribute("cd ab", target=" abé")
    assert result.input_tokens == ["cd", " ab"]
    assert result.output_tokens == [" ab", "⟨c3⟩", "⟨a9⟩"]
    by_word = Explanation.from_llm(result, "c").by_word()
    assert (by_word.tokens, by_word.queries) == (["cd", " ab"], [" abé"])
    generated = llm.attribute("cd ab", gen_args={"max_new_tokens": 2, "do_sample": False})
    assert all(isinstance(text, str) for text in generated.output_tokens)


# Readable results


@pytest.fixture
def bpe() -> Any:
    """Byte-level BPE, with entries for ``Ġknown`` and ``un``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, "un", "kn", "ow", "know", "known", "Ġun", "Ġknown"]
    merges = [("u", "n"), ("k", "n"), ("o", "w"), ("kn", "ow"), ("know", "n")]
    merges += [("Ġ", "un"), ("Ġ", "known")]
    model = BPE({entry: i for i, entry in enumerate(entries)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def wide() -> nn.Module:
    return build(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SIZES, "vocab_size": 300})
    )


def test_both_sides_of_a_result_are_readable(bpe: Any) -> None:
    result = LLMTokenAttribution(ContributionWeights(wide()), bpe).attribute(
        "un known é", target=" unknown Ġ"
    )
    assert result.input_tokens == ["un", " known", "␣", "⟨c3⟩", "⟨a9⟩"]
    assert result.output_tokens == [" un", "known", "␣", "⟨c4⟩", "⟨a0⟩"]
    found = Explanation.from_llm(result, "c")
    assert (found.tokens, found.queries) == (result.input_tokens, result.output_tokens)
    beyond = LLMTokenAttribution(ContributionWeights(wide()), bpe).attribute(
        "un", target=torch.tensor([299, 256])
    )
    assert beyond.output_tokens == ["⟨#299⟩", "un"]
    assert Explanation.from_llm(beyond).by_word().queries == ["⟨#299⟩", "un"]
    prompt = {"input_ids": torch.tensor([[299, 256]])}
    beyond = LLMTokenAttribution(ContributionWeights(wide()), bpe).attribute(prompt, target="un")
    assert Explanation.from_llm(beyond).tokens == beyond.input_tokens == ["⟨#299⟩", "un"]


def test_a_readable_output_is_not_read_as_an_entry_again(bpe: Any) -> None:
    entry = bpe.convert_tokens_to_ids("Ġ")
    model = wide()
    llm = LLMTokenAttribution(ContributionWeights(model), bpe)
    result = llm.attribute("un", target=torch.tensor([entry]))
    result.output_tokens = ["Ġ"]  # a text, which is an entry of the vocabulary, too
    assert Explanation.from_llm(result).queries == ["Ġ"]


def test_words_of_an_output_are_put_together(bpe: Any, tmp_path: Any) -> None:
    model = wide()
    llm = LLMTokenAttribution(ContributionWeights(model), bpe)
    prompt, output = "un known", " unknown un"
    ours = llm.attribute(prompt, target=output)
    ablation = LLMAttribution(FeatureAblation(model), bpe).attribute(
        TextTokenInput(prompt, bpe), target=output, use_cached_outputs=False
    )
    found = Explanation.from_llm(ours, "m")
    assert found.query_words == [0, 0, 1]
    by_word = found.by_word()
    assert by_word.queries == [" unknown", " un"]
    attr, probs = ours.token_attr, ours.output_probs
    assert torch.allclose(by_word.maps["m"], torch.stack([attr[:2].mean(0), attr[2]]))
    assert by_word.probability is not None
    assert torch.allclose(by_word.probability, torch.stack([probs[:2].prod(), probs[2]]))
    captums = Explanation.from_llm(ablation, "m")
    assert captums.by_word().queries == ["un", "known", "un"]  # it does not keep the spaces
    path = tmp_path / "output.safetensors"
    Explanation.from_llm(ours, "m").save(path)
    loaded = Explanation.load(path)
    assert loaded.query_words == [0, 0, 1]
    assert torch.equal(loaded.by_word().maps["m"], by_word.maps["m"])


def test_words_of_queries_fit_the_queries() -> None:
    with pytest.raises(ValueError, match="query_words has 1 entries, expected 2"):
        Explanation(["a"], {}, queries=["b", "c"], query_words=[0])
    with pytest.raises(ValueError, match="query_words are given without queries"):
        Explanation(["a"], {}, query_words=[0])
