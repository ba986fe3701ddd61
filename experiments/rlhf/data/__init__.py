"""Texts, prompts and preferences of the experiments."""
