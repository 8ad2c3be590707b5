"""Splats over a background, as images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import dreampropeller as dp
from systems.scene.backgrounds import BACKGROUNDS
from systems.scene.cameras import Views
from systems.scene.gaussians.harmonics import colours
from systems.scene.gaussians.splats import Gaussians
from systems.scene.renderers.base import Rendering
from systems.scene.renderers.splats import Pinhole, choose_backend, rasterize
from systems.settings.checks import one_of
from systems.settings.reader import part

GEOMETRIES = {"gaussian-splatting": Gaussians}
"""Splats by the name configs use, which is threestudio-3dgs's."""


@dataclass(frozen=True)
class SplatRendererConfig:
    """Splatting (``diff-gaussian-rasterizer``).

    Args:
        rasterizer: "torch", "gsplat", or "auto": gsplat on CUDA where it is available,
            torch elsewhere.
    """

    rasterizer: str = "auto"

    def __post_init__(self) -> None:
        one_of("rasterizer", self.rasterizer, ("auto", "torch", "gsplat"))


RENDERERS = {"diff-gaussian-rasterizer": SplatRendererConfig}


@dataclass(frozen=True, kw_only=True)
class SplatSceneConfig:
    """The scene's part of `system`: the names of its parts, and their sections.

    Args:
        geometry_type: Geometry; a key of `GEOMETRIES`.
        geometry: Settings of the geometry.
        background_type: Background; a key of `systems.scene.backgrounds.BACKGROUNDS`.
        background: Settings of the background.
        renderer_type: Renderer; a key of `RENDERERS`.
        renderer: Settings of the renderer.
    """

    geometry_type: str = "gaussian-splatting"
    geometry: Any = field(metadata=part(GEOMETRIES))
    background_type: str = "random-color-background"
    background: Any = field(metadata=part(BACKGROUNDS))
    renderer_type: str = "diff-gaussian-rasterizer"
    renderer: Any = field(metadata=part(RENDERERS))


@dataclass(frozen=True)
class SplatRendering(Rendering):
    """Images of splats, which have no normals, and the projected splats.

    Attributes:
        means: Centres in pixels, differentiable, shape ``(views, splats, 2)``.
        radii: Half sides of boxes in pixels, 0 for splats that are not seen.
    """

    means: Float[Tensor, "views splats 2"]
    radii: Int[Tensor, "views splats 2"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rgb.shape[1], self.rgb.shape[2]


class SplatScene(nn.Module):
    """The optimised splats, their background and their renderer.

    Args:
        config: Settings of the system.
        device: Device of the scene; a rasterizer that is unavailable there is refused.
    """

    def __init__(self, config: SplatSceneConfig, device: torch.device) -> None:
        super().__init__()
        self.geometry = GEOMETRIES[config.geometry_type](config.geometry)
        background: Any = BACKGROUNDS[config.background_type]
        self.background = background(config.background)
        self.renderer = config.renderer
        choose_backend(self.renderer.rasterizer, device)

    def forward(
        self, views: Views, step: int | None, random: dp.StepRandom
    ) -> SplatRendering:
        """Render views, on the device of the splats.

        Args:
            views: The views.
            step: A training step, in which the background varies; None: evaluation.
            random: Source of the randomness of a step.
        """
        splats = self.geometry
        camera = Pinhole.of(views, splats.means)
        away = splats.means - camera.centres[:, None]
        painted = colours(splats.harmonics, away)
        with torch.autocast(splats.means.device.type, enabled=False):
            foreground, opacity, means, radii = rasterize(
                splats.means,
                splats.scales,
                splats.quats,
                splats.opacities.sigmoid(),
                painted,
                camera,
                choose_backend(self.renderer.rasterizer, splats.means.device),
            )
        directions = views.cameras.rays(views.height, views.width)[1]
        behind = self.background(directions.to(foreground), step, random)
        rgb = foreground + (1 - opacity) * behind
        return SplatRendering(
            rgb,
            foreground,
            opacity,
            torch.zeros_like(rgb),
            torch.zeros_like(opacity),
            means,
            radii,
        )
