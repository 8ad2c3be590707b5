"""The guidances by their names in configs; importing this imports diffusers."""

from collections.abc import Mapping

from systems.guidance.base import Guidance
from systems.guidance.csd import ClassifierScoreDistillation
from systems.guidance.ism import IntervalScoreMatching
from systems.guidance.refine import Refinement
from systems.guidance.sdi import ScoreDistillationInversion
from systems.guidance.sds import (
    DeepFloydGuidance,
    PerpendicularNegatives,
    ScoreDistillation,
    StableDiffusionGuidance,
)

GUIDANCES: Mapping[str, type[Guidance]] = {
    "diffusers-guidance": ScoreDistillation,
    "stable-diffusion-guidance": StableDiffusionGuidance,
    "deep-floyd-guidance": DeepFloydGuidance,
    "csd-guidance": ClassifierScoreDistillation,
    "ism-guidance": IntervalScoreMatching,
    "sdi-guidance": ScoreDistillationInversion,
    "perp-neg-guidance": PerpendicularNegatives,
    "refine-guidance": Refinement,
}
"""The names that begin with `stable-diffusion` and `deep-floyd`, and how they count the
guidance scale, are threestudio's."""
