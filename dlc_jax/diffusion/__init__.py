"""Gaussian diffusion of images and discrete diffusion of codes."""
