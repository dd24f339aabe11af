"""Callables are told apart by all that their numbers depend on, the same in every process."""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captum_cw import (
    ComprehensivenessSufficiency,
    ContributionWeights,
    EffectContributions,
    InputContributions,
    TargetContributions,
    TokenScores,
)
from captum_cw.metrics.identity import UNIDENTIFIED, described, fingerprint
from support import callables
from support.callables import PAIRS, Scorer, by_global, calls_another, scaled
from support.inputs import token_ids
from support.models import llama
from support.paths import ROOT
from support.running import process_environment


@pytest.mark.parametrize("name", PAIRS)
def test_callables_that_differ_have_different_identities(name: str) -> None:
    one, other = PAIRS[name]
    found = [described(x) for x in (one, one, other)]
    assert found[0] == found[1] != found[2]
    assert not any(UNIDENTIFIED in text for text in found)


@pytest.mark.parametrize("method", [by_global, calls_another])
def test_globals_that_are_read_tell_functions_apart(
    method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = described(method)
    monkeypatch.setattr(callables, "UNRELATED", 1, raising=False)
    assert described(method) == before
    monkeypatch.setattr(callables, "SCALE", 2.0)
    assert described(method) != before


def test_descriptions_are_the_same_in_every_process() -> None:
    program = (
        "from support import callables\n"
        "from captum_cw.metrics.identity import described\n"
        "for name, pair in callables.PAIRS.items():\n"
        "    print(name, *map(described, pair))\n"
        "print(described(callables.calls_another))"
    )
    found = set()
    for seed in ("1", "2"):
        environment = process_environment(PYTHONHASHSEED=seed)
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout)
    assert len(found) == 1
    assert "0x" not in found.pop()


LOCAL = {
    "a function": ("def f(x):\n    return 2.0 * x\n", "def f(x):\n    return 3.0 * x\n"),
    "what a function reads": (
        "scale = 2.0\ndef f(x):\n    return scale * x\n",
        "scale = 3.0\ndef f(x):\n    return scale * x\n",
    ),
    "a class": (
        "class F:\n    def __call__(self, x):\n        return 2.0 * x\nf = F()\n",
        "class F:\n    def __call__(self, x):\n        return 3.0 * x\nf = F()\n",
    ),
}


@pytest.mark.parametrize("name", LOCAL)
def test_the_code_of_local_modules_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for number, source in enumerate((LOCAL[name][0], *LOCAL[name])):
        # The same module of the same name, as other processes would find it after an edit.
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "of_mine.py").write_text(source)
        (folder / "__main__.py").write_text("import of_mine\nmethod = lambda x: of_mine.f(x)\n")
        with monkeypatch.context() as context:
            context.delitem(sys.modules, "of_mine", raising=False)
            context.syspath_prepend(folder)
            found.append(described(runpy.run_path(str(folder / "__main__.py"))["method"]))
            sys.modules.pop("of_mine", None)
    assert found[0] == found[1] != found[2]
    assert not any(UNIDENTIFIED in text for text in found)


