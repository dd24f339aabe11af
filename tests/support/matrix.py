"""Every model type of transformers against a reference that knows none of them.

    cd tests && python -m support.matrix

writes docs/architectures.md, and the same for ``captum-cw models``. The model's own eager kernel
tells attention weights and values. What comes of head outputs is asked of the attention module
itself: it runs once more for each feature of each head, its kernel giving that feature alone, so
that ``v~`` follows from what the module returns, whatever lies in between.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

from captum_cw import (
    ContributionWeights,
    TokenScores,
    remove_values,
)
from captum_cw._utils.files import write_json
from captum_cw.capture import UnsupportedModelError
from captum_cw.models.architectures import FILE, TITLES, VERSION, ModelTypes, Outcome
from support import handwritten, reference
from support.architectures import GROUPS, CannotBuild, build, types
from support.architectures import inputs as inputs_of
from support.measures import MEASURES
from support.paths import ROOT

PAGE = ROOT / "docs" / "architectures.md"
#: Types without a softmax over tokens.
NO_SOFTMAX = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}


@dataclass
class Call:
    """One run of an attention module: what its kernel took and gave."""

    module: nn.Module
    attention: Tensor
    visible: Tensor
    value: Tensor
    head_output: Tensor
    given: tuple[tuple[Any, ...], dict[str, Any]]
    norm: nn.Module | None = None
    """A norm that reads the head outputs."""
    scale: Tensor | None = None
    """What it multiplies them by."""
    linear: nn.Module | None = None
    """What reads the head outputs, where the attention module returns them as they are."""
    inner: nn.Module | None = None
    """What reads them in the attention module."""


@dataclass
class Kernels:
    """Stands around the eager kernels of a model.

    Args:
        calls: What was seen.
        instead: Gives other head outputs for a call.
        values: Gives other values (by query head) for a call.
    """

    calls: list[Call] = field(default_factory=list)
    given: dict[nn.Module, Any] = field(default_factory=dict)
    instead: Callable[[Tensor], Tensor] | None = None
    values: Callable[[int, Tensor], Tensor] | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        names = {cls.__module__ for m in model.modules() for cls in type(m).__mro__}
        with ExitStack() as stack:
            for name in names:
                for kernel, original in list(vars(sys.modules.get(name, sys)).items()):
                    if kernel.endswith("eager_attention_forward"):
                        around = self._around(original)
                        stack.enter_context(mock.patch.object(sys.modules[name], kernel, around))
            yield

    def _around(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            out, weights = kernel(module, q, k, v, *args, **kwargs)
            if self.instead is not None:
                return self.instead(out), weights
            repeated = torch.stack(
                [v[:, h * v.shape[1] // q.shape[1]] for h in range(q.shape[1])], 1
            )
            repeated = repeated[:, :, : weights.shape[-1]]
            plain = (weights @ repeated).transpose(1, 2)
            # A kernel may multiply its output by a learned sink, rather than its weights.
            scale = ((plain * out).sum(-1) / plain.square().sum(-1)).nan_to_num(1)
            weights_used = weights * scale.transpose(1, 2)[..., None]
            mask = args[0] if args else kwargs.get("attention_mask")
            visible = torch.ones_like(weights, dtype=torch.bool)
            if mask is not None:
                lowest = torch.finfo(q.dtype).min
                visible &= (mask if mask.dtype == torch.bool else mask > lowest / 2)[
                    ..., : weights.shape[-1]
                ]
            if q.shape[2] != k.shape[2]:
                # A query that sees nothing (of other states than its own) has no row.
                weights_used = weights_used * visible.any(-1, keepdim=True)
            if self.values is not None:
                changed = self.values(len(self.calls), repeated)
                out = out + (weights_used @ (changed - repeated)).transpose(1, 2)
            self.calls.append(
                Call(module, weights_used, visible, repeated, out, self.given.get(module, ((), {})))
            )
            return out, weights

        return run


def kernel_calls(model: nn.Module, inputs: dict[str, Any]) -> list[Call]:
    """The attention calls of a pass, with what their modules were given."""
    kernels = Kernels()

    def reads_heads(args: tuple[Any, ...]) -> bool:
        if not kernels.calls or not args or not isinstance(args[0], Tensor):
            return False
        x, y = args[0], kernels.calls[-1].head_output
        return x.numel() == y.numel() and torch.equal(x.flatten(), y.flatten())

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernels.given[module] = args, kwargs
        if isinstance(module, nn.Linear) and reads_heads(args):
            call = kernels.calls[-1]
            inside = module in call.module.modules()
            call.linear, call.inner = (None, module) if inside else (module, call.inner)

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if "Norm" in type(module).__name__ and reads_heads(args):
            kernels.calls[-1].norm, kernels.calls[-1].scale = module, out / args[0]

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(after) for m in model.modules()]
    try:
        with torch.no_grad(), kernels.watching(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return kernels.calls


def projected(model: nn.Module, call: Call, inner: bool = False) -> tuple[Tensor, Tensor]:
    """``v~`` ``(B, H, T, S, d)``, and the output ``(B, T, d)`` without what is there for none.

    With ``inner``, the output is that of the linear layer: a norm may come after it.
    """
    linear = call.inner if inner else call.linear
    args, kwargs = call.given
    kwargs = kwargs | {name: None for name in handwritten.CACHES if name in kwargs}
    B, T, H, d_h = call.head_output.shape
    kernels = Kernels()

    def output(head_output: Tensor) -> Tensor:
        if linear is not None:
            with torch.no_grad():
                return linear(head_output.float().flatten(2)).double()  # type: ignore[no-any-return]
        kernels.instead = lambda out: head_output.to(out)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(kernels.watching(model))
            if call.norm is not None:  # its scale is held fixed
                fixed = mock.patch.object(call.norm, "forward", lambda x: x * call.scale)
                stack.enter_context(fixed)
            out = call.module(*args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).double().reshape(B, T, -1)

    nothing = torch.zeros(B, T, H, d_h)
    base = output(nothing)
    columns = []
    for h in range(H):
        for e in range(d_h):
            one = nothing.clone()
            one[:, :, h, e] = 1
            columns.append(output(one) - base)
    p = torch.stack(columns, 2).unflatten(2, (H, d_h))  # (B, T, H, d_h, d)
    return (
        torch.einsum("bhse,bthed->bhtsd", call.value.double(), p),
        output(call.head_output) - base,
    )


def check(model: Any, inputs: dict[str, Any]) -> Outcome:
    """Holds all measures, scores and a removal to the reference.

    Raises:
        AssertionError: If a number is wrong.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calls: list[Any] = kernel_calls(model, inputs)
        by_itself = not calls
        if by_itself:
            calls = handwritten.attention_calls(model, inputs)
        kinds = tuple(dict.fromkeys(type(c.module).__name__ for c in calls))
        try:
            maps = {
                name: method(model, kind="all").attribute(inputs)
                for name, method in MEASURES.items()
            }
        except UnsupportedModelError as error:
            return Outcome("refused", str(error), 0, kinds, "" if by_itself else "registry")
        scores = _scores(model, inputs)
        _check_logits(model, inputs)
    if len(calls) != len(maps["inter"]):  # some go through the registry, some do not
        calls, by_itself = handwritten.attention_calls(model, inputs), True
    assert len(calls) == len(maps["inter"]), (len(calls), len(maps["inter"]))
    for number, call in enumerate(calls):
        seeing = call.attention.sum((1, 3)) > 0  # (B, T)
        for inner in (False, True):
            v, o = (handwritten.projected if by_itself else projected)(model, call, inner)
            total = (call.attention.double()[..., None] * v).sum((1, 3))
            o = o * seeing[..., None]
            linear = torch.allclose(total, o, atol=1e-3 * float(o.abs().max()))
            if linear or call.inner is None:
                break
        assert linear, "no linear map"
        measured = reference.measures_of(call.attention, v)
        expected = {name: measured[name] for name in MEASURES}
        expected = {n: torch.where(seeing[:, None, :, None], g, 0) for n, g in expected.items()}
        for name, g in expected.items():
            scale = float(g.abs().max())
            found = maps[name][number].double()
            assert found.shape == g.shape, (name, number, found.shape, g.shape)
            assert torch.allclose(found, g, atol=1e-3 * scale), (name, number)
        right = reference.token_scores(expected["inter"], call.visible, "mean").sum(1)
        found = scores[number].double()
        assert torch.allclose(found, right, atol=1e-3 * float(right.abs().max())), number
    _check_removal(model, inputs, calls, by_itself)
    if not by_itself:
        _check_sdpa(model, inputs, maps["inter"])
    way = "by itself" if by_itself else "registry"
    left_out = [str(w.message) for w in told if "left out" in str(w.message)]
    if left_out:
        return Outcome("in part", left_out[0], len(calls), kinds, way)
    return Outcome("works", "", len(calls), kinds, way)


