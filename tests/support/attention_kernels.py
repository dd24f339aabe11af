"""Stand-ins for attention kernels that need a GPU, registered as transformers registers them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor, nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

#: What transformers keeps of the flash attention that it has loaded.
LOADED = [
    *("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn"),
    *("_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"),
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend as flash attention: the queries ``(B, T, H, d)`` are the last of the keys."""
    # A kernel that is compiled shows no torch functions, and has no gradient here.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        H, T, S = q.shape[2], q.shape[1], k.shape[1]
        key, value = (x.repeat_interleave(H // x.shape[2], 2).double() for x in (k, v))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        logits = torch.einsum("bthd,bshd->bhts", q.double(), key) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        back = torch.arange(T)[:, None] + S - T - torch.arange(S)
        before, after = window_size[0], 0 if causal else window_size[1]
        hidden = torch.zeros(T, S, dtype=torch.bool)
        if before >= 0:
            hidden |= back > before
        if after >= 0:
            hidden |= -back > after
        logits = logits.masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            sink = s_aux.double().view(1, H, 1, 1).expand(len(q), H, T, 1)
            logits = torch.cat((logits, sink), -1)
        return torch.einsum("bhts,bshd->bthd", logits.softmax(-1)[..., :S], value).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend within each text of a packed sequence, ``(tokens, H, d)``."""
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
    key_ends = zip(cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, s_aux)
    parts = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], *options)[0]
        for (a, b), (c, d) in zip(ends, key_ends, strict=True)
    ]
    return torch.cat(parts)


@contextmanager
def flash_registered(name: str) -> Iterator[None]:
    """Register a stand-in for flash attention under a name, as transformers registers kernels."""
    if not all(hasattr(flash, attribute) for attribute in LOADED):
        pytest.skip("this release of transformers loads flash attention in another way")
    before = {attribute: getattr(flash, attribute) for attribute in LOADED}
    now = (
        *(name, flash_attn_func, flash_attn_varlen_func, None),
        *(flash._pad_input, flash._unpad_input),
        *(flash._lazy_define_process_function(flash_attn_varlen_func), dict),
    )
    with kernel_registered(name, flash_attention_forward, flash_attention_mask):
        for attribute, x in zip(LOADED, now, strict=True):
            setattr(flash, attribute, x)
        try:
            yield
        finally:
            for attribute, x in before.items():
                setattr(flash, attribute, x)


@contextmanager
def kernel_registered(name: str, kernel: Any, mask: Any = None) -> Iterator[None]:
    """Register a kernel, with or without its own function of masks."""
    registries = [(AttentionInterface._global_mapping, kernel)]
    if mask is not None:
        registries.append((AttentionMaskInterface._global_mapping, mask))
    before = [dict(registry) for registry, _ in registries]
    for registry, x in registries:
        registry[name] = x
    try:
        yield
    finally:
        for (registry, _), old in zip(registries, before, strict=True):
            registry.clear()
            registry.update(old)


def with_kernel(model: nn.Module, name: str) -> nn.Module:
    """Let a model use a registered kernel, without the check that a GPU is there."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name  # type: ignore[union-attr]
    return model
