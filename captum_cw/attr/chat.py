"""Chats and tokenized texts as text inputs of Captum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from captum_cw.attr._captum import TextTokenInput
from captum_cw.text.templates import Encoded, Messages, render_chat
from captum_cw.text.tokens import readable_ids

__all__ = ["ChatTokenInput", "EncodedTokenInput"]


class EncodedTokenInput(TextTokenInput):  # type: ignore[misc]  # captum has no types for it
    """Captum's ``TextTokenInput`` for a text that is already tokenized.

    Args:
        encoded: The text and its tokens.
        tokenizer: The model's tokenizer.

    Attributes:
        encoded: The text and its tokens.
        messages: The tokens of each message of a chat; None for other texts.

    Example:
        >>> from captum_cw.text.templates import encode
        >>> EncodedTokenInput(encode(tokenizer, "Ice is cold"), tokenizer).values
        [' Ice', ' is', ' cold']
    """

    def __init__(self, encoded: Encoded, tokenizer: Any) -> None:
        # Captum's constructor is not called, since it tokenizes a text.
        self.encoded = encoded
        self.text, self.offsets = encoded.text, encoded.offsets
        self.messages = encoded.messages
        self.inp_tensor = encoded.ids
        self.itp_mask: torch.Tensor | None = None
        self.skip_tokens: object = None
        self.tokenizer = tokenizer
        self.baselines = 0
        self._set_features(encoded.ids)

    def _set_features(self, ids: torch.Tensor) -> None:
        """Set the tokens that have scores, ``(1, n)``."""
        self.itp_tensor = ids
        self.values = readable_ids(self.tokenizer, ids[0])
        self.n_itp_features = len(self.values)


class ChatTokenInput(EncodedTokenInput):
    """Captum's ``TextTokenInput`` for a chat. Its features are the tokens of the whole prompt.

    The tokenizer's chat template makes the prompt, which ends where the model's answer starts.
    Captum's own ``LLMAttribution`` accepts this input too.

    Args:
        messages: The messages. Each has a ``"role"``, and a ``"content"`` that is a text, a list of
            parts such as ``{"type": "text", "text": "..."}``, or None.
        tokenizer: The model's tokenizer, with a chat template.
        baselines: As in Captum: the token, or its id, that replaces an ablated token.
        skip_tokens: As in Captum: tokens or ids that are not features. ``"template"`` skips all
            that the template adds: role marks, special tokens and a system message of its own.
        chat_template_kwargs: Further arguments for ``tokenizer.apply_chat_template``, such as
            ``{"enable_thinking": False}``.

    Attributes:
        encoded: The prompt and its tokens.
        messages: The tokens of each message; None if they are unknown, because the template changes
            the content or the tokenizer does not report offsets.

    Raises:
        TypeError: If a message is not a mapping with a role and a content.
        ValueError: If the chat is empty, the tokenizer does not have a chat template, or the
            template's tokens are to be skipped but unknown.

    Example:
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        ...     "{% if add_generation_prompt %}A{% endif %}"
        ... )
        >>> chat = [{"role": "U", "content": "Name the capital"}]
        >>> ChatTokenInput(chat, tokenizer).values
        [' U', ' Name', ' the', ' capital', ' A']
        >>> ChatTokenInput(chat, tokenizer, skip_tokens="template").values
        [' Name', ' the', ' capital']
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
        self.skip_tokens = skip_tokens
        if skip_tokens:
            self.itp_mask = self._kept(tokenizer, skip_tokens)
            self._set_features(chat.ids[self.itp_mask][None])
        if isinstance(baselines, str):
            baselines = int(tokenizer.convert_tokens_to_ids([baselines])[0])
        self.baselines = baselines

    def _kept(self, tokenizer: Any, skip_tokens: list[int] | list[str] | str) -> torch.Tensor:
        """Return which tokens are features, ``(1, T)`` boolean."""
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
                "skip_tokens='template', but the template's tokens are unknown, because it changes "
                "messages or the tokenizer does not report offsets: name the tokens to skip."
            )
        kept = torch.zeros_like(self.inp_tensor, dtype=torch.bool)
        for message in self.messages:
            kept[:, message.start : message.stop] = True
        return kept
