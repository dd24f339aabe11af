"""Contributions to a target, such as a logit: those of values and those of inputs.

Both classes run one forward and one backward pass of the model linearised at its inputs (see
:mod:`captum_cw.capture.linearised`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from captum_cw import functional
from captum_cw._utils.progress import progress_bar
from captum_cw.attr._captum import Attribution, logged
from captum_cw.attr.measures import AttentionAttribution, as_given
from captum_cw.capture import Execution
from captum_cw.capture.rounding import in_widest
from captum_cw.capture.run import Inputs, Kinds, Runner
from captum_cw.capture.target_run import Attention, TargetPass, TargetRunner
from captum_cw.capture.target_value import Target
from captum_cw.functional import TargetLayer, check_choice

__all__ = ["InputContributions", "TargetContributions"]

Result = TypeVar("Result")


class TargetContributions(AttentionAttribution):
    """The contribution of each token's value to a prediction, by head and query.

    ``t_ij^h = a_ij^h <g_i, v~_j^h>`` is the contribution of arXiv 2606.07604 (Eq. 12) with another
    direction: ``g_i`` is the gradient of the target at the layer's output, in the model linearised
    at its inputs. The unit is that of the target, and the sign says whether a token worked for it
    or against it.

    Args:
        forward_func: The model, or a callable that runs it; a callable needs ``layer``.
        layer: An attention module, a list of them, or None for all.
        device_ids: As in Captum.
        attention: ``"frozen"`` holds attention weights fixed, so that the shares of all inputs and
            constants sum to the target, which is checked. ``"attnlrp"`` passes a part of the
            gradient through the softmax to queries and keys (Achtibat et al., arXiv 2402.05602);
            its shares do not sum to the target. So the first call with a model also runs a frozen
            pass, and checks the sum there.
        kind: The layers to use if ``layer`` is None: ``"self"``, ``"cross"`` or ``"all"``.

    Example:
        >>> inputs = tokenizer("The capital of France is", return_tensors="pt")
        >>> paris, rome = tokenizer.convert_tokens_to_ids(["Paris", "Rome"])
        >>> maps = TargetContributions(model).attribute(inputs, target=paris, contrast=rome)
        >>> len(maps), maps[0].shape
        (2, torch.Size([1, 4, 5, 5]))
    """

    name = "target"
    measure = staticmethod(functional.target)
    explains_target = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        attention: Attention = "frozen",
        kind: Kinds = "self",
    ) -> None:
        check_choice("attention", attention, Attention)
        super().__init__(forward_func, layer, device_ids, kind=kind)
        self.attention: Attention = attention
        self.target_runner = TargetRunner(self.runner, attention)

    def has_convergence_delta(self) -> bool:
        """Return True: the delta is what the shares of inputs and constants lack of the target."""
        return True

    def observe(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, Any], Result],
        **options: Any,
    ) -> tuple[list[tuple[Execution, Result]], Any]:
        """Apply ``on_layer`` to each chosen layer, from the last to the first.

        Options are ``target``, ``contrast``, ``text_only`` and ``show_progress``. Results are in
        the order of execution.
        """
        found = self.run(inputs, additional_forward_args, on_layer, **options)
        return found.layers, found.output

    def run(
        self,
        inputs: Inputs,
        additional_forward_args: object,
        on_layer: Callable[[Execution, TargetLayer], Any],
        *,
        show_progress: bool = False,
        **options: Any,
    ) -> TargetPass:
        """Return the whole result of a pass; options are those of ``TargetRunner.run``."""
        with progress_bar(None, f"{self.get_name()}: layers", show=show_progress) as bar:

            def and_count(execution: Execution, layer: TargetLayer) -> Any:
                bar.update()
                return on_layer(execution, layer)

            return self.target_runner.run(
                inputs, additional_forward_args, on_layer=and_count, **options
            )

    @logged
    def attribute(  # type: ignore[override]  # the order of Captum's methods with a target
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        contrast: Target = None,
        return_convergence_delta: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Return what each query and key of each head adds to the target.

        Args:
            inputs: As for every measure; see
                :meth:`~captum_cw.attr.measures.AttentionAttribution.attribute`.
            target: A class; for logits ``(B, T, V)``, a token at the last position that is not
                padding, or a tuple ``(position, token)``; a list or tensor of one an example; a
                callable ``(output) -> (B,)``, such as a log-probability, a loss or a probe's
                direction. None is the model's own prediction.
            additional_forward_args: Further positional arguments of the model, as in Captum.
            contrast: A second target, which is subtracted: why the target, and not this?
            return_convergence_delta: Whether to return the delta too: what the shares of all inputs
                and constants (:class:`InputContributions`) lack of the target, ``(B,)``. In a batch
                it needs one more backward pass for each example.
            show_progress: Whether to show a progress bar over the layers after two seconds.

        Returns:
            Maps ``(B, H, T, S)`` as for every measure, signed, in the unit of the target; with
            ``return_convergence_delta`` a pair of the maps and the delta.

        Raises:
            IndexError: If a target is out of range.
            TypeError: If a target is of a wrong type, or the model does not return logits.
            ValueError: If a target does not fit the examples, is at padding, equals its contrast,
                or has no gradient.
            UnsupportedModelError: If the shares do not sum to the target: the model computes
                something that is not understood. Other errors are those of every measure.
        """

        def dense_map(layer: TargetLayer) -> Tensor:
            return functional.dense_map(layer, self.measure).float()

        found = self.run(
            inputs,
            additional_forward_args,
            self._fitting(dense_map),
            target=target,
            contrast=contrast,
            by_example=return_convergence_delta,
            show_progress=show_progress,
        )
        maps = as_given(inputs, self._in_captums_form(found.layers))
        return (maps, found.delta) if return_convergence_delta else maps

    def compute_convergence_delta(
        self,
        attributions: Any,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        contrast: Target = None,
    ) -> Tensor:
        """Return the delta of :meth:`attribute`, ``(B,)``.

        It is that of the inputs and constants: the maps of layers do not sum to the target, so
        ``attributions`` are not read. The other arguments are those of :meth:`attribute`.
        """
        found = self.target_runner.run(
            inputs, additional_forward_args, target=target, contrast=contrast, by_example=True
        )
        return found.delta


