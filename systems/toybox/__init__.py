"""The embedded prior: procedural objects with exact truth, and a model of them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline folder that comes with the repository."""
