r"""Fields of density.

The density is $\sigma(x) = a(f(x) + b(x))$ with a learned $f$, an activation $a$ and a
fixed bias $b$, a blob at the centre from which the object grows:

$$b(x) = s\,(1 - \|x\| / d) \quad\text{or}\quad b(x) = s\,e^{-\|x\|^2 / 2 d^2},$$

the first from Magic3D (C.-H. Lin et al., 2023, arXiv 2211.10440), the second from
DreamFusion (B. Poole et al., 2022, arXiv 2209.14988).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from systems.scene.fields.base import Field, FieldConfig
from systems.scene.networks import ACTIVATIONS
from systems.settings.checks import at_least, one_of


@dataclass(frozen=True)
class DensityConfig(FieldConfig):
    """Settings of all fields of density.

    Args:
        density_bias: Bias b of the density: "blob_magic3d", "blob_dreamfusion", or a
            number.
        density_activation: Activation of the density, after the bias.
        density_blob_scale: Height s of the blob.
        density_blob_std: Width d of the blob.
    """

    density_bias: str | float = "blob_magic3d"
    density_activation: str = "softplus"
    density_blob_scale: float = 10.0
    density_blob_std: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("density_blob_std", self.density_blob_std, 1e-6)
        one_of("density_activation", self.density_activation, list(ACTIVATIONS))
        if isinstance(self.density_bias, str):
            one_of(
                "density_bias",
                self.density_bias,
                ("blob_magic3d", "blob_dreamfusion", "a number"),
            )


class DensityField(Field):
    """A density and features in space."""

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
        """See `Field.normals`."""
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
            eps = float(self.config.finite_difference_normal_eps)
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
