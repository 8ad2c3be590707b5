"""Scenes and their rendering: fields, materials, cameras, renderers."""
