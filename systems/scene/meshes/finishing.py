"""What every mesh goes through before it is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from systems.scene.isosurface import CRUMB_SHARE
from systems.scene.meshes import cleaning


def sound(mesh: Any) -> Any:
    """A mesh with vertex colours whose numbers are finite, outside out.

    Faces are only dropped where a position is not finite, so that a closed surface
    stays closed.

    Raises:
        ValueError: No face is left.
    """
    import trimesh

    vertices, faces = np.asarray(mesh.vertices, float), np.asarray(mesh.faces)
    finite = np.asarray(np.isfinite(vertices).all(1))
    keep = finite[faces].all(1)
    if not keep.any():
        raise ValueError(
            "no position of the mesh is finite: take a smaller learning rate "
            "(`system.optimizer.args.lr`)"
        )
    vertices = np.where(finite[:, None], vertices, vertices[finite].mean(0))
    faces, turned = cleaning.outside_out(vertices, faces[keep])
    if keep.all() and not turned:
        return mesh
    return trimesh.Trimesh(
        vertices,
        faces,
        vertex_colors=mesh.visual.vertex_colors,
        metadata=dict(mesh.metadata),
        process=False,
    )


def without_crumbs(mesh: Any, share: float = CRUMB_SHARE) -> Any:
    """A mesh without its components of a small share of the volume.

    Args:
        mesh: A `trimesh.Trimesh` with vertex colours.
        share: Share of the volume below which a component is dropped.
    """
    import trimesh

    groups = trimesh.graph.connected_component_labels(
        mesh.face_adjacency, node_count=len(mesh.faces)
    )
    if groups.max() == 0:
        return mesh
    corners = mesh.vertices[mesh.faces]
    parts = np.einsum("ni,ni->n", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    volumes = np.abs(np.bincount(groups, parts))
    keep = volumes >= share * volumes.sum()
    mesh.update_faces(keep[groups])
    mesh.remove_unreferenced_vertices()
    return mesh


def simplified(mesh: Any, max_faces: int) -> Any:
    """A mesh of fewer faces (quadric edge collapse), with the nearest colours.

    Args:
        mesh: A `trimesh.Trimesh` with vertex colours.
        max_faces: Largest number of faces; 0: no simplification.
    """
    if not max_faces or len(mesh.faces) <= max_faces:
        return mesh
    import trimesh
    from scipy.spatial import KDTree

    fewer = mesh.simplify_quadric_decimation(face_count=max_faces)
    _, nearest = KDTree(mesh.vertices).query(fewer.vertices)
    return trimesh.Trimesh(
        fewer.vertices,
        fewer.faces,
        vertex_colors=mesh.visual.vertex_colors[nearest],
        metadata=dict(mesh.metadata),
        process=False,
    )
