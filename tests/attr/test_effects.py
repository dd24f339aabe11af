"""Effect contributions, against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from captum_cw import (
    ContributionWeights,
    EffectContributions,
    LLMTokenAttribution,
    TargetContributions,
    TokenScores,
)
from captum_cw.capture import UnsupportedModelError
from support.inputs import token_ids
from support.models import build, llama
from support.running import short_of_memory
from support.state import check_untouched

Maps = list[Tensor]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: A model without a norm between attention and the residual stream, and one with such a norm.
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    ),
}
TARGET, CONTRAST = 3, 5


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    kind, config = MODELS[request.param]
    return build(kind, config).double()


def padded() -> dict[str, Tensor]:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs_and_gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Maps, Maps]:
    """Return the outputs of the layers and the target's gradients there, by autograd alone."""
    outputs: Maps = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    handles = [layer.self_attn.o_proj.register_forward_hook(keep) for layer in model.model.layers]
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    ends = inputs["attention_mask"].sum(1) - 1
    rows = torch.arange(len(ends))
    (logits[rows, ends, TARGET] - logits[rows, ends, CONTRAST]).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [x.detach() for x in outputs], [x.grad for x in outputs if x.grad is not None]


def check_maps(found: Maps, expected: Maps) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        scale = float(y.abs().max())
        assert scale > 0
        assert x.dtype == torch.float32
        assert torch.allclose(x.double(), y.double(), 0, 1e-5 * scale)


def attribute(model: Any, inputs: Any, **options: Any) -> Maps:
    found: Maps = EffectContributions(model, **options).attribute(
        inputs, target=TARGET, contrast=CONTRAST
    )
    return found


@pytest.mark.parametrize("form", ["effect", "sensitivity"])
def test_shares_are_weighed_by_the_effect_of_the_output(model: Any, form: Any) -> None:
    inputs = padded()
    outputs, gradients = outputs_and_gradients(model, inputs)
    shares = ContributionWeights(model).attribute(inputs)
    expected = []
    for o, g, c in zip(outputs, gradients, shares, strict=True):
        product = (o * g).sum(-1) if form == "effect" else o.norm(dim=-1) * g.norm(dim=-1)
        expected.append(product[:, None, :, None] * c)
    check_maps(attribute(model, inputs, form=form, gradient="plain"), expected)


@pytest.mark.parametrize("form", ["joint", "effect", "sensitivity"])
def test_the_model_is_left_as_it_was(form: Any) -> None:
    check_untouched(llama(), lambda model: EffectContributions(model, form=form))


@pytest.mark.parametrize("gradient", ["frozen", "attnlrp"])
def test_effects_may_be_those_of_the_linearised_model(model: Any, gradient: Any) -> None:
    """The effect of an output is the sum of the target contributions to it."""
    inputs = padded()
    shares = ContributionWeights(model).attribute(inputs)
    targets = TargetContributions(model, attention=gradient).attribute(
        inputs, target=TARGET, contrast=CONTRAST
    )
    effects = [t.sum((1, 3))[:, None, :, None] * c for t, c in zip(targets, shares, strict=True)]
    check_maps(attribute(model, inputs, form="effect", gradient=gradient), effects)
    for options, w in (({}, 0.25), ({"weight": 0.5}, 0.5), ({"weight": 1}, 1)):
        joint = [t.abs() ** w * c.abs() ** (1 - w) for t, c in zip(targets, shares, strict=True)]
        check_maps(attribute(model, inputs, gradient=gradient, **options), joint)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan"), "0.5"])
def test_a_weight_beyond_its_bounds_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight=.* is not a number between 0 and 1"):
        EffectContributions(llama(), weight=weight)


@pytest.mark.parametrize("form", ["joint", "effect", "sensitivity"])
def test_an_example_alone_has_the_scores_that_it_has_in_a_batch(model: Any, form: Any) -> None:
    inputs = padded()
    together = attribute(model, inputs, form=form)
    alone = attribute(model, token_ids()[1:, :-3], form=form)
    T = alone[0].shape[-1]
    for x, y in zip(together, alone, strict=True):
        assert torch.allclose(x[1:, :, :T, :T], y, 0, 1e-5 * float(y.abs().max()))
        assert not x[1, :, T:].any()
        assert not x[1, :, :, T:].any()


@pytest.mark.parametrize("form", ["joint", "effect", "sensitivity"])
def test_token_scores_are_those_of_the_maps(form: Any) -> None:
    model = llama()
    maps = attribute(model, token_ids(), form=form)
    method = EffectContributions(model, form=form)
    scores = TokenScores(method, reduction="sum", layers=None, heads=None).attribute(
        token_ids(), target=TARGET, contrast=CONTRAST
    )
    expected = torch.stack([x.abs().sum(2) for x in maps], 1)
    assert torch.allclose(scores, expected, 1e-4, 1e-6)


@pytest.mark.parametrize("form", ["joint", "effect", "sensitivity"])
def test_blocks_that_run_again_give_the_same_scores(form: Any) -> None:
    model = llama()
    expected = attribute(model, token_ids(), form=form)
    with short_of_memory():
        found = attribute(model, token_ids(), form=form)
    check_maps(found, expected)


