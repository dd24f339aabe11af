"""Attention kernels with masks of other forms: flex attention, flash attention, registered ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import sdpa_mask

from captum_cw import (
    ContributionWeights,
    TargetContributions,
    TokenScores,
    remove_tokens,
)
from captum_cw.capture import UnsupportedModelError
from captum_cw.capture.kernel_masks import KernelMask, evaluated
from captum_cw.functional import QueryMask
from captum_cw.models.inspection import attention_layers
from support import models
from support.attention_kernels import flash_registered, kernel_registered, with_kernel
from support.inputs import padded_batch, token_ids

HUB = "kernels-community/flash-attn"
FLASH = [HUB, "flash_attention_2", "flash_attention_3", "paged|flash_attention_2"]
CPU = torch.device("cpu")


def gpt_oss() -> nn.Module:
    """Has learned sinks, and a window in every second layer."""
    config = transformers.GptOssConfig(
        **models.SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return models.build(transformers.GptOssForCausalLM, config)


def modern_bert() -> nn.Module:
    """Has windows in both directions."""
    config = transformers.ModernBertConfig(
        **{**models.SIZES, "num_attention_heads": 4},
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return models.build(transformers.ModernBertForMaskedLM, config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": models.llama,
    "one-key-head": lambda: models.llama(1),
    "mistral": models.mistral,
    "gemma2": models.gemma2,
    "gemma3": models.gemma3,
    "bert": models.bert,
    "opt": lambda: models.build(
        transformers.OPTForCausalLM,
        transformers.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    ),
}  # fmt: skip
FLASH_MODELS = {**MODELS, "gpt_oss": gpt_oss, "modern_bert": modern_bert}


@contextmanager
def running(name: str) -> Iterator[None]:
    """Register the stand-in, if a kernel is one of flash attention, and compile nothing."""
    with torch.compiler.set_stance("force_eager"):
        if name == "flex_attention":
            yield
        else:
            with flash_registered(name):
                yield


def inputs_of(side: str) -> dict[str, Tensor]:
    return {"input_ids": token_ids(2, 9)} if side == "none" else padded_batch(side)[0]


def everything(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scores, maps, contributions to a target, and logits after a removal."""
    method, mask = ContributionWeights(model), inputs.get("attention_mask")
    with torch.no_grad(), remove_tokens(model, "contribution", 0.5):
        logits = model(**inputs).logits
    return {
        "scores": TokenScores(method).attribute(inputs),
        "maps": torch.stack(method.attribute(inputs)),
        "target": torch.stack(TargetContributions(model).attribute(inputs, target=_fourth)),
        "removal": logits if mask is None else logits * mask[..., None],
    }


def _fourth(output: Any) -> Tensor:
    return output.logits[:, 4, 3]


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    for name, x in found.items():
        assert torch.allclose(x, expected[name], atol=atol), name


SIDES = [("llama", "none"), ("llama", "right"), ("gemma3", "right"), ("bert", "right")]


@pytest.mark.parametrize(("name", "side"), [*SIDES, *((name, "left") for name in MODELS)])
def test_flex_attention_is_explained_as_other_kernels(name: str, side: str) -> None:
    model, inputs = MODELS[name](), inputs_of(side)
    expected = everything(model, inputs)
    model.set_attn_implementation("flex_attention")
    with running("flex_attention"):
        check_equal(everything(model, inputs), expected)


@pytest.mark.parametrize(("name", "side"), [*SIDES, *((name, "left") for name in FLASH_MODELS)])
def test_flash_attention_is_explained_as_other_kernels(name: str, side: str) -> None:
    model, inputs = FLASH_MODELS[name](), inputs_of(side)
    expected = everything(model, inputs)
    with running(HUB):
        check_equal(everything(with_kernel(model, HUB), inputs), expected)


@pytest.mark.parametrize("name", FLASH)
def test_kernels_are_wrapped_under_their_own_names(name: str) -> None:
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    with running(name):
        model = with_kernel(models.mistral(), name)
        before = {key: registry[key] for key in registry}
        check_equal(
            everything(model, inputs_of("left")), everything(models.mistral(), inputs_of("left"))
        )
        assert {key: registry[key] for key in registry} == before
        assert model.config._attn_implementation == name
        assert attention_layers(model) == attention_layers(models.mistral())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [HUB, "flex_attention"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral"])
def test_kernels_in_half_precision(name: str, kernel: str, dtype: torch.dtype) -> None:
    if (name, kernel) == ("gpt2", "flex_attention"):
        pytest.skip("transformers does not have flex attention for GPT-2")
    inputs = inputs_of("left")
    expected = ContributionWeights(getattr(models, name)()).attribute(inputs)
    with running(kernel):
        model = with_kernel(getattr(models, name)().to(dtype), kernel)
        found = ContributionWeights(model).attribute(inputs)
        target = TargetContributions(model).attribute(inputs, target=3)
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) < 0.06 * float(y.abs().max())
    assert all(x.isfinite().all() and x.any() for x in target)


