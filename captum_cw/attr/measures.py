"""The measures as Captum layer attributions.

Each class has one formula of :mod:`captum_cw.functional`. The base class,
:class:`AttentionAttribution`, runs the model and returns the results in Captum's form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_cw import functional, rollout
from captum_cw.attr._captum import LayerAttribution, logged
from captum_cw.capture import Execution
from captum_cw.capture.model import check_fits
from captum_cw.capture.run import Inputs, Kinds, Runner, expected_layers
from captum_cw.functional import (
    Aggregation,
    AnyLayer,
    AttentionLayer,
    Decomposition,
    Measure,
    Scope,
    Space,
)

__all__ = [
    "ALTIWeights",
    "AttentionAttribution",
    "AttentionWeights",
    "ContributionWeights",
    "VWAttention",
    "VWONAttention",
]

Result = TypeVar("Result")
LayerT = TypeVar("LayerT", bound=AnyLayer)


class AttentionAttribution(LayerAttribution):  # type: ignore[misc]  # captum has no types for it
    """The base class of the measures.

    To add a measure, derive a class that sets ``name`` and ``measure``.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them (an ``nn.ModuleList`` counts as a list), or None
            for all attention layers in execution order.
        device_ids: As in Captum; not needed if ``forward_func`` is the model.
        kind: The attention layers to use if ``layer`` is None. In ``"self"`` layers, the tokens of
            a text attend to each other. In ``"cross"`` layers, the tokens of a decoder attend to
            the states of an encoder, whose length is ``S``. ``"all"`` uses both.
    """

    name: str
    """The name of the measure for users, also on the command line."""
    measure: Measure
    """The formula that is computed from each layer."""
    normaliser: Scope | None = None
    """The scope of the output that the measure divides by, if any."""
    space: Space = "attention"
    """The space of projections and norms; see :class:`ContributionWeights`."""
    explains_target = False
    """Whether the measure explains a target, such as a logit, instead of a layer's output."""
    needs_stream = False
    """Whether the measure reads the residual stream."""
    mixes_stream = True
    """Whether :meth:`mixing` reads the residual stream."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        kind: Kinds = "self",
    ) -> None:
        functional.check_choice("kind", kind, Kinds)
        self.kind: Kinds = kind
        self.runner = Runner(forward_func, layer, kind=kind)
        self.model = self.runner.model
        super().__init__(self.runner.forward_func, self.runner.layer, device_ids)

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the class, without the spaces that Captum puts before capitals."""
        return cls.__name__

    @property
    def layers(self) -> list[str]:
        """The names of the attributed attention layers, in execution order.

        They are known after the first ``attribute``. Before, a pass over two tokens finds them.
        """
        return self.runner.names

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Return the map of one layer that a rollout multiplies (see :mod:`captum_cw.rollout`).

        Args:
            heads: The aggregation of heads. ``"mean"`` stands for the measure's own aggregation.

        Returns:
            A measure whose rows sum to one.

        Raises:
            ValueError: If the measure does not have such a map, or not with this aggregation.
        """
        raise ValueError(
            f"{self.get_name()} does not have a map for layers='rollout': use layers='mean', or "
            "another measure."
        )

    def observe(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        *,
        stream: bool = False,
        **options: Any,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Apply ``on_layer`` to each chosen layer, seen in this measure's space.

        Arguments, further options and results are those of
        :meth:`captum_cw.capture.run.Runner.observe`.
        """
        return self.runner.observe(
            inputs,
            on_layer,
            additional_forward_args,
            space=self.space,
            stream=stream or self.needs_stream,
            normaliser=self.normaliser,
            **options,
        )

    @logged
    def attribute(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """Return the measure at every query and key of each layer.

        Args:
            inputs: Token ids ``(B, T)``; a tokenizer's ``BatchEncoding``, or a dict of keyword
                arguments; embeddings ``(B, T, d)`` for a model whose main input is ids; otherwise
                the model's main input; or a tuple of positional tensors. A multiple-choice model
                takes ids ``(B, choices, T)``. A module that takes one mapping, such as a
                ``SentenceTransformer``, receives a copy of the whole dict.
            additional_forward_args: Further positional arguments of the model, as in Captum.
            target: Must be None, since attention measures explain a layer's output, not a class.
            show_progress: Whether to show a progress bar over the layers after two seconds.

        Returns:
            A map ``(B, H, T, S)`` if ``layer`` is one module, otherwise a list with one map per
            layer; float32, detached. Captum's layer attributions have the size of the layer's
            output; these maps do not. Padded queries and keys are zero.

            If a module runs several times in a pass, its entry is a tuple with one map per
            execution; if ``layer`` is None, each execution has its own entry. If ``inputs`` is a
            tuple of one tensor, a single map is put into such a tuple too. Ids ``(B, choices, T)``
            give ``B * choices`` examples: the choices of the first example, then those of the
            second, and so on.

        Raises:
            TypeError: If ``inputs`` or ``layer`` is of a type that is not supported.
            ValueError: If ids, mask or positions do not fit the model, the input is empty, the
                model needs decoder tokens that are missing, a layer does not run attention,
                ``target`` is given, or activations are NaN.
            MemoryError: If the maps would not fit into memory. The message says their size.
            UnsupportedModelError: If the model does something that would make the result wrong.
        """
        refuse_target(target)
        return as_given(inputs, self._maps(inputs, additional_forward_args, show_progress))

    def _maps(self, inputs: Inputs, additional_forward_args: object, show_progress: bool) -> Any:
        def dense_map(layer: AttentionLayer) -> Tensor:
            return functional.dense_map(layer, self.measure).float()

        return self._dense(inputs, additional_forward_args, dense_map, show_progress)

    def _dense(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[AttentionLayer], Result],
        show_progress: bool,
        maps: int = 1,
    ) -> Any:
        """Apply ``on_layer``, which returns ``maps`` dense maps, if all of them fit into memory."""
        results, _ = self.observe(
            inputs,
            additional_forward_args,
            self._fitting(on_layer, maps),
            show_progress=show_progress,
        )
        return self._in_captums_form(results)

    def _fitting(
        self, on_layer: Callable[[LayerT], Result], maps: int = 1
    ) -> Callable[[Execution, LayerT], Result]:
        """Return a function that applies ``on_layer`` if the maps of all layers fit into memory."""
        seen: list[Execution] = []

        def check_and_apply(execution: Execution, layer: LayerT) -> Result:
            seen.append(execution)
            chosen = self.runner.chosen
            total = expected_layers(self.runner.roots, seen) if chosen is None else len(chosen)
            layers = max(total - len(seen) + 1, 1)
            B, H, T, S = len(layer.value), self.maps_of(layer.H), layer.T, layer.S
            check_fits(
                4 * B * H * T * S * layers * maps,
                layer.value.device,
                f"{layers} layers of {B} x {H} x {T} x {S}, float32",
                "Choose fewer layers (layer=...), or use TokenScores, which never holds a map.",
            )
            return on_layer(layer)

        return check_and_apply

    def maps_of(self, heads: int) -> int:
        """Return the number of maps of a layer with ``heads`` heads: one each, or one for all."""
        return functional.heads_of(self.measure, heads)

    def _in_captums_form(self, results: list[tuple[Execution, Result]]) -> Any:
        """Return one result for one module, otherwise a list. Several executions give a tuple."""
        if self.layer is None:
            return [result for _, result in results]

        def of(module: nn.Module) -> Result | tuple[Result, ...]:
            runs = [result for execution, result in results if execution.module is module]
            return runs[0] if len(runs) == 1 else tuple(runs)

        return of(self.layer) if isinstance(self.layer, nn.Module) else [of(m) for m in self.layer]


