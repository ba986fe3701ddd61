"""Tasks: prompts, rewards and reference metrics."""
