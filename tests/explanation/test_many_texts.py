"""A list of texts is explained as its texts are one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from captum_cw import Explanation, explain
from captum_cw.explanation import builder
from support.models import bert, build, llama

TEXTS = ["a b c d e f", "g h", "i j a c e", "b"]


def check_equal(found: Explanation, alone: Explanation) -> None:
    assert found.tokens == alone.tokens
    assert found.predicted == alone.predicted
    assert found.words == alone.words
    close = {"rtol": 1e-4, "atol": 1e-5}
    for group in ("scores", "maps"):
        ours, theirs = getattr(found, group), getattr(alone, group)
        assert list(ours) == list(theirs)
        for name, x in ours.items():
            torch.testing.assert_close(x, theirs[name], **close)
    assert len(found.heads) == len(alone.heads)
    for layer, other in zip(found.heads, alone.heads, strict=True):
        assert layer.name == other.name
        for part in ("output_norm", "share", "effect"):
            torch.testing.assert_close(getattr(layer, part), getattr(other, part), **close)
        for name in ("attention", "contribution-signed"):
            dense = [
                torch.zeros(*x.keys.shape[:2], len(found.tokens)).scatter_add(
                    -1, x.keys.long(), x.measure(name)
                )
                for x in (layer, other)
            ]
            torch.testing.assert_close(*dense, **close)
    ours, theirs = dict(found.settings), dict(alone.settings)
    for name in ("target probability", "contrast probability", "target value"):
        assert float(ours.pop(name, 0)) == pytest.approx(float(theirs.pop(name, 0)), rel=1e-3)
    assert ours == theirs


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of each pass."""
    sizes: list[int] = []
    before = builder._Explainer.explain

    def counted(self: Any, prompts: Any, show_progress: bool) -> Any:
        sizes.append(len(prompts))
        return before(self, prompts, show_progress)

    monkeypatch.setattr(builder._Explainer, "explain", counted)
    return sizes


@pytest.mark.parametrize("make", [lambda x: x, dict], ids=["BatchEncoding", "dict"])
def test_a_list_of_encodings(tiny_model, tiny_tokenizer, make: Any) -> None:
    encodings = [make(tiny_tokenizer(text, return_tensors="pt")) for text in TEXTS[:2]]
    found = explain(tiny_model, tiny_tokenizer, encodings)
    for explanation, encoding in zip(found, encodings, strict=True):
        check_equal(explanation, explain(tiny_model, tiny_tokenizer, encoding))


@pytest.mark.parametrize(
    "options", [{}, {"target": "a"}, {"target": "a", "contrast": "b"}, {"top_k": 0}]
)
def test_a_language_model(tiny_model, tiny_tokenizer, passes, options: dict[str, Any]) -> None:
    found = explain(tiny_model, tiny_tokenizer, TEXTS, **options)
    assert passes == [4]
    for explanation, text in zip(found, TEXTS, strict=True):
        check_equal(explanation, explain(tiny_model, tiny_tokenizer, text, **options))


def test_each_text_has_its_target(tiny_model, tiny_tokenizer) -> None:
    targets, contrasts = ["a", "b", "c", "d"], ["e", "f", "g", "h"]
    found = explain(tiny_model, tiny_tokenizer, TEXTS, target=targets, contrast=contrasts)
    for explanation, *case in zip(found, TEXTS, targets, contrasts, strict=True):
        text, target, contrast = case
        alone = explain(tiny_model, tiny_tokenizer, text, target=target, contrast=contrast)
        check_equal(explanation, alone)


def test_some_texts_may_have_a_target(tiny_model, tiny_tokenizer) -> None:
    targets = ["a", None, "b", None]
    found = explain(tiny_model, tiny_tokenizer, TEXTS, target=targets)
    for explanation, text, target in zip(found, TEXTS, targets, strict=True):
        check_equal(explanation, explain(tiny_model, tiny_tokenizer, text, target=target))


def test_long_and_short_texts_run_apart(
    tiny_model, tiny_tokenizer, passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "BATCH_TOKENS", 10)
    found = explain(tiny_model, tiny_tokenizer, TEXTS)
    assert passes == [1, 2, 1]
    assert [x.text for x in found] == TEXTS


@pytest.mark.parametrize("kind", ["classifier", "masked"])
def test_models_that_look_both_ways(kind: str, tiny_tokenizer) -> None:
    tiny_tokenizer.mask_token = "j"
    kinds = {
        "classifier": transformers.BertForSequenceClassification,
        "masked": transformers.BertForMaskedLM,
    }
    model = build(kinds[kind], bert().config)
    texts = ["a j c d e f", "j h", "i j"]
    found = explain(model, tiny_tokenizer, texts)
    for explanation, text in zip(found, texts, strict=True):
        check_equal(explanation, explain(model, tiny_tokenizer, text))


@pytest.mark.parametrize(
    ("roles", "options", "answers"),
    [
        (["user"], None, True),
        (["user", "tool"], None, True),
        (["user", "assistant"], None, False),
        (["user"], {"add_generation_prompt": False}, False),
        (["user", "assistant"], {"add_generation_prompt": True}, True),
    ],
)
def test_a_chat_ends_where_the_answer_begins(
    tiny_model, tiny_tokenizer, roles, options, answers
) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}z{% endif %}"
    )
    chat = [{"role": role, "content": "a b"} for role in roles]
    tokens = explain(tiny_model, tiny_tokenizer, chat, chat_template_kwargs=options).tokens
    assert (tokens[-1].strip() == "z") == answers


def test_chats_and_pairs_in_a_list(tiny_model, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chats = [[{"role": "user", "content": x}] for x in ("a b", "c d e")]
    found = explain(tiny_model, tiny_tokenizer, chats)
    for explanation, chat in zip(found, chats, strict=True):
        alone = explain(tiny_model, tiny_tokenizer, chat)
        check_equal(explanation, alone)
        assert explanation.messages == alone.messages
    pairs = [("a b", "c"), ("d", "e f")]
    assert [x.tokens for x in explain(tiny_model, tiny_tokenizer, pairs)] == [
        explain(tiny_model, tiny_tokenizer, pair).tokens for pair in pairs
    ]


def test_ids_in_a_list(passes, tiny_tokenizer) -> None:
    ids = [torch.tensor([5, 6, 7]), torch.tensor([[8, 9]])]
    model = llama()
    found = explain(model, tiny_tokenizer, ids)
    assert passes == [2]
    for explanation, x in zip(found, ids, strict=True):
        check_equal(explanation, explain(model, tiny_tokenizer, x))


def test_targets_must_fit_the_texts(tiny_model, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="target is a list of 2, but the number of texts is 4"):
        explain(tiny_model, tiny_tokenizer, TEXTS, target=["a", "b"])
    with pytest.raises(ValueError, match="contrast is a list of 1, but the number of texts is 1"):
        explain(tiny_model, tiny_tokenizer, "a b", contrast=["a"])
    with pytest.raises(TypeError, match="text is of type float"):
        explain(tiny_model, tiny_tokenizer, [0.5])
