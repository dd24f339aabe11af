"""The overview of a model's attention layers, from a pass over two tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from captum_cw import ContributionWeights
from captum_cw.models.inspection import attention_layers
from support.models import SIZES, bert, build

SHARED_HEADS: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def test_shared_heads_and_the_projection_are_named(tiny_model: Any) -> None:
    layers = attention_layers(tiny_model)
    assert [layer.name for layer in layers] == ContributionWeights(tiny_model).layers
    for layer in layers:
        assert (layer.heads, layer.key_value_heads, layer.head_size) == (4, 2, 8)
        assert layer.projection == f"{layer.name}.o_proj"
        assert (layer.causal, layer.window) == (True, None)
        assert (layer.gate, layer.rows_below_one) == (False, False)
    tiny_model.model.layers[0].self_attn.sliding_window = 0
    assert attention_layers(tiny_model)[0].window is None


def test_windows_and_learned_sinks_are_reported() -> None:
    transformers = pytest.importorskip(
        "transformers", "5", reason="transformers has this model since 5.0"
    )
    config = transformers.GptOssConfig(
        **SHARED_HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=16
    )
    layers = attention_layers(build(transformers.GptOssForCausalLM, config))
    assert [layer.window for layer in layers] == [16, None]
    assert all(layer.rows_below_one for layer in layers)


def test_a_gate_is_reported() -> None:
    transformers = pytest.importorskip(
        "transformers", "5", reason="transformers has this model since 5.0"
    )
    config = transformers.AfmoeConfig(**SHARED_HEADS, num_dense_layers=1)
    assert all(
        layer.gate for layer in attention_layers(build(transformers.AfmoeForCausalLM, config))
    )


def test_both_directions_and_projections_outside_of_the_module_are_reported() -> None:
    layer, _ = attention_layers(bert())
    assert not layer.causal
    assert layer.projection == "bert.encoder.layer.0.attention.output.dense"


def test_a_projection_in_a_module_of_another_kind_is_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    (layer,) = attention_layers(GPT2LMHeadModel(config).eval())
    assert layer.projection == "transformer.h.0.attn.c_proj"
    (layer,) = attention_layers(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(1, 4, 16)
    )
    assert layer.projection == "self_attn"


def test_the_zero_embedding_of_padding_is_not_used() -> None:
    """Zeros would be the input of many layers, so the output projection could not be found."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(**SHARED_HEADS)).eval()
    assert len(ContributionWeights(model).layers) == 2


def test_a_model_that_reads_no_tokens_asks_for_inputs() -> None:
    with pytest.raises(ValueError, match=r"attention_layers\(model, inputs\)"):
        attention_layers(nn.TransformerEncoderLayer(16, 2, 32))
