"""Which tokens are attention sinks, and how much attention they take.

A token is a sink of a layer where its hidden state is nearly collinear with that of the first
token: cosine above 0.95 (arXiv 2606.07604, section 5). The paper does not say which hidden state;
here it is the normalised input of the attention layer, and others can be chosen. The first
token always is one. The sink rate is that of Gu et al. 2024 (arXiv 2410.10781).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_cw.attr import AttentionWeights, TokenScores
from captum_cw.capture import Execution, StateSpace
from captum_cw.capture.run import Inputs, Runner
from captum_cw.functional import AttentionLayer, check_choice

__all__ = [
    "THRESHOLD",
    "find_sinks",
    "first_token_mass",
    "layer_sinks",
    "real_tokens",
    "sink_rate",
    "sinks_among",
]

#: Of the cosine with the first token.
THRESHOLD = 0.95


def sinks_among(states: Tensor, real: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The tokens whose states are nearly collinear with that of the first real one.

    Args:
        states: ``(B, S, n)``.
        real: ``(B, S)`` boolean, False at padding.
        threshold: Cosines above it count.

    Returns:
        ``(B, S)`` boolean; the first real token always is one, padding never.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]])
        >>> sinks_among(states, torch.ones(1, 3, dtype=torch.bool)).tolist()
        [[True, False, True]]
    """
    states = states.float()
    first = real.long().argmax(1)
    examples = torch.arange(len(states), device=states.device)
    cosines = torch.cosine_similarity(states, states[examples, first][:, None], dim=-1)
    sinks = (cosines > threshold) & real
    sinks[examples, first] = True
    return sinks


def layer_sinks(
    execution: Execution, layer: AttentionLayer, threshold: float = THRESHOLD
) -> Tensor:
    """The sinks of a layer that was observed with its hidden states, ``(B, S)``.

    Example:
        >>> sinks, _ = Runner(model).observe(input_ids, layer_sinks, states="normed")
        >>> [tuple(found.shape) for _, found in sinks]
        [(1, 5), (1, 5)]
    """
    states = execution.states
    assert states is not None  # asked for
    # Of keys and values there may be more, of learned virtual tokens before those of the text.
    return sinks_among(states[:, -layer.S :], real_tokens(layer), threshold)


def real_tokens(layer: AttentionLayer) -> Tensor:
    """``(B, S)`` boolean, False at padding, of a layer whose queries and keys are one text.

    Raises:
        ValueError: If there are more keys than queries.

    Example:
        >>> layer = AttentionLayer.from_tensors(
        ...     torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> real_tokens(layer).tolist()
        [[True, True, True]]
    """
    if layer.T != layer.S:
        raise ValueError(
            f"A layer has {layer.S} keys for {layer.T} queries: give the whole text at once, "
            "without a cache or with one that grows with the text."
        )
    real = layer.mask.real
    B, device = layer.value.shape[0], layer.value.device
    return torch.ones(B, layer.T, dtype=torch.bool, device=device) if real is None else real


def find_sinks(
    model: nn.Module,
    inputs: Inputs,
    additional_forward_args: object = None,
    *,
    layer: Any = None,
    threshold: float = THRESHOLD,
    space: StateSpace = "normed",
    show_progress: bool = False,
) -> list[Tensor]:
    """The sinks of each attention layer, by one forward pass.

    Args:
        model: The model.
        inputs: As ``ContributionWeights.attribute`` takes them.
        additional_forward_args: Further positional arguments, as in Captum.
        layer: An attention module, a list of them, or None for all.
        threshold: Tokens whose cosine with the first one is above it are sinks.
        space: Of the states that are compared: ``"normed"``, the input of the attention layer;
            ``"residual"``, what was normalised to it; ``"key"`` or ``"value"``, over all heads.
        show_progress: Shows a bar over the layers once it has taken two seconds.

    Returns:
        For each layer, in execution order, ``(B, S)`` boolean; padding is never a sink.

    Raises:
        ValueError: If ``space`` is unknown, and as ``ContributionWeights.attribute``.

    Example:
        >>> sinks = find_sinks(model, input_ids)
        >>> len(sinks), sinks[0][:, 0].tolist()
        (2, [True])
    """
    check_choice("space", space, StateSpace)

    def on_layer(execution: Execution, seen: AttentionLayer) -> Tensor:
        return layer_sinks(execution, seen, threshold)

    results, _ = Runner(model, layer).observe(
        inputs,
        on_layer,
        additional_forward_args,
        states=space,
        description="Sinks: layers",
        show_progress=show_progress,
    )
    return [sinks for _, sinks in results]


def first_token_mass(
    model: nn.Module, inputs: Inputs, additional_forward_args: object = None
) -> Tensor:
    """The mean attention that each head gives to the first token, over the queries that see it.

    Args:
        model: The model.
        inputs: As ``ContributionWeights.attribute`` takes them.
        additional_forward_args: Further positional arguments, as in Captum.

    Returns:
        ``(B, L, H)``, between 0 and 1.

    Example:
        >>> first_token_mass(model, input_ids).shape
        torch.Size([1, 2, 4])
    """
    scores, first = _received(model, inputs, additional_forward_args)
    return scores.gather(-1, first[:, None, None, None].expand(*scores.shape[:3], 1))[..., 0]


def sink_rate(
    model: nn.Module,
    inputs: Inputs,
    additional_forward_args: object = None,
    *,
    token: int = 0,
    epsilon: float = 0.3,
) -> float:
    """The share of examples, layers and heads in which a token draws much attention.

    Args:
        model: The model.
        inputs: As ``ContributionWeights.attribute`` takes them.
        additional_forward_args: Further positional arguments, as in Captum.
        token: Its place among the real tokens; the first by default.
        epsilon: Much is a mean over the queries that see the token above this
            (Gu et al. 2024, Eq. 7: 0.3).

    Returns:
        Between 0 and 1.

    Example:
        >>> sink_rate(model, input_ids, epsilon=0.0)
        1.0
    """
    scores, first = _received(model, inputs, additional_forward_args)
    if not 0 <= token < scores.shape[-1]:
        raise IndexError(f"token={token}, but the text has {scores.shape[-1]} tokens.")
    place = (first + token)[:, None, None, None].expand(*scores.shape[:3], 1)
    return float((scores.gather(-1, place) > epsilon).float().mean())


def _received(
    model: nn.Module, inputs: Inputs, additional_forward_args: object
) -> tuple[Tensor, Tensor]:
    """Mean attention by token, ``(B, L, H, S)``, and the place of the first real one, ``(B,)``."""
    method = TokenScores(AttentionWeights(model), layers=None, heads=None)
    scores = method.attribute(inputs, additional_forward_args)
    # No real token is without attention: it sees itself, or is seen.
    first = (scores.amax((1, 2)) > 0).long().argmax(1)
    return scores, first
