"""Token scores for generated text, in Captum's own result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw.attr._captum import BaseLLMAttribution, TextTemplateInput, TextTokenInput
from captum_cw.attr.chat import ChatTokenInput
from captum_cw.attr.inputs import LOGITS, parameters_of
from captum_cw.attr.layer import AttentionAttribution
from captum_cw.attr.token_scores import TokenScores
from captum_cw.capture import UnsupportedModelError
from captum_cw.templates import Encoded, Messages, encode, owners, places_of

__all__ = ["LLMTokenAttribution"]


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

    def attribute(
        self,
        inp: str | Messages | TextTokenInput | TextTemplateInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        show_progress: bool = False,
    ) -> LLMAttributionResult:
        """Scores of the input tokens at the positions that predict the output tokens.

        Of Captum's ``TextTemplateInput``, the features are its values, and a value's score is the
        sum over its tokens. A token belongs to what holds most of its characters, white space left
        out, be it a value or the text between; where two hold as much, to the first. Values that a
        ``mask`` puts together have one score, their sum, each. Baselines play no role: nothing is
        ablated.

        Args:
            inp: The prompt: a text; the messages of a chat (:class:`~captum_cw.ChatTokenInput`), to
                which the tokenizer's chat template is applied; or Captum's ``TextTokenInput``
                (tokens that it skips are left out of the result) or ``TextTemplateInput``.
            target: The output, as text or token ids ``(n,)``; None generates it.
            gen_args: Arguments for ``model.generate``; only without ``target``.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            Captum's ``LLMAttributionResult``: ``token_attr[o, i]`` is the score of input token
            ``i`` at the query that predicts output token ``o``, ``seq_attr`` the mean over
            ``o``, and ``output_probs`` the model's probability of each output token.

        Raises:
            TypeError: If ``inp`` is of another kind.
            ValueError: If the prompt or the output is empty, both ``target`` and ``gen_args`` are
                given, there is no chat template for a chat, or it cannot be told where a template
                puts its values.
        """
        if target is not None and gen_args is not None:
            raise ValueError("gen_args generate an output, but target is one: give one of the two.")
        given = self._as_captums(inp)
        ids, features = self._read(given)
        prompt = ids.to(self.device)
        if not prompt.numel():
            raise ValueError("The prompt is empty: give at least one token.")
        # As above; a model that generates makes its tensors wherever it will.
        with nullcontext() if target is None else torch.device("cpu"):
            output = self._get_target_tokens(given, target, gen_args).to(self.device)
        n, m = prompt.shape[1], len(output)
        if not m:
            raise ValueError(
                f"The output is empty (target={target!r}): give a target of at least one token, or "
                "let the model generate more with gen_args={'max_new_tokens': ...}."
            )
        ids = torch.cat([prompt, output[None].to(prompt.dtype)], dim=1)
        rows, result = self.attr_method.rows(
            {"input_ids": ids, **self._last_logits(m + 1)},
            slice(n - 1, n + m - 1),
            show_progress=show_progress,
        )
        token_attr = features(rows[0, :, :n].cpu())
        logits = result.logits[0, -m - 1 : -1].float()
        probs = logits.softmax(-1).gather(-1, output[:, None].to(logits.device))[:, 0]
        return LLMAttributionResult(
            seq_attr=token_attr.mean(0),
            token_attr=token_attr,
            input_tokens=given.values,
            output_tokens=self.tokenizer.convert_ids_to_tokens(output.tolist()),
            output_probs=probs.cpu(),
            inp=given,
        )

    def _as_captums(self, inp: object) -> Any:
        if isinstance(inp, str):
            with torch.device("cpu"):  # Captum makes tensors on the default device
                return TextTokenInput(inp, self.tokenizer)
        if isinstance(inp, (list, tuple)):
            return ChatTokenInput(inp, self.tokenizer)
        if not isinstance(inp, self.SUPPORTED_INPUTS):
            raise TypeError(
                f"inp is of type {type(inp).__name__}: give a text, the messages of a chat, or "
                "Captum's TextTokenInput or TextTemplateInput."
            )
        return inp

    def _read(self, inp: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The prompt, ``(1, n)``, and what makes scores of features of those of its tokens."""
        if isinstance(inp, TextTemplateInput):
            encoded = encode(self.tokenizer, inp.to_model_input())
            return encoded.ids, _values_of(inp, encoded)
        if inp.itp_mask is None:
            return inp.to_model_input(), lambda attr: attr
        return inp.to_model_input(), lambda attr: attr[:, inp.itp_mask[0].cpu()]

    def _last_logits(self, count: int) -> dict[str, int]:
        """Asks the model for its last logits only, where it can be asked."""
        return {LOGITS: count} if LOGITS in parameters_of(self.model) else {}


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
    owner = owners(encoded.text, encoded.offsets, [span for span, _ in ranges])
    tokens = [place for place, number in enumerate(owner) if number is not None]
    owned = [ranges[number][1] for number in owner if number is not None]
    features = torch.tensor(owned, dtype=torch.long, device="cpu")

    def summed(attr: Tensor) -> Tensor:
        sums = attr.new_zeros(len(attr), inp.n_itp_features)
        formatted: Tensor = inp.format_attr(sums.index_add(1, features, attr[:, tokens]))
        return formatted

    return summed
