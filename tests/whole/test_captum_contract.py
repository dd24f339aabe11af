"""Our classes run through Captum itself."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import Any

import matplotlib

from support.inputs import token_ids
from support.measures import MEASURES
from support.models import build, llama

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers
from captum.attr import (
    Attribution,
    FeatureAblation,
    InputXGradient,
    LayerAttribution,
    LLMAttributionResult,
    NoiseTunnel,
    TextTokenInput,
)
from captum.attr import visualization as captum_visualization
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import Tensor, nn

import captum_cw
from captum_cw import (
    ContributionWeights,
    InputContributions,
    LLMTokenAttribution,
    TargetContributions,
    TokenScores,
)
from captum_cw.visualization import text_records


@pytest.fixture
def model() -> nn.Module:
    return llama()


@pytest.fixture
def embeddings(model: nn.Module) -> Tensor:
    result: Tensor = model.get_input_embeddings()(token_ids()).detach()
    return result


@pytest.mark.parametrize("measure", MEASURES.values())
def test_measures_are_layer_attributions(measure: Any, model: nn.Module) -> None:
    method = measure(model)
    assert isinstance(method, LayerAttribution)
    assert method.get_name() == measure.__name__
    assert method.has_convergence_delta() == (measure is ContributionWeights)
    # As in every Captum class, the model, the layer and the devices come first.
    parameters = list(inspect.signature(measure).parameters)
    assert parameters[:3] == ["forward_func", "layer", "device_ids"]


@pytest.mark.parametrize("method", [TargetContributions, InputContributions])
def test_targets_are_captums_attributions(method: Any, model: nn.Module) -> None:
    attribution = method(model)
    kind = LayerAttribution if method is TargetContributions else Attribution
    assert isinstance(attribution, kind)
    assert attribution.get_name() == method.__name__
    assert attribution.has_convergence_delta()
    first = ["forward_func", "layer", "device_ids"][: 3 if kind is LayerAttribution else 1]
    assert list(inspect.signature(method).parameters)[: len(first)] == first
    # As in Captum's own classes, the target comes before further arguments of the model.
    arguments = list(inspect.signature(method.attribute).parameters)
    assert arguments[1:4] == ["inputs", "target", "additional_forward_args"]


#: Targets of two examples, for outputs (B, classes) and (B, T, classes).
CAPTUMS_TARGETS: dict[str, tuple[Any, int]] = {
    "number": (1, 2),
    "list": ([1, 2], 2),
    "tensor": (torch.tensor([1, 2]), 2),
    "tensor of one number": (torch.tensor(1), 2),
    "tuple": ((2, 1), 3),
    "tuple from the end": ((-1, 1), 3),
    "list of tuples": ([(0, 1), (2, 3)], 3),
}


@pytest.mark.parametrize("form", CAPTUMS_TARGETS)
@pytest.mark.parametrize("method", [InputXGradient, FeatureAblation])
def test_targets_are_chosen_as_captum_chooses_them(method: Any, form: str) -> None:
    """Of a linear model, all three methods give the same."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 5, bias=False).eval()
    target, dimensions = CAPTUMS_TARGETS[form]
    x = torch.randn(2, *[3] * (dimensions - 2), 4, requires_grad=True)
    expected = method(linear).attribute(x, target=target)
    assert expected.any()
    found = InputContributions(linear).attribute(x, target)
    assert torch.allclose(found, expected, atol=1e-6)


def test_without_a_target_the_models_prediction_is_meant(
    model: nn.Module, embeddings: Tensor
) -> None:
    """Captum would take the whole output."""
    with torch.no_grad():
        best = model(inputs_embeds=embeddings).logits[:, -1].argmax(-1)
    method = InputContributions(model)
    assert torch.equal(method.attribute(embeddings, None), method.attribute(embeddings, best))


@pytest.mark.parametrize("measure", MEASURES.values())
def test_noise_tunnel_runs_a_layer(measure: Any, model: nn.Module, embeddings: Tensor) -> None:
    method = measure(model, model.model.layers[1].self_attn)
    torch.manual_seed(0)
    smooth = NoiseTunnel(method).attribute(embeddings, nt_samples=4, stdevs=0.01)
    assert smooth.shape == (2, 4, 9, 9)
    plain = method.attribute(embeddings)
    assert torch.allclose(smooth, plain, rtol=0.3, atol=0.1 * float(plain.abs().max()))
    assert not torch.equal(smooth, plain)
    still = NoiseTunnel(method).attribute(embeddings, nt_samples=3, stdevs=0.0)
    assert torch.allclose(still, plain, atol=1e-5)


