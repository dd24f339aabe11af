"""Effect contributions: shares of layers' outputs, weighed by what the outputs do for a target."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from captum_cw import functional
from captum_cw.attr._captum import logged
from captum_cw.attr.measures import AttentionAttribution, as_given
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.observation import names_of
from captum_cw.capture.run import Inputs, Kinds
from captum_cw.capture.target_run import Gradient, TargetRunner
from captum_cw.capture.target_value import Target
from captum_cw.functional import AttentionLayer, EffectLayer, Measure, TargetLayer, check_choice

__all__ = ["EffectContributions", "Form", "Share"]

Result = TypeVar("Result")
Form = Literal["joint", "effect", "sensitivity"]
#: The gradients with which the forms rank best (docs/results/rankings-tried.md; for ``effect``,
#: ``attnlrp`` ranks as well).
BEST: dict[Form, Gradient] = {"joint": "attnlrp", "effect": "frozen", "sensitivity": "plain"}


@dataclass(frozen=True)
class Share:
    """The output of a layer, in the form from which contributions to it are computed.

    Args:
        direction: The output divided by its squared length, pulled back, ``(B, H, T, d_h)``.
        heads: The head outputs, ``(B, H, T, d_h)``.
        length: The length of the output, ``(B, T)``.
    """

    direction: Tensor
    heads: Tensor
    length: Tensor

    @classmethod
    def of(cls, layer: AttentionLayer) -> Share:
        """Return what is known of a layer, in the space in which it is seen."""
        u, norm2 = layer.direction("inter")  # the norm is zero where the output vanishes
        per_norm = norm2.reciprocal().masked_fill(norm2 == 0, 0)
        return cls(u * per_norm[..., None], layer.head_output, layer.output.norm(dim=-1))


class EffectContributions(AttentionAttribution):
    """Contributions to each layer's output, weighed by what the output does for a target.

    The forms are

    - ``"joint"``: ``|t_ij|^w |c_ij|^(1 - w)``, a weighted geometric mean of the contribution to the
      target (:class:`~captum_cw.TargetContributions`) and of the share of the output
      (:class:`~captum_cw.ContributionWeights`). It is never negative.
    - ``"effect"``: ``<g_i, o_i> c_ij``, where ``g_i`` is the gradient of the target at the layer's
      output ``o_i``. Its unit is that of the target.
    - ``"sensitivity"``: ``|g_i| |o_i| c_ij``, in the same unit.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        form: The form.
        gradient: ``"frozen"`` and ``"attnlrp"`` are gradients of the model linearised at its
            inputs, as for :class:`~captum_cw.TargetContributions`; ``"plain"`` is the model's own.
            None is the one with which the form ranks best: ``"attnlrp"`` for ``"joint"``,
            ``"frozen"`` for ``"effect"``, and ``"plain"`` for ``"sensitivity"``.
        weight: The weight ``w`` of the target in the form ``"joint"``, between 0 and 1. With 0.25
            it ranked pairs well at both ends. With 0.5 it was better for the lowest half, and for
            whole tokens.
        kind: The layers to use if ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Raises:
        ValueError: If the weight is not between 0 and 1, or a choice is unknown.

    Example:
        >>> inputs = tokenizer("The capital of France is", return_tensors="pt")
        >>> paris, rome = tokenizer.convert_tokens_to_ids(["Paris", "Rome"])
        >>> maps = EffectContributions(model).attribute(inputs, target=paris, contrast=rome)
        >>> len(maps), maps[0].shape
        (2, torch.Size([1, 4, 5, 5]))
    """

    explains_target = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        form: Form = "joint",
        gradient: Gradient | None = None,
        weight: float = 0.25,
        kind: Kinds = "self",
    ) -> None:
        check_choice("form", form, Form)
        chosen = BEST[form] if gradient is None else gradient
        check_choice("gradient", chosen, Gradient)
        is_number: bool = isinstance(weight, Real)
        if not is_number or not 0 <= weight <= 1:
            raise ValueError(f"weight={weight!r} is not a number between 0 and 1.")
        super().__init__(forward_func, layer, device_ids, kind=kind)
        self.form: Form = form
        self.gradient: Gradient = chosen
        self.weight = weight
        self.target_runner = TargetRunner(self.runner, chosen)

    @property
    def name(self) -> str:  # type: ignore[override]  # it depends on the form
        """The name of the form."""
        return self.form

    @property
    def measure(self) -> Measure:  # type: ignore[override]
        """The formula of the form."""
        return functional.joint(self.weight) if self.form == "joint" else functional.effect

    def observe(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, Any], Result],
        *,
        shares: Sequence[tuple[Execution, Share]] | None = None,
        show_progress: bool = False,
        **options: Any,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Apply ``on_layer`` to each chosen layer, from the last to the first.

        Layers that the target does not depend on come after the others. Options are ``target``,
        ``contrast`` and ``text_only``. Results are in the order of execution. ``shares`` are those
        of a pass over the same inputs; None runs that pass.
        """
        if shares is None:
            common = {name: options[name] for name in ("text_only",) if name in options}
            shares, _ = super().observe(
                inputs,
                additional_forward_args,
                lambda _, layer: Share.of(layer),
                show_progress=show_progress,
                **common,
            )
        places = {execution.number: place for place, (execution, _) in enumerate(shares)}
        asked = options.get("target"), options.get("contrast")
        self.target_runner.check_sums(inputs, additional_forward_args, *asked)
        projections = [execution.projection for execution, _ in shares]
        with _gradient_lengths(self.runner.roots, projections, self.form) as lengths:

            def with_share(execution: Execution, layer: TargetLayer) -> Result:
                place = places.get(execution.number)
                if place is None or shares[place][0].module is not execution.module:
                    raise UnsupportedModelError(
                        "With gradients, the model runs its attention layers in another order than "
                        f"without: layer {execution.name!r} is number {execution.number}."
                    )
                share = shares[place][1]
                if lengths is None:
                    effect = (layer.head_gradient * share.heads).sum((1, 3))
                else:
                    effect = lengths[place].view_as(share.length) * share.length
                of_layer = EffectLayer(**vars(layer), share=share.direction, effect=effect)
                return on_layer(execution, of_layer)

            found = self.target_runner.run(
                inputs, additional_forward_args, on_layer=with_share, **options
            )
        return found.layers, found.output

    @logged
    def attribute(  # type: ignore[override]  # the order of Captum's methods with a target
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        contrast: Target = None,
        show_progress: bool = False,
    ) -> Any:
        """Return the score of every query and key of each head.

        Arguments, shapes and errors are those of :meth:`TargetContributions.attribute`. There is no
        convergence delta, because the scores do not sum to the target.
        """

        def dense_map(layer: EffectLayer) -> Tensor:
            return functional.dense_map(layer, self.measure).float()

        results, _ = self.observe(
            inputs,
            additional_forward_args,
            self._fitting(dense_map),
            target=target,
            contrast=contrast,
            show_progress=show_progress,
        )
        return as_given(inputs, self._in_captums_form(results))


