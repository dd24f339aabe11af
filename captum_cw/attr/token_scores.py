"""One score per token from a measure: reductions over queries, heads and layers (Eq. 15)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from captum_cw import functional
from captum_cw._utils.suggestions import kind
from captum_cw.attr._captum import Attribution, logged
from captum_cw.attr.measures import AttentionAttribution, as_given, refuse_target, stack_layers
from captum_cw.capture import Execution
from captum_cw.capture.arguments import read_arguments
from captum_cw.capture.call_tokens import tokens_of
from captum_cw.capture.model import LOGITS
from captum_cw.capture.run import Inputs, Queries
from captum_cw.capture.target_value import Target
from captum_cw.functional import Aggregation, AnyLayer, AttentionLayer, Reduction, check_choice
from captum_cw.rollout import Rollout
from captum_cw.text.prompts import leading, refuse_later_tokens

__all__ = ["TokenScores"]


class TokenScores(Attribution):  # type: ignore[misc]  # captum has no types for it
    """Token scores from any measure; it wraps a measure as Captum's NoiseTunnel does.

    The score of token ``j`` in one head is the mean of ``|g_ij|``, the absolute measure, over the
    queries ``i`` that see the token (arXiv 2606.07604, Eq. 15). Then heads and layers are
    aggregated. Each layer is reduced while the model runs, so memory grows linearly with the text.

    ``layers="rollout"`` follows the influence of tokens through all layers instead (Abnar &
    Zuidema 2020). Each layer becomes one map ``(T, T)``, which says how much of the residual stream
    after attention each token makes: half attention and half the stream for
    :class:`AttentionWeights`; norms for the value-weighted measures; absolute shares for
    :class:`ContributionWeights`; the weights themselves for :class:`ALTIWeights` (see
    :mod:`captum_cw.rollout`). The maps are taken in the residual stream, whatever the measure's
    ``space``. Their product is reduced over the queries that a token reaches, and is held in
    memory.

    Args:
        method: A measure, such as ``ContributionWeights(model)``.
        reduction: The reduction over queries: ``"mean"`` (Eq. 15), ``"sum"``, ``"max"`` or
            ``"rms"``. The mean overrates late tokens, which few queries see; the sum does not.
        layers: The aggregation over layers: ``"mean"``, ``"sum"``, ``"max"``, ``"rollout"``, or
            None to keep all layers.
        heads: The aggregation over heads: ``"mean"``, ``"sum"``, ``"max"``, or None to keep all
            heads. With ``"sum"`` and ``signed=True``, the contributions to each query are shares of
            a layer's output, which sum to one. A rollout needs ``"mean"``; one of attention also
            allows ``"max"``.
        queries: The queries that count: ``"all"``, the index of one query (to explain one
            prediction), or a slice. Indices leave padding out, so -1 is the last token of each
            example.
        signed: Whether to keep signs. By default absolute values are reduced.

    Raises:
        TypeError: If ``method`` is not a measure.
        ValueError: If a choice is unknown, or does not go with ``layers``.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> TokenScores(ContributionWeights(model)).attribute(ids).shape
        torch.Size([1, 5])
        >>> per_head = TokenScores(ContributionWeights(model), layers=None, heads=None)
        >>> per_head.attribute(ids).shape
        torch.Size([1, 2, 4, 5])
        >>> last = TokenScores(ContributionWeights(model), layers="rollout", queries=-1)
        >>> torch.allclose(last.attribute(ids).sum(), torch.tensor(1.0))
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
                f"method is {kind(method)}: give ContributionWeights(model), "
                "TargetContributions(model), or another measure."
            )
        check_choice("reduction", reduction, Reduction)
        check_choice("layers", layers, Literal[Aggregation, "rollout", None])
        check_choice("heads", heads, Literal[Aggregation, None])
        if layers == "rollout":
            method.mixing(heads)  # raises an error if the method has no such map
            if signed:
                raise ValueError(
                    "signed=True, but layers='rollout' multiplies absolute values: leave it out."
                )
        super().__init__(method.forward_func)
        self.method = method
        self.reduction: Reduction = reduction
        self.layers: Aggregation | Literal["rollout"] | None = layers
        self.heads: Aggregation | None = heads
        self.queries = _check_queries(queries)
        self.signed = signed

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the class."""
        return cls.__name__

    @property
    def ranks_whole_tokens(self) -> bool:
        """Whether only whole tokens have scores, and single heads have none."""
        of_tokens = self.layers == "rollout" or self.method.explains_target
        return of_tokens or self.method.maps_of(2) == 1

    @logged
    def attribute(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: Target = None,
        *,
        contrast: Target = None,
        show_progress: bool = False,
    ) -> Any:
        """Return one score per token.

        Args:
            inputs: The inputs of the measure's ``attribute``.
            additional_forward_args: Further positional arguments of the model, as in Captum.
            target: The target of :class:`~captum_cw.TargetContributions`; None for measures that
                explain a layer's output.
            contrast: A second target, which is subtracted.
            show_progress: Whether to show a progress bar over the layers after two seconds.

        Returns:
            ``(B, S)``; with ``layers=None`` and ``heads=None`` ``(B, L, H, S)``. float32, detached;
            padded tokens have the score zero. If ``inputs`` is a tuple of one tensor, the result
            is put into such a tuple too.

        Raises:
            IndexError: If an example does not have the queries.
            ValueError: If layers of different shapes are kept or aggregated. Other errors are those
                of the measure's ``attribute``.
            UnsupportedModelError: If a rollout meets cross-attention, or a residual stream that is
                not found. Other errors are those of the measure's ``attribute``.
        """
        options: dict[str, Any] = {"show_progress": show_progress}
        if self.method.explains_target:
            options |= {"target": target, "contrast": contrast}
        else:
            refuse_target(target)
            refuse_target(contrast, "contrast")
        if self.layers == "rollout":
            path, chosen, _ = self._path(inputs, additional_forward_args, self._chosen, **options)
            return as_given(inputs, path.scores(self.reduction, chosen).float())
        apart = not self.method.explains_target
        apart = apart and functional.is_of_each_query(self.method.measure)
        if not self.method.explains_target:
            options["repeatable"] = True
        if apart:
            options["queries"] = _Chosen(self.queries)

        def on_layer(execution: Execution, layer: AnyLayer) -> Tensor:
            scores = functional.token_scores(
                layer,
                self.method.measure,
                self.reduction,
                signed=self.signed,
                queries=None if apart else self._chosen(execution, layer),
            )
            return functional.aggregate(scores, self.heads, dim=1).float()

        results, _ = self.method.observe(inputs, additional_forward_args, on_layer, **options)
        return as_given(inputs, self._over_layers(results))

    def _over_layers(self, results: list[tuple[Execution, Tensor]]) -> Tensor:
        scores = stack_layers([of_layer for _, of_layer in results], "the scores")
        return functional.aggregate(scores, cast(Aggregation | None, self.layers), dim=1)

    def _path(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        choose: Callable[[Execution, AttentionLayer], Tensor | None],
        **options: Any,
    ) -> tuple[Rollout, Tensor | None, Any]:
        """Return the rollout of all layers, the chosen queries, and the output of the model."""
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
            **options,
        )
        return path, results[0][1], output

    def _chosen(self, execution: Execution, layer: AnyLayer) -> Tensor | None:
        """Return the queries that count, ``(B, T)`` boolean; None for all."""
        return None if self.queries == "all" else _chosen(self.queries, layer)

    def of_target(
        self,
        inputs: Inputs,
        target: Target,
        contrast: Target = None,
        *,
        prompt: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the scores of the text's own tokens for a target, without virtual tokens.

        Args:
            inputs: The inputs of :meth:`attribute`, padded on the right at most.
            target: The target.
            contrast: A second target, which is subtracted; None for none.
            prompt: As for :meth:`rows`.

        Returns:
            The scores ``(B, S)``, aggregated over heads and layers, and the model's output.
        """
        heads = self._aggregated_heads()
        T, cached, kept = self._length(inputs)

        def on_layer(execution: Execution, layer: AnyLayer) -> Tensor:
            before = leading(execution, layer, T, kept)
            if prompt is not None:
                refuse_later_tokens(execution, layer, before, prompt)
            scores = functional.token_scores(
                layer, self.method.measure, self.reduction, signed=self.signed
            )[..., max(0, before[1] - cached) :]
            return functional.aggregate(scores, heads, dim=1).float()

        results, output = self.method.observe(
            inputs, None, on_layer, text_only=True, target=target, contrast=contrast
        )
        return self._over_layers(results), output

    def rows(
        self,
        inputs: Inputs,
        queries: slice,
        *,
        prompt: int | None = None,
        show_progress: bool = False,
    ) -> tuple[Tensor, Any]:
        """Return the scores at each of some queries, without a reduction over queries.

        Both queries and scores are of the text's own tokens: learned virtual tokens before the text
        (prompt or prefix tuning) do not count. In a model of images and text, only the layers over
        the text count, unless the measure has a ``layer``. Memory grows with the number of queries.

        Args:
            inputs: The inputs of :meth:`attribute`, without padding.
            queries: The queries, as a slice with a start and a stop.
            prompt: The number of tokens before those that the model predicts one by one. If it is
                given, predicted tokens must not see later ones. Tokens of the prompt may.
            show_progress: Whether to show a progress bar over the layers after two seconds.

        Returns:
            The scores ``(B, t, S)``, aggregated over heads and layers, and the model's output.

        Raises:
            UnsupportedModelError: If it is unknown which queries and keys are the text's, or if
                ``prompt`` is given and predicted tokens see later ones. Other errors are those of
                :meth:`attribute`.
            ValueError: If layers or heads are not aggregated, or ``queries`` are already chosen.
        """
        heads = self._aggregated_heads()
        T, cached, kept = self._length(inputs)

        def own(execution: Execution, layer: AttentionLayer) -> tuple[slice, slice]:
            """Return the requested queries, and the text's keys, as the layer counts them."""
            before = leading(execution, layer, T, kept)
            if prompt is not None:
                refuse_later_tokens(execution, layer, before, prompt)
            start = max(0, before[1] - cached)
            return slice(queries.start + before[0], queries.stop + before[0]), slice(start, None)

        if self.layers == "rollout":
            return self._rows_through(inputs, own, show_progress)

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            rows, keys = own(execution, layer)
            scores = functional.query_scores(
                layer, self.method.measure, rows, heads=heads, signed=self.signed
            )
            return scores[:, :, keys].float()

        results, output = self.method.observe(
            inputs, None, on_layer, text_only=True, show_progress=show_progress
        )
        return self._over_layers(results), output

    def _aggregated_heads(self) -> Aggregation:
        """Return how heads are aggregated, if all is aggregated and no queries are chosen."""
        if self.layers is None or self.heads is None or self.queries != "all":
            raise ValueError(
                f"layers={self.layers!r}, heads={self.heads!r}, queries={self.queries!r}: scores "
                "of a language model need aggregated layers and heads, and queries='all'."
            )
        return self.heads

    def _length(self, inputs: Inputs) -> tuple[int | None, int, int | None]:
        """Return the numbers of given, cached and last tokens with logits; None if unknown."""
        model = self.method.model
        if model is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return None, 0, None
        tokens = tokens_of(model, *read_arguments(model, model.forward, inputs, None))
        return tokens.T, tokens.cached, tokens.named.get(LOGITS)

    def _rows_through(
        self,
        inputs: Inputs,
        own: Callable[[Execution, AttentionLayer], tuple[slice, slice]],
        show_progress: bool,
    ) -> tuple[Tensor, Any]:
        """Return the rows of a rollout; ``own`` gives the queries and keys of the text."""
        queries = keys = slice(0)

        def choose(execution: Execution, layer: AttentionLayer) -> Tensor:
            nonlocal queries, keys
            queries, keys = own(execution, layer)
            chosen = layer.value.new_zeros(len(layer.value), layer.T, dtype=torch.bool)
            chosen[:, queries] = True
            return chosen

        path, chosen, output = self._path(
            inputs, None, choose, text_only=True, show_progress=show_progress
        )
        return path.rows(chosen)[:, queries, keys].float(), output


