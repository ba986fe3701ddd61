"""The language experiments: fine-tuning, reward models, policies, the translation and Lewis games."""
