r"""A surface on a grid of tetrahedra: a signed distance and an offset per vertex.

The surface is the zero set of the distances f over the vertices

$$x_i = g_i + \tfrac h2 \tanh(d_i)$$

with grid points $g_i$, cells of side h and learned offsets $d_i$ (T. Shen et al., 2021,
DMTet, arXiv 2111.04276, section 3.1; the bound on offsets as in threestudio). Colours
are features of a second, continuous field at the points of the surface.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from systems.scene.fields.base import Field
from systems.scene.fields.hash_grid import (
    HashGridConfig,
    HashGridFeatures,
    NetworkConfig,
)
from systems.scene.fields.sdf import SDFConfig, initial_shape
from systems.scene.fields.voxel_grid import interpolate
from systems.scene.isosurface import EmptySurface
from systems.scene.meshes.tetrahedra import TetrahedralGrid, march
from systems.settings.checks import at_least


@dataclass(frozen=True)
class TetrahedraConfig(SDFConfig):
    """Settings of all tetrahedral grids.

    Args:
        isosurface_resolution: Cells per side of the grid, each of six tetrahedra.
        isosurface_deformable_grid: Learn offsets of the vertices.
        fix_geometry: Keep the surface and learn its colours alone.
        geometry_only: A surface without colours, which are grey.
        sdf_scale: Factor from the stored value to the distance.
    """

    isosurface_resolution: int = 64
    isosurface_deformable_grid: bool = True
    fix_geometry: bool = False
    geometry_only: bool = False
    sdf_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("isosurface_resolution", self.isosurface_resolution, 2)
        if self.fix_geometry and self.geometry_only:
            raise ValueError(
                "`fix_geometry` leaves the colours to learn and `geometry_only` the "
                "surface: nothing is left. Leave one of them out."
            )


class TetrahedralField(Field):
    """A signed distance, negated, on a grid of tetrahedra, and features in space."""

    Config = TetrahedraConfig
    sdf: Tensor
    deformation: Tensor
    outside = -1.0
    translucent = False

    def __init__(self, config: TetrahedraConfig) -> None:
        super().__init__(config)
        # Not buffers: the grid is no part of the state.
        self._grid = TetrahedralGrid.of(config.isosurface_resolution)
        points = self._grid.vertices * config.radius
        shape = initial_shape(points, config.sdf_bias, config.sdf_bias_params)
        start = torch.zeros(len(points)) + shape
        # A surface that is kept belongs to the state, so that a checkpoint has it.
        keep = self.register_buffer if config.fix_geometry else self._learn
        keep("sdf", start / config.sdf_scale)
        if config.isosurface_deformable_grid:
            keep("deformation", torch.zeros_like(points))

    def _learn(self, name: str, start: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(start))

    @property
    def has_features(self) -> bool:
        """Whether it has colours of its own."""
        return not self.config.geometry_only

    @property
    def level(self) -> float:
        """The surface is where the distance is zero."""
        return 0.0

    @abc.abstractmethod
    def learned_features(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points channels"]:
        """Features for the material, of a field that has them."""

    def features(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points channels"]:
        """Features for the material; zeros with `geometry_only`."""
        if self.config.geometry_only:
            return points.new_zeros(len(points), self.config.n_feature_dims)
        return self.learned_features(points, step)

    def distances(self) -> Float[Tensor, " vertices"]:
        """The signed distance at the vertices of the grid."""
        return self.sdf * self.config.sdf_scale

    def grid_points(self) -> Float[Tensor, "vertices 3"]:
        """The vertices of the grid, without their offsets."""
        return self._grid.vertices * self.config.radius

    def surface(self) -> tuple[Float[Tensor, "points 3"], Int[Tensor, "faces 3"]]:
        """The triangles of the surface, differentiable in distances and offsets.

        Raises:
            EmptySurface: The distances have the same sign everywhere.
        """
        if self._grid.vertices.device != self.sdf.device:
            self._grid = self._grid.to(self.sdf.device)
        config = self.config
        positions = self.grid_points()
        if config.isosurface_deformable_grid:
            half = config.radius / config.isosurface_resolution
            positions = positions + half * torch.tanh(self.deformation)
        found = march(self.distances(), positions, self._grid.tetrahedra)
        if not len(found[1]):
            raise EmptySurface(
                "The surface is empty: its signed distances have the same sign at all "
                "vertices of the grid. Write a smaller learning rate "
                "(`system.optimizer.params.geometry.lr`), or start from a finished "
                "run (`system.geometry_convert_from=RUN`)."
            )
        return found

    def raw(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """Interpolated distances, on the grid without its offsets, and features."""
        side = self.config.isosurface_resolution + 1
        grid = self.distances().view(1, 1, side, side, side)
        # `grid_sample` wants x last, and the grid's first axis is x.
        values = interpolate(grid, points.flip(-1) / self.config.radius)
        return values[:, 0], self.features(points, step)

    def forward(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """Signed distances, negated, and features."""
        distances, features = self.raw(points, step)
        return -distances, features

    def normals(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points 3"]:
        """See `Field.normals`; by central differences over a cell."""
        size = 2 * self.config.radius / self.config.isosurface_resolution
        ends = size / 2 * torch.eye(3, dtype=points.dtype, device=points.device)
        moved = points[None] + torch.cat([ends, -ends])[:, None]
        values = self.raw(moved.flatten(0, 1), step)[0].view(6, -1)
        return nn.functional.normalize((values[:3] - values[3:]).T, dim=-1)


@dataclass(frozen=True)
class TetrahedraSDFGridConfig(TetrahedraConfig):
    """Tetrahedra with colours of a hash grid (``tetrahedra-sdf-grid``).

    Args:
        pos_encoding_config: Hash-grid encoding of positions.
        mlp_network_config: Network that decodes the features.
    """

    pos_encoding_config: HashGridConfig = field(default_factory=HashGridConfig)
    mlp_network_config: NetworkConfig = field(default_factory=NetworkConfig)


class TetrahedraSDFGrid(TetrahedralField, HashGridFeatures):
    """Tetrahedra with colours of a hash grid."""

    Config = TetrahedraSDFGridConfig

    def __init__(self, config: TetrahedraSDFGridConfig) -> None:
        super().__init__(config)
        if config.geometry_only:
            del self.encoding, self.feature_network

    def learned_features(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points channels"]:
        """See `TetrahedralField.learned_features`."""
        return self.feature_network(self.encode(points, step))


@dataclass(frozen=True)
class VoxelTetrahedraConfig(TetrahedraConfig):
    """Tetrahedra with colours of a voxel grid (``voxel-tetrahedra``).

    Args:
        resolution: Grid points per side of the colours.
        feature_scale: Factor from the stored to the raw features.
        sdf_scale: Factor from the stored value to the distance. Adam moves all stored
            values alike, and distances need smaller steps than colours.
    """

    resolution: int = 64
    sdf_scale: float = 0.1
    feature_scale: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("resolution", self.resolution, 2)


class VoxelTetrahedra(TetrahedralField):
    """Tetrahedra with colours of a voxel grid."""

    Config = VoxelTetrahedraConfig

    def __init__(self, config: VoxelTetrahedraConfig) -> None:
        super().__init__(config)
        if config.geometry_only:
            return
        channels, side = config.n_feature_dims, config.resolution
        self.grid = nn.Parameter(torch.zeros(1, channels, side, side, side))

    def learned_features(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points channels"]:
        """See `TetrahedralField.learned_features`."""
        del step
        found = interpolate(self.grid, points / self.config.radius)
        return self.config.feature_scale * found
