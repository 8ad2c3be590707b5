r"""A mesh as files: `mesh.glb` for viewers and engines, `mesh.obj` for everything else.

The colours of glTF are linear light (glTF 2.0, section 3.9.2), those of a screen sRGB
(IEC 61966-2-1):

$$c_{lin} = \begin{cases} c / 12.92 & c \le 0.04045 \\
  ((c + 0.055) / 1.055)^{2.4} & \text{otherwise} \end{cases}$$

A glTF mesh without a material counts as metallic, so a rough, non-metallic material is
written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from systems.files import written

if TYPE_CHECKING:
    import trimesh

MATERIAL = {
    "name": "matte",
    "pbrMetallicRoughness": {
        "baseColorFactor": [1.0, 1.0, 1.0, 1.0],
        "metallicFactor": 0.0,
        "roughnessFactor": 1.0,
    },
}
LARGEST_FILE = 2**31
"""Bytes of a mesh's file that is read."""
LARGEST_HEADER = 2**24
"""Bytes of the header of a glb."""
LARGEST_COUNT = 200_000_000
"""Vertices and corners of faces, all attributes counted."""
_UPRIGHT = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)
"""From z up to y up: (x, y, z) becomes (x, z, −y)."""


def save_mesh(mesh: trimesh.Trimesh, folder: Path) -> list[Path]:
    """Write a mesh with sRGB vertex colours as ``mesh.glb`` and ``mesh.obj``.

    The glb stands upright in viewers (y up), its colours are linear; the obj keeps the
    scene's axes (z up) and sRGB colours, as its readers expect.

    Raises:
        OSError: A file cannot be written; the message names it.
    """
    paths = [folder / "mesh.glb", folder / "mesh.obj"]
    with written(paths[0]) as part:
        part.write_bytes(to_glb(mesh))
    with written(paths[1]) as part:
        part.write_text(str(mesh.export(file_type="obj")), encoding="utf-8")
    return paths


def to_glb(*meshes: trimesh.Trimesh) -> bytes:
    """Meshes with sRGB vertex colours as binary glTF, each an object of its own."""
    import trimesh
    from trimesh.exchange.gltf import export_glb

    scene = trimesh.Scene()
    for number, mesh in enumerate(meshes):
        look: Any = mesh.visual
        colours = np.asarray(look.vertex_colors)[:, :3] / 255
        upright = trimesh.Trimesh(
            mesh.vertices,
            mesh.faces,
            vertex_attributes={"_COLOR": to_linear(colours).astype(np.float32)},
            process=False,
        )
        upright.apply_transform(_UPRIGHT)
        name = "mesh" if len(meshes) == 1 else f"part_{number + 1}"
        scene.add_geometry(upright, geom_name=name, node_name=name)

    def finish(tree: dict[str, Any]) -> None:
        tree["materials"] = [MATERIAL]
        for entry in tree["meshes"]:
            for primitive in entry["primitives"]:
                # trimesh writes its own colours in 8 bits, too coarse for linear
                # light; user attributes keep their precision.
                attributes = primitive["attributes"]
                attributes["COLOR_0"] = attributes.pop("_COLOR")
                primitive["material"] = 0

    return export_glb(scene, include_normals=True, tree_postprocessor=finish)


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Display colours from 0 to 1 as linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light from 0 to 1 as display colours; the inverse of `to_linear`."""
    low = linear <= 0.0031308
    return np.where(low, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def load_glb(path: Path) -> trimesh.Trimesh:
    """Read a ``mesh.glb`` back as it was passed to `save_mesh`: z up, sRGB colours.

    trimesh keeps the colours of a mesh with a material apart from its visual. Other
    files that a stranger's glb refers to are not opened.

    Raises:
        ValueError: It is no such file, or larger than a mesh of ours can be.
    """
    import trimesh

    _check_glb(path)
    try:
        with open(path, "rb") as file:  # by its content alone: no path to look beside
            scene: Any = trimesh.load_scene(file, file_type="glb", process=False)
        (mesh,) = scene.geometry.values()
        linear = np.asarray(mesh.visual.vertex_attributes["color"])[:, :3]
        if not len(mesh.faces) or not np.isfinite(mesh.vertices).all():
            raise ValueError("it has no faces, or vertices that are not finite")
    except Exception as error:  # whatever a damaged file raises inside trimesh
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"`{path}` is no mesh that was exported here ({reason}): export it again, "
            "`launch.py --export resume=RUN`."
        ) from error
    again = trimesh.Trimesh(
        mesh.vertices,
        mesh.faces,
        vertex_colors=(to_srgb(linear) * 255).round().astype(np.uint8),
        process=False,
    )
    return again.apply_transform(_UPRIGHT.T)


def _check_glb(path: Path) -> None:
    """Refuse a binary glTF whose header promises more than a mesh can be.

    A glb begins with its magic, version and length (12 bytes), then a chunk of JSON,
    whose accessors count what the mesh holds (glTF 2.0, section 4.4).

    Raises:
        ValueError: Names the size, and the largest that is read.
    """
    with open(path, "rb") as file:
        start = file.read(20)
        if len(start) < 20 or start[:4] != b"glTF" or start[16:] != b"JSON":
            raise ValueError(
                f"`{path}` is no binary glTF: name a `mesh.glb` that was exported here."
            )
        length, header = (int.from_bytes(start[i : i + 4], "little") for i in (8, 12))
        here = path.stat().st_size
        if max(here, length) > LARGEST_FILE or header > LARGEST_HEADER:
            raise ValueError(
                f"`{path}` is larger than a mesh may be here ({max(here, length):,} "
                f"bytes, {header:,} of them header): at most {LARGEST_FILE:,} bytes "
                f"and {LARGEST_HEADER:,} are read."
            )
        text = file.read(header)
    try:
        tree = json.loads(text)
        counts = [int(entry["count"]) for entry in tree["accessors"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`{path}` is damaged: its header cannot be read. Export it again."
        ) from error
    if min(counts, default=0) < 0 or sum(counts) > LARGEST_COUNT:
        raise ValueError(
            f"`{path}` speaks of {sum(counts):,} vertices and corners of faces: at "
            f"most {LARGEST_COUNT:,} are read. Decimate the mesh first."
        )
