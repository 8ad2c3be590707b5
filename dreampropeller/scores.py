r"""Scores $S(s, x)$ of noised data: of a Gaussian mixture, or from a network.

The noised law at forward time $s$ is that of $e^{-s/2} x_0 + \sqrt{1 - e^{-s}}\,
\varepsilon$, so a model with cumulative products $\bar\alpha$ is at $s = -\ln
\bar\alpha$, and its prediction $\hat\varepsilon$ gives
$S = -\hat\varepsilon / \sqrt{1 - \bar\alpha}$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixtureScore:
    r"""The exact score of a mixture of Gaussians with one diagonal covariance each.

    $p_s = \sum_i w_i N(e^{-s/2} \mu_i, e^{-s} \lambda_i + 1 - e^{-s})$.

    Args:
        weights: Weights $w$, shape ``(components,)``.
        means: Means $\mu$, shape ``(components, dim)``.
        variances: Variances $\lambda$, shape ``(components, dim)``.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __call__(self, s: float, x: Tensor) -> Tensor:
        """The score at points ``(samples, dim)``."""
        shrink, variance = math.exp(-s / 2), self._variance(s)
        away = (x[:, None] - shrink * self.means) / variance
        squares = (x[:, None] - shrink * self.means) * away
        logits = self.weights.log() - 0.5 * (squares + variance.log()).sum(-1)
        return -(torch.softmax(logits, 1)[..., None] * away).sum(1)

    def sample(self, s: float, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws from the law at time s, shape ``(num, dim)``."""
        own = torch.multinomial(
            self.weights, num, replacement=True, generator=generator
        )
        shape, dtype = (num, self.means.shape[1]), self.means.dtype
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        mean = math.exp(-s / 2) * self.means[own]
        return mean + self._variance(s)[own].sqrt() * noise

    def _variance(self, s: float) -> Tensor:
        return math.exp(-s) * self.variances - math.expm1(-s)


@dataclass(frozen=True)
class DenoiserScore:
    r"""The score of a network that predicts the noise.

    Between two timesteps of the schedule the nearest in $s$ is evaluated; the factor
    $1 / \sqrt{1 - \bar\alpha}$ is that of $s$ itself.

    Args:
        denoiser: Called as ``denoiser(x, timestep)``; returns $\hat\varepsilon$, as
            `dreampropeller.adapters.diffusers.Denoiser` does.
        alphas_cumprod: The schedule's $\bar\alpha$, as
            `scheduler.alphas_cumprod`, shape ``(timesteps,)``, descending.
    """

    denoiser: Callable[[Tensor, Tensor], Tensor]
    alphas_cumprod: Tensor

    def __call__(self, s: float, x: Tensor) -> Tensor:
        """The score at noisy images."""
        times = -self.alphas_cumprod.double().log()
        timestep = (times - s).abs().argmin().to(x.device)
        return -self.denoiser(x, timestep) / math.sqrt(-math.expm1(-s))

    @property
    def horizon(self) -> float:
        """The time of the last timestep: $T$ of the grid."""
        return float(-self.alphas_cumprod[-1].double().log())

    @property
    def stop(self) -> float:
        r"""The time of the first timestep: $\eta$ of the grid."""
        return float(-self.alphas_cumprod[0].double().log())
