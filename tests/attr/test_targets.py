"""Contributions to a target: what users may ask, what they get, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import InputContributions, TargetContributions, TokenScores
from captum_cw.capture import UnsupportedModelError, recomputing
from captum_cw.capture.run import Runner
from captum_cw.capture.target_run import TargetRunner
from support.inputs import (
    last_tokens_and_cache,
    letter_tokenizer,
    padded_batch,
    position_ids,
    token_ids,
)
from support.models import bert, build, gpt2, llama, t5
from support.running import run_in_threads, short_of_memory
from support.state import check_untouched, contents_of_module, state_of

Method = Callable[..., Any]
METHODS: dict[str, Method] = {"heads": TargetContributions, "inputs": InputContributions}

SENTENCE = "The capital of France is"


@pytest.fixture
def model() -> Any:
    return llama()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture
def embeddings(model: Any) -> Tensor:
    result: Tensor = model.get_input_embeddings()(token_ids()).detach()
    return result


def same(a: Any, b: Any, atol: float = 0.0) -> bool:
    """Whether two results hold the same numbers."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, 0, atol)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[n], b[n], atol) for n in a)
    return len(a) == len(b) and all(same(x, y, atol) for x, y in zip(a, b, strict=True))


def classifier() -> Any:
    return bert(transformers.BertForSequenceClassification, num_labels=3)


def image_classifier() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_labels": 3}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=4)
    return build(transformers.ViTForImageClassification, config)


def pixels() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------
# Targets


def last_logit(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1, 7]
    return logits


FORMS: dict[str, Any] = {
    "position and token": (8, 7),
    "negative position": (-1, 7),
    "list": [7, 7],
    "mixed list": [7, (-1, 7)],
    "tensor": torch.tensor([7, 7]),
    "tensor of one number": torch.tensor(7),
    "numpy": np.array([7, 7]),
    "numpy number": np.int64(7),
    "callable": last_logit,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_target_may_be_given_in_several_forms(
    form: str, model: Any, method: Method
) -> None:
    expected = method(model).attribute(token_ids(), 7)
    assert same(method(model).attribute(token_ids(), FORMS[form]), expected, 1e-6)


def test_the_target_is_the_models_own_prediction_by_default(model: Any, method: Method) -> None:
    with torch.no_grad():
        predicted = model(token_ids()).logits[:, -1].argmax(-1)
    expected = method(model).attribute(token_ids(), predicted)
    assert same(method(model).attribute(token_ids()), expected)


def test_the_prediction_at_a_position_may_be_asked_for(model: Any, method: Method) -> None:
    with torch.no_grad():
        predicted = model(token_ids()).logits[:, 4].argmax(-1).tolist()
    expected = method(model).attribute(token_ids(), [(4, token) for token in predicted])
    assert same(method(model).attribute(token_ids(), (4, None)), expected)


def test_a_contrast_is_subtracted(model: Any, method: Method) -> None:
    ours, theirs = (method(model).attribute(token_ids(), x) for x in (7, (4, 9)))
    both = method(model).attribute(token_ids(), 7, contrast=(4, 9))
    pairs = zip(ours, theirs, both, strict=True)
    assert all(torch.allclose(a - b, c, 0, 1e-6) for a, b, c in pairs)


@pytest.mark.parametrize("target", [1, [2, 0], torch.tensor([2, 0]), None])
def test_classifiers_have_classes(target: Any, method: Method) -> None:
    found = method(classifier()).attribute(token_ids(), target, return_convergence_delta=True)
    assert float(found[1].abs().max()) < 1e-6


#: Targets that are wrong, their contrast, and the error.
WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (64, None, IndexError, r"target=64 is out of range: the model predicts 0\.\.63"),
    (-1, None, IndexError, "target=-1 is out of range"),
    ((9, 7), None, IndexError, "position 9, but the model predicts 9"),
    ((-10, 7), None, IndexError, "position -10, but example 0 has 9"),
    (7, 64, IndexError, "contrast=64 is out of range"),
    ([7, 8, 9], None, ValueError, "target has 3 entries for 2 examples"),
    ([[7, 8]], None, ValueError, "1 entries for 2 examples"),
    (torch.ones(2, 2).long(), None, TypeError, r"is not a target: give a class"),
    (torch.ones(2), None, TypeError, "target=1.0 is not a target"),
    ("Paris", None, TypeError, "target='Paris' is not a target"),
    (1.5, None, TypeError, "target=1.5 is not a target"),
    (True, None, TypeError, "target=True is not a target"),
    ((1, 2, 3), None, TypeError, "is not a target"),
    (7, 7, ValueError, "contrast=7 is the same as the target"),
    ([7, 8], [9, 8], ValueError, "is the same as the target"),
    (7, (8, 7), ValueError, "is the same as the target"),
    (last_logit, last_logit, ValueError, "is the same as the target"),
    (lambda y: 3.0, None, TypeError, "callable target returned float"),
    (lambda y: y.logits.argmax(-1)[:, -1], None, TypeError, "floating tensor"),
    (lambda y: y.logits, None, ValueError, r"returned shape \(2, 9, 64\)"),
    (lambda y: y.logits.sum(), None, ValueError, r"one number an example, \(2,\)"),
    (lambda y: last_logit(y).detach(), None, ValueError, "without a gradient"),
    (7, lambda y: last_logit(y).round().detach(), ValueError, "callable contrast"),
]


