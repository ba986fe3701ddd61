"""Policies trained on what they sample."""
