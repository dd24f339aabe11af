"""Scores of the input tokens for each output token, in Captum's own result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw._utils.progress import progress_bar
from captum_cw._utils.suggestions import kind
from captum_cw.attr._captum import BaseLLMAttribution, TextTemplateInput, TextTokenInput
from captum_cw.attr.chat import ChatTokenInput, EncodedTokenInput
from captum_cw.attr.measures import AttentionAttribution, refuse_target
from captum_cw.attr.token_scores import TokenScores
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.model import LOGITS, device_of, evaluation_mode, parameters_of
from captum_cw.capture.outputs import logits_of
from captum_cw.text.prompts import Text, extended, model_inputs, read_text
from captum_cw.text.templates import Encoded, encode, owners, places_of
from captum_cw.text.tokens import check_tokenizer, readable_ids

__all__ = ["LLMTokenAttribution"]

#: Captum's default arguments of ``generate``.
_GENERATION = {"max_new_tokens": 25, "do_sample": False, "temperature": None, "top_p": None}


class LLMTokenAttributionResult(LLMAttributionResult):  # type: ignore[misc]  # captum has no types for it
    """Captum's result with readable tokens, and with the ids of the output, ``(m,)``."""

    def __init__(self, *, output_ids: Tensor, **parts: Any) -> None:
        super().__init__(**parts)
        self.output_ids = output_ids


