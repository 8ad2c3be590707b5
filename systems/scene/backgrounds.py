"""Backgrounds of the object; random ones are functions of the step."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreampropeller import StepRandom
from systems.scene.networks import ACTIVATIONS, MLP, spherical_harmonics
from systems.settings.checks import at_least, between, check_color, check_range, one_of

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class SolidConfig:
    """One colour (``solid-color-background``).

    Args:
        color: Colour of the background, from 0 to 1.
        learned: Optimise the colour.
        random_aug: Replace the background by a random colour in some views.
        random_aug_prob: Fraction of the views with a random colour.
    """

    color: Colour = (1.0, 1.0, 1.0)
    learned: bool = False
    random_aug: bool = False
    random_aug_prob: float = 0.5

    def __post_init__(self) -> None:
        check_color("color", self.color)
        between("random_aug_prob", self.random_aug_prob, 0, 1)


@dataclass(frozen=True)
class RandomConfig:
    """A random solid colour for each view of a step (``random-color-background``).

    Args:
        grey: Draw only greys.
        range: Range of each channel, from 0 to 1.
        eval_color: Colour of the background in turntables.
    """

    grey: bool = True
    range: tuple[float, float] = (0.05, 0.95)
    eval_color: Colour = (0.75, 0.75, 0.75)

    def __post_init__(self) -> None:
        check_range("range", self.range, 0, 1)
        check_color("eval_color", self.eval_color)


@dataclass(frozen=True)
class BlackOrWhiteConfig:
    """Black or white, drawn for each view (``black-or-white-background``).

    Args:
        black_prob: Probability of black; turntables are white.
    """

    black_prob: float = 0.5


@dataclass(frozen=True)
class EnvironmentConfig:
    """A small network of the direction (``neural-environment-map-background``).

    Args:
        color_activation: Activation of the network's output.
        n_neurons: Width of the hidden layers.
        n_hidden_layers: Number of hidden layers.
        random_aug: Replace the background by a random colour in some views.
        random_aug_prob: Fraction of the views with a random colour.
        eval_color: Colour in turntables; null: the network's.
    """

    color_activation: str = "sigmoid"
    n_neurons: int = 16
    n_hidden_layers: int = 2
    random_aug: bool = False
    random_aug_prob: float = 0.5
    eval_color: Colour | None = None

    def __post_init__(self) -> None:
        one_of("color_activation", self.color_activation, list(ACTIVATIONS))
        at_least("n_neurons", self.n_neurons, 1)
        at_least("n_hidden_layers", self.n_hidden_layers, 0)
        between("random_aug_prob", self.random_aug_prob, 0, 1)
        check_color("eval_color", self.eval_color or (0, 0, 0))


class Background(nn.Module, abc.ABC):
    """The background of the object.

    `Config` is the dataclass of its settings, the only argument it is built from.
    """

    Config: type[Any]

    @abc.abstractmethod
    def forward(
        self,
        directions: Float[Tensor, "views height width 3"],
        step: int | None,
        random: StepRandom,
    ) -> Float[Tensor, "views height width 3"]:
        """Colours in [0, 1] behind rays.

        Args:
            directions: Unit vectors from the camera.
            step: A training step; None: evaluation.
            random: Source of the randomness of a step.
        """


class Solid(Background):
    """The same colour everywhere."""

    Config = SolidConfig

    def __init__(self, config: SolidConfig) -> None:
        super().__init__()
        self.config = config
        # A buffer would count as evolving state; a frozen parameter does not.
        self.color = nn.Parameter(
            torch.tensor(config.color), requires_grad=config.learned
        )

    def forward(
        self, directions: Tensor, step: int | None, random: StepRandom
    ) -> Float[Tensor, "views height width 3"]:
        """See `Background.forward`."""
        colours = self.color.expand(directions.shape)
        if step is None or not self.config.random_aug:
            return colours
        return _augment(colours, self.config.random_aug_prob, step, random)


class Random(Background):
    """A colour for each view of a step, from the step's own generator."""

    Config = RandomConfig

    def __init__(self, config: RandomConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, directions: Tensor, step: int | None, random: StepRandom
    ) -> Float[Tensor, "views height width 3"]:
        """See `Background.forward`."""
        if step is None:
            return directions.new_tensor(self.config.eval_color).expand_as(directions)
        low, high = self.config.range
        channels = 1 if self.config.grey else 3
        drawn = random.draws(step, "background").rand(len(directions), 1, 1, channels)
        return (low + (high - low) * drawn).to(directions).expand_as(directions)


class BlackOrWhite(Background):
    """Black or white behind each view of a step (DreamGaussian's)."""

    Config = BlackOrWhiteConfig

    def __init__(self, config: BlackOrWhiteConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, directions: Tensor, step: int | None, random: StepRandom
    ) -> Float[Tensor, "views height width 3"]:
        """See `Background.forward`."""
        if step is None:
            return torch.ones_like(directions)
        drawn = random.draws(step, "background").rand(len(directions), 1, 1, 1)
        white = drawn >= self.config.black_prob
        return white.to(directions).expand_as(directions)


class Environment(Background):
    """A colour for each direction."""

    Config = EnvironmentConfig

    def __init__(self, config: EnvironmentConfig) -> None:
        super().__init__()
        self.config = config
        self.network = MLP(9, 3, config.n_neurons, config.n_hidden_layers)

    def forward(
        self, directions: Tensor, step: int | None, random: StepRandom
    ) -> Float[Tensor, "views height width 3"]:
        """See `Background.forward`."""
        if step is None and self.config.eval_color is not None:
            return directions.new_tensor(self.config.eval_color).expand_as(directions)
        raw = self.network(spherical_harmonics(directions))
        colours = ACTIVATIONS[self.config.color_activation](raw)
        if step is None or not self.config.random_aug:
            return colours
        return _augment(colours, self.config.random_aug_prob, step, random)


def _augment(colours: Tensor, share: float, step: int, random: StepRandom) -> Tensor:
    """Replace the background by a random solid colour in a fraction of the views."""
    draws = random.draws(step, "background")
    dice = draws.rand(len(colours), 1, 1, 1).to(colours)
    drawn = draws.rand(len(colours), 1, 1, 3).to(colours)
    return torch.where(dice < share, drawn, colours)


BACKGROUNDS: Mapping[str, type[Background]] = {
    "solid-color-background": Solid,
    "random-color-background": Random,
    "black-or-white-background": BlackOrWhite,
    "neural-environment-map-background": Environment,
}
