"""The quantities that are compared between a changed and an unchanged pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from captum_cw.functional import check_choice, widest

__all__ = ["Logits", "Quantity", "QuantityName", "mean_nll", "quantity_of"]

QuantityName = Literal["perplexity", "nll", "log_prob", "prob", "kl"]


@dataclass(frozen=True)
class Logits:
    """What a quantity is computed from.

    Args:
        logits: ``(B, T, V)``, of the tokens of the text; ``(B, C)`` of a classifier.
        batch: What the model was given.
        real: ``(B, T)`` boolean, the positions that count.
        clean: The logits of the unchanged pass.
        target: ``(B,)``, the token or class whose probability counts.
        nll: ``(B,)``, see :func:`mean_nll`; None where the likelihood of the text is not known.
    """

    logits: Tensor
    batch: Mapping[str, Any]
    real: Tensor
    clean: Tensor
    target: Tensor
    nll: Tensor | None


@dataclass(frozen=True)
class Quantity:
    """One number an example.

    Args:
        compute: Gives ``(B,)``.
        higher_is_better: Whether more of it is better.
        of_text: Whether it is the likelihood of the text, which the model must predict.
        of_target: Whether it is of a target: a class, or the token after the text.
    """

    compute: Callable[[Logits], Tensor]
    higher_is_better: bool = False
    of_text: bool = False
    of_target: bool = False

    def __call__(self, logits: Logits) -> Tensor:
        """``(B,)``."""
        return self.compute(logits)


def mean_nll(logits: Tensor, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean negative log-likelihood of tokens, in nats.

    Args:
        logits: ``(B, N, V)``.
        ids: ``(B, N)``, the tokens that they predict.
        counted: ``(B, N)`` boolean, which of them count.

    Returns:
        ``(B,)``, float64 where the device has it, and how many tokens each is the mean of.

    Raises:
        ValueError: If no token of a text counts.

    Example:
        >>> nll, counts = mean_nll(torch.zeros(1, 2, 8), torch.tensor([[2, 3]]),
        ...                        torch.ones(1, 2, dtype=torch.bool))
        >>> round(float(nll.exp()), 4), counts.tolist()
        (8.0, [2])
    """
    counts = counted.sum(1)
    if (counts < 1).any():
        raise ValueError(
            f"Example {int((counts < 1).nonzero()[0])} has less than two tokens, or none that is "
            "predicted, so it has no perplexity: leave it out."
        )
    sums = []
    for b in range(len(ids)):  # one by one: a copy of all logits may not fit
        rows = logits[b][counted[b].to(logits.device)].float()
        targets = ids[b][counted[b].to(ids.device)].to(rows.device)
        losses = torch.nn.functional.cross_entropy(rows, targets, reduction="none")
        sums.append(losses.to(widest(losses.device)).sum())
    return torch.stack(sums) / counts.to(sums[0].device), counts


def last_rows(logits: Tensor, real: Tensor) -> Tensor:
    """``(B, V)``: the logits after the last token; those of a classifier as they are."""
    if logits.dim() == 2:
        return logits
    last = last_token(real).to(logits.device)
    return logits[torch.arange(len(last), device=last.device), last]


def _log_probability(given: Logits) -> Tensor:
    """Of the target, after the last token or as the class."""
    rows = last_rows(given.logits, given.real)
    rows = rows.to(widest(rows.device))
    return rows.log_softmax(-1).gather(-1, given.target[:, None].to(rows.device))[:, 0]


def _kl(given: Logits) -> Tensor:
    """Of the changed from the unchanged distribution: of classes, or of tokens (mean over them)."""
    rows = []
    for b in range(len(given.real)):
        real = given.real[b].to(given.logits.device) if given.logits.dim() == 3 else slice(None)
        clean = given.clean[b][real].float().log_softmax(-1)
        changed = given.logits[b][real].float().log_softmax(-1)
        divergences = (clean.exp() * (clean - changed)).sum(-1)
        rows.append(divergences.to(widest(divergences.device)).mean())
    return torch.stack(rows)


# Functions with names, and no closures, so that what holds a quantity can be pickled.


def _nll(given: Logits) -> Tensor:
    assert given.nll is not None  # where it is not known, this quantity is refused
    return given.nll


def _perplexity(given: Logits) -> Tensor:
    return _nll(given).exp()


def _probability(given: Logits) -> Tensor:
    return _log_probability(given).exp()


def last_token(real: Tensor) -> Tensor:
    """``(B,)``: the place of each example's last real token."""
    places = torch.arange(real.shape[1], device=real.device)
    return (real * places).argmax(1)


QUANTITIES: dict[QuantityName, Quantity] = {
    "perplexity": Quantity(_perplexity, of_text=True),
    "nll": Quantity(_nll, of_text=True),
    "log_prob": Quantity(_log_probability, higher_is_better=True, of_target=True),
    "prob": Quantity(_probability, higher_is_better=True, of_target=True),
    "kl": Quantity(_kl),
}


def quantity_of(quantity: QuantityName | Callable[..., Tensor]) -> Quantity:
    """The quantity of that name, or one from a callable ``(logits, batch, clean_logits) -> (B,)``.

    A callable may have an attribute ``higher_is_better``; without it, less is better.
    """
    if not callable(quantity):
        check_choice("quantity", quantity, QuantityName)
        return QUANTITIES[quantity]
    return Quantity(partial(_checked, quantity), bool(getattr(quantity, "higher_is_better", False)))


def _checked(compute: Callable[..., Tensor], given: Logits) -> Tensor:
    values = compute(given.logits, given.batch, given.clean)
    B = len(given.real)
    if not isinstance(values, Tensor) or values.shape != (B,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"quantity gave {shape}, not one number an example: ({B},).")
    return values.to(widest(values.device))
