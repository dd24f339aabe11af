"""Small models with seeded random weights, each the same whenever it is made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(num_key_value_heads: int = 2, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=num_key_value_heads, **options)
    return build(transformers.LlamaForCausalLM, config)


def mistral() -> nn.Module:
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3)
    return build(transformers.MistralForCausalLM, config)


def qwen2() -> nn.Module:
    """Has biases on query, key and value."""
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    return build(transformers.Qwen2ForCausalLM, config)


def gpt2() -> nn.Module:
    """Has Conv1D layers, an output bias and learned positions."""
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return build(transformers.GPT2LMHeadModel, config)


def build(kind: type[nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                # Larger than the initialisation, so that attention is not nearly uniform.
                p.normal_(0, 0.2)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-4-heads": lambda: llama(4),
    "llama-2-of-4-heads": lambda: llama(2),
    "llama-1-of-4-heads": lambda: llama(1),
    "llama-biased": lambda: llama(2, attention_bias=True),
    "mistral-sliding": mistral,
    "qwen2": qwen2,
    "gpt2": gpt2,
}


def gptj() -> nn.Module:
    """Its table of positions holds sines and cosines."""
    config = transformers.GPTJConfig(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build(transformers.GPTJForCausalLM, config)


def bert(kind: type[nn.Module] = transformers.BertForMaskedLM, **options: Any) -> nn.Module:
    """Sees in both directions."""
    return build(kind, transformers.BertConfig(**{**SIZES, **options}))


def bart(**options: Any) -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        **options,
    )
    return build(transformers.BartForConditionalGeneration, config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return build(transformers.T5ForConditionalGeneration, config)


def with_gains(model: nn.Module) -> nn.Module:
    """Norms with gains far from one, so that leaving them out is seen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "ln_" in name:
                p.normal_(0.5, 0.5)
    return model


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_implementation="eager",  # where SDPA is possible, it leaves out the soft-cap
    )
    return with_gains(build(transformers.Gemma2ForCausalLM, config))


def gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return with_gains(build(transformers.Gemma3ForCausalLM, config))


def jamba() -> nn.Module:
    """A state-space layer, and a layer with attention and experts."""
    config = transformers.JambaConfig(
        **SIZES,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    return build(transformers.JambaForCausalLM, config)


def olmo2() -> nn.Module:
    config = transformers.Olmo2Config(**SIZES, num_key_value_heads=2)
    return with_gains(build(transformers.Olmo2ForCausalLM, config))


def gemma2_with_layer_norm() -> nn.Module:
    """Its norm after attention takes off the mean, and adds a bias."""
    model: Any = gemma2()
    torch.manual_seed(1)
    for layer in model.model.layers:
        norm = nn.LayerNorm(32)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        layer.post_attention_layernorm = norm
    return model.eval()  # type: ignore[no-any-return]


def afmoe() -> nn.Module:
    """Has a gate of each feature, and a norm after the projection."""
    if not hasattr(transformers, "AfmoeConfig"):
        pytest.skip("transformers has AFMoE since 5.0")
    config = transformers.AfmoeConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        layer_types=["full_attention", "full_attention"],
    )
    return build(transformers.AfmoeForCausalLM, config)


def bitnet() -> nn.Module:
    """A norm before the projection."""
    config = transformers.BitNetConfig(**SIZES, num_key_value_heads=2)
    model = build(transformers.BitNetForCausalLM, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attn_sub_norm" in name:
                p.normal_(0.5, 0.5)
    return model


class HeadGate(nn.Module):
    """One factor a head, after the heads are side by side."""

    def __init__(self, o_proj: nn.Linear, gate: nn.Module) -> None:
        super().__init__()
        self.o_proj, self.gate = o_proj, gate
        self.hidden: Tensor = torch.empty(0)

    def forward(self, y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (4, -1)) * self.gate(self.hidden).sigmoid()[..., None]
        return self.o_proj(heads.flatten(2))  # type: ignore[no-any-return]


class NormBeforeProjection(HeadGate):
    """PyTorch's own norm before the projection."""

    def forward(self, y: Tensor) -> Tensor:
        return self.o_proj(self.gate(y))  # type: ignore[no-any-return]


def rms_normed() -> nn.Module:
    """A fused norm before the projection."""
    model: Any = llama()
    torch.manual_seed(3)
    for layer in model.model.layers:
        norm = nn.RMSNorm(32, eps=1e-6)
        nn.init.normal_(norm.weight)
        layer.self_attn.o_proj = NormBeforeProjection(layer.self_attn.o_proj, norm)
    return model.eval()  # type: ignore[no-any-return]


def _keep_hidden_states(attention: Any, args: object, kwargs: dict[str, Tensor]) -> None:
    attention.o_proj.hidden = kwargs["hidden_states"]


def head_gated() -> nn.Module:
    """A gate of each head."""
    model: Any = llama()
    torch.manual_seed(2)
    for layer in model.model.layers:
        layer.self_attn.o_proj = HeadGate(layer.self_attn.o_proj, nn.Linear(32, 4))
        layer.self_attn.register_forward_pre_hook(_keep_hidden_states, with_kwargs=True)
    return model.eval()  # type: ignore[no-any-return]


GATED_MODELS: dict[str, Callable[[], Any]] = {
    "afmoe": afmoe,
    "bitnet": bitnet,
    "head-gated": head_gated,
    "rms-norm": rms_normed,
}


def with_bare_projections(model: Any) -> Any:
    """A copy in which ``o_proj`` is the linear layer again: what ``eager_layers`` reads."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if isinstance(layer.self_attn.o_proj, HeadGate):
            layer.self_attn.o_proj.weight = layer.self_attn.o_proj.o_proj.weight
    return model


#: How peft learns virtual tokens, and how many of them stand before a text.
VIRTUAL_KINDS = ("prompt", "p", "prefix")
VIRTUAL_COUNT = 3


def with_virtual_tokens(kind: str) -> Any:
    """A Llama that has learned virtual tokens, with random numbers."""
    import peft

    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL_COUNT}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**options),
        "p": lambda: peft.PromptEncoderConfig(**options, encoder_hidden_size=16),
        "prefix": lambda: peft.PrefixTuningConfig(**options),
    }[kind]()
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "prompt_encoder" in name:
                p.normal_(0, 0.5)
    return model


#: Attention implementations of transformers whose results are compared.
IMPLEMENTATIONS = ("sdpa", "eager")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a Llama or GPT-2 that hold an attention call."""
    return [m for m in model.modules() if hasattr(m, "o_proj") or hasattr(m, "c_attn")]
