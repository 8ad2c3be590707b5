r"""Texture coordinates, and what a texel shows.

Texel (row, column) of a square map of side n has its centre at
$u = (\text{column} + 1/2) / n$, $v = 1 - (\text{row} + 1/2) / n$. It shows the surface
point of the face whose corners enclose it in the plane of texture coordinates. Texels
that no face covers take the value of the nearest one that is covered, so that filters
and smaller mip levels do not mix in anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from systems.scene.meshes.source import Source
from systems.scene.zbuffer import covered

MARGIN = 2
"""Texels between charts, on each side."""
ENOUGH = 64
"""Texels per chart below which colours bleed between charts (docs/texture.md)."""
FEWEST = 1000
"""Faces below which simplifying is not suggested: charts get no fewer."""
OVERLAP = 0.01
"""Share of the covered texels that two faces may claim: rounding at their edges."""


@dataclass(frozen=True)
class Texels:
    """What the texels of a square map show.

    Attributes:
        face: Face of each texel, or −1, shape ``(side, side)``.
        weights: Barycentric coordinates of the covered texels, shape ``(covered, 3)``.
        doubled: Share of the covered texels that several faces claim.
    """

    face: np.ndarray
    weights: np.ndarray
    doubled: float

    @classmethod
    def of(cls, uv: np.ndarray, faces: np.ndarray, side: int) -> Texels:
        """The texels of faces with texture coordinates ``(vertices, 2)``."""
        places = np.stack([uv[:, 0] * side, (1 - uv[:, 1]) * side], -1)[faces]
        owner = np.full(side * side, -1)
        weights = np.zeros((side * side, 3))
        claims = np.zeros(side * side, np.int64)
        for face, row, column, bary in covered(places, side, side):
            texel = row * side + column
            owner[texel], weights[texel] = face, bary
            claims += np.bincount(texel[bary.min(-1) > 1e-3], minlength=side * side)
        inside = owner >= 0
        doubled = (claims > 1).sum() / max(1, inside.sum())
        return cls(owner.reshape(side, side), weights[inside], float(doubled))

    @property
    def inside(self) -> np.ndarray:
        """Whether a texel is covered, shape ``(side, side)``."""
        return self.face >= 0

    def image(self, values: np.ndarray) -> np.ndarray:
        """Values of the covered texels as a map, continued to the others."""
        whole = np.zeros((*self.face.shape, values.shape[-1]))
        whole[self.inside] = values
        return self.spread(whole)

    def spread(self, image: np.ndarray) -> np.ndarray:
        """A map whose uncovered texels take the value of the nearest covered one."""
        from scipy import ndimage

        if self.inside.all() or not self.inside.any():
            return image
        found: Any = ndimage.distance_transform_edt(~self.inside, return_indices=True)
        rows, columns = found[1]
        return image[rows, columns]


def usable(uv: np.ndarray | None, faces: np.ndarray, side: int) -> bool:
    """Whether texture coordinates can hold one map: complete, in range, disjoint."""
    if uv is None or not np.isfinite(uv[faces]).all():
        return False
    used = uv[faces].reshape(-1, 2)
    if used.min() < -1e-4 or used.max() > 1 + 1e-4:
        return False
    texels = Texels.of(uv, faces, side)
    return bool(texels.inside.any()) and texels.doubled < OVERLAP


def unwrap(
    vertices: np.ndarray, faces: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texture coordinates by xatlas.

    Args:
        vertices: Positions, shape ``(vertices, 3)``.
        faces: Vertex indices, shape ``(faces, 3)``.
        side: Side of the map in texels, for the margin between charts.

    Returns:
        For each new vertex its index in `vertices`, faces of new vertices in the order
        of `faces`, and texture coordinates, shape ``(new vertices, 2)``.
    """
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    pack = xatlas.PackOptions()
    pack.resolution, pack.padding, pack.bilinear = side, MARGIN, True
    pack.create_image = False
    atlas.generate(xatlas.ChartOptions(), pack)
    origin, new, uv = atlas[0]
    scale = np.array([atlas.width, atlas.height]) / max(atlas.width, atlas.height)
    return origin.astype(np.int64), new.astype(np.int64), uv.astype(float) * scale


def crowding(faces: np.ndarray, texels: Texels) -> str:
    """What to do where charts are too small for the map; empty if they are not.

    Args:
        faces: Vertex indices; charts have no vertex in common.
        texels: What the texels of the map show.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = faces[:, [0, 1, 1, 2]].reshape(-1, 2).T
    count = int(faces.max()) + 1
    graph = coo_matrix((np.ones(edges.shape[1]), edges), (count, count))
    _, chart = connected_components(graph, directed=False)
    num_charts, side = len(np.unique(chart[faces[:, 0]])), len(texels.face)
    share = texels.inside.sum() / num_charts
    if num_charts == 1 or share >= ENOUGH:
        return ""
    larger = side * 2 ** math.ceil(math.log2(ENOUGH / share) / 2)
    fewer = float(f"{len(faces) * share / ENOUGH / 2:.1g}")
    simpler = "" if fewer < FEWEST else f" or `system.geometry.max_faces={fewer:.0f}`"
    return (
        f"{num_charts} charts share a map of {side}² texels, {share:.0f} each, so "
        "colours bleed over their borders and the mesh looks speckled: write "
        f"`system.geometry.texture_resolution={larger}`{simpler}."
    )


def bake(source: Source, points: np.ndarray, samples: int = 400_000) -> np.ndarray:
    """Display colours of the surface of a source nearest to points ``(points, 3)``."""
    import trimesh
    from scipy.spatial import KDTree

    mesh = trimesh.Trimesh(source.vertices, source.faces, process=False)
    drawn = cast(Any, trimesh.sample).sample_surface(mesh, samples, seed=0)
    found, face = drawn
    a, b, c = source.vertices[source.faces[face]].transpose(1, 0, 2)
    weights = np.asarray(
        trimesh.triangles.points_to_barycentric(np.stack([a, b, c], 1), found)
    )
    _, nearest = KDTree(found).query(points)
    return source.colour(face[nearest], weights[nearest])