@pytest.mark.parametrize("kernel", [HUB, "flex_attention"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("lengths", [False, True])
def test_packed_texts_do_not_see_each_other(name: str, kernel: str, lengths: bool) -> None:
    ids, ends = token_ids(1, 12), torch.tensor([0, 5, 12], dtype=torch.int32)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.cat((torch.arange(5), torch.arange(7)))[None],
        "use_cache": False,
    }
    if lengths and kernel == HUB:
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7}
        inputs |= {"max_length_k": 7}
    model = getattr(models, name)()
    alone = [ContributionWeights(model).attribute(x) for x in ids.split([5, 7], dim=1)]
    with running(kernel):
        model = with_kernel(model, kernel)
        found = ContributionWeights(model).attribute(inputs)
    for x, first, second in zip(found, *alone, strict=True):
        assert torch.allclose(x[..., :5, :5], first, atol=1e-5)
        assert torch.allclose(x[..., 5:, 5:], second, atol=1e-5)
        assert not x[..., 5:, :5].any()


@pytest.mark.parametrize("kernel", [HUB, "flex_attention"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_queries_after_a_cache_are_the_last_tokens(name: str, kernel: str) -> None:
    ids = token_ids(1, 12)
    found = []
    for implementation in ("sdpa", kernel):
        with running(kernel), torch.no_grad():
            model = with_kernel(getattr(models, name)(), implementation)
            cache = transformers.DynamicCache()
            model(ids[:, :7], past_key_values=cache, use_cache=True)
            inputs = {"input_ids": ids[:, 7:], "past_key_values": cache}
            found.append(torch.stack(ContributionWeights(model).attribute(inputs)))
    assert found[0].shape[-2:] == (5, 12)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("kernel", [HUB, "flex_attention"])
def test_removal_lasts_through_generation(kernel: str) -> None:
    inputs, texts = padded_batch("left")[0], []
    for implementation in ("sdpa", kernel):
        with running(kernel), torch.no_grad():
            model = with_kernel(models.llama(), implementation)
            with remove_tokens(model, "contribution", 0.5):
                texts.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert torch.equal(*texts)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend in the way of somebody else: heads in one dimension, no mask, no gradient."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).mT * options["scaling"]
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        a = logits.masked_fill(later, -torch.inf).softmax(-1)
        y = a @ value.repeat_interleave(group, 1)
    return y.transpose(1, 2).flatten(2), None


@pytest.mark.parametrize("name", ["mine", "sdpa_of_mine", "flash-like/mine"])
@pytest.mark.parametrize("mask", [None, sdpa_mask])
def test_registered_kernels_of_any_name(name: str, mask: Any) -> None:
    expected = everything(models.llama(), inputs_of("none"))
    with kernel_registered(name, attend, mask):
        check_equal(everything(with_kernel(models.llama(), name), inputs_of("none")), expected)


def test_a_kernel_that_ignores_the_window_is_read_as_it_is() -> None:
    expected = everything(models.llama(), inputs_of("none"))
    with kernel_registered("mine", attend):
        model = with_kernel(models.llama(), "mine")
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(_with_window, with_kwargs=True)
        check_equal(everything(model, inputs_of("none")), expected)


def _with_window(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "sliding_window": 3}


def test_kernels_that_change_logits_are_refused() -> None:
    def biased(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
        return attend(module, query * torch.linspace(0.5, 2, query.shape[-1]), *rest, **options)

    with kernel_registered("mine", biased):
        model = with_kernel(models.llama(), "mine")
        with pytest.raises(UnsupportedModelError, match="second result"):
            ContributionWeights(model).attribute(token_ids())
        with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation\('sdpa'\)"):
            TargetContributions(model).attribute(token_ids(), target=3)


def test_kernels_that_return_their_weights_are_believed() -> None:
    def flat(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
        options["scaling"] = 0.0
        y, _ = attend(module, query, *rest, **options)
        T = query.shape[2]
        a = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
        return y, a.expand(*query.shape[:2], -1, -1)

    with kernel_registered("mine", flat):
        model = with_kernel(models.llama(), "mine")
        scores = TokenScores(ContributionWeights(model)).attribute(token_ids())
    assert scores.isfinite().all()


def test_pages_of_a_cache_are_refused() -> None:
    with kernel_registered("mine", attend):
        model = with_kernel(models.llama(), "mine")
        inputs = {"input_ids": token_ids(), "block_table": torch.zeros(1, 1)}
        with pytest.raises(UnsupportedModelError, match="continuous batching"):
            ContributionWeights(model).attribute(inputs)


def test_masks_of_other_forms_are_refused() -> None:
    def mask(*args: Any, **options: Any) -> str:
        return "causal"

    with kernel_registered("mine", attend, mask):
        model = with_kernel(models.llama(), "mine")
        with pytest.raises(UnsupportedModelError, match="a mask of type str"):
            ContributionWeights(model).attribute(token_ids())


# ---------------------------------------------------------------------------------------------
# What masks show


def block_mask(mod: Callable[..., Tensor], B: int, H: int | None, T: int, S: int) -> BlockMask:
    return create_block_mask(mod, B, H, T, S, device="cpu", BLOCK_SIZE=16)


def read(mask: Any, T: int, S: int, causal: bool = True, **options: Any) -> Tensor:
    """Return what the likeliest reading of a mask shows, ``(B, H, T, S)``."""
    B = 1 if mask is None else mask.shape[0]
    visible, hides = next(iter(KernelMask(mask, causal, B, T, S, CPU, options).readings()))
    return QueryMask(T, S, visible, causal=hides).block(slice(0, T), CPU)


@pytest.mark.parametrize(
    ("B", "H", "T", "S"), [(1, None, 40, 40), (2, 3, 40, 40), (2, None, 7, 50)]
)
def test_block_masks_show_what_their_function_says(B: int, H: int | None, T: int, S: int) -> None:
    kept = torch.rand(B, S, generator=torch.Generator().manual_seed(0)) > 0.3

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return kept[b][k] & (q + S - T >= k) & (q + h < k + 20)

    seen = read(block_mask(mod, B, H, T, S), T, S).expand(B, H or 1, T, S)
    for b, h, q, k in torch.cartesian_prod(*(torch.arange(n) for n in seen.shape)).tolist():
        assert seen[b, h, q, k] == (kept[b, k] and q + S - T >= k and q + h < k + 20)


def test_causal_block_masks_need_no_tensor() -> None:
    causal = block_mask(lambda b, h, q, k: q >= k, 2, None, 40, 40)
    everything = block_mask(lambda b, h, q, k: q >= 0, 2, None, 40, 40)
    for mask, hides in ((causal, True), (everything, False)):
        assert list(KernelMask(mask, True, 2, 40, 40, CPU, {}).readings()) == [(None, hides)]


def test_block_masks_hide_blocks_that_are_not_listed() -> None:
    number, blocks = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    mask = BlockMask.from_kv_blocks(number, blocks, BLOCK_SIZE=4, seq_lengths=(8, 8))
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[:4, :4] = False
    assert torch.equal(read(mask, 8, 8)[0, 0], expected)


def test_layers_share_the_tensor_of_a_mask() -> None:
    padding = torch.ones(2, 9)
    padding[0, :3] = 0
    first, second = (
        next(iter(KernelMask(padding, True, 2, 9, 9, CPU, {}).readings()))[0] for _ in range(2)
    )
    assert first is second


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("T", "S", "width"), [(9, 9, 9), (4, 9, 9), (3, 12, 9), (1, 9, 9)])
def test_padding_and_windows_show_what_flash_attention_sees(
    T: int, S: int, width: int, window: int | None, causal: bool
) -> None:
    padding = torch.ones(2, width, dtype=torch.long)
    padding[0, :2] = padding[1, -1:] = 0
    if width > T:
        padding[1, -1:] = 1  # flash attention expects padding on the left
    seen = read(padding, T, S, causal, sliding_window=window)
    for b in range(2):
        for t in range(T):
            q = width - T + t
            for k in range(S):
                shown = k < width and bool(padding[b, k])
                shown &= k <= q or not causal or T == 1
                shown &= window is None or abs(q - k) < window
                if padding[b, q]:
                    assert seen[b, 0, t, k] == shown, (b, t, k)


def test_functions_of_single_places_are_evaluated_at_all() -> None:
    table = torch.arange(24).view(2, 3, 4)
    places = (torch.arange(n) for n in (1, 2, 3, 4))
    found = evaluated(lambda b, h, q, k: table[h][q][k], *places)
    assert torch.equal(found, table[None])


def test_flex_attention_is_not_imported_for_other_masks() -> None:
    name = "torch.nn.attention.flex_attention"
    module = sys.modules.get(name)
    try:
        sys.modules.pop(name, None)
        assert KernelMask(None, True, 1, 3, 3, CPU, {}).is_known
        assert name not in sys.modules
    finally:
        if module is not None:
            sys.modules[name] = module
