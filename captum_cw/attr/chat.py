"""Chats as Captum's inputs of text."""

from __future__ import annotations

from typing import Any, Literal

import torch

from captum_cw.attr._captum import TextTokenInput
from captum_cw.templates import Message, Messages, render_chat

__all__ = ["ChatTokenInput"]


class ChatTokenInput(TextTokenInput):  # type: ignore[misc]  # captum has no types for it
    """Captum's ``TextTokenInput`` of a chat: its features are the tokens of the whole prompt.

    The tokenizer's chat template makes the prompt, up to where the model is to answer. Captum's own
    ``LLMAttribution`` takes it too.

    Args:
        messages: Each a mapping with ``"role"`` and ``"content"``.
        tokenizer: The model's tokenizer, which has a chat template.
        baselines: As in Captum: the token, or its id, that stands in for one that is ablated.
        skip_tokens: As in Captum: tokens or ids that are no features. ``"template"`` skips all that
            the template adds: marks of roles, special tokens, a system message of its own.

    Attributes:
        messages: Which tokens of the prompt hold each message; None where the template rewrites
            them, or the tokenizer does not tell where tokens stand.

    Raises:
        TypeError: If a message is no mapping with a role and a text.
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
    ) -> None:
        chat = render_chat(tokenizer, messages, add_generation_prompt=True)
        # Not Captum's own constructor: its begin token would be a second one.
        self.text, self.offsets = chat.text, chat.offsets
        self.messages: list[Message] | None = chat.messages
        self.inp_tensor = self.itp_tensor = chat.ids
        self.itp_mask = None
        self.skip_tokens = skip_tokens
        if skip_tokens:
            self.itp_mask = self._kept(tokenizer, skip_tokens)
            self.itp_tensor = chat.ids[self.itp_mask][None]
        self.values = tokenizer.convert_ids_to_tokens(self.itp_tensor[0].tolist())
        self.tokenizer = tokenizer
        self.n_itp_features = len(self.values)
        self.baselines = (
            baselines
            if isinstance(baselines, int)
            else tokenizer.convert_tokens_to_ids([baselines])[0]
        )

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
