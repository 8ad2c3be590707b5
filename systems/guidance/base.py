"""What every guidance offers: a loss, and its gradient, on images."""

from __future__ import annotations

import abc
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dreampropeller import StepRandom
from systems.guidance.prompts import PromptConfig
from systems.scene.cameras import Cameras

Log: TypeAlias = dict[str, Tensor | float]
"""Scalars to log, by name."""


class Guidance(abc.ABC):
    """Pulls images towards a prompt.

    `Config` is the dataclass of its settings; it names a pretrained model in
    `pretrained_model_name_or_path`.
    """

    Config: type[Any]

    @classmethod
    @abc.abstractmethod
    def load(cls, config: Any, prompts: PromptConfig, device: torch.device) -> Guidance:
        """Load the pretrained model and embed the prompts.

        Args:
            config: Its settings.
            prompts: The prompts, and which view asks for which.
            device: Where the model runs.
        """

    @abc.abstractmethod
    def __call__(
        self,
        images: Float[Tensor, "views 3 height width"],
        cameras: Cameras,
        step: int,
        random: StepRandom,
    ) -> tuple[Float[Tensor, ""], Log]:
        """A loss whose gradient is the guidance; a mean over the views.

        Args:
            images: From 0 to 1.
            cameras: Where they were taken from.
            step: The step on the trajectory.
            random: Source of timestep and noise.
        """

    def gradient(
        self,
        images: Float[Tensor, "views 3 height width"],
        cameras: Cameras,
        step: int,
        random: StepRandom,
    ) -> tuple[Float[Tensor, "views 3 height width"], Log]:
        """The gradient of the loss with respect to the images; arguments as above."""
        leaves = images.detach().requires_grad_(True)
        with torch.enable_grad():
            loss, log = self(leaves, cameras, step, random)
        return torch.autograd.grad(loss, leaves)[0], log
