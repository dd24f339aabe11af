"""What a prediction is made of, for one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_cw import functional
from captum_cw.attr import TargetContributions
from captum_cw.capture import Execution
from captum_cw.capture.model import LOGITS, check_fits
from captum_cw.capture.outputs import predictions_of
from captum_cw.functional import TargetLayer, map_blocks
from captum_cw.measures import INPUT, TARGET
from captum_cw.text.prompts import leading
from captum_cw.text.tokens import readable_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Names",
    "Question",
    "TargetParts",
    "Wanted",
    "masked_position",
    "predicts",
    "target_parts",
]

Wanted = str | int | tuple[int, int] | None


@dataclass(frozen=True)
class Question:
    """Why this, and not that?

    Args:
        target: The target, as a text, a class's label, a number, or ``(position, number)``; None
            for the model's own prediction.
        contrast: What is subtracted; None for nothing.
    """

    target: Wanted = None
    contrast: Wanted = None

    @property
    def is_asked(self) -> bool:
        """Whether the user has asked it."""
        return self.target is not None or self.contrast is not None


@dataclass(frozen=True)
class TargetParts:
    """Contributions to a target.

    Args:
        scores: ``(T,)`` by values and by inputs, by the name of the measure.
        map: What each key adds at each query, summed over heads and layers, ``(T, T)``.
        effects: What each head of a layer adds over all queries and keys of the text, ``(H,)`` for
            each layer.
        settings: The target and its contrast, their probabilities, and their difference in logits,
            for readers.
    """

    scores: dict[str, Tensor]
    map: Tensor
    effects: list[Tensor]
    settings: dict[str, Any]


def target_parts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    output: Any,
    question: Question,
    *,
    causal: bool,
) -> TargetParts:
    """Return the contributions of the tokens of one text to a target.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        inputs: The arguments of the model for one text.
        output: The output of the model for these arguments.
        question: The target and its contrast.
        causal: Whether tokens do not see later ones.

    Raises:
        ValueError: If a target is not one of the model's tokens or classes.
        TypeError: If the model does not return logits.
        UnsupportedModelError: If the contributions do not sum to the target.
    """
    ids = inputs["input_ids"]
    T = ids.shape[1]
    logits = predictions_of(output)
    names = Names(model, tokenizer, logits)
    position = masked_position(tokenizer, ids) if logits.dim() == 3 else None
    placed = causal or position is not None or isinstance(question.target, tuple)
    if names.predicts_tokens and not placed:
        raise ValueError(
            f"{type(model).__name__} predicts masked tokens, but the text does not have exactly "
            f"one {tokenizer.mask_token!r}: put it where the target belongs, or give the target as "
            "(position, number)."
        )
    check_fits(8 * T * T, torch.device("cpu"), f"a map of {T} x {T}", "Explain a shorter text.")
    total = torch.zeros(T, T, dtype=torch.float32, device="cpu")
    effects: list[Tensor] = []

    def add(execution: Execution, layer: TargetLayer) -> None:
        skipped, hidden = leading(execution, layer, T, None)
        effect = layer.value.new_zeros(layer.H)
        for rows, (t,) in map_blocks(layer, functional.target):
            first = max(rows.start, skipped)
            of_heads = t[0, :, first - rows.start :, hidden:]
            effect += of_heads.sum((-2, -1))
            block = of_heads.sum(0)
            queries = slice(first - skipped, first - skipped + len(block))
            total[queries, : block.shape[-1]] += block.cpu().float()
        effects.append(effect.cpu().float())

    found = TargetContributions(model).run(
        {name: x for name, x in inputs.items() if name != LOGITS},
        None,
        add,
        target=names.number(question.target, position),
        contrast=None if question.contrast is None else names.number(question.contrast, position),
        text_only=True,
    )
    settings: dict[str, Any] = {**names.described("target", question.target, position)}
    if question.contrast is not None:
        settings |= names.described("contrast", question.contrast, position)
    asked = names.position(question.target, position, T)
    if asked is not None:
        settings["target position"] = asked
    settings["target value"] = f"{found.values.item():.4g}"
    hint = names.hint(question.target, position)
    if hint is not None:
        settings["hint"] = hint
    scores = {TARGET: total.sum(0)}
    share = found.shares.get("input_ids")
    if share is not None:
        scores[INPUT] = share[0].cpu()
    return TargetParts(scores, total, effects, settings)


def predicts(tokenizer: PreTrainedTokenizerBase, ids: Tensor, output: Any, *, causal: bool) -> bool:
    """Whether a model predicts a class, the next token, or the one masked token of a text.

    Args:
        tokenizer: The tokenizer.
        ids: The ids of the text, ``(1, T)``.
        output: The output of the model.
        causal: Whether tokens do not see later ones.
    """
    try:
        logits = predictions_of(output)
    except TypeError:
        return False
    if logits.dim() == 2:
        return True
    of_tokens = logits.shape[-1] >= len(tokenizer)
    return of_tokens and (causal or masked_position(tokenizer, ids) is not None)


def masked_position(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> int | None:
    """Return the position of the one masked token of a text; None without one."""
    mask = getattr(tokenizer, "mask_token_id", None)
    places = [] if mask is None else (ids[0] == mask).nonzero()[:, 0].tolist()
    return places[0] if len(places) == 1 else None


class Names:
    """The names of a model's classes or tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        logits: Its logits, ``(1, C)`` or ``(1, T, V)``.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, logits: Tensor
    ) -> None:
        self.tokenizer, self.logits = tokenizer, logits
        config = getattr(model, "config", None)
        self.labels: dict[str, int] = dict(getattr(config, "label2id", None) or {})
        kind = getattr(config, "problem_type", None)
        self.exclusive = kind not in ("multi_label_classification", "regression")
        self.predicts_tokens = logits.dim() == 3 and logits.shape[-1] >= len(tokenizer)

    def number(self, wanted: Wanted, position: int | None) -> Any:
        """Return a target as a number, or with its position."""
        if isinstance(wanted, str):
            wanted = self._number_of(wanted)
        if position is None or isinstance(wanted, tuple):
            return wanted
        return position, wanted

    def position(self, wanted: Wanted, position: int | None, T: int) -> int | None:
        """Return the position of a target in a text of ``T`` tokens; None if it has none."""
        if self.logits.dim() == 2:
            return None
        number = self.number(wanted, position)
        found = number[0] if isinstance(number, tuple) else self.logits.shape[1] - 1
        found = int(found) % self.logits.shape[1] - (self.logits.shape[1] - T)
        return found if found >= 0 else None

    def described(self, role: str, wanted: Wanted, position: int | None) -> dict[str, str]:
        """Return a target for readers, and its probability if there is only one right class.

        Args:
            role: What the keys are named after, ``"target"`` or ``"contrast"``.
            wanted: The target; None is the model's own prediction.
            position: The position of a target that does not have one; None is the last.
        """
        number = self.number(wanted, position)
        if isinstance(number, tuple):
            position, number = number
        logits = self.logits[0].float()
        if logits.dim() == 2:
            logits = logits[-1 if position is None else position]
        if number is None:
            number = int(logits.argmax())
        described = {role: self._readable(number)}
        if self.exclusive and len(logits) > 1:
            described[f"{role} probability"] = f"{logits.softmax(-1)[number].item():.4g}"
        return described

    def hint(self, wanted: Wanted, position: int | None) -> str | None:
        """Return what to write if a word is much likelier with a space before it."""
        if not (self.predicts_tokens and isinstance(wanted, str)) or wanted[:1].isspace():
            return None
        spaced = f" {wanted}"
        given, better = (
            float(self.described("target", text, position)["target probability"])
            for text in (wanted, spaced)
        )
        if better < 10 * given:
            return None
        return (
            f"{spaced!r}, with a space before the word, has probability {better:.3g}: did you mean "
            f"{spaced!r}?"
        )

    def _readable(self, number: int) -> str:
        if self.predicts_tokens:
            return readable_ids(
                self.tokenizer, torch.tensor([number], dtype=torch.long, device="cpu")
            )[0]
        named = [label for label, value in self.labels.items() if value == number]
        return named[0] if named else str(number)

    def _number_of(self, wanted: str) -> int:
        if not self.predicts_tokens:
            if wanted in self.labels:
                return self.labels[wanted]
            raise ValueError(
                f"{wanted!r} is not a class of the model: its classes are {[*self.labels]}."
            )
        ids = self.tokenizer.encode(wanted, add_special_tokens=False)
        if not ids:
            raise ValueError(f"{wanted!r} has no tokens: give a word as target or contrast.")
        return int(ids[0])
