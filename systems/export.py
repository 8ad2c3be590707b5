"""Results as files people can open: pictures, a film, meshes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from systems.toybox.pictures import save_sheet, to_bytes

if TYPE_CHECKING:
    import trimesh

FRAMES_PER_SECOND = 30


def save_film(frames: Iterable[Float[Tensor, "3 height width"]], path: Path) -> None:
    """Write frames as an mp4 that every browser plays.

    Args:
        frames: From 0 to 1; even numbers of pixels each way.
        path: Ends in ``.mp4``.
    """
    import imageio.v2 as imageio

    part = path.with_name(f"part-{path.name}")
    with imageio.get_writer(
        part, fps=FRAMES_PER_SECOND, codec="libx264", quality=8, macro_block_size=2
    ) as film:
        for frame in frames:
            film.append_data(to_bytes(frame))  # pyright: ignore[reportAttributeAccessIssue]
    os.replace(part, path)


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


def save_picture(pictures: Tensor, path: Path, columns: int = 4) -> None:
    """Write pictures as one sheet, in one go: a viewer never sees half a file."""
    part = path.with_name(f"part-{path.name}")
    save_sheet(pictures, part, columns)
    os.replace(part, path)
