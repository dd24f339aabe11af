"""The explanation of one text: its tokens, scores and maps.

An explanation holds the tensors of measures together with the tokens. It can be shown, saved,
grouped by word, and exported to other libraries. It can also hold scores of other methods, such as
Captum's. For single heads it keeps only the keys that matter most to each query, so its size grows
linearly with the text; only the maps of all heads and layers together are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw.explanation import answer, conversion, grouping, shares
from captum_cw.explanation.exports import Exported
from captum_cw.explanation.heads import HeadMaps
from captum_cw.explanation.shares import Share
from captum_cw.functional import Decomposition
from captum_cw.text.templates import Message
from captum_cw.text.tokens import Grouping, Span, sink

__all__ = ["Explanation"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Exported):
    """The tokens of one text with their scores, and optionally maps.

    The text has ``S`` tokens (keys) and ``T`` queries. In a text that is explained as a whole, the
    queries are the tokens themselves; for an output, they are the output tokens.

    Args:
        tokens: ``S`` readable tokens.
        scores: Scores ``(S,)`` by method, in the unit of the method.
        maps: Maps ``(T, S)`` by method, with the value of each key for each query.
        heads: The maps of single heads by layer, in execution order; empty without heads.
        queries: ``T`` readable tokens of the queries; None if they are ``tokens``.
        predicted: The token that the model considers most likely after each query, ``T`` strings;
            None if unknown.
        probability: The model's probability of ``predicted``, ``(T,)``. Without ``predicted``, its
            probability of each query, such as an output token. None if unknown.
        words: The word number of each token, ``S`` ascending numbers, with None for tokens without
            a word; None if unknown.
        text: The text of the tokens; None if unknown.
        offsets: The start and stop of each token in the characters of ``text``, empty for tokens
            that are not in it; None if unknown.
        messages: The tokens of each message of a chat; None if unknown.
        settings: How the explanation was made, such as the name of the ``"model"``. Files keep it.
        query_words: The word number of each query, like ``words``; None if unknown, or if the
            queries are ``tokens``.

    Raises:
        ValueError: If shapes or lengths do not fit together.

    Example:
        >>> ig = torch.tensor([0.1, 0.5, 0.2])
        >>> explanation = Explanation(["Ice", " is", " cold"], {"integrated gradients": ig})
        >>> explanation
        <Explanation: 3 tokens; scores of integrated gradients>
    """

    tokens: Sequence[str]
    scores: Mapping[str, Tensor]
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Sequence[HeadMaps] = ()
    queries: Sequence[str] | None = None
    predicted: Sequence[str] | None = None
    probability: Tensor | None = None
    words: Sequence[int | None] | None = None
    text: str | None = None
    offsets: Sequence[Span] | None = None
    messages: Sequence[Message] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    query_words: Sequence[int | None] | None = None

    def __post_init__(self) -> None:
        S = len(self.tokens)
        T = S if self.queries is None else len(self.queries)
        shapes: dict[str, tuple[int, ...]] = {"scores": (S,), "maps": (T, S)}
        for kind, shape in shapes.items():
            for name, x in getattr(self, kind).items():
                if x.shape != shape:
                    raise ValueError(
                        f"{kind}[{name!r}] has shape {tuple(x.shape)}, but {shape} is expected "
                        f"for {S} tokens and {T} queries: give one text of a batch, x[0], and the "
                        "queries if they are not the tokens."
                    )
        lengths = {"predicted": T, "probability": T, "words": S, "offsets": S, "query_words": T}
        for name, length in lengths.items():
            values = getattr(self, name)
            if values is not None and len(values) != length:
                raise ValueError(f"{name} has {len(values)} entries, expected {length}.")
        if self.query_words is not None and self.queries is None:
            raise ValueError("query_words are given without queries: give words.")
        for layer in self.heads:
            name, keys = layer.name, layer.keys
            if keys.shape[1] != T:
                raise ValueError(f"Layer {name!r} has {keys.shape[1]} queries, expected {T}.")
            if keys.numel() and not 0 <= int(keys.min()) <= int(keys.max()) < S:
                raise ValueError(
                    f"Layer {name!r} has keys from {int(keys.min())} to {int(keys.max())}, "
                    f"but there are {S} tokens."
                )

    def __repr__(self) -> str:
        """Summarise the contents in one line, which notebooks save beside the page."""
        parts = [f"{len(self.tokens)} tokens"]
        if self.queries is not None:
            parts.append(f"{len(self.queries)} queries")
        if self.scores:
            parts.append(f"scores of {', '.join(self.scores)}")
        if self.maps:
            parts.append(f"maps of {', '.join(self.maps)}")
        if self.heads:
            parts.append(f"heads of {len(self.heads)} layers")
        return f"<Explanation: {'; '.join(parts)}>"

    def __str__(self) -> str:
        """Return :meth:`summary`."""
        return self.summary()

    @classmethod
    def from_llm(cls, result: LLMAttributionResult, name: str = "attribution") -> Explanation:
        """Convert an ``LLMAttributionResult`` of this package, or of Captum's own classes.

        The queries are the output tokens. Their map is ``token_attr``, if the result has it.

        Args:
            result: The result.
            name: The name of the method.

        Example:
            >>> llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
            >>> result = llm.attribute("The capital of France is", target=" Paris")
            >>> Explanation.from_llm(result, "contribution").maps["contribution"].shape
            torch.Size([1, 5])
        """
        return cls(**conversion.fields_of_result(result, name))

    @classmethod
    def from_maps(
        cls,
        tokens: Sequence[str],
        maps: Mapping[str, Sequence[Tensor]] | Sequence[Decomposition],
        *,
        queries: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        top_k: int = 32,
    ) -> Explanation:
        """Convert the dense maps of the layers for one text.

        Maps are means of absolute values over heads and layers. For contributions there is also
        ``"contribution-signed"``, as in :func:`explain`. Scores are means over the queries that see
        a token, which are those for which any head of the layer is not zero.

        Args:
            tokens: ``S`` readable tokens.
            maps: For each measure, the output of ``attribute``: one ``(1, H, T, S)`` per layer. Or
                the output of :meth:`~captum_cw.ContributionWeights.decompose`, which also gives
                the heads.
            queries: ``T`` readable tokens of the queries; None if they are ``tokens``.
            layers: The names of the layers of ``decompose``; by default, their numbers.
            top_k: The number of keys to keep for each query of each head.

        Raises:
            TypeError: If ``maps`` is neither of the two.
            ValueError: If there are no maps, or shapes do not fit together.

        Example:
            >>> tokens = ["The", " capital", " of", " France", " is"]
            >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
            >>> factors = ContributionWeights(model).decompose(ids)
            >>> explanation = Explanation.from_maps(tokens, factors)
            >>> list(explanation.maps), len(explanation.heads)
            (['attention', 'vwon', 'contribution', 'contribution-signed'], 2)
            >>> attention = AttentionWeights(model).attribute(ids)
            >>> Explanation.from_maps(tokens, {"attention": attention}).maps["attention"].shape
            torch.Size([5, 5])
        """
        return cls(tokens, queries=queries, **conversion.fields_of_maps(maps, layers, top_k))

    @property
    def sinks(self) -> tuple[int, ...]:
        """The position of the token that is probably an attention sink: the first.

        It is empty if the first token is alone, after grouping by span or message, and in a part.

        Example:
            >>> explanation = explain(model, tokenizer, "Ice is cold")
            >>> explanation.sinks, explanation.by_span(["Ice is", "cold"]).sinks
            ((0,), ())
        """
        grouped = self.settings.get("by") in ("span", "message")
        return () if grouped or self.settings.get("part of") else sink(self.tokens)

    def summary(self, count: int = 10, *, method: str | None = None, raw: bool = False) -> str:
        """Return the question, its answer, and the words with the largest scores, for a terminal.

        Scores are shares of all scores of the method, in percent: their sizes sum to 100%. The
        attention sink has a line of its own.

        Args:
            count: The number of words, besides sinks.
            method: The method of the scores; None for the one that answers the question: the
                prediction's if there is one.
            raw: Whether to show scores in the unit of the method instead of percent.

        Example:
            >>> words = ["The", " capital", " of", " France"]
            >>> scores = {"contribution": torch.tensor([0.6, 0.1, 0.0, 0.3])}
            >>> print(Explanation(words, scores).summary(2))
            By “contribution, size”, the largest shares are those of “France” (30%) and “capital” \
