"""Whether scores depend on what a model has learned (Adebayo et al., 2018)."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["with_shuffled_weights"]


def with_shuffled_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of a model whose numbers are shuffled within each weight.

    The copy has learned nothing. The scores of a method on the copy should find the tokens that
    matter to the model far worse than its scores on the model itself. They may still be better
    than chance: the causal mask alone lets early tokens be seen more often.

    Args:
        model: the model, which does not change.
        seed: the random seed of the permutations.

    Returns:
        The copy. Its weights keep their norms, so its activations roughly keep theirs.

    Example:
        >>> methods = {
        ...     "contribution": ContributionWeights(model),
        ...     "of a shuffled model": ContributionWeights(with_shuffled_weights(model)),
        ... }
        >>> metric = ComprehensivenessSufficiency(model, rates=[0.5])
        >>> texts = tokenizer("The capital of France is Paris", return_tensors="pt")
        >>> metric.evaluate(methods, texts).methods
        ['contribution', 'of a shuffled model']
    """
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in shuffled.parameters():  # a shared weight comes once
            order = torch.randperm(weight.numel(), generator=generator, device="cpu")
            weight.copy_(weight.flatten()[order.to(weight.device)].view_as(weight))
    return shuffled
