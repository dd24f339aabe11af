"""Every causal model type of transformers against a reference that knows none of them.

    python tests/matrix.py

writes docs/architectures.md. The model's own eager kernel tells attention weights and values. What
comes of head outputs is asked of the attention module itself: it runs once more for each feature
of each head, its kernel giving that feature alone, so that ``v~`` follows from what the module
returns, whatever lies in between.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import by_hand
import reference
import torch
import transformers
from architectures import CannotBuild, build, causal_types
from architectures import inputs as inputs_of
from torch import Tensor, nn

from captum_cw import (
    AttentionWeights,
    ContributionWeights,
    TokenScores,
    VWAttention,
    VWONAttention,
    remove_values,
)
from captum_cw.capture import UnsupportedModelError

METHODS = {
    "attention": AttentionWeights,
    "vw": VWAttention,
    "vwon": VWONAttention,
    "inter": ContributionWeights,
}


PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
#: Types without a softmax over tokens.
NO_SOFTMAX = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}


@dataclass
class Call:
    """One run of an attention module: what its kernel took and gave."""

    module: nn.Module
    attention: Tensor
    value: Tensor
    head_output: Tensor
    given: tuple[tuple[Any, ...], dict[str, Any]]
    norm: nn.Module | None = None
    """A norm that reads the head outputs."""
    scale: Tensor | None = None
    """What it multiplies them by."""
    linear: nn.Module | None = None
    """What reads the head outputs, where the attention module returns them as they are."""


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
            if args and isinstance(args[0], Tensor) and q.shape[2] != k.shape[2]:
                # A query that sees nothing (of other states than its own) has no row.
                nothing = (args[0] < torch.finfo(q.dtype).min / 2).all(-1, keepdim=True)
                weights_used = weights_used.masked_fill(nothing, 0)
            if self.values is not None:
                changed = self.values(len(self.calls), repeated)
                out = out + (weights_used @ (changed - repeated)).transpose(1, 2)
            self.calls.append(
                Call(module, weights_used, repeated, out, self.given.get(module, ((), {})))
            )
            return out, weights

        return run


def look(model: nn.Module, inputs: dict[str, Tensor]) -> list[Call]:
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
            call.linear = None if module in call.module.modules() else module

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if "Norm" in type(module).__name__ and reads_heads(args):
            kernels.calls[-1].norm, kernels.calls[-1].scale = module, out / args[0]

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(after) for m in model.modules()]
    try:
        with torch.no_grad(), kernels.watching(model):
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kernels.calls


def projected(model: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
    """``v~`` ``(B, H, T, S, d)``, and the output ``(B, T, d)`` without what is there for none."""
    args, kwargs = call.given
    B, T, H, d_h = call.head_output.shape
    kernels = Kernels()

    def output(head_output: Tensor) -> Tensor:
        if call.linear is not None:
            with torch.no_grad():
                return call.linear(head_output.float().flatten(2)).double()  # type: ignore[no-any-return]
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


@dataclass(frozen=True)
class Outcome:
    """What became of a model type.

    Args:
        status: ``"works"``, ``"refused"`` or why there is nothing to be right about.
        reason: Of a refusal.
        way: How its attention is computed: through the ``"registry"``, or ``"by itself"``.
        layers: How many attention layers were seen.
        kinds: The classes of their modules.
    """

    status: str
    reason: str = ""
    way: str = ""
    layers: int = 0
    kinds: tuple[str, ...] = ()


def check(model: Any, inputs: dict[str, Tensor]) -> Outcome:
    """Holds all measures, scores and a removal to the reference.

    Raises:
        AssertionError: If a number is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_attn_implementation("eager")
        model.config._attn_implementation = "eager"  # of models that cannot be asked
        calls: list[Any] = look(model, inputs)
        by_itself = not calls
        if by_itself:
            calls = by_hand.look(model, inputs)
        kinds = tuple(dict.fromkeys(type(c.module).__name__ for c in calls))
        try:
            maps = {
                name: method(model, kind="all").attribute(inputs)
                for name, method in METHODS.items()
            }
        except UnsupportedModelError as error:
            return Outcome("refused", str(error), way="" if by_itself else "registry", kinds=kinds)
        scores = _scores(model, inputs)
        _check_logits(model, inputs)
    assert len(calls) == len(maps["inter"]), (len(calls), len(maps["inter"]))
    for number, call in enumerate(calls):
        v, o = (by_hand.projected if by_itself else projected)(model, call)
        linear = (call.attention.double()[..., None] * v).sum((1, 3))
        seeing = call.attention.sum((1, 3)) > 0  # (B, T)
        o = o * seeing[..., None]
        assert torch.allclose(linear, o, atol=1e-3 * float(o.abs().max())), "no linear map"
        measured = reference.measures_of(call.attention, v)
        expected = {name: measured[name] for name in METHODS}
        expected = {n: torch.where(seeing[:, None, :, None], g, 0) for n, g in expected.items()}
        for name, g in expected.items():
            scale = float(g.abs().max())
            found = maps[name][number].double()
            assert found.shape == g.shape, (name, number, found.shape, g.shape)
            assert torch.allclose(found, g, atol=1e-3 * scale), (name, number)
        visible = call.attention > 0
        right = reference.token_scores(expected["inter"], visible, "mean").sum(1)
        found = scores[number].double()
        assert torch.allclose(found, right, atol=1e-3 * float(right.abs().max())), number
    _check_removal(model, inputs, calls, by_itself)
    way = "by itself" if by_itself else "registry"
    return Outcome("works", layers=len(calls), kinds=kinds, way=way)


