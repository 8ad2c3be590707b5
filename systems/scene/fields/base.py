r"""The interface of every field: density, features and normals at points in space.

The density is $\sigma(x) = a(f(x) + b(x))$ with a learned $f$, an activation $a$ and a
fixed bias $b$, a blob at the centre from which the object grows:

$$b(x) = s\,(1 - \|x\| / d) \quad\text{or}\quad b(x) = s\,e^{-\|x\|^2 / 2 d^2},$$

the first from Magic3D (C.-H. Lin et al., 2023, arXiv 2211.10440), the second from
DreamFusion (B. Poole et al., 2022, arXiv 2209.14988).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from systems.scene.networks import ACTIVATIONS
from systems.settings.checks import at_least, one_of


@dataclass(frozen=True)
class FieldConfig:
    """Settings of all fields (`system.geometry` in a config).

    Args:
        radius: Radius of the ball that holds the object.
        n_feature_dims: Number of feature channels passed to the material.
        density_bias: Bias b of the density: "blob_magic3d", "blob_dreamfusion", or a
            number.
        density_activation: Activation of the density, after the bias.
        density_blob_scale: Height s of the blob.
        density_blob_std: Width d of the blob.
        normal_type: Normals: "finite_difference", "analytic" (by differentiation), or
            null for none, where neither light nor loss needs them.
        finite_difference_normal_eps: Step of the finite differences.
        isosurface_threshold: Density at the surface of the exported mesh; "auto"
            chooses it from the object's silhouettes.
        isosurface_resolution: Grid points per side for the exported mesh.
    """

    radius: float = 1.0
    n_feature_dims: int = 3
    density_bias: str | float = "blob_magic3d"
    density_activation: str = "softplus"
    density_blob_scale: float = 10.0
    density_blob_std: float = 0.5
    normal_type: str | None = "finite_difference"
    finite_difference_normal_eps: float = 0.01
    isosurface_threshold: float | str = "auto"
    isosurface_resolution: int = 128

    def __post_init__(self) -> None:
        at_least("radius", self.radius, 1e-3)
        at_least("n_feature_dims", self.n_feature_dims, 3)
        at_least("density_blob_std", self.density_blob_std, 1e-6)
        at_least(
            "finite_difference_normal_eps", self.finite_difference_normal_eps, 1e-9
        )
        at_least("isosurface_resolution", self.isosurface_resolution, 8)
        if isinstance(self.isosurface_threshold, str):
            one_of(
                "isosurface_threshold", self.isosurface_threshold, ("auto", "a number")
            )
        one_of("density_activation", self.density_activation, list(ACTIVATIONS))
        if self.normal_type is not None:
            one_of("normal_type", self.normal_type, ("finite_difference", "analytic"))
        if isinstance(self.density_bias, str):
            one_of(
                "density_bias",
                self.density_bias,
                ("blob_magic3d", "blob_dreamfusion", "a number"),
            )


class Field(nn.Module, abc.ABC):
    """A density and features in space.

    `step` is the step on the trajectory, for encodings that sharpen over time; None:
    the final form.
    """

    Config: type[FieldConfig]

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def raw(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """The learned part: density before bias and activation, and features."""

    def forward(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """Density and features."""
        raw, features = self.raw(points, step)
        return self._activated(points, raw), features

    def density(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, " points"]:
        """The density alone."""
        return self(points, step)[0]

    def normals(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points 3"]:
        """Unit vectors along which the density falls fastest; differentiable."""
        if self.config.normal_type is None:
            raise ValueError(
                "`system.geometry.normal_type` is null, and the material or "
                "`lambda_orient` needs normals: write `finite_difference`."
            )
        if self.config.normal_type == "analytic":
            with torch.enable_grad():
                points = points.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(
                    self.density(points, step).sum(), points, create_graph=True
                )
        else:
            eps = self.config.finite_difference_normal_eps
            offsets = eps * torch.eye(3, dtype=points.dtype, device=points.device)
            shifted = torch.cat([points[None] + offsets[:, None], points[None]])
            values = self.density(shifted.reshape(-1, 3), step).reshape(4, -1)
            slope = ((values[:3] - values[3]) / eps).T
        return -torch.nn.functional.normalize(slope, dim=-1)

    def _activated(self, points: Tensor, raw: Tensor) -> Tensor:
        config = self.config
        distance = points.square().sum(-1)
        if config.density_bias == "blob_magic3d":
            share = 1 - (distance + 1e-12).sqrt() / config.density_blob_std
            bias = config.density_blob_scale * share
        elif config.density_bias == "blob_dreamfusion":
            width = 2 * config.density_blob_std**2
            bias = config.density_blob_scale * torch.exp(-distance / width)
        else:
            bias = float(config.density_bias)
        return ACTIVATIONS[config.density_activation](raw + bias)
