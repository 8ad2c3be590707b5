"""A field stored on a regular grid, with trilinear interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from systems.scene.fields.base import Field, FieldConfig
from systems.settings.checks import at_least


@dataclass(frozen=True)
class VoxelGridConfig(FieldConfig):
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
        if self.normal_type == "analytic":
            raise ValueError(
                "`normal_type` is `analytic`, which needs second derivatives that a "
                "`voxel-grid` does not have: write `finite_difference`."
            )


class VoxelGrid(Field):
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
        where = (points / self.config.radius)[None, None, None]
        values = torch.nn.functional.grid_sample(
            self.grid, where, align_corners=True, padding_mode="border"
        )[0, :, 0, 0]
        values = values.T * values.new_tensor(self._scale)
        return values[:, 0], values[:, 1:]
