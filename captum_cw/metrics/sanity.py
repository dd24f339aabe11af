"""Whether scores depend on what a model has learnt (Adebayo et al. 2018)."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["with_shuffled_weights"]


def with_shuffled_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model that has learnt nothing: the entries of each weight change places.

    Scores that a method takes from the copy should find what matters to the model far worse than
    those from the model itself. They may still beat chance: what follows from the causal mask
    alone, such as that early tokens are seen more often, needs no learning.

    Args:
        model: The model, which is left as it is.
        seed: Of the permutations.

    Returns:
        The copy; weights keep their sizes, so that activations keep theirs, roughly.

    Example:
        >>> methods = {
        ...     "contribution": ContributionWeights(model),
        ...     "of a shuffled model": ContributionWeights(with_shuffled_weights(model)),
        ... }
        >>> metric = ComprehensivenessSufficiency(model, rates=[0.5])
        >>> metric.evaluate(methods, input_ids).methods
        ['contribution', 'of a shuffled model']
    """
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in shuffled.parameters():  # those that are shared come once
            order = torch.randperm(weight.numel(), generator=generator, device="cpu")
            weight.copy_(weight.flatten()[order.to(weight.device)].view_as(weight))
    return shuffled
