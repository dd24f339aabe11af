"""Score, rank and remove pairs of head and token in the passes of a model."""

from captum_cw.removal.interventions import remove_tokens, remove_values, scale_values

__all__ = ["remove_tokens", "remove_values", "scale_values"]
