"""A comparison as a page people open: figures, curves, films, one sentence."""