@pytest.mark.parametrize(("target", "contrast", "error", "message"), WRONG)
def test_a_wrong_target_is_refused(
    target: Any, contrast: Any, error: type[Exception], message: str, model: Any, method: Method
) -> None:
    before = state_of(model)
    with pytest.raises(error, match=message):
        method(model).attribute(token_ids(), target, contrast=contrast)
    assert state_of(model) == before


@pytest.mark.parametrize("of", ["frozen", "attnlrp", "plain"])
def test_a_target_that_is_not_finite_is_named(of: Any, model: nn.Module) -> None:
    runner = TargetRunner(Runner(model), of)
    runner.run(token_ids(), target=7)
    with pytest.raises(ValueError, match="gradient of the target is NaN or infinite"):
        runner.run(token_ids(), target=lambda y: (0 * last_logit(y)).sqrt())
    rows = token_ids()
    with torch.no_grad():
        model.get_input_embeddings().weight[rows[1, 3]] = torch.nan  # type: ignore[operator]
    with pytest.raises(ValueError, match="The target of example 1 is nan: check the inputs"):
        runner.run(rows, target=7)


def test_a_class_has_no_position() -> None:
    with pytest.raises(ValueError, match=r"target=\(0, 1\) has a position, but the model predicts"):
        InputContributions(classifier()).attribute(token_ids(), (0, 1))


@pytest.mark.parametrize(("side", "position"), [("left", 1), ("right", 7)])
def test_a_position_at_padding_is_refused(
    side: str, position: int, model: Any, method: Method
) -> None:
    inputs, _ = padded_batch(side)
    with pytest.raises(ValueError, match=rf"position {position}, which is padding in example 1"):
        method(model).attribute(inputs, (position, 7))


