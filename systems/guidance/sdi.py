r"""Score distillation via inversion: SDS whose noise is that of the image.

$$g = w(t)\, \bigl(\hat\epsilon(x_t, t, c) - \kappa\bigr), \qquad
  x_t = \alpha_t x + \sigma_t \kappa,$$

where $x_t$ is the DDIM inversion of the image under the prompt with its own, negative
guidance (A. Lukoianov et al., 2024, arXiv 2405.15891). The published inversion
adds a little drawn noise in each step; here it is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from systems.guidance.inversion import invert, rising
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.scene.cameras import Cameras
from systems.settings.checks import between


@dataclass(frozen=True)
class SDIConfig(GuidanceConfig):
    """Score distillation via inversion (`system.guidance` in a config).

    Args:
        inversion_guidance_scale: Guidance scale of the inversion, as in diffusers;
            negative, so that the inversion undoes guidance.
        inversion_n_steps: Number of inversion steps, from 1 to 5.
    """

    guidance_scale: float = 7.5
    inversion_guidance_scale: float = -7.5
    inversion_n_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inversion_n_steps", self.inversion_n_steps, 1, 5)


class ScoreDistillationInversion(ScoreDistillation):
    """SDI."""

    Config = SDIConfig
    config: SDIConfig

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `ScoreDistillation.direction`."""
        del noise  # the inversion's own
        scale = self.config.inversion_guidance_scale

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            return self.predict(noisy, t, cameras, scale)

        times = rising(t, self.config.inversion_n_steps)
        x_t = invert(self.prior, x, times, predict)
        alpha, sigma = self.prior.scales(t)
        kappa = (x_t - alpha * x) / sigma
        return self.weight(t) * (self.predict(x_t, t, cameras) - kappa)
