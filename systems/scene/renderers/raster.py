r"""Rasterisation of triangle meshes: which face a pixel sees, and where on it.

Visibility is discrete and needs no gradient. Given the face a, b, c of a pixel, the ray
$o + t\,d$ meets its plane at barycentric coordinates

$$p = d \times (c - a), \quad q = (o - a) \times (b - a), \quad
  \beta_1 = \frac{(o - a) \cdot p}{(b - a) \cdot p}, \quad
  \beta_2 = \frac{d \cdot q}{(b - a) \cdot p}, \quad
  t = \frac{(c - a) \cdot q}{(b - a) \cdot p},$$

$\beta_0 = 1 - \beta_1 - \beta_2$ (T. Möller and B. Trumbore, 1997), and an attribute is
$\sum_i \beta_i a_i$: all of it in torch, differentiable in vertices, attributes and
textures. What the discrete part hides, the motion of silhouettes, comes back by
antialiasing: where a silhouette crosses the segment between two pixel centres at a
distance $s \in [0, 1]$ from the centre on the nearer surface, that surface covers the
share $s - 1/2$ of the other pixel, or lacks $1/2 - s$ of its own (S. Laine et al.,
2020, arXiv 2011.03277, section 3.4). Neighbours in a row meet steep edges, those in a
column flat ones, so that each edge moves the area that it sweeps. Only edges of faces
that a pixel centre sees are known: faces much smaller than a pixel are better
antialiased by supersampling.

Visibility comes from nvdiffrast on CUDA, from embreex on the CPU, or from testing every
ray against every face.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from systems.extras import probe
from systems.scene.cameras import Views
from systems.settings.checks import one_of

NOTHING = -1
"""Face of a pixel that sees none, and of an edge that has none across."""
_NEAR, _FAR = 1e-2, 1e3
_PAIRS = 2**22
"""Tests of a ray against a face that are held in memory at once, without embreex."""


@dataclass(frozen=True)
class Fragments:
    """What the pixels of some views see of a mesh.

    Attributes:
        face: Face of each pixel, or `NOTHING`, shape ``(views, height, width)``.
        weights: Barycentric coordinates of the pixels that see a face, in their order,
            shape ``(hits, 3)``.
        depth: Distance along the unit ray, shape ``(hits,)``.
    """

    face: Int[Tensor, "views height width"]
    weights: Float[Tensor, "hits 3"]
    depth: Float[Tensor, " hits"]

    @property
    def hit(self) -> Bool[Tensor, "views height width"]:
        """Whether a pixel sees a face."""
        return self.face >= 0

    def interpolate(
        self, attributes: Float[Tensor, "vertices channels"], faces: Tensor
    ) -> Float[Tensor, "hits channels"]:
        """Vertex attributes at the pixels that see a face."""
        corners = attributes[faces[self.face[self.hit]]]
        return (corners * self.weights[..., None]).sum(-2)

    def image(
        self, values: Float[Tensor, "hits channels"]
    ) -> Float[Tensor, "views height width channels"]:
        """Values of the pixels that see a face as an image; zero elsewhere."""
        blank = values.new_zeros(*self.face.shape, values.shape[-1])
        return blank.index_put((self.hit,), values)


class Visibility(abc.ABC):
    """The nearest face along the ray of each pixel, for one mesh.

    Args:
        vertices: Positions, shape ``(vertices, 3)``; gradients are ignored.
        faces: Vertex indices, shape ``(faces, 3)``.
    """

    @abc.abstractmethod
    def __init__(self, vertices: Tensor, faces: Tensor) -> None: ...

    @abc.abstractmethod
    def __call__(self, views: Views) -> Int[Tensor, "views height width"]:
        """Face of each pixel or `NOTHING`, on the device of the mesh."""


class Embree(Visibility):
    """Visibility by embreex: rays through a bounding volume hierarchy, on the CPU."""

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self.device = vertices.device
        self._scene = EmbreeScene()
        corners = vertices.detach().cpu().numpy().astype(np.float32)
        self._mesh = TriangleMesh(
            self._scene, corners, faces.cpu().numpy().astype(np.int32)
        )

    def __call__(self, views: Views) -> Int[Tensor, "views height width"]:
        """See `Visibility`."""
        origins, directions = views.cameras.rays(views.height, views.width)
        o, d = (
            part.expand_as(directions).reshape(-1, 3).float().contiguous().cpu().numpy()
            for part in (origins, directions)
        )
        face = torch.from_numpy(self._scene.run(o, d)).long()
        return face.reshape(directions.shape[:-1]).to(self.device)


class BruteForce(Visibility):
    """Visibility by testing every ray against every face: slow, and an oracle."""

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        self._corners = vertices.detach()[faces]

    def __call__(self, views: Views) -> Int[Tensor, "views height width"]:
        """See `Visibility`."""
        origins, directions = views.cameras.rays(views.height, views.width)
        corners = self._corners
        centre = (corners.amin((0, 1)) + corners.amax((0, 1))) / 2
        radius = (corners - centre).norm(dim=-1).amax()
        o, d = (
            part.expand_as(directions).reshape(-1, 3).to(corners)
            for part in (origins, directions)
        )
        # Only rays that meet the bounding ball can hit.
        passes = torch.linalg.cross(centre - o, d, dim=-1).norm(dim=-1)
        face = torch.full((len(d),), NOTHING, device=corners.device)
        todo = (passes <= radius * (1 + 1e-5)).nonzero()[:, 0]
        for part in todo.split(max(1, _PAIRS // len(corners))):
            weights, depth = meet(o[part, None], d[part, None], corners[None])
            inside = (weights >= 0).all(-1) & (depth > 0)
            nearest, index = torch.where(inside, depth, torch.inf).min(-1)
            face[part] = torch.where(nearest.isfinite(), index, NOTHING)
        return face.reshape(directions.shape[:-1])


class Nvdiffrast(Visibility):
    """Visibility by nvdiffrast's rasteriser, on CUDA."""

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        module, reason = probe("nvdiffrast.torch", needs_cuda=True)
        if module is None:
            raise RuntimeError(reason)
        self._dr: Any = module
        self._context = module.RasterizeCudaContext(device=vertices.device)
        self._vertices = vertices.detach().float()
        self._faces = faces.int().contiguous()

    def __call__(self, views: Views) -> Int[Tensor, "views height width"]:
        """See `Visibility`."""
        # Sides are multiples of 8 there: the image grows at its right and lower edge.
        height, width = (-(-side // 8) * 8 for side in (views.height, views.width))
        clip = self._clip(views, height, width)
        found, _ = self._dr.rasterize(
            self._context, clip, self._faces, resolution=[height, width]
        )
        face = found[..., 3].long() - 1
        return face.flip(1)[:, : views.height, : views.width]  # its rows start below

    def _clip(
        self, views: Views, height: int, width: int
    ) -> Float[Tensor, "views vertices 4"]:
        """Clip coordinates of OpenGL, for an image that grew to the right and down."""
        local = in_camera(self._vertices, views)
        half = torch.tan(views.cameras.fov.deg2rad() / 2).to(local)[:, None]
        x, y, depth = local.unbind(-1)
        x, y = x / half * views.height / width, y / half * views.height / height
        x, y = (
            x + (views.width / width - 1) * depth,
            y + (1 - views.height / height) * (depth),
        )
        z = (_FAR + _NEAR) / (_FAR - _NEAR) * depth - 2 * _FAR * _NEAR / (_FAR - _NEAR)
        return torch.stack([x, y, z, depth], -1).contiguous()


BACKENDS: Mapping[str, type[Visibility]] = {
    "nvdiffrast": Nvdiffrast,
    "embree": Embree,
    "brute-force": BruteForce,
}


def choose_backend(name: str, device: torch.device) -> tuple[type[Visibility], str]:
    """The visibility to use, and a line that says why another is not used.

    Args:
        name: A key of `BACKENDS`, or "auto": the first of them that is available.
        device: Device of the mesh.

    Raises:
        ValueError: The named one is not available here; the message says why.
    """
    one_of("rasterizer", name, ("auto", *BACKENDS))
    nvdiffrast, why_not = probe("nvdiffrast.torch", needs_cuda=True)
    if nvdiffrast is not None and device.type != "cuda":
        nvdiffrast, why_not = None, "`nvdiffrast` is not used: the mesh is on the CPU."
    embree, why_slow = probe("embreex")
    available = {"nvdiffrast": nvdiffrast is not None, "embree": embree is not None}
    reasons = {"nvdiffrast": why_not, "embree": why_slow}
    if name != "auto":
        if not available.get(name, True):
            raise ValueError(f"`rasterizer` is `{name}`. {reasons[name]}")
        return BACKENDS[name], ""
    for backend, there in available.items():
        if there:
            told = "" if backend == "embree" and device.type == "cpu" else why_not
            return BACKENDS[backend], told
    return BruteForce, f"{why_slow} Every ray is tested against every face: slow."


def meet(
    origins: Float[Tensor, "*#rays 3"],
    directions: Float[Tensor, "*#rays 3"],
    corners: Float[Tensor, "*#rays corners=3 3"],
) -> tuple[Float[Tensor, "*rays 3"], Float[Tensor, "*rays"]]:
    r"""Barycentric coordinates and distance at which rays meet the planes of faces.

    Args:
        origins: Origins of the rays.
        directions: Directions of the rays.
        corners: Corners a, b, c of the faces.

    Returns:
        Coordinates $\beta$, and t in lengths of the direction; −1 and 0 for a ray in
        the plane of its face.
    """
    a, b, c = corners.unbind(-2)
    edge, other, start = b - a, c - a, origins - a
    p = torch.linalg.cross(directions, other, dim=-1)
    q = torch.linalg.cross(start, edge, dim=-1)
    determinant = (edge * p).sum(-1)
    flat = determinant == 0
    scale = 1 / torch.where(flat, 1.0, determinant)
    first = (start * p).sum(-1) * scale
    second = (directions * q).sum(-1) * scale
    weights = torch.stack([1 - first - second, first, second], -1)
    depth = (other * q).sum(-1) * scale
    return torch.where(flat[..., None], -1.0, weights), torch.where(flat, 0.0, depth)


def rasterize(
    vertices: Float[Tensor, "vertices 3"],
    faces: Int[Tensor, "faces 3"],
    views: Views,
    visibility: Visibility | None = None,
) -> Fragments:
    """What each pixel centre sees; differentiable in the vertices.

    Args:
        vertices: Positions.
        faces: Vertex indices.
        views: The views.
        visibility: Visibility of this mesh; default: made here.
    """
    if visibility is None:
        visibility = choose_backend("auto", vertices.device)[0](vertices, faces)
    face = visibility(views)
    hit = face >= 0
    origins, directions = views.cameras.rays(views.height, views.width)
    view = hit.nonzero()[:, 0]
    o = origins.reshape(-1, 3).to(vertices)[view]
    d = directions.to(vertices)[hit]
    weights, depth = meet(o, d, vertices[faces[face[hit]]])
    return Fragments(face, weights, depth)


def sample(
    texture: Float[Tensor, "rows columns channels"], uv: Float[Tensor, "points 2"]
) -> Float[Tensor, "points channels"]:
    """Bilinear samples of a texture, clamped at its edges.

    Args:
        texture: Texels; the caller decides whether they are linear or sRGB.
        uv: Texture coordinates; (0, 0) is the lower left corner of the image.
    """
    grid = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1)
    found = torch.nn.functional.grid_sample(
        texture.permute(2, 0, 1)[None],
        grid[None, None],
        padding_mode="border",
        align_corners=False,
    )
    return found[0, :, 0].T


def in_camera(
    points: Float[Tensor, "points 3"], views: Views
) -> Float[Tensor, "views points 3"]:
    """Points in camera coordinates: right, up, forward."""
    position, right, up, forward = (part.to(points) for part in views.cameras.axes())
    axes = torch.stack([right, up, forward], -1)
    return (points - position[:, None]) @ axes


def project(
    points: Float[Tensor, "points 3"], views: Views
) -> Float[Tensor, "views points 2"]:
    """Column and row of points in pixels; pixel centres are at halves."""
    local = in_camera(points, views)
    focal = views.height / 2 / torch.tan(views.cameras.fov.deg2rad() / 2)
    scale = focal.to(points)[:, None] / local[..., 2].clamp(min=_NEAR)
    return torch.stack(
        [
            views.width / 2 + scale * local[..., 0],
            views.height / 2 - scale * local[..., 1],
        ],
        -1,
    )


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
