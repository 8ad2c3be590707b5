"""Faces that can be rendered: no degenerate or duplicate ones, outside out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from systems.scene.cameras import Cameras, Views
from systems.scene.meshes.reading import MeshError, Raw

CREASE = 40.0
"""Angle between faces in degrees above which an edge without given normals is sharp."""
_THIN = 1e-12
"""Area, relative to the squared size of the mesh, under which a face is degenerate."""
_LOOKS, _SIZE = 14, 96


def weld(vertices: np.ndarray) -> np.ndarray:
    """Index of the first vertex at the same position, for each vertex."""
    _, first, group = np.unique(
        vertices, axis=0, return_index=True, return_inverse=True
    )
    return first[group.reshape(-1)]


def drop_useless(raw: Raw) -> Raw:
    """A mesh without faces that are degenerate, doubled or not finite.

    Raises:
        MeshError: No face is left.
    """
    counts = {}
    finite = np.asarray(np.isfinite(raw.vertices).all(1))
    keep = finite[raw.faces].all(1)
    counts["not finite"] = int((~keep).sum())
    where = weld(np.where(finite[:, None], raw.vertices, 0.0))
    merged = where[raw.faces]
    used = raw.vertices[raw.faces[keep]]
    size = np.ptp(used.reshape(-1, 3), 0).max() if len(used) else 0.0
    with np.errstate(invalid="ignore"):
        a, b, c = raw.vertices[raw.faces].transpose(1, 0, 2)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    thin = keep & ~(area > _THIN * size**2)
    counts["degenerate"] = int(thin.sum())
    keep &= ~thin
    ordered = np.sort(merged, 1)
    _, first = np.unique(ordered[keep], axis=0, return_index=True)
    doubled = np.ones(int(keep.sum()), bool)
    doubled[first] = False
    counts["duplicate"] = int(doubled.sum())
    keep[np.flatnonzero(keep)[doubled]] = False
    if not keep.any():
        raise MeshError(
            f"All {len(raw.faces)} faces of the mesh are degenerate (without area) or "
            "not finite: export it again, and check it in a viewer."
        )
    raw.notes += [
        f"{count} {what} face(s) were left out."
        for what, count in counts.items()
        if count
    ]
    return _of_faces(raw, keep)


def _of_faces(raw: Raw, keep: np.ndarray) -> Raw:
    """The part of a mesh with some of its faces."""
    used, faces = np.unique(raw.faces[keep], return_inverse=True)
    return Raw(
        vertices=raw.vertices[used],
        faces=faces.reshape(-1, 3),
        normals=raw.normals[used],
        uv=raw.uv[used],
        colours=raw.colours[used],
        look=raw.look[keep],
        looks=raw.looks,
        own=raw.own,
        up=raw.up,
        notes=raw.notes,
    )


def outside_out(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Turn the faces that show their back to the outside.

    Faces of a body are first turned alike. Then bodies are seen from all around, and
    turned where more is seen of the backs; a surface that is seen from both sides
    equally, and one that is not seen at all, stays.

    Returns:
        The faces, and how many of them were turned.
    """
    import trimesh

    merged = weld(vertices)[faces]
    mesh: Any = trimesh.Trimesh(vertices, merged, process=False)
    if not mesh.is_winding_consistent:
        trimesh.repair.fix_winding(mesh)
    alike = np.asarray(mesh.faces)
    # `fix_winding` reverses rows; which ones, shows in the order of their vertices.
    turned = ~_same_way(merged, alike)
    votes = _votes(vertices, np.where(turned[:, None], faces[:, ::-1], faces))
    groups = trimesh.graph.connected_component_labels(
        mesh.face_adjacency, node_count=len(faces)
    )
    balance = np.bincount(groups, votes, groups.max() + 1)
    turned ^= balance[groups] < 0
    return np.where(turned[:, None], faces[:, ::-1], faces), int(turned.sum())


