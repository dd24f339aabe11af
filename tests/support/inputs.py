"""Inputs of small models: token ids, padded batches, position ids, a tokenizer."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A text of which ``letter_tokenizer`` makes the ids 1 to 8.
TEXT = "a b c d e f g h"


def token_ids(B: int = 2, T: int = 9, seed: int = 0) -> Tensor:
    """Random ids ``(B, T)``, none of a special token."""
    return torch.randint(3, 64, (B, T), generator=torch.Generator().manual_seed(seed))


def padded_batch(side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Two texts of 9 and 6 tokens, and which tokens are real."""
    ids = token_ids()
    real = torch.ones_like(ids, dtype=torch.bool)
    if side == "left":
        real[1, :3] = False
    if side == "right":
        real[1, 6:] = False
    if side == "none":
        return {"input_ids": ids}, real
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}, real


def position_ids(real: Tensor) -> Tensor:
    """Position ids ``(B, T)`` that count real tokens alone, as ``generate`` makes them."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)


def last_tokens_and_cache(
    model: nn.Module, inputs: dict[str, Tensor], positions: Tensor, T: int
) -> dict[str, Any]:
    """Inputs that run the last ``T`` tokens after a cache of those before them."""
    with torch.no_grad():
        cache = model(
            input_ids=inputs["input_ids"][:, :-T],
            attention_mask=inputs["attention_mask"][:, :-T],
            position_ids=positions[:, :-T],
            use_cache=True,
        ).past_key_values
    return {
        "input_ids": inputs["input_ids"][:, -T:],
        "attention_mask": inputs["attention_mask"],
        "past_key_values": cache,
    }


def letter_tokenizer(*sentences: str) -> PreTrainedTokenizerBase:
    """A tokenizer that splits at white space; its words are letters, digits and those of sentences.

    "a" is 1; words that it does not know are 0.
    """
    from transformers import PreTrainedTokenizerFast

    words = ["?", *string.ascii_letters, *string.digits, *" ".join(sentences).split()]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    model = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?")
