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

    def __post_init__(self) -> None:
        for name, ndim in (("weights", 1), ("means", 2), ("variances", 2)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(
                    f"`{name}` is no tensor of floating numbers: write `torch.tensor("
                    "[0.3, 0.7])`, or rows of such."
                )
            if value.ndim != ndim:
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}: write {ndim} axes, "
                    "`(components, dim)` or, for weights, `(components,)`."
                )
            if not value.isfinite().all():
                raise ValueError(f"`{name}` holds NaN or infinity: write numbers.")
        if len({len(self.weights), len(self.means), len(self.variances)}) > 1 or (
            self.means.shape != self.variances.shape
        ):
            shapes = [
                tuple(one.shape) for one in (self.weights, self.means, self.variances)
            ]
            raise ValueError(
                "`weights`, `means` and `variances` have shapes "
                f"{', '.join(map(str, shapes))}: write one row per component, and the "
                "same dimension."
            )
        if (self.weights < 0).any() or not self.weights.sum() > 0:
            raise ValueError(
                f"`weights` are {self.weights.tolist()}: write numbers that are not "
                "negative, and one above 0."
            )
        if (self.variances < 0).any():
            raise ValueError("`variances` holds a negative number: write 0 or more.")

    def __call__(self, s: float, x: Tensor) -> Tensor:
        """The score at points ``(samples, dim)``."""
        dim = self.means.shape[1]
        if x.ndim != 2 or x.shape[1] != dim:
            raise ValueError(
                f"The points have shape {tuple(x.shape)}, and the mixture has "
                f"dimension {dim}: write `start=torch.randn(samples, {dim})`."
            )
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

    def __post_init__(self) -> None:
        kept = self.alphas_cumprod
        if not isinstance(kept, Tensor) or kept.ndim != 1 or not len(kept):
            raise TypeError(
                "`alphas_cumprod` is no tensor of shape (timesteps,): write "
                "`scheduler.alphas_cumprod`."
            )
        if kept[-1] == 0:
            raise ValueError(
                "The last of `alphas_cumprod` is 0 (zero terminal SNR), which is "
                "infinitely far in time: leave it out, `alphas_cumprod[:-1]`."
            )
        if (kept.diff() > 0).any() or not 0 < kept[-1] <= kept[0] < 1:
            raise ValueError(
                "`alphas_cumprod` does not fall from below 1 to above 0: write "
                "`scheduler.alphas_cumprod`, which belongs to timesteps 0, 1, …"
            )

    def check_time(self, s: float) -> None:
        """Refuse a time that the schedule does not hold.

        Raises:
            ValueError: Says what to write for the grid.
        """
        if not self.stop * (1 - 1e-6) <= s <= self.horizon * (1 + 1e-6):
            raise ValueError(
                f"The time {s:.6g} is outside the schedule, which holds "
                f"{self.stop:.6g} to {self.horizon:.6g}: write `Grid(horizon="
                "score.horizon, stop=score.stop, step=…)`."
            )

    def __call__(self, s: float, x: Tensor) -> Tensor:
        """The score at noisy images."""
        self.check_time(s)
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
