"""The figures of the analyses."""
