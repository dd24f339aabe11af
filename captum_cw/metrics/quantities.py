"""The quantities that are compared between a changed and an unchanged pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from captum_cw.functional import check_choice, widest

__all__ = ["Logits", "Quantity", "QuantityName", "last_rows", "mean_nll", "quantity_of"]

QuantityName = Literal["perplexity", "nll", "log_prob", "prob", "kl"]


@dataclass(frozen=True)
class Logits:
    """The logits of a pass, with all that a quantity is computed from.

    Args:
        logits: ``(B, T, V)`` at the tokens of the text, or ``(B, C)`` of a classifier.
        batch: the arguments of the model.
        mask: ``(B, T)`` boolean, True at tokens that count.
        clean: the logits of the unchanged pass.
        target: ``(B,)``, the token or class whose probability counts.
        nll: ``(B,)``, see :func:`mean_nll`; None if the likelihood of the text is not known.
    """

    logits: Tensor
    batch: Mapping[str, Any]
    mask: Tensor
    clean: Tensor
    target: Tensor
    nll: Tensor | None


@dataclass(frozen=True)
class Quantity:
    """A number per example.

    Args:
        compute: computes the quantity, ``(B,)``.
        higher_is_better: whether more of it is better.
        of_text: whether it is a likelihood of the text, whose tokens the model must predict.
        of_target: whether it belongs to a target: a class, or the token after the text.
    """

    compute: Callable[[Logits], Tensor]
    higher_is_better: bool = False
    of_text: bool = False
    of_target: bool = False


def mean_nll(logits: Tensor, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean negative log-likelihood of tokens, in nats.

    Args:
        logits: ``(B, N, V)``.
        ids: ``(B, N)``, the tokens that the logits predict.
        counted: ``(B, N)`` boolean, True at tokens that count.

    Returns:
        The means ``(B,)``, in float64 if the device supports it, and the numbers of tokens that
        they are the means of, ``(B,)``.

    Raises:
        ValueError: If no token of an example counts.

    Example:
        >>> nll, counts = mean_nll(
        ...     torch.zeros(1, 2, 8), torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.bool)
        ... )
        >>> round(float(nll.exp()), 4), counts.tolist()
        (8.0, [2])
    """
    counts = counted.sum(1)
    if (counts < 1).any():
        raise ValueError(
            f"Example {int((counts < 1).nonzero()[0])} has fewer than two tokens, or none that is "
            "predicted, so it has no perplexity: leave it out."
        )
    sums = []
    for b in range(len(ids)):  # one by one: a copy of all logits may not fit
        rows = logits[b][counted[b].to(logits.device)].float()
        targets = ids[b][counted[b].to(ids.device)].to(rows.device)
        losses = torch.nn.functional.cross_entropy(rows, targets, reduction="none")
        sums.append(losses.to(widest(losses.device)).sum())
    return torch.stack(sums) / counts.to(sums[0].device), counts


def last_rows(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits at the last token of each example, ``(B, V)``; of a classifier, as given.

    Args:
        logits: ``(B, T, V)``, or ``(B, C)`` of a classifier.
        mask: ``(B, T)`` boolean, False at padding.

    Example:
        >>> logits = torch.arange(6.0).view(1, 3, 2)
        >>> last_rows(logits, torch.tensor([[True, True, False]]))
        tensor([[2., 3.]])
    """
    if logits.dim() == 2:
        return logits
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1).to(logits.device)
    return logits[torch.arange(len(last), device=last.device), last]


# These are functions, not closures, so that an object that holds a quantity can be pickled.


def _nll(given: Logits) -> Tensor:
    assert given.nll is not None  # otherwise the quantity is refused
    return given.nll


def _perplexity(given: Logits) -> Tensor:
    return _nll(given).exp()


def _log_probability(given: Logits) -> Tensor:
    rows = last_rows(given.logits, given.mask)
    rows = rows.to(widest(rows.device))
    return rows.log_softmax(-1).gather(-1, given.target[:, None].to(rows.device))[:, 0]


def _probability(given: Logits) -> Tensor:
    return _log_probability(given).exp()


def _kl(given: Logits) -> Tensor:
    """Return KL(clean || changed), of classes or as a mean over tokens, ``(B,)``."""
    divergences = []
    for b in range(len(given.mask)):
        rows = given.mask[b].to(given.logits.device) if given.logits.dim() == 3 else slice(None)
        clean = given.clean[b][rows].float().log_softmax(-1)
        changed = given.logits[b][rows].float().log_softmax(-1)
        # A token that cannot come, as in padded vocabularies, adds nothing.
        kl = (clean.exp() * (clean - changed)).masked_fill(clean == -torch.inf, 0).sum(-1)
        divergences.append(kl.to(widest(kl.device)).mean())
    return torch.stack(divergences)


QUANTITIES: dict[QuantityName, Quantity] = {
    "perplexity": Quantity(_perplexity, of_text=True),
    "nll": Quantity(_nll, of_text=True),
    "log_prob": Quantity(_log_probability, higher_is_better=True, of_target=True),
    "prob": Quantity(_probability, higher_is_better=True, of_target=True),
    "kl": Quantity(_kl),
}


def quantity_of(quantity: QuantityName | Callable[..., Tensor]) -> Quantity:
    """Return the quantity of a name, or of a callable ``(logits, batch, clean_logits) -> (B,)``.

    If more of a callable's quantity is better, its attribute ``higher_is_better`` is True.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> quantity_of("prob").higher_is_better
        True
    """
    if not callable(quantity):
        check_choice("quantity", quantity, QuantityName)
        return QUANTITIES[quantity]
    return Quantity(partial(_checked, quantity), bool(getattr(quantity, "higher_is_better", False)))


def _checked(compute: Callable[..., Tensor], given: Logits) -> Tensor:
    values = compute(given.logits, given.batch, given.clean)
    expected = (len(given.mask),)
    if not isinstance(values, Tensor) or values.shape != expected:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"quantity must return one number per example, {expected}, got {shape}.")
    return values.to(widest(values.device))
