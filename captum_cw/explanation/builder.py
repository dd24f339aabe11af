"""Explains one text: all measures of all layers and heads, from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_cw import functional, measures
from captum_cw.attr import ContributionWeights
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.model import LOGITS, check_fits, parameters_of, unwrapped
from captum_cw.capture.outputs import logits_of
from captum_cw.capture.run import expected_layers
from captum_cw.explanation.explanation import (
    PARTS,
    Explanation,
    HeadMaps,
    mean_of_layers,
    most_important,
    versions,
)
from captum_cw.functional import AttentionLayer, Space, map_blocks
from captum_cw.measures import Entry
from captum_cw.text.prompts import Text, leading, model_inputs, read_text
from captum_cw.text.templates import RenderedChat
from captum_cw.text.tokens import Span, Tokenizer, readable_ids, readable_tokens, word_numbers

__all__ = ["explain"]


def explain(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: Text,
    *,
    top_k: int = 32,
    space: Space = "attention",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> Explanation:
    """All measures of one text, by token, layer and head, from one observed forward pass.

    Scores are those of :class:`~captum_cw.TokenScores` (Eq. 15), and maps what they reduce: means
    over heads and layers of absolute values. ``"contribution-signed"`` keeps signs and sums heads,
    so that the rows of its map sum to one.

    A model with learned virtual tokens (prompt or prefix tuning) is explained by the text's own
    tokens: its last ``T`` queries and keys. What a query drew from virtual tokens is left out, so
    that rows sum to less; only the ``share`` of a head still counts all keys.

    Args:
        model: A model of text whose layers attend to one sequence. In a model of images and text,
            the layers count that read the text.
        tokenizer: Its tokenizer. All that it returns and the model takes reaches the model.
        text: The text; a pair of texts, in a tuple; the messages of a chat, to which the
            tokenizer's chat template is applied; what the tokenizer returned for one text
            (``BatchEncoding``), or a dict of the model's arguments, such as a processor's with
            ``pixel_values``; or token ids ``(T,)`` or ``(1, T)``. Without padding.
        top_k: How many keys are kept for each query of each head; 0 leaves heads out.
        space: Where outputs are measured, as for :class:`~captum_cw.ContributionWeights`.
        chat_template_kwargs: Further arguments for the chat template, such as
            ``{"enable_thinking": False}``; only for the messages of a chat.
        show_progress: Shows a bar over the layers once it has taken two seconds.

    Returns:
        The explanation; tensors on the CPU.

    Raises:
        MemoryError: If the maps would not fit into memory, with their size.
        TypeError: If ``text`` is of another kind.
        ValueError: If the text is empty or padded, ``top_k`` is negative, there is no chat template
            for a chat, or ``chat_template_kwargs`` are given without one.
        UnsupportedModelError: If the layers do not all attend to this sequence.

    Example:
        >>> explanation = explain(model, tokenizer, "a b c d")
        >>> explanation.maps["contribution-signed"].sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
        >>> explanation.heads[0].keys.shape
        torch.Size([4, 4, 4])
    """
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}.")
    model = unwrapped(model)
    if "decoder_input_ids" in parameters_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder, whose tokens are not one text: "
            "use ContributionWeights(model, kind='cross') with input_ids and decoder_input_ids, "
            "and Explanation.from_maps."
        )
    read = read_text(
        tokenizer, text, add_generation_prompt=False, chat_template_kwargs=chat_template_kwargs
    )
    inputs = model_inputs(model, tokenizer, read)
    if LOGITS in parameters_of(model):
        inputs[LOGITS] = 0  # those of all positions
    ids = read.ids
    T = ids.shape[1]
    K = min(top_k, T)
    method = ContributionWeights(model, space=space)
    explained = [entry for entry in measures.explained() if entry.scores_pairs]
    maps: dict[str, Tensor] = {}
    seen: list[Execution] = []
    causal = True

    def on_layer(execution: Execution, layer: AttentionLayer) -> _Layer:
        nonlocal causal
        before = leading(execution, layer, T, None)
        seen.append(execution)
        if not maps:
            _check_memory(layer.H, T, expected_layers([model], seen), K, len(explained))
            maps.update({entry.name: _on_cpu(T, T) for entry in explained})
        first = layer.mask.block(slice(before[0], before[0] + 1))
        later = slice(before[1] + 1, None)
        causal &= T == 1 or (first is not None and not bool(first[..., later].any()))
        return _summarise(execution.name, layer, before, K, explained, maps)

    results, output = method.observe(
        inputs, None, on_layer, one_text=True, text_only=True, show_progress=show_progress
    )
    layers = [layer for _, layer in results]
    predicted, probability = _predictions(model, tokenizer, output, T) if causal else (None, None)
    return Explanation(
        tokens=readable_tokens(tokenizer, ids[0]),
        scores={name: mean_of_layers([layer.scores[name] for layer in layers]) for name in maps},
        maps={name: x / len(layers) for name, x in maps.items()},
        heads=[layer.heads for layer in layers] if top_k else (),
        predicted=predicted,
        probability=probability,
        words=word_numbers(tokenizer, ids[0]),
        text=read.text,
        offsets=read.offsets,
        messages=read.messages if isinstance(read, RenderedChat) else None,
        settings={"model": _name(model), "space": space, "top_k": top_k, **versions()},
    )


def _name(model: nn.Module) -> str:
    """Of a local folder its own name, since its place means nothing to a reader."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).exists() else name


