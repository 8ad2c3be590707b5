"""The surface of a density: marching cubes, and the mesh as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import trimesh


class EmptySurface(ValueError):
    """There is no surface at the threshold; the message gives advice."""


def extract_mesh(
    density: Callable[[Tensor], Tensor],
    colour: Callable[[Tensor], Tensor],
    radius: float,
    resolution: int,
    threshold: float,
) -> Any:
    """The surface of a density by marching cubes.

    Args:
        density: Of points ``(points, 3)``.
        colour: From 0 to 1, of points.
        radius: Half the side of the cube that is searched.
        resolution: Grid points a side.
        threshold: The density at the surface.

    Raises:
        EmptySurface: The density is nowhere above the threshold, or everywhere.
    """
    import trimesh
    from skimage.measure import marching_cubes

    side = torch.linspace(-radius, radius, resolution)
    grid = torch.cartesian_prod(side, side, side)
    values = torch.cat([density(part) for part in grid.split(2**18)])
    volume = values.reshape(resolution, resolution, resolution)
    low, high = float(values.min()), float(values.max())
    if not low < threshold < high:
        middle = max(high / 2, 1e-3)
        raise EmptySurface(
            f"There is no surface at density {threshold:g}: the densities of this "
            f"object go from {low:.3g} to {high:.3g}. Try "
            f"`system.geometry.isosurface_threshold={middle:.3g}`, or more steps "
            "(`trainer.max_steps`)."
        )
    # Close the object where it leaves the cube.
    for axis in range(3):
        volume.select(axis, 0).fill_(low)
        volume.select(axis, -1).fill_(low)
    corners, faces, _, _ = marching_cubes(volume.numpy(), threshold)
    vertices = torch.from_numpy(corners.copy()).float()
    vertices = vertices * (2 * radius / (resolution - 1)) - radius
    colours = torch.cat([colour(part) for part in vertices.split(2**18)])
    return trimesh.Trimesh(
        vertices.numpy(),
        # Densities rise inwards, so the faces come out inside out.
        faces[:, ::-1],
        vertex_colors=(colours.clamp(0, 1) * 255).round().byte().numpy(),
        process=False,
    )


def save_mesh(mesh: trimesh.Trimesh, folder: Path) -> list[Path]:
    """Write a mesh with vertex colours as ``mesh.glb`` and ``mesh.obj``.

    The glb stands upright in viewers (y up); the obj keeps the scene's axes (z up).
    """
    import trimesh

    folder.mkdir(parents=True, exist_ok=True)
    upright = mesh.copy()
    upright.apply_transform(
        trimesh.transformations.rotation_matrix(-1.5707963267948966, [1, 0, 0])
    )
    paths = [folder / "mesh.glb", folder / "mesh.obj"]
    for version, path in zip((upright, mesh), paths, strict=True):
        version.export(path)
    return paths
