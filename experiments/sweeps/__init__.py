"""Grids of ordinary runs: which there are, how they are started, and what they show together."""
