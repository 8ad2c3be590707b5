r"""A mesh of fixed shape whose maps are optimised.

A pixel is the mean over its samples of the albedo that their rays meet, shaded by the
material; samples are rays through the centres of a finer image. The image is linear in
the albedo but for its activation, so its gradient is cheap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.scene.backgrounds import BACKGROUNDS
from systems.scene.cameras import Views
from systems.scene.materials import MATERIALS, Material
from systems.scene.mesh_files import with_texture
from systems.scene.meshes.loading import MeshConfig, load_surface
from systems.scene.reflectance import Reflectance
from systems.scene.renderers.base import Rendering
from systems.scene.renderers.raster import (
    Fragments,
    RasterConfig,
    pooled,
    rasterize,
    sample,
)
from systems.scene.renderers.silhouettes import Adjacency, antialias
from systems.settings.reader import part

TEXTURED = {"textured-mesh": MeshConfig}
SURFACES: Mapping[str, type[Material]] = {
    **MATERIALS,
    "pbr-with-point-light-material": Reflectance,
}
"""Materials of a mesh by their names in configs."""
_SOFT = 0.01
"""Distance that initial colours keep from 0 and 1, where the sigmoid is flat."""


@dataclass(frozen=True)
class MeshRendererConfig(RasterConfig):
    """Rasterisation of a mesh (``mesh-rasterizer``).

    Args:
        antialias: Blend the samples over silhouettes, too.
    """

    antialias: bool = False


RASTERIZERS = {"mesh-rasterizer": MeshRendererConfig}


@dataclass(frozen=True, kw_only=True)
class TexturedSceneConfig:
    """The scene's part of `system`: the names of its parts, and their sections.

    Args:
        geometry_type: Geometry; a key of `TEXTURED`.
        geometry: The mesh and its maps.
        material_type: Material; a key of `SURFACES`.
        material: Settings of the material.
        background_type: Background; a key of `systems.scene.backgrounds.BACKGROUNDS`.
        background: Settings of the background.
        renderer_type: Renderer; a key of `RASTERIZERS`.
        renderer: Settings of the renderer.
    """

    geometry_type: str = "textured-mesh"
    geometry: Any = field(metadata=part(TEXTURED))
    material_type: str = "no-material"
    material: Any = field(metadata=part(SURFACES))
    background_type: str = "random-color-background"
    background: Any = field(metadata=part(BACKGROUNDS))
    renderer_type: str = "mesh-rasterizer"
    renderer: Any = field(metadata=part(RASTERIZERS))

    def __post_init__(self) -> None:
        for name in ("color_activation", "albedo_activation"):
            if getattr(self.material, name, "sigmoid") != "sigmoid":
                raise ValueError(
                    f"`material.{name}` is `{getattr(self.material, name)}`: the maps "
                    "of a mesh are read through `sigmoid`; leave it out."
                )
        learned = self.geometry.learn_roughness or self.geometry.learn_metallic
        if learned and not issubclass(SURFACES[self.material_type], Reflectance):
            raise ValueError(
                f"`{self.material_type}` shows neither roughness nor metalness: write "
                "`material_type: pbr-with-point-light-material`, or leave "
                "`geometry.learn_roughness` and `geometry.learn_metallic` out."
            )


class Maps(nn.Module):
    """The maps of a mesh, before their sigmoid.

    Args:
        config: Mesh and maps.

    Raises:
        MeshError: The mesh cannot be used.
    """

    def __init__(self, config: MeshConfig) -> None:
        super().__init__()
        self.config = config
        self.surface = load_surface(config)
        side = config.texture_resolution
        albedo = torch.from_numpy(self.surface.colours).float()
        if not isinstance(config.initial, str):
            albedo = torch.full_like(albedo, config.initial)
        self.albedo = nn.Parameter(_unsquashed(albedo))
        for name in ("roughness", "metallic"):
            level = torch.full((side, side, 1), float(getattr(config, name)))
            if getattr(config, f"learn_{name}"):
                self.register_parameter(name, nn.Parameter(_unsquashed(level)))

    def map(self, name: str) -> Float[Tensor, "side side channels"]:
        """A learned map before its sigmoid, smoothed."""
        return smoothed(getattr(self, name), self.config.smoothing)

    def level(self, name: str, uv: Tensor) -> Float[Tensor, "points 1"]:
        """Roughness or metalness at texture coordinates."""
        if name in self._parameters:
            return sample(self.map(name), uv).sigmoid()
        return torch.full_like(uv[:, :1], getattr(self.config, name))

    @property
    def digest(self) -> str:
        """A digest of shape and texture coordinates: what a state belongs to."""
        surface = self.surface
        parts = (surface.vertices, surface.faces, surface.uv)
        hashes = [hashlib.sha256(part.tobytes()).digest() for part in parts]
        return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]


def smoothed(
    image: Float[Tensor, "rows columns channels"], sigma: float
) -> Float[Tensor, "rows columns channels"]:
    """An image convolved with a Gaussian, continued at its edges.

    Args:
        image: The image.
        sigma: Standard deviation in texels; 0: the image itself.
    """
    if not sigma:
        return image
    reach = max(1, math.ceil(2.5 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    planes = image.permute(2, 0, 1)[:, None]
    planes = nn.functional.pad(planes, (reach,) * 4, mode="replicate")
    planes = nn.functional.conv2d(planes, kernel[None, None, :, None])
    planes = nn.functional.conv2d(planes, kernel[None, None, None, :])
    return planes[:, 0].permute(1, 2, 0)


def _unsquashed(values: Tensor) -> Tensor:
    return values.clamp(_SOFT, 1 - _SOFT).logit()


class TexturedScene(nn.Module):
    """A mesh, its maps, its material and the background.

    Args:
        config: Settings of the system.
        device: Device of the scene.

    Raises:
        MeshError: The mesh cannot be used.
        ValueError: The rasterizer is not available here.
    """

    def __init__(self, config: TexturedSceneConfig, device: torch.device) -> None:
        super().__init__()
        self.geometry = Maps(config.geometry)
        material: Any = SURFACES[config.material_type]
        background: Any = BACKGROUNDS[config.background_type]
        self.material: Material = material(config.material)
        self.background = background(config.background)
        self.renderer = config.renderer
        surface = self.geometry.surface
        self.vertices, self.normals, self.uv = (
            torch.from_numpy(part).float().to(device)
            for part in (surface.vertices, surface.normals, surface.uv)
        )
        self.faces = torch.from_numpy(surface.faces).to(device)
        self.visibility = self.renderer.visibility(self.vertices, self.faces)
        self.adjacency: Adjacency | None = None
        if self.renderer.antialias:  # seams of the texture merged
            _, merged = self.vertices.unique(dim=0, return_inverse=True)
            self.adjacency = Adjacency.of(merged[self.faces])

    def forward(
        self, views: Views, step: int | None, random: dp.StepRandom
    ) -> Rendering:
        """Render views, on the device of the mesh.

        Args:
            views: The views.
            step: A training step, in which shading and background vary; None:
                evaluation.
            random: Source of the randomness of a step.
        """
        with torch.autocast(self.vertices.device.type, enabled=False):
            foreground, opacity = self._foreground(views, step, random)
        directions = views.cameras.rays(views.height, views.width)[1]
        behind = self.background(directions.to(foreground), step, random)
        rgb = foreground + (1 - opacity) * behind
        none = torch.zeros_like(opacity)
        return Rendering(rgb, foreground, opacity, torch.zeros_like(rgb), none)

    def _foreground(
        self, views: Views, step: int | None, random: dp.StepRandom
    ) -> tuple[Tensor, Tensor]:
        fine = self.renderer.finer(views, step)
        seen = rasterize(self.vertices, self.faces, fine, self.visibility)
        uv = seen.interpolate(self.uv, self.faces)
        colours = self._colours(fine, seen, uv, step, random)
        layers = seen.image(torch.cat([colours, torch.ones_like(uv[:, :1])], -1))
        if self.adjacency is not None:
            layers = antialias(
                layers, seen, self.vertices, self.faces, fine, self.adjacency
            )
        layers = pooled(layers, views)
        return layers[..., :3], layers[..., 3:]

    def _colours(
        self,
        views: Views,
        seen: Fragments,
        uv: Tensor,
        step: int | None,
        random: dp.StepRandom,
    ) -> Float[Tensor, "hits 3"]:
        """Shaded colours of the samples."""
        material = self.material.at(step, random)
        albedo = material.albedo(sample(self.geometry.map("albedo"), uv))
        shading = material.shading(step, random)
        if shading == "albedo":
            return albedo
        points = seen.interpolate(self.vertices, self.faces)
        normals = seen.interpolate(self.normals, self.faces)
        view = seen.hit.nonzero()[:, 0]
        eye = views.cameras.axes()[0].to(points)[view]
        light = views.light.to(points)[view]
        # Of a surface without thickness the side that is seen is lit.
        away = ((eye - points) * normals).sum(-1, keepdim=True) < 0
        normals = torch.where(away, -normals, normals)
        normals = torch.nn.functional.normalize(normals, dim=-1)
        if shading == "textureless":
            albedo = torch.ones_like(albedo)
        if isinstance(material, Reflectance):
            roughness, metallic = (
                self.geometry.level(name, uv) for name in ("roughness", "metallic")
            )
            return material.reflect(
                albedo, roughness, metallic, points, normals, light, eye
            )
        return albedo * material.light(points, normals, light)

    def mesh(self) -> Any:
        """The mesh with its maps, as `systems.scene.mesh_files` writes it."""
        surface, config = self.geometry.surface, self.geometry.config

        def shown(name: str) -> np.ndarray:
            raw = self.geometry.map(name).detach().cpu()
            albedo = self.material.albedo(raw.reshape(-1, raw.shape[-1]))
            return surface.texels.spread(albedo.reshape(raw.shape).double().numpy())

        levels = {
            name: shown(name)[..., 0]
            if getattr(config, f"learn_{name}")
            else getattr(config, name)
            for name in ("roughness", "metallic")
        }
        return with_texture(
            surface.vertices,
            surface.faces,
            surface.normals,
            surface.uv,
            shown("albedo"),
            **levels,
        )
