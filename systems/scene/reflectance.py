r"""A surface of some roughness and metalness under a point light.

The metallic-roughness model of glTF 2.0 (appendix B.3): with albedo ρ, metalness m,
roughness r, α = r², normal n, directions v to the camera and l to the light, and the
half vector h,

$$f = (1 - m)(1 - F)\,\frac{\rho}{\pi} + \frac{D\,G\,F}{4 (n \cdot v)(n \cdot l)},
  \qquad F = F_0 + (1 - F_0)(1 - v \cdot h)^5, \qquad F_0 = 0.04 (1 - m) + \rho\,m,$$

$$D = \frac{\alpha^2}{\pi ((n \cdot h)^2 (\alpha^2 - 1) + 1)^2}, \qquad
  \frac{G}{4 (n \cdot v)(n \cdot l)} = \frac{1}{2\,\bigl((n \cdot l)
  \sqrt{(n \cdot v)^2 (1 - \alpha^2) + \alpha^2} + (n \cdot v)
  \sqrt{(n \cdot l)^2 (1 - \alpha^2) + \alpha^2}\bigr)}.$$

The colour is $\ell_a\,(\rho (1 - m) + F_0) + \pi\,\ell_\rho\, f\,(n \cdot l)$ in linear
light, returned as a display colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from systems.scene.materials import PointLight, PointLightConfig

SMOOTHEST = 0.05
"""Least roughness, so that a highlight is wider than a point."""


@dataclass(frozen=True)
class ReflectanceConfig(PointLightConfig):
    """Metallic-roughness under a point light (``pbr-with-point-light-material``).

    Args:
        ambient_light_color: Colour of the ambient light, linear.
        diffuse_light_color: Colour of the point light, linear.
        ambient_only_steps: Step before which only the albedo is rendered.
        diffuse_prob: Probability of shading after `ambient_only_steps`.
        textureless_prob: Probability of a white body, given shading.
        albedo_activation: Activation from features to albedo.
        ambient_only_on_test: Render only the albedo in turntables.
    """

    ambient_light_color: tuple[float, float, float] = (0.3, 0.3, 0.3)
    ambient_only_steps: int = 0
    textureless_prob: float = 0.0


class Reflectance(PointLight):
    """The metallic-roughness model of glTF."""

    Config = ReflectanceConfig

    def reflect(
        self,
        albedo: Float[Tensor, "points 3"],
        roughness: Float[Tensor, "points 1"],
        metallic: Float[Tensor, "points 1"],
        points: Float[Tensor, "points 3"],
        normals: Float[Tensor, "points 3"],
        light: Float[Tensor, "points 3"],
        eye: Float[Tensor, "points 3"],
    ) -> Float[Tensor, "points 3"]:
        """Display colours of surface points.

        Args:
            albedo: Display colours of the surface.
            roughness: Roughness from 0 to 1.
            metallic: Metalness from 0 to 1.
            points: Positions.
            normals: Unit normals.
            light: Position of the light for each point.
            eye: Position of the camera for each point.
        """
        rho = to_linear(albedo)
        to_light, to_eye = (
            torch.nn.functional.normalize(place - points, dim=-1)
            for place in (light, eye)
        )
        half = torch.nn.functional.normalize(to_light + to_eye, dim=-1)

        def cosine(one: Tensor, other: Tensor) -> Tensor:
            return (one * other).sum(-1, keepdim=True).clamp(min=0)

        nl, nv = cosine(normals, to_light), cosine(normals, to_eye).clamp(min=1e-3)
        nh, vh = cosine(normals, half), cosine(to_eye, half)
        square = roughness.clamp(min=SMOOTHEST) ** 4
        base = 0.04 * (1 - metallic) + rho * metallic
        fresnel = base + (1 - base) * (1 - vh) ** 5
        lobe = square / (math.pi * (nh * nh * (square - 1) + 1) ** 2)
        masking = nl * (nv * nv * (1 - square) + square).sqrt()
        masking = masking + nv * (nl * nl * (1 - square) + square).sqrt()
        specular = lobe * fresnel / (2 * masking).clamp(min=1e-6)
        matte = (1 - metallic) * (1 - fresnel) * rho / math.pi
        ambient = rho.new_tensor(self.config.ambient_light_color)
        lamp = rho.new_tensor(self.config.diffuse_light_color)
        shown = ambient * (rho * (1 - metallic) + base)
        return to_display(shown + math.pi * lamp * (matte + specular) * nl)


def to_linear(srgb: Tensor) -> Tensor:
    """Display colours as linear light; see `systems.scene.colours`."""
    high = ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(srgb <= 0.04045, srgb / 12.92, high)


def to_display(linear: Tensor) -> Tensor:
    """Linear light as display colours, cut at 1; the inverse of `to_linear`."""
    high = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, linear * 12.92, high).clamp(max=1)
