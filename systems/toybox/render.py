r"""Ground-truth images of toybox objects: a sphere tracer and a fixed light.

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
    """Images of an object, without background.

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
        """The images over a solid background of shape ``(3,)`` or ``(views, 3)``."""
        background = background.expand(len(self.rgb), 3)
        return self.rgb + (1 - self.mask) * background[:, :, None, None]

    def normal_over(self, background: Tensor) -> Float[Tensor, "views 3 size size"]:
        """Normal maps, mapped from −1…1 to 0…1, over a solid background."""
        background = background.expand(len(self.rgb), 3)
        colour = (self.normal + self.mask) / 2
        return colour + (1 - self.mask) * background[:, :, None, None]


@torch.no_grad()
def render(
    name: str,
    colour: str,
    cameras: Cameras,
    size: int,
    supersample: int = 2,
    finish: str = "plain",
    second: str = "",
) -> Render:
    """Trace an object.

    Args:
        name: A key of `OBJECTS`.
        colour: A key of `COLOURS`.
        cameras: The views, on the device that renders.
        size: Width and height in pixels.
        supersample: Rays per pixel and direction.
        finish: A key of `FINISHES`.
        second: The colour of stripes or spots, a key of `COLOURS`.
    """
    thing = OBJECTS[name]
    for value in (colour, *([] if finish == "plain" else [second])):
        if value not in COLOURS:
            known = ", ".join(COLOURS)
            raise ValueError(f"`{value}` is no colour: write one of {known}.")
    surface = find_surface(thing, cameras, size * supersample)
    albedo = thing.albedo(surface.points, colour, finish, second)
    return Render(
        rgb=surface.pixels(albedo * surface.shade, supersample),
        mask=surface.pixels(torch.ones_like(surface.shade), supersample),
        depth=surface.pixels(surface.depth, supersample),
        normal=surface.pixels(surface.normals, supersample),
    )


@dataclass(frozen=True)
class Surface:
    """The surface points hit by the rays of some views.

    Attributes:
        hit: Whether a ray meets the object, shape ``(views, rows, columns)``.
        points: The points hit, shape ``(hits, 3)``, in the order of `hit`.
        depth: Distance along the ray, shape ``(hits, 1)``.
        normals: Camera-space unit normals, shape ``(hits, 3)``.
        shade: The light's factor on the albedo, shape ``(hits, 1)``.
    """

    hit: Tensor
    points: Tensor
    depth: Tensor
    normals: Tensor
    shade: Tensor

    def pixels(self, values: Tensor, supersample: int) -> Tensor:
        """Average values ``(hits, channels)`` over pixels; nothing counts as zero.

        Returns:
            Shape ``(views, channels, size, size)``.
        """
        spread = values.new_zeros(*self.hit.shape, values.shape[-1])
        spread[self.hit] = values
        stacked = spread.permute(0, 3, 1, 2).float()
        return torch.nn.functional.avg_pool2d(stacked, supersample)


def find_surface(thing: ToyObject, cameras: Cameras, rays: int) -> Surface:
    """Trace and light an object.

    Args:
        thing: The object.
        cameras: The views.
        rays: Rays per side of the square image.
    """
    origins, directions = cameras.rays(rays)
    points, depth, hit = trace(thing, origins, directions)
    points, depth = points[hit], depth[hit]
    normals = surface_normals(thing, points)
    light = points.new_tensor(LIGHT)
    diffuse = (normals * light).sum(-1, keepdim=True).clamp(min=0)
    _, right, up, forward = cameras.axes()
    to_camera = torch.stack([right, up, -forward], -2)
    view = hit.nonzero()[:, 0]
    turned = (to_camera[view] @ normals[..., None])[..., 0]
    return Surface(
        hit, points, depth[:, None], turned, AMBIENT + (1 - AMBIENT) * diffuse
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
    active = torch.arange(len(t), device=t.device)
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
    offsets = torch.eye(3, dtype=points.dtype, device=points.device) * step
    gradient = [thing.sdf(points + e) - thing.sdf(points - e) for e in offsets]
    return torch.nn.functional.normalize(torch.stack(gradient, -1), dim=-1)
