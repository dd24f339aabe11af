"""The numbers that a page holds, and the explanations that a page cannot show."""

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_cw import Explanation, explain


@pytest.fixture
def explanation(tiny_model, tiny_tokenizer) -> Explanation:
    return explain(tiny_model, tiny_tokenizer, "a b c d e f g h i j", top_k=4)


def test_a_removed_frame_leaves_a_line_of_text(explanation: Explanation) -> None:
    text = re.search(r">([^<>]*)</iframe>$", explanation._repr_html_())[1]
    assert "10 tokens" in text
    assert "Trust this notebook" in text


def test_the_page_is_the_same_each_time(explanation: Explanation, tmp_path: Path) -> None:
    explanation.save_page(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == explanation.page()


def parts(page: str) -> tuple[dict, list[bytes]]:
    description = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    blobs = re.findall(r'class="blob">(.*?)</script>', page)
    return json.loads(description), [zlib.decompress(base64.b64decode(blob)) for blob in blobs]


def test_a_map_has_sixteen_bits(explanation: Explanation) -> None:
    _, blobs = parts(explanation.page())
    assert len(blobs) == len(explanation.maps) + len(explanation.heads)
    for blob, x in zip(blobs[: len(explanation.maps)], explanation.maps.values(), strict=True):
        largest = np.frombuffer(blob, "<f4", 10)[:, None]
        low, high = np.frombuffer(blob, np.uint8, offset=40).reshape(2, 10, 10).astype(int)
        number = (low + 256 * high + 2**15) % 2**16 - 2**15
        error = np.abs(number * largest / 32767 - x.numpy())
        assert (error <= largest / 65534 * 1.001).all()


@pytest.mark.parametrize("negative", [False, True])
def test_a_head_has_eight_bits(explanation: Explanation, negative: bool) -> None:
    """The errors that the page's module promises: 0.6% of a row's largest, 1.2% with signs."""
    layer = explanation.heads[1]
    if negative:  # as in DiffLlama
        layer = replace(layer, attention=layer.attention * torch.tensor([1, -1, 1, -1]))
    description, blobs = parts(replace(explanation, heads=[layer]).page())
    assert description["layers"][0]["negative"] == negative
    blob, rows, K = blobs[-1], 40, 4
    floats = np.frombuffer(blob, "<f4", 10 + 6 * rows)
    codes = np.frombuffer(blob, np.uint8, offset=4 * len(floats)).reshape(5, 4, 10, K)
    keys = (codes[0].astype(int) + 256 * codes[1].astype(int)).cumsum(-1)
    order = layer.keys.argsort(dim=-1, stable=True)
    assert (keys == layer.keys.gather(-1, order).numpy()).all()
    given = (layer.attention, layer.relative_norm, layer.measure("contribution-signed"))
    for n, (x, levels) in enumerate(zip(given, (127 if negative else 255, 255, 127), strict=True)):
        x = x.where(layer.attention != 0, 0).gather(-1, order).numpy()
        start = 10 + (3 + n) * rows
        largest = floats[start : start + rows].reshape(4, 10, 1)
        code = codes[2 + n].view(np.int8 if levels == 127 else np.uint8)
        error = np.abs((code.astype(float) / levels) ** 3 * largest - x)
        assert (error <= largest * (0.006 if levels == 255 else 0.012)).all()
        close = np.abs(x) / np.maximum(largest, 1e-30)
        hundredth = (close > 0.009) & (close < 0.011)
        allowed = np.abs(x) * (0.028 if levels == 255 else 0.057)
        assert (error <= allowed)[hundredth].all()


def test_explanations_that_cannot_be_shown_are_refused() -> None:
    bare = Explanation(("a",), {})
    with pytest.raises(ValueError, match="nothing to show"):
        bare.page()
    with pytest.raises(ValueError, match=r"scores\['m'\] holds nan"):
        replace(bare, scores={"m": torch.tensor([torch.nan])}).page()
    with pytest.raises(ValueError, match="sinks holds 1, outside the 1 tokens"):
        replace(bare, scores={"m": torch.ones(1)}).page(sinks=[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Explanation([], {}), "no tokens"),
        (Explanation(["a"], {"m": torch.ones(1)}, probability=torch.tensor([torch.nan])), "nan"),
    ],
)
def test_explanations_without_tokens_or_with_nan_are_refused(
    given: Explanation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        given.page(sinks=())


def test_a_page_is_not_written_in_part(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(ValueError, match="nan"):
        Explanation(["a"], {"m": torch.tensor([torch.nan])}).save_page(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"page\.html cannot .* no folder .*missing\."):
        Explanation(["a"], {"m": torch.ones(1)}).save_page(tmp_path / "missing" / "page.html")
    Explanation(["\ud800"], {"m": torch.ones(1, requires_grad=True)}).save_page(path)
    assert "<!DOCTYPE html>" in path.read_text(encoding="utf-8")