def _scores(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """For each layer ``(B, S)``; layers need not be of one length."""
    try:
        scores = TokenScores(ContributionWeights(model, kind="all"), layers=None, heads="sum")
        return list(scores.attribute(inputs).unbind(1))
    except ValueError as error:
        if "differ in heads or length" not in str(error):
            raise
    method = ContributionWeights(model, kind="all")
    method.observe(inputs, None, lambda execution, layer: None)
    modules = dict(model.named_modules())
    return [
        TokenScores(ContributionWeights(model, modules[name]), heads="sum").attribute(inputs)
        for name in method.layers
    ]


def _check_logits(model: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        alone = model(**inputs)
        _, observed = ContributionWeights(model, kind="all").observe(
            {**inputs, "logits_to_keep": 0} if _takes(model, "logits_to_keep") else inputs,
            None,
            lambda e, x: None,
        )
        assert torch.equal(answer(alone), answer(observed)), "logits change when observed"


def _check_sdpa(model: Any, inputs: dict[str, Any], eager: list[Tensor]) -> None:
    """Holds contributions under SDPA to those under eager, where the model computes the same."""
    with torch.no_grad():
        slow = answer(model(**inputs))
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # it has none
            return
        fast = answer(model(**inputs))
    if not torch.allclose(slow, fast, atol=1e-3 * float(slow.abs().max())):
        return
    found = ContributionWeights(model, kind="all").attribute(inputs)
    for number, (a, b) in enumerate(zip(eager, found, strict=True)):
        assert torch.allclose(a, b, atol=1e-3 * float(a.abs().max())), ("sdpa", number)


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def answer(output: Any) -> Tensor:
    """What a model is run for."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(getattr(output, name) for name in names if getattr(output, name, None) is not None)


def _check_removal(model: Any, inputs: dict[str, Any], calls: list[Any], by_itself: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = []
    for call in calls:
        B, H, _, S = call.attention.shape
        masks.append(torch.rand(B, H, S, generator=generator) < 0.3)
    if by_itself:
        expected = answer(handwritten.without_values(model, inputs, masks))
    else:
        kernels = Kernels(values=lambda n, v: v.masked_fill(masks[n][..., None], 0))
        with torch.no_grad(), kernels.watching(model):
            expected = answer(model(**inputs))
    with torch.no_grad(), remove_values(model, masks):
        found = answer(model(**inputs))
        scale = float(expected.abs().max())
    assert torch.allclose(found, expected, atol=1e-3 * scale), "removal"
    with torch.no_grad():
        unchanged = answer(model(**inputs))
    assert not torch.allclose(unchanged, expected, atol=1e-3 * scale), "nothing was removed"


def outcome(model_type: str, group: str = "causal") -> Outcome:
    """What becomes of a type.

    Raises:
        AssertionError: If a number is wrong.
    """
    try:
        model = build(model_type, group)
    except CannotBuild as reason:
        return Outcome("not built", str(reason).partition(": ")[2])
    inputs: dict[str, Any] = inputs_of(model, group)
    if _takes(model, "use_cache"):
        inputs["use_cache"] = False  # modules run again, and would append to it
    found = check(model, inputs)
    if found.status == "refused" and model_type in NO_SOFTMAX:
        return Outcome("no softmax attention", "its layers do not compute attention weights")
    return found


def page(found: ModelTypes) -> str:
    """All types of each group in a table."""
    lines = [
        "# Architectures",
        "",
        "`python -m support.matrix` in `tests/` wrote this page with transformers "
        f"{found.transformers} and torch {found.torch}. It tests the model types of transformers, "
        "each as a small model with random weights. A type works if two things hold: the four "
        "measures, the token scores and a removal equal those of a slow reference that reads the "
        "attention modules themselves, and the output of the model stays the same, bit for bit, "
        "while it is observed. Models compute attention through the attention registry of "
        'transformers (tested with the eager kernel and with SDPA), or in their own code ("by '
        'itself"). A model that is not supported is refused with a reason. If a part of a model is '
        'left out ("in part"), a warning says so.',
    ]
    for group, of_group in found.groups.items():
        lines += ["", f"## {TITLES[group]}", "", _counts(found, group), ""]
        lines += ["| type | attention | computed | layers seen | status | reason |"]
        lines += ["| --- | --- | --- | ---: | --- | --- |"]
        for model_type, x in of_group.items():
            kinds = ", ".join(f"`{kind}`" for kind in x.kinds)
            cells = model_type, kinds, x.way, str(x.layers or ""), x.status, x.reason
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def of_registry(found: ModelTypes, group: str) -> tuple[int, int]:
    """Count the model types that use the attention registry, and those of them that work."""
    statuses = [x.status for x in found.groups[group].values() if x.way == "registry"]
    return len(statuses), statuses.count("works")


def _counts(found: ModelTypes, group: str) -> str:
    registered, works = of_registry(found, group)
    in_all = ", ".join(f"{n} {status}" for status, n in found.counts(group).items() if n)
    return (
        f"Of the {registered} types whose attention goes through the registry, {works} work. "
        f"All {len(found.groups[group])} types by status: {in_all}."
    )


def main() -> int:
    """Checks every type, and writes what became of it, if none is wrong."""
    groups: dict[str, dict[str, Outcome]] = {}
    wrong = []
    for group in GROUPS:
        groups[group] = {}
        for model_type in types(group):
            try:
                found = outcome(model_type, group)
                reason = found.reason.partition(". ")[0].rstrip(".")
                groups[group][model_type] = replace(found, reason=reason)
                print(f"{model_type}: {found.status}", file=sys.stderr)
            except Exception as error:  # noqa: PERF203  all are to be seen, not the first alone
                wrong.append(model_type)
                print(f"{model_type}: {type(error).__name__}: {error}", file=sys.stderr)
    if wrong:
        print(f"Wrong: {', '.join(wrong)}. Nothing was written.", file=sys.stderr)
        return 1
    tested = ModelTypes(transformers.__version__, torch.__version__, groups)
    write_json(FILE, {"version": VERSION, **asdict(tested)})
    PAGE.write_text(page(tested), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
