"""One score a token from a measure: reductions over queries, heads and layers (Eq. 15)."""

from __future__ import annotations

import operator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from captum_cw import functional
from captum_cw.attr._captum import Attribution, logged
from captum_cw.attr.layer import (
    AttentionAttribution,
    Inputs,
    as_given,
    refuse_target,
    stack_layers,
)
from captum_cw.capture import Execution
from captum_cw.functional import Aggregation, AttentionLayer, Reduction, check_choice

__all__ = ["TokenScores"]


class TokenScores(Attribution):  # type: ignore[misc]  # captum has no types for it
    """Scores of tokens from any of the measures; wraps a measure as Captum's NoiseTunnel does.

    The score of token ``j`` in one head is the mean of ``|g_ij|`` over the queries ``i`` that can
    see it (arXiv 2606.07604, Eq. 15); heads and layers are then aggregated. Layers are
    reduced while the model runs, so memory grows linearly with the text.

    Args:
        method: A measure, such as ``ContributionWeights(model)``.
        reduction: Over queries: ``"mean"`` (Eq. 15), ``"sum"``, ``"max"`` or ``"rms"``. The mean
            overrates late tokens, which few queries see; the sum does not.
        layers: Over layers: ``"mean"``, ``"sum"``, ``"max"``, or None to keep them.
        heads: Over heads: likewise. With ``"sum"``, contributions are shares of a layer's output,
            which sum to one for each query where ``signed`` is True.
        queries: ``"all"``, the index of one query (explains one prediction), or a slice. They
            count the real tokens of each example, padding left out, so -1 is its last token.
        signed: Keeps signs; by default absolute values are reduced.

    Raises:
        TypeError: If ``method`` is no measure.
        ValueError: If a choice is unknown.

    Example:
        >>> TokenScores(ContributionWeights(model)).attribute(input_ids).shape
        torch.Size([1, 5])
        >>> per_head = TokenScores(ContributionWeights(model), layers=None, heads=None)
        >>> per_head.attribute(input_ids).shape
        torch.Size([1, 2, 4, 5])
    """

    def __init__(
        self,
        method: AttentionAttribution,
        reduction: Reduction = "mean",
        layers: Aggregation | None = "mean",
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
        for name, how in (("layers", layers), ("heads", heads)):
            if how is not None and how not in get_args(Aggregation):
                raise ValueError(
                    f"{name}={how!r} is unknown: choose 'mean', 'sum', 'max', or None to keep them."
                )
        super().__init__(method.forward_func)
        self.method = method
        self.reduction: Reduction = reduction
        self.layers: Aggregation | None = layers
        self.heads: Aggregation | None = heads
        self.queries = _readable_queries(queries)
        self.signed = signed

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

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
            ValueError: As the method's ``attribute``, and where layers of different shape are
                to be put together.
        """
        refuse_target(target)
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
        return as_given(inputs, functional.aggregate(scores, self.layers, dim=1))

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
        self, inputs: Inputs, queries: slice, *, show_progress: bool = False
    ) -> tuple[Tensor, Any]:
        """The scores at each of a few queries, instead of a reduction over them.

        Args:
            inputs: As for :meth:`attribute`, unpadded.
            queries: The queries, with a start and a stop.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            ``(B, t, S)`` aggregated over heads and layers, and the output of the model.
        """
        if self.layers is None or self.heads is None or self.queries != "all":
            raise ValueError(
                f"layers={self.layers!r}, heads={self.heads!r}, queries={self.queries!r}: one row "
                "a query needs layers and heads aggregated, and queries='all'."
            )
        heads = self.heads

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            return functional.query_scores(
                layer, self.method.measure, queries, heads=heads, signed=self.signed
            ).float()

        results, output = self.method.observe(inputs, None, on_layer, show_progress=show_progress)
        scores = stack_layers([r for _, r in results], "the scores")
        return functional.aggregate(scores, self.layers, dim=1), output


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
