"""One pass of the linearised model for a target: the shares of inputs, constants and heads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_cw._utils.memory import collection_paused
from captum_cw.capture.attention import attention_calls
from captum_cw.capture.attention_call import AttentionCall, UnsupportedModelError
from captum_cw.capture.dispatch import following
from captum_cw.capture.embedded_tokens import NOWHERE, Leaf
from captum_cw.capture.forward_call import ForwardCall, forward_call, run_on_copies
from captum_cw.capture.hf_registry import kernels_in_functions
from captum_cw.capture.linearised import Linearised
from captum_cw.capture.model import device_of, evaluation_mode, uncompiled
from captum_cw.capture.observation import Execution, HeadObservation, names_of
from captum_cw.capture.own_functions import own_functions_as_one
from captum_cw.capture.recomputing import recomputing
from captum_cw.capture.rounding import in_widest, product_rounding
from captum_cw.capture.run import Inputs, Runner, run_or_explain
from captum_cw.capture.saved_tensors import keeping
from captum_cw.capture.target_heads import Heads, watched
from captum_cw.capture.target_inputs import Arguments, own_arguments
from captum_cw.capture.target_value import (
    Target,
    linear_values,
    needs_all_logits,
    read_target,
)
from captum_cw.functional import QueryMask, TargetLayer

__all__ = ["Attention", "Gradient", "TargetPass", "TargetRunner"]

Result = TypeVar("Result")
Attention = Literal["frozen", "attnlrp"]
Gradient = Literal["frozen", "attnlrp", "plain"]

#: The error with which shares may sum to the target: relative to the target, and to the sum of the
#: sizes of all shares. Half precision allows more.
OF_TARGET, OF_SHARES = 1e-3, 1e-4


@dataclass(frozen=True)
class TargetPass:
    """The shares of one target.

    Args:
        values: The target of each example, ``(B,)``.
        linear: What the shares sum to, ``(B,)``: the target, or for a callable that is not linear
            ``<d target / d output, output>``.
        shares: By the name or place of each input: ``(B, T)`` for ids, else the shape of the input.
        given: The user's tensors by the same names or places.
        constants: The share of biases and other constants, ``(B,)``; None if it was not requested.
        layers: The results of the attention layers.
        output: The output of the model.
    """

    values: Tensor
    linear: Tensor
    shares: dict[str | int, Tensor]
    given: dict[str | int, Tensor]
    constants: Tensor | None
    layers: list[tuple[Execution, Any]]
    output: Any

    def shares_like(self, inputs: Inputs) -> Any:
        """Return the shares in the form of Captum's ``inputs``."""
        if isinstance(inputs, Mapping):
            return self.shares if len(self.shares) > 1 else next(iter(self.shares.values()))
        tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
        left = list(self.given)  # a tensor may be given twice
        found = []
        for x in tensors:
            name = next((name for name in left if self.given[name] is x), None)
            share = None
            if name is not None:
                left.remove(name)
                share = self.shares.get(name)
            found.append(torch.zeros_like(x, dtype=torch.float32) if share is None else share)
        return found[0] if isinstance(inputs, Tensor) else tuple(found)

    @property
    def delta(self) -> Tensor:
        """What the shares lack of the target, ``(B,)``."""
        assert self.constants is not None
        missing = self.without_constants()
        return (missing - self.constants.to(missing)).to(self.linear)

    def without_constants(self) -> Tensor:
        """Return what the shares of the inputs lack of the target, ``(B,)``."""
        missing = in_widest(self.linear)
        for share in self.shares.values():
            # One example may consist of several rows, such as the patches of its images.
            share = in_widest(share).reshape(len(missing), -1).sum(1)
            missing = missing - share.to(missing)
        return missing


@dataclass
class _Recorded:
    """A linearised forward pass, before the backward pass.

    Args:
        linearised: The functions that ran.
        arguments: The arguments of the model.
        heads: The attention calls that ran.
        output: The output of the model.
        values: The target, ``(B,)``.
        linear: What the shares sum to, ``(B,)``.
        outputs: The tensors of the output that the target depends on, and their gradients.
    """

    linearised: Linearised
    arguments: Arguments
    heads: list[Heads]
    output: Any
    values: Tensor
    linear: Tensor
    outputs: list[tuple[Tensor, Tensor]]