def test_a_model_without_logits_is_refused_unless_the_target_is_a_callable(method: Method) -> None:
    model = llama().model
    with pytest.raises(TypeError, match="logits"):
        method(model).attribute(token_ids(), 7)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def probe(output: Any) -> Tensor:
        result: Tensor = output.last_hidden_state[:, -1] @ direction
        return result

    _, delta = method(model).attribute(token_ids(), probe, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-5


def test_generated_ids_have_no_gradient(model: Any) -> None:
    def generated(ids: Tensor) -> Any:
        return model.generate(ids, max_new_tokens=2, do_sample=False)

    for forward in (generated, model.generate):
        with pytest.raises((ValueError, TypeError), match="logits|gradient"):
            InputContributions(forward).attribute(token_ids(), 7)


def test_a_target_of_other_logits_than_the_inputs_is_refused(model: Any) -> None:
    def first_alone(ids: Tensor) -> Any:
        return model(ids[:1])

    with pytest.raises(ValueError, match="logits of 1 examples for 2 inputs"):
        InputContributions(first_alone).attribute(token_ids(), 7)


@pytest.mark.parametrize("name", ["log-probability", "loss", "probability"])
def test_sums_of_a_curved_target_are_its_slope_times_the_logits(name: str, model: Any) -> None:
    targets: dict[str, Callable[[Tensor], Tensor]] = {
        "log-probability": lambda logits: logits.log_softmax(-1)[:, 7],
        "loss": lambda logits: nn.functional.cross_entropy(
            logits, torch.tensor([7, 9]), reduction="none"
        ),
        "probability": lambda logits: logits.softmax(-1)[:, 7],
    }
    target = targets[name]
    with torch.no_grad():
        logits = model(token_ids()).logits[:, -1]
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(target(logits).sum(), logits)
    found = InputContributions(model).attribute(token_ids(), lambda y: target(y.logits[:, -1]))
    # A Llama has no constants.
    assert torch.allclose(found.sum(1), (slope * logits).sum(1), 0, 1e-5)


# ---------------------------------------------------------------------------------------------
# Sums


def test_token_scores_of_a_target_are_sums_of_its_maps(model: Any) -> None:
    inputs, real = padded_batch("left")
    maps = torch.stack(TargetContributions(model).attribute(inputs, 7, contrast=9))
    options: dict[str, Any] = {"reduction": "sum", "layers": "sum", "heads": "sum"}
    for signed in (True, False):
        scores = TokenScores(TargetContributions(model), **options, signed=signed)
        found = scores.attribute(inputs, target=7, contrast=9)
        expected = (maps if signed else maps.abs()).sum((0, 2, 3))
        assert torch.allclose(found, expected, 0, 1e-5)
        assert not found[~real].any()


def test_token_scores_of_a_sentence_name_what_decides(model: Any) -> None:
    tokenizer = letter_tokenizer(SENTENCE, "Paris Rome")
    model.resize_token_embeddings(len(tokenizer))
    model.eval()
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    paris, rome = tokenizer.convert_tokens_to_ids(["Paris", "Rome"])
    scores = TokenScores(TargetContributions(model), reduction="sum")
    found = scores.attribute(inputs, target=paris, contrast=rome)
    opposite = scores.attribute(inputs, target=rome, contrast=paris)
    assert found.shape == (1, 5)
    assert torch.allclose(found, opposite, 0, 1e-6)  # sums of sizes
    assert found.any()
    assert not torch.allclose(found, scores.attribute(inputs, target=paris), 1e-2)


def test_one_layer_and_a_batch_are_what_they_are_alone(model: Any) -> None:
    inputs, real = padded_batch("left")
    maps = TargetContributions(model).attribute(inputs, [7, 9])
    layer = TargetContributions(model, model.model.layers[1].self_attn)
    assert torch.allclose(layer.attribute(inputs, [7, 9]), maps[1], 0, 1e-6)
    alone = TargetContributions(model).attribute(inputs["input_ids"][1:, real[1]], 9)
    for whole, one in zip(maps, alone, strict=True):
        assert torch.allclose(whole[1:, :, 3:, 3:], one, 0, 1e-6)
        assert not whole[1, :, :3].any()
        assert not whole[1, :, :, :3].any()


@pytest.mark.parametrize("attention", ["frozen", "attnlrp"])
def test_both_implementations_of_attention_give_the_same(attention: Any, method: Method) -> None:
    model: Any = gpt2()
    inputs, _ = padded_batch("left")
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(method(model, attention=attention).attribute(inputs, 7))
    assert same(*found, atol=1e-6)


def test_attnlrp_is_another_attribution(model: Any, method: Method) -> None:
    frozen = method(model).attribute(token_ids(), 7)
    assert not same(frozen, method(model, attention="attnlrp").attribute(token_ids(), 7), 1e-3)
    with pytest.raises(ValueError, match=r"attention.*'lrp'"):
        method(model, attention="lrp")


def test_blocks_that_run_again_change_nothing(method: Method) -> None:
    expected = method(gpt2()).attribute(token_ids(), 7, return_convergence_delta=True)
    with short_of_memory():
        found = method(gpt2()).attribute(token_ids(), 7, return_convergence_delta=True)
    assert same(list(found), list(expected), 1e-6)


# ---------------------------------------------------------------------------------------------
# Inputs


def test_shares_of_embeddings_sum_to_those_of_ids(model: Any, embeddings: Tensor) -> None:
    of_ids = InputContributions(model).attribute(token_ids(), 7)
    for inputs in (embeddings, {"inputs_embeds": embeddings}):
        found = InputContributions(model).attribute(inputs, 7)
        assert found.shape == embeddings.shape
        assert torch.allclose(found.sum(-1), of_ids, 0, 1e-6)
    maps = TargetContributions(model).attribute(token_ids(), 7)
    assert same(TargetContributions(model).attribute(embeddings, 7), maps, 1e-6)


def test_scaled_embeddings_are_attributed_where_they_are_given() -> None:
    """The model's inputs are the rows of its table before it scales them."""
    config = transformers.GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = build(transformers.GemmaForCausalLM, config)
    found, delta = InputContributions(model).attribute(
        token_ids(), 7, return_convergence_delta=True
    )
    assert found.shape == (2, 9)
    assert float(delta.abs().max()) < 1e-4


def test_tuples_give_tuples(model: Any, embeddings: Tensor) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    of_ids = InputContributions(model).attribute(token_ids(), 7)
    found = InputContributions(model).attribute((token_ids(), mask), 7)
    assert isinstance(found, tuple)
    assert torch.allclose(found[0], of_ids, 0, 1e-5)  # kernels round differently with a mask
    assert not found[1].any()
    with_mask = InputContributions(model).attribute(token_ids(), 7, mask)
    assert torch.allclose(with_mask, of_ids, 0, 1e-5)

    def forward(x: Tensor, y: Tensor) -> Any:
        return model(inputs_embeds=x + y)

    both = InputContributions(forward).attribute((embeddings, embeddings * 0.5), 7)
    expected = InputContributions(model).attribute(embeddings * 1.5, 7)
    assert torch.allclose(both[0] + both[1], expected, 0, 1e-6)
    assert torch.allclose(both[0], 2 * both[1], 0, 1e-6)


def test_the_same_tensor_twice_is_two_inputs(model: Any, embeddings: Tensor) -> None:
    def forward(x: Tensor, y: Tensor) -> Any:
        return model(inputs_embeds=x + 2 * y)

    method = InputContributions(forward)
    found, delta = method.attribute((embeddings, embeddings), 7, return_convergence_delta=True)
    expected = method.attribute((embeddings, embeddings.clone()), 7)
    assert same(list(found), list(expected), 1e-6)
    assert float(delta.abs().max()) < 1e-5


def test_pixels_have_shares_of_their_shape() -> None:
    model = image_classifier()
    found, delta = InputContributions(model).attribute(pixels(), 1, return_convergence_delta=True)
    assert found.shape == (2, 3, 16, 16)
    assert float(delta.abs().max()) < 1e-5
    maps = TargetContributions(model).attribute(pixels(), [1, 2])
    assert [x.shape for x in maps] == [(2, 4, 17, 17)] * 2


def test_the_tokens_of_encoder_and_decoder_have_shares() -> None:
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(T=7, seed=1)}
    found, delta = InputContributions(t5()).attribute(
        inputs, 7, contrast=9, return_convergence_delta=True
    )
    assert {name: x.shape for name, x in found.items()} == {
        "input_ids": (2, 9),
        "decoder_input_ids": (2, 7),
    }
    assert float(delta.abs().max()) < 1e-5
    kinds = {kind: len(TargetContributions(t5(), kind=kind).attribute(inputs, 7)) for kind in KINDS}
    assert kinds == {"self": 4, "cross": 2, "all": 6}


