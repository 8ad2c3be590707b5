r"""A mesh as files: `mesh.glb` for viewers and engines, `mesh.obj` for everything else.

Vertex colours of glTF are linear light, base colour textures sRGB (glTF 2.0, sections
3.9.2 and 3.7.2.1); obj and mtl leave it open, and their readers expect sRGB. A glTF
mesh without a material counts as metallic, so metalness and roughness are always
written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from systems.files import written
from systems.scene.colours import to_linear, to_srgb
from systems.scene.meshes.reading import GENERATOR

if TYPE_CHECKING:
    import trimesh

__all__ = ["load_glb", "save_mesh", "to_glb", "to_linear", "to_srgb", "with_texture"]

MATERIAL = {
    "name": "matte",
    "pbrMetallicRoughness": {
        "baseColorFactor": [1.0, 1.0, 1.0, 1.0],
        "metallicFactor": 0.0,
        "roughnessFactor": 1.0,
    },
}
"""The material of a mesh that brings none."""
LARGEST_FILE = 2**31
"""Bytes of a mesh's file that is read."""
LARGEST_HEADER = 2**24
"""Bytes of the header of a glb."""
LARGEST_COUNT = 200_000_000
"""Vertices and corners of faces, all attributes counted."""
_UPRIGHT = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)
"""From z up to y up: (x, y, z) becomes (x, z, −y)."""


def save_mesh(mesh: trimesh.Trimesh, folder: Path) -> list[Path]:
    """Write a mesh as ``mesh.glb`` and ``mesh.obj``.

    The mesh has sRGB vertex colours or, made by `with_texture`, a texture; then there
    are ``mesh.mtl`` and ``mesh.png`` for the obj. The glb stands upright in viewers (y
    up); the obj keeps the scene's axes (z up).

    Returns:
        The files, glb and obj first.

    Raises:
        OSError: A file cannot be written; the message names it.
    """
    files = {"mesh.glb": to_glb(mesh), **_obj(mesh)}
    for name, content in files.items():
        with written(folder / name) as part:
            part.write_bytes(content)
    for name in {"mesh.mtl", "mesh.png"} - files.keys():  # of an earlier export
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def with_texture(
    vertices: np.ndarray,
    faces: np.ndarray,
    normals: np.ndarray | None,
    uv: np.ndarray,
    albedo: np.ndarray,
    roughness: float | np.ndarray = 1.0,
    metallic: float | np.ndarray = 0.0,
) -> trimesh.Trimesh:
    """A mesh with a texture.

    Args:
        vertices: Positions, z up, shape ``(vertices, 3)``.
        faces: Vertex indices, shape ``(faces, 3)``.
        normals: Normals of the vertices; None: those of the faces around them.
        uv: Texture coordinates, v upwards, shape ``(vertices, 2)``.
        albedo: Display colours from 0 to 1, shape ``(side, side, 3)``.
        roughness: Roughness from 0 to 1, a number or a map ``(side, side)``.
        metallic: Metalness from 0 to 1, likewise.
    """
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    surface: dict[str, Any] = {"metallicFactor": metallic, "roughnessFactor": roughness}
    if isinstance(roughness, np.ndarray) or isinstance(metallic, np.ndarray):
        maps = [np.zeros(albedo.shape[:2]), roughness, metallic]  # green and blue
        flat = np.stack([np.broadcast_to(m, albedo.shape[:2]) for m in maps], -1)
        surface = {"metallicFactor": 1.0, "roughnessFactor": 1.0}
        surface["metallicRoughnessTexture"] = Image.fromarray(_to_bytes(flat))
    material = PBRMaterial(
        name="surface",
        baseColorTexture=Image.fromarray(_to_bytes(albedo)),
        baseColorFactor=[255, 255, 255, 255],
        **surface,
    )
    return trimesh.Trimesh(
        vertices,
        faces,
        vertex_normals=normals,
        visual=TextureVisuals(uv=uv, material=material),
        process=False,
    )


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def is_textured(mesh: Any) -> bool:
    """Whether a mesh has a texture, not vertex colours."""
    return mesh.visual.kind == "texture" and mesh.visual.uv is not None