@dataclass
class _Checks:
    """What was checked of a model, besides the sum, which is checked in every pass.

    Args:
        one: Whether its output was compared with that of a plain pass.
        batch: Whether the sums of the examples of a batch were compared.
        functions: Whether each function was looked at alone, since half precision hides gaps.
        closes: Whether the shares summed to a target once.
    """

    one: bool = False
    batch: bool = False
    functions: bool = False
    closes: bool = False


_checks: WeakKeyDictionary[nn.Module, _Checks] = WeakKeyDictionary()


class TargetRunner:
    """Runs the linearised model of a :class:`~captum_cw.capture.run.Runner`.

    Args:
        runner: The model, and the chosen attention layers.
        gradient: ``"frozen"`` to hold attention weights fixed, so that all shares sum to the
            target; ``"attnlrp"`` for the gradient of the softmax (Achtibat et al. 2024);
            ``"plain"`` for the model's own gradient, so that there are no shares.

    Example:
        >>> runner = TargetRunner(Runner(model))
        >>> inputs = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> found = runner.run(inputs, target=3)
        >>> found.shares["input_ids"].shape, bool(found.delta.abs() < 1e-4)
        (torch.Size([1, 6]), True)
    """

    def __init__(self, runner: Runner, gradient: Gradient = "frozen") -> None:
        self.runner, self.gradient = runner, gradient
        model = runner.model
        self._checks = _Checks() if model is None else _checks.setdefault(model, _Checks())

    def run(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        *,
        target: Target = None,
        contrast: Target = None,
        on_layer: Callable[[Execution, TargetLayer], Result] | None = None,
        text_only: bool = False,
        by_example: bool = False,
    ) -> TargetPass:
        """Run the model once forward and once backward, after :meth:`check_sums`.

        Args:
            inputs: The inputs, as for :meth:`captum_cw.ContributionWeights.attribute`.
            additional_forward_args: More positional arguments, as in Captum.
            target: The target, see :func:`~captum_cw.capture.target_value.target_values`.
            contrast: A second target that is subtracted; None for none.
            on_layer: Receives each chosen attention layer, from the last to the first; None if
                only the inputs matter.
            text_only: Whether to skip the layers of a vision tower if no layers were chosen.
            by_example: Whether the share of constants is computed for each example, which needs
                one more backward pass for each example of a batch.

        Raises:
            UnsupportedModelError: If the shares do not sum to the target.
            TypeError, ValueError, IndexError: If inputs or target are wrong, or if the target or
                its gradient is NaN or infinite.
        """
        runner = self.runner
        self.check_sums(inputs, additional_forward_args, target, contrast)
        forward = runner.forward_func
        called = forward.forward if isinstance(forward, nn.Module) else forward
        call = forward_call(runner.model, called, inputs, additional_forward_args)
        ends = [mask[:, -1] for mask in call.token_masks]
        if call.last_only and not (
            ends and all(map(torch.all, ends)) and not needs_all_logits(target, contrast)
        ):
            call = call.with_all_logits()
        found, gap, closes = self._pass(
            call, inputs, target, contrast, on_layer, text_only, by_example
        )
        if not math.isfinite(gap):
            raise _not_finite(found)
        if self.gradient == "frozen" and closes is not True:
            # In half precision, a gap may be due to rounding: then each function is looked at.
            looks = closes is None and not self._checks.functions
            searches = looks or closes is False
            unequal = self._unequal(call, inputs, target, contrast) if searches else None
            if closes is False or unequal is not None:
                raise self._not_closed(found, gap, unequal)
            self._checks.functions |= looks
        self._checks.closes |= self.gradient == "frozen"
        self._checks.one = True
        self._checks.batch |= len(found.linear) > 1
        if on_layer is not None:
            runner.remember_names([execution for execution, _ in found.layers])
        return found

    def check_sums(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        target: Target = None,
        contrast: Target = None,
    ) -> None:
        """Run a frozen pass before the first one with ``"attnlrp"``.

        The shares of ``"attnlrp"`` do not sum to the target. Its rules for functions other than
        attention are those of ``"frozen"``, whose sum shows whether they hold.
        """
        if self.gradient == "attnlrp" and not self._checks.closes:
            frozen = TargetRunner(self.runner)
            frozen._checks = self._checks
            frozen.run(inputs, additional_forward_args, target=target, contrast=contrast)

    def _pass(
        self,
        call: ForwardCall,
        inputs: Inputs,
        target: Target,
        contrast: Target,
        on_layer: Callable[[Execution, TargetLayer], Any] | None,
        text_only: bool,
        by_example: bool,
    ) -> tuple[TargetPass, float, bool | None]:
        """Return the shares, by how much they miss the target, and whether they close.

        It is None if they close only as far as half precision tells.
        """
        with ExitStack() as stack:
            recorded = self._forward(stack, call, inputs, target, contrast, on_layer, text_only)
            B, constants, lone = len(recorded.values), None, None
            more = B > 1 and (by_example or not self._checks.batch)
            grads = _backward(recorded, retain_graph=more)
            if B == 1:
                constants = grads[-1][None]
            elif by_example:
                constants = _constants(recorded, torch.eye(B, dtype=torch.float32, device="cpu"))
            elif more:  # errors of single examples may cancel in their sum
                generator = torch.Generator().manual_seed(0)
                weights = torch.empty(1, B, dtype=torch.float32, device="cpu")
                weights.uniform_(0.5, 1.5, generator=generator)
                lone = weights, _constants(recorded, weights)
            for heads in recorded.heads:
                if on_layer is not None and not heads.is_done:  # the target does not depend on it
                    heads.finish(heads.layer.head_gradient, on_layer)
        shares, sizes = _shares(recorded.linearised.leaves, grads, recorded.arguments)
        results = [(heads.execution, heads.result) for heads in recorded.heads]
        found = TargetPass(
            values=recorded.values,
            linear=recorded.linear,
            shares=shares,
            given={name: x.given for name, x in recorded.arguments.inputs.items()},
            constants=constants,
            layers=results,
            output=recorded.output,
        )
        if constants is not None:
            gap = float(found.delta.abs().max())
        else:
            rest = found.without_constants()
            gap = abs(float(rest.sum() - grads[-1].to(rest)))
            if lone is not None:
                weights, constant = (x[0].to(rest) for x in lone)
                gap = max(gap, abs(float(weights @ rest - constant)))
        sizes += abs(float(grads[-1]))
        allowed = OF_SHARES * sizes + OF_TARGET * float(recorded.linear.abs().sum())
        if gap <= allowed:
            return found, gap, True
        eps = product_rounding(*(x for x, _ in recorded.outputs))
        eps = max([eps, *(torch.finfo(dtype).eps for dtype in recorded.linearised.dtypes)])
        return found, gap, None if gap <= allowed + 32 * eps * sizes else False

    def _forward(
        self,
        stack: ExitStack,
        call: ForwardCall,
        inputs: Inputs,
        target: Target,
        contrast: Target,
        on_layer: Callable[[Execution, TargetLayer], Any] | None,
        text_only: bool,
        examines: bool = False,
    ) -> _Recorded:
        """Run the linearised model, whose modules stay as they are until ``stack`` is left."""
        runner = self.runner
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        arguments = own_arguments(call, inputs)
        linearised = self._linearise(arguments, examines)
        heads: list[Heads] = []

        def on_heads(execution: Execution, attention: AttentionCall, mask: QueryMask) -> None:
            if on_layer is not None:
                heads.append(watched(execution, attention, mask, on_layer))

        is_all = runner.chosen is None
        observation = HeadObservation(
            runner.roots,
            on_heads,
            runner.chosen,
            kind=runner.kind if is_all else "all",
            real=call.token_masks,
            text=call.text if text_only and is_all else None,
            layers=examines,
        )
        modules = list(dict.fromkeys(m for root in runner.roots for m in root.modules()))
        stack.enter_context(evaluation_mode(runner.roots, runner.model))
        stack.enter_context(uncompiled())
        with (
            following(linearised),
            own_functions_as_one(),
            kernels_in_functions(),
            keeping(),
            recomputing(runner.roots, functools.partial(_again, linearised, modules)),
            observation,
            collection_paused(),
        ):
            run = functools.partial(runner.forward_func, *arguments.args, **arguments.kwargs)
            with _explained():
                output = run_or_explain(run, call, observation)
        if on_layer is not None:
            runner.check_executions(observation.executions)
        if not self._checks.one:
            self._check_output(output, call)
        masks = call.token_masks or _other_masks(call)
        values, outputs, is_linear = read_target(
            output, linearised.last_function, target, contrast, arguments.examples, masks
        )
        linear = linear_values(values, outputs, is_linear)
        output = pytree.tree_map_only(Tensor, Tensor.detach, output)
        detached = values.detach().float()
        return _Recorded(linearised, arguments, heads, output, detached, linear, outputs)

    def _linearise(self, arguments: Arguments, examines: bool) -> Linearised:
        """Start a linearised pass, and put its inputs among the arguments."""
        ids, floating = arguments.ids, arguments.floating
        if not ids and not floating:
            raise TypeError(
                "The inputs hold neither token ids (input_ids) nor floating tensors, so there is "
                "nothing to attribute the target to."
            )
        model = self.runner.model
        linearised = Linearised(
            {name: x.tensor for name, x in ids.items()},
            {name: x.tensor for name, x in floating.items()},
            arguments.first.device if model is None else device_of(model),
            softmax_gradient=self.gradient == "attnlrp",
            is_plain=self.gradient == "plain",
            examines=examines,
        )
        for name, x in floating.items():
            x.put(linearised.given[name])
        return linearised

    def _check_output(self, output: Any, call: ForwardCall) -> None:
        """Check that the linearised model returns what the model returns."""
        # Its fast path leaves padding out, and runs only without gradients.
        with torch.no_grad(), _without_fast_path():
            plain = run_on_copies(self.runner.forward_func, call.kwargs, call.args)
        ours, theirs = (list(_floating(x)) for x in (output, plain))
        for x, y in zip(ours, theirs, strict=True):
            tolerance = max(1e-3, 32 * product_rounding(x)) * float(
                y.nan_to_num(0, 0, 0).abs().max()
            )
            if x.shape != y.shape or not torch.allclose(x, y, 0, tolerance, equal_nan=True):
                raise UnsupportedModelError(
                    f"With gradients, the model returns other numbers than without: they differ by "
                    f"{float((x - y).abs().max()):.2g}. A random or trained-only branch of "
                    "it may depend on whether gradients are recorded."
                )

    def _unequal(
        self, call: ForwardCall, inputs: Inputs, target: Target, contrast: Target
    ) -> tuple[str, nn.Module | None] | None:
        """Run once more, and return the first function whose shares do not sum, and its module."""
        with ExitStack() as stack:
            recorded = self._forward(
                stack, call, inputs, target, contrast, None, False, examines=True
            )
            return recorded.linearised.unequal

    def _not_closed(
        self, found: TargetPass, gap: float, unequal: tuple[str, nn.Module | None] | None
    ) -> UnsupportedModelError:
        """Return the error for shares that do not sum to the target, with the first reason."""
        where = (
            "No single torch function explains it, so a part of the model may run outside of them: "
            "in TorchScript, an autograd.Function or a kernel of its own. Write this part with "
            "torch functions."
        )
        if len(found.linear) > 1:
            where += " Or the targets of a batch depend on the other examples: give one at a time."
        if unequal is not None:
            function, module = unequal
            names = names_of(self.runner.roots)
            place = "outside of all modules" if module is None else f"in module {names[module]!r}"
            kind = "" if module is None else f" ({type(module).__name__})"
            where = (
                f"The first function that is not understood is {function!r}, {place}{kind}: write "
                "it with functions that are, or explain a part of the model that comes after it."
            )
        return UnsupportedModelError(
            f"The shares of the inputs do not sum to the target {float(found.linear.sum()):.4g}: "
            f"{gap:.2g} is missing, so some would be wrong. {where}"
        )


