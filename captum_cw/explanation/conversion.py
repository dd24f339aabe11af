"""The contents of an explanation, taken from results of other classes and from dense maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw._utils.versions import versions
from captum_cw.attr.chat import EncodedTokenInput
from captum_cw.explanation.heads import HeadMaps
from captum_cw.functional import Decomposition
from captum_cw.measures import SIGNED
from captum_cw.text.templates import Message
from captum_cw.text.tokens import readable_tokens, word_numbers

__all__ = ["fields_of_maps", "fields_of_result"]


def fields_of_result(result: LLMAttributionResult, name: str) -> dict[str, Any]:
    """Return the fields of an explanation; see :meth:`captum_cw.Explanation.from_llm`."""
    probability = result.output_probs
    fields: dict[str, Any] = {
        "tokens": list(result.input_tokens),
        "scores": {name: result.seq_attr.detach().cpu()},
        "maps": {} if result.token_attr is None else {name: result.token_attr.detach().cpu()},
        "queries": list(result.output_tokens),
        "probability": None if probability is None else probability.detach().cpu(),
        "settings": {"method": name, **versions()},
    }
    ids = getattr(result.inp, "itp_tensor", None)
    if ids is None:  # the features are not tokens
        return fields
    assert result.inp is not None
    tokenizer = result.inp.tokenizer
    output_ids = getattr(result, "output_ids", None)
    if output_ids is None:  # a result of Captum's own classes, whose tokens lack their spaces
        fields["tokens"] = readable_tokens(tokenizer, ids[0])
        fields["queries"] = _readable_entries(tokenizer, result.output_tokens)
    else:
        fields["query_words"] = _words(tokenizer, output_ids)
    fields["words"] = _words(tokenizer, ids[0])
    if isinstance(result.inp, EncodedTokenInput):
        fields.update(_text_fields(result.inp))
    return fields


def _readable_entries(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Make entries of the vocabulary readable; other strings stay as they are."""
    vocabulary = tokenizer.get_vocab()  # built anew by each call
    return [
        readable_tokens(tokenizer, [vocabulary[token]])[0] if token in vocabulary else token
        for token in tokens
    ]


def _words(tokenizer: Any, ids: Tensor) -> list[int | None] | None:
    """Return the word numbers of tokens; None if the tokenizer does not know one of the ids."""
    try:
        return word_numbers(tokenizer, ids)
    except ValueError:
        return None


def _text_fields(inp: EncodedTokenInput) -> dict[str, Any]:
    """Return the text, and the places of characters and messages without the skipped tokens."""
    kept = [True] * inp.inp_tensor.shape[1] if inp.itp_mask is None else inp.itp_mask[0].tolist()
    messages = None
    if inp.messages is not None:
        spans = [(m.role, sum(kept[: m.start]), sum(kept[: m.stop])) for m in inp.messages]
        messages = [Message(*span) for span in spans if span[1] < span[2]]
    offsets = inp.offsets and [o for o, keep in zip(inp.offsets, kept, strict=True) if keep]
    return {"text": inp.text, "offsets": offsets, "messages": messages}


def fields_of_maps(
    maps: Mapping[str, Sequence[Tensor]] | Sequence[Decomposition],
    layers: Sequence[str] | None,
    top_k: int,
) -> dict[str, Any]:
    """Return the fields of an explanation; see :meth:`captum_cw.Explanation.from_maps`."""
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}.")
    heads: list[HeadMaps] = []
    if isinstance(maps, Mapping):
        measures = {name: [_one_text(name, x) for x in xs] for name, xs in maps.items()}
    else:
        factors = [_one_decomposition(d) for d in maps]
        names = [str(n) for n in range(len(factors))] if layers is None else layers
        if len(names) != len(factors):
            raise ValueError(f"layers has {len(names)} names, but maps {len(factors)} layers.")
        if top_k:
            pairs = zip(names, factors, strict=True)
            heads = [HeadMaps.from_decomposition(name, d, top_k) for name, d in pairs]
        measures = {
            "attention": [d.attention for d in factors],
            "vwon": [d.attention.abs() * d.relative_norm for d in factors],
            "contribution": [d.contribution for d in factors],
        }
    if not all(measures.values()) or not measures:
        raise ValueError("maps are empty: give the maps of at least one layer.")
    shapes = {tuple(x.shape[1:]) for xs in measures.values() for x in xs}
    if len(shapes) > 1:
        raise ValueError(
            f"maps have the shapes (T, S) {sorted(shapes)}: give layers of one kind, for example "
            "with kind='cross'."
        )
    means = {name: [x.abs().mean(0) for x in xs] for name, xs in measures.items()}
    scores = {name: [_over_queries(x.abs()).mean(0) for x in xs] for name, xs in measures.items()}
    if "contribution" in measures:
        means[SIGNED] = [x.sum(0) for x in measures["contribution"]]
        scores[SIGNED] = [_over_queries(x).sum(0) for x in measures["contribution"]]
    return {
        "scores": {name: torch.stack(xs).mean(0) for name, xs in scores.items()},
        "maps": {name: torch.stack(xs).mean(0) for name, xs in means.items()},
        "heads": heads,
        "settings": versions(),
    }


def _one_text(name: str, x: Any) -> Tensor:
    """Check a map ``(1, H, T, S)`` and return it as ``(H, T, S)``."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"maps[{name!r}] holds a {type(x).__name__}: give a list of tensors (1, H, T, S)."
        )
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(
            f"maps[{name!r}] holds shape {tuple(x.shape)}, expected (1, H, T, S): give one text of "
            "a batch, x[:1]."
        )
    return x[0].detach().cpu().float()


def _one_decomposition(d: Any) -> Decomposition:
    if not isinstance(d, Decomposition):
        raise TypeError(
            f"maps holds a {type(d).__name__}: name the measure, {{'attention': [...]}}, or give "
            "the list that decompose returned."
        )
    return Decomposition(*(_one_text(factor, x) for factor, x in d._asdict().items()))


def _over_queries(x: Tensor) -> Tensor:
    """Average over the queries that see a key, ``(H, T, S)`` to ``(H, S)``.

    A query sees a key if any head of the layer is not zero there.
    """
    return x.sum(1) / (x != 0).any(0).sum(0).clamp(min=1)
