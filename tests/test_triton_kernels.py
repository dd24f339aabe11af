"""The kernels of Triton against the definition in float64, interpreted and on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_cw import AttentionWeights, ContributionWeights, TokenScores, functional
from captum_cw.products import VARIABLE
from captum_cw.weights import attention_weights, block_elements
from support.kernel_cases import (
    BLOCKWISE,
    KERNEL,
    MASKS,
    MEASURES,
    REDUCTIONS,
    TOLERANCES,
    Case,
    core_cases,
    engine,
    error_of,
    gpu_cases,
    make,
)

KERNELS = "captum_cw.kernels"


def _is_fresh(name: str) -> bool:
    """Whether a module must be imported again; compiled parts of Triton load only once."""
    return (name.split(".")[0] == "triton" and "._C" not in name) or name == KERNELS


def _needs_triton() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton (on Linux)")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The kernels in Triton's interpreter, with a Triton of their own, which others do not see."""
    _needs_triton()
    before = {name: module for name, module in sys.modules.items() if _is_fresh(name)}
    for name in before:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        kernels = import_module(KERNELS)
        patch.setattr(kernels, "HALF_TILE", (16, 32))  # so that short texts have several tiles
        patch.setattr(kernels, "SINGLE_TILE", (16, 32))
        yield kernels
    for name in [name for name in sys.modules if _is_fresh(name)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def runs(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reductions that the kernels computed."""
    computed = []
    reduce_queries = interpreted.reduce_queries

    def counted(weights: Any, product: Any, chosen: Any, reduction: str, *, signed: bool) -> Any:
        computed.append(reduction)
        return reduce_queries(weights, product, chosen, reduction, signed=signed)

    monkeypatch.setattr(interpreted, "reduce_queries", counted)
    return computed


def _one_each() -> Iterator[tuple[str, str, functional.Reduction]]:
    """Every mask with every measure and every reduction, though not all three together."""
    for i, mask in enumerate(MASKS):
        for j, measure in enumerate(MEASURES):
            yield measure, mask, REDUCTIONS[(i + j) % len(REDUCTIONS)]
        for reduction in REDUCTIONS:
            yield "inter", mask, reduction


@pytest.mark.parametrize(("measure", "mask", "reduction"), sorted(set(_one_each())))
def test_kernels_equal_the_definition(
    measure: str, mask: str, reduction: functional.Reduction, runs: list[str]
) -> None:
    case = Case(measure, mask)
    assert error_of(case, make(case), reduction, signed=False) < TOLERANCES[case.dtype]
    assert runs == [reduction]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("measure", ["inter", "target", "effect"])
def test_kernels_keep_signs(measure: str, reduction: functional.Reduction, runs: list[str]) -> None:
    case = Case(measure)
    assert error_of(case, make(case), reduction, signed=True) < TOLERANCES[case.dtype]
    assert runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", ["attention", "inter", "joint"])
def test_half_precision_loses_nothing(measure: str, dtype: torch.dtype, runs: list[str]) -> None:
    case = Case(measure, dtype=dtype)
    assert error_of(case, make(case), "mean", signed=True) < TOLERANCES[dtype]
    assert runs


EXTRAS: list[dict[str, Any]] = [{"softcap": 1.5}, {"sink": True}, {"bias": True}]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("mask", ["causal", "padded", "sliding"])
@pytest.mark.parametrize("by", [KERNEL, BLOCKWISE])
def test_both_engines_take_soft_caps_sinks_and_biases(
    extra: dict[str, Any], mask: str, by: str, runs: list[str]
) -> None:
    case = Case("attention", mask, **extra)
    assert error_of(case, make(case), "mean", signed=False, by=by) < TOLERANCES[case.dtype]
    assert bool(runs) == (by == KERNEL)


@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_chosen_queries_count(
    mask: str, reduction: functional.Reduction, runs: list[str]
) -> None:
    case = Case("inter", mask, T=40, chosen=True)
    made = make(case)
    assert error_of(case, made, reduction, signed=False) < TOLERANCES[case.dtype]
    assert made.queries is not None
    alone = torch.zeros_like(made.queries)
    alone[0, 21] = True  # no query of the second example counts
    visible = make(replace(case, chosen=False)).visible & alone[:, None, :, None]
    made = replace(made, queries=alone, visible=visible)
    assert error_of(case, made, reduction, signed=False) < TOLERANCES[case.dtype]
    assert len(runs) == 2


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 24),
    earlier=st.integers(0, 30),  # more keys than fit into a tile
    groups=st.integers(1, 3),
    shared=st.integers(1, 2),
    d_k=st.integers(1, 40),
    d_v=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCES)),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 9),
)
def test_any_shape_equals_the_definition(
    interpreted: ModuleType,
    T: int,
    earlier: int,
    groups: int,
    shared: int,
    d_k: int,
    d_v: int,
    dtype: torch.dtype,
    reduction: functional.Reduction,
    seed: int,
) -> None:
    heads = {"H": groups * shared, "H_kv": shared}
    case = Case(dtype=dtype, B=1, T=T, S=T + earlier, d_k=d_k, d_v=d_v, seed=seed, **heads)
    assert error_of(case, make(case), reduction, signed=False) < TOLERANCES[dtype]


def test_models_are_scored_by_the_kernels(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    ids = torch.arange(1, 21).view(2, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, :4] = 0
    for dtype in (torch.float32, torch.bfloat16):
        method = TokenScores(ContributionWeights(tiny_model.to(dtype)), layers=None, heads=None)
        monkeypatch.setenv(VARIABLE, BLOCKWISE)
        expected = method.attribute(inputs)
        assert runs == []
        monkeypatch.setenv(VARIABLE, KERNEL)
        scores = method.attribute(inputs)
        assert runs == ["mean", "mean"]  # both layers
        assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-6)
        runs.clear()


def test_a_soft_cap_that_the_model_applies_reaches_the_kernels(
    monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    transformers = pytest.importorskip("transformers")

    def capped(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        a = attention_weights(
            query,
            key,
            scaling=options["scaling"],
            mask=mask,
            causal=mask is None,
            softcap=options["softcap"],
        )
        groups = query.shape[1] // value.shape[1]
        return (a @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    transformers.AttentionInterface.register("capped", capped)
    mask_of = transformers.masking_utils.sdpa_mask
    transformers.AttentionMaskInterface.register("capped", mask_of)
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_logit_softcapping=0.05,
        query_pre_attn_scalar=1,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(20)  # logits that the cap changes
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = [a.tril() for a in model(ids, output_attentions=True).attentions]
    model.set_attn_implementation("capped")
    monkeypatch.setenv(VARIABLE, KERNEL)
    scores = TokenScores(AttentionWeights(model), "sum", layers=None, heads=None).attribute(ids)
    assert len(runs) == 2
    assert torch.allclose(scores, torch.stack([a.sum(-2) for a in expected], 1), atol=1e-5)


def test_what_the_kernels_do_not_cover_takes_the_blockwise_engine(runs: list[str]) -> None:
    made = make(Case("vw"))
    layer = made.layer
    dense = replace(layer, weights=lambda rows: layer.weights(rows))
    gated = replace(layer, gate=torch.rand_like(layer.head_output))
    other = replace(layer, mask=replace(layer.mask))
    with engine(KERNEL):
        for uncovered in (dense, gated, other):
            with engine(BLOCKWISE):
                expected = functional.token_scores(uncovered, functional.vw)
            assert torch.equal(functional.token_scores(uncovered, functional.vw), expected)
        functional.token_scores(layer, functional.closeness)
        wide = make(Case(d_k=257)).layer
        functional.token_scores(wide, functional.contribution())
    assert runs == []


def test_the_cpu_takes_the_blockwise_engine_by_itself(runs: list[str]) -> None:
    with engine(None):
        functional.token_scores(make(Case()).layer, functional.contribution())
    assert runs == []


def test_an_unknown_engine_is_refused() -> None:
    layer = make(Case()).layer
    with engine("cuda"), pytest.raises(ValueError, match="CAPTUM_CW_KERNEL='cuda' is unknown"):
        functional.token_scores(layer, functional.contribution())


def test_triton_must_be_installed_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_cw.products.find_spec", lambda name: None)
    layer = make(Case()).layer
    with engine(KERNEL), pytest.raises(ImportError, match="pip install triton"):
        functional.token_scores(layer, functional.contribution())


def test_kernels_compile_for_gpus_and_fit_into_their_memory(tmp_path: Any) -> None:
    """Compiled for an H200, which needs no GPU."""
    _needs_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from captum_cw import kernels

    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    memory = 227 * 1024
    tiles = kernels.tiles_for(128, 64, 2, torch.bfloat16, memory)
    pointers = {
        **dict.fromkeys(("QUERY", "KEY", "VALUE", "DIRECTION", "OTHER"), "*bf16"),
        **dict.fromkeys(("FACTOR", "HIGHEST", "INVERSE", "SINK", "OUT"), "*fp32"),
        "CHOSEN": "*u8",
        "MASK": "*u8",
        "BOUNDS": "*i32",
        "next_part": "i64",
        "scaling": "fp32",
        "softcap": "fp32",
    }
    constants = {
        "GROUP": 4,
        "D_K": 80,
        "D_K_PADDED": 128,
        "D_V": 64,
        "D_V_PADDED": 64,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "MASKED": "boolean",
        "CAPPED": True,
        "CAUSAL": True,
        "HAS_SINK": True,
        "HAS_CHOSEN": True,
        "WEIGHTED": True,
        "DIRECTIONS": 1,
        "PARTS": 2,
        "POWER": 0.5,
        "OTHER_POWER": None,
        "SIGNED": False,
        "REDUCTION": "rms",
    }
    for kernel in (kernels.statistics_kernel, kernels.reduce_kernel):
        names = kernel.arg_names
        constant = {(names.index(x),): value for x, value in constants.items() if x in names}
        aligned = [x for x in names if pointers.get(x, "").startswith("*") or x in ("T", "S")]
        source = ASTSource(
            fn=kernel,
            signature={x: "constexpr" if x in constants else pointers.get(x, "i32") for x in names},
            constexprs=constant,
            attrs={(names.index(x),): [["tt.divisibility", 16]] for x in aligned},
        )
        options = {"num_stages": tiles.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_tiles_fit_into_small_memory(
    interpreted: ModuleType, size: int, dtype: torch.dtype
) -> None:
    for memory in (99 * 1024, 227 * 1024):
        rows, columns, stages = interpreted.tiles_for(size, size, 2, dtype, memory)
        numbers = columns * 2 * size + stages * rows * 3 * size
        assert numbers * dtype.itemsize + interpreted.OTHER_MEMORY <= memory
        assert min(rows, columns) >= interpreted.SMALLEST


def test_blocks_of_a_gpu_are_as_large_as_its_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda")
    for free, expected in ((2**20, 2**20), (2**32, 2**26), (2**40, 2**28)):
        monkeypatch.setattr("captum_cw.weights.free_bytes", lambda device, free=free: free)
        assert block_elements(device) == expected
    assert block_elements(torch.device("cpu")) == 2**20


def test_the_checks_of_the_benchmark_meet_everything_once() -> None:
    cases = list(core_cases("cpu"))
    assert {case.measure for case, _, _ in cases} == set(MEASURES)
    assert {case.mask for case, _, _ in cases} == set(MASKS)
    assert {reduction for _, reduction, _ in cases} == set(REDUCTIONS)
    assert {case.dtype for case, _, _ in cases} == set(TOLERANCES)
    for extra in ("softcap", "sink", "bias", "chosen"):
        assert any(getattr(case, extra) for case, _, _ in cases), extra
    assert len(cases) < 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_equal_the_definition_on_a_gpu() -> None:
    wrong = {}
    for case, reduction, signed in gpu_cases("cuda"):
        made = make(case)
        error = error_of(case, made, reduction, signed=signed, by=KERNEL)
        if not error < TOLERANCES[case.dtype]:
            wrong[case, reduction, signed] = error
    assert wrong == {}