KINDS: tuple[Any, ...] = ("self", "cross", "all")


def test_sounds_and_tokens_have_shares() -> None:
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=9,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = build(transformers.WhisperForConditionalGeneration, config)
    sounds = torch.randn(2, 8, 18, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": sounds, "decoder_input_ids": token_ids(T=7)}
    found, delta = InputContributions(model).attribute(inputs, 7, return_convergence_delta=True)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in inputs.items()}
    assert found["input_features"].any()
    assert float(delta.abs().max()) < 1e-4


def test_images_and_texts_have_shares() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "num_hidden_layers": 1, "eos_token_id": 2}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = build(transformers.CLIPModel, config)
    inputs = {"input_ids": token_ids(), "pixel_values": pixels()}

    def agreement(output: Any) -> Tensor:
        result: Tensor = output.logits_per_text.diagonal()
        return result

    with pytest.raises(UnsupportedModelError, match="depend on the other examples"):
        InputContributions(model).attribute(inputs, lambda y: y.logits_per_text.sum(1))
    found, delta = InputContributions(model).attribute(
        inputs, agreement, return_convergence_delta=True
    )
    assert all(x.flatten(1).any(1).all() for x in found.values())
    assert float(delta.abs().max()) < 1e-4


def test_other_inputs_alone_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="nothing to attribute the target to"):
        InputContributions(model).attribute({"attention_mask": torch.ones(2, 9).long()}, 7)


# ---------------------------------------------------------------------------------------------
# Convergence


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_shares_and_constants_sum_to_the_target(side: str, method: Method) -> None:
    inputs, _ = padded_batch(side)
    found = method(gpt2()).attribute(inputs, [7, 9], return_convergence_delta=True)
    assert found[1].shape == (2,)
    assert float(found[1].abs().max()) < 1e-5


def test_the_delta_of_given_shares_is_what_they_lack() -> None:
    method = InputContributions(gpt2())
    assert method.has_convergence_delta()
    shares = method.attribute(token_ids(), 7, contrast=9)
    exact = method.compute_convergence_delta(shares, token_ids(), 7, contrast=9)
    assert float(exact.abs().max()) < 1e-5
    halved = method.compute_convergence_delta(shares / 2, token_ids(), 7, contrast=9)
    assert torch.allclose(halved, shares.sum(1) / 2, 0, 1e-5)