def _same_way(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Whether rows of three indices go round in the same direction."""
    return np.any([(one == np.roll(two, shift, 1)).all(1) for shift in range(3)], 0)


def _votes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Pixels that see each face from the front, minus those that see its back."""
    low, high = vertices.min(0), vertices.max(0)
    size = np.linalg.norm(high - low)
    points = torch.from_numpy((vertices - (low + high) / 2) / max(size, 1e-30)).double()
    number = torch.arange(_LOOKS)
    one = torch.ones(_LOOKS)
    heights = torch.linspace(-0.95, 0.95, _LOOKS).asin().rad2deg()
    cameras = Cameras(number * 137.508, heights, 2.0 * one, 36.0 * one)
    views = Views(cameras, cameras.axes()[0], _SIZE, _SIZE)
    triangles = torch.from_numpy(np.ascontiguousarray(faces))
    from systems.scene.renderers.raster import choose_backend  # renderers are heavy

    kind, _ = choose_backend("auto", torch.device("cpu"))
    seen = kind(points, triangles)(views)
    hit = seen >= 0
    directions = cameras.rays(_SIZE)[1].to(points)[hit]
    a, b, c = points[triangles[seen[hit]]].unbind(1)
    front = (torch.linalg.cross(b - a, c - a, dim=-1) * directions).sum(-1) < 0
    signs = np.where(front.numpy(), 1.0, -1.0)
    return np.bincount(seen[hit].numpy(), signs, len(faces))


def with_normals(raw: Raw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normals of the vertices: the file's, or smooth ones with sharp creases.

    Given normals count if they are complete and agree with the faces. Otherwise
    vertices are split where faces meet at more than `CREASE`. Equal vertices become
    one.

    Returns:
        For each new vertex its index in the mesh, faces of new vertices, and normals.
    """
    vertices, faces = raw.vertices, raw.faces
    a, b, c = vertices[faces].transpose(1, 0, 2)
    cross = np.cross(b - a, c - a)
    corners = raw.normals[faces]
    agree = (corners * cross[:, None]).sum(-1) > 0  # False for NaN
    place = weld(vertices)[faces]
    if agree.mean() <= 0.99:
        corners = _smooth(place, cross)
    columns = [place[..., None], corners.round(4), raw.uv[faces], raw.colours[faces]]
    key = np.concatenate([np.nan_to_num(part) for part in columns], -1).reshape(-1, 9)
    _, first, split = np.unique(key, axis=0, return_index=True, return_inverse=True)
    normals = corners.reshape(-1, 3)[first]
    usable = np.isfinite(normals).all(1, keepdims=True)
    return (
        faces.reshape(-1)[first],
        split.reshape(-1, 3),
        np.where(usable, normals, [0.0, 0.0, 1.0]),
    )


def _smooth(merged: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Normals of the corners of faces, shape ``(faces, 3, 3)``.

    The sum of the faces around the corner's vertex, weighted by area, that meet its own
    face at less than `CREASE`.
    """
    unit = cross / np.linalg.norm(cross, axis=1, keepdims=True)
    vertex = merged.reshape(-1)
    order = np.argsort(vertex, kind="stable")
    start = np.searchsorted(vertex[order], vertex)
    count = np.bincount(vertex, minlength=vertex.max() + 1)[vertex]
    corner = np.repeat(np.arange(len(vertex)), count)
    offset = np.arange(len(corner)) - np.repeat(count.cumsum() - count, count)
    other = order[np.repeat(start, count) + offset] // 3
    own = corner // 3
    alike = (unit[own] * unit[other]).sum(-1) > np.cos(np.radians(CREASE))
    total = np.stack(
        [
            np.bincount(corner[alike], cross[other[alike], axis], len(vertex))
            for axis in range(3)
        ],
        -1,
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    total = np.where(
        length > 0, total / np.where(length > 0, length, 1), unit.repeat(3, 0)
    )
    return total.reshape(-1, 3, 3)