def _check_memory(H: int, T: int, layers: int, K: int, measures: int) -> None:
    # While the mean over layers is taken there are two of a map.
    needed = 4 * ((measures + 1) * T * T + layers * H * T * (K * (len(PARTS) + 1) + 1))
    check_fits(
        needed,
        torch.device("cpu"),
        f"{measures} of {T} x {T}, and {K} keys of {T} queries of {layers} x {H} heads",
        "Keep fewer keys (top_k=0 leaves heads out), or use TokenScores, which never holds a map.",
    )


FACTORS = (functional.relative_norm, functional.cosine_with("inter"))


class _Layer(NamedTuple):
    """What is kept of a layer; ``(S,)`` scores are means over heads, signed ones sums."""

    scores: dict[str, Tensor]
    heads: HeadMaps


def _on_cpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros where an explanation is kept."""
    return torch.zeros(size, dtype=dtype, device="cpu")


def _summarise(
    name: str,
    layer: AttentionLayer,
    before: Span,
    K: int,
    explained: Sequence[Entry],
    maps: dict[str, Tensor],
) -> _Layer:
    """Adds a layer to the ``(T, S)`` maps of all layers, and keeps its heads.

    The attention weights are computed once for all measures. As many queries and keys as stand
    ``before`` those of the text are left out.
    """
    skipped, hidden = before
    H, T, S = layer.H, layer.T - skipped, layer.S - hidden
    totals = {entry.name: layer.value.new_zeros(H, S) for entry in explained}
    kept = {part: _on_cpu(H, T, K) for part in PARTS}
    places = _on_cpu(H, T, K, dtype=torch.int32)
    share = _on_cpu(H, T)
    # Of each function of its own the first place; contributions are asked for twice.
    parts = (functional.attention, functional.contribution("inter"), *FACTORS)
    asked = [*parts, *(entry.function() for entry in explained)]
    keys = [_key(function) for function in asked]
    functions = dict(reversed([*zip(keys, asked, strict=True)]))
    chosen = None
    if skipped:
        chosen = torch.ones(1, layer.T, dtype=torch.bool, device=layer.value.device)
        chosen[:, :skipped] = False
    for rows, found in map_blocks(layer, *functions.values(), chosen=chosen):
        first = max(rows.start, skipped)
        queries = slice(first - skipped, rows.stop - skipped)
        of = dict(zip(functions, found, strict=True))
        whole = [of[key][0, :, first - rows.start :] for key in keys]
        share[:, queries] = whole[1].sum(-1).cpu().float()
        a, c, relative_norm, cosine, *measured = (x[..., hidden:] for x in whole)
        n = a.shape[-1]
        for entry, x in zip(explained, measured, strict=True):
            x = x if entry.signed else x.abs()
            totals[entry.name][:, :n] += x.sum(1)
            maps[entry.name][queries, :n] += _over_heads(entry, x)
        best = most_important(a, c, K)
        places[:, queries, : best.shape[-1]] = best.cpu().int()
        for part, x in zip(PARTS, (a, relative_norm, cosine), strict=True):
            kept[part][:, queries, : best.shape[-1]] = x.gather(-1, best).cpu().float()
    counts = layer.mask.counts(chosen, layer.value.device)[0, :, hidden:].clamp(min=1)
    _, norm2 = layer.direction("inter")
    norm = norm2[0, 0].sqrt()
    if layer.scale is not None:
        norm = norm * layer.scale[0].abs()
    return _Layer(
        {entry.name: _over_heads(entry, totals[entry.name] / counts) for entry in explained},
        HeadMaps(name, places, **kept, output_norm=norm[skipped:].cpu().float(), share=share),
    )


def _key(function: Any) -> object:
    """The same for functions of a layer that compute the same."""
    if isinstance(function, partial) and function.func.__module__ == functional.__name__:
        return function.func, function.args
    return function


def _over_heads(entry: Entry, x: Tensor) -> Tensor:
    return (x.sum(0) if entry.signed else x.mean(0)).cpu().float()


def _predictions(
    model: nn.Module, tokenizer: Tokenizer, output: Any, T: int
) -> tuple[list[str] | None, Tensor | None]:
    """The likeliest next token at each place; None of a model that gives no such logits."""
    try:
        logits = logits_of(output)[:, -T:]
    except TypeError:
        return None, None
    if logits.shape[:2] != (1, T) or not _predicts_tokens(model, logits.shape[-1]):
        return None, None
    best = [row.float().softmax(-1).max(-1) for row in torch.split(logits[0], 64)]
    ids = torch.cat([x.indices for x in best]).cpu()
    return readable_ids(tokenizer, ids), torch.cat([x.values for x in best]).cpu()


def _predicts_tokens(model: nn.Module, classes: int) -> bool:
    """Whether logits are of tokens; in a model that does not say, if there are as many of both."""
    speaks = getattr(model, "can_generate", None)
    if callable(speaks):
        return bool(speaks())
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return any(m.num_embeddings == classes for m in embeddings)