def test_the_delta_takes_the_shares_of_several_inputs() -> None:
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(T=7, seed=1)}
    method = InputContributions(t5())
    delta = method.compute_convergence_delta(method.attribute(inputs, 7), inputs, 7)
    assert float(delta.abs().max()) < 1e-5


@pytest.mark.parametrize("attention", ["frozen", "attnlrp"])
def test_a_model_whose_sum_does_not_close_is_refused_by_name(
    method: Method, attention: Any
) -> None:
    class Curved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(x)

    model: Any = llama()
    model.model.layers[1].mlp.act_fn = Curved()
    with pytest.raises(UnsupportedModelError, match=r"'i0', in module 'model.layers.1.mlp.act_fn'"):
        method(model, attention=attention).attribute(token_ids(), 7)


# ---------------------------------------------------------------------------------------------
# The model is left as found


def test_the_model_is_left_as_it_was(method: Method) -> None:
    model: Any = gpt2()
    check_untouched(model, method)
    before = contents_of_module(model, {})
    method(model).attribute(token_ids(), 7, contrast=9, return_convergence_delta=True)
    assert contents_of_module(model, {}) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_model_is_left_as_it_was_after_an_error(method: Method) -> None:
    model: Any = llama()

    def target(output: Any) -> Tensor:
        raise RuntimeError("The target fails.")

    before = contents_of_module(model, {})
    with pytest.raises(RuntimeError, match=r"The target fails\."):
        method(model).attribute(token_ids(), target)
    assert contents_of_module(model, {}) == before


def test_inputs_are_left_as_they_were(model: Any, embeddings: Tensor, method: Method) -> None:
    before = embeddings.clone()
    method(model).attribute(embeddings, 7)
    assert torch.equal(embeddings, before)
    assert not embeddings.requires_grad
    assert embeddings.grad is None
    leaf = embeddings.clone().requires_grad_()
    found = method(model).attribute(leaf, 7)
    assert leaf.grad is None
    assert not any(x.requires_grad for x in found)


def test_training_mode_is_turned_off_and_on_again(method: Method) -> None:
    model: Any = gpt2()
    expected = method(model).attribute(token_ids(), 7)
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        found = method(model).attribute(token_ids(), 7)
    assert model.training
    assert same(found, expected)


def test_a_cache_stays_as_it_was(model: Any) -> None:
    inputs, real = padded_batch("left")
    given = last_tokens_and_cache(model, inputs, position_ids(real), 3)
    before = copy.deepcopy(given["past_key_values"])
    maps = TargetContributions(model).attribute(given, 7)
    whole = TargetContributions(model).attribute(inputs, 7)
    assert given["past_key_values"].get_seq_length() == before.get_seq_length() == 6
    for now, layer in zip(given["past_key_values"].layers, before.layers, strict=True):
        assert torch.equal(now.keys, layer.keys)
        assert torch.equal(now.values, layer.values)
    # The keys of the cache are constants, and their values have shares in the maps.
    for found, expected in zip(maps, whole, strict=True):
        assert torch.allclose(found, expected[:, :, 6:], 0, 1e-6)


@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "inference tensors"])
def test_gradients_of_the_caller_do_not_matter(kind: str, model: Any, method: Method) -> None:
    expected = method(model).attribute(token_ids(), 7)
    with torch.no_grad() if kind == "no_grad" else torch.inference_mode():
        ids = token_ids()
        found = method(model).attribute(ids, 7)
    if kind == "inference tensors":
        found = method(model).attribute(ids, 7)
    assert same(found, expected)


def test_fixed_parameters_do_not_matter(model: Any, method: Method) -> None:
    expected = method(model).attribute(token_ids(), 7)
    model.requires_grad_(False)
    assert same(method(model).attribute(token_ids(), 7), expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_made_in_inference_mode_is_attributed(method: Method) -> None:
    expected = method(llama()).attribute(token_ids(), 7)
    with torch.inference_mode():
        model = llama()
    assert same(method(model).attribute(token_ids(), 7), expected)


def test_threads_do_not_see_each_other(model: Any, method: Method) -> None:
    expected = [method(model).attribute(token_ids(seed=n), 7) for n in range(4)]

    def work(number: int) -> None:
        for _ in range(2):
            found = method(model).attribute(token_ids(seed=number), 7)
            assert same(found, expected[number], 1e-6)

    run_in_threads(4, work)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype: torch.dtype, method: Method) -> None:
    model: Any = llama()
    expected = method(model).attribute(token_ids(), 7)
    found = method(model.to(dtype)).attribute(token_ids(), 7)
    largest = max(float(x.abs().max()) for x in expected)
    assert same([x.float() for x in found], list(expected), 0.1 * largest)
    assert found[0].dtype == torch.float32