def _not_finite(found: TargetPass) -> ValueError:
    """Return the error for a target, or a gradient of it, that is NaN or infinite."""
    what = "The gradient of the target is NaN or infinite"
    for b, value in enumerate(found.values.tolist()):
        if not math.isfinite(value):
            what = f"The target of example {b} is {value}"
            break
    return ValueError(
        f"{what}: check the inputs and weights; in float16, load the model in bfloat16 or float32."
    )


def _other_masks(call: ForwardCall) -> tuple[Tensor, ...]:
    """Return the padding mask of a sound, or of another input that is no text."""
    mask = call.kwargs.get("attention_mask")
    return (mask != 0,) if isinstance(mask, Tensor) and mask.dim() == 2 else ()


@contextmanager
def _explained() -> Iterator[None]:
    """Explain why a model cannot run with gradients."""
    try:
        yield
    except NotImplementedError as error:
        raise UnsupportedModelError(
            "A part of the model cannot run with gradients on this device "
            f"({str(error).partition(chr(10))[0]}). If it is attention, use another one: "
            'model.set_attn_implementation("sdpa").'
        ) from error


@contextmanager
def _again(linearised: Linearised, modules: list[nn.Module]) -> Iterator[None]:
    """Run a part of the model once more, as in the forward pass."""
    with (
        torch.enable_grad(),
        following(linearised.again()),
        own_functions_as_one(),
        kernels_in_functions(),
        attention_calls(modules, lambda call: None),
    ):
        yield


