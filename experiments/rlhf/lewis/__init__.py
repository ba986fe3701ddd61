"""The Lewis game."""
