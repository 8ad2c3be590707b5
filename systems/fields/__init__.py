"""Fields: where the object is stored."""

from collections.abc import Mapping

from systems.fields.base import Field, FieldConfig
from systems.fields.hash_grid import ImplicitVolume
from systems.fields.voxel_grid import VoxelGrid

FIELDS: Mapping[str, type[VoxelGrid] | type[ImplicitVolume]] = {
    "voxel-grid": VoxelGrid,
    "implicit-volume": ImplicitVolume,
}

__all__ = ["FIELDS", "Field", "FieldConfig", "ImplicitVolume", "VoxelGrid"]
