"""Loading and inspecting models, and the list of tested architectures."""
