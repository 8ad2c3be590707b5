r"""From a mesh file to a surface that can be textured.

The scene is right-handed, z up, its front towards +x, and the object fits the ball of
radius 1 around the origin. A file says which way is up only in glTF (+y; its front is
+z); for the others the custom of their writers counts, and the settings overrule it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from systems.scene.meshes import atlas, cleaning
from systems.scene.meshes.reading import MeshError, Raw, read_file
from systems.scene.meshes.source import Source
from systems.settings.checks import at_least, between, one_of

AXES: Mapping[str, tuple[int, ...]] = {
    f"{sign}{name}": tuple((1 if sign == "+" else -1) * (i == j) for j in range(3))
    for i, name in enumerate("xyz")
    for sign in "+-"
}
LARGE = 100_000
"""Number of faces above which decimation is suggested."""
KEPT = (0.4, 1.1)
"""Largest distance from the origin of meshes whose size `scale: auto` keeps."""
MAX_SIDE = 8192


@dataclass(frozen=True)
class MeshConfig:
    """A mesh of fixed shape with a map of its colours (``textured-mesh``).

    Args:
        mesh: Mesh file: glb, gltf, obj, ply, stl or off.
        mesh_up: Axis of the file that points up, such as "+z"; "auto": +y of glTF and
            obj, +z of the others and of obj files written here.
        mesh_front: Axis of the file that points to the front; "auto": +z where +y is
            up, else +x, and +x of files written here.
        mesh_scale: "fit" centres the mesh and scales it to `radius`, "keep" takes it
            as it is, "auto" keeps a mesh around the origin that has about this size and
            fits others.
        radius: Largest distance from the origin of a mesh that is fitted.
        max_faces: Number of faces that the mesh is simplified to; 0: no simplification.
        uv: "keep" the texture coordinates of the file, "make" new ones, or "auto":
            keep them where they can hold one map.
        texture_resolution: Side of the maps in texels.
        smoothing: Standard deviation, in texels, of the Gaussian through which the maps
            are seen: images say nothing about details finer than their pixels, which
            an optimizer would fill with noise; 0: no smoothing.
        initial: Initial albedo: "file", the colours of the file, or a grey level from 0
            to 1.
        roughness: Roughness of the surface, from 0 to 1; the initial one if it is
            learned.
        metallic: Metalness of the surface, likewise.
        learn_roughness: Optimise a map of roughness; the material has to show it.
        learn_metallic: Optimise a map of metalness, likewise.
    """

    mesh: str
    mesh_up: str = "auto"
    mesh_front: str = "auto"
    mesh_scale: str = "auto"
    radius: float = 0.9
    max_faces: int = 0
    uv: str = "auto"
    texture_resolution: int = 256
    smoothing: float = 1.0
    initial: float | str = "file"
    roughness: float = 1.0
    metallic: float = 0.0
    learn_roughness: bool = False
    learn_metallic: bool = False

    def __post_init__(self) -> None:
        for name in ("mesh_up", "mesh_front"):
            one_of(name, getattr(self, name), ("auto", *AXES))
        one_of("mesh_scale", self.mesh_scale, ("auto", "fit", "keep"))
        one_of("uv", self.uv, ("auto", "keep", "make"))
        if isinstance(self.initial, str):
            one_of("initial", self.initial, ("file", "a number from 0 to 1"))
        for name in ("initial", "roughness", "metallic"):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value}: write a number from 0 to 1.")
        if not 0 < self.radius < math.inf:
            raise ValueError(f"`radius` is {self.radius}: write a number above 0.")
        at_least("max_faces", self.max_faces, 0)
        between("smoothing", self.smoothing, 0, 16)
        at_least("texture_resolution", self.texture_resolution, 4)
        if self.texture_resolution > MAX_SIDE:
            raise ValueError(
                f"`texture_resolution` is {self.texture_resolution}: write {MAX_SIDE} "
                "or less."
            )


@dataclass(frozen=True)
class Surface:
    """A mesh with texture coordinates that hold one map.

    Attributes:
        vertices: Positions in the frame of the scene, shape ``(vertices, 3)``.
        faces: Vertex indices, shape ``(faces, 3)``.
        normals: Unit normals, shape as `vertices`.
        uv: Texture coordinates, v upwards, shape ``(vertices, 2)``.
        colours: Display colours of the file as a map, shape ``(side, side, 3)``.
        texels: What the texels of the map show.
        notes: Sentences about what was changed in the mesh.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    colours: np.ndarray
    texels: atlas.Texels
    notes: tuple[str, ...]


