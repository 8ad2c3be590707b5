"""Meshes from anywhere: reading, cleaning, texture coordinates and baked colours."""