def test_autocast_runs(model: Any, method: Method) -> None:
    expected = method(model).attribute(token_ids(), 7)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(model).attribute(token_ids(), 7)
    largest = max(float(x.abs().max()) for x in expected)
    assert same(list(found), list(expected), 0.1 * largest)
    assert not same(list(found), list(expected))


def test_a_compiled_model_runs_as_it_was_written(model: Any, method: Method) -> None:
    expected = method(model).attribute(token_ids(), 7)
    compiled = torch.compile(model)  # it would compile at its first call, but is never called
    assert same(method(compiled).attribute(token_ids(), 7), expected)


def test_the_same_inputs_give_the_same_numbers(model: Any, method: Method) -> None:
    attribution = method(model)
    first = attribution.attribute(token_ids(), 7)
    attribution.attribute(token_ids(seed=1), 9)
    assert same(attribution.attribute(token_ids(), 7), first)


# ---------------------------------------------------------------------------------------------
# Ids, and what only looks like them


class Segments(nn.Module):
    """Adds embeddings of other integers, which are made in the shape of the ids."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.others = nn.Embedding(16, 8), nn.Embedding(16, 8)
        self.head, self.make = nn.Linear(8, 16), make

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.words(input_ids) + self.others(self.make(input_ids))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda ids: ids.new_zeros(ids.shape),
    "expand_as": lambda ids: torch.arange(4).expand_as(ids),
    "to": lambda ids: torch.arange(4).to(ids)[None],
    "type_as": lambda ids: torch.ones(1, 4, dtype=torch.bool).type_as(ids).cumsum(1) - 1,
    "cumsum": lambda ids: torch.ones_like(ids).cumsum(1) - 1,
    "comparison": lambda ids: (ids > 2).long(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_integers_in_the_shape_of_ids_are_no_ids(name: str) -> None:
    torch.manual_seed(0)
    model = Segments(OTHERS[name]).eval()
    for ids in (torch.tensor([[0, 1, 2, 3]]), torch.tensor([[5, 3, 0, 1]])):
        found = InputContributions(model).attribute(ids, 3)
        expected = model.words(ids) @ model.head.weight[3] / 4
        assert torch.allclose(found, expected.detach(), atol=1e-6)


class Changed(nn.Module):
    """Changes the ids before it embeds them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.head, self.change = nn.Embedding(16, 8), nn.Linear(8, 16), change

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(self.change(input_ids)).mean(1))  # type: ignore[no-any-return]


