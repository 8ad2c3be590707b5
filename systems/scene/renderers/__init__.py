"""Renderers: from a field to pictures."""
