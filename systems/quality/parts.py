r"""The parts of an object: clusters of its albedo, split where the surface is.

A distilled albedo holds some of the light, so that one part has many shades of one
colour. Clusters are therefore found among the colours relative to their brightness,

$$u = c / \max(\max_i c_i, 0.2),$$

by a Dirichlet process mixture of Gaussians whose standard deviation is about 0.16 or
more per channel (an inverse Wishart prior as strong as the data). Several objects
share their clusters: the hierarchical Dirichlet process finds one palette. A part is a
connected piece of the surface in one cluster. A piece of less than 0.5 % of the surface
joins the neighbour with which it shares the longest border, and so does a narrow band,
which is where two parts blend: twice its area over its border's length is less than
2.5 % of the root of the surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from systems.scene.mesh_files import is_textured
from systems.scene.meshes.cleaning import weld

if TYPE_CHECKING:
    import trimesh

FLOOR = 0.16
"""Least standard deviation of a cluster, per channel of u."""
DARK = 0.2
"""Brightness below which a colour counts as dark and not as a hue."""
SMALLEST = 0.005
"""Share of the surface below which a piece is no part."""
NARROW = 0.025
"""Width below which a piece is a blend of its neighbours, relative to √surface."""
POINTS = 20_000
"""Largest number of colours per object from which the clusters are found."""


@dataclass(frozen=True)
class Parts:
    """The parts of a mesh.

    Attributes:
        labels: The part of each face, shape ``(faces,)``.
        colours: The palette's index of each part, shape ``(parts,)``.
        shares: Share of the surface of each part, shape ``(parts,)``, descending.
    """

    labels: np.ndarray
    colours: np.ndarray
    shares: np.ndarray

    @property
    def count(self) -> int:
        """The number of parts."""
        return len(self.shares)


@dataclass(frozen=True)
class Palette:
    """The colours of one object or several, and the parts of each.

    Attributes:
        colours: Mean albedo of each cluster, from 0 to 1, shape ``(clusters, 3)``.
        parts: The parts, by object.
    """

    colours: np.ndarray
    parts: list[Parts]


def find_parts(meshes: Sequence[trimesh.Trimesh], seed: int = 0) -> Palette:
    """Find the parts of meshes with vertex colours or a texture.

    Args:
        meshes: Meshes with sRGB colours; several share a palette.
        seed: Seed of the clustering.

    Raises:
        ValueError: There is no mesh, or one has fewer than two faces, no area, corners
            that are not finite, or no colours.
        ImportError: scikit-learn is not installed.
    """
    looks = [_look(mesh) for mesh in meshes]
    if not meshes:
        raise ValueError("There is no mesh: write `find_parts([mesh])`.")
    for mesh, look in zip(meshes, looks, strict=True):
        _check_surface(mesh)
        if look.kind not in ("vertex", "face"):
            raise ValueError(
                "The mesh has no vertex colours, from which parts are found: export "
                "it again with `launch.py --export resume=RUN`."
            )
    corners = [
        np.asarray(look.vertex_colors)[:, :3][mesh.faces] / 255
        for mesh, look in zip(meshes, looks, strict=True)
    ]
    albedos = [np.median(each, axis=1) for each in corners]
    clusters = _clusters([_relative(albedo) for albedo in albedos], seed)
    pieces = [
        _pieces(mesh, labels) for mesh, labels in zip(meshes, clusters, strict=True)
    ]
    # A cluster that fills no part is none: its pieces joined their neighbours.
    used = np.unique(np.concatenate([colours for _, colours in pieces]))
    areas = [np.asarray(mesh.area_faces) for mesh in meshes]
    parts = [
        _sorted(labels, np.searchsorted(used, colours), area)
        for (labels, colours), area in zip(pieces, areas, strict=True)
    ]
    of_face = np.concatenate([one.colours[one.labels] for one in parts])
    weights, albedo = np.concatenate(areas), np.concatenate(albedos)
    palette = [
        np.average(albedo[of_face == k], axis=0, weights=weights[of_face == k])
        for k in range(len(used))
    ]
    return Palette(np.stack(palette), parts)


def _check_surface(mesh: Any) -> None:
    """Refuse a mesh without a surface that can have parts."""
    count = len(mesh.faces)
    if count < 2:
        raise ValueError(
            f"The mesh has {count or 'no'} face{'s' * (count != 1)}, and parts are "
            "found among at least two: leave it out."
        )
    if not np.isfinite(np.asarray(mesh.vertices)[np.asarray(mesh.faces)]).all():
        raise ValueError(
            "The mesh has corners that are not finite: export it again with "
            "`launch.py --export resume=RUN`, or remove its faces there."
        )
    if not np.asarray(mesh.area_faces).sum() > 0:
        raise ValueError("The mesh has no area, so there are no parts: leave it out.")


def _look(mesh: Any) -> Any:
    """The colours of a mesh; of a texture, those at the vertices."""
    return mesh.visual.to_color() if is_textured(mesh) else mesh.visual


def _relative(albedo: np.ndarray) -> np.ndarray:
    return albedo / np.maximum(albedo.max(1, keepdims=True), DARK)


def _clusters(colours: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The cluster of every colour, by object."""
    from dreampropeller.mixtures import NIW, DPMixture, HDPMixture

    rng = np.random.default_rng(seed)
    some = [
        one[np.sort(rng.permutation(len(one))[:POINTS])] if len(one) > POINTS else one
        for one in colours
    ]
    strength = float(sum(map(len, some)))
    prior = NIW(
        nu=strength,
        psi=np.full(3, FLOOR**2) * strength,
        covariance="diagonal",
        kappa=0.01,
    )
    options: dict[str, Any] = {
        "prior": prior,
        "method": "subcluster",
        "n_sweeps": 60,
        "random_state": seed,
    }
    if len(some) == 1:
        return [DPMixture(**options).fit(some[0]).predict(colours[0])]
    return HDPMixture(**options).fit(some).predict(list(colours))


