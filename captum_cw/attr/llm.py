"""Token scores for generated text, in Captum's own result."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw.attr._captum import BaseLLMAttribution, TextTokenInput
from captum_cw.attr.inputs import LOGITS, parameters_of
from captum_cw.attr.layer import AttentionAttribution
from captum_cw.attr.token_scores import TokenScores
from captum_cw.capture import UnsupportedModelError

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
    """

    SUPPORTED_METHODS = (TokenScores,)
    SUPPORTED_INPUTS = (TextTokenInput,)

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
        inp: str | TextTokenInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        show_progress: bool = False,
    ) -> LLMAttributionResult:
        """Scores of the input tokens at the positions that predict the output tokens.

        Args:
            inp: The prompt, as text or as Captum's ``TextTokenInput`` (tokens that it skips are
                left out of the result).
            target: The output, as text or token ids ``(n,)``; None generates it.
            gen_args: Arguments for ``model.generate``; only without ``target``.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            Captum's ``LLMAttributionResult``: ``token_attr[o, i]`` is the score of input token
            ``i`` at the query that predicts output token ``o``, ``seq_attr`` the mean over
            ``o``, and ``output_probs`` the model's probability of each output token.

        Raises:
            ValueError: If the prompt or the output is empty, or both ``target`` and ``gen_args``
                are given.
        """
        if target is not None and gen_args is not None:
            raise ValueError("gen_args generate an output, but target is one: give one of the two.")
        if isinstance(inp, str):
            inp = TextTokenInput(inp, self.tokenizer)
        prompt = inp.to_model_input().to(self.device)
        if not prompt.numel():
            raise ValueError("The prompt is empty: give at least one token.")
        output = self._get_target_tokens(inp, target, gen_args).to(self.device)
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
        token_attr = rows[0, :, :n]
        if inp.itp_mask is not None:
            token_attr = token_attr[:, inp.itp_mask[0].to(token_attr.device)]
        logits = result.logits[0, -m - 1 : -1].float()
        probs = logits.softmax(-1).gather(-1, output[:, None].to(logits.device))[:, 0]
        return LLMAttributionResult(
            seq_attr=token_attr.mean(0).cpu(),
            token_attr=token_attr.cpu(),
            input_tokens=inp.values,
            output_tokens=self.tokenizer.convert_ids_to_tokens(output.tolist()),
            output_probs=probs.cpu(),
            inp=inp,
        )

    def _last_logits(self, count: int) -> dict[str, int]:
        """Asks the model for its last logits only, where it can be asked."""
        return {LOGITS: count} if LOGITS in parameters_of(self.model) else {}
