"""What is known of one text, in one object: its tokens, their scores, and where these come from.

Measures give tensors; an explanation puts the tokens beside them, so that it can be shown, kept,
grouped by word, and handed to other libraries. Scores of any method, Captum's included, have room
in it. Of the maps of single heads it keeps the keys that matter most to each query, so that it
grows with the text, not with its square; only the maps of all heads and layers together are whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_cw import functional
from captum_cw.attr import ContributionWeights
from captum_cw.attr.inputs import LOGITS, device_of, parameters_of
from captum_cw.attr.layer import unwrapped
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.functional import AttentionLayer, Measure, Space, map_blocks
from captum_cw.tokens import Tokenizer, readable_tokens

__all__ = ["MEASURES", "Explanation", "HeadMaps", "explain"]

MEASURES: dict[str, Measure] = {
    "attention": functional.attention,
    "vw": functional.vw,
    "vwon": functional.vwon,
    "contribution": functional.contribution("inter"),
}
SIGNED = "signed"
PARTS = ("attention", "relative_norm", "cosine")


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """One layer, head by head: for each query the keys that matter most.

    Keys stand from the one that matters most to the one that matters least, by the larger of
    attention and absolute contribution, each relative to the row's largest. Where a query sees
    fewer than ``K`` keys, the others have attention 0.

    Args:
        name: Of the layer in the model.
        keys: ``(H, T, K)``, int32.
        attention: ``(H, T, K)``, as the next two float32 and without unit (Eq. 14).
        relative_norm: ``(H, T, K)``.
        cosine: ``(H, T, K)``.
        output_norm: ``(T,)``, of the layer's output, in the unit of the hidden states; zero where
            the output vanishes, as do the two factors before.
        share: ``(H, T)``, each head's contributions summed over all keys.
    """

    name: str
    keys: Tensor
    attention: Tensor
    relative_norm: Tensor
    cosine: Tensor
    output_norm: Tensor
    share: Tensor

    def measure(self, name: str) -> Tensor:
        """A measure at the keys that are kept, ``(H, T, K)``.

        Args:
            name: ``"attention"``, ``"vw"``, ``"vwon"``, ``"contribution"`` (its absolute value),
                or ``"signed"`` for contributions with their signs.

        Raises:
            ValueError: If there is no such measure.
        """
        match name:
            case "attention":
                return self.attention
            case "vwon":
                return self.attention * self.relative_norm
            case "vw":
                return self.attention * self.relative_norm * self.output_norm[:, None]
            case "signed":
                return self.attention * self.relative_norm * self.cosine
            case "contribution":
                return self.measure("signed").abs()
        raise ValueError(f"measure={name!r} is unknown: choose {', '.join(MEASURES)} or {SIGNED}.")


@dataclass(frozen=True, eq=False)
class Explanation:
    """The tokens of one text with scores, and with maps where there are any.

    Args:
        tokens: ``S`` readable tokens, those that are scored.
        scores: A method's ``(S,)`` scores, by its name, in its own unit.
        maps: A method's ``(T, S)`` map, by its name: what each query drew from each token.
        heads: By layer, in execution order; empty where they were not asked for.
        queries: ``T`` readable tokens of the queries; None where they are the tokens themselves.
        predicted: What the model expects most after each query; None where that is not known.
        probability: ``(T,)``, the model's probability of it.
        words: ``S`` numbers of words, ascending, with None for tokens that belong to none; None
            where that is not known.
        settings: What it was made with, such as the ``"model"``; goes into files.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> ig = torch.tensor([0.1, 0.5, 0.2])
        >>> Explanation(("a", " b", " c"), {"integrated gradients": ig}).scores.keys()
        dict_keys(['integrated gradients'])
    """

    tokens: Sequence[str]
    scores: Mapping[str, Tensor]
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Sequence[HeadMaps] = ()
    queries: Sequence[str] | None = None
    predicted: Sequence[str] | None = None
    probability: Tensor | None = None
    words: Sequence[int | None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        S = len(self.tokens)
        T = S if self.queries is None else len(self.queries)
        for kind, tensors, expected in (("scores", self.scores, (S,)), ("maps", self.maps, (T, S))):
            for name, x in tensors.items():
                if x.shape != expected:
                    raise ValueError(
                        f"{kind}[{name!r}] has shape {tuple(x.shape)}, but {expected} is expected "
                        f"for {S} tokens and {T} queries: give one text of a batch, x[0]."
                    )
        for layer in self.heads:
            if layer.keys.shape[1] != T:
                raise ValueError(
                    f"Layer {layer.name!r} has {layer.keys.shape[1]} queries, expected {T}."
                )


def explain(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str | Tensor,
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
        text: The text, or token ids ``(T,)`` or ``(1, T)``.
        keys: How many keys are kept for each query of each head; 0 leaves heads out.
        space: Where outputs are measured, as for :class:`~captum_cw.ContributionWeights`.
        show_progress: Shows a bar over the layers once it has taken two seconds.

    Returns:
        The explanation; tensors on the CPU.

    Raises:
        ValueError: If the text is empty, or ``keys`` is negative.
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
    ids = _ids(tokenizer, text)
    T = ids.shape[1]
    method = ContributionWeights(model, space=space)
    causal = True

    def on_layer(execution: Execution, layer: AttentionLayer) -> tuple[Any, ...]:
        nonlocal causal
        if (T, T) != (layer.T, layer.S):
            raise UnsupportedModelError(
                f"Layer {execution.name!r} attends from {layer.T} queries to {layer.S} keys, but "
                f"the text has {T} tokens: use ContributionWeights(model).attribute."
            )
        first = layer.mask.block(slice(0, 1))
        causal &= first is not None and not bool(first[..., 1:].any())
        return _scores(layer), *_maps(execution.name, layer, min(keys, T))

    inputs: dict[str, Any] = {"input_ids": ids.to(device_of(model))}
    if LOGITS in parameters_of(unwrapped(model)):
        inputs[LOGITS] = 0  # those of all positions
    results, output = method.observe(
        inputs, None, on_layer, one_text=True, show_progress=show_progress
    )
    scores, maps, heads = zip(*(result for _, result in results), strict=True)
    predicted, probability = _predictions(tokenizer, output, T) if causal else (None, None)
    return Explanation(
        tokens=readable_tokens(tokenizer, ids[0]),
        scores={name: torch.stack([x[name] for x in scores]).mean(0) for name in scores[0]},
        maps={name: torch.stack([x[name] for x in maps]).mean(0) for name in maps[0]},
        heads=heads if keys else (),
        predicted=predicted,
        probability=probability,
        settings={"model": _name(model), "space": space, "keys": keys},
    )


def _ids(tokenizer: Any, text: str | Tensor) -> Tensor:
    """``(1, T)``."""
    ids = tokenizer(text, return_tensors="pt").input_ids if isinstance(text, str) else text
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(
            f"The text has token ids of shape {tuple(ids.shape)}: give one text of one token or "
            "more."
        )
    return ids.long()


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _scores(layer: AttentionLayer) -> dict[str, Tensor]:
    """``(S,)`` each: means over heads, but ``"signed"`` a sum."""
    found = {
        name: functional.token_scores(layer, measure)[0].mean(0).cpu().float()
        for name, measure in MEASURES.items()
    }
    signed = functional.token_scores(layer, MEASURES["contribution"], signed=True)
    return {**found, SIGNED: signed[0].sum(0).cpu().float()}


def _maps(name: str, layer: AttentionLayer, K: int) -> tuple[dict[str, Tensor], HeadMaps]:
    """``(T, S)`` by measure, heads together, and the keys that matter most of each head."""
    H, T, S = layer.H, layer.T, layer.S
    maps = {measure: torch.zeros(T, S) for measure in (*MEASURES, SIGNED)}
    kept = {part: torch.zeros(H, T, K) for part in PARTS}
    places = torch.zeros(H, T, K, dtype=torch.int32)
    share = torch.zeros(H, T)
    factors = (functional.relative_norm, functional.cosine)
    for rows, found in map_blocks(layer, *MEASURES.values(), *factors):
        a, _, _, c, relative_norm, cosine = (x[0] for x in found)
        n = a.shape[-1]
        for measure, x in zip(MEASURES, found, strict=False):
            maps[measure][rows, :n] = x[0].abs().mean(0).cpu().float()
        maps[SIGNED][rows, :n] = c.sum(0).cpu().float()
        share[:, rows] = c.sum(-1).cpu().float()
        k = min(K, n)
        best = torch.maximum(_of_largest(a), _of_largest(c.abs())).topk(k, dim=-1).indices
        places[:, rows, :k] = best.cpu().int()
        for part, x in zip(PARTS, (a, relative_norm, cosine), strict=True):
            kept[part][:, rows, :k] = x.gather(-1, best).cpu().float()
    _, norm2 = layer.direction("inter")
    norm = norm2[0, 0].sqrt()
    if layer.scale is not None:
        norm = norm * layer.scale[0].abs()
    return maps, HeadMaps(name, places, **kept, output_norm=norm.cpu().float(), share=share)


def _of_largest(x: Tensor) -> Tensor:
    """Over the largest of its row; zero where all are."""
    return (x / x.amax(-1, keepdim=True)).nan_to_num(0)


def _predictions(
    tokenizer: Tokenizer, output: Any, T: int
) -> tuple[list[str] | None, Tensor | None]:
    """The likeliest next token at each place; None of a model that gives no such logits."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != (1, T):
        return None, None
    best = [row.float().softmax(-1).max(-1) for row in logits[0].split(64)]
    ids = torch.cat([x.indices for x in best]).cpu()
    known = ids.clamp(max=len(tokenizer) - 1)  # type: ignore[arg-type]  # they have a length
    return readable_tokens(tokenizer, known), torch.cat([x.values for x in best]).cpu()
