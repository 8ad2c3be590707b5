r"""Fields of signed distance.

A surface is the zero set of $f(x) = g(x) + b(x)$, negative inside, with a learned g and
a fixed initial shape b: a sphere $\|x\| - r$, or an ellipsoid $\|x / a\| - 1$ (no true
distance, but near to one). Values of the field are −f, so that they rise into the
object. The gradient is taken by finite differences of step ε, forward or central; the
central ones also give the Laplacian

$$\Delta f(x) \approx \epsilon^{-2}
  \sum_i \bigl(f(x + \epsilon e_i) + f(x - \epsilon e_i) - 2 f(x)\bigr).$$

A step as long as a cell of the finest active level ("progressive") moves all of its
corners at once (Z. Li et al., 2023, Neuralangelo, arXiv 2306.03092).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from systems.scene.fields.base import Field, FieldConfig
from systems.scene.fields.hash_grid import (
    HashGridConfig,
    HashGridField,
    NetworkConfig,
)
from systems.scene.fields.voxel_grid import interpolate, refuse_analytic
from systems.settings.checks import at_least, one_of

PROGRESSIVE = "progressive"
CENTRAL = "finite_difference_laplacian"


@dataclass(frozen=True)
class SDFConfig(FieldConfig):
    """Settings of all fields of signed distance.

    Args:
        sdf_bias: Initial shape b: "sphere", "ellipsoid", or a number.
        sdf_bias_params: The sphere's radius, or the ellipsoid's three half-axes.
        normal_type: Gradient: "finite_difference", "finite_difference_laplacian"
            (central differences, which `lambda_curvature` needs), or "analytic".
    """

    sdf_bias: str | float = "sphere"
    sdf_bias_params: float | tuple[float, float, float] = 0.5
    normal_type: str | None = "finite_difference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normal_type is None:
            raise ValueError(
                "`normal_type` is null, and a surface is rendered by its normals: "
                "write `finite_difference`."
            )
        if not isinstance(self.sdf_bias, str):
            return
        one_of("sdf_bias", self.sdf_bias, ("sphere", "ellipsoid", "a number"))
        given = self.sdf_bias_params
        count = len(given) if isinstance(given, tuple) else 1
        if count != {"sphere": 1, "ellipsoid": 3}[self.sdf_bias]:
            raise ValueError(
                f"`sdf_bias_params` is {given}: write a radius for a `sphere`, three "
                "half-axes for an `ellipsoid`."
            )
        for size in given if isinstance(given, tuple) else [given]:
            at_least("sdf_bias_params", size, 1e-6)

    def _normal_types(self) -> tuple[str, ...]:
        return (*super()._normal_types(), CENTRAL)


class SDFField(Field):
    """Signed distance, negated, and features in space."""

    outside = -1.0
    translucent = False

    @property
    def level(self) -> float:
        """Zero, unless the config names another value."""
        chosen = self.config.isosurface_threshold
        return 0.0 if isinstance(chosen, str) else chosen

    @abc.abstractmethod
    def eps(self, step: int | None) -> float:
        """Step ε of the finite differences."""

    def forward(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """Signed distances, negated, and features."""
        raw, features = self.raw(points, step)
        config = self.config
        shape = initial_shape(points, config.sdf_bias, config.sdf_bias_params)
        return -(raw + shape), features

    def distance(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, " points"]:
        """The signed distance alone, negative inside."""
        return -self(points, step)[0]

    def gradient(
        self,
        points: Float[Tensor, "points 3"],
        step: int | None,
        distance: Float[Tensor, " points"],
    ) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"] | None]:
        """The gradient of the signed distance, and its Laplacian if it is known.

        Args:
            points: Points.
            step: The step on the trajectory; None: the final form.
            distance: The signed distance at the points.
        """
        if self.config.normal_type == "analytic":
            with torch.enable_grad():
                points = points.detach().requires_grad_(True)
                total = self.distance(points, step).sum()
                (slope,) = torch.autograd.grad(total, points, create_graph=True)
            return slope, None
        eps, radius = self.eps(step), self.config.radius
        ends = eps * torch.eye(3, dtype=points.dtype, device=points.device)
        central = self.config.normal_type == CENTRAL
        offsets = torch.cat([ends, -ends]) if central else ends
        moved = (points[None] + offsets[:, None]).clamp(-radius, radius)
        values = self.distance(moved.flatten(0, 1), step).view(len(offsets), -1)
        if not central:
            return ((values - distance) / eps).T, None
        slope = (values[:3] - values[3:]).T / (2 * eps)
        return slope, (values.sum(0) - 6 * distance) / eps**2

    def normals(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points 3"]:
        """See `Field.normals`."""
        slope, _ = self.gradient(points, step, self.distance(points, step))
        return nn.functional.normalize(slope, dim=-1)


def initial_shape(
    points: Float[Tensor, "points 3"],
    kind: str | float,
    size: float | tuple[float, float, float],
) -> Tensor | float:
    """The initial shape b at points, a number if it is the same everywhere.

    Args:
        points: Points.
        kind: `SDFConfig.sdf_bias`.
        size: `SDFConfig.sdf_bias_params`.
    """
    if not isinstance(kind, str):
        return kind
    axes = points / points.new_tensor(size) if kind == "ellipsoid" else points
    norm = (axes.square().sum(-1) + 1e-12).sqrt()
    return norm - (size if isinstance(size, float | int) else 1.0)


@dataclass(frozen=True)
class ImplicitSDFConfig(SDFConfig):
    """Signed distance by a hash grid with networks (``implicit-sdf``).

    Args:
        pos_encoding_config: Hash-grid encoding of positions.
        mlp_network_config: Networks that decode the features.
        finite_difference_normal_eps: Step of the finite differences, or "progressive"
            for the cell of the finest active level.
    """

    pos_encoding_config: HashGridConfig = field(default_factory=HashGridConfig)
    mlp_network_config: NetworkConfig = field(default_factory=NetworkConfig)
    finite_difference_normal_eps: float | str = 0.01

    def _check_eps(self) -> None:
        if self.finite_difference_normal_eps != PROGRESSIVE:
            super()._check_eps()


class ImplicitSDF(HashGridField, SDFField):
    """A signed distance on a hash grid."""

    Config = ImplicitSDFConfig
    value_network = "sdf_network"

    def eps(self, step: int | None) -> float:
        """See `SDFField.eps`."""
        chosen = self.config.finite_difference_normal_eps
        if not isinstance(chosen, str):
            return chosen
        encoding = self.config.pos_encoding_config
        finest = encoding.active_levels(step) - 1
        side = encoding.base_resolution * encoding.per_level_scale**finest
        return 2 * self.config.radius / side


@dataclass(frozen=True)
class VoxelSDFConfig(SDFConfig):
    """Signed distance on a grid (``voxel-sdf``).

    Args:
        resolution: Grid points per side.
        sdf_scale: Factor from the stored value to the distance. Adam moves all stored
            values alike, and distances need smaller steps than colours.
        feature_scale: Factor from the stored to the raw features.
        finite_difference_normal_eps: Step of the finite differences, or "progressive"
            for a cell of the grid.
    """

    resolution: int = 32
    sdf_scale: float = 0.1
    feature_scale: float = 3.0
    finite_difference_normal_eps: float | str = PROGRESSIVE

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("resolution", self.resolution, 2)
        refuse_analytic(self.normal_type)

    def _check_eps(self) -> None:
        if self.finite_difference_normal_eps != PROGRESSIVE:
            super()._check_eps()


class VoxelSDF(SDFField):
    """Trilinear interpolation of a cube of side 2 · radius."""

    Config = VoxelSDFConfig
    config: VoxelSDFConfig

    def __init__(self, config: VoxelSDFConfig) -> None:
        super().__init__(config)
        channels, side = 1 + config.n_feature_dims, config.resolution
        self.grid = nn.Parameter(torch.zeros(1, channels, side, side, side))

    def raw(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """The interpolated values."""
        del step
        values = interpolate(self.grid, points / self.config.radius)
        scale = [self.config.sdf_scale, self.config.feature_scale]
        return values[:, 0] * scale[0], values[:, 1:] * scale[1]

    def eps(self, step: int | None) -> float:
        """See `SDFField.eps`."""
        del step
        chosen = self.config.finite_difference_normal_eps
        if not isinstance(chosen, str):
            return chosen
        return 2 * self.config.radius / (self.config.resolution - 1)
