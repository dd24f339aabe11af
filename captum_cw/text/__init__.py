"""Readable tokens, chat templates, and the inputs of models for one text."""
