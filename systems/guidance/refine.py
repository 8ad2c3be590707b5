r"""Refinement towards denoised images: the second stage of DreamGaussian.

A rendered image is noised to timestep t and denoised along N evenly spaced DDIM steps,

$$\hat x = \operatorname{DDIM}_N(\alpha_t x + \sigma_t \epsilon; c), \qquad
  g = w\,(x - \hat x),$$

so that x moves to an image like itself with sharper detail (J. Tang et al., 2023, arXiv
2309.16653, section 3.3: the gradient of $\|x - \hat x\|^2$ with $\hat x$ held; for a
latent model x is the latent here). Noise and timestep are functions of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from systems.guidance.inversion import rising
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.scene.cameras import Cameras
from systems.settings.checks import between
from systems.settings.schedules import Schedule


@dataclass(frozen=True)
class RefineConfig(GuidanceConfig):
    """Refinement towards denoised images (`system.guidance` in a config).

    Args:
        refine_n_steps: Number of denoising steps, from 1 to 50.
        refine_weight: Weight w of the gradient.
        min_step_percent: Smallest timestep that images are noised to, as a fraction of
            all timesteps; a number or a schedule.
        max_step_percent: Largest timestep, likewise.
    """

    guidance_scale: float = 7.5
    min_step_percent: Schedule = 0.5
    max_step_percent: Schedule = 0.8
    refine_n_steps: int = 5
    refine_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        between("refine_n_steps", self.refine_n_steps, 1, 50)


class Refinement(ScoreDistillation):
    """Refinement towards denoised images."""

    Config = RefineConfig
    config: RefineConfig

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `ScoreDistillation.direction`."""
        noisy = self.prior.add_noise(x, noise, t)
        times = rising(t, self.config.refine_n_steps)[::-1]
        clean = noisy
        for now, later in zip(times, [*times[1:], None], strict=True):
            alpha, sigma = self.prior.scales(now)
            predicted = self.predict(noisy, now, cameras)
            clean = (noisy - sigma * predicted) / alpha
            if later is not None:
                alpha, sigma = self.prior.scales(later)
                noisy = alpha * clean + sigma * predicted
        return self.config.refine_weight * (x - clean)
