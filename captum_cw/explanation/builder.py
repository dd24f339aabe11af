"""Explain texts: their predictions, and all measures of all layers and heads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from captum_cw._utils.progress import progress_bar
from captum_cw._utils.versions import versions
from captum_cw.attr import ContributionWeights
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.model import LOGITS, parameters_of, unwrapped
from captum_cw.capture.outputs import logits_of
from captum_cw.data import groups_by_length, padded_batch
from captum_cw.explanation.explanation import Explanation
from captum_cw.explanation.heads import HeadMaps
from captum_cw.explanation.sums import Layers
from captum_cw.explanation.target import (
    Question,
    TargetParts,
    Wanted,
    predicts,
    target_parts,
)
from captum_cw.functional import Space
from captum_cw.measures import TARGET
from captum_cw.text.prompts import Text, model_inputs, read_text
from captum_cw.text.templates import Encoded
from captum_cw.text.tokens import check_tokenizer, readable_ids, readable_tokens, word_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["explain"]

#: The most tokens of a batch of texts, padding included.
BATCH_TOKENS = 1024


@overload
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
) -> Explanation: ...


@overload
def explain(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[Text],
    *,
    target: Wanted | list[Wanted] = None,
    contrast: Wanted | list[Wanted] = None,
    top_k: int = 32,
    space: Space = "attention",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> list[Explanation]: ...


def explain(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | Sequence[Text],
    *,
    target: Wanted | list[Wanted] = None,
    contrast: Wanted | list[Wanted] = None,
    top_k: int = 32,
    space: Space = "attention",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> Explanation | list[Explanation]:
    """Explain a text: what its prediction is made of, and all measures by layer and head.

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
            ``(T,)`` or ``(1, T)``. Padding is not allowed. A chat ends where the model's answer
            begins if its last message is of the user, a tool or the system. Or a list of these:
            texts of similar length then run as one batch. A list of dicts with roles is one chat.
        target: Why this? A text, of which the first token counts (mind the leading space); the
            label or number of a class; a token's number; or ``(position, number)``. None is the
            model's own prediction: after the last token, or at the only masked token. For a list of
            texts it may be a list, with one for each text.
        contrast: And why not this? It is subtracted from the target.
        top_k: The number of keys to keep for each query of each head; with 0 there are no heads.
        space: Where outputs are measured; see :class:`~captum_cw.ContributionWeights`.
        chat_template_kwargs: Further arguments of the chat template, such as
            ``{"enable_thinking": False}``. Only for the messages of a chat.
        show_progress: Whether to show a progress bar over the layers, or over the texts of a list,
            after two seconds.

    Returns:
        The explanation, or a list with one for each text, with all tensors on the CPU. The
        ``settings`` name the target and the contrast, with their probabilities and the difference
        of their logits.

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
    _check(model, tokenizer)
    several = _are_texts(text)
    texts: Any = text if several else [text]
    targets = _each("target", target, len(texts), several)
    contrasts = _each("contrast", contrast, len(texts), several)
    explainer = _Explainer(model, tokenizer, top_k, space)
    prompts = []
    for x, question in zip(texts, map(Question, targets, contrasts), strict=True):
        read = read_text(
            tokenizer,
            x,
            add_generation_prompt=_awaits_answer(x),
            chat_template_kwargs=chat_template_kwargs,
        )
        prompts.append(_Prompt(read, model_inputs(model, tokenizer, read), question))
    if not several:
        return explainer.explain(prompts, show_progress)[0]
    found: dict[int, Explanation] = {}
    with progress_bar(len(texts), "Texts", show=show_progress) as bar:
        for group in _groups(prompts):
            explained = explainer.explain([prompts[n] for n in group], show_progress=False)
            found.update(zip(group, explained, strict=True))
            bar.update(len(group))
    return [found[n] for n in range(len(texts))]