def _backward(recorded: _Recorded, *, retain_graph: bool) -> list[Tensor]:
    """Return the gradients of the leaves, and last that of the constants."""
    leaves = [leaf.tensor for leaf in recorded.linearised.leaves]
    inputs = [*leaves, recorded.linearised.one]
    try:
        grads = torch.autograd.grad(
            [x for x, _ in recorded.outputs],
            inputs,
            [g for _, g in recorded.outputs],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, (UnsupportedModelError, torch.OutOfMemoryError)):
            raise
        raise UnsupportedModelError(
            "The backward pass of the model fails, so targets cannot be attributed to its "
            f"inputs ({type(error).__name__}: {str(error).partition(chr(10))[0]})."
        ) from error
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def _constants(recorded: _Recorded, weights: Tensor) -> Tensor:
    """Return the share of constants in weighted sums of the examples' targets.

    Args:
        recorded: The forward pass.
        weights: The weights of the examples, ``(n, B)``.

    Returns:
        ``(n,)``.
    """
    one, outputs, shares = recorded.linearised.one, recorded.outputs, []
    for row in weights:
        seeds = [g * row.to(g).view(-1, *[1] * (g.dim() - 1)) for _, g in outputs]
        (share,) = torch.autograd.grad(
            [x for x, _ in outputs], one, seeds, retain_graph=True, allow_unused=True
        )
        shares.append(torch.zeros_like(one) if share is None else share)
    return torch.stack(shares)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Run the transformer layers of PyTorch in their usual way."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _floating(output: Any) -> Iterator[Tensor]:
    """Iterate over the floating tensors of an output."""
    for x in pytree.tree_leaves(output):
        if isinstance(x, Tensor) and x.is_floating_point():
            yield x


def _shares(
    leaves: list[Leaf], grads: list[Tensor], arguments: Arguments
) -> tuple[dict[str | int, Tensor], float]:
    """Return the share of each input, and the sum of the sizes of all shares."""
    shares: dict[str | int, Tensor] = {}
    sizes = 0.0
    for leaf, gradient in zip(leaves, grads, strict=False):  # the last gradient is of constants
        wide = torch.promote_types(gradient.dtype, torch.float32)
        share = leaf.tensor.detach().to(wide) * gradient.to(wide)
        if leaf.places is None:
            sizes += float(share.abs().sum())
            shares[leaf.name] = share.float()
            continue
        share = share.view(*leaf.places.shape, -1).sum(-1)
        sizes += float(share.abs().sum())
        known = leaf.places != NOWHERE
        shape = arguments.inputs[leaf.name].tensor.shape
        total = share.new_zeros(shape.numel()).index_add_(0, leaf.places[known], share[known])
        shares[leaf.name] = shares.get(leaf.name, 0) + total.view(shape).float()
    return shares, sizes
