"""A field stored on a regular grid, with trilinear interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from systems.scene.fields.density import DensityConfig, DensityField
from systems.settings.checks import at_least


@dataclass(frozen=True)
class VoxelGridConfig(DensityConfig):
    """A voxel grid (``voxel-grid``).

    Args:
        resolution: Grid points per side.
        density_scale: Factor from the stored to the raw density. Adam moves all stored
            values alike, and densities need larger steps than colours.
        feature_scale: Factor from the stored to the raw features.
    """

    resolution: int = 32
    density_scale: float = 10.0
    feature_scale: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("resolution", self.resolution, 2)
        refuse_analytic(self.normal_type)


class VoxelGrid(DensityField):
    """Trilinear interpolation of a cube of side 2 · radius."""

    Config = VoxelGridConfig

    def __init__(self, config: VoxelGridConfig) -> None:
        super().__init__(config)
        side = config.resolution
        self.grid = nn.Parameter(
            torch.zeros(1, 1 + config.n_feature_dims, side, side, side)
        )
        scale = [config.density_scale] + [config.feature_scale] * config.n_feature_dims
        self._scale = scale

    def raw(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """The interpolated values."""
        del step
        values = interpolate(self.grid, points / self.config.radius)
        values = values * values.new_tensor(self._scale)
        return values[:, 0], values[:, 1:]


def interpolate(
    grid: Float[Tensor, "1 channels side side side"], points: Float[Tensor, "points 3"]
) -> Float[Tensor, "points channels"]:
    """Values of a grid over the cube [−1, 1]³, beyond which they are constant."""
    return torch.nn.functional.grid_sample(
        grid, points[None, None, None], align_corners=True, padding_mode="border"
    )[0, :, 0, 0].T


def refuse_analytic(normal_type: str | None) -> None:
    """Refuse normals by differentiation, which trilinear interpolation has no use for.

    Raises:
        ValueError: Says what to write instead.
    """
    if normal_type == "analytic":
        raise ValueError(
            "`normal_type` is `analytic`, which needs second derivatives that voxels "
            "do not have: write `finite_difference`."
        )