@contextmanager
def _gradient_lengths(
    roots: Collection[nn.Module], projections: Sequence[str | None], form: Form
) -> Iterator[list[Tensor] | None]:
    """Yield the lengths of the target's gradient at the outputs of layers, once they are known.

    Args:
        roots: The model, or the modules of it that are known.
        projections: The names of the modules that hold the layers' output projections.
        form: The form; lengths are needed for ``"sensitivity"`` alone.
    """
    if form != "sensitivity":
        yield None
        return
    by_name = {name: module for module, name in names_of(roots).items()}
    for name in projections:
        if name not in by_name:
            raise UnsupportedModelError(
                "No module holds the output projection of an attention layer, so the gradient at "
                'its output is unknown: use form="effect" or form="joint".'
            )
    lengths: list[Tensor] = []

    def on_output(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # a pass that checks the model
            return
        x = output if isinstance(output, Tensor) else output[0]
        length = x.new_zeros(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        lengths.append(length)

        def on_gradient(gradient: Tensor) -> None:
            length.copy_(gradient.to(length.dtype).norm(dim=-1))

        if x.grad_fn is not None:
            x.register_hook(on_gradient)

    with ExitStack() as stack:
        for module in {by_name[name] for name in projections if name is not None}:
            stack.callback(module.register_forward_hook(on_output).remove)
        yield lengths
