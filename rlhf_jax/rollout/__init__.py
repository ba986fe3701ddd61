"""Rollouts: batches of completions, streams that make them while the learner trains, and weights that travel to
them."""