def test_noise_tunnel_passes_the_mask_and_gives_the_delta(
    model: nn.Module, embeddings: Tensor
) -> None:
    method = ContributionWeights(model, model.model.layers[0].self_attn)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    smooth, delta = NoiseTunnel(method).attribute(
        embeddings,
        nt_samples=2,
        stdevs=0.0,
        additional_forward_args=mask,
        return_convergence_delta=True,
    )
    assert torch.allclose(smooth, method.attribute(embeddings, mask), atol=1e-5)
    assert delta.shape == (4, 9)
    assert delta.abs().max() < 1e-4


def test_noise_tunnel_runs_token_scores(model: nn.Module, embeddings: Tensor) -> None:
    scores = TokenScores(ContributionWeights(model))
    smooth = NoiseTunnel(scores).attribute(embeddings, nt_samples=4, stdevs=0.0)
    assert torch.allclose(smooth, scores.attribute(embeddings), atol=1e-5)


@pytest.mark.parametrize("name", ["maps", "inputs", "scores"])
@pytest.mark.parametrize("target", [7, [7, 9], torch.tensor([7, 9]), (4, 7), [(4, 7), (-1, 9)]])
def test_noise_tunnel_runs_targets(
    name: str, target: Any, model: nn.Module, embeddings: Tensor
) -> None:
    method: Any = {
        "maps": TargetContributions(model, model.model.layers[0].self_attn),
        "inputs": InputContributions(model),
        "scores": TokenScores(TargetContributions(model), reduction="sum", signed=True),
    }[name]
    plain = method.attribute(embeddings, target=target, contrast=11)
    asked = {"target": target, "contrast": 11}  # one number, since Captum repeats targets alone
    still = NoiseTunnel(method).attribute(embeddings, nt_samples=3, stdevs=0.0, **asked)
    assert torch.allclose(still, plain, atol=1e-5)
    torch.manual_seed(0)
    smooth = NoiseTunnel(method).attribute(embeddings, nt_samples=4, stdevs=0.01, **asked)
    assert not torch.allclose(smooth, plain, atol=1e-5)
    assert torch.allclose(smooth, plain, atol=0.5 * float(plain.abs().max()))


@pytest.mark.parametrize("method", [TargetContributions, InputContributions])
def test_noise_tunnel_gives_the_delta_of_targets(
    method: Any, model: nn.Module, embeddings: Tensor
) -> None:
    layer = [model.model.layers[0].self_attn] if method is TargetContributions else []
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options: dict[str, Any] = {"target": [7, 9], "additional_forward_args": mask}
    smooth, delta = NoiseTunnel(method(model, *layer)).attribute(
        embeddings, nt_samples=2, stdevs=0.0, return_convergence_delta=True, **options
    )
    assert torch.allclose(smooth, method(model, *layer).attribute(embeddings, **options), atol=1e-5)
    assert delta.shape == (4,)
    assert delta.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["smoothgrad_sq", "vargrad"])
def test_noise_tunnel_squares_shares(kind: str, model: nn.Module, embeddings: Tensor) -> None:
    method = InputContributions(model)
    tunnel: Any = NoiseTunnel(method)
    found = tunnel.attribute(embeddings, nt_type=kind, nt_samples=2, stdevs=0.0, target=7)
    plain = method.attribute(embeddings, 7)
    expected = plain**2 if kind == "smoothgrad_sq" else torch.zeros_like(plain)
    assert torch.allclose(found, expected, atol=1e-6)


def test_noise_tunnel_refuses_ids(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="float32 tensor of shape.*embeddings"):
        NoiseTunnel(TokenScores(ContributionWeights(model))).attribute(token_ids())


def test_infidelity_takes_the_scores(model: nn.Module, embeddings: Tensor) -> None:
    def loss(x: Tensor) -> Tensor:
        result: Tensor = model(inputs_embeds=x).logits.log_softmax(-1)[:, -1].amax(-1)
        return result

    def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return noise, x - noise

    scores = TokenScores(ContributionWeights(model)).attribute(embeddings)
    value = infidelity(loss, perturb, embeddings, scores[..., None].expand_as(embeddings))
    assert value.shape == (2,)
    assert value.isfinite().all()
    assert (value > 0).all()


