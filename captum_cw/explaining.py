"""Explains one text: all measures of all layers and heads, from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_cw import functional
from captum_cw.attr import ContributionWeights
from captum_cw.attr.inputs import LOGITS, device_of, parameters_of
from captum_cw.attr.layer import check_fits, expected_layers, unwrapped
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.explanation import (
    MEASURES,
    PARTS,
    SIGNED,
    Explanation,
    HeadMaps,
    mean_of_layers,
    most_important,
    versions,
)
from captum_cw.functional import AttentionLayer, Space, map_blocks
from captum_cw.templates import Message, Messages, encode, render_chat
from captum_cw.tokens import Span, Tokenizer, readable_tokens, word_numbers

__all__ = ["explain"]


def explain(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str | Messages | Tensor,
    *,
    keys: int = 32,
    space: Space = "attention",
    show_progress: bool = False,
) -> Explanation:
    """All measures of one text, by token, layer and head, from one observed forward pass.

    Scores are those of :class:`~captum_cw.TokenScores` (Eq. 15), and maps what they reduce: means
    over heads and layers of absolute values. ``"signed"`` keeps the signs of contributions and sums
    heads, so that the rows of its map sum to one.

    Args:
        model: A model of text whose layers attend to one sequence.
        tokenizer: Its tokenizer.
        text: The text; the messages of a chat, to which the tokenizer's chat template is applied;
            or token ids ``(T,)`` or ``(1, T)``, without padding.
        keys: How many keys are kept for each query of each head; 0 leaves heads out.
        space: Where outputs are measured, as for :class:`~captum_cw.ContributionWeights`.
        show_progress: Shows a bar over the layers once it has taken two seconds.

    Returns:
        The explanation; tensors on the CPU.

    Raises:
        MemoryError: If the maps would not fit into memory, with their size.
        TypeError: If ``text`` is of another kind.
        ValueError: If the text is empty, ``keys`` is negative, or there is no chat template for a
            chat.
        UnsupportedModelError: If the layers do not all attend to this sequence.

    Example:
        >>> explanation = explain(model, tokenizer, "a b c d")
        >>> explanation.maps["signed"].sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
        >>> explanation.heads[0].keys.shape
        torch.Size([4, 4, 4])
    """
    if keys < 0:
        raise ValueError(f"keys={keys}: give 0 or more.")
    model = unwrapped(model)
    if "decoder_input_ids" in parameters_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder, whose tokens are not one text: "
            "use ContributionWeights(model, kind='cross') with input_ids and decoder_input_ids, "
            "and Explanation.from_maps."
        )
    read = _read(tokenizer, text)
    ids = read.ids
    T = ids.shape[1]
    K = min(keys, T)
    method = ContributionWeights(model, space=space)
    maps: dict[str, Tensor] = {}
    seen: list[Execution] = []
    causal = True

    def on_layer(execution: Execution, layer: AttentionLayer) -> _Layer:
        nonlocal causal
        if (T, T) != (layer.T, layer.S):
            raise UnsupportedModelError(
                f"Layer {execution.name!r} attends from {layer.T} queries to {layer.S} keys, but "
                f"the text has {T} tokens: use ContributionWeights(model).attribute."
            )
        seen.append(execution)
        if not maps:
            _check_memory(layer, expected_layers([model], seen), K)
            maps.update({name: _on_cpu(T, T) for name in (*MEASURES, SIGNED)})
        first = layer.mask.block(slice(0, 1))
        causal &= T == 1 or (first is not None and not bool(first[..., 1:].any()))
        return _look(execution.name, layer, K, maps)

    inputs: dict[str, Any] = {"input_ids": ids.to(device_of(model))}
    if LOGITS in parameters_of(model):
        inputs[LOGITS] = 0  # those of all positions
    results, output = method.observe(
        inputs, None, on_layer, one_text=True, show_progress=show_progress
    )
    layers = [layer for _, layer in results]
    speaks = causal and getattr(model, "can_generate", lambda: False)()
    predicted, probability = _predictions(tokenizer, output, T) if speaks else (None, None)
    return Explanation(
        tokens=readable_tokens(tokenizer, ids[0]),
        scores={name: mean_of_layers([layer.scores[name] for layer in layers]) for name in maps},
        maps={name: x / len(layers) for name, x in maps.items()},
        heads=[layer.heads for layer in layers] if keys else (),
        predicted=predicted,
        probability=probability,
        words=word_numbers(tokenizer, ids[0]),
        text=read.text,
        offsets=read.offsets,
        messages=read.messages,
        settings={"model": _name(model), "space": space, "keys": keys, **versions()},
    )


class _Text(NamedTuple):
    """What is explained: ``(1, T)`` ids, and what is known of where they stand."""

    ids: Tensor
    text: str | None = None
    offsets: Sequence[Span] | None = None
    messages: Sequence[Message] | None = None


def _read(tokenizer: Any, text: str | Messages | Tensor) -> _Text:
    if isinstance(text, str):
        encoded = encode(tokenizer, text)
        read = _Text(encoded.ids, text, encoded.offsets)
    elif isinstance(text, (list, tuple)):
        chat = render_chat(tokenizer, text, add_generation_prompt=False)
        read = _Text(chat.ids, chat.text, chat.offsets, chat.messages)
    elif isinstance(text, Tensor):
        if text.is_floating_point() or text.dtype == torch.bool:
            raise TypeError(f"text is a tensor of {text.dtype}: give token ids, integers (T,).")
        read = _Text((text[None] if text.dim() == 1 else text).long())
    else:
        raise TypeError(
            f"text is of type {type(text).__name__}: give a text, the messages of a chat, or token "
            "ids (T,) without padding."
        )
    if read.ids.dim() != 2 or len(read.ids) != 1 or not read.ids.numel():
        raise ValueError(
            f"The text has token ids of shape {tuple(read.ids.shape)}: give one text of one token "
            "or more."
        )
    return read


def _name(model: nn.Module) -> str:
    """Of a local folder its own name, since its place means nothing to a reader."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).exists() else name


