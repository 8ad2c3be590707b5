r"""Exact pictures of toybox objects: a sphere tracer and a fixed light.

A ray $o + t\,d$ is followed by $t \leftarrow t + \mathrm{sdf}(o + t\,d)$ until the
distance vanishes. A surface point of albedo $a$ and normal $n$ has the colour

$$c = a \,\bigl(k_a + (1 - k_a) \max(0, n \cdot \ell)\bigr),$$

with $\ell$ fixed in the world, so that the colour of a point does not depend on the
camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from systems.scene.cameras import Cameras
from systems.toybox.objects import COLOURS, OBJECTS, ToyObject

AMBIENT = 0.45
LIGHT = (0.32, 0.24, 0.9165)
"""Direction to the light, of length one: from above, a little from the front left."""
RADIUS = 1.1
"""All objects fit the ball of this radius."""
_STEPS = 48
_HIT = 4e-3


@dataclass(frozen=True)
class Render:
    """Pictures of an object, without background.

    Attributes:
        rgb: Colour times coverage, from 0 to 1, shape ``(views, 3, size, size)``.
        mask: Coverage, from 0 to 1, shape ``(views, 1, size, size)``.
        depth: Distance along the ray times coverage, shape as `mask`.
        normal: Camera-space unit normal (right, up, towards the camera) times coverage,
            shape as `rgb`.
    """

    rgb: Float[Tensor, "views 3 size size"]
    mask: Float[Tensor, "views 1 size size"]
    depth: Float[Tensor, "views 1 size size"]
    normal: Float[Tensor, "views 3 size size"]

    def over(self, background: Tensor) -> Float[Tensor, "views 3 size size"]:
        """The pictures over a plain background of shape ``(3,)`` or ``(views, 3)``."""
        background = background.expand(len(self.rgb), 3)
        return self.rgb + (1 - self.mask) * background[:, :, None, None]

    def normal_over(self, background: Tensor) -> Float[Tensor, "views 3 size size"]:
        """Normal maps, from −1…1 to 0…1, over a plain background."""
        background = background.expand(len(self.rgb), 3)
        colour = (self.normal + self.mask) / 2
        return colour + (1 - self.mask) * background[:, :, None, None]


@torch.no_grad()
def render(
    name: str, colour: str, cameras: Cameras, size: int, supersample: int = 2
) -> Render:
    """Trace an object.

    Args:
        name: A key of `OBJECTS`.
        colour: A key of `COLOURS`.
        cameras: The views.
        size: Width and height in pixels.
        supersample: Rays per pixel and direction.
    """
    thing = OBJECTS[name]
    if colour not in COLOURS:
        raise ValueError(f"`{colour}` is no colour: write one of {', '.join(COLOURS)}.")
    origins, directions = cameras.rays(size * supersample)
    points, depth, hit = trace(thing, origins, directions)
    normals = torch.zeros_like(points)
    colours = torch.zeros_like(points)
    on_surface = points[hit]
    normals[hit] = surface_normals(thing, on_surface)
    light = on_surface.new_tensor(LIGHT)
    diffuse = (normals[hit] * light).sum(-1, keepdim=True).clamp(min=0)
    colours[hit] = thing.albedo(on_surface, colour) * (
        AMBIENT + (1 - AMBIENT) * diffuse
    )
    _, right, up, forward = cameras.axes()
    to_camera = torch.stack([right, up, -forward], -2)[:, None, None]
    normals = (to_camera @ normals[..., None])[..., 0]

    def pixels(values: Tensor) -> Tensor:
        stacked = values.permute(0, 3, 1, 2).float()
        return torch.nn.functional.avg_pool2d(stacked, supersample)

    return Render(
        rgb=pixels(colours),
        mask=pixels(hit[..., None]),
        depth=pixels((depth * hit)[..., None]),
        normal=pixels(normals),
    )


def trace(
    thing: ToyObject, origins: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow rays to the surface.

    Returns:
        Points, shape ``(..., 3)``; distances along the rays and whether they hit, shape
        ``(...)``.
    """
    closest = -(origins * directions).sum(-1)
    # Only rays that meet the bounding ball can hit.
    reach = RADIUS**2 - (origins.square().sum(-1) - closest.square())
    depth = closest - reach.clamp(min=0).sqrt()
    near = reach > 0
    o = origins.expand_as(directions)[near]
    d, t = directions[near], depth[near]
    last = (closest + reach.clamp(min=0).sqrt())[near]
    active = torch.arange(len(t))
    for _ in range(_STEPS):
        distance = thing.sdf(o[active] + t[active, None] * d[active])
        t[active] += distance
        active = active[(distance.abs() > _HIT / 4) & (t[active] < last[active])]
        if not len(active):
            break
    found = (thing.sdf(o + t[:, None] * d) < _HIT) & (t < last)
    hit = torch.zeros_like(near)
    hit[near] = found
    depth[near] = t
    return origins + depth[..., None] * directions, depth, hit


def surface_normals(thing: ToyObject, points: Tensor) -> Tensor:
    """Outward unit normals by central differences, shape ``(..., 3)``."""
    step = 2e-3
    offsets = torch.eye(3, dtype=points.dtype) * step
    gradient = [thing.sdf(points + e) - thing.sdf(points - e) for e in offsets]
    return torch.nn.functional.normalize(torch.stack(gradient, -1), dim=-1)
