"""How good samples and representations are."""
