"""Chats and tokenized texts as Captum's inputs of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from captum_cw.attr._captum import TextTokenInput
from captum_cw.text.templates import Encoded, Message, Messages, render_chat

__all__ = ["ChatTokenInput", "EncodedTokenInput"]


class EncodedTokenInput(TextTokenInput):  # type: ignore[misc]  # captum has no types for it
    """Captum's ``TextTokenInput`` of tokens that are known already.

    Args:
        encoded: The text and its tokens.
        tokenizer: The model's tokenizer.

    Attributes:
        encoded: The same.
        messages: None, since it is not a chat.

    Example:
        >>> from captum_cw.text.templates import encode
        >>> EncodedTokenInput(encode(tokenizer, "a b"), tokenizer).values
        ['a', 'b']
    """

    def __init__(self, encoded: Encoded, tokenizer: Any) -> None:
        # Not Captum's own constructor, which tokenizes a text.
        self.encoded = encoded
        self.text, self.offsets = encoded.text, encoded.offsets
        self.messages: list[Message] | None = None
        self.inp_tensor = self.itp_tensor = encoded.ids
        self.itp_mask: torch.Tensor | None = None
        self.skip_tokens: object = None
        self.tokenizer = tokenizer
        self.values = tokenizer.convert_ids_to_tokens(self.itp_tensor[0].tolist())
        self.n_itp_features = len(self.values)
        self.baselines = 0


class ChatTokenInput(EncodedTokenInput):
    """Captum's ``TextTokenInput`` of a chat: its features are the tokens of the whole prompt.

    The tokenizer's chat template makes the prompt, up to where the model is to answer. Captum's own
    ``LLMAttribution`` takes it too.

    Args:
        messages: Each a mapping with ``"role"`` and ``"content"``: a text, a list of parts such as
            ``{"type": "text", "text": "..."}``, or None.
        tokenizer: The model's tokenizer, which has a chat template.
        baselines: As in Captum: the token, or its id, that stands in for one that is ablated.
        skip_tokens: As in Captum: tokens or ids that are no features. ``"template"`` skips all that
            the template adds: marks of roles, special tokens, a system message of its own.
        chat_template_kwargs: Further arguments for ``tokenizer.apply_chat_template``, such as
            ``{"enable_thinking": False}``.

    Attributes:
        encoded: The prompt and its tokens.
        messages: Which tokens of the prompt hold each message; None where the template rewrites
            them, or the tokenizer does not tell where tokens stand.

    Raises:
        TypeError: If a message is not a mapping with a role and a content.
        ValueError: If there is no message, the tokenizer has no chat template, or the template's
            tokens are to be skipped and are not known.

    Example:
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        ...     "{% if add_generation_prompt %}A{% endif %}"
        ... )
        >>> chat = [{"role": "U", "content": "a b c"}]
        >>> ChatTokenInput(chat, tokenizer).values
        ['U', 'a', 'b', 'c', 'A']
        >>> ChatTokenInput(chat, tokenizer, skip_tokens="template").values
        ['a', 'b', 'c']
    """

    def __init__(
        self,
        messages: Messages,
        tokenizer: Any,
        baselines: int | str = 0,
        skip_tokens: list[int] | list[str] | Literal["template"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        chat = render_chat(
            tokenizer,
            messages,
            add_generation_prompt=True,
            chat_template_kwargs=chat_template_kwargs,
        )
        super().__init__(chat, tokenizer)
        self.messages = chat.messages
        self.skip_tokens = skip_tokens
        if skip_tokens:
            self.itp_mask = self._kept(tokenizer, skip_tokens)
            self.itp_tensor = chat.ids[self.itp_mask][None]
            self.values = tokenizer.convert_ids_to_tokens(self.itp_tensor[0].tolist())
            self.n_itp_features = len(self.values)
        if isinstance(baselines, str):
            baselines = int(tokenizer.convert_tokens_to_ids([baselines])[0])
        self.baselines = baselines

    def _kept(self, tokenizer: Any, skip_tokens: list[int] | list[str] | str) -> torch.Tensor:
        """``(1, T)``."""
        if isinstance(skip_tokens, str) and skip_tokens != "template":
            raise ValueError(f"skip_tokens={skip_tokens!r}: give a list, or 'template'.")
        if skip_tokens != "template":
            skipped = [
                token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token)
                for token in skip_tokens
            ]
            return ~torch.isin(self.inp_tensor, self.inp_tensor.new_tensor(skipped))
        if self.messages is None:
            raise ValueError(
                "skip_tokens='template', but the template rewrites messages or the tokenizer does "
                "not tell where tokens stand, so they are not known: name the tokens to skip."
            )
        kept = torch.zeros_like(self.inp_tensor, dtype=torch.bool)
        for message in self.messages:
            kept[:, message.start : message.stop] = True
        return kept
