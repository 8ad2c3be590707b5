"""The guidances by their names in configs; importing this imports diffusers."""

from collections.abc import Mapping

from systems.guidance.base import Guidance
from systems.guidance.sds import (
    DeepFloydGuidance,
    ScoreDistillation,
    StableDiffusionGuidance,
)

GUIDANCES: Mapping[str, type[Guidance]] = {
    "diffusers-guidance": ScoreDistillation,
    "stable-diffusion-guidance": StableDiffusionGuidance,
    "deep-floyd-guidance": DeepFloydGuidance,
}
"""The last two names, and how they count the guidance scale, are threestudio's."""