def _check(model: Any, tokenizer: Any) -> None:
    """Raise an error if a model cannot be explained, or is not a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: give a torch.nn.Module.")
    check_tokenizer(tokenizer)
    if "decoder_input_ids" in parameters_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder, which read two texts: use "
            "ContributionWeights(model, kind='cross') with input_ids and decoder_input_ids, and "
            "Explanation.from_maps."
        )


def _are_texts(given: Any) -> bool:
    """Whether a list has several texts. A pair of texts and the messages of a chat are one."""
    if not isinstance(given, (list, tuple)) or not given:
        return False
    pair = isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, str) for x in given)
    if isinstance(given[0], Mapping):  # arguments of the model, or a message
        return "input_ids" in given[0]
    return not pair and not isinstance(given[0], int)


def _awaits_answer(text: Any) -> bool:
    """Whether a text is a chat in which the model writes the next message."""
    last = text[-1] if isinstance(text, (list, tuple)) and text else None
    return isinstance(last, Mapping) and last.get("role") in ("user", "tool", "system")


def _each(name: str, wanted: Any, count: int, several: bool) -> list[Wanted]:
    """Return a target for each text: one for all, or a list of one for each."""
    if not isinstance(wanted, list):
        return [wanted] * count
    if not several or len(wanted) != count:
        raise ValueError(
            f"{name} is a list of {len(wanted)}, but the number of texts is {count}: give one "
            f"{name} for all, or a list with one for each text of a list."
        )
    return wanted


@dataclass(frozen=True)
class _Prompt:
    """One text as the model reads it, and what is asked about it."""

    read: Encoded
    inputs: dict[str, Any]
    question: Question

    @property
    def T(self) -> int:
        return self.read.ids.shape[1]

    @property
    def fits_a_batch(self) -> bool:
        """Whether it can be padded: the model reads nothing but tokens."""
        known = {"input_ids", "attention_mask", "token_type_ids"}
        shapes = {x.shape for x in self.inputs.values() if isinstance(x, Tensor)}
        return self.inputs.keys() <= known and shapes == {(1, self.T)}


def _groups(prompts: Sequence[_Prompt]) -> list[list[int]]:
    """Return the texts of each batch. Texts that cannot be padded are alone."""
    kinds: dict[Any, list[int]] = {}
    for n, prompt in enumerate(prompts):
        kind = (*prompt.inputs, prompt.question.contrast is None) if prompt.fits_a_batch else n
        kinds.setdefault(kind, []).append(n)
    return [
        [numbers[place] for place in group]
        for numbers in kinds.values()
        for group in groups_by_length([prompts[n].T for n in numbers], BATCH_TOKENS)
    ]


@dataclass(frozen=True)
class _Explainer:
    """Explains batches of texts with one model."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    top_k: int
    space: Space

    def explain(self, prompts: Sequence[_Prompt], show_progress: bool) -> list[Explanation]:
        """Explain texts in one pass for the layers, and one for the predictions."""
        inputs = self._batch(prompts)
        if LOGITS in parameters_of(self.model):
            inputs[LOGITS] = 0  # asks for the logits of all positions
        layers = Layers(self.model, [x.T for x in prompts], self.top_k)
        _, output = ContributionWeights(self.model, space=self.space).observe(
            inputs,
            None,
            layers.add,
            one_text=len(prompts) == 1,
            text_only=True,
            show_progress=show_progress,
        )
        targets = self._targets(prompts, inputs, output, layers.causal)
        return [
            self._explanation(prompt, b, layers, output, parts)
            for b, (prompt, parts) in enumerate(zip(prompts, targets, strict=True))
        ]

    def _batch(self, prompts: Sequence[_Prompt]) -> dict[str, Any]:
        """Return the inputs of the model, padded on the right."""
        if len(prompts) == 1:
            return dict(prompts[0].inputs)
        rows = [prompt.inputs["input_ids"][0] for prompt in prompts]
        batch: dict[str, Any] = padded_batch(rows, self.tokenizer)
        if "token_type_ids" in prompts[0].inputs:
            kinds = [prompt.inputs["token_type_ids"][0] for prompt in prompts]
            batch["token_type_ids"] = pad_sequence(kinds, batch_first=True)
        return batch

    def _targets(
        self, prompts: Sequence[_Prompt], inputs: Mapping[str, Any], output: Any, causal: bool
    ) -> Sequence[TargetParts | None]:
        """Return contributions to predictions; None where they are unknown, and nobody asked."""
        asked = any(prompt.question.is_asked for prompt in prompts)
        nothing = [None] * len(prompts)
        if not asked and not all(
            predicts(self.tokenizer, prompt.inputs["input_ids"], output, causal=causal)
            for prompt in prompts
        ):
            return nothing
        questions, lengths = [x.question for x in prompts], [x.T for x in prompts]
        try:
            return target_parts(
                self.model, self.tokenizer, inputs, output, questions, lengths, causal=causal
            )
        except (UnsupportedModelError, ValueError) as error:  # ValueError: no gradient
            if asked:
                raise
            warnings.warn(f"Contributions to the prediction are left out. {error}", stacklevel=4)
            return nothing

    def _explanation(
        self, prompt: _Prompt, b: int, layers: Layers, output: Any, parts: TargetParts | None
    ) -> Explanation:
        """Put the parts of one text together."""
        text, ids = layers.texts[b], prompt.read.ids[0]
        predicted, probability = None, None
        if layers.causal:
            predicted, probability = _predictions(
                self.model, self.tokenizer, output, b, layers.T, text.T
            )
        scores, maps = text.means()
        heads: Sequence[HeadMaps] = text.heads if self.top_k else ()
        settings = {"model": _name(self.model), "space": self.space, "top_k": self.top_k}
        settings |= versions()
        if parts is not None:
            scores, maps = {**parts.scores, **scores}, {TARGET: parts.map, **maps}
            settings = {**parts.settings, **settings}
            if [len(x) for x in parts.effects] == [len(x.share) for x in heads]:
                pairs = zip(heads, parts.effects, strict=True)
                heads = [replace(layer, effect=effect) for layer, effect in pairs]
        return Explanation(
            tokens=readable_tokens(self.tokenizer, ids),
            scores=scores,
            maps=maps,
            heads=heads,
            predicted=predicted,
            probability=probability,
            words=word_numbers(self.tokenizer, ids),
            text=prompt.read.text,
            offsets=prompt.read.offsets,
            messages=prompt.read.messages,
            settings=settings,
        )


def _name(model: nn.Module) -> str:
    """Return the name of a model; for a local folder, without the path to it."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).exists() else name


def _predictions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, output: Any, b: int, longest: int, T: int
) -> tuple[list[str] | None, Tensor | None]:
    """Return the likeliest next token at each position; None if the model does not predict it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        output: The output of the model for a batch.
        b: The number of the text in the batch.
        longest: The number of tokens of the longest text.
        T: The number of tokens of this one.
    """
    try:
        logits = logits_of(output)[b : b + 1, -longest:][:, :T]
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
