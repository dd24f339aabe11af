"""The logits in the output of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["logits_of", "predictions_of"]


def logits_of(output: object, ranks: tuple[int, ...] = (3,)) -> Tensor:
    """Return the logits in a model's output: its ``.logits``, or the first tensor that fits.

    Args:
        output: A ``ModelOutput``, a mapping, a tuple such as ``(logits, loss)``, or a tensor.
        ranks: The allowed numbers of dimensions: 3 for ``(B, T, V)``, 2 for ``(B, C)``.

    Returns:
        The logits.

    Raises:
        TypeError: If the output does not have a floating-point tensor of such a rank.

    Example:
        >>> logits_of((torch.zeros(2), torch.zeros(1, 5, 64))).shape
        torch.Size([1, 5, 64])
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    # Other named outputs, such as hidden states, are not logits.
    listed = output if isinstance(output, (list, tuple)) else (output,)
    for x in listed if named is None else (named,):
        if isinstance(x, Tensor) and x.dim() in ranks and x.is_floating_point():
            return x
    shapes = " or ".join({2: "(B, C)", 3: "(B, T, V)"}[rank] for rank in ranks)
    raise TypeError(
        f"The model returned {type(output).__name__} without logits {shapes}: give a model that "
        "predicts tokens or classes, such as AutoModelForCausalLM."
    )


def predictions_of(output: object) -> Tensor:
    """Return the logits of tokens ``(B, T, V)``, or else those of classes, ``(B, C)``.

    Raises:
        TypeError: If the output has neither.

    Example:
        >>> losses, logits = torch.zeros(1, 5), torch.zeros(1, 5, 64)
        >>> predictions_of((losses, logits)).shape, predictions_of(losses).shape
        (torch.Size([1, 5, 64]), torch.Size([1, 5]))
    """
    try:
        return logits_of(output)
    except TypeError:
        return logits_of(output, (2, 3))
