"""Removing and scaling values, against attention written out with ``v~`` zeroed by hand."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_cw import (
    ALTIWeights,
    ComprehensivenessSufficiency,
    ContributionWeights,
    TokenScores,
    VWONAttention,
    remove_tokens,
    remove_values,
    scale_values,
    sufficiency,
)
from captum_cw.attr.measures import AttentionAttribution
from captum_cw.capture import UnsupportedModelError
from captum_cw.functional import AttentionLayer, Block, Space
from support import reference
from support.inputs import padded_batch, position_ids, token_ids
from support.models import IMPLEMENTATIONS, MODELS, SIZES, build, gpt2, llama
from support.reference import sorted_pairs
from support.running import run_in_threads
from support.state import state_of

NAMES = {"attention": "attention", "vw": "vw", "vwon": "vwon", "contribution": "inter"}


def logits_of(model: nn.Module, inputs: dict[str, Tensor], real: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, position_ids=position_ids(real), **given).logits
    return logits


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


# -- removing by scores ---------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("method", NAMES)
def test_online_removal_equals_zeroing_by_hand(
    kv_heads: int, side: str, which: Any, method: str
) -> None:
    model = llama(kv_heads)
    inputs, real = padded_batch(side)
    chosen: list[Tensor] = []

    def remove(number: int, seen: dict[str, Tensor]) -> Tensor:
        scores = reference.token_scores(seen[NAMES[method]], seen["visible"], "mean")
        kept = reference.sinks(seen["hidden"], real)
        chosen.extend(sorted_pairs([scores], real, [kept], "0.3", which, "layer", "removable"))
        return chosen[-1]

    expected = reference.llama_logits(model, inputs["input_ids"], real, remove)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        with remove_tokens(model, method, 0.3, which):
            found = logits_of(model, inputs, real)
        assert torch.allclose(found[real].double(), expected[real], atol=1e-4)
    assert all(x.any() for x in chosen)
    unchanged = logits_of(model, inputs, real)[real].double()
    assert not torch.allclose(unchanged, expected[real], atol=1e-2)


@pytest.mark.parametrize("scope", ["layer", "head", "global"])
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_clean_removal_equals_zeroing_by_hand(scope: Any, which: Any) -> None:
    model = llama()
    inputs, real = padded_batch("left")
    scores: list[Tensor] = []
    kept: list[Tensor] = []

    def note(number: int, seen: dict[str, Tensor]) -> Tensor:
        scores.append(reference.token_scores(seen["inter"], seen["visible"], "sum"))
        kept.append(reference.sinks(seen["hidden"], real))
        return torch.zeros_like(scores[-1], dtype=torch.bool)

    reference.llama_logits(model, inputs["input_ids"], real, note)
    masks = sorted_pairs(scores, real, kept, "0.5", which, scope, "removable")
    expected = reference.llama_logits(model, inputs["input_ids"], real, lambda n, _: masks[n])
    method = TokenScores(ContributionWeights(model), "sum")
    with remove_tokens(model, method, 0.5, which, scoring="clean", ranking=scope):
        found = logits_of(model, inputs, real)
    assert torch.allclose(found[real].double(), expected[real], atol=1e-4)
    with remove_values(model, masks):
        given = logits_of(model, inputs, real)
    assert torch.allclose(given, found, atol=1e-6)


def test_a_copy_made_under_an_intervention_is_a_model_of_its_own() -> None:
    model, ids = llama(), token_ids()
    with torch.no_grad():
        alone = model(ids).logits
        with remove_tokens(model, "contribution", 0.5):
            copied: Any = copy.deepcopy(model)
            assert torch.equal(copied(ids).logits, alone)
            copied.lm_head.weight.mul_(2)
            assert torch.equal(copied(ids).logits, 2 * alone)
            assert not torch.equal(model(ids).logits, alone)
        assert torch.equal(copied(ids).logits, 2 * alone)
        with remove_tokens(copied, "contribution", 0.5):
            assert not torch.equal(copied(ids).logits, 2 * alone)


def test_head_scope_and_layer_scope_differ() -> None:
    model, ids = llama(), token_ids()
    logits = []
    for scope in ("layer", "head"):
        with torch.no_grad(), remove_tokens(model, "contribution", 0.5, ranking=scope):
            logits.append(model(ids).logits)
    assert not torch.allclose(*logits, atol=1e-3)


def test_a_model_without_heads_that_share_values_is_changed_too() -> None:
    model, ids = gpt2(), token_ids()
    masks = [torch.zeros(2, 4, 9, dtype=torch.bool) for _ in range(2)]
    masks[0][:, 2, 3] = True
    seen: list[Tensor] = []
    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(ids)
        with remove_values(model, masks):
            model(ids)
    handle.remove()
    plain_y, changed = (x.unflatten(-1, (4, 8)) for x in seen)
    assert torch.equal(plain_y[:, :3], changed[:, :3])
    assert torch.allclose(plain_y[:, :, [0, 1, 3]], changed[:, :, [0, 1, 3]], atol=1e-6)
    assert not torch.allclose(plain_y[:, 3:, 2], changed[:, 3:, 2], atol=1e-4)


# -- nothing removed, everything restored ---------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_nothing_removed_the_logits_are_bit_identical(
    model: nn.Module, implementation: str, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    inputs, _ = padded_batch("left")
    before = state_of(model)
    with torch.no_grad():
        alone = model(**inputs).logits
        none = [torch.zeros(2, 4, 9, dtype=torch.bool) for _ in range(2)]
        for nothing in (
            remove_tokens(model, "contribution", 0.0),
            remove_tokens(model, "contribution", 0.0, scoring="clean"),
            remove_values(model, none),
            scale_values(model, 1.0, positions=0),
            scale_values(model, 0.0, positions=[]),
        ):
            with nothing:
                assert torch.equal(model(**inputs).logits, alone)
        assert torch.equal(model(**inputs).logits, alone)
    assert state_of(model) == before


def test_the_model_is_restored_after_an_exception(model: nn.Module) -> None:
    before, ids = state_of(model), token_ids()
    with torch.no_grad():
        alone = model(ids).logits
        for changed in (
            remove_tokens(model, "contribution", 0.5),
            scale_values(model, 0.0, positions=40),
            remove_values(model, [torch.zeros(2, 4, 9, dtype=torch.bool)]),
        ):
            with contextlib.suppress(ZeroDivisionError, IndexError, ValueError), changed:
                model(ids)
                raise ZeroDivisionError
        assert torch.equal(model(ids).logits, alone)
    assert state_of(model) == before
    assert "forward" not in vars(model)


def test_other_threads_run_the_model_as_it_is() -> None:
    model, ids = llama(), token_ids()
    with torch.no_grad():
        alone = model(ids).logits
    elsewhere: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            elsewhere.append(model(ids).logits)

    with remove_tokens(model, "random", 0.9), torch.no_grad():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        here = model(ids).logits
    assert torch.equal(elsewhere[0], alone)
    assert not torch.allclose(here, alone, atol=1e-3)


def test_threads_with_removals_of_their_own_do_not_meet() -> None:
    model = llama()
    ids = [token_ids(seed=n) for n in range(3)]

    def removed(n: int) -> Tensor:
        with remove_tokens(model, "contribution", 0.2 + 0.2 * n), torch.no_grad():
            logits: Tensor = model(ids[n]).logits
        return logits

    expected = [removed(n) for n in range(3)]

    def work(n: int) -> None:
        for _ in range(5):
            assert torch.allclose(removed(n), expected[n], atol=1e-5)

    run_in_threads(3, work)
    assert "forward" not in vars(model)


def test_a_forward_of_the_models_own_is_put_back() -> None:
    model, ids = llama(), token_ids()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.forward
    with remove_tokens(model, "contribution", 0.5), torch.no_grad():
        model(ids)
    assert vars(model)["forward"] is mine


# -- scaling --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left"])
def test_scaling_to_nothing_is_removing(side: str) -> None:
    model = llama()
    inputs, real = padded_batch(side)
    masks = [torch.zeros(2, 1, 9, dtype=torch.bool) for _ in range(2)]
    first = real.long().argmax(1)
    masks[1][torch.arange(2), 0, first] = True
    masks[1][torch.arange(2), 0, 8] = True
    with remove_values(model, masks):
        expected = logits_of(model, inputs, real)
    with scale_values(model, 0.0, positions=[0, -1], layers=[1]):
        found = logits_of(model, inputs, real)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, logits_of(model, inputs, real), atol=1e-3)


def test_scaling_is_linear_in_the_output_of_one_layer() -> None:
    model, ids = llama(), token_ids()
    outputs: list[Tensor] = []
    handle = model.model.layers[1].self_attn.register_forward_hook(
        lambda m, args, out: outputs.append(out[0])
    )
    with torch.no_grad():
        for factor in (0.0, 0.5, 1.0):
            with scale_values(model, factor, positions=0, layers=1):
                model(ids)
    handle.remove()
    assert torch.allclose(outputs[1], (outputs[0] + outputs[2]) / 2, atol=1e-5)


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_changes_within_changes_add_up(scoring: Any) -> None:
    model, ids = llama(), token_ids()
    removal = remove_tokens(model, "contribution", 0.5, scoring=scoring)
    with scale_values(model, 0.0, positions=2, layers=[1]), removal, torch.no_grad():
        found = model(ids).logits
    changed = copy.deepcopy(model)  # the same by a hook, which removes what comes to layer 1

    def zero(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.masked_fill((torch.arange(9) == 2)[:, None], 0)

    changed.model.layers[1].self_attn.v_proj.register_forward_hook(zero)
    with remove_tokens(changed, "contribution", 0.5, scoring=scoring), torch.no_grad():
        expected = changed(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    with remove_tokens(model, "contribution", 0.5, scoring=scoring), torch.no_grad():
        assert not torch.allclose(found, model(ids).logits, atol=1e-3)


# -- generation -----------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["online", "clean"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_a_prompt_loses_stays_lost_while_text_is_generated(scoring: Any, cache: str) -> None:
    model = llama()
    model.generation_config.eos_token_id = None
    ids = token_ids(B=2, T=6)
    new = 3
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    with torch.no_grad():
        with remove_tokens(model, "contribution", 0.5, scoring=scoring):
            written = model.generate(ids, **options)
        plainly = model.generate(ids, **options)
    assert written.shape[1] == 6 + new
    assert not torch.equal(plainly, written)
    # The same in one pass without a cache, what the prompt loses decided from the prompt alone.
    real = torch.ones_like(ids, dtype=torch.bool)
    masks: list[Tensor] = []

    def remove(number: int, seen: dict[str, Tensor]) -> Tensor:
        scores = reference.token_scores(seen["inter"], seen["visible"], "mean")
        kept = reference.sinks(seen["hidden"], real)
        masks.extend(sorted_pairs([scores], real, [kept], "0.5", "bottom", "layer", "removable"))
        return masks[-1] if scoring == "online" else torch.zeros_like(masks[-1])

    reference.llama_logits(model, ids, real, remove)
    with remove_values(model, [nn.functional.pad(m, (0, new)) for m in masks]), torch.no_grad():
        whole = model(written).logits
    assert torch.equal(whole[:, 5:-1].argmax(-1), written[:, 6:])


def test_a_cache_that_was_filled_before_is_refused() -> None:
    model, ids = llama(), token_ids()
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        with (
            remove_tokens(model, "contribution", 0.5),
            pytest.raises(RuntimeError, match="holds 6 tokens that were not read"),
        ):
            model(ids[:, 6:], past_key_values=cache)


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_only_the_cache_of_the_last_text_is_known(scoring: Any) -> None:
    model = llama()
    first, second = token_ids(seed=1), token_ids(seed=2)
    one = torch.ones(2, 1, dtype=torch.long)
    with remove_tokens(model, "contribution", 0.5, scoring=scoring), torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
        model(one, past_key_values=cache)
        model(second, use_cache=True)
        with pytest.raises(RuntimeError, match="not read as the last text"):
            model(one, past_key_values=cache)
        cache = model(first, use_cache=True).past_key_values
        with contextlib.suppress(IndexError):
            model(second + 1000)
        with pytest.raises(RuntimeError, match="not read as the last text"):
            model(one, past_key_values=cache)
        cache = model(first, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="give it at once"):
            model(second, past_key_values=cache)


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_that_is_given_is_filled_once(padded: bool) -> None:
    model, ids = llama(), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = int(not padded)
    cache = transformers.DynamicCache()
    with remove_tokens(model, "vw", 0.5, scoring="clean"), torch.no_grad():
        found = model(ids, mask, None, cache).logits  # by position
        assert torch.allclose(found, model(ids, mask).logits, atol=1e-6)
    assert cache.get_seq_length() == 9
    if padded:
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        written = []
        for kind in ({}, {"cache_implementation": "static"}):
            with remove_tokens(model, "vw", 0.5, scoring="clean"):
                written.append(model.generate(ids, attention_mask=mask, **options, **kind))
        assert torch.equal(*written)


# -- what is refused ------------------------------------------------------------------------


def test_a_part_of_the_model_is_refused() -> None:
    model = llama()
    with (
        remove_tokens(model, "contribution", 0.5),
        pytest.raises(RuntimeError, match="call the model itself"),
    ):
        model.model(token_ids())


def test_attributing_under_online_removal_is_refused_and_under_clean_is_right() -> None:
    model, ids = llama(), token_ids()
    with (
        remove_tokens(model, "contribution", 0.5),
        pytest.raises(RuntimeError, match="use scoring='clean', or remove_values"),
    ):
        ContributionWeights(model).attribute(ids)
    with remove_tokens(model, "contribution", 0.5, scoring="clean"):
        maps = ContributionWeights(model).attribute(ids)
    assert all(torch.allclose(c.sum((1, 3)), torch.ones(2, 9), atol=1e-5) for c in maps)
    removed = [(c == 0).all(2) for c in maps]
    assert all(int(r.sum()) >= 2 * 16 for r in removed)


def unseen() -> nn.Module:
    """A model that has no attention."""
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def test_attention_that_cannot_be_seen_is_refused() -> None:
    model = unseen()
    for changed in (
        remove_tokens(model, "contribution", 0.5),
        remove_tokens(model, "contribution", 0.5, scoring="clean"),
        scale_values(model, 0.0, positions=0),
        remove_values(model, []),
    ):
        with pytest.raises(UnsupportedModelError, match="No attention was found"), changed:
            model(token_ids())
    with pytest.raises(UnsupportedModelError, match="No attention was found"):
        sufficiency(model, token_ids(), "contribution", [0.5])


def test_cross_attention_is_refused() -> None:
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 32}
    sides = {f"{side}_{n}": x for side in ("encoder", "decoder") for n, x in sizes.items()}
    config = transformers.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **sides)
    model = transformers.BartForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        sufficiency(model, token_ids(), "contribution", [0.5])
    with pytest.raises(UnsupportedModelError, match="cross-attention"), scale_values(model, 0, 0):
        pass


def test_a_measure_of_some_layers_is_refused() -> None:
    model = llama()
    method = ContributionWeights(model, model.model.layers[0].self_attn)
    with (
        pytest.raises(ValueError, match="make it without layer="),
        remove_tokens(model, method, 0.5),
    ):
        pass


def test_training_mode_is_refused() -> None:
    model = llama().train()
    with (
        remove_tokens(model, "contribution", 0.5),
        pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"),
    ):
        model(token_ids())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, r"rate must lie in \[0, 1\], got 1.5"),
        ({"rate": float("nan")}, r"rate must lie in \[0, 1\], got nan"),
        ({"which": "middle"}, "which='middle' is unknown"),
        ({"ranking": "word"}, "ranking='word' is unknown"),
        ({"ranking": "global"}, "use scoring='clean'"),
        ({"scoring": "late"}, "scoring='late' is unknown"),
        ({"reduction": "median"}, "reduction='median' is unknown"),
        ({"sink_space": "logits"}, "sink_space='logits' is unknown"),
        ({"sink_threshold": 3.0}, r"sink_threshold is a cosine .* got 3.0"),
        ({"rate_of": "some"}, "rate_of='some' is unknown"),
        ({"method": "gradient"}, "method='gradient' is unknown; known: 'target'"),
    ],
)
def test_senseless_choices_are_refused(options: dict[str, Any], message: str) -> None:
    model = llama()
    given = {"method": "contribution", "rate": 0.5, **options}
    before = state_of(model)
    with pytest.raises(ValueError, match=message), remove_tokens(model, **given):
        pass
    assert state_of(model) == before


class OfStream(AttentionAttribution):
    """Attention, divided by the length of the residual stream."""

    name = "of_stream"
    space: Space = "residual"
    needs_stream = True

    @staticmethod
    def measure(layer: AttentionLayer) -> Block:
        assert layer.residual is not None
        length = layer.residual.stream.norm(dim=-1)[:, None, :, None]
        return lambda a, rows: a / length[:, :, rows]


def test_a_measure_may_read_the_residual_stream() -> None:
    model = llama()
    inputs, real = padded_batch("left")
    with torch.no_grad():
        streams = iter(model(**inputs, output_hidden_states=True).hidden_states)
    scores: list[Tensor] = []
    kept: list[Tensor] = []

    def note(number: int, seen: dict[str, Tensor]) -> Tensor:
        lengths = next(streams).double().norm(dim=-1)[:, None, :, None]
        scores.append(reference.token_scores(seen["attention"] / lengths, seen["visible"], "sum"))
        kept.append(reference.sinks(seen["hidden"], real))
        return torch.zeros_like(scores[-1], dtype=torch.bool)

    reference.llama_logits(model, inputs["input_ids"], real, note)
    masks = sorted_pairs(scores, real, kept, "0.5", "bottom", "layer", "removable")
    expected = reference.llama_logits(model, inputs["input_ids"], real, lambda n, _: masks[n])
    method = TokenScores(OfStream(model), "sum")
    with remove_tokens(model, method, 0.5, "bottom", scoring="clean"):
        found = logits_of(model, inputs, real)
    assert torch.allclose(found[real].double(), expected[real], atol=1e-4)
    with (
        remove_tokens(model, method, 0.5),
        pytest.raises(ValueError, match="use scoring='clean'"),
    ):
        logits_of(model, inputs, real)


def test_methods_that_do_not_score_pairs_are_refused() -> None:
    model = llama()
    with pytest.raises(TypeError, match="method is of type int"), remove_tokens(model, 3, 0.5):
        pass
    scores = TokenScores(VWONAttention(model), queries=-1)
    with pytest.raises(ValueError, match="queries=-1"), remove_tokens(model, scores, 0.5):
        pass


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.zeros(2, 4, 9)] * 2, r"Mask 0 is torch.float32 of shape \(2, 4, 9\)"),
        ([torch.ones(2, 4, 9, dtype=torch.bool)], "in 1 attention layers, but the model ran 2"),
        ([torch.ones(2, 4, 9, dtype=torch.bool)] * 3, "in 3 attention layers, but the model ran 2"),
        ([torch.ones(2, 4, 8, dtype=torch.bool)] * 2, "4 heads and 9 tokens"),
        ([torch.ones(2, 3, 9, dtype=torch.bool)] * 2, r"shape \(2, 3, 9\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: list[Tensor], message: str) -> None:
    model = llama()
    before = state_of(model)
    with pytest.raises((TypeError, ValueError), match=message), remove_values(model, masks):
        model(token_ids())
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": float("inf"), "positions": 0}, ValueError, "factor=inf is not a finite"),
        ({"factor": "2", "positions": 0}, ValueError, "factor='2' is not a finite number"),
        ({"factor": 0.5, "positions": "first"}, TypeError, "positions='first': give an index"),
        ({"factor": 0.5, "positions": 0, "layers": [1.0]}, TypeError, r"layers=\[1.0\]: give an"),
        ({"factor": 0.5, "positions": 9}, IndexError, "positions=9, but example 0 has 9 tokens"),
        ({"factor": 0.5, "positions": 0, "layers": 5}, IndexError, r"layers=\[5\].*0\.\.1"),
    ],
)
def test_places_that_do_not_exist_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = llama()
    with pytest.raises(error, match=message), scale_values(model, **options):
        model(token_ids())


def test_a_window_that_forgets_what_was_removed_is_refused() -> None:
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    model = build(transformers.MistralForCausalLM, config)
    model.generation_config.eos_token_id = None
    with (
        torch.no_grad(),
        remove_tokens(model, "contribution", 0.5),
        pytest.raises(RuntimeError, match="use a cache without a window"),
    ):
        model.generate(token_ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)


# -- what kernels and projections do --------------------------------------------------------


def test_a_removed_value_may_be_infinite() -> None:
    model, ids = llama(4), token_ids()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0] = torch.inf
        everything = [torch.ones(2, 4, 9, dtype=torch.bool) for _ in range(2)]
        with remove_values(model, everything):
            assert model(ids).logits.isfinite().all()


@contextlib.contextmanager
def implementation(name: str, kernel: Any) -> Any:
    """An attention implementation of one's own."""
    transformers.AttentionInterface.register(name, kernel)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    transformers.AttentionMaskInterface.register(name, masks["sdpa"])
    yield
    for registry in (transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, masks):
        registry._global_mapping.pop(name)


