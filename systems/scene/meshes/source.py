r"""A mesh with the colours that its file gives it.

The colour of a surface point is, in linear light,

$$c = f \cdot T(u) \cdot v,$$

with the base colour factor f, texture T and vertex colour v of its material (glTF 2.0,
section 3.9.2); what a file lacks is one. It is returned as a display colour (sRGB).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from systems.scene.colours import to_linear, to_srgb


@dataclass(frozen=True)
class Look:
    """A material: what colours the faces that use it.

    Attributes:
        factor: Base colour factor, linear light, shape ``(3,)``.
        texture: sRGB bytes, shape ``(rows, columns, 3)``; None: no texture.
    """

    factor: np.ndarray
    texture: np.ndarray | None = None

    def at(self, uv: np.ndarray) -> np.ndarray:
        """Linear colours at texture coordinates ``(points, 2)``, which repeat."""
        if self.texture is None:
            return np.broadcast_to(self.factor, (len(uv), 3))
        rows, columns, _ = self.texture.shape
        x, y = uv[:, 0] * columns - 0.5, (1 - uv[:, 1]) * rows - 0.5
        left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        found = np.zeros((len(uv), 3))
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                texels = self.texture[row % rows, column % columns] / 255
                found += (across * down)[:, None] * texels
        return to_linear(found) * self.factor


@dataclass(frozen=True)
class Source:
    """A mesh in the frame of the scene, with its colours.

    Attributes:
        vertices: Positions, shape ``(vertices, 3)``.
        faces: Vertex indices, counter-clockwise from outside, shape ``(faces, 3)``.
        normals: Unit normals of the vertices.
        looks: Materials.
        look: Index of the material of each face.
        uv: Texture coordinates of the vertices, v upwards; None: the file has none.
        colours: Vertex colours, linear light; None: the file has none.
        notes: Sentences about what was changed in the mesh.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    looks: tuple[Look, ...]
    look: np.ndarray
    uv: np.ndarray | None = None
    colours: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def colour(self, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Display colours of surface points.

        Args:
            face: Face of each point, shape ``(points,)``.
            weights: Barycentric coordinates, shape ``(points, 3)``.

        Returns:
            Colours from 0 to 1, shape ``(points, 3)``.
        """
        corners = self.faces[face]

        def mixed(values: np.ndarray) -> np.ndarray:
            return (values[corners] * weights[..., None]).sum(1)

        uv = np.zeros((len(face), 2)) if self.uv is None else mixed(self.uv)
        linear = np.ones((len(face), 3))
        for number, look in enumerate(self.looks):
            own = self.look[face] == number
            if own.any():
                linear[own] = look.at(uv[own])
        if self.colours is not None:
            linear = linear * mixed(self.colours)
        return to_srgb(linear.clip(0, 1))

    def points(self, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Positions of surface points; arguments as for `colour`."""
        return (self.vertices[self.faces[face]] * weights[..., None]).sum(1)
