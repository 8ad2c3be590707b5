r"""The surface of a density, as a triangle mesh with a colour at every vertex.

A volume renderer sees no surface but an opacity $o(r) = 1 - e^{-\int_r \sigma}$ for
each ray r. The silhouette of the surface $\{\sigma = \tau\}$ is the set of rays whose
largest density reaches τ, so the level whose silhouettes differ least from the opacity
is

$$\tau^* = \arg\min_\tau \sum_r \bigl|o(r) - [\max_r \sigma \ge \tau]\bigr|
         = \arg\max_\tau \sum_{r:\,\max_r \sigma \ge \tau} (2\,o(r) - 1).$$

Components below a share of the volume are dropped, cavities that no ray can reach are
filled, and marching cubes makes triangles of the rest. The colour of a vertex is what a
ray along its normal would show: the colours it passes, weighted as in Eq. 3 of B.
Mildenhall et al. (2020, arXiv 2003.08934).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CRUMB_SHARE = 0.01
"""Components with a smaller share of the volume are dropped."""
_CHUNK = 2**18
_PLATEAU = 2e-3
"""Levels whose agreement is this close to the best, relatively, count as equal."""
_DEPTH = 12
"""Samples below a vertex from which its colour is taken."""

Values = Callable[[Tensor], Tensor]


class EmptySurface(ValueError):
    """There is no surface at the threshold; the message says what to change."""


@dataclass(frozen=True)
class Silhouettes:
    """Rendered opacity of a density along rays.

    Attributes:
        origins: Origins of the rays, shape ``(rays, 3)``.
        directions: Unit directions of the rays, shape ``(rays, 3)``.
        opacity: Opacity of the rays, from 0 to 1, shape ``(rays,)``.
    """

    origins: Float[Tensor, "rays 3"]
    directions: Float[Tensor, "rays 3"]
    opacity: Float[Tensor, " rays"]


def extract_mesh(
    density: Values,
    colour: Values,
    radius: float,
    resolution: int,
    threshold: float | Silhouettes,
    step_size: float = 0.0,
    crumb_share: float = CRUMB_SHARE,
) -> Any:
    """The surface of a density by marching cubes.

    Args:
        density: Density at points ``(points, 3)``.
        colour: Colour at points, from 0 to 1.
        radius: Half the side of the cube that is searched.
        resolution: Grid points per side.
        threshold: The density at the surface, or the silhouettes that choose it.
        step_size: Distance between the samples of a ray, for the colours; 0 uses the
            colours at the vertices themselves.
        crumb_share: Share of the volume below which a component is dropped.

    Returns:
        A `trimesh.Trimesh` with sRGB vertex colours; its `metadata` holds ``level``.

    Raises:
        EmptySurface: The density is nowhere above the threshold, or everywhere.
    """
    import trimesh
    from skimage.measure import marching_cubes

    volume = sample(density, radius, resolution)
    if isinstance(threshold, Silhouettes):
        level = choose_level(volume, radius, threshold)
    else:
        level = _check(volume, threshold)
    volume = clean(volume, level, crumb_share)
    corners, faces, _, _ = marching_cubes(volume.numpy(), level)
    vertices = corners.astype(np.float64) * (2 * radius / (resolution - 1)) - radius
    # Densities rise inwards, so the faces come out inside out.
    mesh: Any = trimesh.Trimesh(vertices, faces[:, ::-1], process=False)
    points, normals = (
        torch.from_numpy(part.copy()).float()
        for part in (mesh.vertices, mesh.vertex_normals)
    )
    colours = colours_along(density, colour, points, normals, step_size)
    mesh.visual.vertex_colors = (colours.clamp(0, 1) * 255).round().byte().numpy()
    mesh.metadata["level"] = level
    return mesh


def sample(
    density: Values, radius: float, resolution: int
) -> Float[Tensor, "side side side"]:
    """Sample a density on a grid over the cube of side 2 · radius."""
    side = torch.linspace(-radius, radius, resolution)
    grid = torch.cartesian_prod(side, side, side)
    values = torch.cat([density(part) for part in grid.split(_CHUNK)])
    return values.reshape(resolution, resolution, resolution)


def choose_level(
    volume: Float[Tensor, "side side side"], radius: float, seen: Silhouettes
) -> float:
    """The level whose silhouettes differ least from the opacity, as above.

    The middle of the plateau, by ratio, where many levels agree equally well.

    Raises:
        EmptySurface: The object is nowhere opaque, or everywhere.
    """
    peaks = largest_along(volume, radius, seen.origins, seen.directions)
    peaks, order = peaks.double().sort(descending=True, stable=True)
    gain = (2 * seen.opacity[order].double() - 1).cumsum(0)
    best = float(gain.max())
    reached = peaks > 0
    if best <= 0 or not bool(reached.any()):
        raise EmptySurface(
            "There is no surface: the object is nowhere opaque (largest opacity "
            f"{float(seen.opacity.max()):.2f}). Try more steps (`trainer.max_steps`), "
            "or a density by hand: `system.geometry.isosurface_threshold="
            f"{max(float(volume.max()) / 2, 1e-3):.3g}`."
        )
    equal = peaks[(gain >= best * (1 - _PLATEAU)) & reached]
    return _check(volume, float((equal.max() * equal.min()).sqrt()))


def largest_along(
    volume: Float[Tensor, "side side side"],
    radius: float,
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
) -> Float[Tensor, " rays"]:
    """The largest density along rays, trilinearly interpolated on a grid."""
    closest = -(origins * directions).sum(-1, keepdim=True)
    reach = 3**0.5 * radius
    offsets = torch.linspace(-reach, reach, 2 * len(volume))
    peaks = []
    for part in torch.arange(len(origins)).split(max(1, _CHUNK // len(offsets))):
        along = (closest[part] + offsets).clamp(min=0)[..., None]
        points = origins[part, None] + along * directions[part, None]
        # `grid_sample` wants x last, and the grid's first axis is x.
        values = torch.nn.functional.grid_sample(
            volume[None, None], points.flip(-1)[None, None] / radius, align_corners=True
        )
        peaks.append(values[0, 0, 0].amax(-1))
    return torch.cat(peaks)


def clean(
    volume: Float[Tensor, "side side side"], level: float, crumb_share: float
) -> Float[Tensor, "side side side"]:
    """Close the object at the cube, drop small components and fill cavities."""
    from scipy import ndimage

    values = volume.numpy().copy()
    low, high = values.min(), values.max()
    for axis in range(3):
        edges = np.moveaxis(values, axis, 0)
        edges[0] = edges[-1] = low
    labels = np.zeros(values.shape, np.int32)
    ndimage.label(values > level, output=labels)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    small = sizes < crumb_share * sizes.sum()
    small[0] = False
    values[small[labels]] = low
    filled = np.asarray(ndimage.binary_fill_holes(values > level))
    values[filled & (values <= level)] = high
    return torch.from_numpy(values)


def _check(volume: Tensor, level: float) -> float:
    low, high = float(volume.min()), float(volume.max())
    if not low < level < high:
        middle = max(high / 2, 1e-3)
        raise EmptySurface(
            f"There is no surface at density {level:g}: the densities of this object "
            f"go from {low:.3g} to {high:.3g}. Try "
            f"`system.geometry.isosurface_threshold={middle:.3g}`, or more steps "
            "(`trainer.max_steps`)."
        )
    return level


def colours_along(
    density: Values,
    colour: Values,
    points: Float[Tensor, "points 3"],
    normals: Float[Tensor, "points 3"],
    step_size: float,
) -> Float[Tensor, "points 3"]:
    """Colours of rays along the normals of surface points; arguments as above."""
    if not step_size:
        return torch.cat([colour(part) for part in points.split(_CHUNK)])
    # From one step outside, where thin density already counts.
    depths = (torch.arange(_DEPTH) - 0.5) * step_size
    colours = []
    for part in torch.arange(len(points)).split(_CHUNK // _DEPTH):
        inwards = depths[:, None] * normals[part, None]
        inside = (points[part, None] - inwards).reshape(-1, 3)
        reached = density(inside).reshape(-1, _DEPTH) * step_size
        passed = torch.exp(-(reached.cumsum(-1) - reached))
        weights = passed * (1 - torch.exp(-reached)) + 1e-8
        shown = colour(inside).reshape(-1, _DEPTH, 3) * weights[..., None]
        colours.append(shown.sum(1) / weights.sum(1, keepdim=True))
    return torch.cat(colours)
