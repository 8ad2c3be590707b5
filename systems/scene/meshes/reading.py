"""Mesh files of any origin as one list of faces with materials."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from systems.scene.colours import to_linear
from systems.scene.meshes.source import Look

GENERATOR = "dreampropeller"
"""Stands in the files that are written here; it tells how their axes are meant."""
COMPRESSED = {
    "KHR_draco_mesh_compression": "Draco-compressed",
    "EXT_meshopt_compression": "meshopt-compressed",
    "KHR_texture_basisu": "compressed as Basis textures",
}
"""Extensions of glTF that are not read, in words."""
BINARY = (".glb", ".gltf")


class MeshError(ValueError):
    """A mesh cannot be used; the message says what to do."""


@dataclass
class Raw:
    """The triangles of a file as they are, in the file's frame.

    Attributes:
        vertices: Positions, shape ``(vertices, 3)``.
        faces: Vertex indices, shape ``(faces, 3)``.
        normals: Normals of the vertices; rows of NaN where the file has none.
        uv: Texture coordinates; rows of NaN likewise.
        colours: Vertex colours, linear light; ones where the file has none.
        look: Index of the material of each face.
        looks: Materials.
        own: Whether this project wrote the file.
        up: Axis that points up, as the file says; None: it does not say.
        notes: Sentences about what was left out.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    colours: np.ndarray
    look: np.ndarray
    looks: list[Look]
    own: bool = False
    up: str | None = None
    notes: list[str] = field(default_factory=list)


def read_file(path: Path) -> Raw:
    """Read all triangles of a file.

    Raises:
        MeshError: The file cannot be read, or has no triangles.
    """
    import trimesh

    if not path.is_file():
        raise MeshError(
            f"There is no mesh `{path}`: write the path of a glb, gltf, obj, ply, stl "
            "or off file as `system.geometry.mesh=…`."
        )
    kind = path.suffix.lower().removeprefix(".")
    known = {"glb", "gltf", "obj", "ply", "stl", "off"}
    if kind not in known:
        raise MeshError(
            f"`{path}` is not of a format that is read here ({', '.join(sorted(known))}"
            "): export it as glb, for example from Blender."
        )
    told = _check_gltf(path) if path.suffix.lower() in BINARY else {}
    silent = logging.getLogger("trimesh")
    before, silent.disabled = silent.disabled, True
    try:
        scene: Any = trimesh.load_scene(path, process=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeshError(
            f"`{path}` cannot be read as {kind} ({reason.rstrip('.')}): open it in a "
            "viewer to see whether it is whole, and export it again as glb."
        ) from error
    finally:
        silent.disabled = before
    raw = _flatten(scene, path)
    raw.notes += told.get("notes", [])
    own, raw.up = told.get("own", False), told.get("up")
    if kind == "obj":
        with open(path, encoding="utf-8", errors="replace") as file:
            own = GENERATOR in file.readline()
        raw.up = "+z" if own else "+y"
    raw.own = own
    return raw


def _check_gltf(path: Path) -> dict[str, Any]:
    """What the tree of a glTF file says; refuse what is not read."""
    import pygltflib

    try:
        tree: Any = pygltflib.GLTF2().load(path)
        required = set(tree.extensionsRequired or [])
    except Exception as error:
        raise MeshError(
            f"`{path}` is no whole glTF file: export it again as glb."
        ) from error
    for name in sorted(required & COMPRESSED.keys()):
        raise MeshError(
            f"`{path}` is {COMPRESSED[name]} (`{name}`), which is not read here: "
            "export it without compression."
        )
    notes = ["Skinned: taken in its rest pose."] if tree.skins else []
    if any(m.alphaMode not in (None, "OPAQUE") for m in tree.materials or []):
        notes.append("Transparency is ignored: every face counts as opaque.")
    own = GENERATOR in (tree.asset.generator or "")
    return {"own": own, "up": "+y", "notes": notes}


def _flatten(scene: Any, path: Path) -> Raw:
    """All instances of all meshes of a scene, transformed."""
    import trimesh

    parts: list[Raw] = []
    skipped = 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh) or not len(geometry.faces):
            skipped += 1
            continue
        parts.append(_instance(geometry, np.asarray(transform, float), path))
    if not parts:
        what = "points or lines, but no triangles" if skipped else "no geometry"
        raise MeshError(
            f"`{path}` holds {what}: export a mesh with faces (for a point cloud, "
            "reconstruct a surface first)."
        )
    raw = _joined(parts)
    if skipped:
        raw.notes.append(f"{skipped} object(s) without triangles were left out.")
    return raw


