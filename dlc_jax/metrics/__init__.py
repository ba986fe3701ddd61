"""Measures of samples and of representations."""
