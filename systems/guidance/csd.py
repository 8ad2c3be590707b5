r"""Classifier score distillation: the part of SDS that guidance adds.

$$g = w(t)\, s\, \bigl(\hat\epsilon(x_t, t, c) -
  \hat\epsilon(x_t, t, \varnothing)\bigr)$$

(X. Yu et al., 2023, arXiv 2310.19415). The noise enters through $x_t$ alone, and
there is no LoRA: it is the limit of a guidance scale s that outweighs the rest of SDS.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from systems.guidance.sds import ScoreDistillation
from systems.scene.cameras import Cameras


class ClassifierScoreDistillation(ScoreDistillation):
    """CSD; `guidance_scale` is s, and `guidance_rescale` has no effect.

    A negative prompt replaces the empty one.
    """

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `ScoreDistillation.direction`."""
        noisy = self.prior.add_noise(x, noise, t)
        difference = self.predict(noisy, t, cameras, 1.0) - self.blank(
            noisy, t, cameras
        )
        return self.weight(t) * self.config.scale * difference