def test_chosen_layers_are_those_of_all(model: Any) -> None:
    expected = attribute(model, padded(), form="sensitivity")
    layers = [model.model.layers[n].self_attn for n in (2, 0)]
    found = attribute(model, padded(), layer=layers, form="sensitivity")
    check_maps(found, [expected[2], expected[0]])


def test_half_precision_has_about_the_same_scores() -> None:
    expected = attribute(llama(), token_ids())
    found = attribute(llama().bfloat16(), token_ids())
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.allclose(x, y, 0, 0.1 * float(y.abs().max()))


def test_language_models_take_them(tiny_tokenizer: Any) -> None:
    method = LLMTokenAttribution(EffectContributions(llama()), tiny_tokenizer)
    result = method.attribute("a b c", target=" d")
    ids = tiny_tokenizer("a b c", return_tensors="pt").input_ids
    maps = EffectContributions(llama()).attribute(ids, int(tiny_tokenizer(" d").input_ids[0]))
    assert result.token_attr is not None
    assert torch.allclose(result.token_attr[0], torch.stack(maps).sum((0, 2, 3))[0], 1e-5)


def test_each_form_has_the_gradient_with_which_it_ranks_best() -> None:
    model = llama()
    for form, gradient in (("joint", "attnlrp"), ("effect", "frozen"), ("sensitivity", "plain")):
        found = attribute(model, token_ids(), form=form)
        check_maps(found, attribute(model, token_ids(), form=form, gradient=gradient))


@pytest.mark.parametrize("form", ["joint", "effect", "sensitivity"])
@pytest.mark.parametrize("gradient", ["frozen", "attnlrp", "plain"])
def test_the_first_call_with_a_model_gives_what_later_calls_give(form: Any, gradient: Any) -> None:
    model = llama()
    first = attribute(model, token_ids(), form=form, gradient=gradient)
    check_maps(first, attribute(model, token_ids(), form=form, gradient=gradient))


def test_bad_arguments_are_named() -> None:
    for options in ({"form": "product"}, {"gradient": "exact"}):
        with pytest.raises(ValueError, match=r"product|exact"):
            EffectContributions(llama(), **options)
    with pytest.raises(IndexError, match="out of range"):
        EffectContributions(llama()).attribute(token_ids(), 10_000)


def test_an_unknown_projection_is_refused_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    method = EffectContributions(model, form="sensitivity")
    monkeypatch.setattr("captum_cw.attr.effects.names_of", lambda roots: {})
    with pytest.raises(UnsupportedModelError, match='form="effect"'):
        method.attribute(token_ids(), TARGET)


def shared_blocks() -> Any:
    """A model that runs one block three times."""
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return build(transformers.AlbertForMaskedLM, config).double()


def products_of_lengths(model: Any, inputs: Any, target: Any) -> Maps:
    """Return ``|o| |g|`` of each query of each layer, by autograd alone; ``o`` has no bias."""
    lengths: Maps = []
    gradients: dict[int, Tensor] = {}

    def keep(module: Any, args: Any, output: Tensor) -> None:
        number = len(lengths)
        bias = 0 if module.bias is None else module.bias.detach()
        lengths.append((output.detach() - bias).norm(dim=-1))
        # At once, since autograd may go on to add to the same tensor.
        output.register_hook(lambda g: gradients.update({number: g.norm(dim=-1)}))

    projections = [x for n, x in model.named_modules() if n.endswith(("o_proj", "attention.dense"))]
    handles = [x.register_forward_hook(keep) for x in projections]
    target(model(**inputs)).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [x * gradients.get(n, torch.zeros_like(x)) for n, x in enumerate(lengths)]


@pytest.mark.parametrize("make", [lambda: build(*MODELS["llama"]).double(), shared_blocks])
@pytest.mark.parametrize("form", ["joint", "effect", "sensitivity"])
def test_layers_after_the_target_have_no_effect(make: Any, form: Any) -> None:
    model = make()
    inputs = {"input_ids": token_ids(), "output_hidden_states": True}

    def target(output: Any) -> Tensor:
        return output.hidden_states[2][:, -1, 3]

    found = EffectContributions(model, form=form).attribute(inputs, target)
    kind = "frozen" if form == "effect" else "attnlrp"
    targets = TargetContributions(model, attention=kind).attribute(inputs, target)
    shares = ContributionWeights(model).attribute(inputs)
    lengths = products_of_lengths(model, inputs, target)
    assert len(found) == len(targets) == 3
    for n, (x, t, c) in enumerate(zip(found, targets, shares, strict=True)):
        if n == 2:
            assert not x.any()
            continue
        assert x.any()
        if form == "sensitivity":
            check_maps([x], [lengths[n][:, None, :, None] * c])
        elif form == "effect":
            check_maps([x], [t.sum((1, 3))[:, None, :, None] * c])
        else:
            check_maps([x], [t.abs() ** 0.25 * c.abs() ** 0.75])
