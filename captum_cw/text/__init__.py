"""Tokens that a person can read, and the templates that chats are put into."""
