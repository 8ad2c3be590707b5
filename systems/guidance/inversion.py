r"""DDIM inversion: the noise that an image comes from, along the model's own flow.

From a clean image $x_0$ ($\alpha = 1$, $\sigma = 0$) towards rising timesteps,

$$x_{t'} = \alpha_{t'}\, \frac{x_t - \sigma_t\, \hat\epsilon(x_t, t)}{\alpha_t} +
  \sigma_{t'}\, \hat\epsilon(x_t, t)$$

(J. Song, C. Meng and S. Ermon, 2020, arXiv 2010.02502, Eq. 12 without
noise, backwards). Unlike drawn noise, it changes continuously with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from systems.guidance.priors import Prior

Predict = Callable[[Tensor, Tensor], Tensor]
"""$(x_t, t) \\to \\hat\\epsilon$."""


def invert(
    prior: Prior, x: Tensor, times: Sequence[Tensor], predict: Predict
) -> Float[Tensor, "views channels rows columns"]:
    """The noisy image at the last of rising timesteps.

    Args:
        prior: The diffusion model.
        x: Clean images in the model's space.
        times: Timesteps of each inversion step, each of shape ``(views,)``.
        predict: Noise prediction.
    """
    t = torch.zeros_like(times[0])
    alpha = torch.ones_like(prior.scales(t)[0])
    sigma = torch.zeros_like(alpha)
    for later in times:
        noise = predict(x, t)
        clean = (x - sigma * noise) / alpha
        alpha, sigma = prior.scales(later)
        x, t = alpha * clean + sigma * noise, later
    return x


def rising(t: Tensor, count: int) -> list[Tensor]:
    """Evenly spaced timesteps up to t, `count` of them; t is the last."""
    return [t * (i + 1) // count for i in range(count)]