def _check_memory(layer: AttentionLayer, layers: int, K: int) -> None:
    H, T = layer.H, layer.T
    # While the mean over layers is taken there are two of a map.
    needed = 4 * ((len(MEASURES) + 2) * T * T + layers * H * T * (K * (len(PARTS) + 1) + 1))
    check_fits(
        needed,
        torch.device("cpu"),
        f"{len(MEASURES) + 1} of {T} x {T}, and {K} keys of {T} queries of {layers} x {H} heads",
        "Keep fewer keys (keys=0 leaves heads out), or use TokenScores, which never holds a map.",
    )


class _Layer(NamedTuple):
    """What is kept of a layer; ``(S,)`` scores are means over heads, but ``"signed"`` a sum."""

    scores: dict[str, Tensor]
    heads: HeadMaps


def _on_cpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros where an explanation is kept."""
    return torch.zeros(size, dtype=dtype, device="cpu")


def _look(name: str, layer: AttentionLayer, K: int, maps: dict[str, Tensor]) -> _Layer:
    """Adds to the ``(T, S)`` maps of all layers; weights are computed once for all measures."""
    H, T, S = layer.H, layer.T, layer.S
    totals = {measure: layer.value.new_zeros(H, S) for measure in maps}
    kept = {part: _on_cpu(H, T, K) for part in PARTS}
    places = _on_cpu(H, T, K, dtype=torch.int32)
    share = _on_cpu(H, T)
    factors = (functional.relative_norm, functional.cosine)
    for rows, found in map_blocks(layer, *MEASURES.values(), *factors):
        a, vw, vwon, c, relative_norm, cosine = (x[0] for x in found)
        n = a.shape[-1]
        for measure, x in zip(maps, (a.abs(), vw, vwon, c.abs(), c), strict=True):
            totals[measure][:, :n] += x.sum(1)
            heads = x.sum(0) if measure == SIGNED else x.mean(0)
            maps[measure][rows, :n] += heads.cpu().float()
        share[:, rows] = c.sum(-1).cpu().float()
        best = most_important(a, c, K)
        places[:, rows, : best.shape[-1]] = best.cpu().int()
        for part, x in zip(PARTS, (a, relative_norm, cosine), strict=True):
            kept[part][:, rows, : best.shape[-1]] = x.gather(-1, best).cpu().float()
    counts = layer.mask.counts(None, layer.value.device)[0].clamp(min=1)
    scores = {measure: total / counts for measure, total in totals.items()}
    _, norm2 = layer.direction("inter")
    norm = norm2[0, 0].sqrt()
    if layer.scale is not None:
        norm = norm * layer.scale[0].abs()
    return _Layer(
        {m: (x.sum(0) if m == SIGNED else x.mean(0)).cpu().float() for m, x in scores.items()},
        HeadMaps(name, places, **kept, output_norm=norm.cpu().float(), share=share),
    )


def _predictions(
    tokenizer: Tokenizer, output: Any, T: int
) -> tuple[list[str] | None, Tensor | None]:
    """The likeliest next token at each place; None of a model that gives no such logits."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != (1, T):
        return None, None
    best = [row.float().softmax(-1).max(-1) for row in logits[0].split(64)]
    ids = torch.cat([x.indices for x in best]).tolist()
    known = len(tokenizer)  # type: ignore[arg-type]  # they have a length
    # Vocabularies are often filled up beyond the tokenizer's.
    texts = [
        readable_tokens(tokenizer, [i])[0]
        if i < known and tokenizer.convert_ids_to_tokens(i) is not None
        else f"⟨#{i}⟩"
        for i in ids
    ]
    return texts, torch.cat([x.values for x in best]).cpu()
