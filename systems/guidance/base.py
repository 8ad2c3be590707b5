"""The interface of every guidance: a loss on images, and its gradient."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dreampropeller import StepRandom
from systems.guidance.prompts import PromptConfig
from systems.scene.cameras import Cameras

Log: TypeAlias = dict[str, Tensor | float]
"""Scalars to log, by name."""


@dataclass(frozen=True)
class Shown:
    """What a guidance is shown of a step.

    Attributes:
        images: Rendered images in [0, 1], shape ``(views, 3, height, width)``.
        cameras: Cameras of the images.
        step: The step on the trajectory.
    """

    images: Float[Tensor, "views 3 height width"]
    cameras: Cameras
    step: int


class Guidance(abc.ABC):
    """A loss that moves images towards a prompt.

    `Config` is the dataclass of its settings; it names a pretrained model in
    `pretrained_model_name_or_path`.
    """

    Config: type[Any]

    @classmethod
    @abc.abstractmethod
    def load(cls, config: Any, prompts: PromptConfig, device: torch.device) -> Guidance:
        """Load the pretrained model and embed the prompts.

        Args:
            config: Settings of the guidance.
            prompts: The prompts, and the choice among them by view.
            device: Device of the model.
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
            images: Rendered images in [0, 1].
            cameras: Cameras of the images.
            step: The step on the trajectory.
            random: Source of the timestep and the noise.
        """

    def several(
        self, shown: Sequence[Shown], random: StepRandom
    ) -> list[tuple[Float[Tensor, ""], Log]]:
        """The losses of several steps; default: one after another.

        A guidance that evaluates its model once for all of them gives each step the
        random numbers that it has by itself.

        Args:
            shown: What it is shown of each step.
            random: Source of each step's timestep and noise.
        """
        return [self(one.images, one.cameras, one.step, random) for one in shown]

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
