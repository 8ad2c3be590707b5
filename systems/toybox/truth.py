"""The ground truth of a prompt: images, mask, signed distance and mesh.

The result of score distillation for "a red mushroom" can be compared with `truth("a red
mushroom")`, from any camera and in space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from systems.scene.cameras import Cameras
from systems.toybox.objects import OBJECTS
from systems.toybox.reader import parse
from systems.toybox.render import RADIUS, Render, render


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh with the albedo of every vertex.

    Attributes:
        vertices: Positions, shape ``(vertices, 3)``.
        faces: Vertex indices, counter-clockwise from outside, shape ``(faces, 3)``.
        colours: Albedo from 0 to 1, shape ``(vertices, 3)``.
    """

    vertices: Float[Tensor, "vertices 3"]
    faces: Int[Tensor, "faces 3"]
    colours: Float[Tensor, "vertices 3"]


@dataclass(frozen=True)
class Truth:
    """A toybox object in its colours.

    Attributes:
        colour: Colour of the body, a key of `COLOURS`.
        name: Name of the object, a key of `OBJECTS`.
        finish: Finish, a key of `FINISHES`.
        second: Colour of stripes or spots, a key of `COLOURS`.
    """

    colour: str
    name: str
    finish: str = "plain"
    second: str = ""

    def render(self, cameras: Cameras, size: int, supersample: int = 2) -> Render:
        """Colour, mask, depth and normals; see `systems.toybox.render.render`."""
        return render(
            self.name,
            self.colour,
            cameras,
            size,
            supersample,
            self.finish,
            self.second,
        )

    def sdf(self, points: Tensor) -> Tensor:
        """Signed distance, negative inside.

        Args:
            points: Points, shape ``(..., 3)``, z up, the front towards +x.

        Returns:
            Distances, shape ``(...)``: zero exactly on the surface, and at most the
            true distance outside.
        """
        return OBJECTS[self.name].sdf(points)

    def albedo(self, points: Tensor) -> Tensor:
        """Albedo of the surface nearest to points ``(..., 3)``."""
        thing = OBJECTS[self.name]
        return thing.albedo(points, self.colour, self.finish, self.second)

    def mesh(self, resolution: int = 96) -> Mesh:
        """The surface by marching cubes.

        Args:
            resolution: Grid points along each side of the cube around the object.
        """
        from skimage.measure import marching_cubes

        side = torch.linspace(-RADIUS, RADIUS, resolution)
        grid = torch.stack(torch.meshgrid(side, side, side, indexing="ij"), -1)
        corners, faces, _, _ = marching_cubes(self.sdf(grid).numpy(), 0.0)
        spacing = 2 * RADIUS / (resolution - 1)
        vertices = torch.from_numpy(corners.copy()).float() * spacing - RADIUS
        return Mesh(
            vertices=vertices,
            faces=torch.from_numpy(faces.copy()).long(),
            colours=self.albedo(vertices),
        )


def truth(prompt: str) -> Truth:
    """The ground truth of a prompt.

    Args:
        prompt: One object with its colours, such as "a red mushroom, front view" or "a
            red mug with white stripes"; the view is left to the cameras.

    Raises:
        ValueError: A word is unknown, or the prompt does not name one colour and one
            object.
    """
    asked = parse(prompt)
    assert asked.name is not None
    assert asked.colour is not None
    return Truth(asked.colour, asked.name, asked.finish, asked.second or "")


def view_cameras(view: str | None, distance: float = 2.4, fov: float = 50) -> Cameras:
    """The camera in the middle of a view; None looks from the front left, above."""
    azimuth, elevation = {
        "front": (0.0, 15.0),
        "side": (90.0, 15.0),
        "back": (180.0, 15.0),
        "overhead": (30.0, 72.0),
        None: (35.0, 25.0),
    }[view]
    return Cameras(
        azimuth=torch.tensor([azimuth]),
        elevation=torch.tensor([elevation]),
        distance=torch.tensor([float(distance)]),
        fov=torch.tensor([float(fov)]),
    )
