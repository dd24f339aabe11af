"""Token scores as coloured text, in Captum's text records."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from math import isnan, nan
from typing import Any

import torch
from captum.attr import visualization as captum_text
from torch import Tensor

_STYLE = """\
body { font-family: sans-serif; margin: 2em; color: #222; background: #fff; }
h1 { font-size: 1.3em; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.3em 0.8em; border-top: 1px solid #ddd; }
th, td:not(:last-child) { white-space: nowrap; }
"""


def normalized_scores(
    scores: Mapping[str, Tensor], tokens: Sequence[str], skip: Collection[int]
) -> dict[str, Tensor]:
    """Divide each method's scores ``(T,)`` by their largest absolute value.

    Positions in ``skip`` do not set the scale. Their scores are clipped to [-1, 1].
    """
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores are of type {type(scores).__name__}: name their method, such as "
            '{"contribution": scores}.'
        )
    length = len(tokens)
    for position in skip:
        if not -length <= position < length:
            raise ValueError(f"skip holds {position}, which is not a position of {length} tokens")
    if not scores:
        raise ValueError("scores are empty, expected a dict of method names and (T,) tensors")
    counted = torch.ones(length, dtype=torch.bool, device="cpu")
    counted[list(skip)] = False
    if not counted.any():
        raise ValueError(f"skip={skip!r} leaves none of the {length} tokens to set the scale")
    normalized = {}
    for method, given in scores.items():
        values = _to_float64(given)
        if values.shape != (length,):
            raise ValueError(
                f"the scores of {method!r} have shape {tuple(values.shape)}, expected "
                f"({length},), one per token; for a batch, give one row and its tokens"
            )
        if not values.isfinite().all():
            position = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"the scores of {method!r} hold {values[position].item()} at position "
                f"{position} ({tokens[position]!r}): replace it, for example with nan_to_num()"
            )
        peak = values[counted].abs().max()
        scaled = (values / peak).clamp(-1, 1) if peak > 0 else values.sign()
        normalized[method] = scaled.float()
    return normalized


def _to_float64(scores: Any) -> Tensor:
    # Some devices have no float64, so the scores go to the CPU first.
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
    """Build Captum text records, one per method, that compare scores of the same tokens.

    Captum clips scores to [-1, 1] and does not escape tokens. So each row is divided by its largest
    absolute value first, and all texts are escaped.

    Args:
        scores: Scores by method, ``(T,)`` each, in any unit: token scores, Integrated Gradients.
        tokens: ``T`` strings, such as those of :func:`readable_tokens`.
        target: What is explained, for Captum's column "True Label".
        predicted: What the model predicted, for "Predicted Label".
        probability: The model's probability of ``predicted``; NaN if unknown.
        skip: Positions that do not set the scale of a row, such as an attention sink that would
            make all others pale. They are shown, clipped to the scale.

    Returns:
        One record per method, in order, for :func:`text_html` or Captum's ``visualize_text``. The
        attribution label is the method's name, and the attribution score is the sum of its scores.

    Raises:
        ValueError: If scores are not finite or do not have shape ``(T,)``, or ``skip`` is invalid.

    Example::

        >>> record, = text_records({"contribution": torch.tensor([0.5, -2.0])}, ["<s>", " no"])
        >>> record.word_attributions, record.raw_input_ids, record.attr_class
        (tensor([ 0.2500, -1.0000]), ['&lt;s&gt;', ' no'], 'contribution')
    """
    normalized = normalized_scores(scores, tokens, skip)
    # Without escaping, Captum would also cut the brackets of tokens such as "<|im_start|>".
    escaped = [escape(token) for token in tokens]
    return [
        captum_text.VisualizationDataRecord(
            word_attributions=row,
            pred_prob=float(probability),
            pred_class=escape(predicted),
            true_class=escape(target),
            attr_class=escape(method),
            attr_score=_to_float64(scores[method]).sum().item(),
            raw_input_ids=escaped,
            convergence_score=nan,
        )
        for method, row in normalized.items()
    ]


def text_html(
    records: Sequence[captum_text.VisualizationDataRecord], title: str = "Token scores"
) -> str:
    """Return a self-contained HTML page of text records, coloured by Captum.

    The page has the columns of Captum's ``visualize_text``, except those that are empty in all
    records. It needs no notebook.

    Args:
        records: Records of :func:`text_records`, whose texts are already HTML.
        title: The title of the page, as plain text.

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
    title = escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n<table><tr>{legend}</tr></table>\n"
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"
        "</body>\n</html>\n"
    )


def _prediction(record: captum_text.VisualizationDataRecord) -> str:
    """Return the predicted label with its probability, if known."""
    known = "" if isnan(record.pred_prob) else f"({record.pred_prob:.2f})"
    return f"{record.pred_class} {known}".strip()
