r"""Antialiased silhouettes of meshes, which make images differentiable in the outline.

Where a silhouette crosses the segment between two pixel centres at a distance
$s \in [0, 1]$ from the centre on the nearer surface, that surface covers the share
$s - 1/2$ of the other pixel, or lacks $1/2 - s$ of its own (S. Laine et al., 2020,
arXiv 2011.03277, section 3.4). Neighbours in a row meet steep edges, those in a column
flat ones, so that each edge moves the area that it sweeps. Only edges of faces that a
pixel centre sees are known: faces much smaller than a pixel are better antialiased by
supersampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from systems.scene.cameras import Views
from systems.scene.renderers.raster import NOTHING, Fragments, project


@dataclass(frozen=True)
class Adjacency:
    """The faces across the edges 0→1, 1→2 and 2→0 of each face.

    Attributes:
        face: Face across each edge; `NOTHING` where there is none, or more than one.
        sign: 1 where both faces turn the same way round, −1 where one is inside out.
    """

    face: Int[Tensor, "faces 3"]
    sign: Int[Tensor, "faces 3"]

    @classmethod
    def of(cls, faces: Int[Tensor, "faces 3"]) -> Adjacency:
        """The adjacency of faces whose vertices are merged by position."""
        begin, end = faces.reshape(-1), faces.roll(-1, 1).reshape(-1)
        key = torch.minimum(begin, end) * (int(faces.max()) + 1)
        key += torch.maximum(begin, end)
        order = key.argsort(stable=True)
        _, counts = key[order].unique_consecutive(return_counts=True)
        first = (counts.cumsum(0) - counts)[counts == 2]
        one, two = order[first], order[first + 1]
        face, sign = torch.full_like(key, NOTHING), torch.ones_like(key)
        face[one], face[two] = two // 3, one // 3
        same = begin[one] == begin[two]
        sign[one] = sign[two] = torch.where(same, -1, 1)
        return cls(face.reshape(-1, 3), sign.reshape(-1, 3))

    @torch.no_grad()
    def outline(
        self, vertices: Tensor, faces: Tensor, views: Views
    ) -> Bool[Tensor, "views faces 3"]:
        """The edges where the surface ends or folds back, as a view sees it."""
        a, b, c = vertices[faces].unbind(1)
        normals = torch.linalg.cross(b - a, c - a, dim=-1)
        eyes = views.cameras.axes()[0].to(vertices)
        towards = (eyes @ normals.T - (normals * a).sum(-1)) > 0
        folds = towards[:, :, None] != (towards[:, self.face] ^ (self.sign < 0))
        return folds | (self.face == NOTHING)


def antialias(
    image: Float[Tensor, "views height width channels"],
    fragments: Fragments,
    vertices: Float[Tensor, "vertices 3"],
    faces: Int[Tensor, "faces 3"],
    views: Views,
    adjacency: Adjacency | None = None,
) -> Float[Tensor, "views height width channels"]:
    """Blend pixels over silhouettes, so that an image has gradients of the outline.

    Args:
        image: Image of the fragments.
        fragments: What the pixels see.
        vertices: Positions.
        faces: Vertex indices, merged by position.
        views: The views.
        adjacency: Adjacency of the faces; default: found here.
    """
    adjacency = Adjacency.of(faces) if adjacency is None else adjacency
    outline = adjacency.outline(vertices, faces, views)
    points = project(vertices, views)
    depth = torch.full_like(fragments.face, torch.inf, dtype=vertices.dtype)
    depth[fragments.hit] = fragments.depth.detach()
    result = image
    for axis in (2, 1):  # neighbours in a row, then in a column
        near, far = _pairs(fragments.face, depth, axis)
        face = fragments.face[tuple(near.T)]
        edges = outline[near[:, 0], face]
        some = edges.any(-1)
        near, far, edges, face = near[some], far[some], edges[some], face[some]
        corners = points[near[:, :1], faces[face]]
        distance, crossed = _crossing(corners, near, far, edges, axis)
        near, far, distance = near[crossed], far[crossed], distance[crossed, None]
        a, b = image[tuple(near.T)], image[tuple(far.T)]
        beyond = (distance - 0.5).clamp(min=0) * (a - b)
        within = (0.5 - distance).clamp(min=0) * (b - a)
        result = result.index_put(tuple(far.T), beyond, accumulate=True)
        result = result.index_put(tuple(near.T), within, accumulate=True)
    return result


def _pairs(face: Tensor, depth: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Neighbouring pixels that see different faces, the nearer surface first."""
    count = face.shape[axis] - 1
    one, two = face.narrow(axis, 0, count), face.narrow(axis, 1, count)
    here = (one != two).nonzero()
    there = here.clone()
    there[:, axis] += 1
    swap = depth[tuple(there.T)] < depth[tuple(here.T)]
    near = torch.where(swap[:, None], there, here)
    far = torch.where(swap[:, None], here, there)
    return near, far


def _crossing(
    corners: Float[Tensor, "pairs 3 2"],
    near: Tensor,
    far: Tensor,
    edges: Bool[Tensor, "pairs 3"],
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Where an edge of the nearer face crosses the way to the other pixel.

    Returns:
        Distance from the centre on the nearer surface, from 0 to 1, and whether there
        is such an edge, shape ``(pairs,)``.
    """
    following = corners.roll(-1, 1)
    along, over = (0, 1) if axis == 2 else (1, 0)
    centre = near[:, [2, 1]] + 0.5  # column and row
    level = centre[:, over, None]
    before, after = corners[..., over] - level, following[..., over] - level
    across, steep = (part.abs() for part in (following - corners).unbind(-1))
    # An edge counts once: in rows if it is steep, in columns if it is flat.
    own = steep >= across if axis == 2 else steep < across
    crosses = edges & own & (before * after <= 0) & (before != after)
    share = before / torch.where(crosses, before - after, 1.0)
    at = corners[..., along] + share * (following[..., along] - corners[..., along])
    distance = (at - centre[:, along, None]) * (far - near)[:, axis, None]
    valid = crosses & (distance >= 0) & (distance <= 1)
    first = torch.where(valid, distance, torch.inf).min(-1)
    return distance.gather(1, first.indices[:, None])[:, 0], first.values.isfinite()
