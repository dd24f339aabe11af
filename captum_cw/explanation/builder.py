"""Explain one text: its prediction, and all measures of all layers and heads."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_cw import functional, measures
from captum_cw.attr import ContributionWeights
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.model import LOGITS, check_fits, parameters_of, unwrapped
from captum_cw.capture.outputs import logits_of
from captum_cw.capture.run import expected_layers
from captum_cw.explanation.conversion import versions
from captum_cw.explanation.explanation import Explanation
from captum_cw.explanation.heads import FACTORS, HeadMaps, most_important
from captum_cw.explanation.target import (
    Question,
    TargetParts,
    Wanted,
    predicts,
    target_parts,
)
from captum_cw.functional import AttentionLayer, Measure, Space, map_blocks
from captum_cw.measures import TARGET, Entry
from captum_cw.text.prompts import Text, leading, model_inputs, read_text
from captum_cw.text.tokens import readable_ids, readable_tokens, word_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["explain"]

CONTRIBUTION = functional.contribution("inter")


def explain(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    target: Wanted = None,
    contrast: Wanted = None,
    top_k: int = 32,
    space: Space = "attention",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> Explanation:
    """Explain one text: what its prediction is made of, and all measures by layer and head.

    With a language model or a classifier, ``"target"`` and ``"input"`` are contributions to a
    prediction (:class:`~captum_cw.TargetContributions`, :class:`~captum_cw.InputContributions`),
    with signs, in the unit of the logits: those of the values that all heads read, and those of the
    embeddings. They take one forward and one backward pass. The other measures explain the outputs
    of the attention layers, from one observed forward pass.

    Their scores are those of :class:`~captum_cw.TokenScores` (Eq. 15). Their maps are means of
    absolute values over heads and layers. ``"contribution-signed"`` keeps signs and sums over
    heads, so the rows of its map sum to one.

    For a model with learned virtual tokens (prompt or prefix tuning), the explanation has only the
    text's own tokens, which are the last ``T`` queries and keys. The rows of its maps then sum to
    less than one. Only the ``share`` of a head still counts all keys.

    Args:
        model: A text model whose layers attend to a single sequence. For a model of images and
            text, only the layers that read the text are explained.
        tokenizer: The model's tokenizer. Every output of it that the model accepts is used.
        text: A text; a tuple of two texts; the messages of a chat, rendered by the tokenizer's chat
            template; the output of the tokenizer for one text (``BatchEncoding``), or a dict of
            the model's arguments, such as a processor's output with ``pixel_values``; or token ids
            ``(T,)`` or ``(1, T)``. Padding is not allowed.
        target: Why this? A text, of which the first token counts (mind the leading space); the
            label or number of a class; a token's number; or ``(position, number)``. None is the
            model's own prediction: after the last token, or at the only masked token.
        contrast: And why not this? It is subtracted from the target.
        top_k: The number of keys to keep for each query of each head; with 0 there are no heads.
        space: Where outputs are measured; see :class:`~captum_cw.ContributionWeights`.
        chat_template_kwargs: Further arguments of the chat template, such as
            ``{"enable_thinking": False}``. Only for the messages of a chat.
        show_progress: Whether to show a progress bar over the layers, after two seconds.

    Returns:
        The explanation, with all tensors on the CPU. Its ``settings`` name the target and the
        contrast, with their probabilities and the difference of their logits.

    Raises:
        MemoryError: If the maps would not fit into memory; the message says how large they are.
        TypeError: If ``text`` is of another type.
        ValueError: If the text is empty or padded, ``top_k`` is negative, the tokenizer has no chat
            template for a chat, or ``chat_template_kwargs`` are given without a chat.
        UnsupportedModelError: If not all layers attend to this sequence.

    Example:
        >>> explanation = explain(model, tokenizer, "The capital of France is")
        >>> explanation.maps["contribution-signed"].sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
        >>> explanation.heads[0].keys.shape
        torch.Size([4, 5, 5])
    """
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}.")
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: give a torch.nn.Module.")
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            f"tokenizer is of type {type(tokenizer).__name__}: give the model's tokenizer, such as "
            "AutoTokenizer.from_pretrained(name)."
        )
    if "decoder_input_ids" in parameters_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder, which read two texts: use "
            "ContributionWeights(model, kind='cross') with input_ids and decoder_input_ids, and "
            "Explanation.from_maps."
        )
    read = read_text(
        tokenizer, text, add_generation_prompt=False, chat_template_kwargs=chat_template_kwargs
    )
    inputs = model_inputs(model, tokenizer, read)
    if LOGITS in parameters_of(model):
        inputs[LOGITS] = 0  # asks for the logits of all positions
    ids = read.ids
    T = ids.shape[1]
    layers = _Layers(model, T, min(top_k, T))
    _, output = ContributionWeights(model, space=space).observe(
        inputs, None, layers.add, one_text=True, text_only=True, show_progress=show_progress
    )
    predicted, probability = None, None
    if layers.causal:
        predicted, probability = _predictions(model, tokenizer, output, T)
    scores = {name: torch.stack(x).mean(0) for name, x in layers.scores.items()}
    maps = {name: x / len(layers.heads) for name, x in layers.maps.items()}
    settings = {"model": _name(model), "space": space, "top_k": top_k, **versions()}
    question = Question(target, contrast)
    parts, heads = None, layers.heads
    if question.is_asked or predicts(tokenizer, ids, output, causal=layers.causal):
        parts = _target_parts(model, tokenizer, inputs, output, question, causal=layers.causal)
    if parts is not None:
        scores, maps = {**parts.scores, **scores}, {TARGET: parts.map, **maps}
        settings = {**parts.settings, **settings}
        if [len(x) for x in parts.effects] == [len(x.share) for x in heads]:
            heads = [replace(x, effect=y) for x, y in zip(heads, parts.effects, strict=True)]
    return Explanation(
        tokens=readable_tokens(tokenizer, ids[0]),
        scores=scores,
        maps=maps,
        heads=heads if top_k else (),
        predicted=predicted,
        probability=probability,
        words=word_numbers(tokenizer, ids[0]),
        text=read.text,
        offsets=read.offsets,
        messages=read.messages,
        settings=settings,
    )


def _target_parts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    output: Any,
    question: Question,
    *,
    causal: bool,
) -> TargetParts | None:
    """Return contributions to a prediction; None if they are not known, and nobody asked."""
    try:
        return target_parts(model, tokenizer, inputs, output, question, causal=causal)
    except (UnsupportedModelError, ValueError) as error:  # ValueError: logits without a gradient
        if question.is_asked:
            raise
        warnings.warn(f"Contributions to the prediction are left out. {error}", stacklevel=3)
        return None


def _name(model: nn.Module) -> str:
    """Return the name of a model; for a local folder, without the path to it."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).exists() else name