class LLMTokenAttribution(BaseLLMAttribution):  # type: ignore[misc]  # captum has no types for it
    """Scores of the input tokens for each output token, from one forward pass over both.

    :class:`~captum_cw.TargetContributions` need one forward and backward pass for each output
    token, and can have a ``contrast``. By default their signed values are summed over queries,
    heads and layers, in the unit of the logits.

    The result and its plots are those of Captum's ``LLMAttribution``.

    Args:
        attr_method: A measure, or a :class:`~captum_cw.TokenScores` around one, whose ``heads``,
            ``layers`` and ``signed`` count, and its ``reduction`` for measures of a target. Its
            ``forward_func`` must be the model itself.
        tokenizer: The model's tokenizer.

    Raises:
        TypeError: If ``attr_method`` or ``tokenizer`` is of another type, or ``attr_method`` does
            not hold a model.
        UnsupportedModelError: If the model has an encoder and a decoder.

    Example:
        >>> llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
        >>> result = llm.attribute("The capital of France is", target=" Paris")
        >>> result.token_attr.shape, result.seq_attr.shape
        (torch.Size([1, 5]), torch.Size([5]))
        >>> from captum.attr import TextTemplateInput
        >>> template = TextTemplateInput("The {} of {} is", ["capital", "France"])
        >>> llm.attribute(template, target=" Paris").token_attr.shape
        torch.Size([1, 2])
    """

    SUPPORTED_METHODS = (TokenScores,)
    SUPPORTED_INPUTS = (TextTokenInput, TextTemplateInput)

    def __init__(self, attr_method: TokenScores | AttentionAttribution, tokenizer: Any) -> None:
        if isinstance(attr_method, AttentionAttribution):
            attr_method = output_scores(attr_method)
        if not isinstance(attr_method, TokenScores):
            raise TypeError(
                f"attr_method is {kind(attr_method)}: give a measure, such as "
                "ContributionWeights(model), or TokenScores around one."
            )
        if not isinstance(attr_method.forward_func, torch.nn.Module):
            raise TypeError("The forward_func of attr_method must be the model, to generate text.")
        if getattr(getattr(attr_method.forward_func, "config", None), "is_encoder_decoder", False):
            raise UnsupportedModelError(
                "The model has an encoder and a decoder, so prompt and output are not one text: "
                "use TokenScores(ContributionWeights(model, kind='cross'), queries=position) with "
                "input_ids and decoder_input_ids."
            )
        check_tokenizer(tokenizer)
        super().__init__(attr_method, tokenizer)
        self.attr_method = attr_method
        self.device = device_of(self.model)

    def attribute(
        self,
        inp: Text | TextTokenInput | TextTemplateInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        contrast: str | Tensor | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        show_progress: bool = False,
    ) -> LLMAttributionResult:
        """Return the scores of the input tokens at the positions that predict the output tokens.

        The features of Captum's ``TextTemplateInput`` are its values, and the score of a value is
        the sum over its tokens. A token belongs to the value, or the text between values, that
        holds most of its characters without white space; in a tie, to the first. Values that a
        ``mask`` groups each have the score of their group. Baselines do not matter, since nothing
        is ablated.

        Scores are those of the prompt's own tokens, without learned virtual tokens (prompt or
        prefix tuning). In a model of images and text, only the layers over the text count, unless
        the measure has a ``layer``. Dropout is off, also during generation.

        Args:
            inp: The prompt. A text; the messages of a chat (see
                :class:`~captum_cw.ChatTokenInput`), to which the tokenizer's chat template is
                applied; the tokenizer's output for one text, or a dict of the model's arguments,
                whose mask and token types are continued over the output, and whose
                ``pixel_values`` stay the same; token ids ``(n,)``; or Captum's ``TextTokenInput``
                (the result leaves out the tokens that it skips) or ``TextTemplateInput``.
            target: The output, as text or token ids ``(m,)``; None generates it.
            gen_args: Arguments for ``model.generate``; only without ``target``.
            contrast: An output that the model did not give, as text or token ids, for
                :class:`~captum_cw.TargetContributions`: why ``target``, and not this? The result
                has one output token, the first at which the two differ. What both begin with
                counts as given.
            chat_template_kwargs: Further arguments for the chat template, such as
                ``{"enable_thinking": False}``; only for the messages of a chat.
            show_progress: Whether to show a progress bar over the layers after two seconds.

        Returns:
            Captum's ``LLMAttributionResult``. ``token_attr[o, i]`` is the score of input token
            ``i`` at the query that predicts output token ``o``. ``seq_attr`` is the mean over
            ``o``. ``output_probs`` are the model's probabilities of the output tokens. Tokens are
            readable (:func:`~captum_cw.visualization.readable_tokens`), with their leading spaces;
            the input of a template is its values.

        Raises:
            TypeError: If ``inp`` or ``target`` is of another type, or the model does not return
                logits.
            ValueError: If the prompt or the output is empty, the prompt is padded, both ``target``
                and ``gen_args`` are given, the model cannot generate, the tokenizer does not have a
                chat template, or the places of a template's values are unknown.
            UnsupportedModelError: If tokens see later ones, so that the model does not predict the
                next token. Other errors are those of the measure.
        """
        if target is not None and gen_args is not None:
            raise ValueError("gen_args generate an output, but target is one: give one of the two.")
        given = self._captum_input(inp, chat_template_kwargs)
        encoded, to_features = self._read(given)
        if not encoded.ids.numel():
            raise ValueError("The prompt is empty: give at least one token.")
        prompt = self._prompt(encoded)
        n = encoded.ids.shape[1]
        with torch.no_grad(), evaluation_mode([self.model], self.model):
            output = self._generate(prompt, gen_args) if target is None else self._ids(target)
            if not len(output):
                raise ValueError(
                    f"The output is empty (target={target!r}): give a target of at least one "
                    "token, or let the model generate more with gen_args={'max_new_tokens': ...}."
                )
            if self.attr_method.method.explains_target:
                opposed = None if contrast is None else self._ids(contrast)
                output, rows, logits = self._target_rows(prompt, output, opposed, show_progress)
            else:
                refuse_target(contrast, "contrast")
                rows, logits = self._rows(prompt, output, show_progress)
        token_attr = to_features(rows[:, :n].cpu())
        probs = logits.softmax(-1).gather(-1, output[:, None].to(logits.device))[:, 0]
        return LLMTokenAttributionResult(
            seq_attr=token_attr.mean(0),
            token_attr=token_attr,
            input_tokens=(
                list(given.values)
                if isinstance(given, TextTemplateInput)
                else readable_ids(self.tokenizer, given.itp_tensor[0])
            ),
            output_tokens=readable_ids(self.tokenizer, output.cpu()),
            output_probs=probs.cpu(),
            inp=given,
            output_ids=output.cpu(),
        )

    def _rows(
        self, prompt: dict[str, Any], output: Tensor, show_progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of all tokens for each output token, and the logits ``(m, V)``."""
        n, m = prompt["input_ids"].shape[1], len(output)
        inputs = extended(prompt, output)
        if LOGITS in parameters_of(self.model):
            inputs[LOGITS] = m + 1
        rows, result = self.attr_method.rows(
            inputs, slice(n - 1, n + m - 1), prompt=n, show_progress=show_progress
        )
        return rows[0], logits_of(result)[0, -m - 1 : -1].float()

    def _target_rows(
        self, prompt: dict[str, Any], output: Tensor, opposed: Tensor | None, show_progress: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, the scores of the prompt for each of its tokens, and their logits."""
        n = prompt["input_ids"].shape[1]
        contrast = None
        if opposed is not None:
            shared = _shared_tokens(output, opposed)
            prompt = extended(prompt, output[:shared]) if shared else prompt
            output, contrast = output[shared : shared + 1], int(opposed[shared])
        rows, logits = [], []
        with progress_bar(len(output), "output tokens", show=show_progress) as bar:
            for o, token in enumerate(output.tolist()):
                scores, result = self.attr_method.of_target(
                    extended(prompt, output[:o]) if o else prompt, token, contrast, prompt=n
                )
                rows.append(scores[0, :n])
                logits.append(logits_of(result)[0, -1].float())
                bar.update()
        return output, torch.stack(rows), torch.stack(logits)

    def _captum_input(self, inp: Any, chat_template_kwargs: Mapping[str, Any] | None) -> Any:
        """Return the prompt as an input of Captum."""
        if isinstance(inp, self.SUPPORTED_INPUTS):
            if chat_template_kwargs is not None:
                raise ValueError(
                    f"chat_template_kwargs={chat_template_kwargs!r}, but inp is a "
                    f"{type(inp).__name__}: give them to ChatTokenInput."
                )
            return inp
        if isinstance(inp, (list, tuple)) and not any(isinstance(part, str) for part in inp):
            return ChatTokenInput(inp, self.tokenizer, chat_template_kwargs=chat_template_kwargs)
        if not isinstance(inp, (str, list, tuple, Mapping, Tensor)):
            raise TypeError(
                f"inp is of type {type(inp).__name__}: give a text, the messages of a chat, a "
                "BatchEncoding or dict with input_ids, token ids, or Captum's TextTokenInput or "
                "TextTemplateInput."
            )
        encoded = read_text(
            self.tokenizer,
            inp,
            add_generation_prompt=True,
            chat_template_kwargs=chat_template_kwargs,
        )
        return EncodedTokenInput(encoded, self.tokenizer)

    def _read(self, inp: Any) -> tuple[Encoded, Callable[[Tensor], Tensor]]:
        """Return the prompt, and a function from scores of its tokens to those of its features."""
        if isinstance(inp, TextTemplateInput):
            encoded = encode(self.tokenizer, inp.to_model_input())
            return encoded, _sum_over_values(inp, encoded)
        known = isinstance(inp, EncodedTokenInput)
        encoded = inp.encoded if known else Encoded(None, inp.to_model_input())
        if inp.itp_mask is None:
            return encoded, lambda attr: attr
        return encoded, lambda attr: attr[:, inp.itp_mask[0].cpu()]

    def _prompt(self, encoded: Encoded) -> dict[str, Any]:
        """Return the model's arguments. No token of the prompt is padding, whatever its id is."""
        prompt = model_inputs(self.model, self.tokenizer, encoded)
        if "attention_mask" in parameters_of(self.model):
            prompt.setdefault("attention_mask", torch.ones_like(prompt["input_ids"]))
        return prompt

    def _ids(self, target: str | Tensor) -> Tensor:
        """Return the ids of the output, ``(m,)``, without special tokens."""
        if isinstance(target, str):
            encoded = self.tokenizer.encode(target, add_special_tokens=False)
            return torch.tensor(encoded, dtype=torch.long, device="cpu")
        if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
            what = f"of shape {tuple(target.shape)}" if isinstance(target, Tensor) else ""
            raise TypeError(
                f"target is a {type(target).__name__} {what}".rstrip() + ": give a text, or token "
                "ids (m,)."
            )
        return target.detach()

    def _generate(self, prompt: dict[str, Any], gen_args: dict[str, Any] | None) -> Tensor:
        """Return the ids that the model generates after the prompt, ``(m,)``."""
        if not callable(getattr(self.model, "generate", None)):
            raise ValueError(
                f"{type(self.model).__name__} has no method generate: give the output as target."
            )
        output = self.model.generate(**{**prompt, **(gen_args or _GENERATION)})
        sequences: Tensor = getattr(output, "sequences", output)
        return sequences[0, prompt["input_ids"].shape[1] :]


def output_scores(method: AttentionAttribution) -> TokenScores:
    """Return the scores of a bare measure. Contributions to a target are summed with signs.

    Example:
        >>> output_scores(ContributionWeights(model)).signed
        False
    """
    if not method.explains_target:
        return TokenScores(method)
    return TokenScores(method, reduction="sum", layers="sum", heads="sum", signed=True)


def _shared_tokens(output: Tensor, opposed: Tensor) -> int:
    """Return how many tokens two outputs begin with alike."""
    shorter = min(len(output), len(opposed))
    same = (output[:shorter].cpu() == opposed[:shorter].cpu()).tolist()
    if all(same):
        raise ValueError(
            "target and contrast do not differ before one of them ends: give two outputs with "
            "different tokens."
        )
    return same.index(False)


def _sum_over_values(inp: Any, encoded: Encoded) -> Callable[[Tensor], Tensor]:
    """Return a function that sums the scores of tokens ``(m, n)`` over a template's values."""

    def render(values: list[str]) -> str:
        if not inp.dict_keys:
            return str(inp.format_fn(*values))
        return str(inp.format_fn(**dict(zip(inp.dict_keys, values, strict=True))))

    if encoded.offsets is None:
        raise ValueError(
            "The tokenizer does not report the characters of its tokens, so the tokens of the "
            "template's values are unknown: use a fast tokenizer, or TextTokenInput."
        )
    places = places_of(render, inp.values)
    if places is None:
        raise ValueError(
            f"It is unknown where the template puts its values {inp.values!r}, since it changes "
            "them or depends on them: use a template that inserts them unchanged, or "
            "TextTokenInput."
        )
    group = range(len(inp.values)) if inp.mask is None else inp.formatted_mask
    ranges = [(span, group[value]) for value, spans in enumerate(places) for span in spans]
    assert encoded.text is not None
    owner = owners(encoded.text, encoded.offsets, [span for span, _ in ranges])
    tokens = [place for place, number in enumerate(owner) if number is not None]
    owned = [ranges[number][1] for number in owner if number is not None]
    features = torch.tensor(owned, dtype=torch.long, device="cpu")

    def summed(attr: Tensor) -> Tensor:
        sums = attr.new_zeros(len(attr), inp.n_itp_features)
        formatted: Tensor = inp.format_attr(sums.index_add(1, features, attr[:, tokens]))
        return formatted

    return summed