def test_a_kernel_that_hands_over_to_another_is_changed_once() -> None:
    model, ids = llama(4), token_ids()
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    with torch.no_grad():
        with scale_values(model, 0.5, positions=3):
            expected = model(ids).logits
        with implementation("relay", lambda *a, **k: registry["sdpa"](*a, **k)):
            model.set_attn_implementation("relay")
            with scale_values(model, 0.5, positions=3):
                found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_kernel_that_repeats_by_a_rule_of_its_own_is_refused() -> None:
    model = llama(2)
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def own(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return registry["sdpa"](module, *args, **kwargs)[0] * module.num_key_value_groups, None

    with implementation("own", own), scale_values(model, 0.5, positions=3), torch.no_grad():
        model.set_attn_implementation("own")
        with pytest.raises(UnsupportedModelError, match="changed per head"):
            model(token_ids())


@pytest.mark.parametrize("make", [lambda: llama(2, attention_bias=True), gpt2])
def test_an_output_bias_stays_under_online_removal(make: Any) -> None:
    model, ids = make(), token_ids()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.bias", "c_proj.bias")):
                parameter.fill_(3.0)
        outputs: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith(("layers.1.self_attn", "h.1.attn")):
                module.register_forward_hook(lambda m, args, out: outputs.append(out[0]))
        with remove_tokens(model, "random", 1.0, protect_sinks=False):
            model(ids)
    assert torch.allclose(outputs[0], torch.tensor(3.0), atol=1e-6)  # all else is removed


def test_two_models_are_changed_each_by_its_own() -> None:
    a, b, ids = llama(4), llama(4, rms_norm_eps=1e-3), token_ids()
    masks = [torch.rand(2, 4, 9) < 0.3 for _ in range(2)]
    with torch.no_grad():
        with remove_values(a, masks):
            expected = a(ids).logits
        with remove_values(a, masks), remove_values(b, masks[:1]):
            assert torch.equal(a(ids).logits, expected)


def test_after_a_pass_that_failed_a_part_of_the_model_is_refused_still() -> None:
    model = llama()
    with remove_tokens(model, "contribution", 0.5):
        with contextlib.suppress(IndexError):
            model(token_ids() + 1000)
        with pytest.raises(RuntimeError, match="call the model itself"):
            model.model(token_ids())


# -- how models come ------------------------------------------------------------------------


def test_a_model_whose_weights_lie_on_disk_is_changed_alike(tmp_path: Path) -> None:
    ids = token_ids()
    model = llama()
    offloaded = accelerate.disk_offload(llama(), tmp_path, execution_device=torch.device("cpu"))
    own = vars(offloaded).get("forward")
    assert all(p.is_meta for p in offloaded.model.layers.parameters())
    for scoring in ("online", "clean"):
        with remove_tokens(model, "contribution", 0.5, scoring=scoring), torch.no_grad():
            right = model(ids).logits
        with remove_tokens(offloaded, "contribution", 0.5, scoring=scoring), torch.no_grad():
            assert torch.allclose(offloaded(ids).logits, right, atol=1e-5)
    assert vars(offloaded).get("forward") is own
    found = sufficiency(offloaded, ids, "contribution", [0.5])
    assert torch.allclose(found, sufficiency(model, ids, "contribution", [0.5]), rtol=1e-4)


def test_a_compiled_model_is_changed_alike() -> None:
    model, ids = llama(), token_ids()
    with remove_tokens(model, "contribution", 0.5), torch.no_grad():
        expected = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        alone = compiled(ids).logits
        with remove_tokens(compiled, "contribution", 0.5):
            found = compiled(ids).logits
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(compiled(ids).logits, alone)


# ---------------------------------------------------------------------------------------------
# Whole tokens


def by_gradients(model: Any) -> Callable[[Any], Tensor]:
    """Gradient times embedding, by a pass of the same model."""

    def score(batch: Any) -> Tensor:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        embeddings = model.get_input_embeddings()(given.pop("input_ids")).detach()
        embeddings.requires_grad_()
        top = model(inputs_embeds=embeddings, **given).logits.amax(-1).sum()
        (gradient,) = torch.autograd.grad(top, embeddings)
        return (gradient * embeddings).sum(-1).abs()

    return score


WHOLE: dict[str, Callable[[Any], Any]] = {
    "a measure": ContributionWeights,
    "a name": lambda model: "vw",
    "chance": lambda model: "random",
    "rollout": lambda model: TokenScores(ContributionWeights(model), layers="rollout"),
    "alti": ALTIWeights,
    "a callable that runs the model": by_gradients,
    "a tensor": lambda model: torch.arange(18.0).view(2, 9).flip(1),
}


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_tokens_are_removed_as_the_metric_removes_them(name: str, which: Any) -> None:
    model, ids = llama(), token_ids()
    method = WHOLE[name](model)
    metric = ComprehensivenessSufficiency(
        model, {which: [0.4]}, granularity="token", quantity="nll"
    )
    expected = metric.evaluate({"x": method}, ids, show_progress=False)
    side = "comprehensiveness" if which == "top" else "sufficiency"
    with remove_tokens(model, method, 0.4, which, granularity="token"), torch.no_grad():
        logits = model(ids).logits
    with torch.no_grad():
        clean = model(ids).logits
    nll = [
        torch.nn.functional.cross_entropy(
            x[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        ).mean(1)
        for x in (logits, clean)
    ]
    lost = (nll[0] - nll[1]).double()
    assert torch.allclose(lost, expected.deltas("x", side)[:, 0].double(), atol=1e-5)
    assert not torch.equal(logits, clean)


@pytest.mark.parametrize("name", ["a measure", "rollout", "a callable that runs the model"])
def test_whole_tokens_stay_removed_in_a_generated_text(name: str) -> None:
    model, ids = llama(), token_ids(B=1)
    method = WHOLE[name](model)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    found = []
    for cached in (True, False):
        with remove_tokens(model, method, 0.5, granularity="token"):
            found.append(
                model.generate(ids, use_cache=cached, return_dict_in_generate=True, **options)
            )
    assert torch.equal(found[0].sequences, found[1].sequences)
    with remove_tokens(model, method, 0.5, granularity="token"), torch.no_grad():
        first = model(ids).logits[:, -1]
    assert torch.allclose(found[0].logits[0], first, atol=1e-5)


def test_a_scorer_that_fails_leaves_the_model_usable() -> None:
    model, ids = llama(), token_ids()

    def fail(batch: Any) -> Tensor:
        model(batch["input_ids"])
        raise ZeroDivisionError

    with remove_tokens(model, fail, 0.5, granularity="token"), torch.no_grad():
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(ids)
