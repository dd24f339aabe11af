"""What predictions are made of, by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_cw import functional
from captum_cw.attr import TargetContributions
from captum_cw.capture import Execution
from captum_cw.capture.model import LOGITS, check_fits
from captum_cw.capture.outputs import predictions_of
from captum_cw.explanation.shares import in_percent, with_meaning
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

CPU = torch.device("cpu")
#: The number of other predictions that are named.
OTHERS = 3

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
    questions: Sequence[Question],
    lengths: Sequence[int],
    *,
    causal: bool,
) -> list[TargetParts]:
    """Return the contributions of the tokens of some texts to a target of each.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        inputs: The arguments of the model, with texts that are padded on the right.
        output: The output of the model for these arguments.
        questions: The target of each text and its contrast. Either all have one, or none.
        lengths: The number of tokens of each text.
        causal: Whether tokens do not see later ones.

    Raises:
        ValueError: If a target is not one of the model's tokens or classes.
        TypeError: If the model does not return logits.
        UnsupportedModelError: If the contributions do not sum to the target.
    """
    texts = [
        _OneTarget(model, tokenizer, ids[None, :T], logits[None], question, causal=causal)
        for ids, logits, question, T in zip(
            inputs["input_ids"], _logits(output, lengths), questions, lengths, strict=True
        )
    ]
    needed = sum(8 * T * T for T in lengths)
    longest = max(lengths)
    check_fits(needed, CPU, f"a map of {longest} x {longest}", "Explain a shorter text.")

    def add(execution: Execution, layer: TargetLayer) -> None:
        skipped, hidden = leading(execution, layer, longest, None)
        for text in texts:
            text.begin(layer.H, layer.value.device)
        for rows, (t,) in map_blocks(layer, functional.target):
            for text, block in zip(texts, t, strict=True):
                text.add(block, rows, skipped, hidden)

    for text in texts:
        text.names.check_differ(text.question)
    contrasts = [text.number(text.question.contrast) for text in texts]
    found = TargetContributions(model).run(
        {name: x for name, x in inputs.items() if name != LOGITS},
        None,
        add,
        target=_for_all([text.number(text.question.target) for text in texts]),
        contrast=None if questions[0].contrast is None else _for_all(contrasts),
        text_only=True,
    )
    shares = found.shares.get("input_ids")
    return [
        text.parts(found.values[b], None if shares is None else shares[b, : text.T])
        for b, text in enumerate(texts)
    ]


def _logits(output: Any, lengths: Sequence[int]) -> list[Tensor]:
    """Return the logits of each text, ``(C,)`` or ``(T, V)``, without padding at its end."""
    logits = predictions_of(output)
    if logits.dim() == 2:
        return list(logits)
    padding = max(lengths)
    return [x[: len(x) - (padding - T)] for x, T in zip(logits, lengths, strict=True)]


def _for_all(numbers: list[Any]) -> Any:
    """Return the targets of a batch, or that of one text alone."""
    if len(numbers) == 1 or all(number is None for number in numbers):
        return numbers[0]
    return numbers


def _token_of(number: Any) -> int:
    """Return the token of a target, which may have a position."""
    return int(number[1] if isinstance(number, tuple) else number)


class _OneTarget:
    """The target of one text, and what its tokens add to it."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        logits: Tensor,
        question: Question,
        *,
        causal: bool,
    ) -> None:
        self.T, self.question = ids.shape[1], question
        self.names = Names(model, tokenizer, logits)
        self.position = masked_position(tokenizer, ids) if logits.dim() == 3 else None
        placed = causal or self.position is not None or isinstance(question.target, tuple)
        if self.names.predicts_tokens and not placed:
            raise ValueError(
                f"{type(model).__name__} predicts masked tokens, but the text does not have "
                f"exactly one {tokenizer.mask_token!r}: put it where the target belongs, or give "
                "the target as (position, number)."
            )
        self.map = torch.zeros(self.T, self.T, dtype=torch.float32, device=CPU)
        self._effects: list[Tensor] = []

    def number(self, wanted: Wanted) -> Any:
        """Return a target as a number, or with its position."""
        return self.names.number(wanted, self.position)

    def begin(self, H: int, device: torch.device) -> None:
        """Begin a layer of ``H`` heads."""
        self._effects.append(torch.zeros(H, dtype=torch.float32, device=device))

    def add(self, block: Tensor, rows: slice, skipped: int, hidden: int) -> None:
        """Add a block of queries ``(H, t, n)`` of a layer; see :meth:`TextSums.add`."""
        first, stop = max(rows.start, skipped), min(rows.stop, skipped + self.T)
        if first >= stop:
            return
        block = block[:, first - rows.start : stop - rows.start, hidden : hidden + self.T]
        self._effects[-1] += block.sum((-2, -1))
        queries = slice(first - skipped, stop - skipped)
        self.map[queries, : block.shape[-1]] += block.sum(0).cpu().float()

    def parts(self, value: Tensor, share: Tensor | None) -> TargetParts:
        """Return the contributions, with the target's value and the shares of inputs ``(T,)``."""
        names, target, contrast = self.names, self.question.target, self.question.contrast
        settings: dict[str, Any] = {**names.described("target", target, self.position)}
        if contrast is not None:
            settings |= names.described("contrast", contrast, self.position)
        asked = names.position(target, self.position, self.T)
        if asked is not None:
            settings["target position"] = asked
        others = names.others([target, contrast], self.position)
        if others:
            settings["other predictions"] = others
        settings |= names.rivals(target, self.position)
        settings["target value"] = f"{value.item():.4g}"
        hint = names.hint(target, self.position)
        if hint is not None:
            settings["hint"] = hint
        scores = {TARGET: self.map.sum(0)}
        if share is not None:
            scores[INPUT] = share.cpu()
        effects = [effect.cpu().float() for effect in self._effects]
        return TargetParts(scores, self.map, effects, settings)


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
        # A config may have only one of the two, or keep a default beside a name of its own.
        named = {name: int(n) for n, name in (getattr(config, "id2label", None) or {}).items()}
        self.labels: dict[str, int] = {**named, **(getattr(config, "label2id", None) or {})}
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

    def check_differ(self, question: Question) -> None:
        """Raise a ValueError if a target and its contrast are one class or token."""
        target, contrast = question.target, question.contrast
        if not (isinstance(target, (str, int)) and isinstance(contrast, (str, int))):
            return
        number = self.number(target, None)
        if number != self.number(contrast, None):
            return
        if isinstance(target, str) and isinstance(contrast, str) and target != contrast:
            raise ValueError(
                f"{target!r} and {contrast!r} begin with the same token "
                f"{self._readable(number)!r}: add it to the end of the text, or use "
                "LLMTokenAttribution, which explains the first token in which two outputs differ."
            )
        raise ValueError(
            f"The target {target!r} and the contrast {contrast!r} are the same, so their "
            "difference is zero: give another contrast, or none."
        )

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
        logits = self._logits_at(number, position)
        if isinstance(number, tuple):
            number = number[1]
        if number is None:
            number = int(logits.argmax())
        described = {role: self._readable(number)}
        if self.exclusive and len(logits) > 1:
            described[f"{role} probability"] = f"{logits.softmax(-1)[number].item():.4g}"
        return described

    def _logits_at(self, number: Any, position: int | None) -> Tensor:
        """Return the logits ``(C,)`` at the position of a target; without one, the last."""
        logits = self.logits[0].float()
        if logits.dim() == 1:
            return logits
        position = number[0] if isinstance(number, tuple) else position
        return logits[-1 if position is None else position]

    def others(self, named: Sequence[Wanted], position: int | None) -> str:
        """Return the likeliest other predictions, for readers; "" if there is no right one.

        The model's own prediction is none of them; :meth:`rivals` has it.

        Args:
            named: The target and its contrast.
            position: The position of a target that does not have one; None is the last.
        """
        logits = self._logits_at(self.number(named[0], position), position)
        if not self.exclusive or len(logits) < 2:
            return ""
        best = logits.topk(min(OTHERS + 3, len(logits))).indices.tolist()
        known = {self._readable(best[0])}
        for x in named:
            found = None if x is None else self.number(x, None)
            known |= set() if found is None else {self._readable(_token_of(found))}
        left = [number for number in best if self._readable(number) not in known][:OTHERS]
        chances = logits.softmax(-1)
        return ", ".join(f"{self._quoted(n)} {in_percent(chances[n].item())}" for n in left)

    def rivals(self, wanted: Wanted, position: int | None) -> dict[str, str]:
        """Return the probability of the best other answer than the target, for readers.

        If the model prefers it, its name is there too. The result is empty if no single answer is
        right.
        """
        number = self.number(wanted, position)
        logits = self._logits_at(number, position)
        if not self.exclusive or len(logits) < 2:
            return {}
        best = logits.topk(min(3, len(logits))).indices.tolist()
        own = self._readable(best[0] if wanted is None else _token_of(number))
        chances = logits.softmax(-1)
        other = next((n for n in best if self._readable(n) != own), None)
        if other is None:
            return {}
        rivals = {"best other probability": f"{chances[other].item():.4g}"}
        if other == best[0]:
            told = f"{self._quoted(other)} ({in_percent(chances[other].item())})"
            rivals["model's prediction"] = told
        return rivals

    def _quoted(self, number: int) -> str:
        return with_meaning(self._readable(number))

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
