"""Guidance towards a prompt: diffusion priors and the losses distilled from them."""