(10%). 60% came by way of the first token “The”. It is an attention sink, so this part says \
little about the word.
            <BLANKLINE>
            The         60% ████████████████████████  (attention sink)
            France      30% ████████████
            capital     10% ████
            1 more word: 0% together
            Scores: contribution, size.
        """
        return answer.summary(self, count, method=method, raw=raw)

    def shares(self, method: str | None = None) -> list[Share]:
        """Return the share of each word in all scores of a method, in the order of the text.

        Args:
            method: The method; None for the one that answers the question: the prediction's if
                there is one.

        Raises:
            ValueError: If the explanation does not have scores of the method.

        Example:
            >>> words = Explanation(["Ice", " is"], {"contribution": torch.tensor([3.0, -1.0])})
            >>> [(x.text, x.share, x.percent) for x in words.shares()]
            [('Ice', 0.75, '75%'), (' is', -0.25, '-25%')]
        """
        return shares.shares_of(self, method)

    def by_word(self, how: Grouping = "sum") -> Explanation:
        """Group tokens by word; a token without a word stays single.

        If the words are unknown, they are read from the tokens, where spaces begin them. Output
        tokens are grouped by word too. The probability of a word is the product of its tokens'
        probabilities. The prediction for a word is that after its last token. Heads are left out.

        Args:
            how: Combine scores and the keys of maps by ``"sum"``, ``"mean"`` or ``"max"``. Queries
                are always averaged; those of contributions to a target are summed.

        Raises:
            ValueError: If the words are unknown, and no token begins with a space.

        Example:
            >>> scores = {"ig": torch.ones(3)}
            >>> words = Explanation(["The", " cap", "ital"], scores).by_word()
            >>> words.tokens, words.scores["ig"]
            (['The', ' capital'], tensor([1., 2.]))
        """
        return grouping.by_word(self, how)

    def by_span(
        self,
        spans: Sequence[Span | str],
        how: Grouping = "sum",
        *,
        unit: grouping.SpanUnit = "tokens",
    ) -> Explanation:
        """Group tokens by spans; tokens outside of all spans are left out.

        Args:
            spans: The start and stop of each span, or a piece of the text that occurs in it once. A
                token belongs to the span that holds most of its characters, without white space.
            how: See :meth:`by_word`.
            unit: The unit of start and stop, ``"tokens"`` or ``"characters"``.

        Raises:
            ValueError: If a span is empty, overlaps another, is not in the text exactly once or
                does not hold most of any token; or if the characters of the tokens are unknown.

        Example:
            >>> explanation = explain(model, tokenizer, "The capital of France is")
            >>> spans = explanation.by_span(["The capital", "France"])
            >>> spans.tokens, spans.maps["contribution"].shape
            ([' The capital', ' France'], torch.Size([2, 2]))
        """
        return grouping.by_span(self, spans, how, unit)

    def part(self, start: int, stop: int) -> Explanation:
        """Return the explanation of the tokens from ``start`` to ``stop``, such as for its page.

        Scores and maps are those of the whole text. Of heads, keys outside of the part are left
        out. Queries that are not the tokens themselves are all kept.

        Args:
            start: The first token.
            stop: The token after the last.

        Raises:
            ValueError: If the part is empty, or is not in the text.

        Example:
            >>> explanation = explain(model, tokenizer, "The capital of France is")
            >>> explanation.part(1, 4).tokens
            [' capital', ' of', ' France']
        """
        return grouping.part(self, start, stop)

    def by_message(self, how: Grouping = "sum") -> Explanation:
        """Group the tokens of a chat by message, named by role; the template is left out.

        Args:
            how: See :meth:`by_word`.

        Raises:
            ValueError: If the positions of the messages are unknown.
        """
        return grouping.by_message(self, how)
