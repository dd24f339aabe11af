"""What value geometry does: analyses of a model over texts."""
