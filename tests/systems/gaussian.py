"""A prior whose score is known: Gaussian images around the embedded prompt."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from systems.guidance.priors import Prior

SPREAD = 0.5
"""Standard deviation of every entry of an image."""


class Gaussian(nn.Module):
    r"""A U-Net that predicts the noise in images of independent normal entries.

    Their mean, per channel, is a linear function of the prompt, at first the prompt
    itself; a LoRA can change it. With $v = \alpha^2 s^2 + \sigma^2$ the noise is

    $$\hat\epsilon = \sigma\, (x_t - \alpha m) / v.$$
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.mean.weight)
        self.config = {"sample_size": 4}
        self.dtype = torch.float32
        self.kept = DDPMScheduler().alphas_cumprod

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor
    ) -> SimpleNamespace:
        mean = self.mean(encoder_hidden_states).transpose(1, 2)[..., None]
        alpha, sigma = scales(t)
        return SimpleNamespace(sample=sigma * (x - alpha * mean) / spread(t))


def scales(t: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ, of shape ``(views, 1, 1, 1)``."""
    kept = DDPMScheduler().alphas_cumprod[t][:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def spread(t: Tensor) -> Tensor:
    """The variance v of noisy images."""
    alpha, sigma = scales(t)
    return (alpha * SPREAD) ** 2 + sigma**2


def prior(width: int) -> Prior:
    """The prior of prompts of this many channels (1, or those of an image)."""
    pipeline = SimpleNamespace(unet=Gaussian(width), scheduler=DDPMScheduler())
    return Prior(pipeline, torch.device("cpu"))