def _joined(parts: list[Raw]) -> Raw:
    """The parts as one."""
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    number = np.cumsum([0, *(len(part.looks) for part in parts)])

    def stacked(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Raw(
        vertices=stacked("vertices"),
        faces=np.concatenate(
            [p.faces + s for p, s in zip(parts, starts, strict=False)]
        ),
        normals=stacked("normals"),
        uv=stacked("uv"),
        colours=stacked("colours"),
        look=np.concatenate([p.look + n for p, n in zip(parts, number, strict=False)]),
        looks=[look for part in parts for look in part.looks],
    )


def _instance(mesh: Any, transform: np.ndarray, path: Path) -> Raw:
    """One instance of a mesh, in the frame of the scene."""
    if mesh.visual.kind == "face":  # each face gets vertices of its own
        shown = np.asarray(mesh.visual.face_colors).repeat(3, 0)
        mesh = mesh.copy()
        mesh.unmerge_vertices()
        mesh.visual.vertex_colors = shown
    faces = np.asarray(mesh.faces, np.int64)
    local = np.asarray(mesh.vertices, float)
    if faces.min() < 0 or faces.max() >= len(local):
        raise MeshError(
            f"`{path}` has a face of vertex {faces.max()} and only {len(local)} "
            "vertices: export it again."
        )
    turn = transform[:3, :3]
    vertices = local @ turn.T + transform[:3, 3]
    normals = np.full((len(local), 3), np.nan)
    # trimesh keeps a file's normals in its cache, and computes others on request.
    if "vertex_normals" in mesh._cache:
        with np.errstate(all="ignore"):
            given = np.asarray(mesh.vertex_normals) @ np.linalg.pinv(turn)
            normals = given / np.linalg.norm(given, axis=1, keepdims=True)
    if np.linalg.det(turn) < 0:  # a mirrored instance is inside out
        faces = faces[:, ::-1]
    uv = getattr(mesh.visual, "uv", None)
    fits = uv is not None and len(uv) == len(local)
    texture, factor = _material(mesh)
    return Raw(
        vertices=vertices,
        faces=faces,
        normals=normals,
        uv=np.asarray(uv, float)[:, :2] if fits else np.full((len(local), 2), np.nan),
        colours=_vertex_colours(mesh, path),
        look=np.zeros(len(faces), np.int64),
        looks=[Look(factor, texture if fits else None)],
    )


def _material(mesh: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """Texture (sRGB bytes) and factor (linear) of the base colour."""
    material: Any = getattr(mesh.visual, "material", None)
    factor, image = getattr(material, "baseColorFactor", None), None
    if material is not None:
        image = getattr(material, "baseColorTexture", getattr(material, "image", None))
    texture = None if image is None else np.asarray(image.convert("RGB"))
    diffuse = getattr(material, "diffuse", None)
    if factor is None and diffuse is not None:  # of an mtl file: sRGB
        given = np.asarray(diffuse, float)[:3] / 255
        white = np.ones(3) if texture is not None else given
        return texture, to_linear(white)
    if factor is None:
        return texture, np.ones(3)
    factor = np.asarray(factor, float)[:3]
    return texture, factor / 255 if factor.max() > 1 else factor


def _vertex_colours(mesh: Any, path: Path) -> np.ndarray:
    """Vertex colours as linear light; those of glTF are linear already."""
    visual, count = mesh.visual, len(mesh.vertices)
    if visual.kind == "vertex":
        colours = np.asarray(visual.vertex_colors)
    else:
        stored = getattr(visual, "vertex_attributes", None) or {}
        colours = stored.get("color") if "color" in stored else None
    if colours is None or len(colours) != count:
        return np.ones((count, 3))
    colours = np.asarray(colours)
    whole = np.iinfo(colours.dtype).max if colours.dtype.kind in "ui" else 1
    values = colours[:, :3].astype(float) / whole
    return values if path.suffix.lower() in BINARY else to_linear(values)