class _Layers:
    """The layers of one pass, each reduced as soon as it has run.

    Args:
        model: The model.
        T: The number of tokens of the text.
        top_k: The number of keys to keep for each query of each head.

    Attributes:
        scores: For each measure, one ``(T,)`` per layer: the mean over heads, or the sum if the
            measure is signed.
        maps: For each measure, the sum of the ``(T, T)`` maps of the layers.
        heads: The heads of each layer.
        causal: Whether no layer lets the first query attend to later tokens.
    """

    def __init__(self, model: nn.Module, T: int, top_k: int) -> None:
        self.model, self.T, self.top_k = model, T, top_k
        self.measures = {e: e.function() for e in measures.explained() if e.scores_pairs}
        self.scores: dict[str, list[Tensor]] = {entry.name: [] for entry in self.measures}
        self.maps: dict[str, Tensor] = {}
        self.heads: list[HeadMaps] = []
        self.causal = True
        # A function that is asked for more than once is computed once.
        asked = [*FACTORS.values(), CONTRIBUTION, *self.measures.values()]
        self.functions = {_key(function): function for function in asked}

    def add(self, execution: Execution, layer: AttentionLayer) -> None:
        """Reduce a layer that has just run."""
        T = self.T
        skipped, hidden = leading(execution, layer, T, None)
        if not self.maps:
            self._check_memory(layer.H, expected_layers([self.model], [execution]))
            self.maps = {entry.name: _zeros(T, T) for entry in self.measures}
        visible = layer.mask.block(slice(skipped, skipped + 1), layer.value.device)
        sees_later = bool(visible[..., hidden + 1 :].any())
        self.causal &= T == 1 or not sees_later

        H, K, device = layer.H, self.top_k, layer.value.device
        totals = {entry.name: layer.value.new_zeros(H, T) for entry in self.measures}
        keys, share = _zeros(H, T, K, dtype=torch.int32), _zeros(H, T)
        kept = {factor: _zeros(H, T, K) for factor in FACTORS}
        chosen = torch.arange(layer.T, device=device)[None] >= skipped if skipped else None
        for rows, blocks in map_blocks(layer, *self.functions.values(), chosen=chosen):
            first = max(rows.start, skipped)
            queries = slice(first - skipped, rows.stop - skipped)
            block = {
                key: x[0, :, first - rows.start :]
                for key, x in zip(self.functions, blocks, strict=True)
            }
            share[:, queries] = block[_key(CONTRIBUTION)].sum(-1).cpu().float()
            block = {key: x[..., hidden:] for key, x in block.items()}
            for entry, function in self.measures.items():
                x = block[_key(function)]
                x = x if entry.signed else x.abs()
                totals[entry.name][:, : x.shape[-1]] += x.sum(1)
                self.maps[entry.name][queries, : x.shape[-1]] += _over_heads(entry, x)
            best = most_important(block[_key(functional.attention)], block[_key(CONTRIBUTION)], K)
            keys[:, queries, : best.shape[-1]] = best.cpu().int()
            for factor, function in FACTORS.items():
                x = block[_key(function)].gather(-1, best).cpu().float()
                kept[factor][:, queries, : best.shape[-1]] = x

        counts = layer.mask.counts(chosen, device)[0, :, hidden:].clamp(min=1)
        for entry in self.measures:
            self.scores[entry.name].append(_over_heads(entry, totals[entry.name] / counts))
        norm = layer.direction("inter")[1][0, 0].sqrt()
        if layer.scale is not None:
            norm = norm * layer.scale[0].abs()
        norm = norm[skipped:].cpu().float()
        self.heads.append(HeadMaps(execution.name, keys, **kept, output_norm=norm, share=share))

    def _check_memory(self, H: int, layers: int) -> None:
        T, K, count = self.T, self.top_k, len(self.measures)
        # The mean over layers needs one more map.
        needed = 4 * ((count + 1) * T * T + layers * H * T * (K * (len(FACTORS) + 1) + 1))
        check_fits(
            needed,
            torch.device("cpu"),
            f"{count} maps of {T} x {T}, and {K} keys for {T} queries in {layers} x {H} heads",
            "Keep fewer keys (top_k=0 keeps no heads), or use TokenScores, which never holds a "
            "map.",
        )


