r"""From features to colours.

The point light of DreamFusion (B. Poole et al., 2022, arXiv 2209.14988, section 3.2):

$$c = \rho \,\bigl(\ell_a + \ell_\rho
  \max(0, n \cdot \tfrac{\ell - x}{\|\ell - x\|})\bigr)$$

with albedo $\rho$, normal $n$ and the light at $\ell$. A step renders the albedo alone,
the shaded albedo, or the shading of a white body, so that colour cannot mimic shape.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreampropeller import StepRandom
from systems.scene.networks import ACTIVATIONS
from systems.settings.checks import at_least, between, check_color, one_of

Shading = Literal["albedo", "diffuse", "textureless"]


@dataclass(frozen=True)
class AlbedoConfig:
    """Colours without light (``no-material``).

    Args:
        color_activation: Activation from features to colours.
    """

    color_activation: str = "sigmoid"

    def __post_init__(self) -> None:
        one_of("color_activation", self.color_activation, list(ACTIVATIONS))


@dataclass(frozen=True)
class PointLightConfig:
    """A diffuse surface under a point light (``diffuse-with-point-light-material``).

    Args:
        ambient_light_color: Colour of the ambient light.
        diffuse_light_color: Colour of the point light.
        ambient_only_steps: Step before which only the albedo is rendered.
        diffuse_prob: Probability of shading after `ambient_only_steps`.
        textureless_prob: Probability of a white body, given shading.
        albedo_activation: Activation from features to albedo.
        soft_shading: Draw the brightness u of the point light for each step; the
            ambient light is 1 − u.
        ambient_only_on_test: Render only the albedo in turntables.
        ambient_ratio_min: Draw the share of ambient light of each step from here to 1;
            the point light has the rest. Null: the colours above.
    """

    ambient_light_color: tuple[float, float, float] = (0.1, 0.1, 0.1)
    diffuse_light_color: tuple[float, float, float] = (0.9, 0.9, 0.9)
    ambient_only_steps: int = 1000
    diffuse_prob: float = 0.75
    textureless_prob: float = 0.5
    albedo_activation: str = "sigmoid"
    soft_shading: bool = False
    ambient_only_on_test: bool = False
    ambient_ratio_min: float | None = None

    def __post_init__(self) -> None:
        at_least("ambient_only_steps", self.ambient_only_steps, 0)
        between("diffuse_prob", self.diffuse_prob, 0, 1)
        between("textureless_prob", self.textureless_prob, 0, 1)
        check_color("ambient_light_color", self.ambient_light_color)
        check_color("diffuse_light_color", self.diffuse_light_color)
        one_of("albedo_activation", self.albedo_activation, list(ACTIVATIONS))


class Material(nn.Module, abc.ABC):
    """A mapping from features of a field to colours.

    `Config` is the dataclass of its settings, the only argument it is built from.
    """

    Config: type[Any]
    config: Any

    @abc.abstractmethod
    def shading(self, step: int | None, random: StepRandom) -> Shading:
        """The shading of a training step; None: evaluation."""

    @abc.abstractmethod
    def albedo(self, features: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        """Colours in [0, 1], without light."""

    def at(self, step: int | None, random: StepRandom) -> Material:
        """The material as it is in a training step; default: as ever."""
        del step, random
        return self

    def light(
        self,
        points: Float[Tensor, "points 3"],
        normals: Float[Tensor, "points 3"],
        light: Float[Tensor, "points 3"],
    ) -> Float[Tensor, "points 3"]:
        """The light that reaches points; needed only if `shading` uses it.

        Args:
            points: Points on the surface.
            normals: Unit normals at the points.
            light: Position of the light for each point.
        """
        del normals, light
        return torch.ones_like(points)


class Albedo(Material):
    """Features are colours; there is no light."""

    Config = AlbedoConfig

    def __init__(self, config: AlbedoConfig) -> None:
        super().__init__()
        self.config = config

    def shading(self, step: int | None, random: StepRandom) -> Shading:
        """The shading of a step: always the albedo."""
        del step, random
        return "albedo"

    def albedo(self, features: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        """Colours from 0 to 1."""
        return ACTIVATIONS[self.config.color_activation](features)


class PointLight(Material):
    """Albedo, shaded albedo or shading alone, chosen for each step."""

    Config = PointLightConfig

    def __init__(self, config: PointLightConfig) -> None:
        super().__init__()
        self.config = config

    def shading(self, step: int | None, random: StepRandom) -> Shading:
        """The shading of a step; None: evaluation."""
        config = self.config
        if step is None:
            return "albedo" if config.ambient_only_on_test else "diffuse"
        if step < config.ambient_only_steps:
            return "albedo"
        dice = torch.rand(2, generator=random.generator(step, "shading")).tolist()
        if dice[0] > config.diffuse_prob:
            return "albedo"
        return "textureless" if dice[1] < config.textureless_prob else "diffuse"

    def albedo(self, features: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        """Colours from 0 to 1."""
        return ACTIVATIONS[self.config.albedo_activation](features).clamp(0, 1)

    def at(self, step: int | None, random: StepRandom) -> Material:
        """With the lights of the step, if they vary."""
        least = self.config.ambient_ratio_min
        if step is None or (least is None and not self.config.soft_shading):
            return self
        drawn = torch.rand(1, generator=random.generator(step, "soft shading"))
        share = float(drawn) * (1 if least is None else 1 - least)
        varied = copy.copy(self)
        varied.config = replace(
            self.config,
            diffuse_light_color=(share,) * 3,
            ambient_light_color=(1 - share,) * 3,
        )
        return varied

    def light(
        self, points: Tensor, normals: Tensor, light: Tensor
    ) -> Float[Tensor, "points 3"]:
        """The light that reaches points with normals from a point light."""
        out = torch.nn.functional.normalize(light - points, dim=-1)
        facing = (normals * out).sum(-1, keepdim=True).clamp(min=0)
        ambient = points.new_tensor(self.config.ambient_light_color)
        return ambient + facing * points.new_tensor(self.config.diffuse_light_color)


class Unlit(Material):
    """Another material without its light.

    Args:
        material: The material.
    """

    def __init__(self, material: Material) -> None:
        super().__init__()
        self.material = material

    def shading(self, step: int | None, random: StepRandom) -> Shading:
        """See `Material.shading`: always the albedo."""
        del step, random
        return "albedo"

    def albedo(self, features: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        """Colours from 0 to 1."""
        return self.material.albedo(features)


MATERIALS: Mapping[str, type[Material]] = {
    "no-material": Albedo,
    "diffuse-with-point-light-material": PointLight,
}
