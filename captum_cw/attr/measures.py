"""The measures as Captum layer attributions.

Each class says what it computes from a layer; :class:`AttentionAttribution` has the layers handed
over by a :class:`captum_cw.capture.run.Runner`, and gives results in Captum's form.
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


class AttentionAttribution(LayerAttribution):  # type: ignore[misc]  # captum has no types for it
    """What the measures have in common.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them (an ``nn.ModuleList`` counts as one), or None
            for every attention layer in the order in which they run.
        device_ids: As in Captum; not needed where ``forward_func`` is the model.
        kind: Which attention layers, where ``layer`` does not say: those whose tokens attend to
            each other (``"self"``), those of a decoder that attend to the states of an encoder
            (``"cross"``: ``S`` is the encoder's length), or ``"all"``.
    """

    name: str
    """What users call the measure, on the command line too."""
    measure: Measure
    """What is computed from each layer."""
    normaliser: Scope | None = None
    """The output that the measure divides by, if any."""
    space: Space = "attention"
    """Where its projections and norms are measured."""
    needs_stream = False
    """Whether it looks at the residual stream that attention adds to."""
    mixes_stream = True
    """Whether :meth:`mixing` does."""

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
        """The class's name; Captum would put a space before each capital."""
        return cls.__name__

    @property
    def layers(self) -> list[str]:
        """Names of the attention layers that are attributed, in execution order.

        Known after the first ``attribute``; before that, a pass over two tokens finds them.
        """
        return self.runner.names

    def mixing(self, heads: Aggregation | None) -> Measure:
        """How a layer mixes tokens by this measure, for what goes through all layers.

        Args:
            heads: How they are aggregated; ``"mean"`` is each measure's own way.

        Returns:
            A measure whose rows sum to one (see :mod:`captum_cw.rollout`).

        Raises:
            ValueError: If heads cannot be aggregated so, or the measure has no such map.
        """
        raise ValueError(
            f"{self.get_name()} does not say how a layer mixes tokens: use layers='mean', or "
            "another measure."
        )

    def observe(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        *,
        stream: bool = False,
        one_text: bool = False,
        text_only: bool = False,
        show_progress: bool = False,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Applies ``on_layer`` to each chosen layer in this measure's space.

        The arguments and results are those of :meth:`captum_cw.capture.run.Runner.observe`.
        """
        return self.runner.observe(
            inputs,
            on_layer,
            additional_forward_args,
            space=self.space,
            stream=stream or self.needs_stream,
            one_text=one_text,
            text_only=text_only,
            normaliser=self.normaliser,
            description=f"{self.get_name()}: layers",
            show_progress=show_progress,
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
        """The measure at every query and key.

        Args:
            inputs: Token ids ``(B, T)``, a tokenizer's ``BatchEncoding`` or a dict of keyword
                arguments, embeddings ``(B, T, d)`` for a model whose main input is ids, else
                the model's main input; or a tuple of tensors, passed in order. A model of multiple
                choice takes ids ``(B, choices, T)``. A module that takes one mapping, such as a
                ``SentenceTransformer``, is given the dict as a whole, in a copy.
            additional_forward_args: Further positional arguments, as in Captum.
            target: Must be None: an attention measure explains a layer's output, not a class.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            ``(B, H, T, S)`` for one attention module, a list of such tensors for a list or None;
            float32, detached. Note that this is a map over queries and keys, not of the
            size of the layer's output. Where a module runs several times in a pass, its place
            holds a tuple with one map for each time (one entry each where ``layer`` is None).
            Padded queries and keys are zeros. A tensor given in a tuple of one comes back in one.
            Of ids ``(B, choices, T)`` there are ``B * choices`` examples: the choices of the first
            example, then those of the second, and so on.

        Raises:
            TypeError: If ``inputs`` or ``layer`` is of a kind that cannot be read.
            ValueError: If ids, mask or positions do not fit the model, the input is empty, the
                model needs tokens for its decoder and is given none, a layer does not run
                attention, ``target`` is given, or activations are NaN.
            MemoryError: If the maps would not fit into memory, with their size.
            UnsupportedModelError: If the model does something that would make the result wrong.
        """
        refuse_target(target)
        return as_given(
            inputs, self._maps(inputs, additional_forward_args, self.measure, show_progress)
        )

    def _maps(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        measure: Measure,
        show_progress: bool,
    ) -> Any:
        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            return functional.dense_map(layer, measure).float()

        return self._dense(inputs, additional_forward_args, on_layer, show_progress)

    def _dense(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, AttentionLayer], Result],
        show_progress: bool,
        maps: int = 1,
    ) -> Any:
        """Runs ``on_layer``, which makes ``maps`` dense maps a layer, if the maps fit."""
        seen: list[Execution] = []

        def if_it_fits(execution: Execution, layer: AttentionLayer) -> Result:
            seen.append(execution)
            chosen = self.runner.chosen
            total = expected_layers(self.runner.roots, seen) if chosen is None else len(chosen)
            _check_memory(layer, max(total - len(seen) + 1, 1), maps, self.maps_of(layer.H))
            return on_layer(execution, layer)

        results, _ = self.observe(
            inputs, additional_forward_args, if_it_fits, show_progress=show_progress
        )
        return self._in_captums_form(results)

    def maps_of(self, heads: int) -> int:
        """How many maps it makes of a layer of so many heads: as many, or one of all of them."""
        return functional.heads_of(self.measure, heads)

    def _in_captums_form(self, results: list[tuple[Execution, Result]]) -> Any:
        """One module: its result; a list or None: a list; several executions: a tuple."""
        if self.layer is None:
            return [result for _, result in results]

        def of(module: nn.Module) -> Result | tuple[Result, ...]:
            runs = [result for execution, result in results if execution.module is module]
            return runs[0] if len(runs) == 1 else tuple(runs)

        return of(self.layer) if isinstance(self.layer, nn.Module) else [of(m) for m in self.layer]


def as_given(inputs: object, result: Any) -> Any:
    """A tensor in a tuple of one, where the input came in one: so do Captum's metrics expect it."""
    one = isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(result, Tensor)
    return (result,) if one else result


def refuse_target(target: object) -> None:
    if target is not None:
        raise ValueError(
            f"target={target!r}: an attention measure explains the output of a layer, not a class "
            "or token, so there is no target. To explain one prediction, use TokenScores(method, "
            "queries=position) or LLMTokenAttribution."
        )


def _check_memory(layer: AttentionLayer, layers: int, maps: int, heads: int) -> None:
    B, T = layer.value.shape[0], layer.T
    check_fits(
        4 * B * heads * T * layer.S * layers * maps,
        layer.value.device,
        f"{layers} layers of {B} x {heads} x {T} x {layer.S}, float32",
        "Choose fewer layers (layer=...), or use TokenScores, which never holds a map.",
    )


class _ValueAttribution(AttentionAttribution):
    """A measure that looks at values, in one of the spaces where they can be measured.

    Args:
        space: Where projections and norms are measured: ``"attention"``, the layer's output; or
            ``"residual"``, what is added to the residual stream.
    """

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
        """The norms of what each token, and the stream itself, add to the stream."""
        _check_together(heads)
        return rollout.norm_mixing


def _check_together(heads: Aggregation | None) -> None:
    if heads != "mean":
        raise ValueError(
            f"heads={heads!r}: what heads add to the residual stream is added up; leave "
            "heads='mean'."
        )


class AttentionWeights(AttentionAttribution):
    """The attention weights ``a_ij`` that the model used (Eq. 1).

    Its own mask, bias, soft-cap and sinks are included.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> a = AttentionWeights(model).attribute(input_ids)
        >>> len(a), a[0].shape
        (2, torch.Size([1, 4, 5, 5]))
    """

    name = "attention"
    measure = staticmethod(functional.attention)
    mixes_stream = False

    def mixing(self, heads: Aggregation | None) -> Measure:
        """Half of it attention, aggregated over heads, and half of it the stream."""
        if heads not in ("mean", "max"):
            raise ValueError(
                f"heads={heads!r}: the stream counts as much as the attention of all heads "
                "together, so heads are averaged; use 'mean', or 'max'."
            )
        return rollout.attention_mixing(heads)


class VWAttention(_ValueAttribution):
    """Value-weighted attention ``|a_ij| ||v~_j||``, in the unit of the hidden states.

    Measure ii of arXiv 2606.07604, section 5.2 (Kobayashi et al. 2020).

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        space: Where norms are taken: ``"attention"``, at the layer's output; or ``"residual"``, at
            what is added to the residual stream, after a norm that follows attention.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> VWAttention(model, model.model.layers[0].self_attn).attribute(input_ids).shape
        torch.Size([1, 4, 5, 5])
    """

    name = "vw"
    measure = staticmethod(functional.vw)


class VWONAttention(_ValueAttribution):
    """Value-weighted attention over the norm of the layer's output, ``|a_ij| ||v~_j|| / ||o_i||``.

    Measure iii of arXiv 2606.07604, section 5.2.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        space: Where norms are taken: ``"attention"``, at the layer's output; or ``"residual"``, at
            what is added to the residual stream, after a norm that follows attention.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> VWONAttention(model).attribute(input_ids)[1].shape
        torch.Size([1, 4, 5, 5])
    """

    name = "vwon"
    measure = staticmethod(functional.vwon)
    normaliser = "inter"


class ContributionWeights(_ValueAttribution):
    """Contribution weights: each token's share of the attention output (arXiv 2606.07604).

    ``c_ij = a_ij <o_i, v~_j> / ||o_i||^2``: attention, magnitude and direction together. A
    negative contribution opposes the output.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        scope: ``"inter"`` projects on the layer's output (Eq. 12) and sums to one over heads and
            keys; ``"intra"`` projects on the head's own (Eq. 9) and sums to one over keys.
        space: ``"attention"``: the output is that of the attention layer (the paper).
            ``"residual"``: it is what is added to the residual stream, which differs where a norm
            follows attention (Gemma 2 and 3, OLMo 2); the norm's scale is held fixed.
        kind: Which layers, where ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> c = ContributionWeights(model).attribute(input_ids)
        >>> torch.allclose(c[0].sum((1, 3)), torch.ones(1, 5), atol=1e-5)
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
        """The shares of each token, and of the stream itself, in what goes on."""
        if self.scope != "inter":
            raise ValueError(
                f"scope={self.scope!r} speaks of the output of one head, but what goes through "
                "all layers is the residual stream: use scope='inter'."
            )
        _check_together(heads)
        return rollout.contribution_mixing

    def has_convergence_delta(self) -> bool:
        """True: contributions sum to one, and the delta says how nearly."""
        return True

    def compute_convergence_delta(self, attributions: Any) -> Any:
        """One minus the sum of the contributions; zero for padded queries and vanishing outputs.

        Args:
            attributions: What :meth:`attribute` gave: a tensor, or a list of them.

        Returns:
            ``(B, T)`` for inter, ``(B, H, T)`` for intra; a list for a list.

        Example:
            >>> method = ContributionWeights(model)
            >>> delta = method.compute_convergence_delta(method.attribute(input_ids))
            >>> [tuple(d.shape) for d in delta], bool(delta[0].abs().max() < 1e-5)
            ([(1, 5), (1, 5)], True)
        """
        if isinstance(attributions, (list, tuple)):
            return type(attributions)(self.compute_convergence_delta(a) for a in attributions)
        dims = (1, 3) if self.scope == "inter" else (3,)
        anything = (attributions != 0).sum(dims) > 0
        return (1 - attributions.sum(dims)) * anything

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
        """The contribution of every key to every query's output.

        Args:
            inputs: As for every measure (see
                :meth:`~captum_cw.attr.measures.AttentionAttribution.attribute`).
            additional_forward_args: Further positional arguments, as in Captum.
            target: Must be None.
            return_convergence_delta: Also returns :meth:`compute_convergence_delta`.
            show_progress: Shows a bar over the layers once it has taken two seconds.

        Returns:
            As for every measure; with ``return_convergence_delta`` a pair of that and the delta.
        """
        refuse_target(target)
        maps = self._maps(inputs, additional_forward_args, self.measure, show_progress)
        given = as_given(inputs, maps)
        return (given, self.compute_convergence_delta(maps)) if return_convergence_delta else given

    def decompose(
        self, inputs: Inputs, additional_forward_args: object = None, *, show_progress: bool = False
    ) -> Any:
        """The factors of the inter-head contributions (Eq. 14).

        Args and errors as :meth:`attribute`.

        Returns:
            For each layer a :class:`captum_cw.functional.Decomposition` ``(attention,
            relative_norm, cosine, contribution)`` of float32 tensors ``(B, H, T, S)``; in a list
            where ``layer`` is None or a list.

        Example:
            >>> d = ContributionWeights(model).decompose(input_ids)[0]
            >>> torch.allclose(d.attention * d.relative_norm * d.cosine, d.contribution, atol=1e-6)
            True
        """
        if self.scope != "inter":
            raise ValueError(
                f"scope={self.scope!r} has no decomposition: Eq. 14 speaks of the layer's output; "
                "use scope='inter'."
            )

        def on_layer(execution: Execution, layer: AttentionLayer) -> Decomposition:
            return Decomposition(*(x.float() for x in functional.decompose(layer)))

        return self._dense(inputs, additional_forward_args, on_layer, show_progress, maps=4)

    def head_share(
        self, inputs: Inputs, additional_forward_args: object = None, *, show_progress: bool = False
    ) -> Tensor:
        """How much of its layer's output each head makes: ``sum_j c_ij^h``, inter-head.

        Args and errors as :meth:`attribute`; no map is built.

        Returns:
            ``(B, L, H, T)``, float32: sums to one over ``H``; zero for padded queries.

        Example:
            >>> share = ContributionWeights(model).head_share(input_ids)
            >>> share.shape, torch.allclose(share.sum(2), torch.ones(1, 2, 5), atol=1e-5)
            (torch.Size([1, 2, 4, 5]), True)
        """

        def on_layer(execution: Execution, layer: AttentionLayer) -> Tensor:
            return functional.head_share(layer).float()

        results, _ = self.observe(
            inputs, additional_forward_args, on_layer, show_progress=show_progress
        )
        return stack_layers([share for _, share in results], "head_share")


class ALTIWeights(AttentionAttribution):
    """How near each token's part comes to what a layer makes of a token (ALTI).

    ``T_i(x_j) = sum_h a_ij^h v~_j^h``, with the residual stream ``x_i`` added for ``j = i``, are
    the parts of ``y_i``, the stream after attention; the weight is ``max(0, ||y_i||_1 - ||y_i -
    T_i(x_j)||_1)``, rows normalised (Ferrando, Gallego & Costa-jussa 2022). Heads are put
    together. The aggregation over layers that gives ALTI its name is
    ``TokenScores(ALTIWeights(model), layers="rollout")``.

    It needs vectors of size ``T x S x d`` a layer, made in blocks: about as many times dearer than
    contributions as there are heads.

    Args:
        forward_func: The model, or any callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.

    Example:
        >>> mixing = ALTIWeights(model).attribute(input_ids)
        >>> mixing[0].shape, torch.allclose(mixing[0].sum(-1), torch.ones(1, 1, 5))
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
        """The weights themselves."""
        _check_together(heads)
        return rollout.alti


def stack_layers(results: list[Tensor], what: str) -> Tensor:
    """``L`` tensors ``(B, ...)`` as one ``(B, L, ...)``."""
    shapes = Counter(tuple(r.shape) for r in results)
    if len(shapes) > 1:
        raise ValueError(
            f"The layers differ in heads or length ({', '.join(map(str, shapes))}), so {what} has "
            "no common shape: choose layers of one shape with layer=..., or aggregate over heads."
        )
    return torch.stack([r.to(results[0].device) for r in results], dim=1)
