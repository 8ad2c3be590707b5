r"""Rasterisation of a surface that is optimised.

The mesh is made from the field anew in every step. A pixel is the mean over its samples
of the shaded colours that their rays meet; gradients reach the vertices through colours
and normals, and at silhouettes through antialiasing
(`systems.scene.renderers.silhouettes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreampropeller import StepRandom
from systems.scene.backgrounds import Background
from systems.scene.cameras import Views
from systems.scene.fields import Field, TetrahedralField
from systems.scene.materials import Material
from systems.scene.renderers.base import Renderer, Rendering
from systems.scene.renderers.raster import RasterConfig, pooled, rasterize
from systems.scene.renderers.silhouettes import Adjacency, antialias
from systems.settings.checks import at_least


@dataclass(frozen=True)
class SurfaceConfig(RasterConfig):
    """Rasterisation of a surface that is optimised (``nvdiff-rasterizer``).

    Args:
        radius: Radius of the ball outside of which there is no surface; null: the
            geometry's.
    """

    radius: float | None = None
    supersample: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius is not None:
            at_least("radius", self.radius, 1e-3)


class SurfaceRenderer(Renderer):
    """Renders the surface of a tetrahedral grid with a material over a background.

    Args:
        config: Settings of the renderer.
    """

    Config = SurfaceConfig
    config: SurfaceConfig

    def __init__(self, config: SurfaceConfig) -> None:
        super().__init__()
        self.config = config

    def check(self, geometry: Field) -> None:
        """See `Renderer.check`."""
        if not isinstance(geometry, TetrahedralField):
            raise ValueError(
                "`nvdiff-rasterizer` renders the surface of tetrahedra, which "
                f"`{type(geometry).__name__}` does not have: write "
                "`system.geometry_type: tetrahedra-sdf-grid` or `voxel-tetrahedra`, or "
                "a volume renderer."
            )

    def forward(
        self,
        geometry: Field,
        material: Material,
        background: Background,
        views: Views,
        step: int | None,
        random: StepRandom,
        with_normals: bool = False,
    ) -> Rendering:
        """See `Renderer.forward`; normals come with the mesh."""
        del with_normals
        assert isinstance(geometry, TetrahedralField)
        vertices, faces = geometry.surface()
        with torch.autocast(vertices.device.type, enabled=False):
            normals = vertex_normals(vertices, faces)
            mesh = (vertices, normals, faces)
            layers = self._layers(geometry, material, views, step, random, mesh)
        opacity = layers[..., 6:]
        directions = views.cameras.rays(views.height, views.width)[1]
        behind = background(directions.to(layers), step, random)
        foreground = layers[..., :3]
        rough = {}
        if step is not None and vertices.requires_grad:  # a surface that is optimised
            edges = edges_of(faces)
            found = {
                "bend": bend(normals, edges),
                "laplacian": laplacian(vertices, edges),
            }
            rough = {name: value.expand(len(opacity)) for name, value in found.items()}
        return Rendering(
            foreground + (1 - opacity) * behind,
            foreground,
            opacity,
            layers[..., 3:6],
            torch.zeros_like(opacity),
            **rough,
        )

    def _layers(
        self,
        geometry: TetrahedralField,
        material: Material,
        views: Views,
        step: int | None,
        random: StepRandom,
        mesh: tuple[Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "views height width 7"]:
        """Colour, normal and coverage of the pixels."""
        vertices, normals, faces = mesh
        fine = self.config.finer(views, step)
        visibility = self.config.visibility(vertices, faces)
        seen = rasterize(vertices, faces, fine, visibility)
        points = seen.interpolate(vertices, faces)
        normal = torch.nn.functional.normalize(seen.interpolate(normals, faces), dim=-1)
        material = material.at(step, random)
        shading = material.shading(step, random)
        colours = material.albedo(geometry.features(points, step))
        if shading != "albedo":
            light = views.light.to(points)[seen.hit.nonzero()[:, 0]]
            lit = material.light(points, normal, light)
            colours = lit if shading == "textureless" else colours * lit
        cover = torch.ones_like(points[:, :1])
        layers = seen.image(torch.cat([colours, normal, cover], -1))
        adjacency = Adjacency.of(faces)
        layers = antialias(layers, seen, vertices, faces, fine, adjacency)
        return pooled(layers, views)


def vertex_normals(
    vertices: Float[Tensor, "vertices 3"], faces: Int[Tensor, "faces 3"]
) -> Float[Tensor, "vertices 3"]:
    """Unit normals at vertices: the mean of those of the faces, weighted by area."""
    a, b, c = vertices[faces].unbind(1)
    cross = torch.linalg.cross(b - a, c - a, dim=-1)
    total = torch.zeros_like(vertices).index_add(
        0, faces.flatten(), cross.repeat_interleave(3, 0)
    )
    return torch.nn.functional.normalize(total, dim=-1)


def edges_of(faces: Int[Tensor, "faces 3"]) -> Int[Tensor, "edges 2"]:
    """The edges of a mesh, each once."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return edges.sort(-1).values.unique(dim=0)


def bend(
    normals: Float[Tensor, "vertices 3"], edges: Int[Tensor, "edges 2"]
) -> Float[Tensor, ""]:
    """Mean of 1 − cos between the normals at the ends of the edges."""
    ends = normals[edges]
    return (1 - (ends[:, 0] * ends[:, 1]).sum(-1)).mean()


def laplacian(
    vertices: Float[Tensor, "vertices 3"], edges: Int[Tensor, "edges 2"]
) -> Float[Tensor, ""]:
    r"""Mean over vertices of $\|\sum_{j \sim i} (v_i - v_j)\|$ (threestudio's form)."""
    one, two = edges.unbind(1)
    difference = vertices[one] - vertices[two]
    total = torch.zeros_like(vertices).index_add(0, one, difference)
    total = total.index_add(0, two, -difference)
    return total.norm(dim=-1).mean()
