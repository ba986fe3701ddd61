"""Discrete Latent Codes: one file a trained model, each building what the one loop runs."""