class InputContributions(Attribution):  # type: ignore[misc]  # captum has no types for it
    """The contribution of each input to a prediction, ``<x_j, g_j>`` in the linearised model.

    ``x_j`` is the embedding of token ``j`` (or a pixel, or a number of an audio feature), and
    ``g_j`` the gradient of the target. With the share of biases and other constants, the shares sum
    to the target.

    Args:
        forward_func: The model, or a callable that runs it in evaluation mode.
        attention: As for :class:`TargetContributions`.

    Example:
        >>> inputs = tokenizer("The capital of France is", return_tensors="pt")
        >>> paris, rome = tokenizer.convert_tokens_to_ids(["Paris", "Rome"])
        >>> method = InputContributions(model)
        >>> scores, delta = method.attribute(
        ...     inputs, target=paris, contrast=rome, return_convergence_delta=True)
        >>> scores.shape, bool(delta.abs() < 1e-5)
        (torch.Size([1, 5]), True)
    """

    name = "input"

    def __init__(
        self, forward_func: Callable[..., Any], *, attention: Attention = "frozen"
    ) -> None:
        check_choice("attention", attention, Attention)
        runner = Runner(forward_func, kind="all", needs_layers=False)
        super().__init__(runner.forward_func)
        self.model = runner.model
        self.attention: Attention = attention
        self.target_runner = TargetRunner(runner, attention)

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the class."""
        return cls.__name__

    def has_convergence_delta(self) -> bool:
        """Return True: the delta is what the shares of inputs and constants lack of the target."""
        return True

    @logged
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        contrast: Target = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Return what each input adds to the target.

        Arguments and errors are those of :meth:`TargetContributions.attribute`, without
        ``show_progress``.

        Returns:
            ``(B, T)`` for token ids; the shape of the input for embeddings, pixels and audio
            features. Signed, float32, in the unit of the target; padded tokens are zero. A dict of
            arguments gives a dict if several of them are inputs, such as the ids of an encoder and
            a decoder, or ids and pixels. A tuple of tensors gives a tuple of the same length, with
            zeros for tensors to which nothing is attributed, such as masks. With
            ``return_convergence_delta`` a pair of that and the delta, ``(B,)``.
        """
        found = self._run(
            inputs, target, additional_forward_args, contrast, by_example=return_convergence_delta
        )
        shares = found.shares_like(inputs)
        return (shares, found.delta) if return_convergence_delta else shares

    def compute_convergence_delta(
        self,
        attributions: Any,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        contrast: Target = None,
    ) -> Tensor:
        """Return what attributions and the share of constants lack of the target, ``(B,)``.

        Args:
            attributions: The result of :meth:`attribute` for the same other arguments.
            inputs: As for :meth:`attribute`.
            target: As for :meth:`attribute`.
            additional_forward_args: As for :meth:`attribute`.
            contrast: As for :meth:`attribute`.

        Example:
            >>> inputs = tokenizer("The capital of France is", return_tensors="pt")
            >>> method = InputContributions(model)
            >>> delta = method.compute_convergence_delta(method.attribute(inputs), inputs)
            >>> bool(delta.abs() < 1e-5)
            True
        """
        found = self._run(inputs, target, additional_forward_args, contrast, by_example=True)
        assert found.constants is not None
        missing = in_widest(found.linear)
        missing = missing - found.constants.to(missing)
        parts = attributions.values() if isinstance(attributions, Mapping) else attributions
        for part in (parts,) if isinstance(parts, Tensor) else parts:
            part = in_widest(part).reshape(len(missing), -1).sum(1)
            missing = missing - part.to(missing)
        return missing.to(found.linear)

    def _run(
        self,
        inputs: Inputs,
        target: Target,
        additional_forward_args: object,
        contrast: Target,
        *,
        by_example: bool,
    ) -> TargetPass:
        return self.target_runner.run(
            inputs, additional_forward_args, target=target, contrast=contrast, by_example=by_example
        )
