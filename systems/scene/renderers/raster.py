r"""Rasterisation of triangle meshes: which face a pixel sees, and where on it.

Visibility is discrete and needs no gradient. Given the face a, b, c of a pixel, the ray
$o + t\,d$ meets its plane at barycentric coordinates

$$p = d \times (c - a), \quad q = (o - a) \times (b - a), \quad
  \beta_1 = \frac{(o - a) \cdot p}{(b - a) \cdot p}, \quad
  \beta_2 = \frac{d \cdot q}{(b - a) \cdot p}, \quad
  t = \frac{(c - a) \cdot q}{(b - a) \cdot p},$$

$\beta_0 = 1 - \beta_1 - \beta_2$ (T. Möller and B. Trumbore, 1997), and an attribute is
$\sum_i \beta_i a_i$: all of it in torch, differentiable in vertices, attributes and
textures. What the discrete part hides, the motion of silhouettes, is added by
`systems.scene.renderers.silhouettes`.

Visibility comes from nvdiffrast on CUDA, from embreex on the CPU, or from testing every
ray against every face.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from systems.extras import probe
from systems.scene.cameras import Views
from systems.settings.checks import between, one_of

_log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class RasterConfig:
    """Settings of everything that is rasterised.

    Args:
        rasterizer: "nvdiffrast", "embree", "brute-force", or "auto": the first of them
            that is available.
        supersample: Samples per pixel and direction in training.
        eval_supersample: The same in turntables and measurements.
    """

    rasterizer: str = "auto"
    supersample: int = 4
    eval_supersample: int = 2

    def __post_init__(self) -> None:
        one_of("rasterizer", self.rasterizer, ("auto", *BACKENDS))
        between("supersample", self.supersample, 1, 16)
        between("eval_supersample", self.eval_supersample, 1, 16)

    def visibility(self, vertices: Tensor, faces: Tensor) -> Visibility:
        """The visibility of a mesh; says once why another is not used.

        Raises:
            ValueError: The chosen rasterizer is not available here.
        """
        kind, why = choose_backend(self.rasterizer, vertices.device)
        if why:
            _say_once(why)
        return kind(vertices, faces)

    def finer(self, views: Views, step: int | None) -> Views:
        """Views with a pixel for each sample; `step` is None in evaluation."""
        count = self.eval_supersample if step is None else self.supersample
        return replace(views, height=views.height * count, width=views.width * count)


def pooled(
    samples: Float[Tensor, "views rows columns channels"], views: Views
) -> Float[Tensor, "views height width channels"]:
    """The mean over the samples of each pixel of views."""
    count = samples.shape[1] // views.height
    planes = torch.nn.functional.avg_pool2d(samples.permute(0, 3, 1, 2), count)
    return planes.permute(0, 2, 3, 1)


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("%s", reason)


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
