r"""Images of a triangle mesh by a z-buffer in numpy, for display, not for training.

A triangle covers the pixels whose centres have barycentric coordinates
$\beta_0, \beta_1, \beta_2 \ge 0$; under a pinhole camera $1/z$ is linear in the image,
$1/z = \sum_i \beta_i / z_i$, and an attribute a is $z \sum_i \beta_i a_i / z_i$. The
nearest triangle is visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from systems.scene.cameras import Views
from systems.scene.colours import to_srgb
from systems.scene.meshes.source import Look

AMBIENT = 0.35
"""Share of the light that comes from everywhere; the rest comes from the camera."""
CLAY = 0.72
"""Grey of meshes without colours."""
_PAIRS = 2**21
_NEAR = 1e-3


def covered(
    triangles: np.ndarray, height: int, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The pixels that triangles cover.

    Args:
        triangles: Corners (column, row) in pixels, shape ``(faces, 3, 2)``; pixel
            centres are at halves.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Yields:
        Face, row and column of each covered pixel, shape ``(n,)``, and its barycentric
        coordinates, ``(n, 3)``.
    """
    limit = np.array([width, height])
    first = np.floor(triangles.min(1) - 0.5).clip(0, limit).astype(np.int64)
    last = np.ceil(triangles.max(1) + 0.5).clip(0, limit).astype(np.int64)
    span = (last - first).clip(0)
    counts = span.prod(-1)
    ends = counts.cumsum()
    begin = 0
    while begin < len(triangles):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + _PAIRS, "right")))
        face = np.repeat(np.arange(begin, end), counts[begin:end])
        place = np.arange(len(face)) - (ends - counts)[face] + before
        column = first[face, 0] + place % span[face, 0]
        row = first[face, 1] + place // span[face, 0]
        bary = _barycentric(triangles[face], np.stack([column, row], -1) + 0.5)
        hit = (bary >= 0).all(-1)
        yield face[hit], row[hit], column[hit], bary[hit]
        begin = end


def _barycentric(triangles: np.ndarray, points: np.ndarray) -> np.ndarray:
    corners = triangles - points[:, None]
    area = np.stack(
        [
            corners[:, i, 0] * corners[:, j, 1] - corners[:, i, 1] * corners[:, j, 0]
            for i, j in ((1, 2), (2, 0), (0, 1))
        ],
        -1,
    )
    total = area.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total != 0, area / total, -1.0)


def render_mesh(
    mesh: Any,
    views: Views,
    background: float = 1.0,
    clay: bool = False,
    ambient: float = AMBIENT,
) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
    """Shaded images of a mesh, and its silhouettes.

    Args:
        mesh: A `trimesh.Trimesh`, with a texture or sRGB vertex colours if it has any.
        views: Views to render.
        background: Grey level of the background, from 0 to 1.
        clay: Render the shape in grey, without colours.
        ambient: Share of the light that comes from everywhere; 1: colours alone.

    Returns:
        Images from 0 to 1, and masks of zeros and ones.
    """
    vertices, faces = np.asarray(mesh.vertices, float), np.asarray(mesh.faces)
    colours, colour = _colouring(mesh, clay)
    attributes = np.concatenate([np.asarray(mesh.vertex_normals), colours], -1)
    axes = [part.double().numpy() for part in views.cameras.axes()]
    half = np.tan(np.radians(views.cameras.fov.double().numpy()) / 2)
    images, masks = [], []
    for number in range(len(views.cameras)):
        position, right, up, forward = (part[number] for part in axes)
        seen = (vertices - position) @ np.stack([right, up, forward], -1)
        depth = seen[:, 2].clip(_NEAR)
        scale = views.height / 2 / half[number]
        column = views.width / 2 + scale * seen[:, 0] / depth
        row = views.height / 2 - scale * seen[:, 1] / depth
        corners = np.stack([column, row], -1)[faces]
        corners = corners[(seen[faces, 2] > _NEAR).all(-1)]
        kept = faces[(seen[faces, 2] > _NEAR).all(-1)]
        image = np.full((views.height * views.width, 3), background)
        pixel, values = _nearest(corners, kept, 1 / depth, attributes, views)
        normal = values[:, :3] / np.linalg.norm(values[:, :3], axis=-1, keepdims=True)
        light = ambient + (1 - ambient) * np.abs(normal @ forward)
        image[pixel] = colour(values[:, 3:]) * light[:, None]
        mask = np.zeros(len(image))
        mask[pixel] = 1.0
        shape = (views.height, views.width)
        images.append(image.reshape(*shape, 3).transpose(2, 0, 1))
        masks.append(mask.reshape(1, *shape))
    return tuple(torch.from_numpy(np.stack(p)).float() for p in (images, masks))  # pyright: ignore[reportReturnType]


def _colouring(
    mesh: Any, clay: bool
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Attributes of vertices, and the sRGB colours that belong to them."""
    visual = mesh.visual
    if clay or visual.kind not in ("vertex", "texture"):
        return np.full((len(mesh.vertices), 3), CLAY), lambda values: values
    if visual.kind == "vertex":
        return np.asarray(visual.vertex_colors)[:, :3] / 255, lambda values: values
    image = np.asarray(visual.material.baseColorTexture.convert("RGB"))
    look = Look(np.ones(3), image)
    return np.asarray(visual.uv), lambda uv: to_srgb(look.at(uv))


def _nearest(
    corners: np.ndarray,
    faces: np.ndarray,
    closeness: np.ndarray,
    attributes: np.ndarray,
    views: Views,
) -> tuple[np.ndarray, np.ndarray]:
    """Covered pixels, and the attributes of the nearest triangle there."""
    hits = [
        (face, row * views.width + column, bary * closeness[faces[face]])
        for face, row, column, bary in covered(corners, views.height, views.width)
    ]
    if not hits:
        return np.zeros(0, np.int64), np.zeros((0, attributes.shape[1]))
    face, pixel, weight = (np.concatenate(part) for part in zip(*hits, strict=True))
    order = np.lexsort((-weight.sum(-1), pixel))
    pixel, first = np.unique(pixel[order], return_index=True)
    face, weight = face[order][first], weight[order][first]
    weight = weight / weight.sum(-1, keepdims=True)
    return pixel, (attributes[faces[face]] * weight[..., None]).sum(1)
