"""Token scores as coloured text, in Captum's text records."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from math import isnan, nan
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from captum.attr import visualization as captum_text
from torch import Tensor

from captum_cw.visualization._output import html_page


def normalized_scores(
    scores: Mapping[str, Tensor], tokens: Sequence[str], skip: Collection[int]
) -> dict[str, Tensor]:
    """Each method's ``(T,)`` scores over its own largest absolute value, so within [-1, 1].

    Positions in ``skip`` do not set the scale, and are clipped to it.
    """
    length = len(tokens)
    for position in skip:
        if not -length <= position < length:
            raise ValueError(f"skip holds {position}, outside the {length} tokens")
    if not scores:
        raise ValueError("scores are empty, expected {method's name: (T,) tensor}")
    counted = torch.ones(length, dtype=torch.bool, device="cpu")
    counted[list(skip)] = False
    if not counted.any():
        raise ValueError(f"skip={skip!r} leaves none of the {length} tokens to set the scale")
    normalized = {}
    for method, given in scores.items():
        values = _numbers(given)
        if values.shape != (length,):
            raise ValueError(
                f"the scores of {method!r} have shape {tuple(values.shape)}, expected "
                f"({length},), one a token: of a batch, give one row with its own tokens"
            )
        if not values.isfinite().all():
            position = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"the scores of {method!r} hold {values[position].item()} at position "
                f"{position} ({tokens[position]!r}): replace it, for instance by nan_to_num()"
            )
        peak = values[counted].abs().max()
        scaled = (values / peak).clamp(-1, 1) if peak > 0 else values.sign()
        normalized[method] = scaled.float()
    return normalized


def _numbers(scores: Any) -> Tensor:
    # To the CPU first, since not every device has float64.
    scores = scores.detach().cpu() if isinstance(scores, Tensor) else scores
    return torch.as_tensor(scores, dtype=torch.float64, device="cpu")


def text_records(
    scores: Mapping[str, Tensor],
    tokens: Sequence[str],
    *,
    target: str = "",
    predicted: str = "",
    probability: float = nan,
    skip: Collection[int] = (),
) -> list[captum_text.VisualizationDataRecord]:
    """Captum text records, one a method, that compare scores of the same tokens.

    Captum clips scores to [-1, 1] and writes tokens into the page as they are; so each row is
    divided by its own largest absolute value first, and every text is escaped.

    Args:
        scores: ``(T,)`` scores a method, in any unit: token scores, Integrated Gradients.
        tokens: ``T`` strings, such as :func:`readable_tokens` gives.
        target: what is explained, for Captum's column "True Label".
        predicted: what the model predicted, for "Predicted Label".
        probability: the model's probability of ``predicted``; NaN where it is not known.
        skip: positions that do not set a row's scale, such as an attention sink that would
            leave all others pale. They are shown, clipped to the scale.

    Returns:
        One record a method, in order, for :func:`text_html` or Captum's ``visualize_text``:
        the method's name as attribution label, the sum of its raw scores as attribution score.

    Raises:
        ValueError: for scores of another shape than ``(T,)`` or not finite, or a wrong
            ``skip``.

    Example::

        >>> record, = text_records({"contribution": torch.tensor([0.5, -2.0])}, ["<s>", " no"])
        >>> record.word_attributions, record.raw_input_ids, record.attr_class
        (tensor([ 0.2500, -1.0000]), ['&lt;s&gt;', ' no'], 'contribution')
    """
    normalized = normalized_scores(scores, tokens, skip)
    # Escaping also keeps Captum from taking "<|im_start|>" for markup and cutting its brackets.
    escaped = [escape(token) for token in tokens]
    return [
        captum_text.VisualizationDataRecord(
            word_attributions=row,
            pred_prob=float(probability),
            pred_class=escape(predicted),
            true_class=escape(target),
            attr_class=escape(method),
            attr_score=_numbers(scores[method]).sum().item(),
            raw_input_ids=escaped,
            convergence_score=nan,
        )
        for method, row in normalized.items()
    ]


def text_html(
    records: Sequence[captum_text.VisualizationDataRecord], title: str = "Token scores"
) -> str:
    """One self-contained HTML page of text records, coloured by Captum.

    The page has the columns of Captum's ``visualize_text``, without those that no record
    fills, and needs no notebook.

    Args:
        records: records of :func:`text_records`; their texts are HTML already.
        title: the page's title, plain text.

    Returns:
        The page.

    Example::

        >>> page = text_html(text_records({"ig": torch.tensor([1.0, 0.0])}, ["<b>", "x"]))
        >>> "&lt;b&gt;" in page, "Predicted Label" in page
        (True, False)
    """
    columns = {
        "True Label": [str(record.true_class) for record in records],
        "Predicted Label": [_prediction(record) for record in records],
        "Attribution Label": [str(record.attr_class) for record in records],
        "Attribution Score": [f"{record.attr_score:.3g}" for record in records],
    }
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    head = "".join(f"<th>{heading}</th>" for heading in [*filled, "Word Importance"])
    rows = [
        "".join(f"<td>{cells[n]}</td>" for cells in filled.values())
        + captum_text.format_word_importances(record.raw_input_ids, record.word_attributions)
        for n, record in enumerate(records)
    ]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    legend = captum_text.format_word_importances(["negative", "neutral", "positive"], [-1, 0, 1])
    return html_page(
        title,
        f"<table><tr>{legend}</tr></table>\n"
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>",
    )


def _prediction(record: captum_text.VisualizationDataRecord) -> str:
    known = "" if isnan(record.pred_prob) else f"({record.pred_prob:.2f})"
    return f"{record.pred_class} {known}".strip()


def save_text(
    records: Sequence[captum_text.VisualizationDataRecord],
    path: str | PathLike[str],
    title: str = "Token scores",
) -> None:
    """Save the page of :func:`text_html` to ``path``.

    Args:
        records: records of :func:`text_records`.
        path: the file, usually ending in ``.html``.
        title: the page's title, plain text.

    Example::

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.html"
        >>> save_text(text_records({"ig": torch.tensor([1.0])}, ["x"]), path, title="One token")
        >>> "<h1>One token</h1>" in path.read_text(encoding="utf-8")
        True
    """
    Path(path).write_text(text_html(records, title), encoding="utf-8")
