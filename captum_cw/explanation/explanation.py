"""The explanation of one text: its tokens, scores and maps.

Measures give tensors; an explanation puts the tokens beside them, so that it can be shown, kept,
grouped by word, and handed to other libraries. Scores of any method, Captum's included, have room
in it. Of the maps of single heads it keeps the keys that matter most to each query, so that it
grows with the text, not with its square; only the maps of all heads and layers together are whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cw._utils.files import whole_file
from captum_cw._version import __version__
from captum_cw.attr.chat import EncodedTokenInput
from captum_cw.explanation import files
from captum_cw.functional import Decomposition, check_choice
from captum_cw.measures import SIGNED
from captum_cw.text.templates import Message, owners
from captum_cw.text.tokens import (
    Grouping,
    Span,
    check_spans,
    group_scores,
    joined,
    readable_tokens,
    sink,
    word_numbers,
)

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

__all__ = ["Explanation", "HeadMaps"]

PARTS = ("attention", "relative_norm", "cosine")
#: The measures that follow from the parts.
OF_HEADS = ("attention", "vw", "vwon", "contribution", SIGNED)


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """One layer, head by head: for each query the keys that matter most.

    Keys stand from the one that matters most to the one that matters least, by the larger of
    attention and absolute contribution, each relative to the row's largest. Where a query sees
    fewer than ``K`` keys, the others have attention 0.

    Args:
        name: Of the layer in the model.
        keys: ``(H, T, K)``, int32.
        attention: ``(H, T, K)``, as the next two float32 and without unit (Eq. 14).
        relative_norm: ``(H, T, K)``.
        cosine: ``(H, T, K)``.
        output_norm: ``(T,)``, of the layer's output, in the unit of the hidden states; zero where
            the output vanishes, as do the two factors before; NaN where it is not known.
        share: ``(H, T)``, each head's contributions summed over all keys.
    """

    name: str
    keys: Tensor
    attention: Tensor
    relative_norm: Tensor
    cosine: Tensor
    output_norm: Tensor
    share: Tensor

    def measure(self, name: str) -> Tensor:
        """A measure at the keys that are kept, ``(H, T, K)``.

        Args:
            name: ``"attention"``, ``"vw"``, ``"vwon"``, ``"contribution"`` (its absolute value),
                or ``"contribution-signed"``.

        Raises:
            ValueError: If there is no such measure.
        """
        match name:
            case "attention":
                return self.attention
            case "vwon":
                return self.attention.abs() * self.relative_norm
            case "vw":
                return self.measure("vwon") * self.output_norm[:, None]
            case "contribution-signed":
                return self.attention * self.relative_norm * self.cosine
            case "contribution":
                return self.measure(SIGNED).abs()
        raise ValueError(f"measure={name!r} is not kept by head: choose {', '.join(OF_HEADS)}.")


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """The tokens of one text with scores, and with maps where there are any.

    Args:
        tokens: ``S`` readable tokens, those that are scored.
        scores: A method's ``(S,)`` scores, by its name, in its own unit.
        maps: A method's ``(T, S)`` map, by its name: what each query drew from each token.
        heads: By layer, in execution order; empty where they were not asked for.
        queries: ``T`` readable tokens of the queries; None where they are the tokens themselves.
        predicted: What the model expects most after each query; None where that is not known.
        probability: ``(T,)``, the model's probability of it, or, where the queries are an output,
            of the query itself.
        words: ``S`` numbers of words, ascending, with None for tokens that belong to none; None
            where that is not known.
        text: What the tokens were made of.
        offsets: ``S`` ranges of characters of the text, empty for tokens that are not in it; None
            where that is not known.
        messages: Which tokens hold each message of a chat; None where that is not known.
        settings: What it was made with, such as the ``"model"``; goes into files.
        query_words: ``T`` numbers of words of the queries, as ``words``; None where the queries are
            the tokens themselves, or that is not known.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> ig = torch.tensor([0.1, 0.5, 0.2])
        >>> Explanation(("a", " b", " c"), {"integrated gradients": ig}).scores.keys()
        dict_keys(['integrated gradients'])
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
                        "queries where they are not the tokens."
                    )
        for kind, values, expected in (
            ("predicted", self.predicted, T),
            ("probability", self.probability, T),
            ("words", self.words, S),
            ("offsets", self.offsets, S),
            ("query_words", self.query_words, T),
        ):
            if values is not None and len(values) != expected:
                raise ValueError(f"{kind} has {len(values)} entries, expected {expected}.")
        if self.query_words is not None and self.queries is None:
            raise ValueError("query_words are given without queries: give words.")
        for layer in self.heads:
            if layer.keys.shape[1] != T:
                raise ValueError(
                    f"Layer {layer.name!r} has {layer.keys.shape[1]} queries, expected {T}."
                )
            keys = layer.keys
            if keys.numel() and not 0 <= int(keys.min()) <= int(keys.max()) < S:
                raise ValueError(
                    f"Layer {layer.name!r} has keys from {int(keys.min())} to {int(keys.max())}, "
                    f"but there are {S} tokens."
                )

    def __repr__(self) -> str:
        """What there is, in a line: notebooks save it beside the page."""
        parts = [f"{len(self.tokens)} tokens"]
        if self.queries is not None:
            parts.append(f"{len(self.queries)} queries")
        parts += [
            f"{kind} of {', '.join(given)}"
            for kind, given in (("scores", self.scores), ("maps", self.maps))
            if given
        ]
        if self.heads:
            parts.append(f"heads of {len(self.heads)} layers")
        return f"<Explanation: {'; '.join(parts)}>"

    @classmethod
    def from_llm(cls, result: LLMAttributionResult, name: str = "attribution") -> Explanation:
        """What an ``LLMAttributionResult`` says: ours, or one of Captum's own classes.

        The queries are the output tokens, and their map is ``token_attr``; there is none where
        that is None.

        Args:
            result: The result.
            name: Of the method.

        Example:
            >>> llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
            >>> result = llm.attribute("a b c", target="d e")
            >>> Explanation.from_llm(result, "contribution").maps["contribution"].shape
            torch.Size([2, 3])
        """
        probability = result.output_probs
        found = cls(
            tokens=list(result.input_tokens),
            scores={name: result.seq_attr.detach().cpu()},
            maps={} if result.token_attr is None else {name: result.token_attr.detach().cpu()},
            queries=list(result.output_tokens),
            probability=None if probability is None else probability.detach().cpu(),
            settings={"method": name, **versions()},
        )
        ids = getattr(result.inp, "itp_tensor", None)  # tokens are the features
        if ids is None:
            return found
        assert result.inp is not None
        tokenizer = result.inp.tokenizer
        output_ids = getattr(result, "output_ids", None)
        if output_ids is None:  # Captum's own, which does not keep the spaces between words
            found = replace(
                found,
                tokens=readable_tokens(tokenizer, ids[0]),
                queries=_readable_entries(tokenizer, result.output_tokens),
            )
        else:
            found = replace(found, query_words=_words(tokenizer, output_ids))
        found = replace(found, words=_words(tokenizer, ids[0]))
        return _with_text(found, result.inp) if isinstance(result.inp, EncodedTokenInput) else found

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
        """What the dense maps of layers say of one text.

        Heads and layers are averaged over absolute values; of contributions there is
        ``"contribution-signed"`` beside them, as of :func:`explain`. Scores are means over the
        queries that see a token: that is, where any head of the layer is not zero.

        Args:
            tokens: ``S`` readable tokens.
            maps: By measure what ``attribute`` gave: ``(1, H, T, S)`` a layer. Or what
                :meth:`~captum_cw.ContributionWeights.decompose` gave, which fills heads too.
            queries: ``T`` readable tokens of the queries; None where they are the tokens.
            layers: Names of what ``decompose`` gave; numbers by default.
            top_k: How many keys are kept for each query of each head.

        Raises:
            TypeError: If ``maps`` is neither.
            ValueError: If there is no map, or shapes do not fit.

        Example:
            >>> method = ContributionWeights(model)
            >>> tokens = ["a", " b", " c", " d", " e"]
            >>> found = Explanation.from_maps(tokens, method.decompose(input_ids))
            >>> list(found.maps), len(found.heads)
            (['attention', 'vwon', 'contribution', 'contribution-signed'], 2)
            >>> attention = AttentionWeights(model).attribute(input_ids)
            >>> Explanation.from_maps(tokens, {"attention": attention}).maps["attention"].shape
            torch.Size([5, 5])
        """
        if top_k < 0:
            raise ValueError(f"top_k must be 0 or more, got {top_k}.")
        heads: list[HeadMaps] = []
        if isinstance(maps, Mapping):
            measures = {name: [_of_one_text(name, x) for x in xs] for name, xs in maps.items()}
        else:
            parts = [_one_decomposition(d) for d in maps]
            names = [str(n) for n in range(len(parts))] if layers is None else layers
            if len(names) != len(parts):
                raise ValueError(f"layers has {len(names)} names, but maps {len(parts)} layers.")
            if top_k:
                heads = [_heads_of(name, d, top_k) for name, d in zip(names, parts, strict=True)]
            measures = {
                "attention": [d.attention for d in parts],
                "vwon": [d.attention.abs() * d.relative_norm for d in parts],
                "contribution": [d.contribution for d in parts],
            }
        if not all(measures.values()) or not measures:
            raise ValueError("There is no map: give those of one layer or more.")
        shapes = {tuple(x.shape[1:]) for xs in measures.values() for x in xs}
        if len(shapes) > 1:
            raise ValueError(
                f"maps have shapes (T, S) {sorted(shapes)}: give layers of one kind, such as "
                "kind='cross'."
            )
        found = {
            name: mean_of_layers([x.abs().mean(0) for x in xs]) for name, xs in measures.items()
        }
        scores = {
            name: mean_of_layers([_over_queries(x.abs()).mean(0) for x in xs])
            for name, xs in measures.items()
        }
        if "contribution" in measures:
            signed = measures["contribution"]
            found[SIGNED] = mean_of_layers([x.sum(0) for x in signed])
            scores[SIGNED] = mean_of_layers([_over_queries(x).sum(0) for x in signed])
        return cls(tokens, scores, found, heads, queries, settings=versions())

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, at once: tensors as they are, the rest in its metadata.

        The same explanation makes the same bytes.

        Args:
            path: Of the file, such as ``"text.safetensors"``.

        Raises:
            TypeError: If ``settings`` hold what JSON cannot.

        Example:
            >>> path = getfixture("tmp_path") / "text.safetensors"
            >>> explain(model, tokenizer, "a b c").save(path)
            >>> Explanation.load(path).tokens
            [' a', ' b', ' c']
        """
        files.save(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Reads what :meth:`save` wrote, bit for bit; nothing in a file can run code.

        Args:
            path: Of the file.

        Raises:
            ValueError: If the file is damaged, another one, or of a version that is not known.
        """
        return files.load(path, cls, HeadMaps)

    @property
    def sinks(self) -> tuple[int, ...]:
        """The place of the token that is likely to be an attention sink: the first.

        Empty if it is alone, or where tokens are together in spans or messages.

        Example:
            >>> found = explain(model, tokenizer, "a b c")
            >>> found.sinks, found.by_span(["a b", "c"]).sinks
            ((0,), ())
        """
        return () if self.settings.get("by") in ("span", "message") else sink(self.tokens)

    def page(self, *, sinks: Collection[int] | None = None) -> str:
        """One interactive HTML page, which needs no other file and no network.

        Args:
            sinks: Places of tokens that the page can leave out of its colours; None for
                :attr:`sinks`.

        Raises:
            ValueError: As :func:`captum_cw.explanation.page.explanation_page`.

        Example:
            >>> explain(model, tokenizer, "a b c").page().startswith("<!DOCTYPE html>")
            True
        """
        from captum_cw.explanation.page import explanation_page

        return explanation_page(self, sinks=sinks)

    def save_page(self, path: str | Path, *, sinks: Collection[int] | None = None) -> None:
        """Saves :meth:`page` to a file, usually ending in ``.html``.

        Args:
            path: Of the file.
            sinks: As of :meth:`page`.

        Raises:
            ValueError: As :meth:`page`.

        Example:
            >>> path = getfixture("tmp_path") / "page.html"
            >>> explain(model, tokenizer, "a b c").save_page(path)
        """
        with whole_file(path) as whole:
            whole.write_text(self.page(sinks=sinks), encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        from captum_cw.explanation.page import framed

        return framed(self.page(), f"{self!r} Trust this notebook, or run it, to see the page.")

    def to_dataframe(self, of: Literal["scores", "maps"] = "scores") -> DataFrame:
        """A pandas table, a column a method.

        Args:
            of: ``"scores"``: a row a token, with its ``place``, ``token`` and ``word``.
                ``"maps"``: a row for each query and token, with the places (``query``, ``place``)
                and texts (``query_token``, ``token``) of both.

        Returns:
            A ``pandas.DataFrame``.

        Raises:
            ImportError: If pandas is not installed.
            ValueError: If ``of`` is unknown, or a method has the name of one of these columns.

        Example:
            >>> explain(model, tokenizer, "a b c").to_dataframe().columns[:5].tolist()
            ['place', 'token', 'word', 'attention', 'vw']
        """
        return files.to_dataframe(self, of)

    def to_xarray(self) -> Dataset:
        """An xarray data set with named dimensions.

        ``scores`` is ``(measure, key)`` and ``maps`` ``(measure, query, key)``, NaN for a method
        that has none. Heads are ``(layer, head, query, rank)``, from the key that matters most:
        ``head_key``, ``attention``, ``relative_norm`` and ``cosine``, with ``share`` ``(layer,
        head, query)`` and ``output_norm`` ``(layer, query)``. Layers with fewer heads than others
        are filled up with NaN, and with -1 in ``head_key``. Tokens, words, queries, what is
        predicted and the names of layers are coordinates, and settings attributes.

        Returns:
            An ``xarray.Dataset``.

        Raises:
            ImportError: If xarray is not installed.

        Example:
            >>> dict(explain(model, tokenizer, "a b c").to_xarray().sizes)
            {'measure': 5, 'key': 3, 'query': 3, 'layer': 2, 'head': 4, 'rank': 3}
        """
        return files.to_xarray(self)

    def by_word(self, how: Grouping = "sum") -> Explanation:
        """The same by word; tokens that belong to none stay alone.

        Where the queries are the tokens of an output, they are put together by word, too, and the
        probability of a word is the product of those of its tokens.

        Args:
            how: Scores and the keys of maps are put together by ``"sum"``, ``"mean"`` or ``"max"``,
                queries by the mean. What is predicted is what is after a word's last token. Heads
                are left out.

        Raises:
            ValueError: If it is not known which tokens make a word.

        Example:
            >>> given = Explanation(["un", "known", "."], {"ig": torch.ones(3)}, words=[0, 0, 1])
            >>> given.by_word().tokens, given.by_word().scores["ig"]
            (['unknown', '.'], tensor([2., 1.]))
        """
        if self.words is None:
            raise ValueError(
                "It is not known which tokens make a word: give words=..., or spans to by_span."
            )
        grouped = self._grouped(_spans_of(self.words), how, "word")
        return (
            grouped if self.query_words is None else grouped._with_whole_queries(self.query_words)
        )

    def _with_whole_queries(self, words: Sequence[int | None]) -> Explanation:
        """The same with the queries, which are an output, put together by word."""
        assert self.queries is not None
        spans, probability = _spans_of(words), self.probability
        if probability is not None:
            probability = torch.stack([probability[slice(*span)].prod() for span in spans])
        predicted = self.predicted
        return replace(
            self,
            maps={name: group_scores(x.T, spans, "mean").T for name, x in self.maps.items()},
            queries=[joined(self.queries[start:stop]) for start, stop in spans],
            predicted=None if predicted is None else [predicted[stop - 1] for _, stop in spans],
            probability=probability,
        )

    def by_span(
        self,
        spans: Sequence[Span | str],
        how: Grouping = "sum",
        *,
        unit: Literal["tokens", "characters"] = "tokens",
    ) -> Explanation:
        """The same by spans, and nothing of the tokens between.

        Args:
            spans: Each start and stop, or a piece of the text that occurs once in it. A token
                belongs to the characters that hold most of it, white space left out.
            how: As for :meth:`by_word`.
            unit: What start and stop count.

        Raises:
            ValueError: If a span is empty, overlaps another, is not in the text, more than once, or
                for no token's greater part, or where characters are not known.

        Example:
            >>> by_span = explain(model, tokenizer, "a b c d").by_span(["b c", "d"])
            >>> by_span.tokens, by_span.maps["contribution"].shape
            ([' b c', ' d'], torch.Size([2, 2]))
        """
        check_choice("unit", unit, Literal["tokens", "characters"])
        return self._grouped([self._in_tokens(span, unit) for span in spans], how, "span")

    def by_message(self, how: Grouping = "sum") -> Explanation:
        """The same by message of a chat, by role; nothing of what the chat template adds.

        Args:
            how: As for :meth:`by_word`.

        Raises:
            ValueError: If it is not known where messages stand.
        """
        if self.messages is None:
            raise ValueError(
                "It is not known where messages stand: the text was given as no chat, or its "
                "template rewrites them. Give their places to by_span."
            )
        grouped = self._grouped([(m.start, m.stop) for m in self.messages], how, "message")
        roles = [m.role for m in self.messages]
        return replace(grouped, tokens=roles)

    def _in_tokens(self, span: Span | str, unit: str) -> Span:
        if unit == "tokens" and not isinstance(span, str):
            start, stop = span
            return start, stop
        if self.text is None or self.offsets is None:
            raise ValueError(
                f"Span {span!r} is of characters, but it is not known where tokens stand in "
                "the text: count tokens instead."
            )
        if isinstance(span, str):
            count = self.text.count(span) if span else 0
            if count != 1:
                raise ValueError(
                    f"{span!r} occurs {count} times in the text: give its characters or tokens."
                )
            span = (start := self.text.index(span), start + len(span))
        check_spans([span], len(self.text), "characters")
        tokens = [n for n, o in enumerate(owners(self.text, self.offsets, [span])) if o is not None]
        if not tokens:
            raise ValueError(
                f"Span {self.text[slice(*span)]!r} at {span} holds no token for its greater part: "
                "take more of the text."
            )
        return tokens[0], tokens[-1] + 1

    def _grouped(self, spans: Sequence[Span], how: Grouping, by: str) -> Explanation:
        check_spans(spans, len(self.tokens), "tokens")
        own = self.queries is None

        def queries(x: Tensor) -> Tensor:
            return group_scores(x.T, spans, "mean").T if own else x

        last = [stop - 1 for _, stop in spans]
        predicted, probability = self.predicted, self.probability
        if own and predicted is not None:
            predicted = [predicted[n] for n in last]
        if own and probability is not None:
            probability = probability[last]
        return Explanation(
            tokens=[joined(self.tokens[start:stop]) for start, stop in spans],
            scores={name: group_scores(x, spans, how) for name, x in self.scores.items()},
            maps={name: queries(group_scores(x, spans, how)) for name, x in self.maps.items()},
            queries=self.queries,
            predicted=predicted,
            probability=probability,
            settings={**self.settings, "by": by, "how": how},
        )


def _spans_of(words: Sequence[int | None]) -> list[Span]:
    """The tokens of each word, and each token that belongs to none."""
    spans: list[Span] = []
    for place, word in enumerate(words):
        if place and word is not None and word == words[place - 1]:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def versions() -> dict[str, str]:
    """What an explanation was made with, for its settings."""
    return {
        "captum_cw": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def most_important(a: Tensor, c: Tensor, K: int) -> Tensor:
    """Of attention and contributions ``(H, t, n)``, the ``K`` keys at most that matter most."""
    return torch.maximum(_of_largest(a), _of_largest(c)).topk(min(K, a.shape[-1])).indices


def _of_largest(x: Tensor) -> Tensor:
    """Over the largest of its row, signs left out; zero where all are."""
    x = x.abs()
    return (x / x.amax(-1, keepdim=True)).nan_to_num(0)


def mean_of_layers(layers: list[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return torch.stack(layers).mean(0)


def _readable_entries(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Entries of the vocabulary as a person reads them; other strings as they are."""
    vocabulary = tokenizer.get_vocab()  # made anew each time it is asked for
    return [
        readable_tokens(tokenizer, [vocabulary[token]])[0] if token in vocabulary else token
        for token in tokens
    ]


def _words(tokenizer: Any, ids: Tensor) -> list[int | None] | None:
    """The words of tokens; None where the tokenizer does not know one of them."""
    try:
        return word_numbers(tokenizer, ids)
    except ValueError:
        return None


def _with_text(found: Explanation, inp: EncodedTokenInput) -> Explanation:
    """The places of a text and its messages among the tokens that were not skipped."""
    kept = [True] * inp.inp_tensor.shape[1] if inp.itp_mask is None else inp.itp_mask[0].tolist()
    messages = []
    for role, start, stop in inp.messages or ():
        before, size = sum(kept[:start]), sum(kept[start:stop])
        if size:
            messages.append(Message(role, before, before + size))
    offsets = inp.offsets and [o for o, keep in zip(inp.offsets, kept, strict=True) if keep]
    return replace(
        found,
        text=inp.text,
        offsets=offsets,
        messages=None if inp.messages is None else messages,
    )


def _of_one_text(name: str, x: Any) -> Tensor:
    """``(H, T, S)``."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"maps[{name!r}] holds a {type(x).__name__}: give a list of tensors (1, H, T, S)."
        )
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(
            f"maps[{name!r}] holds shape {tuple(x.shape)}, expected (1, H, T, S): give one text of "
            "a batch, x[:1]."
        )
    return x[0].detach().cpu().float()


def _one_decomposition(d: Any) -> Decomposition:
    if not isinstance(d, Decomposition):
        raise TypeError(
            f"maps holds a {type(d).__name__}: name the measure, {{'attention': [...]}}, or give a "
            "list of what decompose gave."
        )
    return Decomposition(*(_of_one_text(part, x) for part, x in d._asdict().items()))


def _heads_of(name: str, d: Decomposition, keys: int) -> HeadMaps:
    a, relative_norm, cosine, c = d
    best = most_important(a, c, keys)
    return HeadMaps(
        name,
        keys=best.int(),
        attention=a.gather(-1, best),
        relative_norm=relative_norm.gather(-1, best),
        cosine=cosine.gather(-1, best),
        output_norm=a.new_full((a.shape[1],), torch.nan),
        share=c.sum(-1),
    )


def _over_queries(x: Tensor) -> Tensor:
    """Means over the queries that see a key: ``(H, T, S)`` to ``(H, S)``."""
    return x.sum(1) / (x != 0).any(0).sum(0).clamp(min=1)
