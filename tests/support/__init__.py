"""What several test modules share: small models, inputs, slow references, states of models."""
