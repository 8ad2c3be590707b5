r"""Signed distance functions of simple solids, and how they combine.

A signed distance $d(p)$ is negative inside, zero on the surface and bounded above by
the true distance outside, so that a sphere tracer may step by it. Points have shape
``(..., 3)``, distances ``(...)``; z is up. Constructions follow I. Quilez, "distance
functions" (iquilezles.org), derived anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Sdf: TypeAlias = Callable[[Tensor], Tensor]
Vector: TypeAlias = tuple[float, float, float]


def _about(points: Tensor, center: Vector) -> Tensor:
    return points - torch.tensor(center, dtype=points.dtype, device=points.device)


def _rectangle(a: Tensor, b: Tensor) -> Tensor:
    """Distance from the overhangs over two half-sizes: outside, then inside."""
    outside = torch.hypot(a.clamp(min=0), b.clamp(min=0))
    return outside + torch.maximum(a, b).clamp(max=0)


def sphere(center: Vector, radius: float) -> Sdf:
    """A ball."""
    return lambda p: _about(p, center).norm(dim=-1) - radius


def ellipsoid(center: Vector, radii: Vector) -> Sdf:
    """An ellipsoid: a bound, exact at the centre and on the surface to first order."""

    def distance(p: Tensor) -> Tensor:
        scaled = _about(p, center) / p.new_tensor(radii)
        # The smallest radius bounds how fast the scaled length can change.
        return (scaled.norm(dim=-1) - 1) * min(radii)

    return distance


def box(center: Vector, half: Vector, rounding: float = 0.0) -> Sdf:
    """A cuboid with half-sizes `half`, its edges rounded off."""

    def distance(p: Tensor) -> Tensor:
        over = _about(p, center).abs() - p.new_tensor(half) + rounding
        return over.clamp(min=0).norm(dim=-1) + over.amax(-1).clamp(max=0) - rounding

    return distance


def cylinder(center: Vector, radius: float, half: float, axis: int = 2) -> Sdf:
    """A cylinder along an axis, of total length ``2 · half``."""

    def distance(p: Tensor) -> Tensor:
        q = _about(p, center)
        others = [i for i in range(3) if i != axis]
        radial = torch.hypot(q[..., others[0]], q[..., others[1]]) - radius
        return _rectangle(radial, q[..., axis].abs() - half)

    return distance


def torus(center: Vector, major: float, minor: float, axis: int = 2) -> Sdf:
    """A ring around an axis."""

    def distance(p: Tensor) -> Tensor:
        q = _about(p, center)
        others = [i for i in range(3) if i != axis]
        radial = torch.hypot(q[..., others[0]], q[..., others[1]]) - major
        return torch.hypot(radial, q[..., axis]) - minor

    return distance


def frustum(base: Vector, bottom: float, top: float, height: float) -> Sdf:
    """A cone from `base` upwards, of radius `bottom` there and `top` at the end."""
    slope = (bottom - top) / height
    length = (1 + slope * slope) ** 0.5

    def distance(p: Tensor) -> Tensor:
        q = _about(p, base)
        radial = torch.hypot(q[..., 0], q[..., 1])
        side = (radial - bottom + slope * q[..., 2]) / length
        ends = (q[..., 2] - height / 2).abs() - height / 2
        return torch.maximum(side, ends)

    return distance


def capsule(start: Vector, end: Vector, radius: float) -> Sdf:
    """A rod with round ends between two points."""

    def distance(p: Tensor) -> Tensor:
        q = _about(p, start)
        axis = p.new_tensor(end) - p.new_tensor(start)
        share = ((q * axis).sum(-1) / axis.square().sum()).clamp(0, 1)
        return (q - share[..., None] * axis).norm(dim=-1) - radius

    return distance


def triangle(corners: Sequence[tuple[float, float]], half: float) -> Sdf:
    """A prism over a triangle in the xz-plane, of total thickness ``2 · half`` along y.

    Args:
        corners: Three points ``(x, z)``, counter-clockwise with x to the right and z
            up.
        half: Half of the thickness.
    """
    sides: list[Sdf] = []
    for (x, z), (u, w) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = ((u - x) ** 2 + (w - z) ** 2) ** 0.5
        normal = ((w - z) / length, 0.0, (x - u) / length)
        sides.append(half_space(normal, normal[0] * x + normal[2] * z))
    return intersection(
        *sides, half_space((0, 1, 0), half), half_space((0, -1, 0), half)
    )


def half_space(normal: Vector, offset: float) -> Sdf:
    """Everything below the plane ``normal · p = offset`` (`normal` of length one)."""
    return lambda p: (p * p.new_tensor(normal)).sum(-1) - offset


def union(*parts: Sdf) -> Sdf:
    """All parts together."""
    return lambda p: _fold(torch.minimum, [part(p) for part in parts])


def intersection(*parts: Sdf) -> Sdf:
    """What the parts have in common."""
    return lambda p: _fold(torch.maximum, [part(p) for part in parts])


def difference(whole: Sdf, hole: Sdf) -> Sdf:
    """The whole without the hole."""
    return lambda p: torch.maximum(whole(p), -hole(p))


def _fold(
    combine: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor]
) -> Tensor:
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result
