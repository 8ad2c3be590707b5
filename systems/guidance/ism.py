r"""Interval score matching: SDS between two points of one DDIM inversion.

Inversion without prompt leads from the image to $x_s$ and on to $x_t$, and

$$g = w(t)\, \bigl(\hat\epsilon(x_t, t, c) - \hat\epsilon(x_s, s, \varnothing)\bigr),
  \qquad s = t - \delta,$$

(Y. Liang et al., 2023, arXiv 2311.11284), with guidance in the first term. Both
predictions belong to the same trajectory of noise, so that no noise is drawn at all.
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
class ISMConfig(GuidanceConfig):
    """Interval score matching (`system.guidance` in a config).

    Args:
        interval: δ, in timesteps.
        inversion_n_steps: Number of inversion steps to s, from 1 to 5.
    """

    guidance_scale: float = 7.5
    interval: int = 50
    inversion_n_steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        between("interval", self.interval, 1, 999)
        between("inversion_n_steps", self.inversion_n_steps, 1, 5)


class IntervalScoreMatching(ScoreDistillation):
    """ISM."""

    Config = ISMConfig
    config: ISMConfig

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `ScoreDistillation.direction`."""
        del noise  # the inversion's own
        s = (t - self.config.interval).clamp(min=1)
        times = rising(s, self.config.inversion_n_steps)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            return self.blank(noisy, t, cameras)

        x_s = invert(self.prior, x, times, predict)
        found = predict(x_s, s)
        alpha, sigma = self.prior.scales(s)
        clean = (x_s - sigma * found) / alpha
        x_t = self.prior.add_noise(clean, found, t)
        return self.weight(t) * (self.predict(x_t, t, cameras) - found)
