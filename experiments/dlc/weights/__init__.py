"""Weights of the image models as they were released: read, made into work directories, written again."""