class _Chosen:
    """The queries of each layer of a pass that count.

    Args:
        queries: The queries, as for :class:`TokenScores`.
    """

    def __init__(self, queries: Literal["all"] | int | slice) -> None:
        self._queries = queries
        # For the last token mask, since layers share it, and the last device.
        self._last: tuple[Tensor | None, torch.Size, torch.device, Queries] | None = None

    def __call__(self, layer: AttentionLayer) -> Queries | None:
        if self._queries == "all":
            return None
        real, here = layer.mask.real, (layer.output.shape[:2], layer.value.device)
        if self._last is None or self._last[0] is not real or self._last[1:3] != here:
            chosen = _chosen(self._queries, layer)
            rows: list[int] = chosen.any(0).nonzero()[:, 0].tolist()
            self._last = real, *here, (rows, chosen)
        return self._last[3]


def _chosen(queries: int | slice, layer: AnyLayer) -> Tensor:
    """Return the queries of a layer that count, ``(B, T)`` boolean."""
    chosen = layer.value.new_zeros(len(layer.value), layer.T, dtype=torch.bool)
    real = layer.mask.real
    token_masks = torch.ones_like(chosen) if real is None else real.to(chosen.device)
    for b, token_mask in enumerate(token_masks):
        places = token_mask.nonzero()[:, 0]
        try:
            chosen[b, places[queries]] = True
        except IndexError:
            raise IndexError(
                f"queries={queries!r}, but example {b} has {len(places)} tokens."
            ) from None
        if not chosen[b].any():
            raise IndexError(f"queries={queries!r} holds no token of example {b}.")
    return chosen


def _check_queries(queries: Any) -> Literal["all"] | int | slice:
    """Return the queries in the form that they are stored in; raise a ValueError for others."""
    if isinstance(queries, str) and queries == "all":
        return "all"
    if isinstance(queries, slice) and (queries.step is None or queries.step > 0):
        return queries
    if hasattr(queries, "__index__") and not isinstance(queries, bool):
        return operator.index(queries)
    raise ValueError(
        f"queries={queries!r} is unknown: give 'all', an index or a slice with a positive step."
    )
