"""Token scores for generated text, in Captum's own result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw.attr._captum import BaseLLMAttribution, TextTemplateInput, TextTokenInput
from captum_cw.attr.chat import ChatTokenInput, EncodedTokenInput
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.attr.token_scores import TokenScores
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.model import LOGITS, device_of, evaluation_mode, parameters_of
from captum_cw.capture.outputs import logits_of
from captum_cw.text.prompts import Text, extended, model_inputs, read_text
from captum_cw.text.templates import Encoded, encode, owners, places_of
from captum_cw.text.tokens import readable_ids

__all__ = ["LLMTokenAttribution"]

#: As Captum generates where it is not told how.
_GENERATION = {"max_new_tokens": 25, "do_sample": False, "temperature": None, "top_p": None}


class LLMTokenAttributionResult(LLMAttributionResult):  # type: ignore[misc]  # captum has no types for it
    """Captum's result, with the ids of the output, whose tokens are readable already."""

    def __init__(self, *, output_ids: Tensor, **parts: Any) -> None:
        super().__init__(**parts)
        self.output_ids = output_ids


class LLMTokenAttribution(BaseLLMAttribution):  # type: ignore[misc]  # captum has no types for it
    """Which input tokens made each output token, in one forward pass over prompt and output.

    Beside Captum's ``LLMAttribution``, with the same result and plots.

    Args:
        attr_method: A measure, or a :class:`~captum_cw.TokenScores` around one, whose ``heads``,
            ``layers`` and ``signed`` count. Its ``forward_func`` must be the model itself.
        tokenizer: The model's tokenizer.

    Raises:
        TypeError: If ``attr_method`` is neither, or does not hold a model.

    Example:
        >>> llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
        >>> result = llm.attribute("a b c", target="d e")
        >>> result.token_attr.shape, result.seq_attr.shape
        (torch.Size([2, 3]), torch.Size([3]))
        >>> from captum.attr import TextTemplateInput
        >>> template = TextTemplateInput("a {} c {}", ["b d e", "f"])
        >>> llm.attribute(template, target="d e").token_attr.shape
        torch.Size([2, 2])
    """

    SUPPORTED_METHODS = (TokenScores,)
    SUPPORTED_INPUTS = (TextTokenInput, TextTemplateInput)

    def __init__(self, attr_method: TokenScores | AttentionAttribution, tokenizer: Any) -> None:
        if isinstance(attr_method, AttentionAttribution):
            attr_method = TokenScores(attr_method)
        if not isinstance(attr_method, TokenScores):
            raise TypeError(
                f"attr_method is of type {type(attr_method).__name__}: give a measure, such as "
                "ContributionWeights(model), or TokenScores around one."
            )
        if not isinstance(attr_method.forward_func, torch.nn.Module):
            raise TypeError("forward_func of attr_method must be the model: it generates text.")
        if getattr(getattr(attr_method.forward_func, "config", None), "is_encoder_decoder", False):
            raise UnsupportedModelError(
                "The model has an encoder and a decoder, whose tokens are not one text: use "
                "TokenScores(ContributionWeights(model, kind='cross'), queries=position) with "
                "input_ids and decoder_input_ids."
            )
        super().__init__(attr_method, tokenizer)
        self.attr_method = attr_method
        self.device = device_of(self.model)

    def attribute(
        self,
        inp: Text | TextTokenInput | TextTemplateInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        show_progress: bool = False,
    ) -> LLMAttributionResult:
        """Scores of the input tokens at the positions that predict the output tokens.

        Of Captum's ``TextTemplateInput``, the features are its values, and a value's score is the
        sum over its tokens. A token belongs to what holds most of its characters, white space left
        out, be it a value or the text between; where two hold as much, to the first. Values that a
        ``mask`` puts together have one score, their sum, each. Baselines play no role: nothing is
        ablated.

        Of a model with learned virtual tokens (prompt or prefix tuning), the scores are those of
        the prompt's own tokens. Of a model of images and text, the layers count that read the text,
        where the measure has no layers chosen. Dropout is off, while the model generates too.

        Args:
            inp: The prompt: a text; the messages of a chat (:class:`~captum_cw.ChatTokenInput`), to
                which the tokenizer's chat template is applied; what the tokenizer returned for one
                text, or a dict of the model's arguments, whose mask and token types go on over the
                output, and whose ``pixel_values`` stay as they are; token ids ``(n,)``; or Captum's
                ``TextTokenInput`` (tokens that it skips are left out of the result) or
                ``TextTemplateInput``.
            target: The output, as text or token ids ``(m,)``; None generates it.
            gen_args: Arguments for ``model.generate``; only without ``target``.
            chat_template_kwargs: Further arguments for the chat template, such as
                ``{"enable_thinking": False}``; only for the messages of a chat.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            Captum's ``LLMAttributionResult``: ``token_attr[o, i]`` is the score of input token
            ``i`` at the query that predicts output token ``o``, ``seq_attr`` the mean over
            ``o``, and ``output_probs`` the model's probability of each output token. Tokens are
            readable (:func:`~captum_cw.visualization.readable_tokens`), with their leading spaces;
            of a template, the input is its values.

        Raises:
            TypeError: If ``inp`` or ``target`` is of another kind, or the model gives no logits.
            ValueError: If the prompt or the output is empty, the prompt is padded, both ``target``
                and ``gen_args`` are given, the model cannot generate, there is no chat template for
                a chat, or it cannot be told where a template puts its values.
            UnsupportedModelError: As the measure, and if tokens see those that come after them, so
                that the model does not predict the next token.
        """
        if target is not None and gen_args is not None:
            raise ValueError("gen_args generate an output, but target is one: give one of the two.")
        given = self._as_captums(inp, chat_template_kwargs)
        encoded, features = self._read(given)
        if not encoded.ids.numel():
            raise ValueError("The prompt is empty: give at least one token.")
        prompt = self._prompt(encoded)
        with torch.no_grad(), evaluation_mode([self.model], self.model):
            output = self._generated(prompt, gen_args) if target is None else self._ids(target)
            n, m = encoded.ids.shape[1], len(output)
            if not m:
                raise ValueError(
                    f"The output is empty (target={target!r}): give a target of at least one "
                    "token, or let the model generate more with gen_args={'max_new_tokens': ...}."
                )
            rows, result = self.attr_method.rows(
                {**extended(prompt, output), **self._last_logits(m + 1)},
                slice(n - 1, n + m - 1),
                prompt=n,
                show_progress=show_progress,
            )
        token_attr = features(rows[0, :, :n].cpu())
        logits = logits_of(result)[0, -m - 1 : -1].float()
        probs = logits.softmax(-1).gather(-1, output[:, None].to(logits.device))[:, 0]
        return LLMTokenAttributionResult(
            seq_attr=token_attr.mean(0),
            token_attr=token_attr,
            input_tokens=self._input_tokens(given),
            output_tokens=readable_ids(self.tokenizer, output.cpu()),
            output_probs=probs.cpu(),
            inp=given,
            output_ids=output.cpu(),
        )

    def _as_captums(self, inp: Any, chat_template_kwargs: Mapping[str, Any] | None) -> Any:
        captums = isinstance(inp, self.SUPPORTED_INPUTS)
        chat = isinstance(inp, (list, tuple)) and not any(isinstance(part, str) for part in inp)
        if captums and chat_template_kwargs is not None:
            raise ValueError(
                f"chat_template_kwargs={chat_template_kwargs!r}, but inp is a "
                f"{type(inp).__name__}: give them to ChatTokenInput."
            )
        if captums:
            return inp
        if chat:
            return ChatTokenInput(inp, self.tokenizer, chat_template_kwargs=chat_template_kwargs)
        if not isinstance(inp, (str, list, tuple, Mapping, Tensor)):
            raise TypeError(
                f"inp is of type {type(inp).__name__}: give a text, the messages of a chat, a "
                "BatchEncoding or dict with input_ids, token ids, or Captum's TextTokenInput or "
                "TextTemplateInput."
            )
        if isinstance(inp, str) and not inp and chat_template_kwargs is None:
            raise ValueError("The prompt is empty: give at least one token.")
        encoded = read_text(
            self.tokenizer,
            inp,
            add_generation_prompt=True,
            chat_template_kwargs=chat_template_kwargs,
        )
        return EncodedTokenInput(encoded, self.tokenizer)

    def _read(self, inp: Any) -> tuple[Encoded, Callable[[Tensor], Tensor]]:
        """The prompt, and what makes scores of features of those of its tokens."""
        if isinstance(inp, TextTemplateInput):
            encoded = encode(self.tokenizer, inp.to_model_input())
            return encoded, _values_of(inp, encoded)
        known = isinstance(inp, EncodedTokenInput)
        encoded = inp.encoded if known else Encoded(None, inp.to_model_input())
        if inp.itp_mask is None:
            return encoded, lambda attr: attr
        return encoded, lambda attr: attr[:, inp.itp_mask[0].cpu()]

    def _prompt(self, encoded: Encoded) -> dict[str, Any]:
        """The model's arguments; none of the prompt's tokens is padding, whatever its id."""
        prompt = model_inputs(self.model, self.tokenizer, encoded)
        if "attention_mask" in parameters_of(self.model):
            prompt.setdefault("attention_mask", torch.ones_like(prompt["input_ids"]))
        return prompt

    def _ids(self, target: str | Tensor) -> Tensor:
        """The output's ids, ``(m,)``, without tokens for the beginning of a text."""
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

    def _generated(self, prompt: dict[str, Any], gen_args: dict[str, Any] | None) -> Tensor:
        """The ids that the model generates after the prompt, ``(m,)``."""
        if not callable(getattr(self.model, "generate", None)):
            raise ValueError(
                f"{type(self.model).__name__} has no method generate: give the output as target."
            )
        arguments = dict(gen_args or _GENERATION)
        if "generation_config" in arguments:
            arguments["generation_config"] = copy.deepcopy(arguments["generation_config"])
        with _generation_configs_kept(self.model):
            output = self.model.generate(**{**prompt, **arguments})
        sequences: Tensor = getattr(output, "sequences", output)
        return sequences[0, prompt["input_ids"].shape[1] :]

    def _input_tokens(self, given: Any) -> list[str]:
        if isinstance(given, TextTemplateInput):
            return list(given.values)
        return readable_ids(self.tokenizer, given.itp_tensor[0])

    def _last_logits(self, count: int) -> dict[str, int]:
        """Asks the model for its last logits only, where it can be asked."""
        return {LOGITS: count} if LOGITS in parameters_of(self.model) else {}


