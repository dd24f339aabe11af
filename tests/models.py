"""Small random models, and their attention, values and ``W_O`` by a second way: eager attention
with ``output_attentions``, and hooks on the modules that make the values."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
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


@dataclass
class Seen:
    """One layer: ``(B, H, T, S)``, ``(B, H_kv, S, d_h)``, ``(H, d_h, d)``."""

    attention: Tensor
    value: Tensor
    output_weight: Tensor


def look(model: nn.Module, **inputs: Tensor) -> list[Seen]:
    """Runs a copy with eager attention and reads what the definitions need.

    The copy stays in float32: in float64, transformers' masks overflow the softmax, which it
    always computes in float32.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    values: list[Tensor] = []
    weights: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "v_proj"):
            module.v_proj.register_forward_hook(lambda m, args, out: values.append(out))
            weights.append(module.o_proj.weight.T)
        elif hasattr(module, "c_attn"):
            module.c_attn.register_forward_hook(
                lambda m, args, out: values.append(out[..., -out.shape[-1] // 3 :])
            )
            weights.append(module.c_proj.weight)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    H = attentions[0].shape[1]
    d_h = weights[0].shape[0] // H
    return [
        Seen(
            a,
            v.unflatten(-1, (-1, d_h)).transpose(1, 2),
            w.detach().unflatten(0, (H, d_h)),
        )
        for a, v, w in zip(attentions, values, weights, strict=True)
    ]


def token_ids(B: int = 2, T: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (B, T), generator=torch.Generator().manual_seed(seed))


def last_tokens_and_cache(
    model: nn.Module, inputs: dict[str, Tensor], positions: Tensor, T: int
) -> dict[str, Any]:
    """What runs the last ``T`` tokens after a cache of those before them."""
    with torch.no_grad():
        cache = model(
            input_ids=inputs["input_ids"][:, :-T],
            attention_mask=inputs["attention_mask"][:, :-T],
            position_ids=positions[:, :-T],
            use_cache=True,
        ).past_key_values
    return {
        "input_ids": inputs["input_ids"][:, -T:],
        "attention_mask": inputs["attention_mask"],
        "past_key_values": cache,
    }


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs ``work(0)``, ``work(1)``, ... at the same time; fails if one of them does."""
    wrong: list[str] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:  # a thread's errors would be lost
            wrong.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