def after(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def change(ids: Tensor) -> Tensor:
        ids = ids.clone()
        write(ids)
        return ids

    return change


def shifted(ids: Tensor) -> Tensor:
    moved = torch.full_like(ids, 7)
    moved[:, 1:] = ids[:, :-1]
    return moved


#: What a model embeds, and the token of each of its rows; -1 for a row of no token.
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "masked by a product": (lambda ids: ids * (ids != 3), [0, -1, 2, 3]),
    "masked": (after(lambda ids: ids.masked_fill_(ids == 3, 0)), [0, -1, 2, 3]),
    "where": (lambda ids: torch.where(ids == 3, torch.full_like(ids, 7), ids), [0, -1, 2, 3]),
    "shifted": (shifted, [-1, 0, 1, 2]),
    "shifted by cat": (
        lambda ids: torch.cat([ids.new_full((1, 1), 7), ids[:, :-1]], 1),
        [-1, 0, 1, 2],
    ),
    "clamped": (lambda ids: ids.clamp(0, 15), [0, 1, 2, 3]),
    "modulo": (lambda ids: ids % 16, [0, 1, 2, 3]),
    "flipped": (lambda ids: ids.flip(1), [3, 2, 1, 0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_ids_are_followed_to_their_embeddings(name: str) -> None:
    change, rows = CHANGES[name]
    torch.manual_seed(0)
    model = Changed(change).eval()
    for ids in (torch.tensor([[0, 3, 5, 9]]), torch.tensor([[9, 3, 0, 5]])):
        found, delta = InputContributions(model).attribute(ids, 3, return_convergence_delta=True)
        terms = (model.words(change(ids)) @ model.head.weight[3] / 4)[0].detach()
        expected = torch.zeros(1, 4)
        for row, token in enumerate(rows):
            if token >= 0:
                expected[0, token] += terms[row]
        assert torch.allclose(found, expected, atol=1e-6)
        assert abs(delta) < 1e-6


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a hash": lambda ids: (ids * 7 + 1) % 16,
    "clamped to others": lambda ids: ids.clamp(max=4),
    "a view is filled": after(lambda ids: ids[:, 2:].fill_(7)),
    "the base of a view is set": lambda ids: (v := (x := ids.clone())[:, 1:], x.fill_(7), v)[2],
    "sorted": lambda ids: ids.sort(1).values,
}

#: Ways to read rows of a table that are no lookups of ids.
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one-hot": lambda table, ids: (ids[..., None] == torch.arange(16)).float() @ table,
    "gather": lambda table, ids: table[:, 0].gather(0, ids[0])[None, :, None].expand(1, 4, 8),
    "take": lambda table, ids: torch.take(table, ids)[..., None].expand(1, 4, 8),
    "numbers": lambda table, ids: ids.float()[..., None] * table[0],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_read_in_another_way_are_refused(name: str) -> None:
    class Two(Segments):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.words(input_ids) + ROWS[name](self.others.weight, input_ids)
            return self.head(x.mean(1))  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedModelError, match="changes the ids"):
        InputContributions(Two(torch.zeros_like)).attribute(torch.tensor([[0, 3, 5, 9]]), 3)


@pytest.mark.parametrize("name", UNKNOWN)
def test_ids_that_are_changed_into_others_are_refused(name: str) -> None:
    model = Changed(UNKNOWN[name]).eval()
    for ids in (torch.tensor([[0, 3, 5, 9]]), torch.tensor([[9, 3, 0, 5]])):
        with pytest.raises(UnsupportedModelError, match="changes the ids"):
            InputContributions(model).attribute(ids, 3)


def test_a_table_of_numbers_is_an_embedding_too() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.arange(16.0))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.bias[input_ids].sum(1, keepdim=True)

    ids = torch.tensor([[3, 5]])
    assert InputContributions(Bias()).attribute(ids, 0).tolist() == [[3.0, 5.0]]


# ---------------------------------------------------------------------------------------------
# Outputs of other shapes, and models that end in a gate


class Ending(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(6, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layer(x))


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "log_softmax": lambda z: torch.log_softmax(z, -1),
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
}


@pytest.mark.parametrize("name", ENDS)
def test_a_gate_at_the_end_of_a_model_has_its_ordinary_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, x = Ending(ENDS[name]).eval(), torch.randn(2, 6)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    found, delta = InputContributions(model).attribute(x, 1, return_convergence_delta=True)
    assert torch.allclose(found, x * gradient, atol=1e-6)
    assert torch.allclose(delta, torch.zeros(2), atol=1e-6)


def test_probabilities_that_are_changed_afterwards_are_refused() -> None:
    def doubled(z: Tensor) -> Tensor:
        return z.softmax(-1).mul_(2)

    def of_others(z: Tensor) -> Tensor:
        found = z.softmax(-1)
        z.mul_(2)
        return found

    for end in (doubled, of_others):
        with pytest.raises(ValueError, match="a part of it, does not depend"):
            InputContributions(Ending(end).eval()).attribute(torch.randn(2, 6), 1)


def test_a_target_of_two_probabilities_is_refused() -> None:
    """Only the last of them would have a gradient."""
    model = Ending(lambda z: (z.softmax(-1), z.sigmoid())).eval()  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="a part of it, does not depend"):
        InputContributions(model).attribute(torch.randn(2, 6), lambda y: y[0][:, 1] + y[1][:, 0])


def test_one_probability_an_example_needs_no_target() -> None:
    torch.manual_seed(0)
    model, x = Ending(lambda z: z[:, :1].sigmoid().squeeze(1)).eval(), torch.randn(2, 6)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert torch.allclose(InputContributions(model).attribute(x), x * gradient, atol=1e-6)
    with pytest.raises(ValueError, match="leave target out"):
        InputContributions(model).attribute(x, 0)


def test_a_gate_inside_of_a_model_is_held_fixed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    with pytest.raises(ValueError, match="sigmoid.*held fixed"):
        InputContributions(model).attribute(torch.randn(1, 6), 1)


