"""Every model type of transformers gives right results, or is refused with a reason."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import parse

from captum_cw.models.architectures import ModelTypes, Outcome
from support.architectures import GROUPS, types
from support.matrix import NO_SOFTMAX, PAGE, of_registry, outcome, page

#: The types that are known not to work, so that no other type is refused without notice.
REFUSED = {
    "deepseek_v4": "output projection",  # heads are turned, then mixed by a low-rank map
    "diffllama": "output projection",  # two calls make one attention
    "jetmoe": "output projection",  # each token goes through projections of its own
    "prophetnet": "No attention",  # two streams of tokens in one
    "reformer": "No attention",  # keys are sorted into chunks
    "xlnet": "output projection",  # tokens before examples, and no linear layer
}


#: Types with attention that is left out, within windows or chunks, beside attention that is seen.
IN_PART = {"inkling2_text", "led", "longt5", "pegasus_x", "prophetnet"}
REFUSED_ENCODERS = {
    "convbert": "No attention",  # what reads heads reads a convolution beside them
    "fnet": "No attention",
    "fsmt": "output projection",  # tokens before examples
    "longformer": "No attention",  # within windows
    "mra": "No attention",  # approximates attention by blocks
    "nystromformer": "output projection",  # approximates attention by landmarks
    "reformer": "No attention",
    "squeezebert": "No attention",  # features before tokens
    "yoso": "No attention",  # samples keys by hashes
}


#: Types that the slow reference cannot follow yet, so that nothing is known of them.
UNKNOWN = {"dory"}
if parse(version("transformers")) >= parse("5.24"):
    # Attention over layers, beside that over tokens, goes through the registry since then.
    IN_PART -= {"inkling2_text"}
    REFUSED |= dict.fromkeys(("inkling2_text", "inkling2_loop_text"), "output projection")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("group", "model_type"), [(group, name) for group in GROUPS for name in types(group)]
)
def test_type(group: str, model_type: str) -> None:
    if model_type in UNKNOWN:
        pytest.skip("the slow reference finds no linear map from its heads to the output")
    found = outcome(model_type, group)
    refused = REFUSED if group == "causal" else REFUSED_ENCODERS
    if found.status == "not built":
        pytest.skip(found.reason)
    if model_type in refused:
        assert found.status == "refused"
        assert refused[model_type] in found.reason
    elif model_type in NO_SOFTMAX:
        assert found.status == "no softmax attention"
    elif model_type in IN_PART:
        assert found.status == "in part"
    else:
        assert found.status == "works", found.reason


def test_the_page_counts_the_listed_types() -> None:
    groups = {
        "causal": {
            "a": Outcome("works", "", 2, ("AAttention",), "registry"),
            "b": Outcome("refused", "No layer", 1, ("BAttention",), "registry"),
            "c": Outcome("no softmax attention", "why"),
        },
        "vision": {"d": Outcome("works", "", 1, ("DAttention",), "by itself")},
    }
    text = page(ModelTypes("5", "2", groups))
    assert "Of the 2 types whose attention goes through the registry, 1 work." in text
    assert "All 3 types by status: 1 works, 1 refused, 1 no softmax attention." in text
    assert "| b | `BAttention` | registry | 1 | refused | No layer |" in text
    assert "## Vision" in text


def test_the_package_holds_the_results_of_the_page() -> None:
    assert page(ModelTypes.load()) == PAGE.read_text(encoding="utf-8")


def test_the_readme_counts_what_is_tested() -> None:
    readme = " ".join((PAGE.parent.parent / "README.md").read_text(encoding="utf-8").split())
    tested = ModelTypes.load()
    registered, works = of_registry(tested, "causal")
    of = {
        group: (len(types), tested.counts(group)["works"]) for group, types in tested.groups.items()
    }
    assert f"Of the {registered} causal model types" in readme
    assert f"{works} pass. " in readme
    assert "Of all {} causal types, {} pass.".format(*of["causal"]) in readme
    for group, name in (
        ("encoder", "masked language models"),
        ("encoder-decoder", "encoder-decoders"),
        ("vision", "vision transformers"),
    ):
        assert f"{of[group][1]} of {of[group][0]} {name}" in readme