def _scores(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
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


def _check_logits(model: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        alone = model(**inputs, use_cache=False)
        _, observed = ContributionWeights(model).observe(
            {**inputs, "logits_to_keep": 0} if _keeps(model) else inputs, None, lambda e, x: None
        )
        assert torch.equal(alone.logits, observed.logits), "logits change when observed"


def _keeps(model: Any) -> bool:
    import inspect

    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _check_removal(
    model: Any, inputs: dict[str, Tensor], calls: list[Any], by_itself: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = []
    for call in calls:
        B, H, _, S = call.attention.shape
        masks.append(torch.rand(B, H, S, generator=generator) < 0.3)
    if by_itself:
        expected = by_hand.logits_without(model, inputs, masks)
    else:
        kernels = Kernels(values=lambda n, v: v.masked_fill(masks[n][..., None], 0))
        with torch.no_grad(), kernels.watching(model):
            expected = model(**inputs, use_cache=False).logits
    with torch.no_grad(), remove_values(model, masks):
        found = model(**inputs, use_cache=False).logits
        scale = float(expected.abs().max())
    assert torch.allclose(found, expected, atol=1e-3 * scale), "removal"
    with torch.no_grad():
        unchanged = model(**inputs, use_cache=False).logits
    assert not torch.allclose(unchanged, expected, atol=1e-3 * scale), "nothing was removed"


def outcome(model_type: str) -> Outcome:
    """What becomes of a type.

    Raises:
        AssertionError: If a number is wrong.
    """
    try:
        model = build(model_type)
    except CannotBuild as reason:
        return Outcome("not built", str(reason).partition(": ")[2])
    found = check(model, inputs_of(model))
    if found.status == "refused" and model_type in NO_SOFTMAX:
        return Outcome("no softmax attention", "scores of tokens are not what its layers have")
    return found


def page(found: dict[str, Outcome]) -> str:
    """All types in a table."""
    counts = dict.fromkeys(("works", "refused", "no softmax attention", "not built"), 0)
    for x in found.values():
        counts[x.status] += 1
    through = [t for t, x in found.items() if x.kinds or x.status == "works"]
    works = sum(found[t].status == "works" for t in through)
    lines = [
        "# Architectures",
        "",
        f"Made by `python tests/matrix.py` with transformers {transformers.__version__}, torch "
        f"{torch.__version__}: the {len(found)} causal language model types, each small and with "
        "random weights. A type works if all four measures, token scores and a removal are those "
        "of a slow reference that asks the attention modules themselves, and if its logits do not "
        "change by a bit while it is observed. What is not supported is refused with its reason.",
        "",
        f"Of the {len(through)} types whose attention goes through the attention registry, {works} "
        f"work. In all: {', '.join(f'{n} {status}' for status, n in counts.items())}.",
        "",
        "| type | attention | layers seen | status | reason |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for model_type, x in found.items():
        kinds = ", ".join(f"`{kind}`" for kind in x.kinds)
        reason = x.reason.partition(". ")[0].rstrip(".")
        lines.append(f"| {model_type} | {kinds} | {x.layers or ''} | {x.status} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Checks every type, and writes the page if none is wrong."""
    found: dict[str, Outcome] = {}
    wrong = []
    for model_type in causal_types():
        try:
            found[model_type] = outcome(model_type)
            print(f"{model_type}: {found[model_type].status}", file=sys.stderr)
        except Exception as error:  # noqa: PERF203  all are to be seen, not the first alone
            wrong.append(model_type)
            print(f"{model_type}: {type(error).__name__}: {error}", file=sys.stderr)
    if wrong:
        print(f"Wrong: {', '.join(wrong)}. No page was written.", file=sys.stderr)
        return 1
    PAGE.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
