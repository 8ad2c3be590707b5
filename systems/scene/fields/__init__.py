"""Fields: representations of the object."""

from collections.abc import Mapping

from systems.scene.fields.base import Field, FieldConfig
from systems.scene.fields.density import DensityField
from systems.scene.fields.hash_grid import ImplicitVolume
from systems.scene.fields.sdf import ImplicitSDF, SDFField, VoxelSDF
from systems.scene.fields.tetrahedra import (
    TetrahedralField,
    TetrahedraSDFGrid,
    VoxelTetrahedra,
)
from systems.scene.fields.voxel_grid import VoxelGrid

FIELDS: Mapping[str, type[Field]] = {
    "voxel-grid": VoxelGrid,
    "implicit-volume": ImplicitVolume,
    "voxel-sdf": VoxelSDF,
    "implicit-sdf": ImplicitSDF,
    "tetrahedra-sdf-grid": TetrahedraSDFGrid,
    "voxel-tetrahedra": VoxelTetrahedra,
}

__all__ = [
    "FIELDS",
    "DensityField",
    "Field",
    "FieldConfig",
    "ImplicitSDF",
    "ImplicitVolume",
    "SDFField",
    "TetrahedraSDFGrid",
    "TetrahedralField",
    "VoxelGrid",
    "VoxelSDF",
    "VoxelTetrahedra",
]