def load_surface(config: MeshConfig) -> Surface:
    """Read, clean, orient, simplify and unwrap a mesh.

    Raises:
        MeshError: The mesh cannot be used; the message says what to do.
    """
    source = load_source(config)
    shape = source if not config.max_faces else simplified(source, config.max_faces)
    side, notes = config.texture_resolution, list(shape.notes)
    one_map = len({id(source.looks[i].texture) for i in np.unique(source.look)}) == 1
    fits = shape is source and one_map and atlas.usable(source.uv, source.faces, side)
    if config.uv == "keep" and not fits:
        raise MeshError(
            f"The texture coordinates of `{config.mesh}` cannot be kept (missing, "
            "outside 0 to 1, overlapping, of several materials, or of a simplified "
            "mesh): write `system.geometry.uv=make`."
        )
    vertices, faces, normals = shape.vertices, shape.faces, shape.normals
    if fits and config.uv != "make":
        assert source.uv is not None
        uv = source.uv.clip(0, 1)
    else:
        if source.uv is not None:
            notes.append("New texture coordinates were made.")
        origin, faces, uv = atlas.unwrap(vertices, faces, side)
        vertices, normals = vertices[origin], normals[origin]
    texels = atlas.Texels.of(uv, faces, side)
    if not texels.inside.any():
        raise MeshError(
            f"No texel of `{config.mesh}` is covered: write a larger "
            "`system.geometry.texture_resolution`, or `system.geometry.uv=make`."
        )
    if crowded := atlas.crowding(faces, texels):
        notes.append(crowded)
    face = texels.face[texels.inside]
    if shape is source:
        colours = source.colour(face, texels.weights)
    else:
        points = (vertices[faces[face]] * texels.weights[..., None]).sum(1)
        colours = atlas.bake(source, points)
    return Surface(
        vertices, faces, normals, uv, texels.image(colours), texels, tuple(notes)
    )


def load_source(config: MeshConfig) -> Source:
    """Read, clean and orient a mesh, with the colours of its file.

    Raises:
        MeshError: The mesh cannot be used; the message says what to do.
    """
    path = Path(config.mesh)
    raw = cleaning.drop_useless(read_file(path))
    if len(raw.faces) > LARGE and not config.max_faces:
        raw.notes.append(
            f"{len(raw.faces)} faces: `system.geometry.max_faces={LARGE // 2}` would "
            "be faster."
        )
    turn = rotation(raw, config, path)
    vertices = raw.vertices @ turn.T
    raw.normals = raw.normals @ turn.T
    raw.vertices = _placed(vertices, raw, config)
    raw.faces, turned = cleaning.outside_out(raw.vertices, raw.faces)
    if turned:
        raw.notes.append(f"{turned} face(s) were turned outside out.")
        raw.normals = np.where(_backwards(raw)[:, None], -raw.normals, raw.normals)
    origin, faces, normals = cleaning.with_normals(raw)
    has_uv = np.isfinite(raw.uv[raw.faces]).all()
    plain = (raw.colours == 1).all()
    return Source(
        raw.vertices[origin],
        faces,
        normals,
        tuple(raw.looks),
        raw.look,
        raw.uv[origin] if has_uv else None,
        None if plain else raw.colours[origin],
        tuple(raw.notes),
    )


