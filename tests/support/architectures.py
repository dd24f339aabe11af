"""A small random model of every type of a group that transformers maps.

A type's default configuration is made anew with small sizes and one layer of each kind. The few
types that need other values stand in ``SPECIAL``, those that cannot be built in ``CANNOT``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

VOCABULARY = 64
RESERVED = 16  # token ids below are for padding, images and the like


def sizes(*groups: tuple[int, str]) -> dict[str, Any]:
    return {name: size for size, names in groups for name in names.split()}


# Given also where the default is None, which often stands for "derived from others".
SIZES: dict[str, Any] = sizes(
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input shape_vocab_size"),
    (VOCABULARY, "pronunciation_vocab_size encoder_hash_byte_group_vocab"),
    (64, "max_position_embeddings n_positions mamba_d_ssm"),
    (32, "hidden_size d_model n_embd emb_dim embedding_size hidden_size_global"),
    (32, "input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim"),
    (48, "intermediate_size ffn_dim d_ff dim_ff dff d_inner ffn_hidden_size mlp_dim"),
    (48, "encoder_ffn_dim decoder_ffn_dim dense_intermediate_size intermediate_size_mlp"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    (4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    (4, "swa_num_attention_heads linear_num_heads linear_num_value_heads"),
    (4, "mamba_n_heads mamba_num_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    (2, "linear_num_key_heads index_n_heads mamba_n_groups n_groups"),
    (2, "num_experts_per_tok moe_topk moe_k no_rope_layer_interval"),
    (1, "n_shared_experts first_k_dense_replace num_dense_layers"),
    (8, "head_dim dim_head d_head kv_channels swa_head_dim qk_rope_head_dim qk_nope_head_dim"),
    (8, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
    (8, "mamba_d_state state_size ssm_state_size"),
    (12, "v_head_dim"),
    (16, "kv_lora_rank index_head_dim mamba_d_head mamba_head_dim"),
) | {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # for experts and others that are linear, but no modules
}

# Given where the default is a number: None says that a model goes without.
LIMITS: dict[str, Any] = sizes(
    (9, "max_source_positions"),
    # Shorter than the inputs, so that they have an effect.
    (4, "sliding_window sliding_window_size attention_window_size window_size"),
    (4, "attention_chunk_size keep_window_size index_topk"),
    (4, "rotary_dim mamba_dt_rank time_step_rank"),
    (8, "local_attention patch_size chunk_size mamba_chunk_size hidden_size_per_layer_input"),
    (8, "num_mel_bins hc_lowrank query_pre_attn_scalar"),
    (1, "n_group topk_group"),
    (2, "index_block_size index_topk_blocks zero_expert_num"),
    (16, "q_lora_rank o_lora_rank image_size moe_intermediate_size expert_ffn_hidden_size"),
    (16, "shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size"),
    (16, "shared_intermediate_size moe_shared_expert_intermediate_size output_channels"),
    (16, "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel"),
)

LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "depth",
)


def kinds(*names: str) -> dict[str, Any]:
    return {"num_hidden_layers": len(names), "layer_types": list(names)}


SHARING = kinds(*["sliding_attention", "full_attention"] * 2) | {"num_kv_shared_layers": 2}
CONVOLVING = kinds("conv", "full_attention")

# By the type of a configuration, or of a part of one.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # the default has no attention layer
    "blt": {"use_cache": False},  # its cache asks for a number of layers that it has not
    "cohere_compass_text": {  # the default has no rotary parameters, which then are asked for
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        }
    },
    "esmc": {"num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # asked for, without defaults
    "deepseek_v4": {  # else longer than the inputs
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "dots3_note_text": {  # the sizes of its sliding layers are no values of their own
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "gemma3n_text": SHARING,
    "gemma4_text": SHARING | {"global_head_dim": 16},  # else 512
    "gemma4_unified_text": SHARING | {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},  # another form of layer kinds
    "granitemoehybrid": kinds("linear_attention", "full_attention"),  # the default: no attention
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},  # layer kinds follow from a period
    "lfm2": CONVOLVING,  # the default has no convolution
    "lfm2_moe": CONVOLVING,
    "mamba2": {"head_dim": 16},  # heads make up twice the width
    "minimax_m3_vl_text": kinds("full_attention", "minimax_m3_sparse"),  # the default: all full
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},  # else beyond
    "qwen4_exp_text": {  # the default has no indexer, which its layers ask for
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},  # a pattern, repeated
    "reformer": {
        "axial_pos_embds": False,  # whose sizes are factors and parts of others
        "attn_layers": ["local", "lsh"],  # one of each, whose number is the number of layers
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,  # else every run hashes anew
    },
    "xlm": {"causal": True},  # the default looks ahead
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},  # its heads' widths are multiples of 64
    "xmod": {"default_language": "en_XX"},  # else the language is an input
    "zamba": {  # the shared layer is shared
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": kinds("hybrid", "hybrid_sliding") | {"sliding_window": 4, "num_experts_per_tok": 1},
}
SPECIAL["zamba2"] = SPECIAL["zamba"]

DRAFTER = "it drafts from the hidden states and keys of a larger model, without token ids"
CANNOT: dict[str, str] = {
    "encoder-decoder": "it is made of two other models",
    "perceiver": "it needs inputs of its own",
    "gemma3n": "it needs timm",
    "gemma4_assistant": DRAFTER,
    "gemma4_unified_assistant": DRAFTER,
}


class CannotBuild(Exception):
    """Says why a type has no small model here."""


GROUPS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": {
        name: kind
        for name, kind in (
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
            | {"whisper": "WhisperForConditionalGeneration"}
        ).items()
        if getattr(transformers.CONFIG_MAPPING[name], "is_encoder_decoder", False)
    },
    "vision": {
        "beit": "BeitForImageClassification",
        "clip": "CLIPModel",
        "data2vec-vision": "Data2VecVisionForImageClassification",
        "deit": "DeiTForImageClassification",
        "dinov2": "Dinov2ForImageClassification",
        "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
        "dinov3_vit": "DINOv3ViTModel",
        "ijepa": "IJepaForImageClassification",
        "metaclip_2": "MetaClip2Model",
        "siglip": "SiglipModel",
        "vit": "ViTForImageClassification",
        "vit_msn": "ViTMSNForImageClassification",
    },
}


def types(group: str) -> list[str]:
    return sorted(GROUPS[group])


def build(model_type: str, group: str = "causal") -> nn.Module:
    if model_type in CANNOT:
        raise CannotBuild(f"{model_type}: {CANNOT[model_type]}")
    name = GROUPS[group][model_type]
    model_kind = getattr(transformers, name if isinstance(name, str) else name[0])
    kind = transformers.CONFIG_MAPPING[model_type]
    if model_kind.config_class in map(type, walk(kind())):
        # Some types name a larger model, of which the causal one is a part.
        kind = model_kind.config_class
    torch.manual_seed(0)
    given = {"is_decoder": True} if group == "causal" else {}
    config = shrink(kind, **given)
    for part in walk(config):
        part._attn_implementation = "eager"  # which lets its weights be seen
    model: nn.Module = model_kind(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                # Larger than the initialisation, so that attention is not nearly uniform.
                module.weight.normal_(0, 0.2)
            elif hasattr(module, "temp"):
                module.temp.fill_(1)  # ZAYA's keys are multiplied by this, which begins at zero
    return model


def inputs(model: nn.Module, group: str = "causal") -> dict[str, Tensor]:
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> Tensor:
        rows = 2
        if config.model_type.startswith("musicgen"):
            rows *= config.num_codebooks  # a text has a row for each of them
        return torch.randint(RESERVED, VOCABULARY, (rows, n), generator=generator)

    made = {}
    if model.main_input_name == "input_features":
        shape = 2, config.num_mel_bins, 2 * config.max_source_positions
        made["input_features"] = torch.randn(shape, generator=generator)
    if "pixel_values" in parameters and group == "vision":
        size = getattr(config, "vision_config", config).image_size
        made["pixel_values"] = torch.randn(2, 3, size, size, generator=generator)
    if "input_ids" in parameters:
        made["input_ids"] = tokens(9)
    if "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = tokens(7)
    return made


def shrink(kind: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """A small configuration of the kind, in which the given values hold.

    All goes through the constructor, which derives many values from others.
    """
    given = SPECIAL.get(kind.model_type, {}) | given
    given = {name: x for name, x in given.items() if name != "is_decoder" or name in known(kind())}
    default = kind()
    values = {} if "num_hidden_layers" in given else layers(default)
    token = SIZES["eos_token_id"]
    for name, value in known(default).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = shrink(type(value), **given.get(name, {}))
        elif name in SIZES:
            values[name] = SIZES[name]
        elif name in LIMITS and isinstance(value, int):
            values[name] = LIMITS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name] = token = token + 1
    if "kv_lora_rank" in values:
        # Each head has a key of its own, made of the latent one.
        values["num_key_value_heads"] = values["num_attention_heads"]
    return kind(**values | given)


def layers(config: PreTrainedConfig) -> dict[str, Any]:
    """The values that keep one layer of each kind, and two at least."""
    values = known(config)
    count = getattr(config, "num_hidden_layers", 2)
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(kind, str) for kind in value)
    }
    kept = sorted({found.index(kind) for found in lists.values() for kind in found})
    if len(kept) < 2:
        kept = [0, 1]
    lists = {name: [found[i] for i in kept] for name, found in lists.items()}
    if values.get("sliding_window") and len(set(lists.get("layer_types", ()))) == 1:
        lists["layer_types"] = ["sliding_attention", "full_attention"]
    return lists | {name: len(kept) for name in LAYERS if name in values}


def known(config: PreTrainedConfig) -> dict[str, Any]:
    """The values that a configuration's constructor takes."""
    # Not by getattr, which refuses values that differ among the layers.
    names = {
        field.name: config.attribute_map.get(field.name, field.name) for field in fields(config)
    }
    return {name: vars(config).get(stored) for name, stored in names.items()}


def walk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and its parts."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from walk(value)
