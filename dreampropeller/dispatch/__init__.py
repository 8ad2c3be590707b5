"""Dispatchers: evaluation of the drifts of a window."""
