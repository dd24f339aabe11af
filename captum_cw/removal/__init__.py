"""Removing tokens: how pairs of head and token are scored, ranked, protected and removed."""

from captum_cw.removal.interventions import remove_tokens, remove_values, scale_values

__all__ = ["remove_tokens", "remove_values", "scale_values"]
