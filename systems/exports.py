r"""From a state to the mesh that is written: sound, simplified, then unwrapped.

The colour of a texel at surface point x with normal n, seen in view v from direction
$d_v$, is the mean of the images there, weighted by

$$w_v = [\,x \text{ is visible in } v\,]\; \max(0,\, n \cdot d_v)^4,$$

unless the system knows its colours in space. Texels that no view sees take those of the
nearest point that one does see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import dreampropeller as dp
from systems.scene.cameras import Views
from systems.scene.mesh_files import is_textured, with_texture
from systems.scene.meshes import atlas, cleaning, finishing
from systems.scene.renderers.raster import (
    Visibility,
    choose_backend,
    project,
    rasterize,
)

if TYPE_CHECKING:
    from systems.base import System

VIEWS, SIZE = 24, 256
"""Views from which colours are baked, and their sides in pixels."""
_NEAR_ENOUGH = 0.02
"""Difference in distance up to which a point is the one that a pixel sees."""


def finished(system: System, y: dp.State) -> Any:
    """The mesh of a state as it is written; see `System.mesh`.

    With `export.texture` a mesh with vertex colours gets a texture.

    Args:
        system: System that makes and colours the mesh.
        y: The state.

    Raises:
        EmptySurface: There is no surface.
    """
    mesh, settings = system.mesh(y), system.config.export
    if is_textured(mesh):
        return mesh
    mesh = finishing.simplified(finishing.sound(mesh), settings.max_faces)
    if not settings.texture:
        return mesh
    place = cleaning.weld(np.asarray(mesh.vertices))
    normals = np.asarray(mesh.vertex_normals)
    origin, faces, uv = atlas.unwrap(
        np.asarray(mesh.vertices), place[np.asarray(mesh.faces)], settings.texture
    )
    vertices, normals = np.asarray(mesh.vertices)[origin], normals[origin]
    texels = atlas.Texels.of(uv, faces, settings.texture)
    corners, weights = faces[texels.face[texels.inside]], texels.weights[..., None]
    points, facing = (
        torch.from_numpy((part[corners] * weights).sum(1)).float()
        for part in (vertices, normals)
    )
    colours = system.paint(y, mesh, points, torch.nn.functional.normalize(facing))
    textured = with_texture(
        vertices, faces, normals, uv, texels.image(colours.double().numpy())
    )
    textured.metadata.update(mesh.metadata)
    return textured


@torch.no_grad()
def from_views(
    system: System,
    y: dp.State,
    mesh: Any,
    points: Float[Tensor, "points 3"],
    normals: Float[Tensor, "points 3"],
) -> Float[Tensor, "points 3"]:
    """Colours of surface points from images all around; see the module.

    Args:
        system: System that renders the state.
        y: The state.
        mesh: The mesh, for visibility.
        points: Points on the surface.
        normals: Their unit normals.
    """
    vertices = torch.from_numpy(np.array(mesh.vertices)).float()
    faces = torch.from_numpy(np.array(mesh.faces)).long()
    visibility = choose_backend("auto", torch.device("cpu"))[0](vertices, faces)
    views = _all_around(system)
    total, weight = torch.zeros(len(points), 3), torch.zeros(len(points), 1)
    for number in range(VIEWS):
        view = views.one(number)
        image, opacity = system.render(y, view, grey=0.0)
        layers = torch.cat([image, opacity], 1)
        seen, share = _seen(layers, view, vertices, faces, visibility, points, normals)
        total += share * seen
        weight += share
    known = weight[:, 0] > 1e-6
    colours = total / weight.clamp(min=1e-6)
    if known.any() and not known.all():
        from scipy.spatial import KDTree

        _, nearest = KDTree(points[known]).query(points[~known])
        colours[~known] = colours[known][torch.from_numpy(nearest)]
    return colours.clamp(0, 1)


def _all_around(system: System) -> Views:
    """Views all around, at the turntable's distance, also from above and below."""
    number = torch.arange(VIEWS)
    elevation = torch.linspace(0.97, -0.97, VIEWS).asin().rad2deg()
    flat = system.cameras.turntable(VIEWS).cameras
    cameras = replace(flat, azimuth=number * 137.508, elevation=elevation)
    return Views(cameras, cameras.axes()[0], SIZE, SIZE)


def _seen(
    layers: Tensor,
    view: Views,
    vertices: Tensor,
    faces: Tensor,
    visibility: Visibility,
    points: Tensor,
    normals: Tensor,
) -> tuple[Tensor, Tensor]:
    """Colours of points in one view, and their weights."""
    fragments = rasterize(vertices, faces, view, visibility)
    depth = fragments.image(fragments.depth[:, None]).permute(0, 3, 1, 2)
    pixels = project(points, view)[0]
    size = pixels.new_tensor([view.width, view.height])
    grid = (2 * pixels / size - 1)[None, None]

    def look(image: Tensor, mode: str) -> Tensor:
        found = torch.nn.functional.grid_sample(
            image, grid, mode=mode, align_corners=False
        )
        return found[0, :, 0].T

    away = view.cameras.axes()[0] - points
    distance = away.norm(dim=-1, keepdim=True)
    visible = (look(depth, "nearest") - distance).abs() < _NEAR_ENOUGH
    facing = (normals * away / distance).sum(-1, keepdim=True).clamp(min=0) ** 4
    found = look(layers, "bilinear")
    opacity = found[:, 3:]
    inside = (opacity > 0.5) & visible
    return found[:, :3] / opacity.clamp(min=0.5), facing * inside
