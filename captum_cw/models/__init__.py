"""Loading models, looking into them, and the list of tested architectures."""