def as_given(inputs: object, result: Any) -> Any:
    """Put a tensor into a tuple of one if the input was in one, as Captum's metrics expect."""
    one = isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(result, Tensor)
    return (result,) if one else result


def refuse_target(target: object, name: str = "target") -> None:
    """Raise a ValueError if there is a target, or a contrast."""
    if target is not None:
        raise ValueError(
            f"{name}={target!r}: this measure explains the output of a layer, not a class or "
            "token, so it does not have a target. To explain a prediction, use "
            "TargetContributions(model), or InputContributions(model)."
        )


class _ValueAttribution(AttentionAttribution):
    """A measure of values, in one of the spaces of :class:`ContributionWeights`."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        space: Space = "attention",
        kind: Kinds = "self",
    ) -> None:
        functional.check_choice("space", space, Space)
        super().__init__(forward_func, layer, device_ids, kind=kind)
        self.space = space

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Return the map of the norms that each token and the stream itself add to the stream."""
        _check_heads_summed(heads)
        return rollout.norm_mixing


def _check_heads_summed(heads: Aggregation | None) -> None:
    if heads != "mean":
        raise ValueError(
            f"heads={heads!r}, but a rollout sums what the heads add to the residual stream: leave "
            "heads='mean'."
        )


class AttentionWeights(AttentionAttribution):
    """The attention weights ``a_ij`` of the model (arXiv 2606.07604, Eq. 1).

    They are the weights that the model used, with its mask, position bias, soft-cap and learned
    sinks.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        kind: The layers to use if ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> maps = AttentionWeights(model).attribute(ids)
        >>> len(maps), maps[0].shape
        (2, torch.Size([1, 4, 5, 5]))
    """

    name = "attention"
    measure = staticmethod(functional.attention)
    mixes_stream = False

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Return a map that is half attention, aggregated over heads, and half the stream."""
        if heads not in ("mean", "max"):
            raise ValueError(
                f"heads={heads!r}, but in a rollout the stream weighs as much as the attention of "
                "all heads together: use heads='mean', or 'max'."
            )
        return rollout.attention_mixing(heads)


class VWAttention(_ValueAttribution):
    """Value-weighted attention, ``|a_ij| ||v~_j||``, in the unit of the hidden states.

    It is measure ii of arXiv 2606.07604, section 5.2 (Kobayashi et al. 2020).

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        space: ``"attention"`` or ``"residual"``; see :class:`ContributionWeights`.
        kind: The layers to use if ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> VWAttention(model, model.model.layers[0].self_attn).attribute(ids).shape
        torch.Size([1, 4, 5, 5])
    """

    name = "vw"
    measure = staticmethod(functional.vw)


class VWONAttention(_ValueAttribution):
    """Value-weighted attention over the norm of the output, ``|a_ij| ||v~_j|| / ||o_i||``.

    It is measure iii of arXiv 2606.07604, section 5.2.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        space: ``"attention"`` or ``"residual"``; see :class:`ContributionWeights`.
        kind: The layers to use if ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> VWONAttention(model).attribute(ids)[1].shape
        torch.Size([1, 4, 5, 5])
    """

    name = "vwon"
    measure = staticmethod(functional.vwon)
    normaliser = "inter"


class ContributionWeights(_ValueAttribution):
    """Contribution weights: each token's share of the attention output (arXiv 2606.07604).

    ``c_ij = a_ij <o_i, v~_j> / ||o_i||^2`` combines attention, magnitude and direction. A negative
    contribution opposes the output.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        scope: The output that values are projected on. ``"inter"`` is the layer's output (Eq. 12);
            contributions sum to one over heads and keys. ``"intra"`` is the head's own output
            (Eq. 9); contributions sum to one over keys.
        space: Where projections and norms are measured. ``"attention"`` is the output of the
            attention layer, as in the paper. ``"residual"`` is what the layer adds to the residual
            stream. This differs if a norm follows attention (Gemma 2 and 3, OLMo 2). The scale of
            this norm is held fixed.
        kind: The layers to use if ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> maps = ContributionWeights(model).attribute(ids)
        >>> torch.allclose(maps[0].sum((1, 3)), torch.ones(1, 5), atol=1e-5)
        True
    """

    name = "contribution"
    measure = staticmethod(functional.contribution("inter"))

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        scope: Scope = "inter",
        space: Space = "attention",
        kind: Kinds = "self",
    ) -> None:
        super().__init__(forward_func, layer, device_ids, space=space, kind=kind)
        self.measure = functional.contribution(scope)
        self.normaliser = self.scope = scope

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Return the map of each token's share, and the stream's share, of the next stream."""
        if self.scope != "inter":
            raise ValueError(
                f"scope={self.scope!r} refers to the output of one head, but a rollout needs "
                "shares of the residual stream: use scope='inter'."
            )
        _check_heads_summed(heads)
        return rollout.contribution_mixing

    def has_convergence_delta(self) -> bool:
        """Return True: contributions sum to one, and the delta is what is missing."""
        return True

    def compute_convergence_delta(self, attributions: Any) -> Any:
        """Return one minus the sum of the contributions of each query.

        It is zero for padded queries, and for queries whose output vanishes.

        Args:
            attributions: The result of :meth:`attribute`: a tensor, or a list of them.

        Returns:
            ``(B, T)`` for inter, ``(B, H, T)`` for intra; a list for a list.

        Example:
            >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
            >>> method = ContributionWeights(model)
            >>> delta = method.compute_convergence_delta(method.attribute(ids))
            >>> [tuple(of_layer.shape) for of_layer in delta], bool(delta[0].abs().max() < 1e-5)
            ([(1, 5), (1, 5)], True)
        """
        if isinstance(attributions, (list, tuple)):
            return type(attributions)(self.compute_convergence_delta(a) for a in attributions)
        dims = (1, 3) if self.scope == "inter" else (3,)
        not_zero = (attributions != 0).sum(dims) > 0
        return (1 - attributions.sum(dims)) * not_zero

    @logged
    def attribute(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: None = None,
        *,
        return_convergence_delta: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Return the contribution of every key to the output of every query.

        Args:
            inputs: As for every measure; see
                :meth:`~captum_cw.attr.measures.AttentionAttribution.attribute`.
            additional_forward_args: Further positional arguments of the model, as in Captum.
            target: Must be None.
            return_convergence_delta: Whether to return :meth:`compute_convergence_delta` too.
            show_progress: Whether to show a progress bar over the layers after two seconds.

        Returns:
            The maps, as for every measure; with ``return_convergence_delta`` a pair of the maps and
            the delta. Errors are those of every measure too.
        """
        refuse_target(target)
        maps = self._maps(inputs, additional_forward_args, show_progress)
        given = as_given(inputs, maps)
        return (given, self.compute_convergence_delta(maps)) if return_convergence_delta else given

    def decompose(
        self, inputs: Inputs, additional_forward_args: object = None, *, show_progress: bool = False
    ) -> Any:
        """Return the factors of the inter-head contributions (arXiv 2606.07604, Eq. 14).

        Arguments and errors are those of :meth:`attribute`.

        Returns:
            For each layer a :class:`captum_cw.functional.Decomposition` ``(attention,
            relative_norm, cosine, contribution)`` of float32 tensors ``(B, H, T, S)``; a list of
            them if ``layer`` is None or a list.

        Raises:
            ValueError: If ``scope`` is not ``"inter"``.

        Example:
            >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
            >>> d = ContributionWeights(model).decompose(ids)[0]
            >>> torch.allclose(d.attention * d.relative_norm * d.cosine, d.contribution, atol=1e-6)
            True
        """
        if self.scope != "inter":
            raise ValueError(
                f"scope={self.scope!r} does not have a decomposition, since Eq. 14 is about the "
                "layer's output: use scope='inter'."
            )

        def decompose(layer: AttentionLayer) -> Decomposition:
            return Decomposition(*(x.float() for x in functional.decompose(layer)))

        return self._dense(inputs, additional_forward_args, decompose, show_progress, maps=4)

    def head_share(
        self, inputs: Inputs, additional_forward_args: object = None, *, show_progress: bool = False
    ) -> Tensor:
        """Return each head's share of its layer's output, ``sum_j c_ij^h`` (inter-head).

        Arguments and errors are those of :meth:`attribute`. No map is held in memory.

        Returns:
            ``(B, L, H, T)``, float32. Shares sum to one over ``H``; padded queries are zero.

        Example:
            >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
            >>> share = ContributionWeights(model).head_share(ids)
            >>> share.shape, torch.allclose(share.sum(2), torch.ones(1, 2, 5), atol=1e-5)
            (torch.Size([1, 2, 4, 5]), True)
        """

        def head_share(execution: Execution, layer: AttentionLayer) -> Tensor:
            return functional.head_share(layer).float()

        results, _ = self.observe(
            inputs, additional_forward_args, head_share, show_progress=show_progress
        )
        return stack_layers([share for _, share in results], "head_share")


class ALTIWeights(AttentionAttribution):
    """ALTI contribution weights (Ferrando, Gallego & Costa-jussa 2022).

    ``T_i(x_j) = sum_h a_ij^h v~_j^h`` is the term of token ``j`` in ``y_i``, the residual stream
    after attention; for ``j = i`` it includes the stream ``x_i``. The weight is ``max(0, ||y_i||_1
    - ||y_i - T_i(x_j)||_1)``: how close the term comes to ``y_i``. Rows are normalised, and heads
    are aggregated. ALTI aggregates these weights over all layers:
    ``TokenScores(ALTIWeights(model), layers="rollout")``.

    It computes vectors of size ``T x S x d`` for each layer, in blocks, so it costs about ``H``
    times as much as :class:`ContributionWeights`.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> maps = ALTIWeights(model).attribute(ids)
        >>> maps[0].shape, torch.allclose(maps[0].sum(-1), torch.ones(1, 1, 5))
        (torch.Size([1, 1, 5, 5]), True)
    """

    name = "alti"
    measure = staticmethod(rollout.alti)
    space: Space = "residual"
    needs_stream = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Return the weights themselves."""
        _check_heads_summed(heads)
        return rollout.alti


def stack_layers(results: list[Tensor], what: str) -> Tensor:
    """Stack the results ``(B, ...)`` of all layers, ``(B, L, ...)``."""
    shapes = Counter(tuple(r.shape) for r in results)
    if len(shapes) > 1:
        raise ValueError(
            f"The layers differ in heads or length ({', '.join(map(str, shapes))}), so {what} "
            "cannot be stacked: choose layers of one shape with layer=..., or aggregate over heads."
        )
    return torch.stack([r.to(results[0].device) for r in results], dim=1)