def _zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype, device="cpu")


def _key(function: Measure) -> Hashable:
    """Return the same key for functions of a layer that compute the same."""
    if isinstance(function, partial) and function.func.__module__ == functional.__name__:
        return function.func, function.args
    return function


def _over_heads(entry: Entry, x: Tensor) -> Tensor:
    """Sum a signed measure over heads, and average any other."""
    return (x.sum(0) if entry.signed else x.mean(0)).cpu().float()


def _predictions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, output: Any, T: int
) -> tuple[list[str] | None, Tensor | None]:
    """Return the likeliest next token at each position; None if the model does not predict it."""
    try:
        logits = logits_of(output)[:, -T:]
    except TypeError:
        return None, None
    if logits.shape[:2] != (1, T) or not _is_language_model(model, logits.shape[-1]):
        return None, None
    # Blocks of positions bound the memory of the probabilities.
    best = [block.float().softmax(-1).max(-1) for block in torch.split(logits[0], 64)]
    ids = torch.cat([x.indices for x in best]).cpu()
    return readable_ids(tokenizer, ids), torch.cat([x.values for x in best]).cpu()


def _is_language_model(model: nn.Module, classes: int) -> bool:
    """Whether logits are of tokens: the model says so, or it embeds as many tokens as classes."""
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate):
        return bool(can_generate())
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return any(m.num_embeddings == classes for m in embeddings)
