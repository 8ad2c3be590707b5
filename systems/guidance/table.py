"""The guidances by the names configs use; importing it imports diffusers."""

from collections.abc import Mapping

from systems.guidance.base import Guidance
from systems.guidance.sds import ScoreDistillation

GUIDANCES: Mapping[str, type[Guidance]] = {
    "diffusers-guidance": ScoreDistillation,
    "stable-diffusion-guidance": ScoreDistillation,
    "deep-floyd-guidance": ScoreDistillation,
}
"""One class serves all diffusers pipelines; the last two names are threestudio's."""
