"""The objects and colours of the toybox, in their fixed, documented order.

An object is a body, which takes the named colours, and parts of fixed colours. All fit
the ball of radius 1 around the origin; z is up and the front looks along +x. The order
of `OBJECTS` and `COLOURS` numbers them; it must never change, since captions, the
scored prompts and the held-out pairs refer to it. New ones are appended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from systems.toybox.finishes import FINISHES
from systems.toybox.sdf import (
    Sdf,
    Vector,
    box,
    capsule,
    cylinder,
    difference,
    ellipsoid,
    frustum,
    half_space,
    intersection,
    sphere,
    torus,
    triangle,
    union,
)

COLOURS: Mapping[str, Vector] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.12, 0.22, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.50, 0.12, 0.62),
    "orange": (0.96, 0.48, 0.05),
    "cyan": (0.10, 0.80, 0.85),
    "pink": (0.97, 0.52, 0.72),
    "white": (0.95, 0.95, 0.93),
    "black": (0.10, 0.10, 0.10),
}
WHITE: Vector = COLOURS["white"]
BLACK: Vector = COLOURS["black"]
BROWN: Vector = (0.42, 0.26, 0.14)
GREY: Vector = (0.50, 0.50, 0.52)
TAN: Vector = (0.85, 0.70, 0.45)


@dataclass(frozen=True)
class ToyObject:
    """A body of the named colours, and parts of fixed colours."""

    body: Sdf
    parts: tuple[tuple[Sdf, Vector], ...] = ()

    def distances(self, points: Tensor) -> Tensor:
        """Signed distance of each part, body first, shape ``(..., pieces)``."""
        pieces = (self.body, *(sdf for sdf, _ in self.parts))
        return torch.stack([piece(points) for piece in pieces], -1)

    def sdf(self, points: Tensor) -> Tensor:
        """Signed distance of the whole object, shape ``(...)``."""
        return self.distances(points).amin(-1)

    def albedo(
        self, points: Tensor, colour: str, finish: str = "plain", second: str = ""
    ) -> Tensor:
        """Colour of the part nearest to each point, shape ``(..., 3)``.

        Args:
            points: Shape ``(..., 3)``.
            colour: Colour of the body, a key of `COLOURS`.
            finish: A key of `FINISHES`.
            second: The colour of the stripes or spots, a key of `COLOURS`.
        """
        palette = points.new_tensor([COLOURS[colour], *(c for _, c in self.parts)])
        piece = self.distances(points).argmin(-1)
        albedo = palette[piece]
        if finish != "plain":
            marked = FINISHES[finish](points) & (piece == 0)
            albedo[marked] = points.new_tensor(COLOURS[second])
        return albedo


def _legs(x: float, y: float, z: float, half: Vector) -> Sdf:
    corners = [(sx * x, sy * y, z) for sx in (-1, 1) for sy in (-1, 1)]
    return union(*(box(corner, half) for corner in corners))


_s = math.sqrt(0.5)

OBJECTS: Mapping[str, ToyObject] = {
    "sphere": ToyObject(sphere((0, 0, 0), 0.65)),
    "cube": ToyObject(box((0, 0, 0), (0.5, 0.5, 0.5), 0.02)),
    "torus": ToyObject(torus((0, 0, 0), 0.5, 0.2)),
    "cone": ToyObject(frustum((0, 0, -0.6), 0.58, 0.0, 1.25)),
    "cylinder": ToyObject(cylinder((0, 0, 0), 0.42, 0.6)),
    "mushroom": ToyObject(
        intersection(sphere((0, 0, 0), 0.66), half_space((0, 0, -1), 0.0)),
        ((cylinder((0, 0, -0.32), 0.2, 0.36), WHITE),),
    ),
    "tree": ToyObject(
        union(
            frustum((0, 0, -0.3), 0.56, 0.0, 0.75),
            frustum((0, 0, 0.1), 0.42, 0.0, 0.65),
        ),
        ((cylinder((0, 0, -0.5), 0.14, 0.25), BROWN),),
    ),
    "house": ToyObject(
        box((0, 0, -0.25), (0.45, 0.45, 0.38)),
        (
            (
                intersection(
                    half_space((_s, 0, _s), 0.49),
                    half_space((-_s, 0, _s), 0.49),
                    half_space((0, 0, -1), -0.1),
                    box((0, 0, 0.4), (0.6, 0.5, 0.4)),
                ),
                BROWN,
            ),
            (box((0.44, 0, -0.4), (0.03, 0.11, 0.23)), WHITE),
        ),
    ),
    "mug": ToyObject(
        union(
            difference(
                cylinder((0, -0.1, 0), 0.45, 0.5), cylinder((0, -0.1, 0.14), 0.36, 0.5)
            ),
            intersection(
                torus((0, 0.34, 0), 0.27, 0.08, axis=0), half_space((0, -1, 0), -0.3)
            ),
        )
    ),
    "snowman": ToyObject(
        union(cylinder((0, 0, 0.72), 0.19, 0.17), cylinder((0, 0, 0.56), 0.32, 0.03)),
        (
            (union(sphere((0, 0, -0.38), 0.43), sphere((0, 0, 0.26), 0.31)), WHITE),
            (sphere((0.31, 0, 0.26), 0.07), COLOURS["orange"]),
        ),
    ),
    "chair": ToyObject(
        union(
            box((0, 0, -0.1), (0.4, 0.4, 0.07)),
            box((-0.34, 0, 0.32), (0.06, 0.4, 0.42)),
            _legs(0.33, 0.33, -0.42, (0.06, 0.06, 0.3)),
        )
    ),
    "table": ToyObject(
        box((0, 0, 0.3), (0.62, 0.5, 0.07)),
        ((_legs(0.5, 0.38, -0.2, (0.06, 0.06, 0.45)), BROWN),),
    ),
    "ice cream cone": ToyObject(
        sphere((0, 0, 0.32), 0.38),
        ((frustum((0, 0, -0.78), 0.03, 0.36, 1.0), TAN),),
    ),
    "rocket": ToyObject(
        union(
            cylinder((0, 0, -0.05), 0.25, 0.45),
            intersection(
                box((0, 0, -0.5), (0.5, 0.04, 0.22)), half_space((0, 0, 1), -0.28)
            ),
            intersection(
                box((0, 0, -0.5), (0.04, 0.5, 0.22)), half_space((0, 0, 1), -0.28)
            ),
        ),
        (
            (frustum((0, 0, 0.4), 0.25, 0.0, 0.45), WHITE),
            (sphere((0.2, 0, 0.15), 0.11), GREY),
        ),
    ),
    "car": ToyObject(
        union(
            box((0, 0, -0.12), (0.72, 0.34, 0.16), 0.04),
            box((-0.08, 0, 0.14), (0.38, 0.3, 0.2), 0.06),
        ),
        (
            (
                union(
                    *(
                        cylinder((x, y, -0.28), 0.17, 0.06, axis=1)
                        for x in (-0.42, 0.42)
                        for y in (-0.34, 0.34)
                    )
                ),
                BLACK,
            ),
        ),
    ),
    "fish": ToyObject(
        union(
            ellipsoid((0.12, 0, 0), (0.55, 0.24, 0.36)),
            intersection(
                box((-0.56, 0, 0), (0.2, 0.06, 0.4)),
                half_space((_s, 0, _s), -0.22),
                half_space((_s, 0, -_s), -0.22),
            ),
        ),
        (
            (
                union(
                    sphere((0.46, 0.16, 0.1), 0.08), sphere((0.46, -0.16, 0.1), 0.08)
                ),
                BLACK,
            ),
        ),
    ),
    "teapot": ToyObject(
        union(
            ellipsoid((-0.04, 0, -0.1), (0.48, 0.48, 0.42)),
            capsule((0.3, 0, -0.18), (0.74, 0, 0.22), 0.1),
            torus((-0.5, 0, -0.06), 0.25, 0.07, axis=1),
        ),
        (
            (
                union(
                    sphere((-0.04, 0, 0.4), 0.11),
                    cylinder((-0.04, 0, 0.29), 0.24, 0.04),
                ),
                BLACK,
            ),
        ),
    ),
    "sailboat": ToyObject(
        union(
            intersection(
                ellipsoid((0, 0, -0.3), (0.8, 0.34, 0.45)), half_space((0, 0, 1), -0.3)
            ),
            triangle(((0.2, -0.2), (0.68, -0.2), (0.2, 0.6)), 0.04),
        ),
        (
            (triangle(((-0.66, -0.16), (0.04, -0.16), (0.04, 0.86)), 0.04), WHITE),
            (cylinder((0.11, 0, 0.25), 0.045, 0.65), BROWN),
        ),
    ),
    "airplane": ToyObject(
        union(
            capsule((-0.6, 0, 0), (0.6, 0, 0), 0.18),
            box((0.08, 0, 0), (0.18, 0.88, 0.04)),
            box((-0.66, 0, 0.04), (0.12, 0.34, 0.035)),
            box((-0.68, 0, 0.26), (0.12, 0.035, 0.22)),
        ),
        (
            (ellipsoid((0.46, 0, 0.12), (0.2, 0.13, 0.12)), BLACK),
            (
                union(
                    *(
                        capsule((0.1, y, -0.1), (0.32, y, -0.1), 0.09)
                        for y in (-0.46, 0.46)
                    )
                ),
                GREY,
            ),
        ),
    ),
    "duck": ToyObject(
        union(
            ellipsoid((-0.1, 0, -0.28), (0.56, 0.38, 0.34)),
            capsule((-0.5, 0, -0.2), (-0.74, 0, 0.04), 0.1),
            sphere((0.28, 0, 0.27), 0.29),
        ),
        (
            (ellipsoid((0.6, 0, 0.2), (0.2, 0.15, 0.07)), COLOURS["orange"]),
            (
                union(
                    sphere((0.48, 0.15, 0.36), 0.065),
                    sphere((0.48, -0.15, 0.36), 0.065),
                ),
                BLACK,
            ),
        ),
    ),
    "lamp": ToyObject(
        union(
            frustum((0.28, 0, 0.12), 0.44, 0.16, 0.46),
            cylinder((-0.22, 0, -0.74), 0.33, 0.07),
        ),
        (
            (
                union(
                    capsule((-0.22, 0, -0.72), (-0.46, 0, 0.1), 0.06),
                    capsule((-0.46, 0, 0.1), (0.2, 0, 0.66), 0.06),
                ),
                BLACK,
            ),
            (sphere((0.28, 0, 0.14), 0.16), COLOURS["yellow"]),
        ),
    ),
    "key": ToyObject(
        union(
            torus((-0.52, 0, 0), 0.28, 0.1, axis=1),
            capsule((-0.2, 0, 0), (0.82, 0, 0), 0.09),
            box((0.46, 0, -0.2), (0.08, 0.06, 0.17)),
            box((0.74, 0, -0.18), (0.07, 0.06, 0.15)),
        )
    ),
    "guitar": ToyObject(
        union(
            cylinder((0, 0, -0.48), 0.4, 0.11, axis=0),
            cylinder((0, 0, -0.02), 0.29, 0.11, axis=0),
        ),
        (
            (
                union(
                    cylinder((0.1, 0, -0.18), 0.13, 0.025, axis=0),
                    box((0.06, 0, 0.84), (0.05, 0.11, 0.11)),
                ),
                BLACK,
            ),
            (
                union(
                    box((0.08, 0, 0.4), (0.05, 0.065, 0.42)),
                    box((0.12, 0, -0.6), (0.03, 0.18, 0.04)),
                ),
                BROWN,
            ),
        ),
    ),
    "boot": ToyObject(
        union(
            cylinder((-0.24, 0, 0.12), 0.28, 0.62),
            intersection(
                ellipsoid((0.08, 0, -0.54), (0.57, 0.27, 0.36)),
                half_space((0, 0, -1), 0.6),
            ),
        ),
        ((box((0.06, 0, -0.64), (0.58, 0.27, 0.06), 0.05), BLACK),),
    ),
    "rabbit": ToyObject(
        union(
            ellipsoid((-0.12, 0, -0.4), (0.46, 0.36, 0.4)),
            sphere((0.24, 0, 0.08), 0.29),
            *(
                capsule((0.16, y, 0.3), (0.06, 1.7 * y, 0.82), 0.09)
                for y in (-0.13, 0.13)
            ),
        ),
        (
            (sphere((-0.6, 0, -0.4), 0.16), WHITE),
            (sphere((0.52, 0, 0.06), 0.07), COLOURS["pink"]),
            (
                union(
                    sphere((0.46, 0.14, 0.17), 0.06), sphere((0.46, -0.14, 0.17), 0.06)
                ),
                BLACK,
            ),
        ),
    ),
    "robot": ToyObject(
        union(
            box((0, 0, -0.08), (0.25, 0.32, 0.32), 0.04),
            *(box((0, y, -0.1), (0.1, 0.09, 0.3), 0.03) for y in (-0.45, 0.45)),
        ),
        (
            (
                union(
                    box((0, 0, 0.5), (0.23, 0.26, 0.21), 0.04),
                    *(box((0, y, -0.64), (0.13, 0.11, 0.25)) for y in (-0.17, 0.17)),
                ),
                GREY,
            ),
            (
                union(
                    sphere((0.22, 0.1, 0.56), 0.07), sphere((0.22, -0.1, 0.56), 0.07)
                ),
                COLOURS["yellow"],
            ),
            (box((0.24, 0, 0), (0.04, 0.2, 0.13)), WHITE),
        ),
    ),
}
WITH_FRONT = (
    *("house", "mug", "chair", "car", "fish"),
    *("teapot", "sailboat", "airplane", "duck", "lamp", "key", "guitar"),
    *("boot", "rabbit", "robot"),
)
"""Objects that look different from behind: turned by 180° about the vertical, the PSNR
of their renders is below 30 dB."""
