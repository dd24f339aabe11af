"""Find attention sinks, and measure how much attention they take.

A token is a sink of a layer if its hidden state is nearly collinear with that of the first token:
their cosine is above 0.95 (arXiv 2606.07604, section 5). The paper does not say which hidden state
it means. The default here is the normalised input of the attention layer. The first token is always
a sink. The sink rate is that of Gu et al. 2024 (arXiv 2410.10781).
"""

from __future__ import annotations

from functools import partial
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

#: The cosine with the first token above which a token is a sink.
THRESHOLD = 0.95


def sinks_among(states: Tensor, real: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Find the tokens whose hidden states are nearly collinear with that of the first token.

    Args:
        states: The hidden states, ``(B, S, n)``.
        real: The token mask, ``(B, S)`` boolean, False at padding.
        threshold: The cosine above which a token is a sink.

    Returns:
        ``(B, S)`` boolean. The first token after padding is always a sink, padding never.

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
    """Find the sinks of a layer, ``(B, S)`` boolean.

    Args:
        execution: The execution of the layer, with the hidden states of its tokens.
        layer: The layer's tensors.
        threshold: The cosine above which a token is a sink.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> sinks, _ = Runner(model).observe(ids, layer_sinks, states="normed")
        >>> [tuple(of_layer.shape) for _, of_layer in sinks]
        [(1, 5), (1, 5)]
    """
    states = execution.states
    assert states is not None  # the observation was asked for them
    # Keys and values of a learned prefix come before those of the text.
    return sinks_among(states[:, -layer.S :], real_tokens(layer), threshold)


def real_tokens(layer: AttentionLayer) -> Tensor:
    """Return the token mask of a layer over one text, ``(B, S)`` boolean, False at padding.

    Args:
        layer: A layer whose queries and keys are the same tokens.

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
            "without a cache or with an empty one that grows with the text."
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
    """Find the sinks of each attention layer in one forward pass.

    Args:
        model: The model.
        inputs: The inputs of ``ContributionWeights.attribute``.
        additional_forward_args: Further positional arguments of the model, as in Captum.
        layer: An attention module, a list of them, or None for all.
        threshold: The cosine above which a token is a sink.
        space: The hidden states that are compared: ``"normed"``, the input of the attention layer;
            ``"residual"``, the residual stream before its norm; or ``"key"`` or ``"value"``, the
            keys or values of all heads.
        show_progress: Whether to show a progress bar over the layers after two seconds.

    Returns:
        For each layer, in execution order, ``(B, S)`` boolean. Padding is never a sink.

    Raises:
        ValueError: If ``space`` is unknown. Other errors are those of
            ``ContributionWeights.attribute``.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> sinks = find_sinks(model, ids)
        >>> len(sinks), sinks[0][:, 0].tolist()
        (2, [True])
    """
    check_choice("space", space, StateSpace)
    results, _ = Runner(model, layer).observe(
        inputs,
        partial(layer_sinks, threshold=threshold),
        additional_forward_args,
        states=space,
        show_progress=show_progress,
    )
    return [sinks for _, sinks in results]


def first_token_mass(
    model: nn.Module, inputs: Inputs, additional_forward_args: object = None
) -> Tensor:
    """Return the mean attention of each head to the first token, over the queries that see it.

    Args:
        model: The model.
        inputs: The inputs of ``ContributionWeights.attribute``.
        additional_forward_args: Further positional arguments of the model, as in Captum.

    Returns:
        ``(B, L, H)``, between 0 and 1.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> first_token_mass(model, ids).shape
        torch.Size([1, 2, 4])
    """
    return _mean_attention(model, inputs, additional_forward_args, token=0)


def sink_rate(
    model: nn.Module,
    inputs: Inputs,
    additional_forward_args: object = None,
    *,
    token: int = 0,
    epsilon: float = 0.3,
) -> float:
    """Return the share of examples, layers and heads in which a token draws much attention.

    Args:
        model: The model.
        inputs: The inputs of ``ContributionWeights.attribute``.
        additional_forward_args: Further positional arguments of the model, as in Captum.
        token: The position of the token, without padding. The default is the first token.
        epsilon: The mean attention, over the queries that see the token, above which attention is
            much (Gu et al. 2024, Eq. 7: 0.3).

    Returns:
        A share between 0 and 1.

    Raises:
        IndexError: If the text does not have such a token.

    Example:
        >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> sink_rate(model, ids, epsilon=0.0)
        1.0
    """
    received = _mean_attention(model, inputs, additional_forward_args, token)
    return float((received > epsilon).float().mean())


def _mean_attention(
    model: nn.Module, inputs: Inputs, additional_forward_args: object, token: int
) -> Tensor:
    """Return the mean attention to a token, over the queries that see it, ``(B, L, H)``."""
    method = TokenScores(AttentionWeights(model), layers=None, heads=None)
    scores: Tensor = method.attribute(inputs, additional_forward_args)
    # Padding has no attention. A real token has some: it sees itself, or other tokens see it.
    real = scores.amax((1, 2)) > 0
    shortest = int(real.sum(1).min())
    if not 0 <= token < shortest:
        raise IndexError(f"token={token}, but the shortest text has {shortest} tokens.")
    first = real.long().argmax(1)
    place = (first + token)[:, None, None, None].expand(*scores.shape[:3], 1)
    attention: Tensor = scores.gather(-1, place)[..., 0]
    return attention
