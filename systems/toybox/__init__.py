"""The embedded priors: procedural objects with ground truth, and models of them."""

import os
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline folder of the first prior, which comes with the repository."""
SECOND_WEIGHTS = Path(__file__).parent / "weights2"
"""Where the pipeline folder of the second prior belongs, once it is trained."""
FOLDER = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "dreampropeller"
    / "toybox2"
)
"""Where views, training state and exported weights are kept between parts of a run."""
