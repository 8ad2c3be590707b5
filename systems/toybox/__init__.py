"""The embedded priors: procedural objects with exact truth, and models of them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline folder of the first prior, which comes with the repository."""
SECOND_WEIGHTS = Path(__file__).parent / "weights2"
"""Where the pipeline folder of the second prior belongs, once it is trained."""