@contextmanager
def _generation_configs_kept(model: torch.nn.Module) -> Iterator[None]:
    """Puts back what generation changes in the configurations of a model and those inside it."""
    kept = [
        (module, config, copy.deepcopy(vars(config)))
        for module in model.modules()
        if (config := vars(module).get("generation_config")) is not None
    ]
    try:
        yield
    finally:
        for module, config, settings in kept:
            module.generation_config = config
            vars(config).clear()
            vars(config).update(settings)


def _values_of(inp: Any, encoded: Encoded) -> Callable[[Tensor], Tensor]:
    """What sums scores of tokens, ``(m, n)``, to those of a template's values, ``(m, values)``."""

    def render(values: list[str]) -> str:
        if not inp.dict_keys:
            return str(inp.format_fn(*values))
        return str(inp.format_fn(**dict(zip(inp.dict_keys, values, strict=True))))

    if encoded.offsets is None:
        raise ValueError(
            "The tokenizer does not tell where its tokens stand, so those of a template's values "
            "are not known: use a fast tokenizer, or TextTokenInput."
        )
    places = places_of(render, inp.values)
    if places is None:
        raise ValueError(
            f"It cannot be told where the template puts its values {inp.values!r}, since it "
            "changes them or depends on them: use one that puts them in as they are, or "
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