def test_infidelity_of_a_linear_model_is_zero() -> None:
    """Shares are products with the inputs, as Captum's ``infidelity`` expects of such methods."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 3).eval()
    x = torch.rand(2, 6) + 0.5

    @infidelity_perturb_func_decorator(multiply_by_inputs=True)
    def perturb(x: Tensor) -> Tensor:
        return x - 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    shares = InputContributions(linear).attribute(x, [1, 2])
    assert infidelity(linear, perturb, x, shares, target=[1, 2]).abs().max() < 1e-10
    assert infidelity(linear, perturb, x, -shares, target=[1, 2]).min() > 1e-3


def test_infidelity_takes_shares(model: nn.Module, embeddings: Tensor) -> None:
    def logits(x: Tensor) -> Tensor:
        result: Tensor = model(inputs_embeds=x).logits[:, -1]
        return result

    @infidelity_perturb_func_decorator(multiply_by_inputs=True)
    def perturb(x: Tensor) -> Tensor:
        return x - 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    shares = InputContributions(model).attribute(embeddings, [7, 9])
    right = infidelity(logits, perturb, embeddings, shares, target=[7, 9])
    assert right.shape == (2,)
    assert (right > 0).all()
    assert (infidelity(logits, perturb, embeddings, -shares, target=[7, 9]) > right).all()


@pytest.mark.parametrize("target", [7, [7, 9], torch.tensor([7, 9]), (4, 7)])
def test_sensitivity_runs_targets(target: Any, model: nn.Module, embeddings: Tensor) -> None:
    for method in (
        InputContributions(model),
        TargetContributions(model, model.model.layers[0].self_attn),
        TokenScores(TargetContributions(model), reduction="sum", signed=True),
    ):
        explain: Any = method.attribute
        still = sensitivity_max(explain, embeddings, perturb_radius=0.0, target=target)
        moved = sensitivity_max(explain, embeddings, perturb_radius=0.02, target=target)
        assert still.shape == (2,)
        assert still.abs().max() < 1e-4
        assert (moved > still).all()
        assert moved.isfinite().all()


def test_sensitivity_runs_the_explanation(model: nn.Module, embeddings: Tensor) -> None:
    for method in (
        TokenScores(ContributionWeights(model)),
        ContributionWeights(model, model.model.layers[0].self_attn),
    ):
        still = sensitivity_max(method.attribute, embeddings, perturb_radius=0.0)
        moved = sensitivity_max(method.attribute, embeddings, perturb_radius=0.05)
        assert still.shape == (2,)
        assert still.abs().max() < 1e-4
        assert (moved > still).all()
        assert moved.isfinite().all()


def test_visualize_text_shows_the_scores(model: nn.Module) -> None:
    scores = TokenScores(ContributionWeights(model)).attribute(token_ids())[0]
    words = [f"word{i}" for i in range(9)]
    page = captum_visualization.visualize_text(text_records({"Contribution": scores}, words)).data
    assert all(word in page for word in words)
    assert "Contribution" in page


def test_visualize_text_shows_signed_scores_of_a_target(model: nn.Module) -> None:
    summed = TokenScores(TargetContributions(model), reduction="sum", signed=True)
    scores = {
        "values": summed.attribute(token_ids(), target=7, contrast=9)[0],
        "inputs": InputContributions(model).attribute(token_ids(), 7, contrast=9)[0],
    }
    words = [f"word{i}" for i in range(9)]
    records = text_records(scores, words, target="7", predicted="9", probability=0.25)
    for record, (name, given) in zip(records, scores.items(), strict=True):
        assert (given > 0).any()
        assert (given < 0).any()
        assert record.attr_class == name
        assert record.attr_score == pytest.approx(float(given.double().sum()), abs=1e-9)
        assert torch.allclose(record.word_attributions, given / given.abs().max(), atol=1e-6)
        assert record.raw_input_ids == words
    page = captum_visualization.visualize_text(records).data
    # Captum draws positive words in green (hue 120) and negative ones in red (hue 0).
    mark = r"hsl\((\d+), 75%, (\d+)%\)[^>]*><font[^>]*> (word\d+) "
    shown = re.findall(mark, page)
    assert [word for *_, word in shown] == words * 2
    sizes = [float(x) for record in records for x in record.word_attributions]
    for (hue, lightness, _), size in zip(shown, sizes, strict=True):
        assert int(hue) == (120 if size > 0 else 0)
        assert int(lightness) == 100 - int(max(50 * size, -40 * size))


@pytest.mark.parametrize("sign", ["all", "positive", "negative", "absolute_value"])
def test_visualize_image_attr_shows_the_shares_of_pixels(sign: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_labels": 3}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=8, patch_size=4)
    vit = build(transformers.ViTForImageClassification, config)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shares = InputContributions(vit).attribute(images, 1, contrast=0)
    assert shares.shape == images.shape
    figure, axes = captum_visualization.visualize_image_attr(
        shares[0].permute(1, 2, 0).numpy(),
        images[0].permute(1, 2, 0).numpy(),
        method="heat_map",
        sign=sign,
        outlier_perc=0,
        use_pyplot=False,
    )
    figure.canvas.draw()
    by_pixel = shares[0].sum(0)
    expected = {
        "all": by_pixel,
        "positive": by_pixel.clamp(min=0),
        "negative": -by_pixel.clamp(max=0),
        "absolute_value": by_pixel.abs(),
    }[sign]
    shown = np.asarray(axes.images[0].get_array())
    assert np.allclose(shown, (expected / expected.abs().max()).numpy(), atol=1e-6)
    assert expected.count_nonzero() > 10


@pytest.fixture
def language_model(tiny_model: nn.Module, tiny_tokenizer: Any) -> tuple[nn.Module, Any]:
    return tiny_model, tiny_tokenizer


def test_llm_attribution_gives_captums_result_and_its_plots(
    language_model: tuple[nn.Module, Any],
) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(ContributionWeights(model), tokenizer)
    result = llm.attribute("a b c d", target="e f g")
    assert isinstance(result, LLMAttributionResult)
    assert result.input_tokens == [" a", " b", " c", " d"]
    assert result.output_tokens == [" e", " f", " g"]
    assert result.token_attr is not None
    assert result.token_attr.shape == (3, 4)
    assert torch.allclose(result.seq_attr, result.token_attr.mean(0))
    for figure, _ in (result.plot_token_attr(), result.plot_seq_attr()):  # type: ignore[misc]
        plt.close(figure)


def test_llm_attribution_gives_the_contributions_to_each_output_token(
    language_model: tuple[nn.Module, Any],
) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(TargetContributions(model), tokenizer)
    result = llm.attribute("a b c d", target="e f g")
    assert isinstance(result, LLMAttributionResult)
    assert result.input_tokens == [" a", " b", " c", " d"]
    assert result.output_tokens == [" e", " f", " g"]
    assert (result.token_attr > 0).any()
    assert (result.token_attr < 0).any()
    assert torch.allclose(result.seq_attr, result.token_attr.mean(0))
    ids = tokenizer("a b c d e f g", return_tensors="pt").input_ids
    for o in range(3):
        maps = TargetContributions(model).attribute(ids[:, : 4 + o], int(ids[0, 4 + o]))
        expected = torch.stack(maps).sum((0, 2, 3))[0, :4]
        assert torch.allclose(result.token_attr[o], expected, atol=1e-6)
    with torch.no_grad():
        probs = model(ids).logits[0, 3:6].softmax(-1).gather(-1, ids[0, 4:, None])[:, 0]
    assert torch.allclose(result.output_probs, probs, atol=1e-6)
    for figure, _ in (result.plot_token_attr(), result.plot_seq_attr()):  # type: ignore[misc]
        plt.close(figure)


def test_llm_attribution_takes_a_contrast(language_model: tuple[nn.Module, Any]) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(TargetContributions(model), tokenizer)
    result = llm.attribute("a b c d", target="e f g", contrast="e h")
    assert result.output_tokens == [" f"]  # the first at which the two differ
    ids = tokenizer("a b c d e", return_tensors="pt").input_ids
    ours, theirs = (int(tokenizer(x).input_ids[-1]) for x in ("f", "h"))
    maps = TargetContributions(model).attribute(ids, ours, contrast=theirs)
    expected = torch.stack(maps).sum((0, 2, 3))[:, :4]
    assert torch.allclose(result.token_attr, expected, atol=1e-6)
    opposite = llm.attribute("a b c d", target="e h", contrast="e f")
    assert torch.allclose(opposite.token_attr, -result.token_attr, atol=1e-6)
    with pytest.raises(ValueError, match="contrast"):
        LLMTokenAttribution(ContributionWeights(model), tokenizer).attribute(
            "a b c d", target="e", contrast="f"
        )
    with pytest.raises(TypeError, match="give a measure"):
        LLMTokenAttribution(InputContributions(model), tokenizer)


@pytest.mark.parametrize("measure", MEASURES.values())
def test_llm_scores_are_those_of_the_query_that_predicts_each_token(
    measure: Any, language_model: tuple[nn.Module, Any]
) -> None:
    model, tokenizer = language_model
    result = LLMTokenAttribution(measure(model), tokenizer).attribute("a b c d", target="e f g")
    ids = tokenizer("a b c d e f g", return_tensors="pt").input_ids
    maps = torch.stack(measure(model).attribute(ids), dim=1)  # (B, L, H, T, S)
    rows = maps.abs().mean((1, 2))[0]
    assert torch.allclose(result.token_attr, rows[3:6, :4], atol=1e-6)
    for o in range(3):
        single = TokenScores(measure(model), queries=3 + o).attribute(ids)[0, :4]
        assert torch.allclose(result.token_attr[o], single, atol=1e-6)
    with torch.no_grad():
        probs = model(ids).logits[0, 3:6].softmax(-1).gather(-1, ids[0, 4:, None])[:, 0]
    assert torch.allclose(result.output_probs, probs, atol=1e-6)


def test_llm_attribution_takes_token_input_ids_and_generates(
    language_model: tuple[nn.Module, Any],
) -> None:
    model, tokenizer = language_model
    llm = LLMTokenAttribution(TokenScores(ContributionWeights(model), signed=True), tokenizer)
    whole = llm.attribute("a b c d", target="e")
    skipping = llm.attribute(TextTokenInput("a b c d", tokenizer, skip_tokens=["b"]), target="e")
    assert skipping.input_tokens == [" a", " c", " d"]
    assert torch.equal(skipping.token_attr, whole.token_attr[:, [0, 2, 3]])
    unsigned = LLMTokenAttribution(ContributionWeights(model), tokenizer).attribute(
        "a b c d", target="e"
    )
    # Heads that oppose each other cancel.
    assert (whole.token_attr <= unsigned.token_attr).all()
    assert (whole.token_attr < 0.9 * unsigned.token_attr).any()
    as_ids = llm.attribute("a b c d", target=torch.tensor(tokenizer.encode("e")))
    assert torch.equal(as_ids.token_attr, whole.token_attr)
    generated = llm.attribute("a b c d", gen_args={"max_new_tokens": 3, "do_sample": False})
    assert generated.token_attr.shape == (len(generated.output_tokens), 4)
    with pytest.raises(ValueError, match="gen_args"):
        llm.attribute("a", target="b", gen_args={"max_new_tokens": 1})
    with pytest.raises(ValueError, match="output is empty"):
        llm.attribute("a", target="")
    with pytest.raises(ValueError, match="layers=None"):
        LLMTokenAttribution(
            TokenScores(ContributionWeights(model), layers=None), tokenizer
        ).attribute("a", target="b")


def test_private_captum_is_reached_through_one_module() -> None:
    from pathlib import Path

    package = Path(captum_cw.__file__).parent
    reaching = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(
            "captum._" in line or "captum.attr._" in line or "captum.log" in line
            for line in path.read_text().splitlines()
            if "import" in line
        )
    }
    assert reaching == {"attr/_captum.py"}


@pytest.mark.parametrize("heavy", ["transformers", "matplotlib.pyplot", "IPython", "gguf"])
def test_importing_the_package_brings_nothing_heavy_that_captum_does_not(heavy: str) -> None:
    def is_loaded_by(statement: str) -> bool:
        code = f"{statement}; import sys; print({heavy!r} in sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return run.stdout.strip() == b"True"

    assert not is_loaded_by("import captum_cw")
    ours = is_loaded_by("from captum_cw import ContributionWeights")
    assert not ours or is_loaded_by("from captum.attr import LLMAttribution")


def test_a_compiled_model_is_observed_through_the_original(model: nn.Module) -> None:
    compiled = torch.compile(model)  # it would compile at its first call, but is never called
    expected = ContributionWeights(model).attribute(token_ids())
    for x, y in zip(ContributionWeights(compiled).attribute(token_ids()), expected, strict=True):
        assert torch.equal(x, y)
