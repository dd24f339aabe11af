"""The scores of many texts by one measure, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from captum_cw.attr import InputContributions, TokenScores
from captum_cw.attr.llm import output_scores
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.outputs import predictions_of
from captum_cw.explanation.target import Names, Question, Wanted, masked_position
from captum_cw.functional import Reduction
from captum_cw.measures import TARGET, Entry
from captum_cw.text.tokens import readable_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BatchScorer", "ScoredText"]


@dataclass(frozen=True)
class ScoredText:
    """The scores of one text.

    Args:
        scores: ``(T,)``, float32, on the CPU.
        target: The target and its contrast, with their probabilities, as in the settings of an
            explanation; empty for measures of layers.
    """

    scores: Tensor
    target: Mapping[str, str]


class BatchScorer:
    """Scores the tokens of batches of texts, as the command line scores one text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        entry: The measure.
        reduction: The reduction over queries, for measures of layers.
        question: The target and its contrast, for measures of a target.
        output: The output of the model for any text; it shows what the model predicts.
        causal: Whether tokens do not see later ones.

    Attributes:
        needs_mask: Whether each text needs exactly one masked token, which is explained.

    Raises:
        ValueError: If the target or its contrast is not one token or class of the model.

    Example:
        >>> from captum_cw.measures import find
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        >>> entry = find("target")
        >>> question = Question(target="Paris", contrast="cold")
        >>> scorer = BatchScorer(model, tokenizer, entry, "mean", question, model(ids), causal=True)
        >>> (text,) = scorer.score(batch)
        >>> text.scores.shape, text.target["contrast"]
        (torch.Size([5]), ' cold')
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        entry: Entry,
        reduction: Reduction,
        question: Question,
        output: Any,
        *,
        causal: bool,
    ) -> None:
        self.model, self.tokenizer, self.question = model, tokenizer, question
        self._measure: Any = entry.of_model(model)
        self._explains_target = entry.explains_target
        self.needs_mask = False
        if not entry.explains_target:
            self._scorer = TokenScores(self._measure, reduction)
            return
        names = Names(model, tokenizer, predictions_of(output))
        self.needs_mask = names.predicts_tokens and not causal
        self._target = self._number(names, question.target)
        self._contrast = self._number(names, question.contrast)
        names.check_differ(question)
        if isinstance(self._measure, InputContributions):
            return  # they are scores of tokens already
        if entry.name == TARGET or question.target is not None:
            self._scorer = output_scores(self._measure)
        else:
            self._scorer = TokenScores(self._measure, "sum")

    def score(self, batch: Mapping[str, Tensor]) -> list[ScoredText]:
        """Return the scores of each text of a batch.

        Args:
            batch: ``input_ids`` ``(B, T)`` and ``attention_mask`` ``(B, T)`` on the model's device,
                padded on the right.

        Raises:
            ValueError: If a masked language model is asked for a target, and a text does not have
                exactly one masked token.
            UnsupportedModelError: If the model has tokens of its own beside those of the text.
                Other errors are those of the measure.
        """
        ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
        targets: Sequence[Mapping[str, str]] = [{}] * len(ids)
        if self._explains_target:
            scores, targets = self._of_target(batch, lengths)
        else:
            scores = self._scorer.attribute(dict(batch))
        if scores.shape != ids.shape:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returns scores {tuple(scores.shape)} for tokens "
                f"{tuple(ids.shape)}: explain its texts one by one."
            )
        scores = scores.float().cpu()
        found = zip(scores, lengths, targets, strict=True)
        return [ScoredText(row[:length], target) for row, length, target in found]

    def _of_target(
        self, batch: Mapping[str, Tensor], lengths: Sequence[int]
    ) -> tuple[Tensor, list[Mapping[str, str]]]:
        """Return the scores ``(B, T)``, and the target of each text."""
        positions = [length - 1 for length in lengths]
        if self.needs_mask:
            positions = [self._masked(ids) for ids in batch["input_ids"]]
        target, contrast = (self._placed(x, positions) for x in (self._target, self._contrast))
        contrast = None if self.question.contrast is None else contrast
        if isinstance(self._measure, InputContributions):
            found = self._measure.target_runner.run(batch, target=target, contrast=contrast)
            scores, output = found.shares["input_ids"], found.output
        else:
            scores, output = self._scorer.of_target(batch, target, contrast)
        logits = predictions_of(output)
        return scores, [self._described(logits[b], p) for b, p in enumerate(positions)]

    def _placed(self, number: int | None, positions: Sequence[int]) -> Any:
        """Return a target of a batch; that of a masked language model has positions."""
        return [(position, number) for position in positions] if self.needs_mask else number

    def _masked(self, ids: Tensor) -> int:
        position = masked_position(self.tokenizer, ids[None])
        if position is None:
            raise ValueError(
                f"{type(self.model).__name__} predicts masked tokens, but a text of the batch does "
                f"not have exactly one {self.tokenizer.mask_token!r}: put one into each text."
            )
        return position

    def _described(self, logits: Tensor, position: int) -> Mapping[str, str]:
        """Describe the target of one text; the logits are ``(C,)``, ``(1, V)`` or ``(T, V)``."""
        if logits.dim() == 2 and len(logits) > 1:
            logits = logits[position, None]
        names = Names(self.model, self.tokenizer, logits[None])
        described = names.described("target", self.question.target, None)
        if self.question.contrast is not None:
            described |= names.described("contrast", self.question.contrast, None)
        return described

    def _number(self, names: Names, wanted: Wanted) -> int | None:
        """Return a target as the number of a token or class."""
        if names.predicts_tokens and isinstance(wanted, str):
            ids = self.tokenizer.encode(wanted, add_special_tokens=False)
            if len(ids) > 1:
                words = readable_ids(self.tokenizer, ids)
                raise ValueError(
                    f"{wanted!r} has {len(ids)} tokens {words}, but a set of texts is explained "
                    "for one token: give its first token, or explain texts one by one."
                )
        number: int | None = names.number(wanted, None)
        return number
