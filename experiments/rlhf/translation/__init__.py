"""The translation game."""