def to_glb(*meshes: trimesh.Trimesh) -> bytes:
    """Meshes as binary glTF, each an object of its own.

    Each has sRGB vertex colours, or a texture.
    """
    import trimesh
    from trimesh.exchange.gltf import export_glb

    scene = trimesh.Scene()
    for number, mesh in enumerate(meshes):
        name = "mesh" if len(meshes) == 1 else f"part_{number + 1}"
        scene.add_geometry(_upright(mesh), geom_name=name, node_name=name)

    def finish(tree: dict[str, Any]) -> None:
        tree["asset"]["generator"] = GENERATOR
        plain = len(tree.setdefault("materials", []))
        for entry in tree["meshes"]:
            for primitive in entry["primitives"]:
                # trimesh writes its own colours in 8 bits, too coarse for linear
                # light; user attributes keep their precision.
                attributes = primitive["attributes"]
                if "_COLOR" in attributes:
                    attributes["COLOR_0"] = attributes.pop("_COLOR")
                    primitive["material"] = plain
        if any(not is_textured(mesh) for mesh in meshes):
            tree["materials"].append(MATERIAL)

    return export_glb(scene, include_normals=True, tree_postprocessor=finish)


def _upright(mesh: Any) -> trimesh.Trimesh:
    """A mesh with y up, and linear vertex colours as an attribute."""
    import trimesh

    if is_textured(mesh):
        upright = mesh.copy()
    else:
        colours = to_linear(np.asarray(mesh.visual.vertex_colors)[:, :3] / 255)
        upright = trimesh.Trimesh(
            mesh.vertices,
            mesh.faces,
            vertex_attributes={"_COLOR": colours.astype(np.float32)},
            process=False,
        )
    return upright.apply_transform(_UPRIGHT)


def _obj(mesh: Any) -> dict[str, bytes]:
    """The mesh as obj and, if it has a texture, mtl and png.

    An mtl knows no vertex colours, and its readers would show a plain surface.
    """
    text = "\n".join(_obj_lines(mesh)).encode()
    if not is_textured(mesh):
        return {"mesh.obj": text}
    look, image = mesh.visual.material, io.BytesIO()
    look.baseColorTexture.save(image, format="png")
    material = [
        *("newmtl surface", "Ka 0 0 0", "Kd 1 1 1", "Ks 0 0 0", "illum 1"),
        *(f"Pr {look.roughnessFactor:g}", f"Pm {look.metallicFactor:g}"),
        "map_Kd mesh.png\n",
    ]
    mtl = "\n".join(material).encode()
    return {"mesh.obj": text, "mesh.mtl": mtl, "mesh.png": image.getvalue()}


def _obj_lines(mesh: Any) -> Iterator[str]:
    yield f"# {GENERATOR}: z is up, the front is +x, colours are sRGB"
    vertices, normals = np.asarray(mesh.vertices), np.asarray(mesh.vertex_normals)
    corner, material = "{0}//{0}", []
    if is_textured(mesh):
        yield "mtllib mesh.mtl"
        corner, material = "{0}/{0}/{0}", ["usemtl surface"]
        yield from (f"v {x:.7g} {y:.7g} {z:.7g}" for x, y, z in vertices)
        yield from (f"vt {u:.7g} {v:.7g}" for u, v in np.asarray(mesh.visual.uv))
    else:
        colours = np.asarray(mesh.visual.vertex_colors)[:, :3] / 255
        rows = np.concatenate([vertices, colours], 1)
        yield from ("v " + " ".join(f"{x:.7g}" for x in row) for row in rows)
    yield from (f"vn {x:.5g} {y:.5g} {z:.5g}" for x, y, z in normals)
    yield from material
    for face in (np.asarray(mesh.faces) + 1).tolist():
        yield "f " + " ".join(corner.format(index) for index in face)
    yield ""


_FAR = 1e6
"""Coordinates from which a mesh is no object of ours: a damaged file."""


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
        if not len(mesh.faces) or not (np.abs(mesh.vertices) < _FAR).all():
            raise ValueError("it has no faces, or vertices beyond any scene")
        if is_textured(mesh):
            return mesh.apply_transform(_UPRIGHT.T)
        linear = np.asarray(mesh.visual.vertex_attributes["color"])[:, :3]
        linear = np.nan_to_num(linear).clip(0, 1)  # as glTF says
    except Exception as error:  # whatever a damaged file raises inside trimesh
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"`{path}` is no mesh that was exported here ({reason}): export it again, "
            "`launch.py --export resume=RUN`."
        ) from error
    again = trimesh.Trimesh(
        mesh.vertices,
        mesh.faces,
        vertex_colors=_to_bytes(to_srgb(linear)),
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
