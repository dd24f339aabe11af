"""Our classes run through Captum itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import matplotlib

from support.inputs import token_ids
from support.measures import MEASURES
from support.models import llama

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from captum.attr import LayerAttribution, LLMAttributionResult, NoiseTunnel, TextTokenInput
from captum.attr import visualization as captum_visualization
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

import captum_cw
from captum_cw import (
    ContributionWeights,
    LLMTokenAttribution,
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
    def is_loaded_by(package: str) -> bool:
        code = f"import {package}, sys; print({heavy!r} in sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return run.stdout.strip() == b"True"

    assert not is_loaded_by("captum_cw") or is_loaded_by("captum.attr")


def test_a_compiled_model_is_observed_through_the_original(model: nn.Module) -> None:
    compiled = torch.compile(model)  # it would compile at its first call, but is never called
    expected = ContributionWeights(model).attribute(token_ids())
    for x, y in zip(ContributionWeights(compiled).attribute(token_ids()), expected, strict=True):
        assert torch.equal(x, y)