def test_a_pixel_of_a_segmentation_is_a_tuple() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3, padding=1).eval(), torch.randn(2, 3, 5, 5)
    for target in ((1, 2, 3), [(1, 2, 3), (0, 4, 4)]):
        found, delta = InputContributions(model).attribute(x, target, return_convergence_delta=True)
        places = target if isinstance(target, list) else [target] * 2
        leaf = x.clone().requires_grad_()
        chosen = torch.stack([y[place] for y, place in zip(model(leaf), places, strict=True)])
        (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
        assert torch.allclose(found, x * gradient, atol=1e-6)
        assert delta.abs().max() < 1e-5
    for wrong, error in (((1, 2), TypeError), ((1, 2, 9), IndexError), ([(1, 2, 3)], ValueError)):
        with pytest.raises(error, match="target"):
            InputContributions(model).attribute(x, wrong)


# ---------------------------------------------------------------------------------------------
# The same object again, padding of PyTorch's layers, and blocks that write into their inputs


def test_examples_that_depend_on_each_other_are_refused_after_a_single_one() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - 0.5 * x.mean(0))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    attribution = InputContributions(Mixed().eval())
    attribution.attribute(torch.randn(1, 6), 1)
    with pytest.raises(UnsupportedModelError, match="depend on the other examples"):
        attribution.attribute(torch.randn(2, 6), 1)


def test_what_one_token_looks_like_says_nothing_of_a_text() -> None:
    """A mean over tokens changes nothing in a text of one token."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), Mean(), nn.Flatten(2), nn.Linear(8, 16)).eval()
    attribution = InputContributions(model)
    attribution.attribute(torch.tensor([[3]]), 1)
    ids = torch.tensor([[3, 5, 7]])
    expected = model[0](ids) @ model[3].weight[1] / 3
    assert torch.allclose(attribution.attribute(ids, 1), expected.detach(), atol=1e-6)


def test_padding_of_a_pytorch_encoder_is_left_out() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.words, self.encoder = nn.Embedding(16, 8), nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
            x = self.encoder(self.words(ids), src_key_padding_mask=hidden)
            return self.head(x[:, 0])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, ids = Encoder().eval(), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    hidden = ids == 0
    found = InputContributions(model).attribute(ids, 1, hidden)
    alone = InputContributions(model).attribute(ids[1:, :2], 1, hidden[1:, :2])
    assert torch.allclose(found[1:, :2], alone, atol=1e-5)
    assert not found[1, 2:].any()


@pytest.mark.parametrize("is_short", [False, True])
def test_a_block_may_write_into_its_input(is_short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            x += self.down(nn.functional.gelu(self.up(self.norm(x))))
            return x

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, ids = Blocks().eval(), torch.tensor([[1, 2, 3]])
    expected = InputContributions(model).attribute(ids, 3)
    if is_short:
        monkeypatch.setattr(recomputing, "SHARE", 0.0)
    found, delta = InputContributions(model).attribute(ids, 3, return_convergence_delta=True)
    assert torch.allclose(found, expected, atol=1e-6)
    assert abs(delta) < 1e-5


def test_the_last_frame_of_a_padded_sound_is_unknown() -> None:
    """The mask counts samples, but the model predicts at frames."""
    config = transformers.Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_kernel=[10, 4],
        conv_stride=[5, 2],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    )
    model = build(transformers.Wav2Vec2ForCTC, config)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 200:] = 0
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)) * mask
    given = {"input_values": sound, "attention_mask": mask}
    for target in (5, (-1, 5), [5, (-1, 3)]):
        with pytest.raises(ValueError, match="example 1 has padding.*last position is unknown"):
            InputContributions(model).attribute(given, target)
    found, delta = InputContributions(model).attribute(given, (3, 5), return_convergence_delta=True)
    assert found.shape == sound.shape
    assert delta.abs().max() < 1e-3
    assert InputContributions(model).attribute(sound, 5).shape == sound.shape


def test_a_target_in_a_list_of_one_is_for_all_examples() -> None:
    model = llama()
    expected = InputContributions(model).attribute(token_ids(), 7)
    for target in (torch.tensor([7]), np.array([7]), (7,)):
        assert torch.equal(InputContributions(model).attribute(token_ids(), target), expected)


def test_the_delta_of_maps_is_that_of_inputs() -> None:
    method = TargetContributions(llama())
    maps, expected = method.attribute(token_ids(), 7, return_convergence_delta=True)
    delta = method.compute_convergence_delta(maps, token_ids(), 7)
    # Two runs may differ in the last bits, and a delta is made of last bits.
    assert torch.allclose(delta, expected, rtol=0, atol=1e-6)
