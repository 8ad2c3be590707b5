"""The guidances by the names configs use; importing it imports diffusers."""

from collections.abc import Mapping

from systems.guidance.base import Guidance
from systems.guidance.sds import DeepFloyd, ScoreDistillation, StableDiffusion

GUIDANCES: Mapping[str, type[Guidance]] = {
    "diffusers-guidance": ScoreDistillation,
    "stable-diffusion-guidance": StableDiffusion,
    "deep-floyd-guidance": DeepFloyd,
}
"""One class serves all diffusers pipelines, in threestudio's words under its names."""
