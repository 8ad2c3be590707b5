"""The comparison page: figures, curves, videos and a verdict."""
