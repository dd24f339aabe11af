"""One score per token from a measure: reductions over queries, heads and layers (Eq. 15).

Layers are reduced each for itself, or followed from the last one to the first (see
:mod:`captum_cw.rollout`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from captum_cw import functional
from captum_cw.attr._captum import Attribution, logged
from captum_cw.attr.measures import (
    AttentionAttribution,
    as_given,
    refuse_target,
    stack_layers,
)
from captum_cw.capture import Execution
from captum_cw.capture.call_tokens import tokens_of
from captum_cw.capture.model import LOGITS
from captum_cw.capture.run import Inputs
from captum_cw.functional import Aggregation, AttentionLayer, Reduction, check_choice
from captum_cw.rollout import Rollout
from captum_cw.text.prompts import leading, refuse_later_tokens

__all__ = ["TokenScores"]


class TokenScores(Attribution):  # type: ignore[misc]  # captum has no types for it
    """Scores of tokens from any of the measures; wraps a measure as Captum's NoiseTunnel does.

    The score of token ``j`` in one head is the mean of ``|g_ij|`` over the queries ``i`` that can
    see it (arXiv 2606.07604, Eq. 15); heads and layers are then aggregated. Layers are
    reduced while the model runs, so memory grows linearly with the text.

    With ``layers="rollout"``, influence is followed through the layers first, each
    seen as a map of how much of the residual stream after attention each token makes, heads put
    together: for :class:`AttentionWeights` half attention and half the stream itself, for
    :class:`ContributionWeights` the absolute shares of the stream, for :class:`ALTIWeights` the
    weights. That is measured where the sum goes on, whatever the method's ``space``. The one map of
    all layers is then reduced over the queries that a token reaches. Such a map, of size ``T x T``,
    is held.

    Args:
        method: A measure, such as ``ContributionWeights(model)``.
        reduction: Over queries: ``"mean"`` (Eq. 15), ``"sum"``, ``"max"`` or ``"rms"``. The mean
            overrates late tokens, which few queries see; the sum does not.
        layers: Over layers: ``"mean"``, ``"sum"``, ``"max"``, or None to keep them; or
            ``"rollout"``, the product of their maps (Abnar & Zuidema 2020).
        heads: Over heads: ``"mean"``, ``"sum"``, ``"max"``, or None to keep them. With ``"sum"``,
            contributions are shares of a layer's output, which sum to one for each query where
            ``signed`` is True. Where layers are followed, leave ``"mean"`` (attention can be put
            together by ``"max"`` too).
        queries: ``"all"``, the index of one query (explains one prediction), or a slice. They
            count the real tokens of each example, padding left out, so -1 is its last token.
        signed: Keeps signs; by default absolute values are reduced.

    Raises:
        TypeError: If ``method`` is no measure.
        ValueError: If a choice is unknown, or does not go with ``layers``.

    Example:
        >>> TokenScores(ContributionWeights(model)).attribute(input_ids).shape
        torch.Size([1, 5])
        >>> per_head = TokenScores(ContributionWeights(model), layers=None, heads=None)
        >>> per_head.attribute(input_ids).shape
        torch.Size([1, 2, 4, 5])
        >>> last = TokenScores(ContributionWeights(model), layers="rollout", queries=-1)
        >>> torch.allclose(last.attribute(input_ids).sum(), torch.tensor(1.0))
        True
    """

    def __init__(
        self,
        method: AttentionAttribution,
        reduction: Reduction = "mean",
        layers: Aggregation | Literal["rollout"] | None = "mean",
        heads: Aggregation | None = "mean",
        queries: Literal["all"] | int | slice = "all",
        signed: bool = False,
    ) -> None:
        if not isinstance(method, AttentionAttribution):
            raise TypeError(
                f"method is of type {type(method).__name__}: give ContributionWeights(model), "
                "VWONAttention(model), VWAttention(model) or AttentionWeights(model)."
            )
        check_choice("reduction", reduction, Reduction)
        aggregations = get_args(Aggregation)
        for name, how, known in (
            ("layers", layers, (*aggregations, "rollout")),
            ("heads", heads, aggregations),
        ):
            if how is not None and how not in known:
                raise ValueError(
                    f"{name}={how!r} is unknown: choose {', '.join(map(repr, known))}, or None to "
                    "keep them."
                )
        if layers == "rollout":
            method.mixing(heads)  # raises where it has none
            if signed:
                raise ValueError(
                    "signed=True, but layers='rollout' multiplies absolute values: leave it out."
                )
        super().__init__(method.forward_func)
        self.method = method
        self.reduction: Reduction = reduction
        self.layers: Aggregation | Literal["rollout"] | None = layers
        self.heads: Aggregation | None = heads
        self.queries = _readable_queries(queries)
        self.signed = signed

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

    @property
    def ranks_whole_tokens(self) -> bool:
        """Whether heads are put together before tokens have scores, so that none are of a head."""
        return self.layers == "rollout" or self.method.maps_of(2) == 1

    @logged
    def attribute(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """One score a token.

        Args:
            inputs: As the method's ``attribute`` takes them.
            additional_forward_args: Further positional arguments, as in Captum.
            target: Must be None.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            ``(B, S)``, with ``L`` and ``H`` after ``B`` where ``layers`` and ``heads`` are None:
            ``(B, L, H, S)``. float32, detached; padded tokens have zeros. A tensor given in a
            tuple of one comes back in one.

        Raises:
            IndexError: If an example has no query at the index ``queries``.
            ValueError: As the method's ``attribute``, where layers of different shape are to be put
                together.
            UnsupportedModelError: As the method's ``attribute``, and where layers are followed
                through cross-attention, or a residual stream that is not found.
        """
        refuse_target(target)
        if self.layers == "rollout":
            return as_given(inputs, self._through(inputs, additional_forward_args, show_progress))
        chosen: dict[int, Tensor | None] = {}

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            if layer.T not in chosen:  # the same for all layers of one length
                chosen[layer.T] = self._chosen(layer)
            queries = chosen[layer.T]
            if queries is not None:
                queries = queries.to(layer.value.device)
            scores = functional.token_scores(
                layer, self.method.measure, self.reduction, signed=self.signed, queries=queries
            )
            return functional.aggregate(scores, self.heads, dim=1).float()

        results, _ = self.method.observe(
            inputs, additional_forward_args, on_layer, show_progress=show_progress
        )
        scores = stack_layers([r for _, r in results], "the scores")
        return as_given(inputs, self._over_layers(scores))

    def _over_layers(self, scores: Tensor) -> Tensor:
        return functional.aggregate(scores, cast(Aggregation | None, self.layers), dim=1)

    def _through(
        self, inputs: Inputs, additional_forward_args: object, show_progress: bool
    ) -> Tensor:
        """``(B, T)``, by layers that are followed."""
        path, chosen, _ = self._path(
            inputs,
            additional_forward_args,
            lambda execution, layer: self._chosen(layer),
            show_progress,
        )
        return path.scores(self.reduction, chosen).float()

    def _path(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        choose: Callable[[Execution, AttentionLayer], Tensor | None],
        show_progress: bool,
        *,
        text_only: bool = False,
    ) -> tuple[Rollout, Tensor | None, Any]:
        """The way through all layers, the chosen queries, and the output of the model."""
        path = Rollout()
        mixing = self.method.mixing(self.heads)

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor | None:
            path.add(layer, mixing, execution.name)
            return choose(execution, layer)

        results, output = self.method.observe(
            inputs,
            additional_forward_args,
            on_layer,
            stream=self.method.mixes_stream,
            one_text=True,
            text_only=text_only,
            show_progress=show_progress,
        )
        return path, results[0][1], output

    def _chosen(self, layer: AttentionLayer) -> Tensor | None:
        """``(B, T)``: the queries that count, by their place among the real tokens."""
        if self.queries == "all":
            return None
        real = layer.mask.real
        B, device = layer.value.shape[0], layer.value.device
        if real is None:
            real = torch.ones(B, layer.T, dtype=torch.bool, device=device)
        chosen = torch.zeros_like(real)
        for b in range(B):
            places = real[b].nonzero()[:, 0]
            try:
                chosen[b, places[self.queries]] = True
            except IndexError:
                raise IndexError(
                    f"queries={self.queries!r}, but example {b} has {len(places)} tokens."
                ) from None
            if not chosen[b].any():
                raise IndexError(f"queries={self.queries!r} holds no token of example {b}.")
        return chosen

    def rows(
        self,
        inputs: Inputs,
        queries: slice,
        *,
        prompt: int | None = None,
        show_progress: bool = False,
    ) -> tuple[Tensor, Any]:
        """The scores at each of a few queries, instead of a reduction over them.

        Learned virtual tokens, as of prompt or prefix tuning, stand before the text. Queries count
        the text's own tokens, and its own tokens are those that have scores. Of a model of images
        and text, the layers count that read the text, where the measure has no layers chosen.
        Memory grows with the rows that are asked for.

        Args:
            inputs: As for :meth:`attribute`, unpadded.
            queries: The queries, with a start and a stop.
            prompt: How many tokens come before those that the model is to predict one by one. Where
                it is given, no token may see those after it, but for the prompt's.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            ``(B, t, S)`` aggregated over heads and layers, and the output of the model.

        Raises:
            UnsupportedModelError: As :meth:`attribute`; if it is not known which queries and keys
                are the text's; and if tokens see those after them, though ``prompt`` is given.
            ValueError: As :meth:`attribute`, and if layers or heads are not aggregated, or
                ``queries`` are chosen already.
        """
        if self.layers is None or self.heads is None or self.queries != "all":
            raise ValueError(
                f"layers={self.layers!r}, heads={self.heads!r}, queries={self.queries!r}: one row "
                "a query needs layers and heads aggregated, and queries='all'."
            )
        T, cached, kept = self._length(inputs)

        def own(execution: Execution, layer: AttentionLayer) -> tuple[slice, slice]:
            """The asked queries, and the keys of the text, as the layer counts them."""
            before = leading(execution, layer, T, kept)
            if prompt is not None:
                refuse_later_tokens(execution, layer, before, prompt)
            start = max(0, before[1] - cached)
            return slice(queries.start + before[0], queries.stop + before[0]), slice(start, None)

        if self.layers == "rollout":
            return self._rows_through(inputs, own, show_progress)
        heads = self.heads

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            rows, keys = own(execution, layer)
            scores = functional.query_scores(
                layer, self.method.measure, rows, heads=heads, signed=self.signed
            )
            return scores[:, :, keys].float()

        results, output = self.method.observe(
            inputs, None, on_layer, text_only=True, show_progress=show_progress
        )
        scores = stack_layers([r for _, r in results], "the scores")
        return self._over_layers(scores), output

    def _length(self, inputs: Inputs) -> tuple[int | None, int, int | None]:
        """How many tokens are given, are in a given cache, and have logits; None if not known."""
        model = self.method.model
        if model is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return None, 0, None
        if isinstance(inputs, Mapping):
            tokens = tokens_of(model, (), inputs)
        else:
            tokens = tokens_of(model, inputs if isinstance(inputs, tuple) else (inputs,), {})
        return tokens.T, tokens.cached, tokens.named.get(LOGITS)

    def _rows_through(
        self,
        inputs: Inputs,
        own: Callable[[Execution, AttentionLayer], tuple[slice, slice]],
        show_progress: bool,
    ) -> tuple[Tensor, Any]:
        places = slice(0), slice(0)

        def choose(execution: Execution, layer: AttentionLayer) -> Tensor:
            nonlocal places
            places = own(execution, layer)
            chosen = layer.value.new_zeros(len(layer.value), layer.T, dtype=torch.bool)
            chosen[:, places[0]] = True
            return chosen

        path, chosen, output = self._path(inputs, None, choose, show_progress, text_only=True)
        return path.rows(chosen)[:, places[0], places[1]].float(), output


def _readable_queries(queries: Any) -> Literal["all"] | int | slice:
    if isinstance(queries, str) and queries == "all":
        return "all"
    if isinstance(queries, slice) and (queries.step is None or queries.step > 0):
        return queries
    if hasattr(queries, "__index__") and not isinstance(queries, bool):
        return operator.index(queries)
    raise ValueError(
        f"queries={queries!r} is unknown: give 'all', an index or a slice with a positive step."
    )