def _pieces(mesh: Any, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected piece of each face, and the cluster of each piece."""
    from trimesh.graph import connected_component_labels, face_adjacency

    # A texture's seams double vertices, and faces meet there nevertheless.
    faces = weld(np.asarray(mesh.vertices))[np.asarray(mesh.faces)]
    found: Any = face_adjacency(faces, return_edges=True)
    pairs, borders = (np.asarray(one).reshape(-1, 2) for one in found)
    same = clusters[pairs[:, 0]] == clusters[pairs[:, 1]]
    labels = connected_component_labels(pairs[same], node_count=len(clusters))
    colours = np.zeros(labels.max() + 1, int)
    colours[labels] = clusters
    area = np.bincount(labels, np.asarray(mesh.area_faces))
    ends = np.asarray(mesh.vertices)[borders]
    lengths = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=-1)
    least, narrow = SMALLEST * area.sum(), NARROW * area.sum() ** 0.5
    # A small piece may have grown by smaller ones before its turn comes. A piece with
    # nothing beside it is loose, and stays.
    for piece in np.argsort(area):
        beside = _borders(labels, pairs, lengths, piece)
        border = sum(beside.values())
        if border and (area[piece] < least or 2 * area[piece] < narrow * border):
            other = max(beside, key=lambda one: beside[one])
            labels[labels == piece] = other
            area[other] += area[piece]
    kept, labels = np.unique(labels, return_inverse=True)
    return labels, colours[kept]


def _borders(
    labels: np.ndarray, pairs: np.ndarray, lengths: np.ndarray, piece: int
) -> dict[int, float]:
    """Lengths of the borders of a piece, by its neighbour."""
    ends = labels[pairs]
    found: dict[int, float] = {}
    for own, beside in ((0, 1), (1, 0)):
        at = (ends[:, own] == piece) & (ends[:, beside] != piece)
        for other, length in zip(ends[at, beside], lengths[at], strict=True):
            found[int(other)] = found.get(int(other), 0.0) + float(length)
    return found


def _sorted(labels: np.ndarray, colours: np.ndarray, areas: np.ndarray) -> Parts:
    """The parts, largest first."""
    shares = np.bincount(labels, areas, len(colours)) / areas.sum()
    order = np.argsort(-shares, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Parts(rank[labels], colours[order], shares[order])