def _backwards(raw: Raw) -> np.ndarray:
    """Whether the normal of a vertex points to the back of its faces."""
    a, b, c = raw.vertices[raw.faces].transpose(1, 0, 2)
    cross = np.cross(b - a, c - a)
    total = np.zeros_like(raw.vertices)
    for corner in range(3):
        np.add.at(total, raw.faces[:, corner], cross)
    return (total * raw.normals).sum(1) < 0


def rotation(raw: Raw, config: MeshConfig, path: Path) -> np.ndarray:
    """The rotation from the axes of a file to those of the scene.

    Raises:
        MeshError: Up and front are along the same axis.
    """
    up, front = config.mesh_up, config.mesh_front
    if up == "auto":
        up = raw.up or "+z"
    if front == "auto":
        # What is written here has its front along x in every format.
        turned = up == "+y" and not raw.own
        front = "+z" if turned else ("+x" if up[1] != "x" else "+y")
    if up[1] == front[1]:
        raise MeshError(
            f"`{path}` would have its top at {up} and its front at {front}: write two "
            "axes, as `system.geometry.mesh_up=+y system.geometry.mesh_front=+z`."
        )
    z, x = np.array(AXES[up], float), np.array(AXES[front], float)
    return np.stack([x, np.cross(z, x), z])


def _placed(vertices: np.ndarray, raw: Raw, config: MeshConfig) -> np.ndarray:
    """Positions of the mesh, centred and scaled if the config says so."""
    low, high = vertices.min(0), vertices.max(0)
    centre = (low + high) / 2
    reach = np.linalg.norm(vertices, axis=1).max()
    inside = bool((low <= 0).all() and (high >= 0).all())
    kept = inside and KEPT[0] <= reach <= KEPT[1]
    if config.mesh_scale == "keep" or (config.mesh_scale == "auto" and kept):
        return vertices
    size = np.linalg.norm(vertices - centre, axis=1).max()
    if not (np.isfinite(size) and size > 0):
        raise MeshError("The mesh is so large or small that its size is not finite.")
    raw.notes.append(
        f"Centred from {np.array2string(centre, precision=3)} and scaled by "
        f"{config.radius / size:.4g}."
    )
    return (vertices - centre) * (config.radius / size)


def simplified(source: Source, max_faces: int) -> Source:
    """A source of fewer faces (quadric edge collapse); its colours are to be baked."""
    if len(source.faces) <= max_faces:
        return source
    vertices, faces = decimate(source.vertices, source.faces, max_faces)
    plain = np.full((len(vertices), 2), np.nan)
    raw = cleaning.drop_useless(
        Raw(
            vertices,
            faces,
            np.full((len(vertices), 3), np.nan),
            plain,
            np.ones((len(vertices), 3)),
            np.zeros(len(faces), np.int64),
            [],
        )
    )
    origin, faces, normals = cleaning.with_normals(raw)
    note = f"Simplified from {len(source.faces)} to {len(faces)} faces."
    return replace(
        source,
        vertices=raw.vertices[origin],
        faces=faces,
        normals=normals,
        look=np.zeros(len(faces), np.int64),
        uv=None,
        colours=None,
        notes=(*source.notes, note),
    )


def decimate(
    vertices: np.ndarray, faces: np.ndarray, max_faces: int
) -> tuple[np.ndarray, np.ndarray]:
    """Simplify triangles to a number of faces, merged by position first."""
    import fast_simplification

    merged = cleaning.weld(vertices)[faces]
    used, merged = np.unique(merged, return_inverse=True)
    found: Any = fast_simplification.simplify(
        vertices[used].astype(np.float64),
        merged.reshape(-1, 3).astype(np.int32),
        target_count=max_faces,
    )
    return np.asarray(found[0], float), np.asarray(found[1], np.int64)
