"""Gaussian splats: parameters, files, colours, growth."""