class Probe(nn.Module):
    """A module with attributes that are not among its weights."""

    def __init__(self, scale: Any = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("offset", torch.zeros(2), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.scale * x


def test_what_modules_hold_beside_weights_counts() -> None:
    class Other(Probe):
        def forward(self, x: Any) -> Any:
            return -super().forward(x)

    Other.__qualname__ = Probe.__qualname__
    moved = Probe()
    moved.offset.add_(1)  # type: ignore[operator]
    different = [Probe(), Probe(2.0), Probe(torch.ones(2)), Probe([1.0]), Other(), moved]
    assert len({described(scaled(x)) for x in different}) == len(different)
    assert described(scaled(Probe())) == described(scaled(Probe()))


def test_attributes_of_layers_count_in_the_evaluated_model() -> None:
    one, other = llama(), llama()
    assert fingerprint(one) == fingerprint(other.train())
    other.model.layers[0].self_attn.scaling *= 2
    assert fingerprint(one) != fingerprint(other)


def test_a_pass_leaves_the_fingerprint_of_a_model() -> None:
    model = llama()
    before = fingerprint(model)
    model(token_ids())
    assert fingerprint(model) == before


def test_patterns_and_cached_properties_can_be_identified() -> None:
    class Matching:
        pattern = re.compile("a+")

        @functools.cached_property
        def factor(self) -> float:
            return 2.0

        def __call__(self, batch: Any) -> Any:
            return self.factor * batch if self.pattern.match("a") else batch

    assert UNIDENTIFIED not in described(Matching())
    assert described(scaled(re.compile("a"))) != described(scaled(re.compile("b")))


def test_an_object_that_holds_itself_is_described() -> None:
    one, other = Scorer(2.0), Scorer(3.0)
    for x in (one, other):
        x.factor = [x.factor, x]
    assert described(one) != described(other)


def test_the_evaluated_model_has_no_name_of_its_own() -> None:
    model, same = llama(), llama()
    method = scaled(model)
    assert described(method, model) == described(scaled(same), same) != described(method)
    layers = [ContributionWeights(model, model.get_submodule(f"model.layers.{n}")) for n in (0, 1)]
    first, second = (described(measure, model) for measure in layers)
    assert first != second


OPTIONS: list[tuple[Callable[..., Any], dict[str, list[object]]]] = [
    (ContributionWeights, {"scope": ["intra", "inter"], "space": ["attention", "residual"]}),
    (
        EffectContributions,
        {
            "form": ["joint", "effect", "sensitivity"],
            "gradient": ["frozen", "attnlrp", "plain"],
            "weight": [0.25, 0.5],
            "kind": ["self", "cross", "all"],
        },
    ),
    (TargetContributions, {"attention": ["frozen", "attnlrp"]}),
    (InputContributions, {"attention": ["frozen", "attnlrp"]}),
    (
        lambda model, **options: TokenScores(ContributionWeights(model), **options),
        {
            "reduction": ["sum", "mean", "max", "rms"],
            "layers": ["sum", None, "rollout"],
            "heads": ["sum", None],
            "queries": ["all", -1, slice(0, 2)],
            "signed": [True, False],
        },
    ),
]


@pytest.mark.parametrize(("make", "options"), OPTIONS)
def test_each_option_of_a_measure_counts(
    make: Callable[..., Any], options: dict[str, list[object]]
) -> None:
    model = llama()
    for name, values in options.items():
        found = [described(make(model, **{name: value}), model) for value in values]
        assert len(set(found)) == len(values), (name, found)


def test_a_measure_that_was_used_is_the_same() -> None:
    model = llama()
    methods = (EffectContributions(model), InputContributions(model), ContributionWeights(model))
    for method in methods:
        before = described(method, model)
        options = {} if isinstance(method, ContributionWeights) else {"target": 3}
        method.attribute(token_ids(), **options)
        assert described(method, model) == before == described(type(method)(model), model)


def test_options_of_own_measures_count() -> None:
    class Scaled(ContributionWeights):
        def __init__(self, model: nn.Module, scale: float) -> None:
            super().__init__(model)
            self._factor = scale

    model = llama()
    assert described(Scaled(model, 1.0), model) != described(Scaled(model, 2.0), model)


def test_a_callable_that_cannot_be_identified_does_not_resume(tmp_path: Path) -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5], granularity="token")
    lock = threading.Lock()
    methods = {"mine": lambda batch: batch.float() * bool(lock)}
    assert metric.evaluate(methods, token_ids(), show_progress=False).methods == ["mine"]
    with pytest.raises(ValueError, match="'mine' holds a _thread.lock, .* leave resume_from out"):
        metric.evaluate(methods, token_ids(), resume_from=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_another_constant_is_refused(tmp_path: Path) -> None:
    metric = ComprehensivenessSufficiency(llama(), [0.5], granularity="token")
    settings: dict[str, Any] = {"resume_from": tmp_path / "run", "show_progress": False}
    metric.evaluate({"mine": scaled(1.0)}, token_ids(), **settings)
    metric.evaluate({"mine": scaled(1.0)}, token_ids(), **settings)
    with pytest.raises(ValueError, match="is of another run"):
        metric.evaluate({"mine": scaled(-1.0)}, token_ids(), **settings)
